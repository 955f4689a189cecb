"""Annotated streams, and what a model makes of them window by window.

A stream is a line of a JSONL file: a video of any length, with annotations at moments.

    {"video": "kitchen.mp4", "events": [{"time": 3.2, "text": "the person cuts an onion"}, …]}

Shapes: S windows of a stream, A its annotations, D embedding size.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.task import Task
from modeling_vljepa.pipelines.segmentation import as_unit
from modeling_vljepa.pipelines.stream_session import StreamEncoder
from processing import MediaError
from processing.rows import BadRow

LATE = 1.0  # seconds after the last frame, whose time is that of its beginning


@dataclass(frozen=True)
class AnnotatedStream:
    """A video and what happens in it.

    Attributes:
        line (`int`): of the JSONL file, from 1.
        video (`str`): an existing file.
        times (`np.ndarray` of shape `(A,)`): seconds, ascending.
        texts (`list[str]` of length A)
    """

    line: int
    video: str
    times: np.ndarray
    texts: list[str]


def read_streams(path: Path) -> tuple[list[AnnotatedStream], list[BadRow]]:
    """The streams of a JSONL file, and the lines that are none.

    Raises: `ValueError` where no line is one.
    """
    streams, bad = [], []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                streams.append(_stream(path, number, json.loads(line)))
            except ValueError as error:  # of the encoding and of JSON, too
                bad.append(BadRow(str(path), number, str(error)))
    if not streams:
        reason = f"The first reason: {bad[0]}" if bad else "It is empty."
        raise ValueError(f"{path}: no usable stream. {reason}")
    return streams, bad


def _stream(path: Path, number: int, row: dict) -> AnnotatedStream:
    if not isinstance(row, dict) or not {"video", "events"} <= row.keys():
        raise ValueError('a line is an object with "video" and "events"')
    video = path.parent / str(row["video"])
    if not video.is_file():
        raise ValueError(f"video: there is no file {row['video']}")
    events = row["events"]
    if not isinstance(events, list) or not events:
        raise ValueError("events: a list of at least one is needed")
    for event in events:
        if not isinstance(event, dict) or not {"time", "text"} <= event.keys():
            raise ValueError(f'events: {event!r} is no {{"time": seconds, "text": ...}}')
        time, text = event["time"], event["text"]
        # From 0 to no more than a float holds, which JSON's integers do not mind.
        is_number = isinstance(time, int | float) and not isinstance(time, bool)
        if not is_number or not 0 <= time <= sys.float_info.max:
            raise ValueError(f"events: time is {time!r}, must be seconds from 0")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"events: text at {time} s is empty")
    events = sorted(events, key=lambda event: event["time"])
    times = np.array([event["time"] for event in events], dtype=float)
    return AnnotatedStream(number, str(video), times, [event["text"] for event in events])


@dataclass(frozen=True)
class EmbeddedStream:
    """What the model makes of a stream.

    Attributes:
        embeds (`np.ndarray` of shape `(S, D)`): unit vectors.
        times (`np.ndarray` of shape `(S,)`): seconds, the middle of each window.
        end_time (`float`): of its last frame.
    """

    annotated: AnnotatedStream
    embeds: np.ndarray
    times: np.ndarray
    end_time: float


def embed_streams(
    task: Task, streams: list[AnnotatedStream]
) -> tuple[list[EmbeddedStream], list[str]]:
    """Embed every window of every stream, with the query, window and stride of the benchmark.

    Returns: the streams, and a sentence for each stream or frame that could not be read and for
        annotations after the end of a video.
    Raises: `ValueError` if no stream can be read.
    """
    model, benchmark = task.vljepa.eval(), task.benchmark
    left_out: list[str] = []
    found = []
    for stream in tqdm(streams, "streams"):
        encoder = StreamEncoder(model, task.processor, benchmark.query)
        try:
            with task.processor.watch(
                stream.video,
                window=benchmark.num_frames,
                stride=benchmark.stride,
                fps=benchmark.fps,
            ) as windows:
                embedded = list(encoder.stream(windows, task.batch_size))
        except MediaError as error:
            left_out.append(f"line {stream.line}: {error}")
            continue
        if broken := windows.report.broken:
            left_out.append(f"line {stream.line}: {broken} broken frames of {stream.video}")
        if not embedded:
            left_out.append(f"line {stream.line}: {stream.video} has no frames")
            continue
        end_time = embedded[-1].end_time
        if not end_time:
            left_out.append(
                f"line {stream.line}: {stream.video} is one frame: decodes per second need seconds"
            )
            continue
        late = stream.times[stream.times > end_time + LATE]
        if len(late):
            left_out.append(
                f"line {stream.line}: {stream.video} ends at {end_time:g} s, and {len(late)} of "
                "its annotations come later: they are paired with its last text"
            )
        embeds = as_unit(torch.stack([window.embedding for window in embedded]))
        times = np.array([window.time for window in embedded])
        found.append(EmbeddedStream(stream, embeds, times, end_time))
    if not found:
        raise ValueError(f"no stream could be read. The first reason: {left_out[0]}")
    return found, left_out


__all__ = ["AnnotatedStream", "EmbeddedStream", "embed_streams", "read_streams"]
