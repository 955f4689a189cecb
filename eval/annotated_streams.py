"""Read annotated streams, and embed them window by window.

Each line of a JSONL file is a stream: a video of any length, with annotations at moments.

    {"video": "kitchen.mp4", "events": [{"time": 3.2, "text": "the person cuts an onion"}, …]}

Shapes: S windows of a stream, A its annotations, D embedding size.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.task import Task
from modeling_vljepa.pipelines.segmentation import as_unit
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow, StreamEncoder
from processing import MediaError
from processing.rows import BadRow
from processing.stream_store import StoredStream

LATE = 1.0  # seconds: `end_time` is the last frame's beginning, so annotations may be a bit later


@dataclass(frozen=True)
class AnnotatedStream:
    """A video with annotations.

    Attributes:
        line (`int`): line of the JSONL file, from 1.
        video (`str`): path of an existing file.
        times (`np.ndarray` of shape `(A,)`): seconds, ascending.
        texts (`list[str]` of length A)
    """

    line: int
    video: str
    times: np.ndarray
    texts: list[str]


def read_streams(path: Path) -> tuple[list[AnnotatedStream], list[BadRow]]:
    """Read the streams of a JSONL file, and the lines that are not streams.

    Raises: `ValueError` if no line is a stream.
    """
    streams, bad = [], []
    with open(path, "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                streams.append(_stream(path, line_number, json.loads(line)))
            except ValueError as error:  # errors of the encoding and of JSON are ValueErrors too
                bad.append(BadRow(str(path), line_number, str(error)))
    if not streams:
        reason = f"The first reason: {bad[0]}" if bad else "It is empty."
        raise ValueError(f"{path}: no usable stream. {reason}")
    return streams, bad


def _stream(path: Path, line_number: int, row: dict) -> AnnotatedStream:
    if not isinstance(row, dict) or not {"video", "events"} <= row.keys():
        raise ValueError('a line must be an object with "video" and "events"')
    video = path.parent / str(row["video"])
    if not video.is_file():
        raise ValueError(f"video: the file {row['video']} is missing")
    events = row["events"]
    if not isinstance(events, list) or not events:
        raise ValueError("events: must be a list with at least one event")
    for event in events:
        if not isinstance(event, dict) or not {"time", "text"} <= event.keys():
            raise ValueError(f'events: {event!r} must be {{"time": seconds, "text": ...}}')
        time, text = event["time"], event["text"]
        # JSON's integers have no limit; a larger one than a float holds would overflow below.
        is_number = isinstance(time, int | float) and not isinstance(time, bool)
        if not is_number or not 0 <= time <= sys.float_info.max:
            raise ValueError(f"events: time is {time!r}, must be seconds from 0")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"events: text at {time} s is empty")
    events = sorted(events, key=lambda event: event["time"])
    times = np.array([event["time"] for event in events], dtype=float)
    return AnnotatedStream(line_number, str(video), times, [event["text"] for event in events])


@dataclass(frozen=True)
class EmbeddedStream:
    """The embeddings of a stream.

    Attributes:
        embeds (`np.ndarray` of shape `(S, D)`): unit vectors.
        times (`np.ndarray` of shape `(S,)`): seconds, the middle of each window.
        end_time (`float`): seconds, of the last frame.
    """

    annotated: AnnotatedStream
    embeds: np.ndarray
    times: np.ndarray
    end_time: float


def embed_windows(task: Task, video: str) -> tuple[list[EmbeddedWindow], int]:
    """Return the embedded windows of a video, and the number of its broken frames."""
    encoder, benchmark = StreamEncoder(task.vljepa, task.processor, task.query), task.benchmark
    if task.features is not None:
        stored = task.features.stream(video, stride=benchmark.stride, fps=benchmark.fps)
        return list(embed_stored(encoder, stored, task.batch_size)), stored.broken
    with task.processor.watch(
        video, window=benchmark.num_frames, stride=benchmark.stride, fps=benchmark.fps
    ) as windows:
        return list(encoder.stream(windows, task.batch_size)), windows.report.broken


def embed_stored(
    encoder: StreamEncoder, stored: StoredStream, batch_size: int
) -> Iterator[EmbeddedWindow]:
    """Embed the windows of a stored stream."""
    model = encoder.model
    for times, tokens in stored.batches(batch_size):
        yield from encoder.embed_encoded(times, tokens.to(model.device, model.dtype))


def embed_streams(
    task: Task, streams: list[AnnotatedStream]
) -> tuple[list[EmbeddedStream], list[str]]:
    """Embed every window of every stream, with the query, window and stride of the benchmark.

    With `task.features`, no frame is decoded and the X-Encoder is not run.

    Returns: the streams, and a sentence for each stream or frame that could not be read and for
        annotations after the end of a video.
    Raises: `ValueError` if no stream can be read, `FeatureError` for one that is not stored.
    """
    task.vljepa.eval()
    left_out: list[str] = []
    found = []
    for stream in tqdm(streams, "streams"):
        try:
            embedded, broken = embed_windows(task, stream.video)
        except MediaError as error:
            left_out.append(f"line {stream.line}: {error}")
            continue
        if broken:
            left_out.append(f"line {stream.line}: {broken} broken frames of {stream.video}")
        if not embedded:
            left_out.append(f"line {stream.line}: {stream.video} has no frames")
            continue
        end_time = embedded[-1].end_time
        if not end_time:
            left_out.append(
                f"line {stream.line}: {stream.video} has one frame, so it lasts no time"
            )
            continue
        late = stream.times[stream.times > end_time + LATE]
        if len(late):
            left_out.append(
                f"line {stream.line}: {stream.video} ends at {end_time:g} s, before {len(late)} of "
                "its annotations, which are paired with its last text"
            )
        embeds = as_unit(torch.stack([window.embedding for window in embedded]))
        times = np.array([window.time for window in embedded])
        found.append(EmbeddedStream(stream, embeds, times, end_time))
    if not found:
        raise ValueError(f"no stream could be read. The first reason: {left_out[0]}")
    return found, left_out


__all__ = ["AnnotatedStream", "EmbeddedStream", "embed_stored", "embed_streams", "read_streams"]
