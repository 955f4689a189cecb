"""Video files opened with FFmpeg, and their frames as arrays.

Each process decodes and converts with one thread: many clips are read at once by one process per
core, and more threads would only compete for the cores.

Python opens the files, never FFmpeg. For FFmpeg a path can be a network address, and a file's
content (a playlist, for example) can make it open other files. Pipes and devices, which may never
end, are refused.

Shapes: H height, W width.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from transformers.utils import is_av_available

from .media import Limits, MediaError, MediaSource, name_of, open_file

if is_av_available():
    import av
    from av.video.reformatter import VideoReformatter


class WatchedFile:
    """File object for FFmpeg that stops reading when the time is up.

    FFmpeg can search a damaged file without end and returns no frame meanwhile. It must call
    `read`, so the clock is checked there.
    """

    def __init__(self, file: io.BufferedIOBase, source: MediaSource, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        # FFmpeg takes the extension as a hint about the format.
        self.name = "" if isinstance(source, bytes) else name_of(source)

    def read(self, size: int) -> bytes:
        self.limits.check_clock()
        return self.file.read(size)

    def seek(self, offset: int, whence: int) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def is_mp4(file: io.BufferedIOBase) -> bool:
    """Return whether the file begins with the `ftyp` box of MP4 and related formats."""
    start = file.read(8)
    file.seek(0)
    return start[4:] == b"ftyp"


def video_stream(container: "av.container.InputContainer") -> "av.VideoStream | None":
    """Return the first video stream, or `None` if FFmpeg cannot decode it."""
    found = container.streams.video
    # FFmpeg reads plain text files as terminal animations, through its tty demuxer.
    if not found or found[0].codec_context is None or container.format.name == "tty":
        return None
    return found[0]


@contextmanager
def open_container(
    source: MediaSource, limits: Limits, *, for_packets: bool = False
) -> Iterator["av.container.InputContainer"]:
    """Yield a container with a video stream.

    Args:
        for_packets (`bool`, *optional*): only packets will be read, so do not decode on opening.
            The index of an MP4 file describes its streams and the times of all packets, but
            FFmpeg would decode the first frames nevertheless. For a clip of a dozen small frames,
            that takes a quarter of the time of decoding all.

    Raises: `MediaError` for a file that is not a video, or whose size exceeds the limits.
    """
    with open_file(source) as file:
        try:
            # Without any protocol, a playlist cannot open other files or addresses.
            options, kind = {"protocol_whitelist": "none"}, None
            if for_packets and is_mp4(file):
                # Without any decoder, FFmpeg cannot decode on opening.
                options, kind = options | {"codec_whitelist": "none"}, "mp4"
            container = av.open(WatchedFile(file, source, limits), format=kind, options=options)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: cannot be opened as a video ({reason_of(error)}). It is not a "
                "video or was truncated; fetch or export it again."
            ) from error
        with container:
            stream = video_stream(container)
            if stream is None:
                raise MediaError(
                    f"{limits.name}: has no video stream that FFmpeg can decode. Give a file with "
                    "pictures in it."
                )
            context = stream.codec_context
            context.thread_count = 1
            limits.check_size(context.width, context.height)
            yield container


def picture_of(frame: "av.VideoFrame", reformatter: "VideoReformatter") -> np.ndarray:
    """Return a decoded frame as an upright picture, `(H, W, 3)` uint8.

    Give the same reformatter for all frames of a video: it keeps its tables between calls.
    """
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    # Both FFmpeg's rotation and rot90's are counterclockwise.
    return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


def duration_of(seconds: np.ndarray, stream: "av.VideoStream") -> float:
    """Return the time at which the last frame disappears.

    Containers rarely store how long the last frame is shown; so it is the median of the others.
    """
    shown = np.median(np.diff(seconds)) if len(seconds) > 1 else 1 / (stream.guessed_rate or 25)
    return float(seconds[-1] + shown)


def reason_of(error: Exception) -> str:
    """Return the reason of an error, without the file name that FFmpeg puts into its text.

    A `ValueError` comes from `WatchedFile`, when FFmpeg seeks to a position before its beginning.
    """
    return error.strerror if isinstance(error, av.FFmpegError | OSError) else str(error)
