"""Watch a video, a camera or an address, and print a caption whenever its meaning changes.

    python -m eval.watch --model runs/babyai/decoder --source kitchen.mp4 --fps 4 --output out
    python -m eval.watch --model user/name --source 0 --candidates "a cat" "a dog"

Each caption is printed with the agreement of its segment's embeddings; a summary follows at the
end. `--output` is a folder for `captions.srt`, `captions.vtt` and a picture, `timeline.png`. A
source without an end is watched until Ctrl-C.
"""

import argparse
import inspect
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.annotated_streams import embed_stored
from eval.models import check_vljepa, load_model
from eval.subtitles import clock, one_line, write_subtitles
from eval.timeline import timeline
from modeling_vljepa import (
    OnlineSegmenter,
    Segment,
    StreamEncoder,
    StreamSession,
    WardSegmenter,
)
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPAStreamingCaptionPipeline
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow
from processing import FrameStream, StreamReport, VLJEPAProcessor, WindowStream
from processing.output import check_output_folder, writing
from processing.stream_store import StreamStore

SETTINGS = tuple(inspect.signature(OnlineSegmenter).parameters)
FILE_BATCH = 8  # windows per forward pass of a file; a live source cannot wait and takes one


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument(
        "--source", required=True, help="a video file, the index of a camera, or an address"
    )
    parser.add_argument("--query", help="query of every window; default: the model's caption")
    parser.add_argument(
        "--candidates", nargs="+", help="texts to choose from, instead of a decoder's"
    )
    parser.add_argument("--fps", type=float, help="frames to keep per second; all by default")
    parser.add_argument("--window", type=int, help="frames per window; the processor's by default")
    parser.add_argument("--stride", type=int, help="frames; half a window by default")
    parser.add_argument("--batch-size", type=int, help="windows per forward pass")
    parser.add_argument(
        "--segmenter",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of OnlineSegmenter: drift_threshold=0.1 decodes_per_second=0.35",
    )
    parser.add_argument("--segments", type=int, help="offline: the number of segments of the whole")
    parser.add_argument(
        "--threshold", type=float, help="offline: merge segments below this Ward distance"
    )
    parser.add_argument("--allow-urls", action="store_true", help="open an http(s) or rtsp address")
    parser.add_argument(
        "--features", type=Path, help="a feature store that holds these windows of the file"
    )
    parser.add_argument("--output", type=Path, help="folder for subtitles and timeline")
    return parser.parse_args(argv)


@dataclass
class Watched:
    """The record of a watched stream. It stores a number per window and a caption per segment, so
    that it stays small in a stream without an end."""

    captions: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of windows
    changes: list[float] = field(default_factory=list)  # 1 - cosine to the window before
    last: torch.Tensor | None = None  # embedding (D,)

    def see(self, window: EmbeddedWindow) -> None:
        same = window.embedding if self.last is None else self.last
        cosine = torch.cosine_similarity(window.embedding, same, dim=0)
        self.changes.append(max(1 - cosine.item(), 0.0))
        self.times.append(window.time)
        self.last = window.embedding

    def say(self, segments: list[Segment]) -> None:
        """Print and store segments, above the progress bar if there is one."""
        for each in segments:
            start, end = clock(each.start_time, 1), clock(each.end_time, 1)
            text = one_line(each.text) or "(no words)"
            tqdm.write(f"{start} → {end}  {text}  ({each.confidence:.2f})")
            sys.stdout.flush()
            times = {"start": each.start_time, "end": each.end_time}
            self.captions.append({**times, "text": each.text, "confidence": each.confidence})


class OfflineSession:
    """Same interface as `StreamSession`, but clusters offline and emits all segments on `close`.

    Args:
        session ([`StreamSession`]): decodes the segments.
        segmenter ([`WardSegmenter`]): stores the embeddings and clusters them.
    """

    def __init__(self, session: StreamSession, segmenter: WardSegmenter):
        self.decode = session.decode
        self.segmenter = segmenter
        self.end_time = 0.0

    def push(self, window: EmbeddedWindow) -> list[Segment]:
        self.end_time = window.end_time
        is_first = not self.segmenter.times
        return self.segmenter.push(window.embedding, window.start_time if is_first else window.time)

    def close(self) -> list[Segment]:
        segments = self.segmenter.close(self.end_time)
        return [replace(each, text=self.decode(each.embedding[None])[0]) for each in segments]


# -- options and source --------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """Raise `ValueError` for options that exclude each other."""
    if args.segments is not None and args.threshold is not None:
        raise ValueError("--segments and --threshold: each defines the segments; give only one.")
    if is_offline(args) and args.segmenter:
        raise ValueError(
            "--segmenter sets up the online segmenter, but --segments and --threshold segment "
            "offline: leave one out."
        )
    if is_offline(args) and args.source.isdecimal():
        raise ValueError("--segments and --threshold need a stream that ends; a camera has no end.")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is not a folder. Give another path.")


def is_offline(args: argparse.Namespace) -> bool:
    return args.segments is not None or args.threshold is not None


def segmenter_kwargs(settings: list[str]) -> dict[str, Any]:
    """Parse `["patience=2", "decode_from=mean"]` to a dictionary."""
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--segmenter: {setting} must be NAME=VALUE.")
        if name not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise ValueError(f"--segmenter: {name!r} is unknown; the settings are {known}.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def open_source(args: argparse.Namespace, processor: VLJEPAProcessor) -> WindowStream:
    """Open the source as windows. Offline, an address waits, so that no frame is dropped."""
    return processor.watch(
        int(args.source) if args.source.isdecimal() else args.source,
        window=args.window,
        stride=args.stride,
        fps=args.fps,
        live=False if is_offline(args) else None,
        allow_urls=args.allow_urls,
    )


def seconds_of(frames: FrameStream) -> float | None:
    """Return a file's length from its header; None if unknown, and for cameras and addresses."""
    if frames.is_camera or frames.scheme is not None:
        return None
    with FrameStream(frames.source).video() as stream:
        duration = stream.container.duration
        return duration / 1e6 if duration else None  # AV_TIME_BASE


def new_session(
    pipe: VLJEPAStreamingCaptionPipeline, args: argparse.Namespace
) -> StreamSession | OfflineSession:
    """Return a session for the options.

    Raises: `ValueError` without a decoder and candidates, and for wrong settings of a segmenter.
    """
    session = pipe.session(
        query=args.query,
        candidates=args.candidates,
        segmenter_kwargs=segmenter_kwargs(args.segmenter),
    )
    if not is_offline(args):
        return session
    return OfflineSession(session, WardSegmenter(args.segments, args.threshold))


# -- watching ------------------------------------------------------------------------------


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block is done, or until it is pressed again.

    Otherwise the segment that is being decoded would be lost.
    """
    pressed = []

    def hold(*received: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(received)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def watch(
    session: StreamSession | OfflineSession,
    embedded: Iterable[EmbeddedWindow],
    seconds: float | None,
) -> Watched:
    """Print captions until the source ends or Ctrl-C is pressed; return the record."""
    watched = Watched()
    with tqdm(
        total=seconds,
        desc="watched",
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
        disable=True if seconds is None else None,
    ) as progress:
        try:
            for window in embedded:
                with uninterrupted():
                    watched.see(window)
                    watched.say(session.push(window))
                progress.update(min(window.end_time, seconds or 0.0) - progress.n)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        watched.say(session.close())
    return watched


def summary(watched: Watched, size: int, report: str) -> str:
    """Summarise a stream that was watched in windows of `size` frames."""
    decodes, windows = len(watched.captions), len(watched.times)
    return f"{windows} windows of {size} frames, {decodes} decodes instead of {windows}\n{report}"


def counts(report: StreamReport) -> str:
    """Return the counts of a source that was read."""
    return (
        f"{report.frames} frames, {report.dropped} dropped, {report.broken} broken, "
        f"{report.size_changes} changes of size, {report.leaps} leaps in time, {report.stalls} "
        f"stalls; {report.ended or 'interrupted'}"
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)

    # 1. options and source, checked before the model does anything
    check_options(args)
    if args.output is not None:  # a live stream cannot be watched again
        check_output_folder("--output", args.output)
    model, processor = load_model(args.model)
    purpose = "captions are chosen by embeddings"
    check_vljepa("--model", args.model, model.config, purpose, takes_hybrids=True)
    windows = open_source(args, processor)
    seconds = seconds_of(windows.frames)
    stored = None
    if args.features is not None:
        store = StreamStore.open(
            args.features, model.base_model, processor.video_processor, num_frames=windows.window
        )
        stored = store.stream(args.source, stride=windows.stride, fps=args.fps)

    # 2. the model as a pipeline, and a new session
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = VLJEPAStreamingCaptionPipeline(model=model, processor=processor, device=device)
    session = new_session(pipe, args)

    # 3. watch
    size = args.batch_size if args.batch_size is not None else FILE_BATCH if seconds else 1
    encoder = StreamEncoder(model, processor, args.query)
    with windows:
        if stored is None:
            watched = watch(session, encoder.stream(windows, size), seconds)
            report = counts(windows.report)
        else:
            watched = watch(session, embed_stored(encoder, stored, size), seconds)
            report = f"from {args.features}, {stored.broken} broken frames"
    print(summary(watched, windows.window, report))

    # 4. subtitles and timeline
    if args.output is not None:
        figure = timeline(watched.captions, watched.times, watched.changes)
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
            write_subtitles(args.output, watched.captions)
            figure.savefig(args.output / "timeline.png", dpi=110, metadata={"Software": None})
        names = ("captions.srt", "captions.vtt", "timeline.png")
        print(*(args.output / name for name in names), sep="\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a letter that the terminal lacks must not end it
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
