"""Watch a video: embed it window by window, segment it, and give each segment a text.

A segment ends where the windows' embeddings change for good. Its text comes from the Y-Decoder, or
is the nearest of the candidate texts. The last videos stay in memory for questions.

Shapes: C texts, D embedding size.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

import av
import gradio as gr
import torch
from transformers import PreTrainedModel, ProcessorMixin

from modeling_vljepa.pipelines.decoding import decode_texts
from modeling_vljepa.pipelines.segmentation import Segment
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow, StreamSession

from .texts import TextEmbedder, read_lines
from .timeline import Curve, Event, span
from .uploads import MAX_VIDEO_PIXELS, examine, seconds_of, unreadable, user_error

FRAMES_PER_SECOND = 5  # that are read by default
OVERLAP = 4  # windows that contain the same frame
# A segment stores one window's visual tokens: 4 MiB with V-JEPA 2 ViT-L, 8 frames of 256 pixels.
MAX_SEGMENTS = 24
MAX_VIDEOS = 4  # in memory


@dataclass(eq=False)
class Watched:
    """The part of a video that was watched so far, and the session that answers questions.

    Attributes:
        session ([`StreamSession`], *optional*): `None` after `forget`.
        seconds (`float`): length of the video.
        report (`StreamReport`): the reader's report on its frames.
        curve ([`Curve`]): one point per window.
        segments (`list[Segment]`): the closed ones.
        status (`str`): `"watching"`, `"stopped"`, or `"seen"` when the video was read to its end.
        marked (`tuple[float, float]`, *optional*): start and end of the segment that fits the
            best answer to the last question.
        events (`list[Event]`, *optional*): the true events of an example.
    """

    session: StreamSession | None
    seconds: float
    report: Any
    curve: Curve = field(default_factory=Curve)
    segments: list[Segment] = field(default_factory=list)
    status: str = "watching"
    marked: tuple[float, float] | None = None
    events: list[Event] | None = None
    # A question arrives in another thread: it waits until the session has taken its window.
    lock: Lock = field(default_factory=Lock)
    last: torch.Tensor | None = None  # embedding (D,)

    @property
    def open_since(self) -> float | None:
        """Start of the open segment in seconds; `None` once the last segment is closed."""
        if self.status == "seen":
            return None
        return self.segments[-1].end_time if self.segments else 0.0

    @property
    def last_time(self) -> float:
        """Middle of the last window in seconds."""
        return self.curve.times[-1] if self.curve.times else 0.0

    def add(self, window: EmbeddedWindow, closed: list[Segment]) -> None:
        """Add a window, and the segments that it closed."""
        change = 0.0
        if self.last is not None:
            change = 1 - torch.cosine_similarity(window.embedding, self.last, dim=0).item()
        self.curve.times.append(window.time)
        self.curve.changes.append(max(change, 0.0))  # rounding may make it slightly negative
        self.segments += closed
        self.last = window.embedding

    def end(self, closed: list[Segment]) -> None:
        """Add the last segment."""
        self.segments += closed
        self.status = "seen"

    def notes(self) -> list[str]:
        """Return the report for the user: the report's own events name files of the server."""
        report, notes = self.report, []
        if report.broken:
            notes.append(f"{report.broken} damaged parts of the video were left out.")
        # An early end is an event as well; a normal end is not.
        if report.ended and any(event.endswith(report.ended) for event in report.events):
            notes.append(f"The video {report.ended}.")
        return notes

    def stop(self) -> None:
        """End the run after the current window."""
        if self.status == "watching":
            self.status = "stopped"

    def forget(self) -> None:
        """End the run and release the session's memory."""
        self.stop()
        self.session = None


def readable(windows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the windows; raise `gr.Error` if the video cannot be decoded."""
    try:
        yield from windows
    except (ValueError, av.FFmpegError) as error:  # ValueError includes the processor's MediaError
        raise unreadable(name) from error


class Watcher:
    """Watches videos and remembers the last `MAX_VIDEOS` of them.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
        writer ([`VLJEPAForConditionalGeneration`], *optional*): the same model with its Y-Decoder.
        captions (`tuple[str]`, *optional*): texts for segments if there is no Y-Decoder and the
            user gives none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        writer: PreTrainedModel | None = None,
        captions: tuple[str, ...] = (),
    ) -> None:
        self.model, self.processor, self.writer = model, processor, writer
        self.captions = captions
        self.embedder = TextEmbedder(model, processor)
        self.videos: deque[Watched] = deque()
        self.window = processor.video_processor.num_frames

    def watch(
        self,
        path: str | Path | None,
        query: str = "",
        candidates: str = "",
        fps: float = FRAMES_PER_SECOND,
    ) -> Iterator[Watched]:
        """Yield the same [`Watched`] as it grows: at the start, after every window, at the end.

        Args:
            path (`str`, *optional*): path of a video.
            query (`str`, *optional*): question asked of every window; a caption by default.
            candidates (`str`, *optional*): texts for the segments, one per line.
            fps (`float`, *optional*): frames of the video that are read per second.

        Raises: `gr.Error` that names the missing or unusable input.
        """
        if not path:
            raise user_error("Upload a video first, or choose a clip from the library.")
        name = escape(Path(path).name)
        if examine(path) == "images":
            raise image_error(path)
        query = (query or "").strip() or self.model.config.prompts["caption"]
        session = StreamSession(
            self.model,
            self.processor,
            query=query,
            decode=self.decoder(query, candidates),
            max_segments=MAX_SEGMENTS,
        )
        stride = max(1, self.window // OVERLAP)
        with self.processor.watch(path, stride=stride, fps=fps) as cut:
            cut.frames.max_pixels = MAX_VIDEO_PIXELS  # frames may be larger than the header states
            seen = Watched(session, seconds_of(path), cut.report)
            self.remember(seen)
            try:
                yield seen
                for window in session.encoder.stream(readable(cut, name)):
                    with seen.lock:
                        seen.add(window, session.push(window))
                    yield seen
                    if seen.status != "watching":
                        return
                if not seen.curve.times:
                    raise unreadable(name)
                with seen.lock:
                    seen.end(session.close())
                yield seen
            finally:
                # gradio closes the generator when the page is closed.
                seen.stop()

    @property
    def hint(self) -> str:
        """Purpose of candidate texts, to follow their label."""
        if self.writer is not None:
            return "; if empty, the Y-Decoder writes the texts"
        if self.captions:
            return f"; if empty, each segment gets the nearest of {len(self.captions)} captions"
        return "; each segment gets the nearest"

    def decoder(self, query: str, candidates: str) -> Callable[[torch.Tensor], list[str]]:
        """Return the function from a segment's embedding `(1, D)` to its text.

        Raises: `gr.Error` if there are neither texts nor a Y-Decoder.
        """
        texts = read_lines(candidates)
        if not texts and self.writer is not None:
            return self.y_decoder(query)
        texts = texts or self.captions
        if not texts:
            raise user_error(
                "Give candidate texts, one per line: this model has no Y-Decoder, so each segment "
                "gets the nearest candidate."
            )
        known = self.embedder.embed(texts).float().cpu()  # (C, D)
        return lambda embeds: [texts[best] for best in (embeds @ known.T).argmax(dim=1).tolist()]

    def y_decoder(self, query: str) -> Callable[[torch.Tensor], list[str]]:
        """Return a function that decodes one segment after the other with the Y-Decoder.

        It stores the last text, because a Y-Decoder may read the previous segment's text.
        """
        previous = [""]

        def decode(embeds: torch.Tensor) -> list[str]:
            previous[:] = decode_texts(
                self.writer, self.processor, embeds, queries=[query], previous=previous
            )
            return list(previous)

        return decode

    def remember(self, seen: Watched) -> None:
        """Store a video; forget the oldest if there are more than `MAX_VIDEOS`."""
        self.videos.append(seen)
        if len(self.videos) > MAX_VIDEOS:
            self.videos.popleft().forget()

    def ask(
        self, seen: Watched | None, question: str, candidates: str
    ) -> list[tuple[str, float, str]]:
        """Rank answers to a question about the part that was watched so far.

        Returns: the answers, best first, each with its share of the softmax and a note: the time
            of the segment that it fits best, and their similarity.
        Raises: `gr.Error` that names the missing input.
        """
        answers = list(read_lines(candidates))
        if seen is None or not seen.curve.times:
            raise user_error("Watch a video first: questions are about the part that was watched.")
        if not answers:
            raise user_error("Give candidate answers, one per line: the model ranks them.")
        with seen.lock:
            if seen.session is None:
                raise user_error(
                    "This video is no longer in memory: other videos were watched since. "
                    "Watch it again."
                )
            question = (question or "").strip()
            query = self.model.config.prompts["question"].replace("{}", question)
            found = seen.session.ask(answers, query=query if question else None)
        scores = torch.tensor([answer["score"] for answer in found])
        shares = (scores * self.model.logit_scale().cpu()).softmax(0).tolist()
        seen.marked = found[0]["start_time"], found[0]["end_time"]
        return [
            (
                answer["text"],
                share,
                f"best at {span(answer['start_time'], answer['end_time'])}, "
                f"similarity {answer['score']:.3f}",
            )
            for answer, share in zip(found, shares, strict=True)
        ]


def image_error(path: str | Path) -> gr.Error:
    """Return the error for an image where a video is needed."""
    return user_error(
        f"{escape(Path(path).name)} is an image: upload a video, or ask about the image in the "
        "Ask tab."
    )


def read_captions(path: Path) -> tuple[str, ...]:
    """Return the distinct `target`s of a JSONL file.

    Raises: `ValueError` that names the first line without a target.
    """
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            texts.append(json.loads(line)["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number} is not a JSON object with a target: correct the line."
            ) from error
    return tuple(dict.fromkeys(texts))
