"""Read clips and images from files or bytes, with PyAV and PIL, as uint8 RGB arrays.

Two readers return the same frames:

- *By packets* (`packets.py`), for formats whose packets determine the frames. Packets that no
  sampled frame needs are not decoded.
- *Linear* (`linear.py`), from the first frame to the last: for all other formats, and whenever
  the first reader meets anything unexpected, such as missing times, a decoding error or a missing
  frame. So the linear reader reports a damaged file, unless the damage is in packets that were not
  decoded.
"""

import os
from dataclasses import dataclass
from numbers import Real

from transformers.utils import is_av_available

from .images import read_folder, read_image
from .linear import read_linearly
from .media import Clip, Limits, MediaError, MediaSource, Prepare, name_of
from .packets import read_by_packets
from .sampling import Part, even_indices, uniform_indices


@dataclass(frozen=True)
class Excerpt:
    """A part of a video, accepted wherever a video is: `read_clip` reads it from `start` to `end`.

    Attributes:
        video (`str`, `os.PathLike` or `bytes`): path of a video file, or its content.
        start, end (`float`, *optional*): seconds since the file's beginning, as a player counts:
            its picture can begin after its sound.
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
    prepare: Prepare | None = None,
) -> Clip:
    """Decode a video or a part of it: all frames, or a sample with the first and the last.

    A part begins with the frame on screen at `start` and contains the frames that appear before
    `end`. A sample is taken from the frames that the file really has, not from the header's count,
    and only sampled frames are in memory. A truncated file raises an error if its container reveals
    it; Matroska does not, and is read to its end.

    Frames are those that a player shows: of the default video stream, never of a cover; with square
    pixels, upright, and transparent parts on white. Cropping that only the container states
    (Matroska's `PixelCrop`, MP4's `clap`) is not applied, for PyAV does not report it.

    A folder of images is a clip too: its frames in natural order (`2.png` before `10.png`), without
    times.

    Args:
        source (`str`, `os.PathLike` or `bytes`): path of a video file or of a folder of images,
            or a video file's content.
        num_frames (`int`, *optional*): T, sampled by `even_indices`; all frames by default.
        start, end (`float`, *optional*): seconds since the file's beginning, as a player counts:
            its picture can begin after its sound.
        max_seconds (`float`, *optional*): refuse a longer clip.
        max_pixels (`int`, *optional*): refuse frames with more pixels.
        max_decode_seconds (`float`, *optional*): give up after this time. It is checked whenever
            FFmpeg reads from the file or returns a frame, so it does not interrupt a file system
            that does not answer.
        prepare (*optional*): function of an array `(H, W, 3)`, applied to each frame of the clip
            when it is decoded: frames that it makes smaller are in memory one at a time.

    Raises: `MediaError` naming the file; `ImportError` if PyAV is missing.
    """
    if not is_av_available():
        raise ImportError("reading video files needs PyAV: pip install av")
    name = name_of(source)
    for bound, seconds in (("start", start), ("end", end)):
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, Real)):
            raise MediaError(f"{name}: {bound} is {seconds!r:.50}. Give a number of seconds.")
    part = Part(name, start, end)
    limits = Limits(name, max_seconds, max_pixels, max_decode_seconds)
    if not isinstance(source, bytes) and os.path.isdir(source):
        if not part.is_whole:
            raise MediaError(
                f"{name}: a folder of images has no times. Leave out start and end, or put the "
                "images of the part into another folder."
            )
        return read_folder(source, num_frames, limits, prepare)
    clip = None
    if num_frames is not None or not part.is_whole:
        clip = read_by_packets(source, num_frames, part, limits, prepare)
    if clip is None:
        clip = read_linearly(source, num_frames, part, limits, prepare)
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
