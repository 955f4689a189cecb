"""Reading clips and images from files or bytes: PyAV and PIL in, uint8 RGB arrays out.

Two ways lead to the same frames, bit for bit:

- *Packets first* (`packets.py`). What no sampled frame needs is not decoded. Taken where packets
  can be trusted to tell the frames.
- *Linear* (`linear.py`), from the first frame to the last: for every other format, and where
  anything at all was odd on the first way: times missing, a decoding error, a frame that did not
  come. A damaged file is therefore reported as linear decoding finds it, unless the damage lies in
  what was left out.
"""

import os
from dataclasses import dataclass

from transformers.utils import is_av_available

from .images import read_folder, read_image
from .linear import read_linearly
from .media import Clip, Limits, MediaError, MediaSource, name_of
from .packets import read_by_packets
from .sampling import Part, even_indices, uniform_indices


@dataclass(frozen=True)
class Excerpt:
    """A part of a video, wherever a video is taken: what `read_clip` reads from `start` to `end`.

    Attributes:
        video (`str`, `os.PathLike` or `bytes`): path of a video file, or its content.
        start, end (`float`, *optional*): seconds since the video's first frame.
    """

    video: MediaSource
    start: float | None = None
    end: float | None = None

    def __str__(self) -> str:
        start, end = (self.start or 0, "the end" if self.end is None else f"{self.end:g} s")
        return f"{name_of(self.video)} from {start:g} s to {end}"


def read_clip(
    source: MediaSource,
    num_frames: int | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
    max_pixels: int | None = None,
    max_decode_seconds: float | None = None,
) -> Clip:
    """Decode a video or a part of it, whole or sampled evenly in time with its first and last
    frame.

    A part begins with the frame that is on screen at `start` and holds those that appear before
    `end`. The sample is drawn from the frames that are truly there, not from the header's count.
    Only sampled frames are held in memory. Rotation stored by phones is applied. A file that
    breaks off is refused when its container can tell; Matroska cannot, and is read as far as it
    goes.

    A folder of images is a clip as well: its frames in natural order (`2.png` before `10.png`),
    without times.

    Args:
        source (`str`, `os.PathLike` or `bytes`): path of a video file or of a folder of images,
            or a video file's content.
        num_frames (`int`, *optional*): T, by the rule of `even_indices`; all frames when left out.
        start, end (`float`, *optional*): seconds since the video's first frame.
        max_seconds (`float`, *optional*): refuse a longer clip.
        max_pixels (`int`, *optional*): refuse frames of more.
        max_decode_seconds (`float`, *optional*): give up after so many, by the clock. Asked
            whenever FFmpeg reads from the file or hands out a frame; a file system that does not
            answer is beyond it.

    Raises: `MediaError` naming the file; `ImportError` if PyAV is missing.
    """
    if not is_av_available():
        raise ImportError("reading video files needs PyAV: pip install av")
    name = name_of(source)
    part = Part(name, start, end)
    limits = Limits(name, max_seconds, max_pixels, max_decode_seconds)
    if not isinstance(source, bytes) and os.path.isdir(source):
        if not part.is_whole:
            raise MediaError(
                f"{name}: a folder of images has no times. Leave start and end out, or put the "
                "images of the part into a folder of their own."
            )
        return read_folder(source, num_frames, limits)
    clip = None
    if num_frames is not None or not part.is_whole:
        clip = read_by_packets(source, num_frames, part, limits)
    if clip is None:
        clip = read_linearly(source, num_frames, part, limits)
    return clip


__all__ = [
    "Clip",
    "Excerpt",
    "MediaError",
    "even_indices",
    "read_clip",
    "read_image",
    "uniform_indices",
]
