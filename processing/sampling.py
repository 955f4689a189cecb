"""Choice of frames: a part of a video or the whole, all of its frames or some, evenly in time."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .media import MediaError

ROUNDING = 2e-3  # seconds; Matroska stores whole milliseconds, so smaller differences mean nothing
SLACK = 0.5  # seconds by which a part may exceed its video: ends are often annotated as whole ones


def check_count(name: str, count: int) -> int:
    """Return a number of frames or tokens; raise `ValueError` unless it is a whole one above 0."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        given = repr(count)[:50] if isinstance(count, Real | str) else f"a {type(count).__name__}"
        raise ValueError(f"{name} is {given}: give a whole number of at least 1")
    return count


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Return indices of `num_frames` of `total` frames, evenly spaced, first and last included.

    If there are fewer than `num_frames`, frames repeat; a single frame is the first one.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    Raises: `ValueError` if either number is below one.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames from {total}: both must be at least 1")
    step = (total - 1) / max(num_frames - 1, 1)
    return np.rint(np.arange(num_frames) * step).astype(np.int64)


def even_indices(seconds: np.ndarray, num_frames: int) -> np.ndarray:
    """Return indices of `num_frames` frames, evenly spaced in time, first and last included.

    Each is the frame nearest to its instant. If the frame of `uniform_indices` is as near, within
    the rounding of containers (`ROUNDING`), that one is taken: at a constant frame rate both
    functions agree. Where times are missing, NaN or not ascending, `uniform_indices` decides.

    Args:
        seconds (`np.ndarray` of shape `(total,)`): time of each frame.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    """
    by_count = uniform_indices(len(seconds), num_frames)
    if len(seconds) == 1:
        return by_count
    gaps = np.diff(seconds)
    least, most = gaps.min(), gaps.max()
    if not least > 0:  # `least <= 0` would be false for NaN
        return by_count
    # Gaps that differ by at most (most - least) move no frame farther than this product from even
    # spacing: a constant rate, as most videos have.
    if (most - least) * len(seconds) <= ROUNDING / 2:
        return by_count
    step = (seconds[-1] - seconds[0]) / max(num_frames - 1, 1)
    instants = seconds[0] + np.arange(num_frames) * step
    after = np.searchsorted(seconds, instants).clip(1, len(seconds) - 1)
    nearest = after - (instants - seconds[after - 1] <= seconds[after] - instants)
    farther = np.abs(seconds[by_count] - instants) - np.abs(seconds[nearest] - instants)
    chosen = np.where(farther <= ROUNDING, by_count, nearest)
    # Where the two functions alternate, an index can be one less than the one before.
    return np.maximum.accumulate(chosen)


def sample(seconds: np.ndarray, num_frames: int | None) -> np.ndarray:
    """Return indices into `seconds` of `num_frames` frames, or of all."""
    if num_frames is None:
        return np.arange(len(seconds))
    return even_indices(seconds, num_frames)


@dataclass(frozen=True)
class Part:
    """Part of the video `name`, in seconds since the file's beginning, as a player counts.

    `None` is the video's own start or end.
    """

    name: str
    start: float | None
    end: float | None

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.end is None

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end; the whole video's if they are impossible, which `check` reports."""
        start = 0.0 if self.start is None else self.start
        end = math.inf if self.end is None else self.end
        return (start, end) if 0 <= start < end else (0.0, math.inf)  # false for NaN, too

    def check(self, begin: float, duration: float) -> None:
        """Raise `MediaError` if a video has no such part.

        Args:
            begin: when the first picture appears, in seconds; usually 0.
            duration: when the last one disappears.
        """
        start = 0.0 if self.start is None else self.start
        end = duration if self.end is None else self.end
        if not (0 <= start < end and start < duration and end <= duration + SLACK):
            raise MediaError(
                f"{self.name}: has no part from {start:g} to {end:g} seconds, for it lasts "
                f"{duration:.3f}. Give 0 <= start < end <= its length."
            )
        if end <= begin:
            raise MediaError(
                f"{self.name}: shows nothing from {start:g} to {end:g} seconds, for its picture "
                f"begins at {begin:.3f}, after the sound. Give an end after that."
            )

    def window(self, seconds: np.ndarray) -> tuple[int, int]:
        """Return the range `first:last` of this part's frames, at least one.

        Args:
            seconds: when each frame of the video appears.
        """
        start, end = self.bounds
        # The frame on screen at `start` appeared at or before it, hence the step back. Search half
        # of ROUNDING later: if `start` is a frame's exact time, the container may have rounded the
        # stored time up.
        first = max(np.searchsorted(seconds, start + ROUNDING / 2, side="right") - 1, 0)
        # The same shift at the end: of two adjoining parts, only one has the frame at the border.
        last = np.searchsorted(seconds, end - ROUNDING / 2)
        return int(first), int(max(last, first + 1))
