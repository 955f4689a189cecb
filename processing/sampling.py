"""Which frames of a video are taken: those of a part of it, all or spread evenly in time."""

import math
from dataclasses import dataclass

import numpy as np

from .media import MediaError

ROUNDING = 2e-3  # seconds: what Matroska's times, in whole milliseconds, can be off by
SLACK = 0.5  # seconds: ends of clips are often annotated in whole ones


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly over `total`, the first and last included.

    A clip that is shorter than `num_frames` repeats frames; a single frame is the first one.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    Raises: `ValueError` if either number is below one.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames from {total}: both must be at least 1")
    step = (total - 1) / max(num_frames - 1, 1)
    return np.rint(np.arange(num_frames) * step).astype(np.int64)


def even_indices(seconds: np.ndarray, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly in time, the first and last included.

    Each is the frame nearest to its instant; of two that are as near as containers can tell
    (`ROUNDING`), it is the one of `uniform_indices`, so that at a constant frame rate both rules
    are one. Where times are missing, NaN, or do not ascend, `uniform_indices` is the rule.

    Args:
        seconds (`np.ndarray` of shape `(total,)`): time of each frame.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    """
    by_count = uniform_indices(len(seconds), num_frames)
    if len(seconds) == 1:
        return by_count
    gaps = np.diff(seconds)
    least, most = gaps.min(), gaps.max()
    if not least > 0:  # NaN is not either
        return by_count
    if (most - least) * len(seconds) <= ROUNDING / 2:
        return by_count  # a constant rate, as most have; no frame is farther from its place
    step = (seconds[-1] - seconds[0]) / max(num_frames - 1, 1)
    instants = seconds[0] + np.arange(num_frames) * step
    after = np.searchsorted(seconds, instants).clip(1, len(seconds) - 1)
    nearest = after - (instants - seconds[after - 1] <= seconds[after] - instants)
    farther = np.abs(seconds[by_count] - instants) - np.abs(seconds[nearest] - instants)
    return np.maximum.accumulate(np.where(farther <= ROUNDING, by_count, nearest))


def sample(seconds: np.ndarray, num_frames: int | None) -> np.ndarray:
    """Indices into `seconds` of `num_frames` frames, or of all."""
    if num_frames is None:
        return np.arange(len(seconds))
    return even_indices(seconds, num_frames)


@dataclass(frozen=True)
class Part:
    """From `start` to `end`, in seconds since the first frame; `None` is the video's own."""

    name: str
    start: float | None
    end: float | None

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.end is None

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end in seconds; of impossible ones, which `check` refuses, the whole video."""
        start = 0.0 if self.start is None else self.start
        end = math.inf if self.end is None else self.end
        return (start, end) if 0 <= start < end else (0.0, math.inf)  # NaN is not either

    def check(self, duration: float) -> None:
        """Refuse times that are not those of a video of so many seconds."""
        start = 0.0 if self.start is None else self.start
        end = duration if self.end is None else self.end
        if not (0 <= start < end and start < duration and end <= duration + SLACK):
            raise MediaError(
                f"{self.name}: has no part from {start:g} to {end:g} seconds, for it lasts "
                f"{duration:.3f}. Give 0 <= start < end <= its length."
            )

    def window(self, seconds: np.ndarray) -> tuple[int, int]:
        """The frames `first:last` of this part, at least one, of all that appear at `seconds`."""
        start, end = self.bounds
        first = max(np.searchsorted(seconds, start + ROUNDING / 2, side="right") - 1, 0)
        last = np.searchsorted(seconds, end - ROUNDING / 2)
        return int(first), int(max(last, first + 1))
