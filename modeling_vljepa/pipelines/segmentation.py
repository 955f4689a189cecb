"""Segmentation: where the meaning of a stream changes, so that text is decoded once in between.

The paper (sections 2 and 4.6) merges neighbours by Ward's distance until N segments are left, and
decodes one embedding of each. `WardSegmenter` does that, once the whole stream is there;
`OnlineSegmenter` finds boundaries while it runs, which the paper describes without values.

Both have `push(embedding, time)` and `close()`, which return the segments that are complete, and
`segment(embeds, timestamps)`, which does it all. Segments tile the stream: the first begins at
embedding 0, each next one where the last ended.

The Ward distance of two neighbours with n and m members is √(2nm / (n + m)) times the distance of
their means: that of two single embeddings is their own. It is scikit-learn's and SciPy's.

Shapes: S embeddings of a stream, D embedding size.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

DECODE_FROM = ("midpoint", "mean")
MOST = 2**31 - 1  # of whatever is counted
SAMPLES = 32  # embeddings kept of an open segment, whatever its length, one to be its midpoint


@dataclass(frozen=True)
class Segment:
    """A stretch of a stream in which little changes.

    Attributes:
        start, end (`int`): its embeddings, from 0; `end` is the first of the next segment.
        start_time, end_time (`float`): seconds; `end_time` is the next one's `start_time`.
        embedding (`torch.FloatTensor` of shape `(D,)`): a unit vector, to be decoded.
        mean (`torch.FloatTensor` of shape `(D,)`): of its unit embeddings, not a unit vector.
        text (`str`, *optional*): what was decoded.
    """

    start: int
    end: int
    start_time: float
    end_time: float
    embedding: torch.Tensor
    mean: torch.Tensor
    text: str | None = None

    @property
    def confidence(self) -> float:
        """How much its embeddings agree: the length of their mean, 1 where all are one. It says
        nothing about whether the text is true."""
        return min(self.mean.norm().item(), 1.0)


def make_segment(
    start: int, end: int, start_time: float, end_time: float, chosen: np.ndarray, mean: np.ndarray
) -> Segment:
    norm = np.linalg.norm(chosen)  # zero where unit vectors cancel out: there is nothing to say
    unit = chosen / norm if norm > 0 else chosen
    embedding, mean = (torch.from_numpy(each.astype(np.float32)) for each in (unit, mean))
    return Segment(start, end, start_time, end_time, embedding, mean)


# -- offline -------------------------------------------------------------------------------


def ward_cost(left: np.ndarray, right: np.ndarray, n: int, m: int) -> float:
    """By how much the squared distances to the mean grow when two segments become one, from the
    means of their n and m members: half the square of the Ward distance."""
    gap = left - right
    return n * m / (n + m) * float(gap @ gap)


def merge_order(points: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Merge the two neighbouring segments of least Ward distance, from single points on, until
    one is left; of equal distances, the first.

    Returns: the boundary that each of the S - 1 merges removes, and its distance `(S - 1,)`.
        Distances mostly grow, but not always: what lies between two alike, once merged with
        one, can come closer to the other.
    """
    count = len(points)
    means = points.astype(np.float64)  # of the segment that starts here
    ends = list(range(1, count + 1))  # of the segment that starts here, -1 if none does
    starts = list(range(-1, count))  # of the segment that ends here
    heap: list[tuple[float, int, int, int]] = []

    def offer(start: int, joint: int) -> None:
        end = ends[joint]
        cost = ward_cost(means[start], means[joint], joint - start, end - joint)
        heapq.heappush(heap, (cost, start, joint, end))

    for start in range(count - 1):
        offer(start, start + 1)
    joints, merged = [], []
    while heap:
        cost, start, joint, end = heapq.heappop(heap)
        if ends[start] != joint or ends[joint] != end:
            continue  # one of the two has grown since
        means[start] += (end - joint) / (end - start) * (means[joint] - means[start])
        ends[start], ends[joint], starts[end] = end, -1, start
        joints.append(joint)
        merged.append(cost)
        if start > 0:
            offer(starts[start], start)
        if end < count:
            offer(start, end)
    return joints, np.sqrt(2 * np.array(merged))


class WardSegmenter:
    """Agglomerative clustering by Ward's distance in which only neighbours merge.

    Exact, and the same as scikit-learn's with a chain as connectivity. Under a threshold the two
    can differ: this one stops before the first merge that is too far, while scikit-learn counts
    merges, and where a near one follows a far one it takes the far one instead.

    Args:
        num_segments (`int`, *optional*): how many are left; the stream's length if that is less.
        threshold (`float`, *optional*): merge while the Ward distance is below. Either of both.
        decode_from (`str`, *optional*, defaults to `"midpoint"`): a segment's `embedding`:
            the one in its middle, or `"mean"`, the average back on the sphere.
    """

    def __init__(
        self,
        num_segments: int | None = None,
        threshold: float | None = None,
        decode_from: str = "midpoint",
    ):
        if (num_segments is None) == (threshold is None):
            raise ValueError("give num_segments or threshold, and not both.")
        if num_segments is not None:
            check_number("num_segments", num_segments, 1, whole=True)
        if threshold is not None:
            check_number("threshold", threshold, 0)
        check_decode_from(decode_from)
        self.num_segments = num_segments
        self.threshold = threshold
        self.decode_from = decode_from
        self.embeds: list[np.ndarray] = []
        self.times: list[float] = []

    def push(self, embedding: torch.Tensor | np.ndarray, time: float) -> list[Segment]:
        """Keep an embedding `(D,)`; no segment is complete before the stream is."""
        unit = as_unit(embedding)
        check_shape(unit, self.embeds[0].shape if self.embeds else None)
        check_time(time, self.times[-1] if self.times else None)
        self.embeds.append(unit)
        self.times.append(time)
        return []

    def close(self, end_time: float | None = None) -> list[Segment]:
        """All segments. `end_time` is where the last one ends, by default its last embedding's
        time. The next `push` begins a new stream."""
        embeds, times = self.embeds, self.times
        self.embeds, self.times = [], []
        return self.segment(np.stack(embeds), times, end_time) if embeds else []

    def segment(
        self,
        embeds: torch.Tensor | np.ndarray,
        timestamps: list[float] | np.ndarray | None = None,
        end_time: float | None = None,
    ) -> list[Segment]:
        """The segments of a whole stream `(S, D)`; its times `(S,)` are 0, 1, 2, ... if left
        out."""
        unit = as_stream(embeds)
        times = check_times(timestamps, len(unit))
        if not len(unit):
            return []
        if end_time is not None:
            check_time(end_time, times[-1])
        bounds = [0, *self.boundaries(unit), len(unit)]
        times = [*times, times[-1] if end_time is None else end_time]
        segments = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            mean = unit[start:end].mean(axis=0)
            chosen = mean if self.decode_from == "mean" else unit[(start + end - 1) // 2]
            segments.append(make_segment(start, end, times[start], times[end], chosen, mean))
        return segments

    def boundaries(self, unit: np.ndarray) -> list[int]:
        """Where segments of `(S, D)` begin, the first left out."""
        joints, distances = merge_order(unit)
        if self.num_segments is not None:
            kept = joints[max(len(unit) - self.num_segments, 0) :]
        else:
            far = np.flatnonzero(distances >= self.threshold)
            kept = joints[far[0] :] if len(far) else []
        return sorted(kept)


# -- online --------------------------------------------------------------------------------


class EvenSample:
    """At most `size` items of a stream whose length nobody knows: every first, then every second,
    every fourth, and always the newest."""

    def __init__(self, size: int):
        self.size = size
        self.stride = 1
        self.items: list[tuple[int, Any]] = []  # places in the stream, ascending

    def add(self, place: int, item: Any) -> None:
        if self.items and (self.items[-1][0] - self.items[0][0]) % self.stride:
            self.items.pop()  # it was there for being the newest
        self.items.append((place, item))
        if len(self.items) > self.size:
            self.stride *= 2
            first = self.items[0][0]
            self.items = [
                each
                for each in self.items
                if (each[0] - first) % self.stride == 0 or each[0] == place
            ]

    def nearest(self, place: int, before: int | None = None) -> Any:
        """The item nearest to a place, of those before another."""
        found = [each for each in self.items if before is None or each[0] < before]
        return min(found, key=lambda each: abs(each[0] - place))[1]


class OnlineSegmenter:
    """Closes a segment while the stream runs, from what was seen so far alone.

    A change is suspected where the smoothed embeddings of the last few steps disagree, or where
    they have moved away from those with which the segment began; the latter finds drifts too slow
    to be seen from step to step. If the suspicion holds for `patience` steps, the segment ends at
    that one of the last `window + patience` steps which parts it best (the largest Ward
    distance), so its end is known at most so many steps late.

    Closing a segment means decoding it, and that may be rationed. While nothing may be decoded the
    segment stays open. One decode is always kept for the last segment, so that a stream of T
    seconds has at most `1 + T * decodes_per_second`, and any s seconds of it at most
    `burst + s * decodes_per_second`.

    What is kept does not grow with the stream: a segment's middle is the nearest of `SAMPLES`
    embeddings spread evenly over it.

    Args:
        window (`int`, *optional*, defaults to 8): steps whose variance is looked at.
        smoothing (`float`, *optional*, defaults to 0.5): weight of the newest embedding in the
            moving average; 1 does not smooth.
        variance_threshold (`float`, *optional*, defaults to 0.1): of unit vectors, from 0 to 1.
        drift_threshold (`float`, *optional*, defaults to 0.2): 1 - cosine to the reference.
        patience (`int`, *optional*, defaults to 3): steps for which a change must hold.
        decodes_per_second (`float`, *optional*): the budget; none by default.
        burst (`int`, *optional*, defaults to 2): decodes that may be saved up, at least 2, of
            which the last is kept.
        max_decodes (`int`, *optional*): in the whole stream.
        decode_from (`str`, *optional*, defaults to `"midpoint"`): as in `WardSegmenter`.

    The thresholds are those of a space in which other meanings are 0.5 and more apart. Choose them
    on streams of your own.
    """

    def __init__(
        self,
        *,
        window: int = 8,
        smoothing: float = 0.5,
        variance_threshold: float = 0.1,
        drift_threshold: float = 0.2,
        patience: int = 3,
        decodes_per_second: float | None = None,
        burst: int = 2,
        max_decodes: int | None = None,
        decode_from: str = "midpoint",
    ):
        for name, value, least in (
            ("window", window, 2),
            ("patience", patience, 1),
            ("burst", burst, 2),
            ("max_decodes", 1 if max_decodes is None else max_decodes, 1),
        ):
            check_number(name, value, least, whole=True)
        for name, value in (
            ("variance_threshold", variance_threshold),
            ("drift_threshold", drift_threshold),
            ("smoothing", smoothing),
            ("decodes_per_second", 0 if decodes_per_second is None else decodes_per_second),
        ):
            check_number(name, value, 0)
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing is {smoothing}: give more than 0 and at most 1.")
        if decodes_per_second == np.inf:  # times no time at all, it would be NaN
            raise ValueError("decodes_per_second is inf: leave it out, there is no budget then.")
        check_decode_from(decode_from)
        self.window = window
        self.smoothing = smoothing
        self.variance_threshold = variance_threshold
        self.drift_threshold = drift_threshold
        self.patience = patience
        self.decodes_per_second = decodes_per_second
        self.burst = burst
        self.max_decodes = max_decodes
        self.decode_from = decode_from
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.count = 0  # embeddings seen
        self.closed = 0  # segments
        self.savings = 1.0  # decodes
        self.time: float | None = None  # of the newest embedding
        self.recent: deque[tuple[float, np.ndarray]] = deque(maxlen=self.window + self.patience)
        self.total: np.ndarray | None = None  # the sum of the open segment's embeddings
        self.start, self.start_time = 0, 0.0
        self.sample = EvenSample(SAMPLES)
        self.begin_smoothing()

    def begin_smoothing(self) -> None:
        self.smoothed: deque[np.ndarray] = deque(maxlen=self.window)
        self.reference: np.ndarray | None = None
        self.held = 0

    @property
    def length(self) -> int:
        """Of the open segment."""
        return self.count - self.start

    def push(self, embedding: torch.Tensor | np.ndarray, time: float) -> list[Segment]:
        """Take the next embedding `(D,)`; the segment that it closes, if it closes one."""
        unit = as_unit(embedding)
        check_shape(unit, None if self.total is None else self.total.shape)
        check_time(time, self.time)
        self.save_up(time)
        if self.total is None:
            self.total, self.start_time = np.zeros_like(unit), time
        self.recent.append((time, unit))
        self.total += unit
        self.sample.add(self.count, unit)
        self.count += 1
        self.held = self.held + 1 if self.changes(unit) else 0
        if self.held < self.patience or self.length < 2 or not self.may_decode():
            return []
        return [self.split()]

    def close(self, end_time: float | None = None) -> list[Segment]:
        """The last segment, which ends at its last embedding's time or at `end_time`. The next
        `push` begins a new stream."""
        last = self.open_segment(end_time)
        self.reset()
        return [] if last is None else [last]

    def segment(
        self,
        embeds: torch.Tensor | np.ndarray,
        timestamps: list[float] | np.ndarray | None = None,
        end_time: float | None = None,
    ) -> list[Segment]:
        """The segments of a whole stream `(S, D)`, pushed one by one."""
        times = check_times(timestamps, len(as_stream(embeds)))  # all of it, or nothing is pushed
        found = [
            segment
            for embedding, time in zip(embeds, times, strict=True)
            for segment in self.push(embedding, time)
        ]
        return found + self.close(end_time)

    def open_segment(self, end_time: float | None = None) -> Segment | None:
        """The segment that would end if the stream ended now."""
        if self.total is None:
            return None
        end_time = self.time if end_time is None else end_time
        check_time(end_time, self.time)
        return self.complete(self.count, end_time, self.total)

    def save_up(self, time: float) -> None:
        if self.decodes_per_second is not None and self.time is not None:
            earned = (time - self.time) * self.decodes_per_second
            self.savings = min(self.savings + earned, self.burst)
        self.time = time

    def may_decode(self) -> bool:
        """Whether there is a decode beside the one that is kept for the last segment."""
        if self.max_decodes is not None and self.closed + 2 > self.max_decodes:
            return False
        return self.decodes_per_second is None or self.savings >= 2

    def changes(self, unit: np.ndarray) -> bool:
        """Take the next embedding of the open segment into account; whether a change is
        suspected."""
        if self.smoothed:
            mixed = self.smoothing * unit + (1 - self.smoothing) * self.smoothed[-1]
            norm = np.linalg.norm(mixed)
            unit = mixed / norm if norm > 0 else unit
        self.smoothed.append(unit)
        mean = np.mean(self.smoothed, axis=0)
        squared = float(mean @ mean)
        if self.reference is None or self.length <= self.window:
            self.reference = mean
        variance = 1 - squared  # of unit vectors
        scale = np.sqrt(squared * float(self.reference @ self.reference))
        drift = 1 - float(mean @ self.reference) / scale if scale > 0 else 1.0
        return variance > self.variance_threshold or drift > self.drift_threshold

    def split(self) -> Segment:
        """Close the open segment where the last steps part it best, and open the next."""
        times, recent = zip(*list(self.recent)[-self.length :], strict=True)
        after = np.cumsum(recent[::-1], axis=0)[::-1]  # sums of each and what follows it
        costs = []
        for place, right in enumerate(after):
            m = len(recent) - place
            n = self.length - m
            # Before the first of a segment is nothing that could be closed.
            costs.append(ward_cost((self.total - right) / n, right / m, n, m) if n else -1.0)
        place = int(np.argmax(costs))
        boundary, time = self.count - len(recent) + place, times[place]
        segment = self.complete(boundary, time, self.total - after[place])
        self.closed += 1
        self.savings -= self.decodes_per_second is not None
        self.open(boundary, time, recent[place:])
        return segment

    def open(self, start: int, time: float, embeds: tuple[np.ndarray, ...]) -> None:
        """Begin a segment with embeddings that were seen already."""
        self.start, self.start_time = start, time
        self.total = np.sum(embeds, axis=0)
        self.sample = EvenSample(SAMPLES)
        self.begin_smoothing()
        count, self.count = self.count, start
        for unit in embeds:
            self.sample.add(self.count, unit)
            self.count += 1
            self.changes(unit)
        self.count = count

    def complete(self, end: int, end_time: float, total: np.ndarray) -> Segment:
        mean = total / (end - self.start)
        middle = self.sample.nearest((self.start + end - 1) // 2, before=end)
        chosen = mean if self.decode_from == "mean" else middle
        return make_segment(self.start, end, self.start_time, end_time, chosen, mean)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that was seen, as tensors (safetensors can save them); empty before the first
        embedding. The settings are not among them."""
        if self.total is None:
            return {}
        places, sampled = zip(*self.sample.items, strict=True)
        times, recent = zip(*self.recent, strict=True)
        whole = [self.count, self.closed, self.start, self.held, self.sample.stride]
        real = [self.savings, self.time, self.start_time]
        arrays = {
            "whole_numbers": np.array(whole, dtype=np.int64),
            "real_numbers": np.array(real, dtype=np.float64),
            "total": self.total.copy(),
            "reference": self.reference.copy(),
            "smoothed": np.stack(self.smoothed),
            "recent": np.stack(recent),
            "recent_times": np.array(times, dtype=np.float64),
            "sample": np.stack(sampled),
            "sample_places": np.array(places, dtype=np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where `state_dict` was taken, as if there had been no interruption."""
        self.reset()
        if not state:
            return
        arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
        self.count, self.closed, self.start, self.held, self.sample.stride = arrays[
            "whole_numbers"
        ].tolist()
        self.savings, self.time, self.start_time = arrays["real_numbers"].tolist()
        self.total, self.reference = arrays["total"], arrays["reference"]
        self.smoothed.extend(arrays["smoothed"])
        self.recent.extend(zip(arrays["recent_times"].tolist(), arrays["recent"], strict=True))
        self.sample.items = list(
            zip(arrays["sample_places"].tolist(), arrays["sample"], strict=True)
        )


# -- inputs --------------------------------------------------------------------------------


def as_unit(embeds: Any) -> np.ndarray:
    """Embeddings `(..., D)`, of torch or numpy, as unit vectors in float64.

    Raises: `ValueError` for numbers that are not finite, and for a zero vector.
    """
    if isinstance(embeds, torch.Tensor):
        embeds = embeds.detach().cpu().double().numpy()
    embeds = np.asarray(embeds, dtype=np.float64)
    norms = np.linalg.norm(embeds, axis=-1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("an embedding is zero or not finite: was it made in half precision?")
    return embeds / norms


def as_stream(embeds: Any) -> np.ndarray:
    """Embeddings `(S, D)` as unit vectors in float64; none at all make `(0, 0)`.

    Raises: `ValueError` for another shape, and as `as_unit` does.
    """
    if not len(embeds):
        return np.zeros((0, 0))
    unit = as_unit(embeds)
    if unit.ndim != 2:
        raise ValueError(f"the embeddings of a stream have shape {unit.shape}, expected (S, D).")
    return unit


def check_decode_from(decode_from: str) -> None:
    if decode_from not in DECODE_FROM:
        raise ValueError(f"decode_from is {decode_from!r}: choose one of {DECODE_FROM}.")


def check_number(name: str, value: Any, least: float, *, whole: bool = False) -> None:
    """Raises: `ValueError` for what is less, NaN, or no number at all."""
    kind = Integral if whole else Real
    # A boolean is an integer to Python, and nothing to be compared with a threshold.
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
        number = "a whole number of " if whole else ""
        raise ValueError(f"{name} is {value!r}: give {number}at least {least}.")
    if whole and value > MOST:
        raise ValueError(f"{name} is {value}: give at most {MOST}.")


def check_shape(unit: np.ndarray, expected: tuple[int, ...] | None) -> None:
    if unit.ndim != 1 or expected not in (None, unit.shape):
        raise ValueError(f"an embedding has shape {unit.shape}, expected {expected or '(D,)'}.")


def check_time(time: float, last: float | None) -> None:
    if not np.isfinite(time) or (last is not None and time < last):
        raise ValueError(f"time {time} after {last}: times are finite and never decrease.")


def check_times(timestamps: list[float] | np.ndarray | None, count: int) -> list[float]:
    times = list(range(count)) if timestamps is None else np.asarray(timestamps).tolist()
    if len(times) != count:
        raise ValueError(f"{len(times)} timestamps for {count} embeddings: give one for each.")
    for last, time in zip([None, *times], times, strict=False):
        check_time(time, last)
    return times


__all__ = ["OnlineSegmenter", "Segment", "WardSegmenter"]
