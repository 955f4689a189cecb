"""Cost of watching a stream, and the saving by selective decoding:
`python -m benchmarks.streaming --model DIR --rows data/streams/test_streams.jsonl`.

It prints CPU-seconds per minute of stream for each part: frames (decoding and preprocessing),
X-Encoder, Predictor, segmentation, and Y-Decoder; and for reading the windows' visual tokens from a
feature store, which replaces frames and X-Encoder. The Y-Decoder's cost is given for three numbers
of texts: one per window, 2.5 per annotation (uniform), and 2.85 times fewer than uniform
(`eval/tasks/selective_decoding.py`). Texts are decoded one by one, as for a live stream, and in
batches, as in evaluation. Every figure is the minimum over the rounds.

`--live SECONDS` plays the beginning of each stream as a camera would, in real time, and prints how
long a caption takes: median and 95th percentile of the wall-clock time from the moment when the
source hands over a frame to

- the embedding of the window that ends with it;
- the caption of the segment that it closes;
- the caption of the segment that ends with it, which includes the frames that the segmenter waits
  for.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.measure import cpu_seconds
from eval.annotated_streams import read_streams
from eval.tasks.selective_decoding import CLAIM, REFERENCE_DENSITY
from modeling_vljepa import StreamSession, VLJEPAForConditionalGeneration, decode_texts
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, WardSegmenter
from modeling_vljepa.pipelines.stream_session import StreamEncoder
from processing import FrameStream, StreamReport, VLJEPAProcessor, Window
from processing.feature_store import made_with
from processing.stream_store import StreamStore
from training.data.feature_writer import PLAN
from training.data.stream_writer import write_stream

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
    parser.add_argument("--live", type=float, metavar="SECONDS", help="measure the latency instead")
    parser.add_argument("--fps", type=float, help="with --live: frames per second; all by default")
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

    def store(self, folder: Path) -> StreamStore:
        """Store the visual tokens of all windows in an empty folder."""
        model, processor = self.model.vljepa, self.processor
        frames = processor.video_processor.num_frames
        facts = made_with(model, processor.video_processor, frames)
        (folder / PLAN).touch()
        options = {"dtype": "bfloat16", "batch_size": BATCH, "bf16": False}
        for stream in self.streams:
            write_stream(
                folder, stream.video, (frames, 1, None), facts, model, processor, **options
            )
        return StreamStore.open(folder, model, processor.video_processor)

    def frames(self) -> list[list[Window]]:
        """Read all windows of every stream."""
        seen = []
        for stream in self.streams:
            with self.processor.watch(stream.video, stride=1) as windows:
                seen.append(list(windows))
        self.minutes = sum(each[-1].end_time for each in seen) / 60
        return seen

    @torch.no_grad()
    def round(self, store: StreamStore) -> dict[str, float]:
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
        stored = [store.stream(each.video, stride=1, fps=None) for each in self.streams]
        timed(
            "feature store",
            lambda: [tokens.float() for each in stored for _, tokens in each.batches(BATCH)],
        )
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


# -- latency -------------------------------------------------------------------------------


class Camera:
    """Source that hands over the frames of a video when their time has come, as a camera does.

    Attributes:
        seen (`dict[float, float]`): clock at which a frame was handed over, by the frame's time.
    """

    def __init__(self, video: str, seconds: float, fps: float | None):
        # Decoded before: a camera's frames are pixels already.
        with FrameStream(video, fps=fps) as frames:
            self.frames = []
            for frame in frames:
                if frame.time > seconds:
                    break
                self.frames.append((frame.time, frame.pixels))
        self.seen: dict[float, float] = {}

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        start = time.perf_counter() - self.frames[0][0]
        for seconds, pixels in self.frames:
            time.sleep(max(start + seconds - time.perf_counter(), 0))
            self.seen[seconds] = time.perf_counter()
            yield seconds, pixels

    def since(self, moment: float) -> float:
        """Return the seconds since the first frame at or after a moment was handed over."""
        return time.perf_counter() - min(
            clock for seconds, clock in self.seen.items() if seconds >= moment
        )


def play(watched: Watched, camera: Camera, found: dict[str, list[float]]) -> StreamReport:
    """Watch a live source, add its latencies by name, and return the source's report."""
    session = StreamSession(
        watched.model, watched.processor, query=watched.query, decode=watched.decode
    )
    with watched.processor.watch(iter(camera), stride=1, live=True) as windows:
        for window in session.encoder.stream(windows):
            found["frame to embedding"].append(camera.since(window.end_time))
            for segment in session.push(window):
                found["closing frame to caption"].append(camera.since(window.end_time))
                found["segment's end to caption"].append(camera.since(segment.end_time))
        return windows.report


def print_latencies(watched: Watched, args: argparse.Namespace) -> None:
    watched.decode(torch.randn(1, watched.model.config.embedding_dim))  # allocates memory
    found = defaultdict(list)
    for stream in watched.streams:
        report = play(watched, Camera(stream.video, args.live, args.fps), found)
        print(f"{stream.video}: {report.frames} frames live, {report.dropped} dropped")
    print("wall-clock milliseconds, 1 thread: median, 95th percentile, number")
    for name, values in found.items():
        median, late = 1000 * np.quantile(values, (0.5, 0.95))
        print(f"  {name:<26}{median:8.1f}{late:8.1f}{len(values):6}")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    watched = Watched(args)
    if args.live is not None:
        print_latencies(watched, args)
        return
    with TemporaryDirectory() as folder:
        store = watched.store(Path(folder))
        rounds = [watched.round(store) for _ in range(args.rounds)]
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
    for name in (*ENCODING, "feature store", "Ward", "online segmenter"):
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
