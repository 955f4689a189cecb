"""Preprocessed windows of consecutive frames of a stream.

Shapes: T frames of a window, H and W pixels of the source, h and w after the crop.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

from .frame_stream import Frame, FrameStream, StreamReport, StreamSource
from .video_io import uniform_indices
from .video_processing_vljepa import VLJEPAVideoProcessor


@dataclass(frozen=True)
class Window:
    """Consecutive preprocessed frames of a stream; overlapping windows share their tensors.

    Attributes:
        numbers (`tuple[int, ...]` of length T): indices of the frames in the stream.
        times (`tuple[float, ...]` of length T): seconds.
        frames (`tuple[torch.FloatTensor, ...]` of length T): each `(3, h, w)`.
    """

    numbers: tuple[int, ...]
    times: tuple[float, ...]
    frames: tuple[torch.Tensor, ...]

    @property
    def start_time(self) -> float:
        return self.times[0]

    @property
    def end_time(self) -> float:
        return self.times[-1]

    @property
    def pixel_values(self) -> torch.Tensor:
        """The frames as one tensor `(T, 3, h, w)`, a copy."""
        return torch.stack(self.frames)


def check_stride(stride: int, size: int) -> None:
    """Raise `ValueError` for a stride that would leave out frames between windows."""
    if not isinstance(stride, Integral) or isinstance(stride, bool) or not 1 <= stride <= size:
        raise ValueError(f"stride is {stride} and size {size}: give 1 <= stride <= size.")


def windows(
    frames: Iterable[Frame], video_processor: VLJEPAVideoProcessor, *, size: int, stride: int
) -> Iterator[Window]:
    """Yield windows of `size` frames, each beginning `stride` frames after the one before.

    Every frame is in a window: if frames remain at the end of the stream, a last window contains
    them and the frames before them. A stream shorter than a window repeats frames, as the video
    processor does.
    """
    check_stride(stride, size)
    recent: deque[tuple[int, float, torch.Tensor]] = deque(maxlen=size)
    count = covered = 0  # frames so far, and those that are in a window
    for frame in frames:
        recent.append((frame.number, frame.time, preprocess(frame.pixels, video_processor)))
        count += 1
        if count >= size and (count - size) % stride == 0:
            covered = count
            yield Window(*zip(*recent, strict=True))
    # Without this, up to `stride - 1` last frames, or a whole short stream, would be in no window.
    # `recent` has fewer than `size` frames only in a short stream; otherwise all are chosen once.
    if covered < count:
        chosen = [recent[index] for index in uniform_indices(len(recent), size).tolist()]
        yield Window(*zip(*chosen, strict=True))


class WindowStream:
    """Iterator over the windows of a source: a `FrameStream` with its `windows`.

    Args:
        source: see [`FrameStream`].
        video_processor ([`VLJEPAVideoProcessor`]): its `max_pixels` applies to every frame.
        window (`int`, *optional*): frames of a window, the video processor's `num_frames` by
            default.
        stride (`int`, *optional*): frames from the start of one window to the start of the next,
            half a window by default.
        fps, live, allow_urls (*optional*): see [`FrameStream`].

    Raises: `ValueError` for an impossible window or stride, `MediaError` for an address that is
        not allowed, and on iteration for a source that cannot be opened.
    """

    def __init__(
        self,
        source: StreamSource,
        video_processor: VLJEPAVideoProcessor,
        *,
        window: int | None = None,
        stride: int | None = None,
        fps: float | None = None,
        live: bool | None = None,
        allow_urls: bool = False,
    ):
        self.window = video_processor.num_frames if window is None else window
        is_whole = isinstance(self.window, Integral) and not isinstance(self.window, bool)
        if not is_whole or self.window < 1:
            raise ValueError(f"window is {window!r}: give at least 1 frame.")
        self.stride = max(self.window // 2, 1) if stride is None else stride
        check_stride(self.stride, self.window)
        self.video_processor = video_processor
        self.frames = FrameStream(
            source,
            fps=fps,
            live=live,
            allow_urls=allow_urls,
            max_pixels=video_processor.max_pixels,
        )

    @property
    def report(self) -> StreamReport:
        return self.frames.report

    def __enter__(self) -> "WindowStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading the source."""
        self.frames.close()

    def __iter__(self) -> Iterator[Window]:
        return windows(self.frames, self.video_processor, size=self.window, stride=self.stride)


def preprocess(pixels: np.ndarray, video_processor: VLJEPAVideoProcessor) -> torch.Tensor:
    """Preprocess a frame `(H, W, 3)` to `(3, h, w)`.

    The result is that of a whole clip, whose frames are preprocessed independently.
    """
    # Rotated frames have negative strides, which torch does not take.
    clip = np.ascontiguousarray(pixels)[None]
    batch = video_processor([clip], do_sample_frames=False, return_tensors="pt")
    return batch["pixel_values_videos"][0, 0]


__all__ = ["Window", "WindowStream", "windows"]
