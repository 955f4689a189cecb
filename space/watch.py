"""Watch a video: where its meaning changes, in words, while it is worked through.

Windows of frames become embeddings; where these move, a segment ends and gets one text, from the
Y-Decoder if the model has one, or else the nearest of given texts. What was seen is remembered for
questions.

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

from .texts import TextEmbeds, read_lines
from .timeline import Curve, span
from .uploads import MAX_VIDEO_PIXELS, examine, seconds_of, sorry, unreadable

FRAMES_PER_SECOND = 5  # that are read, unless somebody chooses another number
OVERLAP = 4  # windows that a frame is in
# A segment keeps one window's visual tokens: 4 MiB with V-JEPA 2 ViT-L and 8 frames of 256 pixels.
SEGMENTS_KEPT = 24
VIDEOS_KEPT = 4


@dataclass(eq=False)
class Watched:
    """What was seen of one video so far, and the session to ask about it.

    Attributes:
        session ([`StreamSession`], *optional*): `None` once it is forgotten.
        seconds (`float`): the length of the video.
        report (`StreamReport`): what happened to its frames.
        curve ([`Curve`]): a point for each window.
        segments (`list[Segment]`): all that are closed.
        status (`str`): `"watching"`, `"stopped"` or `"seen"`, to its end.
        marked (`tuple[float, float]`, *optional*): start and end of what fits the last answer.
    """

    session: StreamSession | None
    seconds: float
    report: Any
    curve: Curve = field(default_factory=Curve)
    segments: list[Segment] = field(default_factory=list)
    status: str = "watching"
    marked: tuple[float, float] | None = None
    lock: Lock = field(default_factory=Lock)  # a question waits for the window that is worked on
    last: torch.Tensor | None = None  # embedding (D,)

    @property
    def open_since(self) -> float | None:
        """Where the segment begins that is not closed yet."""
        if self.status == "seen":
            return None
        return self.segments[-1].end_time if self.segments else 0.0

    @property
    def last_time(self) -> float:
        return self.curve.times[-1] if self.curve.times else 0.0

    def add(self, window: EmbeddedWindow, closed: list[Segment]) -> None:
        moved = 0.0
        if self.last is not None:
            moved = 1 - torch.cosine_similarity(window.embedding, self.last, dim=0).item()
        self.curve.times.append(window.time)
        self.curve.changes.append(max(moved, 0.0))
        self.segments += closed
        self.last = window.embedding

    def end(self, closed: list[Segment]) -> None:
        self.segments += closed
        self.status = "seen"

    def notes(self) -> list[str]:
        """What the stream's report says to people: its events name files of the server."""
        report, said = self.report, []
        if report.broken:
            said.append(f"{report.broken} damaged parts of the video were left out.")
        if report.ended and report.events and report.events[-1].endswith(report.ended):
            said.append(f"The video {report.ended}.")
        return said

    def stop(self) -> None:
        """The run ends after the window that is worked on."""
        if self.status == "watching":
            self.status = "stopped"

    def forget(self) -> None:
        self.stop()
        self.session = None


def readable(windows: Iterable[Any], name: str) -> Iterator[Any]:
    """Windows, and a sentence for people where there are none."""
    try:
        yield from windows
    except (ValueError, av.FFmpegError) as error:  # the processor's MediaError is one
        raise unreadable(name) from error


class Watcher:
    """Watches videos and remembers the last ones.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
        writer ([`VLJEPAForConditionalGeneration`], *optional*): the same model and its Y-Decoder.
        captions (`tuple[str]`, *optional*): texts for segments, where there is no Y-Decoder and
            none are given.
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
        self.embeds = TextEmbeds(model, processor)
        self.kept: deque[Watched] = deque()
        self.size = processor.video_processor.num_frames  # of a window

    def watch(
        self,
        path: str | Path | None,
        query: str = "",
        candidates: str = "",
        fps: float = FRAMES_PER_SECOND,
    ) -> Iterator[Watched]:
        """Yield the same [`Watched`] as it grows: at the beginning, after every window, and at the
        end.

        Args:
            path (`str`, *optional*): of a video.
            query (`str`, *optional*): what is asked of every window; a caption by default.
            candidates (`str`, *optional*): texts for the segments, one per line.
            fps (`float`, *optional*): frames of the video that are read per second.

        Raises: `gr.Error` naming what is missing or cannot be used.
        """
        if not path:
            raise sorry("Upload a video first, or choose one of the library.")
        name = escape(Path(path).name)
        if examine(path) == "images":
            raise picture(path)
        query = (query or "").strip()
        session = StreamSession(
            self.model,
            self.processor,
            query=query or None,
            decode=self.words(query, candidates),
            max_segments=SEGMENTS_KEPT,
        )
        stride = max(1, self.size // OVERLAP)
        with self.processor.watch(path, stride=stride, fps=fps) as cut:
            cut.frames.max_pixels = MAX_VIDEO_PIXELS  # the header's are known, others may follow
            seen = Watched(session, seconds_of(path), cut.report)
            self.keep(seen)
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
                seen.stop()

    @property
    def hint(self) -> str:
        """What candidate texts are for, in words."""
        if self.writer is not None:
            return "; with none, the model writes"
        if self.captions:
            return f"; with none, {len(self.captions)} captions compete"
        return ": each segment gets the nearest"

    def words(self, query: str, candidates: str) -> Callable[[torch.Tensor], list[str]]:
        """How the embedding of a segment `(1, D)` becomes its text. Raises: `gr.Error` if there is
        no way."""
        texts = read_lines(candidates)
        if not texts and self.writer is not None:
            return self.writing(query)
        texts = texts or self.captions
        if not texts:
            raise sorry(
                "Give candidate texts, one per line: this model has no Y-Decoder to write with, "
                "so each segment gets the nearest of them."
            )
        known = self.embeds.of(texts).float().cpu()  # (C, D)
        return lambda embeds: [texts[best] for best in (embeds @ known.T).argmax(dim=1).tolist()]

    def writing(self, query: str) -> Callable[[torch.Tensor], list[str]]:
        """The Y-Decoder, for one segment after the other: it may read what it wrote before."""
        said = [""]

        def write(embeds: torch.Tensor) -> list[str]:
            said[:] = decode_texts(
                self.writer, self.processor, embeds, queries=[query], previous=said
            )
            return list(said)

        return write

    def keep(self, seen: Watched) -> None:
        """Remember a video, and forget the oldest of too many."""
        self.kept.append(seen)
        if len(self.kept) > VIDEOS_KEPT:
            self.kept.popleft().forget()

    def ask(
        self, seen: Watched | None, question: str, candidates: str
    ) -> list[tuple[str, float, str]]:
        """Answers about what was seen so far, best first, with their share of the softmax over all,
        and when and how well they fit.

        Raises: `gr.Error` naming what is missing.
        """
        answers = list(read_lines(candidates))
        if seen is None or not seen.curve.times:
            raise sorry("Watch a video first: questions are about what was seen of it.")
        if not answers:
            raise sorry("Give the candidate answers, one per line: the model picks among them.")
        with seen.lock:
            if seen.session is None:
                raise sorry(
                    "This video is no longer remembered: others were watched since. Watch it again."
                )
            found = seen.session.ask(answers, query=(question or "").strip() or None)
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


def picture(path: str | Path) -> gr.Error:
    return sorry(
        f"{escape(Path(path).name)} is a picture: upload a video, or ask about it in the first tab."
    )


def read_captions(path: Path) -> tuple[str, ...]:
    """The distinct `target`s of a JSONL file. Raises: `ValueError` naming a line without."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            texts.append(json.loads(line)["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: no JSON object with a target.") from error
    return tuple(dict.fromkeys(texts))
