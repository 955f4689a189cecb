"""Video files, opened for FFmpeg, and its frames as arrays.

One thread in each process, in decoding and in converting: many clips are read at once by as many
processes as there are cores, and threads inside them would only take turns.

Files are opened here and never by FFmpeg, for which a string can be a network address, and the
content of a file (a playlist, say) a reason to open others. Pipes and devices, which may never
end, are no files.

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


class Watched:
    """The file that FFmpeg reads from, which is the one thing it must ask for: an endless search
    for something readable in it ends here, when the time is up."""

    def __init__(self, file: io.BufferedIOBase, source: MediaSource, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.name = "" if isinstance(source, bytes) else name_of(source)  # its ending is a hint

    def read(self, size: int) -> bytes:
        self.limits.check_clock()
        return self.file.read(size)

    def seek(self, offset: int, whence: int) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def is_mp4(file: io.BufferedIOBase) -> bool:
    """Whether its first box is that of MP4 and its relatives."""
    start = file.read(8)
    file.seek(0)
    return start[4:] == b"ftyp"


@contextmanager
def open_container(
    source: MediaSource, limits: Limits, *, for_packets: bool = False
) -> Iterator["av.container.InputContainer"]:
    """A container that has a video stream, or the reason why it cannot be used.

    Args:
        for_packets (`bool`, *optional*): leave out what its packets do not need. Of an MP4 file the
            index tells the streams and the times of all packets; FFmpeg would decode the beginning
            nevertheless, for what decoding finds again. For a clip of a dozen small frames that
            takes a quarter as long as to decode it.
    """
    with open_file(source) as file:
        try:
            # No protocol: what is no more than a list of other files or addresses opens none.
            options, kind = {"protocol_whitelist": "none"}, None
            if for_packets and is_mp4(file):
                options, kind = options | {"codec_whitelist": "none"}, "mp4"
            container = av.open(Watched(file, source, limits), format=kind, options=options)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: cannot be opened as a video ({reason_of(error)}). It is not a "
                "video or was truncated; fetch or export it again."
            ) from error
        with container:
            # FFmpeg "plays" plain text files as terminal art, through its tty demuxer.
            found = container.streams.video
            if not found or found[0].codec_context is None or container.format.name == "tty":
                raise MediaError(
                    f"{limits.name}: has no video stream that FFmpeg can decode. Give a file with "
                    "pictures in it."
                )
            context = found[0].codec_context
            context.thread_count = 1
            limits.check_size(context.width, context.height)
            yield container


def picture_of(frame: "av.VideoFrame", reformatter: "VideoReformatter") -> np.ndarray:
    """A decoded frame, upright, `(H, W, 3)` uint8. One reformatter serves all frames of a video."""
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


def duration_of(seconds: np.ndarray, stream: "av.VideoStream") -> float:
    """Until the last frame is no longer shown: for as long as most are."""
    shown = np.median(np.diff(seconds)) if len(seconds) > 1 else 1 / (stream.guessed_rate or 25)
    return float(seconds[-1] + shown)


def reason_of(error: Exception) -> str:
    """FFmpeg's, or that of the file in which it looked for a place before the beginning."""
    return error.strerror if isinstance(error, av.FFmpegError | OSError) else str(error)
