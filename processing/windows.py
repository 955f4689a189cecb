"""Windows of consecutive frames of a stream, preprocessed.

Shapes: T frames of a window, H and W pixels as they come, h and w as cropped.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import is_av_available

from .frame_stream import Frame, FrameStream, StreamReport, StreamSource
from .video_io import uniform_indices
from .video_processing_vljepa import VLJEPAVideoProcessor

if is_av_available():
    pass


@dataclass(frozen=True)
class Window:
    """Consecutive frames of a stream, preprocessed; overlapping windows share their tensors.

    Attributes:
        numbers (`tuple[int, ...]` of length T): of the frames.
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
        """`(T, 3, h, w)`, a copy."""
        return torch.stack(self.frames)


def check_stride(stride: int, size: int) -> None:
    if not 1 <= stride <= size:
        raise ValueError(f"stride is {stride} and size {size}: give 1 <= stride <= size.")


def windows(
    frames: Iterable[Frame], video_processor: VLJEPAVideoProcessor, *, size: int, stride: int
) -> Iterator[Window]:
    """Windows of `size` frames, each beginning `stride` frames after the one before.

    Every frame is in one: at the end of the stream, frames that are in none yet make a last
    window with those before them. A stream shorter than a window repeats frames, as the
    video processor does.
    """
    check_stride(stride, size)
    recent: deque[tuple[int, float, torch.Tensor]] = deque(maxlen=size)
    count = covered = 0
    for frame in frames:
        recent.append((frame.number, frame.time, preprocess(frame.pixels, video_processor)))
        count += 1
        if count >= size and (count - size) % stride == 0:
            covered = count
            yield Window(*zip(*recent, strict=True))
    if covered < count:
        chosen = [recent[index] for index in uniform_indices(len(recent), size).tolist()]
        yield Window(*zip(*chosen, strict=True))


class WindowStream:
    """The windows of a source: a `FrameStream` and its `windows` in one.

    Args:
        source: as of a `FrameStream`.
        video_processor ([`VLJEPAVideoProcessor`]): its `max_pixels` holds for every frame.
        window (`int`, *optional*): frames of a window, as many as the video processor's
            `num_frames` by default.
        stride (`int`, *optional*): frames from the beginning of one to that of the next, half a
            window by default.
        fps, live, allow_urls (*optional*): as of a `FrameStream`.

    Raises: `ValueError` for a window or stride that cannot be, `MediaError` for an address that
        is not allowed; when it is iterated, `MediaError` for a source that cannot be opened.
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
        if self.window < 1:
            raise ValueError(f"window is {window}: give at least 1 frame.")
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
        """Stop reading, as a `FrameStream` does."""
        self.frames.close()

    def __iter__(self) -> Iterator[Window]:
        return windows(self.frames, self.video_processor, size=self.window, stride=self.stride)


def preprocess(pixels: np.ndarray, video_processor: VLJEPAVideoProcessor) -> torch.Tensor:
    """`(H, W, 3)` to `(3, h, w)`, as in a clip: every frame is worked on by itself."""
    clip = np.ascontiguousarray(pixels)[None]
    batch = video_processor([clip], do_sample_frames=False, return_tensors="pt")
    return batch["pixel_values_videos"][0, 0]


__all__ = ["Window", "WindowStream", "windows"]
