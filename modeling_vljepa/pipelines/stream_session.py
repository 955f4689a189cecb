"""A session that watches a stream: windows in, segments out, answers about the stream so far.

    for window in stream(model, processor, "kitchen.mp4", "What happens?", fps=4):
        print(window.start_time, window.end_time, window.embedding)

    session = StreamSession(model, processor, query="What happens?", decode=captions)
    for segment in session.run(windows):
        print(segment.start_time, segment.end_time, segment.text, segment.confidence)
    session.ask(["a red ball", "a blue box"], query="What is picked up?")

`windows` is `processor.watch(source)` or another iterable of objects with a `FrameWindow`'s
attributes.

Shapes: B windows, T frames, h and w pixels, P tokens of a frame, N visual tokens, S segments, Dx
vision width, D embedding size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .embedding import check_finite, embed_texts
from .segmentation import EvenSample, OnlineSegmenter, Segment, check_number, ward_cost
from .text_checks import check_string, check_texts

TOKEN_SAMPLES = 8  # windows of the open segment whose visual tokens are stored
WINDOWS_PER_PASS = 16  # windows per batch when a question is answered


class FrameWindow(Protocol):
    """Consecutive frames `(3, h, w)`, with the index of each in the stream and its seconds."""

    numbers: tuple[int, ...]
    times: tuple[float, ...]
    frames: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class EmbeddedWindow:
    """Embedding of one window.

    Attributes:
        start_time, end_time (`float`): seconds of its first and last frame.
        embedding (`torch.FloatTensor` of shape `(D,)`): Ŝ_Y, on the CPU.
        visual_embeds (`torch.FloatTensor` of shape `(N, Dx)`): S_V, on the CPU.
    """

    start_time: float
    end_time: float
    embedding: torch.Tensor
    visual_embeds: torch.Tensor

    @property
    def time(self) -> float:
        """Middle of the window, in seconds."""
        return (self.start_time + self.end_time) / 2


class StreamEncoder:
    """Encoder of windows under one query, in batches.

    An image X-Encoder reads each frame separately, so a frame's tokens are computed once and
    shared by overlapping windows. V-JEPA 2 attends over the whole window, so a frame's tokens
    differ from window to window and cannot be shared.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode; the Y-Decoder of a model that has one is not
            used.
        processor ([`VLJEPAProcessor`]): its processor.
        query (`str`, *optional*): the query of every window; the model's caption prompt by
            default.

    Attributes:
        prompt (`str`): the query.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, query: str | None = None):
        self.model = model.base_model
        self.processor = processor
        self.prompt = model.config.prompts["caption"] if query is None else query
        self.query = self.tokens(self.prompt)
        self.seen: dict[int, torch.Tensor] = {}  # tokens (P, Dx) by the frame's index

    def tokens(self, query: str) -> dict[str, torch.Tensor]:
        return dict(self.processor(text=[check_string("query", query)]))

    @torch.no_grad()
    def embed(self, windows: list[FrameWindow]) -> list[EmbeddedWindow]:
        """Embed a batch of windows with the same number of frames."""
        times = [(window.times[0], window.times[-1]) for window in windows]
        return self.embed_encoded(times, self.encode(windows))

    @torch.no_grad()
    def embed_encoded(
        self, times: list[tuple[float, float]], visual_embeds: torch.Tensor
    ) -> list[EmbeddedWindow]:
        """Embed windows that are encoded already.

        Args:
            times: seconds of the first and the last frame of each window.
            visual_embeds: their visual tokens `(B, N, Dx)`.
        """
        predicted = self.predict(visual_embeds, self.query).float().cpu()  # (B, D)
        return [
            EmbeddedWindow(start, end, embedding, tokens)
            for (start, end), embedding, tokens in zip(
                times, predicted, visual_embeds.cpu(), strict=True
            )
        ]

    def encode(self, windows: list[FrameWindow]) -> torch.Tensor:
        """Return visual tokens `(B, N, Dx)`."""
        if self.model.x_encoder.is_video:
            clips = [torch.stack(window.frames) for window in windows]
            return self.model.encode_video(self.move(torch.stack(clips)))
        numbers = {number for window in windows for number in window.numbers}
        # Windows move forward: a frame that is not in this batch is in no later one.
        self.seen = {number: self.seen[number] for number in self.seen.keys() & numbers}
        new = {
            number: frame
            for window in windows
            for number, frame in zip(window.numbers, window.frames, strict=True)
            if number not in self.seen
        }
        if new:
            images = self.move(torch.stack(list(new.values()))).unsqueeze(1)  # (F, 1, 3, h, w)
            tokens = self.model.encode_video(images)  # (F, P, Dx)
            self.seen |= dict(zip(new, tokens, strict=True))
        return torch.stack(
            [torch.cat([self.seen[number] for number in each.numbers]) for each in windows]
        )

    def predict(self, visual_embeds: torch.Tensor, query: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return Ŝ_Y `(B, D)` of B visual inputs under one query."""
        device, count = visual_embeds.device, len(visual_embeds)
        each = {name: ids.to(device).expand(count, -1) for name, ids in query.items()}
        predicted = self.model.predict(visual_embeds=visual_embeds, **each)
        return check_finite("a predicted embedding", predicted)

    def move(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(self.model.device, self.model.dtype)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Return target embeddings `(B, D)`, on the CPU."""
        return embed_texts(self.model, self.processor, texts)

    def stream(
        self, windows: Iterable[FrameWindow], batch_size: int = 1
    ) -> Iterator[EmbeddedWindow]:
        """Embed windows as they arrive. A larger `batch_size` is faster on a file and delays a
        live source."""
        check_number("batch_size", batch_size, 1, whole=True)
        self.seen = {}  # frames of another stream have the same indices
        windows = iter(windows)
        while batch := list(islice(windows, batch_size)):
            yield from self.embed(batch)


def stream(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    source: Any,
    query: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    *,
    fps: float | None = None,
    live: bool | None = None,
    allow_urls: bool = False,
    batch_size: int = 1,
) -> Iterator[EmbeddedWindow]:
    """Embed a source while it is read. Only the windows of one batch are in memory.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode.
        processor ([`VLJEPAProcessor`]): its processor, whose `watch` opens the source.
        source: path or content of a video file, the number of a camera, an http(s) or rtsp
            address with `allow_urls`, or an iterator of pairs: seconds and a uint8 array
            `(H, W, 3)`.
        query (`str`, *optional*): the query of every window; the model's caption prompt by
            default.
        window, stride, fps, live, allow_urls (*optional*): as in `processor.watch`.
        batch_size (`int`, *optional*, defaults to 1): windows per batch.
    """
    encoder = StreamEncoder(model, processor, query)
    with processor.watch(
        source, window=window, stride=stride, fps=fps, live=live, allow_urls=allow_urls
    ) as windows:
        yield from encoder.stream(windows, batch_size)


@dataclass(frozen=True)
class Memory:
    """A closed segment, and the visual tokens `(N, Dx)` of a window near its middle."""

    segment: Segment
    visual_embeds: torch.Tensor

    def merge(self, following: "Memory") -> "Memory":
        """Return this segment and the next as one; embedding, text and tokens are the longer's."""
        left, right = self.segment, following.segment
        n, m = left.end - left.start, right.end - right.start
        longer = self if n >= m else following
        # The mean is that of all members, not the longer's: later merges need it for their Ward
        # distance. The embedding is not averaged: a mean of two meanings decodes to neither.
        segment = replace(
            longer.segment,
            start=left.start,
            end=right.end,
            start_time=left.start_time,
            end_time=right.end_time,
            mean=(n * left.mean + m * right.mean) / (n + m),
        )
        return Memory(segment, longer.visual_embeds)


class StreamSession:
    """Session that watches one stream, yields its segments and stores them for questions.

    Memory does not grow with the stream: at most `max_segments` segments are stored, each with the
    visual tokens of one window. When there are more, two neighbours in the older half are merged,
    those of least Ward distance. The distant past is therefore stored more coarsely than the
    recent past.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode.
        processor ([`VLJEPAProcessor`]): its processor.
        query (`str`, *optional*): the query of every window; the model's caption prompt by
            default.
        segmenter ([`OnlineSegmenter`], *optional*): the thresholds and the decode limits.
        decode (`Callable`, *optional*): turns embeddings `(B, D)` into B texts. Without it,
            segments have no text.
        batch_size (`int`, *optional*, defaults to 1): windows per batch.
        max_segments (`int`, *optional*, defaults to 64): segments to store, at least 4.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        query: str | None = None,
        segmenter: OnlineSegmenter | None = None,
        decode: Callable[[torch.Tensor], list[str]] | None = None,
        batch_size: int = 1,
        max_segments: int = 64,
    ):
        check_number("max_segments", max_segments, 4, whole=True)
        self.encoder = StreamEncoder(model, processor, query)
        self.segmenter = OnlineSegmenter() if segmenter is None else segmenter
        self.decode = decode
        self.batch_size = batch_size
        self.max_segments = max_segments
        self.memories: list[Memory] = []
        self.tokens = EvenSample(TOKEN_SAMPLES)
        # Visual tokens of the last windows. A segment is closed up to this many steps late, so
        # the next segment starts at one of them.
        self.latest: deque[tuple[int, torch.Tensor]] = deque(
            maxlen=self.segmenter.window + self.segmenter.patience
        )
        self.decodes = 0
        self.end_time = 0.0  # end of the newest window
        self.ended = False

    @property
    def segments(self) -> list[Segment]:
        """Stored segments, oldest first; a merged one has the text of its longest part."""
        return [memory.segment for memory in self.memories]

    def run(self, windows: Iterable[FrameWindow]) -> Iterator[Segment]:
        """Yield the segments of a stream as they close, the last one at the stream's end.

        They tile the stream from its first frame to its last. A boundary is the middle of the
        first window after a change.
        """
        for window in self.encoder.stream(windows, self.batch_size):
            yield from self.push(window)
        yield from self.close()

    def push(self, window: EmbeddedWindow) -> list[Segment]:
        """Take the next window and return the segment that it closes, if any.

        Raises: `ValueError` if the session was closed.
        """
        if self.ended:
            raise ValueError("the stream of this session has ended: make another StreamSession.")
        index = self.segmenter.count
        tokens = window.visual_embeds.clone()  # a view would keep its whole batch in memory
        self.latest.append((index, tokens))
        self.tokens.add(index, tokens)
        self.end_time = window.end_time
        # The first segment starts with the first frame, not with the first window's middle.
        moment = window.time if index else window.start_time
        return [self.remember(each) for each in self.segmenter.push(window.embedding, moment)]

    def close(self) -> list[Segment]:
        """Return the last segment, which ends with the last window's last frame."""
        self.ended = True
        return [self.remember(segment) for segment in self.segmenter.close(self.end_time)]

    def remember(self, segment: Segment) -> Segment:
        """Decode and store a closed segment."""
        if self.decode is not None:
            [text] = self.decode(segment.embedding[None])
            self.decodes += 1
            segment = replace(segment, text=text)
        self.memories.append(Memory(segment, self.seen_during(segment)))
        # The windows after the boundary belong to the next segment.
        self.tokens = EvenSample(TOKEN_SAMPLES)
        for index, tokens in self.latest:
            if index >= segment.end:
                self.tokens.add(index, tokens)
        if len(self.memories) > self.max_segments:
            self.merge_nearest(self.memories)
        return segment

    def seen_during(self, segment: Segment) -> torch.Tensor:
        """Return the visual tokens of the stored window nearest the segment's middle."""
        return self.tokens.nearest((segment.start + segment.end - 1) // 2, before=segment.end)

    @staticmethod
    def merge_nearest(memories: list[Memory]) -> None:
        """Merge the two neighbours of least Ward distance in the older half."""

        def cost(index: int) -> float:
            left, right = memories[index].segment, memories[index + 1].segment
            n, m = left.end - left.start, right.end - right.start
            return ward_cost(left.mean.numpy(), right.mean.numpy(), n, m)

        index = min(range(len(memories) // 2), key=cost)
        memories[index : index + 2] = [memories[index].merge(memories[index + 1])]

    def ask(self, candidates: list[str], query: str | None = None) -> list[dict[str, Any]]:
        """Rank candidate answers to a question about the stream so far.

        The open segment is included. Without a query, candidates are compared with the segments'
        embeddings, which answer the session's own query. With a query, the Predictor reads each
        segment's stored visual tokens again, those of one window.

        Returns: for each candidate, best first, `{"text", "score", "start_time", "end_time"}` of
            the segment that it fits best. The score is a cosine.
        Raises: `ValueError` if no window was seen or no candidate is given.
        """
        candidates = check_texts("candidates", candidates)
        memories = list(self.memories)
        still_open = self.segmenter.open_segment()
        if still_open is not None:
            memories.append(Memory(still_open, self.seen_during(still_open)))
        if not memories:
            raise ValueError("the session has seen no window: run it first.")
        if query is None:
            embeds = torch.stack([memory.segment.embedding for memory in memories])
        else:
            embeds = self.read_again(memories, query)  # (S, D)
        scores = self.encoder.embed_texts(candidates) @ embeds.T  # (candidates, S)
        best = scores.max(dim=1)
        return [
            {
                "text": candidates[text],
                "score": best.values[text].item(),
                "start_time": memories[best.indices[text]].segment.start_time,
                "end_time": memories[best.indices[text]].segment.end_time,
            }
            for text in best.values.argsort(descending=True, stable=True).tolist()
        ]

    @torch.no_grad()
    def read_again(self, memories: list[Memory], query: str) -> torch.Tensor:
        """Return the predictions `(S, D)` for stored visual tokens under another query."""
        tokens = self.encoder.tokens(query)
        embeds = []
        for start in range(0, len(memories), WINDOWS_PER_PASS):
            batch = memories[start : start + WINDOWS_PER_PASS]
            visual = torch.stack([memory.visual_embeds for memory in batch])
            visual = visual.to(self.encoder.model.device)
            embeds.append(self.encoder.predict(visual, tokens).float().cpu())
        return torch.cat(embeds)


__all__ = ["EmbeddedWindow", "StreamEncoder", "StreamSession", "stream"]
