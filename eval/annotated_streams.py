"""Read annotated streams, and embed them window by window.

Each line of a JSONL file is a stream: a video of any length, with annotations at moments.

    {"video": "kitchen.mp4", "events": [{"time": 3.2, "text": "the person cuts an onion"}, …]}

Shapes: S windows of a stream, A its annotations, D embedding size.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.embed import Embedded, Wanted, advance, query_tokens, run_job, store_found
from eval.embedding_store import PartWriter, key_of
from eval.task import Task
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.segmentation import as_unit
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow, StreamEncoder
from processing import MediaError, VLJEPAProcessor
from processing.feature_store import FeatureError
from processing.rows import BadRow, content_key
from processing.stream_store import StoredStream, StreamStore

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

    A second line about a video is not used: its frames would count twice.

    Raises: `ValueError` if no line is a stream.
    """
    streams, bad = [], []
    line_of: dict[str, int] = {}
    with open(path, "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                stream = _stream(path, line_number, json.loads(line))
                if (first := line_of.setdefault(stream.video, line_number)) != line_number:
                    raise ValueError(
                        f"video: line {first} is about {Path(stream.video).name} too: put all its "
                        "events on one line"
                    )
                streams.append(stream)
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


@dataclass(frozen=True)
class StreamJob:
    """Streams to embed: a share of those of one benchmark.

    Attributes:
        items (`list[Wanted]`): videos.
        query (`str`), window (`int`), stride (`int`), fps (`float`, *optional*): those of the
            benchmark.
        batch_size (`int`): windows per forward pass.
        features (`StreamStore`, *optional*): visual tokens to read in place of the videos.
        writer ([`PartWriter`], *optional*): what stores the embeddings, stream by stream.
    """

    items: list[Wanted]
    query: str
    window: int
    stride: int
    fps: float | None
    batch_size: int
    features: StreamStore | None
    writer: PartWriter | None

    def run(self, model: VLJEPAModel, processor: VLJEPAProcessor, progress: tqdm) -> Embedded:
        """Embed every window of every stream, to a table for each stream; see `_table`.

        Raises: `ValueError` that names a video with an embedding that is NaN or infinite;
            `FeatureError` for a stream that is not stored.
        """
        model.eval()
        result = Embedded()
        for stream in self.items:
            encoder = StreamEncoder(model, processor, self.query)
            try:
                table = self._table(encoder, processor, stream.text)
            except MediaError as error:
                result.broken[stream.number] = str(error)
            except FeatureError:
                raise
            except ValueError as error:
                raise ValueError(f"{stream.text}: {error}") from error
            else:
                result.embeds |= store_found({stream: table}, self.writer)
            advance(progress, 1)
        return result

    def _table(
        self, encoder: StreamEncoder, processor: VLJEPAProcessor, video: str
    ) -> torch.Tensor:
        """Return the windows of a video `(S, 3 + D)`, float64.

        A row holds the seconds of the first and the last frame, the number of the stream's broken
        frames, and the embedding.
        """
        if self.features is not None:
            stored = self.features.stream(video, stride=self.stride, fps=self.fps)
            rows = [row_of(each) for each in embed_stored(encoder, stored, self.batch_size)]
            return with_broken(rows, stored.broken)
        with processor.watch(
            video, window=self.window, stride=self.stride, fps=self.fps
        ) as windows:
            # Row by row: the visual tokens of a whole stream would not fit into memory.
            rows = [row_of(each) for each in encoder.stream(windows, self.batch_size)]
            return with_broken(rows, windows.report.broken)


def row_of(window: EmbeddedWindow) -> torch.Tensor:
    """Return the seconds of a window's first and last frame, and its embedding: `(2 + D,)`."""
    times = torch.tensor([window.start_time, window.end_time], dtype=torch.float64)
    return torch.cat([times, window.embedding.double()])


def with_broken(rows: list[torch.Tensor], broken: int) -> torch.Tensor:
    """Return rows `(2 + D,)` as a table `(S, 3 + D)` with the number of broken frames."""
    if not rows:
        return torch.empty(0, 3, dtype=torch.float64)
    table = torch.stack(rows)
    counts = torch.full((len(table), 1), broken, dtype=torch.float64)
    return torch.cat([table[:, :2], counts, table[:, 2:]], dim=1)


def stream_tables(task: Task, streams: list[AnnotatedStream]) -> Embedded:
    """Return the table of each stream, by its place in the list, or why it could not be read.

    Streams that the task's store has are not embedded; the processes of its team share the rest.
    """
    benchmark, store = task.benchmark, task.store
    job = StreamJob(
        items=[],
        query=task.query,
        window=benchmark.num_frames,
        stride=benchmark.stride,
        fps=benchmark.fps,
        batch_size=task.batch_size,
        features=task.features,
        writer=None if store is None else store.writer,
    )
    wanted = [Wanted(number, each.video, b"") for number, each in enumerate(streams)]
    found: dict[int, torch.Tensor] = {}
    if store is not None:
        wanted = [replace(each, key=stream_key(job, task.processor, each.text)) for each in wanted]
        found = {each.number: store.embeds[each.key] for each in wanted if each.key in store.embeds}
    job = replace(job, items=[each for each in wanted if each.number not in found])
    bar = {"found": len(found), "desc": "streams", "unit": "stream"}
    result = run_job(job, task.vljepa, task.processor, store, **bar)
    if store is not None:
        store.add({wanted[number].key: table for number, table in result.embeds.items()})
    return replace(result, embeds=found | result.embeds)


def stream_key(job: StreamJob, processor: VLJEPAProcessor, video: str) -> bytes:
    """Return the key of a stream's table; empty if the video cannot be read."""
    if not (content := content_key({"video": video})):
        return b""
    source = "stream"
    if job.features is not None:  # stored features are rounded
        source += f" {json.dumps(job.features.precision())}"
    tokens = query_tokens(processor, [job.query])[job.query]
    return key_of(source, content, job.window, job.stride, repr(job.fps), tokens)


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
    left_out: list[str] = []
    found = []
    result = stream_tables(task, streams)
    for number, stream in enumerate(streams):
        if number in result.broken:
            left_out.append(f"line {stream.line}: {result.broken[number]}")
            continue
        table = result.embeds[number].numpy()  # (S, 3 + D)
        if broken := int(table[0, 2]) if len(table) else 0:
            left_out.append(f"line {stream.line}: {broken} broken frames of {stream.video}")
        if not len(table):
            left_out.append(f"line {stream.line}: {stream.video} has no frames")
            continue
        end_time = float(table[-1, 1])
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
        embeds = as_unit(torch.from_numpy(table[:, 3:]).float())
        times = (table[:, 0] + table[:, 1]) / 2
        found.append(EmbeddedStream(stream, embeds, times, end_time))
    if not found:
        raise ValueError(f"no stream could be read. The first reason: {left_out[0]}")
    return found, left_out


__all__ = ["AnnotatedStream", "EmbeddedStream", "embed_stored", "embed_streams", "read_streams"]
