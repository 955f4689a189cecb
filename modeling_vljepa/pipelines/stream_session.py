"""A model that watches a stream: windows in, segments out, questions about what was seen.

    for window in stream(model, processor, "kitchen.mp4", "What happens?", fps=4):
        print(window.start_time, window.end_time, window.embedding)

    session = StreamSession(model, processor, query="What happens?", decode=captions)
    for segment in session.run(windows):
        print(segment.start_time, segment.end_time, segment.text, segment.confidence)
    session.ask(["a red ball", "a blue box"], query="What is picked up?")

`windows` are `processor.watch(source)`, or anything that has their attributes.

Shapes: B windows, T frames, h and w pixels, P tokens of a frame, N visual tokens, Dx vision width,
D embedding size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .segmentation import EvenSample, OnlineSegmenter, Segment, ward_cost

TOKEN_SAMPLES = 8  # windows of the open segment whose visual tokens are kept
WINDOWS_PER_PASS = 16  # of those that a question is asked about


class FrameWindow(Protocol):
    """Frames `(3, h, w)` that belong together, by the number of each in the stream."""

    numbers: tuple[int, ...]
    times: tuple[float, ...]
    frames: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class EmbeddedWindow:
    """What a model made of one window.

    Attributes:
        start_time, end_time (`float`): seconds, of its first frame and of its last.
        embedding (`torch.FloatTensor` of shape `(D,)`): Ŝ_Y, on the CPU.
        visual_embeds (`torch.FloatTensor` of shape `(N, Dx)`): S_V, on the CPU.
    """

    start_time: float
    end_time: float
    embedding: torch.Tensor
    visual_embeds: torch.Tensor

    @property
    def time(self) -> float:
        """Its middle."""
        return (self.start_time + self.end_time) / 2


class StreamEncoder:
    """Embeds windows under one query, several per pass.

    An image tower sees every frame by itself: the tokens of a frame are computed once, and
    overlapping windows share them. V-JEPA 2 attends over the whole window, so that the tokens of a
    frame are others in every window, and nothing can be shared.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode; of one with a Y-Decoder, what is below it.
        processor ([`VLJEPAProcessor`]): for the query.
        query (`str`, *optional*): without one, what is asked for is a caption.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, query: str | None = None):
        self.model = model.base_model
        self.processor = processor
        self.query = self.tokens(query)
        self.seen: dict[int, torch.Tensor] = {}  # tokens (P, Dx) by the number of the frame

    def tokens(self, query: str | None) -> dict[str, torch.Tensor]:
        if query is None:
            return {}
        return dict(self.processor(text=[query]))

    @torch.no_grad()
    def embed(self, windows: list[FrameWindow]) -> list[EmbeddedWindow]:
        """One pass over windows of one length."""
        visual = self.encode(windows)  # (B, N, Dx)
        predicted = self.predict(visual, self.query).float().cpu()  # (B, D)
        return [
            EmbeddedWindow(window.times[0], window.times[-1], embedding, visual_embeds)
            for window, embedding, visual_embeds in zip(
                windows, predicted, visual.cpu(), strict=True
            )
        ]

    def encode(self, windows: list[FrameWindow]) -> torch.Tensor:
        """Visual tokens `(B, N, Dx)`."""
        if self.model.x_encoder.is_video:
            clips = [torch.stack(window.frames) for window in windows]
            return self.model.encode_video(self.move(torch.stack(clips)))
        numbers = {number for window in windows for number in window.numbers}
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
        """Ŝ_Y `(B, D)` of B visual inputs under one query."""
        device, count = visual_embeds.device, len(visual_embeds)
        each = {name: ids.to(device).expand(count, -1) for name, ids in query.items()}
        return self.model.predict(visual_embeds=visual_embeds, **each)

    def move(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Target embeddings `(B, D)`, on the CPU."""
        batch = self.processor(targets=texts).to(self.model.device)
        return self.model.encode_target(**batch).float().cpu()

    def stream(
        self, windows: Iterable[FrameWindow], batch_size: int = 1
    ) -> Iterator[EmbeddedWindow]:
        """Embed windows as they come, `batch_size` per pass: more of them are faster on a file,
        and delay a live source."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1.")
        self.seen = {}  # another stream counts its frames from 0, too
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
    """Embed a source as it is watched; no more is held than the windows of one pass.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode.
        processor ([`VLJEPAProcessor`]): its processor, whose `watch` opens the source.
        source: path or content of a video file, the number of a camera, with `allow_urls` an
            http(s) or rtsp address, or an iterator of pairs: seconds, and a uint8 array
            `(H, W, 3)`.
        query (`str`, *optional*): what is asked of every window; a caption by default.
        window, stride, fps, live, allow_urls (*optional*): as of `processor.watch`.
        batch_size (`int`, *optional*, defaults to 1): windows per pass.
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


def merge(one: Memory, two: Memory) -> Memory:
    """Two neighbours as one; the longer of them says what is decoded and seen."""
    left, right = one.segment, two.segment
    n, m = left.end - left.start, right.end - right.start
    longer = one if n >= m else two
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
    """Watches one stream, says something when its meaning changes, and remembers.

    What it holds does not grow with the stream: at most `max_segments` segments, each with the
    visual tokens of one window. Beyond that, of the older half those two neighbours become one
    whose Ward distance is least, so what is long past grows coarse and what was just seen does
    not.

    Args:
        model ([`VLJEPAModel`]): in evaluation mode.
        processor ([`VLJEPAProcessor`]): its processor.
        query (`str`, *optional*): what is asked of every window; a caption by default.
        segmenter ([`OnlineSegmenter`], *optional*): the thresholds and the budget.
        decode (`Callable`, *optional*): embeddings `(B, D)` to B texts. Without it, segments
            have none.
        batch_size (`int`, *optional*, defaults to 1): windows per pass.
        max_segments (`int`, *optional*, defaults to 64): that are remembered, at least 4.
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
        if max_segments < 4:
            raise ValueError(f"max_segments is {max_segments}: give at least 4.")
        self.encoder = StreamEncoder(model, processor, query)
        self.segmenter = OnlineSegmenter() if segmenter is None else segmenter
        self.decode = decode
        self.batch_size = batch_size
        self.max_segments = max_segments
        self.memories: list[Memory] = []
        self.tokens = EvenSample(TOKEN_SAMPLES)
        # Visual tokens of the last windows, of which one will be the first of the next segment.
        self.latest: deque[tuple[int, torch.Tensor]] = deque(
            maxlen=self.segmenter.window + self.segmenter.patience
        )
        self.decodes = 0
        self.end_time = 0.0  # of the newest window
        self.ended = False

    @property
    def segments(self) -> list[Segment]:
        """What is remembered, oldest first; merged ones have the text of their longest part."""
        return [memory.segment for memory in self.memories]

    def run(self, windows: Iterable[FrameWindow]) -> Iterator[Segment]:
        """Yield the segments of a stream as they close, the last one when it ends.

        They tile it from its first frame to its last. A change lies between the middles of two
        windows.
        """
        for window in self.encoder.stream(windows, self.batch_size):
            yield from self.push(window)
        yield from self.close()

    def push(self, window: EmbeddedWindow) -> list[Segment]:
        """Take the next window; the segment that it closes, if it closes one.

        Raises: `ValueError` when the session was closed.
        """
        if self.ended:
            raise ValueError("the stream of this session has ended: make another StreamSession.")
        place = self.segmenter.count
        tokens = window.visual_embeds.clone()  # a view would hold all windows of its pass
        self.latest.append((place, tokens))
        self.tokens.add(place, tokens)
        self.end_time = window.end_time
        moment = window.time if place else window.start_time
        return [self.remember(each) for each in self.segmenter.push(window.embedding, moment)]

    def close(self) -> list[Segment]:
        """The last segment, which ends with the last window's last frame."""
        self.ended = True
        return [self.remember(segment) for segment in self.segmenter.close(self.end_time)]

    def remember(self, segment: Segment) -> Segment:
        if self.decode is not None:
            [text] = self.decode(segment.embedding[None])
            self.decodes += 1
            segment = replace(segment, text=text)
        self.memories.append(Memory(segment, self.seen_during(segment)))
        self.tokens = EvenSample(TOKEN_SAMPLES)
        for place, tokens in self.latest:
            if place >= segment.end:
                self.tokens.add(place, tokens)
        if len(self.memories) > self.max_segments:
            self.merge_nearest(self.memories)
        return segment

    def seen_during(self, segment: Segment) -> torch.Tensor:
        """Visual tokens of that of its windows, of those kept, which is nearest to its middle."""
        return self.tokens.nearest((segment.start + segment.end - 1) // 2, before=segment.end)

    @staticmethod
    def merge_nearest(memories: list[Memory]) -> None:
        """Of the older half, make one of the two neighbours that are most alike."""

        def cost(place: int) -> float:
            left, right = memories[place].segment, memories[place + 1].segment
            n, m = left.end - left.start, right.end - right.start
            return ward_cost(left.mean.numpy(), right.mean.numpy(), n, m)

        place = min(range(len(memories) // 2), key=cost)
        memories[place : place + 2] = [merge(memories[place], memories[place + 1])]

    def ask(self, candidates: list[str], query: str | None = None) -> list[dict[str, Any]]:
        """Which of some answers fits what was seen so far, and when: the open segment included.

        With a query, the Predictor reads the kept visual tokens of every segment again, one
        window of each; without one, the segments' embeddings are compared, which answer the
        session's own query.

        Returns: for each candidate, best first, `{"text", "score", "start_time", "end_time"}` of
            the segment that it fits best. The score is a cosine.
        Raises: `ValueError` if nothing was seen, or no candidate given.
        """
        candidates = [] if isinstance(candidates, str | None) else list(candidates)
        if not candidates or not all(isinstance(text, str) for text in candidates):
            raise ValueError("candidates: give a list of at least one text.")
        if not isinstance(query, str | None):
            raise ValueError(f"query is a {type(query).__name__}: give a string.")
        memories = list(self.memories)
        still_open = self.segmenter.open_segment()
        if still_open is not None:
            memories.append(Memory(still_open, self.seen_during(still_open)))
        if not memories:
            raise ValueError("nothing was seen so far: run the session first.")
        if query is None:
            embeds = torch.stack([memory.segment.embedding for memory in memories])
        else:
            embeds = self.read_again(memories, query)  # (S, D)
        scores = self.encoder.embed_texts(candidates) @ embeds.T  # (texts, S)
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
        """What the model predicts under another query, `(S, D)`."""
        tokens = self.encoder.tokens(query)
        embeds = []
        for start in range(0, len(memories), WINDOWS_PER_PASS):
            some = memories[start : start + WINDOWS_PER_PASS]
            visual = torch.stack([memory.visual_embeds for memory in some])
            visual = visual.to(self.encoder.model.device)
            embeds.append(self.encoder.predict(visual, tokens).float().cpu())
        return torch.cat(embeds)


__all__ = ["EmbeddedWindow", "StreamEncoder", "StreamSession", "stream"]
