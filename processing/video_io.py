"""Reading clips and images from files: PyAV and PIL in, uint8 RGB arrays out.

One pass from the first frame to the last, on one thread: for clips of up to a few minutes
this is faster than seeking to each sampled frame, and it counts the frames truly there.

Shapes: T frames, H height, W width.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.utils import is_av_available

if is_av_available():
    import av


class MediaError(ValueError):
    """A video or image file that cannot be used. The message names the file and the cure."""


@dataclass(frozen=True)
class Clip:
    """Frames in the order they are shown, with their times.

    Attributes:
        frames (`np.ndarray` of shape `(T, H, W, 3)`, uint8): RGB.
        timestamps (`np.ndarray` of shape `(T,)`, float64): seconds since the first frame.
    """

    frames: np.ndarray
    timestamps: np.ndarray


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly over `total`, the first and last included.

    A clip that is shorter than `num_frames` repeats frames; a single frame is the first one.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    Raises: `ValueError` if either number is below one.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames from {total}: both must be at least 1")
    return np.linspace(0, total - 1, num_frames).round().astype(np.int64)


def read_clip(source: str | os.PathLike, num_frames: int | None = None) -> Clip:
    """Decode a video file, whole or sampled evenly with its first and last frame.

    The sample is drawn from the frames that were decoded, not from the header's count: the
    header is only a first guess, and a second pass follows where it is absent (Matroska,
    WebM) or wrong. Only sampled frames are held in memory. Rotation stored by phones is
    applied. A file that breaks off is refused when its container can tell; Matroska cannot,
    and is read as far as it goes.

    Args:
        source (`str` or `os.PathLike`): path of a video file.
        num_frames (`int`, *optional*): T; all frames when left out.

    Raises: `MediaError` naming the file; `ImportError` if PyAV is missing.
    """
    if not is_av_available():
        raise ImportError("reading video files needs PyAV: pip install av")
    path = _existing_file(source)
    if num_frames is None:
        pictures, seconds = _decode(path, keep=None)
        indices = np.arange(len(seconds))
    else:
        guess = uniform_indices(max(_header_count(path), 1), num_frames)
        pictures, seconds = _decode(path, keep=set(guess.tolist()))
        indices = uniform_indices(len(seconds), num_frames)
        if not pictures.keys() >= set(indices.tolist()):
            pictures, seconds = _decode(path, keep=set(indices.tolist()))
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise MediaError(f"{path}: the frame size changes within the video. Re-encode it to one.")
    return Clip(np.stack([pictures[index] for index in indices.tolist()]), seconds[indices])


def read_image(source: str | os.PathLike | Image.Image) -> np.ndarray:
    """Read an image as a one-frame clip: upright (EXIF orientation applied), RGB.

    Returns: `np.ndarray` of shape `(1, H, W, 3)`, uint8.
    Raises: `MediaError` naming the file.
    """
    if isinstance(source, Image.Image):
        return np.array(ImageOps.exif_transpose(source).convert("RGB"))[None]
    path = _existing_file(source)
    try:
        with Image.open(path) as image:
            return read_image(image)
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not an image that PIL can read. Check the file type.") from error
    except OSError as error:
        raise MediaError(f"{path}: damaged image ({error}). Fetch or export it again.") from error


def _existing_file(source: str | os.PathLike) -> Path:
    path = Path(source)
    if not path.is_file():
        raise MediaError(f"{path}: no such file. Check the path; URLs must be downloaded first.")
    return path


def _open(path: Path) -> "av.container.InputContainer":
    """Open a container that has a video stream, or say why it cannot be used."""
    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise MediaError(
            f"{path}: cannot be opened as a video ({error.strerror}). It is not a video or was "
            "truncated; fetch or export it again."
        ) from error
    # FFmpeg "plays" plain text files as terminal art, through its tty demuxer.
    if not container.streams.video or container.format.name == "tty":
        container.close()
        raise MediaError(f"{path}: has no video stream. Give a file with pictures in it.")
    return container


def _header_count(path: Path) -> int:
    with _open(path) as container:
        return container.streams.video[0].frames


def _decode(path: Path, keep: set[int] | None) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """One pass over the file, keeping the frames whose index is in `keep` (`None`: all).

    Returns: the kept frames by index, each `(H, W, 3)` uint8, and the times of all frames in
    seconds since the first, float64.
    """
    pictures: dict[int, np.ndarray] = {}
    times: list[float] = []
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        try:
            for index, frame in enumerate(container.decode(stream)):
                # Bare H.264 streams carry no times.
                times.append(index / stream.guessed_rate if frame.time is None else frame.time)
                if keep is None or index in keep:
                    picture = frame.to_ndarray(format="rgb24")
                    pictures[index] = np.rot90(picture, round(frame.rotation / 90))
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: truncated or damaged after {len(times)} frames ({error.strerror}). "
                "Fetch or export it again."
            ) from error
    if not times:
        raise MediaError(
            f"{path}: no frame could be decoded: truncated or empty. Fetch or export it again."
        )
    # AVI gives the times of reordered frames out of order; as shown, they ascend.
    seconds = np.sort(np.array(times, dtype=np.float64))
    return pictures, seconds - seconds[0]


__all__ = ["Clip", "MediaError", "read_clip", "read_image", "uniform_indices"]
