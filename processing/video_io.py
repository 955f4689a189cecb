"""Reading clips and images from files or bytes: PyAV and PIL in, uint8 RGB arrays out.

One pass from the first frame to the last, on one thread: for clips of up to a few minutes
this is faster than seeking to each sampled frame, and it counts the frames truly there.

Files are opened here and never by FFmpeg, for which a string can be a network address, and the
content of a file (a playlist, say) a reason to open others.

Shapes: T frames, H height, W width.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.utils import is_av_available

if is_av_available():
    import av

Source = str | os.PathLike | bytes

# Of bytes, which may come from a stranger, PIL reads the common formats alone: among the others
# is PostScript, which is a program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_FRAME_RATE = 240  # frames per second of a clip whose length is bounded


class MediaError(ValueError):
    """A video or image that cannot be used. The message names the file and the cure."""


@dataclass(frozen=True)
class Clip:
    """Frames in the order they are shown, with their times.

    Attributes:
        frames (`np.ndarray` of shape `(T, H, W, 3)`, uint8): RGB.
        timestamps (`np.ndarray` of shape `(T,)`, float64): seconds since the first frame.
    """

    frames: np.ndarray
    timestamps: np.ndarray


@dataclass(frozen=True)
class Excerpt:
    """A part of a video, wherever a video is taken: what `read_clip` reads from `start` to `end`.

    Attributes:
        video (`str`, `os.PathLike` or `bytes`): path of a video file, or its content.
        start, end (`float`, *optional*): seconds since the video's first frame.
    """

    video: Source
    start: float | None = None
    end: float | None = None


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly over `total`, the first and last included.

    A clip that is shorter than `num_frames` repeats frames; a single frame is the first one.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    Raises: `ValueError` if either number is below one.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames from {total}: both must be at least 1")
    return np.linspace(0, total - 1, num_frames).round().astype(np.int64)


def read_clip(
    source: Source,
    num_frames: int | None = None,
    *,
    max_seconds: float | None = None,
    max_pixels: int | None = None,
) -> Clip:
    """Decode a video, whole or sampled evenly with its first and last frame.

    The sample is drawn from the frames that were decoded, not from the header's count: the
    header is only a first guess, and a second pass follows where it is absent (Matroska,
    WebM) or wrong. Only sampled frames are held in memory. Rotation stored by phones is
    applied. A file that breaks off is refused when its container can tell; Matroska cannot,
    and is read as far as it goes.

    Args:
        source (`str`, `os.PathLike` or `bytes`): path of a video file, or its content.
        num_frames (`int`, *optional*): T; all frames when left out.
        max_seconds (`float`, *optional*): refuse a longer clip.
        max_pixels (`int`, *optional*): refuse frames of more.

    Raises: `MediaError` naming the file; `ImportError` if PyAV is missing.
    """
    if not is_av_available():
        raise ImportError("reading video files needs PyAV: pip install av")
    limits = _Limits(max_seconds, max_pixels)
    if num_frames is None:
        pictures, seconds = _decode(source, keep=None, limits=limits)
        indices = np.arange(len(seconds))
    else:
        guess = uniform_indices(max(_header_count(source), 1), num_frames)
        pictures, seconds = _decode(source, keep=set(guess.tolist()), limits=limits)
        indices = uniform_indices(len(seconds), num_frames)
        if not pictures.keys() >= set(indices.tolist()):
            pictures, seconds = _decode(source, keep=set(indices.tolist()), limits=limits)
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise MediaError(
            f"{_name(source)}: the frame size changes within the video. Re-encode it to one."
        )
    return Clip(np.stack([pictures[index] for index in indices.tolist()]), seconds[indices])


def read_image(source: Source | Image.Image, *, max_pixels: int | None = None) -> np.ndarray:
    """Read an image as a one-frame clip: upright (EXIF orientation applied), RGB.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): path of an image file, its
            content, or the image.
        max_pixels (`int`, *optional*): refuse a larger image, before it is decoded.

    Returns: `np.ndarray` of shape `(1, H, W, 3)`, uint8.
    Raises: `MediaError` naming the file.
    """
    if isinstance(source, Image.Image):
        return np.array(ImageOps.exif_transpose(source).convert("RGB"))[None]
    name = _name(source)
    formats = IMAGE_FORMATS if isinstance(source, bytes) else None
    try:
        with _file(source) as file, Image.open(file, formats=formats) as image:
            _Limits(max_pixels=max_pixels).check_size(name, *image.size)
            return read_image(image)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image that PIL can read. Check the file type.") from error
    # PIL's readers raise what they like: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise MediaError(f"{name}: damaged image ({error}). Fetch or export it again.") from error


@dataclass(frozen=True)
class _Limits:
    """What is refused of a stranger's file; `None` bounds nothing."""

    max_seconds: float | None = None
    max_pixels: int | None = None

    def check_size(self, name: str, width: int, height: int) -> None:
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise MediaError(
                f"{name}: {width} x {height} pixels, but at most {self.max_pixels} are taken. "
                "Make it smaller."
            )

    def check_time(self, name: str, frames: int, seconds: float) -> None:
        if self.max_seconds is None:
            return
        if seconds > self.max_seconds or frames > self.max_seconds * MAX_FRAME_RATE:
            raise MediaError(
                f"{name}: longer than {self.max_seconds:g} seconds, or more than "
                f"{MAX_FRAME_RATE} frames in each. Cut it."
            )


def _name(source: Source) -> str:
    """What to call it in a message: a path, or an excerpt of a string too long to be one."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    name = os.fspath(source)
    return name if len(name) < 1000 else f"{name[:50]}..."


def _reason(error: Exception) -> str:
    """FFmpeg's, or that of the file in which it looked for a place before the beginning."""
    return error.strerror if isinstance(error, av.FFmpegError | OSError) else str(error)


@contextmanager
def _file(source: Source) -> Iterator[io.BufferedIOBase]:
    """The source, open for reading."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    # Unlike Path.is_file, this takes strings that are too long for a path.
    if not os.path.isfile(source):
        raise MediaError(
            f"{_name(source)}: no such file. Check the path; URLs must be downloaded first."
        )
    with open(source, "rb") as file:
        yield file


@contextmanager
def _open(source: Source) -> Iterator["av.container.InputContainer"]:
    """A container that has a video stream, or the reason why it cannot be used."""
    name = _name(source)
    with _file(source) as file:
        try:
            # No protocol: what is no more than a list of other files or addresses opens none.
            container = av.open(file, options={"protocol_whitelist": "none"})
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{name}: cannot be opened as a video ({_reason(error)}). It is not a video or "
                "was truncated; fetch or export it again."
            ) from error
        with container:
            # FFmpeg "plays" plain text files as terminal art, through its tty demuxer.
            found = container.streams.video
            if not found or found[0].codec_context is None or container.format.name == "tty":
                raise MediaError(
                    f"{name}: has no video stream that FFmpeg can decode. Give a file with "
                    "pictures in it."
                )
            yield container


def _header_count(source: Source) -> int:
    with _open(source) as container:
        return container.streams.video[0].frames


def _decode(
    source: Source, keep: set[int] | None, limits: _Limits
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """One pass over the file, keeping the frames whose index is in `keep` (`None`: all).

    Returns: the kept frames by index, each `(H, W, 3)` uint8, and the times of all frames in
    seconds since the first, float64.
    """
    name = _name(source)
    pictures: dict[int, np.ndarray] = {}
    times: list[float] = []
    with _open(source) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        limits.check_size(name, stream.codec_context.width, stream.codec_context.height)
        try:
            for index, frame in enumerate(container.decode(stream)):
                limits.check_size(name, frame.width, frame.height)
                # Bare H.264 streams carry no times.
                times.append(index / stream.guessed_rate if frame.time is None else frame.time)
                limits.check_time(name, len(times), times[-1] - times[0])
                if keep is None or index in keep:
                    picture = frame.to_ndarray(format="rgb24")
                    pictures[index] = np.rot90(picture, round(frame.rotation / 90))
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{name}: truncated or damaged after {len(times)} frames ({_reason(error)}). "
                "Fetch or export it again."
            ) from error
    if not times:
        raise MediaError(
            f"{name}: no frame could be decoded: truncated or empty. Fetch or export it again."
        )
    # AVI gives the times of reordered frames out of order; as shown, they ascend.
    seconds = np.sort(np.array(times, dtype=np.float64))
    return pictures, seconds - seconds[0]


__all__ = ["Clip", "Excerpt", "MediaError", "read_clip", "read_image", "uniform_indices"]
