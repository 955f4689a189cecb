"""Video files opened with FFmpeg, and their frames as arrays.

Each process decodes and converts with one thread: many clips are read at once by one process per
core, and more threads would only compete for the cores.

Python opens the files, never FFmpeg. For FFmpeg a path can be a network address, and a file's
content (a playlist, for example) can make it open other files. Pipes and devices, which may never
end, are refused.

Shapes: H height, W width.
"""

import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from functools import cache

import numpy as np
from PIL import Image
from transformers.utils import is_av_available, logging

from .media import Limits, MediaError, MediaSource, is_address, name_of, on_white, open_file

if is_av_available():
    import av
    from av.codec.context import CodecContext
    from av.stream import Disposition
    from av.video.reformatter import VideoReformatter

    Reopen = Callable[[], AbstractContextManager[av.container.InputContainer]]
    COVER = Disposition.attached_pic | Disposition.timed_thumbnails

logger = logging.get_logger(__name__)

# Packets read to learn which of several video streams are stills. A still next to a film is one
# packet, stored at the beginning.
PROBED_PACKETS = 500
# A shorter gap between the first sound and the first picture is padding of the audio codec, or the
# delay of reordered frames; in a player it cannot be noticed.
MIN_GAP = 0.1  # seconds
MAX_DISPLAY_PIXELS = 2**25  # of a frame stretched to its display aspect
MIN_STRETCH = 0.01  # aspects of pixels nearer to 1 are rounding of the file's author
UNUSED_ALPHA = ("\0\0\0\0", "DIB ")  # codec tags of raw pixels
# Transposed, upside down, mirrored: turns by 0, 90, 180 and 270 degrees counterclockwise.
QUARTER_TURNS = (
    (False, False, False),
    (True, True, False),
    (False, True, True),
    (True, False, True),
)
HDR = {16: "PQ", 18: "HLG"}  # by FFmpeg's number of the transfer (ITU-T H.273)
NAMED_HDR: set[int] = set()  # transfers that a warning has named


class WatchedFile:
    """File object for FFmpeg that stops reading when the time is up.

    FFmpeg can search a damaged file without end and returns no frame meanwhile. It must call
    `read`, so the clock is checked there.
    """

    def __init__(
        self, file: io.BufferedIOBase, source: MediaSource, limits: Limits, is_named: bool
    ) -> None:
        self.file = file
        self.limits = limits
        # FFmpeg takes the extension as a hint about the format. A member's name is the first part.
        name = name_of(source) if is_named and not isinstance(source, bytes) else ""
        self.name = name.split("::")[0] if is_address(source) else name

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


def video_stream(
    container: "av.container.InputContainer",
    name: str,
    reopen: "Reopen | None" = None,
) -> "av.VideoStream":
    """Return the video stream that a player shows.

    A cover is never the video. A film is preferred to a still picture, then the default stream, as
    in FFmpeg's `av_find_best_stream`, then one that is not much shorter than another, then the
    first. `av_find_best_stream` itself counts decoded frames, which are none if the container was
    opened for packets, and prefers a default still to a film.

    Args:
        name: of the file, for messages.
        reopen (*optional*): opens the file again, to look at the packets of several streams.
            Without it, those count as films whose header does not state a single frame.

    Raises: `MediaError` if FFmpeg can decode no video.
    """
    streams = [stream for stream in container.streams.video if not is_cover(stream)]
    best = streams[0] if len(streams) == 1 else best_of(streams, reopen)
    # FFmpeg reads plain text files as terminal animations, through its tty demuxer.
    if best is None or best.codec_context is None or container.format.name == "tty":
        raise MediaError(
            f"{name}: has no video stream that FFmpeg can decode (a cover is not one). Give a file "
            "with a video in it."
        )
    return best


def best_of(streams: "list[av.VideoStream]", reopen: "Reopen | None") -> "av.VideoStream | None":
    """Return the best of several streams by the rule of `video_stream`; `None` if there is none."""
    films = film_indices(streams, reopen)
    longest = max([length_of(stream) or 0.0 for stream in streams], default=0.0)

    def rank(stream: "av.VideoStream") -> tuple[bool, bool, bool, int]:
        is_long = 2 * (length_of(stream) or 0.0) >= longest
        is_default = Disposition.default in stream.disposition
        return stream.index in films, is_default, is_long, -stream.index

    return max(streams, key=rank, default=None)


def is_cover(stream: "av.VideoStream") -> bool:
    """Return whether a stream is a cover or the pictures of chapters."""
    return bool(stream.disposition & COVER)


def film_indices(streams: "list[av.VideoStream]", reopen: "Reopen | None") -> set[int]:
    """Return the indices of the streams with more than one frame."""
    films = {
        stream.index
        for stream in streams
        if stream.frames != 1 and Disposition.still_image not in stream.disposition
    }
    if reopen is None or len(films) < 2:
        return films
    # Most headers have no number of frames, and AVI's can count ticks of the clock.
    counted = dict.fromkeys(films, 0)
    with reopen() as container:
        packets = container.demux([container.streams[index] for index in films])
        try:
            for packet, _ in zip(packets, range(PROBED_PACKETS), strict=False):
                counted[packet.stream.index] += packet.size > 0
                if min(counted.values()) > 1:
                    break
        except (av.FFmpegError, OSError, ValueError):
            pass  # the reader reports damage
    return {index for index, count in counted.items() if count > 1}


def length_of(stream: "av.VideoStream") -> float | None:
    """Return the seconds of a stream that the header states; `None` if it states none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # Matroska's header has one duration for all streams, and a tag for each.
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])


def stated_end(stream: "av.VideoStream") -> float | None:
    """Return when the last picture disappears by the header, in seconds since the file's beginning.

    Returns: `None` if the header states no length.
    """
    whole = stream.container.duration
    ends = [] if whole is None else [whole / av.time_base]  # of the longest stream, often the sound
    if stream.duration is not None:
        start = float((stream.start_time or 0) * stream.time_base)
        ends.append(gap_before(stream, start) + length_of(stream))
    elif (end := length_of(stream)) is not None:  # Matroska's tag is the end
        ends.append(end)
    return min(ends, default=None)


def gap_before(stream: "av.VideoStream", first: float) -> float:
    """Return the seconds from the file's beginning, as a player counts, to its first picture.

    A file begins with its earliest sound or picture. If that is the picture, the gap is 0.

    Args:
        first: when the first frame is shown, in the container's seconds.
    """
    if len(stream.container.streams) == 1:
        return 0.0
    starts = [
        # Sound before 0 is padding of the codec, which is not played.
        max(float(each.start_time * each.time_base), 0.0)
        for each in stream.container.streams
        if each is not stream
        and each.start_time is not None
        and (each.type == "audio" or (each.type == "video" and not is_cover(each)))
    ]
    gap = first - min(starts, default=first)
    return gap if gap > MIN_GAP else 0.0


@contextmanager
def open_video(
    source: MediaSource, limits: Limits, *, for_packets: bool = False, is_named: bool = True
) -> Iterator["av.VideoStream"]:
    """Yield the video stream of a file; its `container` is open.

    Args:
        for_packets (`bool`, *optional*): only packets will be read, so do not decode on opening.
            The index of an MP4 file describes its streams and the times of all packets, but
            FFmpeg would decode the first frames nevertheless. For a clip of a dozen small frames,
            that takes a quarter of the time of decoding all.
        is_named (`bool`, *optional*, defaults to `True`): give FFmpeg the extension as a hint.

    Raises: `MediaError` for a file that is not a video, or whose size exceeds the limits.
    """
    # Without any protocol, a playlist cannot open other files or addresses.
    options = {"protocol_whitelist": "none"}

    def opened(file: io.BufferedIOBase) -> "av.container.InputContainer":
        watched = WatchedFile(file, source, limits, is_named)
        if for_packets and is_mp4(file):
            # Without any decoder, FFmpeg cannot decode on opening.
            return av.open(watched, format="mp4", options=options | {"codec_whitelist": "none"})
        return av.open(watched, options=options)

    @contextmanager
    def opened_again() -> "Iterator[av.container.InputContainer]":
        # Each container needs a file of its own: reading moves a file's position.
        with open_file(source) as file, opened(file) as container:
            yield container

    with open_file(source) as file:
        try:
            container = opened(file)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: cannot be opened as a video ({reason_of(error)}). It is not a "
                "video or was truncated; fetch or export it again."
            ) from error
        with container:
            stream = video_stream(container, limits.name, opened_again)
            context = stream.codec_context
            context.thread_count = 1
            limits.check_size(context.width, context.height)
            yield stream


class Decoder:
    """Packets of one stream to frames with their times, in the order of showing.

    Alpha next to the frames is decoded too. AVI attaches times to reordered frames in decoding
    order. Its packets are in that order, and their times ascend, so the next frame shown has the
    next packet's time.
    """

    def __init__(self, stream: "av.VideoStream") -> None:
        self.context = stream.codec_context
        # FFmpeg's own decoders of VP8 and VP9 ignore alpha.
        library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(self.context.codec.canonical_name)
        if has_stored_alpha(stream) and library in av.codecs_available:
            self.context = CodecContext.create(library, "r")
            self.context.thread_count = 1
        self.is_avi = stream.container.format.name == "avi"
        self.times: deque[float] = deque()  # of AVI's packets whose frames have not come

    def __call__(self, packet: "av.Packet") -> "list[tuple[float | None, av.VideoFrame]]":
        """Return frames and their times in the container's seconds; `None` if it has no times."""
        is_timed = self.is_avi and packet.size > 0 and packet.dts is not None
        if is_timed:
            self.times.append(float(packet.dts * packet.time_base))
        try:
            frames = self.context.decode(packet)
        except av.FFmpegError:
            if is_timed:
                self.times.pop()
            raise
        return [(self.times.popleft() if self.times else frame.time, frame) for frame in frames]


def has_stored_alpha(stream: "av.VideoStream") -> bool:
    """Return whether alpha is stored next to the frames, as in Matroska and WebM."""
    return stream.metadata.get("alpha_mode") == "1"


class Pictures:
    """Upright RGB pictures from the decoded frames of one stream, as a player shows them.

    Pixels that are not square are stretched, alpha is composited on white, and rotation and
    mirroring that the file states are applied.

    Args:
        stream: where the frames come from.
        name: of the file, for messages.
        max_pixels (`int`, *optional*): of a stretched frame; a frame that would exceed them, or
            `MAX_DISPLAY_PIXELS`, is shrunk in the other direction instead.
    """

    def __init__(self, stream: "av.VideoStream", name: str, max_pixels: int | None = None) -> None:
        self.stream = stream
        self.name = name
        self.room = min(MAX_DISPLAY_PIXELS, max_pixels or MAX_DISPLAY_PIXELS)
        self.reformatter = VideoReformatter()  # keeps its tables between frames
        self.aspect: Fraction | None = None  # of a pixel, known after the first frame
        self.is_square = True
        self.rotation: float | None = None  # of the latest frame
        self.turn = (False, False, False)

    def __call__(self, frame: "av.VideoFrame") -> np.ndarray:
        """Return a frame as a picture, `(H, W, 3)` uint8."""
        if frame.color_trc in HDR:
            warn_of_hdr(frame.color_trc, self.name)
        has_alpha = is_translucent(frame, self.stream)
        converted = self.reformatter.reformat(
            frame, format="rgba" if has_alpha else "rgb24", threads=1
        )
        picture = converted.to_ndarray()
        if has_alpha:
            picture = np.array(on_white(Image.fromarray(picture)))
        if self.aspect is None:
            # If the container was opened for packets, only the decoder knows the codec's aspect.
            stream = self.stream
            stated = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
            # The first frame's is that of all: a clip has frames of one size.
            self.aspect = stated if stated and abs(stated - 1) > MIN_STRETCH else Fraction(1)
            self.is_square = self.aspect == 1
        if not self.is_square:
            size = display_size(frame.width, frame.height, self.aspect, self.room)
            stretched = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
            picture = np.array(stretched)
        if frame.rotation != self.rotation:
            self.rotation, self.turn = frame.rotation, turn_of(converted)
        is_transposed, is_flipped, is_mirrored = self.turn
        if is_transposed:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if is_flipped else 1, :: -1 if is_mirrored else 1]


def display_size(width: int, height: int, aspect: Fraction, room: int) -> tuple[int, int]:
    """Return width and height of a frame in square pixels.

    The frame is enlarged in one direction. If it would have more than `room` pixels, it is shrunk
    in the other: the aspect of a damaged file can be thousands.

    Args:
        aspect: width of a pixel divided by its height.
    """
    if aspect > 1:
        wide = round(width * aspect)
        return (wide, height) if wide * height <= room else (width, max(round(height / aspect), 1))
    high = round(height / aspect)
    return (width, high) if width * high <= room else (max(round(width * aspect), 1), height)


def turn_of(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """Return how a frame becomes upright: transposed, then upside down, then mirrored.

    Call it for few frames, and not for a decoder's: side data and their frame refer to each other,
    so the memory is returned only when Python collects cycles. Other angles are rounded to quarter
    turns.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for some side data, such as EXIF of a picture
        # The counterclockwise angle is known nevertheless; a mirrored picture's is half a turn.
        return QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if matrix is None:
        return QUARTER_TURNS[0]
    # A stored pixel (x, y) is shown at (m0 x + m3 y, m1 x + m4 y).
    xx, xy, yx, yy = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].astype(np.int64)
    if abs(xx) + abs(yy) < abs(xy) + abs(yx):
        return True, bool(xy < 0), bool(yx < 0)
    return False, bool(yy < 0), bool(xx < 0)


def is_translucent(frame: "av.VideoFrame", stream: "av.VideoStream") -> bool:
    """Return whether a frame has alpha."""
    if not stores_alpha(frame.format.name):
        return False
    # Raw 32-bit pixels in AVI have an unused byte, often 0, where others have alpha.
    context = stream.codec_context
    return not (context.name == "rawvideo" and context.codec_tag in UNUSED_ALPHA)


@cache
def stores_alpha(pixel_format: str) -> bool:
    """Return whether a pixel format of FFmpeg has alpha, in a channel or in its palette."""
    found = av.VideoFormat(pixel_format)
    return found.has_palette or any(part.is_alpha for part in found.components)


def warn_of_hdr(transfer: int, name: str) -> None:
    """Warn at the first frame of each HDR transfer. Tones are not mapped: colours look pale."""
    if transfer not in NAMED_HDR:
        NAMED_HDR.add(transfer)
        logger.warning(
            f"{name}: an HDR video ({HDR[transfer]}). Its tones are not mapped, so colours look "
            "pale: convert such videos to SDR. This warning appears once."
        )


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
