"""Segmentation: find where the meaning of a stream changes, to decode one text per segment.

The paper (sections 2 and 4.6) merges neighbours by Ward's distance until N segments are left, and
decodes one embedding of each. `WardSegmenter` does this offline, after the stream has ended.
`OnlineSegmenter` finds boundaries while the stream runs; the paper describes this without values.

Both have `push(embedding, time)` and `close()`, which return the segments that are complete, and
`segment(embeds, timestamps)`, which segments a whole stream. Segments tile the stream: the first
starts at embedding 0, and each next one starts where the last ended.

The Ward distance of two neighbours with n and m members is √(2nm / (n + m)) times the distance of
their means. For two single embeddings it is their distance. scikit-learn and SciPy define it the
same way.

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
MOST = 2**31 - 1  # upper limit of every whole number: `deque` fails at 2**63
SAMPLES = 32  # embeddings stored of an open segment; the one nearest its middle is decoded


@dataclass(frozen=True)
class Segment:
    """A part of a stream in which little changes.

    Attributes:
        start, end (`int`): index of its first embedding, and of the next segment's first.
        start_time, end_time (`float`): seconds; `end_time` is the next segment's `start_time`.
        embedding (`torch.FloatTensor` of shape `(D,)`): the unit vector to decode.
        mean (`torch.FloatTensor` of shape `(D,)`): mean of its unit embeddings, not normalised.
        text (`str`, *optional*): the decoded text.
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
        """Agreement of its embeddings: the length of their mean, 1 if all are equal. It does not
        measure whether the text is true."""
        return min(self.mean.norm().item(), 1.0)


def make_segment(
    start: int, end: int, start_time: float, end_time: float, chosen: np.ndarray, mean: np.ndarray
) -> Segment:
    """Return a segment whose embedding is `chosen` on the unit sphere."""
    norm = np.linalg.norm(chosen)  # 0 if `chosen` is a mean whose unit vectors cancel out
    unit = chosen / norm if norm > 0 else chosen
    embedding, mean = (torch.from_numpy(each.astype(np.float32)) for each in (unit, mean))
    return Segment(start, end, start_time, end_time, embedding, mean)


# -- offline -------------------------------------------------------------------------------


def ward_cost(left: np.ndarray, right: np.ndarray, n: int, m: int) -> float:
    """Return the increase of the squared distances to the mean if two segments are merged.

    This is half the square of the Ward distance. The means of the n and m members are enough, so
    the members need not be stored.
    """
    gap = left - right
    return n * m / (n + m) * float(gap @ gap)


def merge_order(points: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Merge the two neighbouring segments of least Ward distance until one segment is left.

    The first segments are single points. Among equal distances, the first pair is merged.

    Returns: the boundary that each of the S - 1 merges removes, and its distance `(S - 1,)`.
        Distances can decrease: a segment between two similar ones may be nearer to their mean,
        after a merge with one of them, than it was to either.
    """
    count = len(points)
    # A segment is named by its start. These lists are indexed by a start or by an end.
    means = points.astype(np.float64)  # means[start]
    ends = list(range(1, count + 1))  # ends[start]; -1 if the segment was merged into another
    starts = list(range(-1, count))  # starts[end]
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
        # A merge makes the offers of its two segments outdated. To find them in the heap would
        # cost O(S) each time, so they stay there and are skipped here: O(S log S) in total.
        if ends[start] != joint or ends[joint] != end:
            continue
        means[start] += (end - joint) / (end - start) * (means[joint] - means[start])
        ends[start], ends[joint], starts[end] = end, -1, start
        joints.append(joint)
        merged.append(cost)
        if start > 0:
            offer(starts[start], start)
        if end < count:
            offer(start, end)
    return joints, np.sqrt(2 * np.array(merged))  # a cost is half a squared distance


class WardSegmenter:
    """Agglomerative clustering by Ward's distance in which only neighbours merge.

    The result is exact and equals scikit-learn's with a chain as connectivity. With a threshold
    the two can differ, because distances of successive merges can decrease. This class stops
    before the first merge above the threshold. scikit-learn counts the merges below the threshold
    and performs this number of merges in order, which can include one above the threshold.

    Args:
        num_segments (`int`, *optional*): segments to make; the stream's length if that is less.
        threshold (`float`, *optional*): merge while the Ward distance is below this. Give
            `num_segments` or `threshold`.
        decode_from (`str`, *optional*, defaults to `"midpoint"`): a segment's `embedding`:
            `"midpoint"`, its middle embedding, or `"mean"`, its normalised mean.
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
        """Store an embedding `(D,)` and return no segment: all are returned by `close`."""
        unit = as_unit(embedding)
        check_shape(unit, self.embeds[0].shape if self.embeds else None)
        check_time(time, self.times[-1] if self.times else None)
        self.embeds.append(unit)
        self.times.append(time)
        return []

    def close(self, end_time: float | None = None) -> list[Segment]:
        """Return all segments. `end_time` is the end of the last one, by default the time of the
        last embedding. The next `push` starts a new stream."""
        embeds, times = self.embeds, self.times
        self.embeds, self.times = [], []
        return self.segment(np.stack(embeds), times, end_time) if embeds else []

    def segment(
        self,
        embeds: torch.Tensor | np.ndarray,
        timestamps: list[float] | np.ndarray | None = None,
        end_time: float | None = None,
    ) -> list[Segment]:
        """Return the segments of a whole stream `(S, D)`; times `(S,)` default to 0, 1, 2, ..."""
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
        """Return the first index of each segment of `(S, D)` but the first segment."""
        joints, distances = merge_order(unit)
        if self.num_segments is not None:
            merges = max(len(unit) - self.num_segments, 0)
        else:
            # Not the number of distances below the threshold: a near merge can follow a far one.
            far = np.flatnonzero(distances >= self.threshold)
            merges = far[0] if len(far) else len(joints)
        return sorted(joints[merges:])


# -- online --------------------------------------------------------------------------------


class EvenSample:
    """At most `size` evenly spaced items of a stream of unknown length, and always the newest.

    At first every item is stored. Each time there are more than `size`, the stride doubles, and
    the items between are dropped.
    """

    def __init__(self, size: int):
        self.size = size
        self.stride = 1
        self.items: list[tuple[int, Any]] = []  # indices in the stream, ascending, and items

    def add(self, index: int, item: Any) -> None:
        # The newest item so far may be off the stride: then it was stored only for being newest.
        if self.items and (self.items[-1][0] - self.items[0][0]) % self.stride:
            self.items.pop()
        self.items.append((index, item))
        if len(self.items) > self.size:
            self.stride *= 2
            first = self.items[0][0]
            self.items = [
                each
                for each in self.items
                if (each[0] - first) % self.stride == 0 or each[0] == index
            ]

    def nearest(self, index: int, before: int) -> Any:
        """Return the item nearest to an index, among the items below the index `before`."""
        found = [each for each in self.items if each[0] < before]
        return min(found, key=lambda each: abs(each[0] - index))[1]


class OnlineSegmenter:
    """Segmentation while the stream runs, from the embeddings seen so far.

    A change is suspected at a step if the smoothed embeddings of the last `window` steps disagree,
    or if they have moved away from the first `window` steps of the segment. The second test finds
    drifts that are too slow to be seen from step to step. After `patience` suspected steps in a
    row, the segment is closed: among its last `window + patience` steps, it ends at the step that
    divides it best (the largest Ward distance). A boundary is therefore known at most
    `window + patience` steps late.

    Closing a segment means decoding it, and decodes can be limited. While no decode is allowed,
    the segment stays open. One decode is always reserved for the last segment. A stream of T
    seconds has at most `1 + T * decodes_per_second` decodes, and any s seconds of it at most
    `burst + s * decodes_per_second`.

    Memory does not grow with the stream: a segment's middle embedding is the nearest of `SAMPLES`
    evenly spaced ones.

    Args:
        window (`int`, *optional*, defaults to 8): steps over which the variance is computed.
        smoothing (`float`, *optional*, defaults to 0.5): weight of the newest embedding in the
            moving average; 1 does not smooth.
        variance_threshold (`float`, *optional*, defaults to 0.1): variance of unit vectors, from 0
            to 1, above which a change is suspected.
        drift_threshold (`float`, *optional*, defaults to 0.2): 1 - cosine to the segment's first
            steps, above which a change is suspected.
        patience (`int`, *optional*, defaults to 3): steps in a row that must be suspected.
        decodes_per_second (`float`, *optional*): decodes earned per second; unlimited by default.
        burst (`int`, *optional*, defaults to 2): largest number of decodes that can be saved up,
            at least 2, one of them the reserved one.
        max_decodes (`int`, *optional*): limit for the whole stream.
        decode_from (`str`, *optional*, defaults to `"midpoint"`): as in `WardSegmenter`.

    The default thresholds suit a space in which different meanings are at least 0.5 apart. Choose
    your own on your own streams.
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
        if decodes_per_second == np.inf:  # inf times 0 seconds would be NaN
            raise ValueError("decodes_per_second is inf: leave it out for unlimited decodes.")
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
        self.closed = 0  # segments closed
        self.savings = 1.0  # decodes saved up; the first is reserved for the last segment
        self.time: float | None = None  # time of the newest embedding
        self.recent: deque[tuple[float, np.ndarray]] = deque(maxlen=self.window + self.patience)
        self.total: np.ndarray | None = None  # sum of the open segment's embeddings
        self.start, self.start_time = 0, 0.0  # the open segment's first embedding
        self.sample = EvenSample(SAMPLES)
        self.begin_smoothing()

    def begin_smoothing(self) -> None:
        self.smoothed: deque[np.ndarray] = deque(maxlen=self.window)
        self.reference: np.ndarray | None = None  # mean of the segment's first smoothed steps
        self.suspected = 0  # steps in a row

    @property
    def length(self) -> int:
        """Number of embeddings in the open segment."""
        return self.count - self.start

    def push(self, embedding: torch.Tensor | np.ndarray, time: float) -> list[Segment]:
        """Take the next embedding `(D,)` and return the segment that it closes, if any."""
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
        self.suspected = self.suspected + 1 if self.changes(unit) else 0
        if self.suspected < self.patience or self.length < 2 or not self.may_decode():
            return []
        return [self.split()]

    def close(self, end_time: float | None = None) -> list[Segment]:
        """Return the last segment. `end_time` is its end, by default the time of the last
        embedding. The next `push` starts a new stream."""
        last = self.open_segment(end_time)
        self.reset()
        return [] if last is None else [last]

    def segment(
        self,
        embeds: torch.Tensor | np.ndarray,
        timestamps: list[float] | np.ndarray | None = None,
        end_time: float | None = None,
    ) -> list[Segment]:
        """Return the segments of a whole stream `(S, D)`, pushed one by one."""
        # Check everything first: a bad embedding in the middle would leave an open segment behind.
        times = check_times(timestamps, len(as_stream(embeds)))
        found = [
            segment
            for embedding, time in zip(embeds, times, strict=True)
            for segment in self.push(embedding, time)
        ]
        return found + self.close(end_time)

    def open_segment(self, end_time: float | None = None) -> Segment | None:
        """Return the open segment as if the stream ended now, or `None` before the first step."""
        if self.total is None:
            return None
        end_time = self.time if end_time is None else end_time
        check_time(end_time, self.time)
        return self.complete(self.count, end_time, self.total)

    def save_up(self, time: float) -> None:
        """Add the decodes earned since the last step."""
        if self.decodes_per_second is not None and self.time is not None:
            earned = (time - self.time) * self.decodes_per_second
            self.savings = min(self.savings + earned, self.burst)
        self.time = time

    def may_decode(self) -> bool:
        """Return whether a decode is left in addition to the one reserved for the last segment."""
        if self.max_decodes is not None and self.closed + 2 > self.max_decodes:
            return False
        return self.decodes_per_second is None or self.savings >= 2

    def changes(self, unit: np.ndarray) -> bool:
        """Add an embedding of the open segment and return whether a change is suspected."""
        if self.smoothed:
            mixed = self.smoothing * unit + (1 - self.smoothing) * self.smoothed[-1]
            norm = np.linalg.norm(mixed)
            unit = mixed / norm if norm > 0 else unit
        self.smoothed.append(unit)
        mean = np.mean(self.smoothed, axis=0)
        squared = float(mean @ mean)
        if self.reference is None or self.length <= self.window:
            self.reference = mean
        variance = 1 - squared  # mean squared distance to the mean, for unit vectors
        scale = np.sqrt(squared * float(self.reference @ self.reference))
        drift = 1 - float(mean @ self.reference) / scale if scale > 0 else 1.0
        return variance > self.variance_threshold or drift > self.drift_threshold

    def split(self) -> Segment:
        """Close the open segment at the step that divides it best, and open the next."""
        # `recent` can begin in the segment before: only steps of the open one are candidates.
        times, recent = zip(*list(self.recent)[-self.length :], strict=True)
        after = np.cumsum(recent[::-1], axis=0)[::-1]  # after[i]: sum of steps i and later
        costs = []
        for index, right in enumerate(after):
            m = len(recent) - index
            n = self.length - m
            # The largest cost, not the least: both parts should be as different as possible. A
            # left part without members cannot be closed.
            costs.append(ward_cost((self.total - right) / n, right / m, n, m) if n else -1.0)
        index = int(np.argmax(costs))
        boundary, time = self.count - len(recent) + index, times[index]
        segment = self.complete(boundary, time, self.total - after[index])
        self.closed += 1
        self.savings -= self.decodes_per_second is not None
        self.open(boundary, time, recent[index:])
        return segment

    def open(self, start: int, time: float, embeds: tuple[np.ndarray, ...]) -> None:
        """Start a segment with the embeddings since its start, which were seen already."""
        self.start, self.start_time = start, time
        self.total = np.sum(embeds, axis=0)
        self.sample = EvenSample(SAMPLES)
        # Smooth again from the start: the moving average still contains the segment before. The
        # count goes back, because `changes` reads the length of the open segment at each step.
        self.begin_smoothing()
        self.count = start
        for unit in embeds:
            self.sample.add(self.count, unit)
            self.count += 1
            self.changes(unit)

    def complete(self, end: int, end_time: float, total: np.ndarray) -> Segment:
        mean = total / (end - self.start)
        middle = self.sample.nearest((self.start + end - 1) // 2, before=end)
        chosen = mean if self.decode_from == "mean" else middle
        return make_segment(self.start, end, self.start_time, end_time, chosen, mean)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state as tensors, which safetensors can save; empty before the first
        embedding. The settings are not included."""
        if self.total is None:
            return {}
        indices, sampled = zip(*self.sample.items, strict=True)
        times, recent = zip(*self.recent, strict=True)
        whole = [self.count, self.closed, self.start, self.suspected, self.sample.stride]
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
            "sample_indices": np.array(indices, dtype=np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a `state_dict`; the results are those of a stream without interruption."""
        self.reset()
        if not state:
            return
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}
        whole = arrays["whole_numbers"].tolist()
        self.count, self.closed, self.start, self.suspected, self.sample.stride = whole
        self.savings, self.time, self.start_time = arrays["real_numbers"].tolist()
        self.total, self.reference = arrays["total"], arrays["reference"]
        self.smoothed.extend(arrays["smoothed"])
        self.recent.extend(zip(arrays["recent_times"].tolist(), arrays["recent"], strict=True))
        indices = arrays["sample_indices"].tolist()
        self.sample.items = list(zip(indices, arrays["sample"], strict=True))


# -- inputs --------------------------------------------------------------------------------


def as_unit(embeds: Any) -> np.ndarray:
    """Return embeddings `(..., D)` of torch or numpy as unit vectors in float64.

    Raises: `ValueError` for a zero vector and for numbers that are not finite.
    """
    if isinstance(embeds, torch.Tensor):
        embeds = embeds.detach().cpu().double().numpy()
    embeds = np.asarray(embeds, dtype=np.float64)
    norms = np.linalg.norm(embeds, axis=-1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("an embedding is zero or not finite: compute it in float32 or bfloat16.")
    return embeds / norms


def as_stream(embeds: Any) -> np.ndarray:
    """Return embeddings `(S, D)` as unit vectors in float64; an empty stream gives `(0, 0)`.

    Raises: `ValueError` for another shape, and for the embeddings that `as_unit` rejects.
    """
    if not len(embeds):
        return np.zeros((0, 0))
    unit = as_unit(embeds)
    if unit.ndim != 2:
        raise ValueError(f"the embeddings have shape {unit.shape}, expected (S, D).")
    return unit


def check_decode_from(decode_from: str) -> None:
    if decode_from not in DECODE_FROM:
        raise ValueError(f"decode_from is {decode_from!r}: choose one of {DECODE_FROM}.")


def check_number(name: str, value: Any, least: float, *, whole: bool = False) -> None:
    """Raise `ValueError` for values below `least`, for NaN and for other types."""
    kind = Integral if whole else Real
    # `bool` is a subclass of `int`, and NaN is caught because every comparison with it is false.
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
