"""Cost of watching a stream, and the saving by selective decoding:
`python -m benchmarks.streaming --model DIR --rows data/streams/test_streams.jsonl`.

It prints CPU-seconds per minute of stream for each part: frames (decoding and preprocessing),
X-Encoder, Predictor, segmentation, and Y-Decoder. The Y-Decoder's cost is given for three numbers
of texts: one per window, 2.5 per annotation (uniform), and 2.85 times fewer than uniform
(`eval/tasks/selective_decoding.py`). Texts are decoded one by one, as for a live stream, and in
batches, as in evaluation. Every figure is the minimum over the rounds.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import cpu_seconds
from eval.annotated_streams import read_streams
from eval.tasks.selective_decoding import CLAIM, REFERENCE_DENSITY
from modeling_vljepa import VLJEPAForConditionalGeneration, decode_texts
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, WardSegmenter
from modeling_vljepa.pipelines.stream_session import StreamEncoder
from processing import VLJEPAProcessor, Window

BATCH = 32  # windows per pass, and texts per batch of the Y-Decoder
ENCODING = ("frames", "X-Encoder", "Predictor")
WAYS = ("one by one", "together")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint with a Y-Decoder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL file of annotated streams")
    parser.add_argument("--query", default="Tell what the agent did.")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


class Watched:
    """A model and the streams that it watches.

    Attributes:
        found (`torch.FloatTensor` of shape `(S, D)`): the embeddings of the last round.
        minutes (`float`): length of the streams, known after the first round.
    """

    def __init__(self, args: argparse.Namespace):
        self.model = VLJEPAForConditionalGeneration.from_pretrained(args.model).eval()
        self.processor = VLJEPAProcessor.from_pretrained(args.model)
        self.query = args.query
        self.streams = read_streams(args.rows)[0][: args.streams]
        self.annotations = sum(len(stream.times) for stream in self.streams)
        self.minutes = 0.0

    def frames(self) -> list[list[Window]]:
        """Read all windows of every stream."""
        seen = []
        for stream in self.streams:
            with self.processor.watch(stream.video, stride=1) as windows:
                seen.append(list(windows))
        self.minutes = sum(each[-1].end_time for each in seen) / 60
        return seen

    @torch.no_grad()
    def round(self) -> dict[str, float]:
        """Return the CPU-seconds of each part on all streams; those of decoding are per text."""
        seconds = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            since = cpu_seconds()
            value = call()
            seconds[name] = cpu_seconds() - since
            return value

        seen = timed("frames", self.frames)
        encoder = StreamEncoder(self.model.vljepa, self.processor, self.query)
        parts = [each[at : at + BATCH] for each in seen for at in range(0, len(each), BATCH)]
        visual = timed("X-Encoder", lambda: [encoder.encode(part) for part in parts])
        predicted = timed("Predictor", lambda: [encoder.predict(x, encoder.query) for x in visual])
        self.found = torch.cat(predicted)
        timed("Ward", lambda: WardSegmenter(self.annotations).segment(self.found))
        timed("online segmenter", lambda: OnlineSegmenter().segment(self.found))
        # Evenly spaced, because the first windows of a stream look alike.
        sample = self.found[:: max(len(self.found) // BATCH, 1)][:BATCH]
        timed("one by one", lambda: [self.decode(each[None]) for each in sample])
        timed("together", lambda: self.decode(sample))
        for way in WAYS:
            seconds[way] /= len(sample)
        return seconds

    def decode(self, embeds: torch.Tensor) -> list[str]:
        queries = [self.query] * len(embeds)
        return decode_texts(self.model, self.processor, embeds, queries=queries)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    watched = Watched(args)
    rounds = [watched.round() for _ in range(args.rounds)]
    seconds = {name: min(each[name] for each in rounds) for name in rounds[0]}
    minutes = watched.minutes
    reference = round(REFERENCE_DENSITY * watched.annotations)
    counts = {
        "every window": len(watched.found),
        "uniform": reference,
        "selective": round(reference / CLAIM),
    }
    print(
        f"{minutes:.2f} minutes, {len(watched.found)} windows, {watched.annotations} annotations, "
        "1 thread\nCPU-seconds per minute of stream"
    )
    for name in (*ENCODING, "Ward", "online segmenter"):
        print(f"  {name:<18}{seconds[name] / minutes:9.3f}")
    encoding = sum(seconds[name] for name in ENCODING) / minutes
    for way in WAYS:
        print(f"texts decoded {way}: {1000 * seconds[way]:.2f} CPU-milliseconds per text")
        totals = {}
        for name, count in counts.items():
            decoding = seconds[way] * count / minutes
            segmenting = seconds["online segmenter"] / minutes if name == "selective" else 0.0
            totals[name] = encoding + decoding + segmenting
            print(
                f"  {name:<14}{count / minutes / 60:6.2f} texts per second"
                f"{decoding:9.3f} for decoding{totals[name]:9.3f} in total, "
                f"{decoding / totals[name]:.0%} of it decoding"
            )
        print(
            f"  selective: {counts['uniform'] / counts['selective']:.2f} times less decoding than "
            f"uniform, {totals['uniform'] / totals['selective']:.2f} times less in total"
        )


if __name__ == "__main__":
    main()
