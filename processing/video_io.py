"""Reading clips and images from files or bytes: PyAV and PIL in, uint8 RGB arrays out.

Two ways lead to the same frames, bit for bit:

- *Packets first.* The packets of a file are read without decoding them: their times say which
  frames are sampled, and their key frames where decoding can begin. What no sampled frame needs
  is left out: all that lies between a sampled frame and the next key frame, and frames to which
  no other refers. Taken where packets can be trusted to tell the frames (`_TRUSTED`).
- *Linear*, from the first frame to the last: for every other format, and where anything at all
  was odd on the first way: times missing, a decoding error, a frame that did not come. A damaged
  file is therefore reported as linear decoding finds it, unless the damage lies in what was left
  out.

One thread in each process, in decoding and in converting: many clips are read at once by as many
processes as there are cores, and threads inside them would only take turns.

Files are opened here and never by FFmpeg, for which a string can be a network address, and the
content of a file (a playlist, say) a reason to open others. Pipes and devices, which may never
end, are no files.

Shapes: T frames, H height, W width.
"""

import io
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.utils import is_av_available

if is_av_available():
    import av
    from av.video.reformatter import VideoReformatter

Source = str | os.PathLike | bytes

# Of bytes, which may come from a stranger, PIL reads the common formats alone: among the others
# is PostScript, which is a program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_FRAME_RATE = 240  # frames per second of a clip whose length is bounded
ROUNDING = 2e-3  # seconds: what Matroska's times, in whole milliseconds, can be off by
SLACK = 0.5  # seconds: ends of clips are often annotated in whole ones

# Where each packet is one frame, shown at the packet's time, and a search by time exact. Not VP8
# (hidden frames), not AVI (no times), not MPEG-TS (searched by guessing).
_TRUSTED = {
    "mov,mp4,m4a,3gp,3g2,mj2": {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"},
    "matroska,webm": {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"},
}


class MediaError(ValueError):
    """A video or image that cannot be used. The message names the file and the cure."""


@dataclass(frozen=True)
class Clip:
    """Frames in the order they are shown, with their times.

    Attributes:
        frames (`np.ndarray` of shape `(T, H, W, 3)`, uint8): RGB.
        timestamps (`np.ndarray` of shape `(T,)`, float64): seconds since the first frame of the
            video, also where the clip is a part of it; NaN in a folder of images.
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

    def __str__(self) -> str:
        start, end = (self.start or 0, "the end" if self.end is None else f"{self.end:g} s")
        return f"{_name(self.video)} from {start:g} s to {end}"


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly over `total`, the first and last included.

    A clip that is shorter than `num_frames` repeats frames; a single frame is the first one.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    Raises: `ValueError` if either number is below one.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames from {total}: both must be at least 1")
    return np.linspace(0, total - 1, num_frames).round().astype(np.int64)


def even_indices(seconds: np.ndarray, num_frames: int) -> np.ndarray:
    """Indices of `num_frames` frames spread evenly in time, the first and last included.

    Each is the frame nearest to its instant; of two that are as near as containers can tell
    (`ROUNDING`), it is the one of `uniform_indices`, so that at a constant frame rate both rules
    are one. Where times are missing, NaN, or do not ascend, `uniform_indices` is the rule.

    Args:
        seconds (`np.ndarray` of shape `(total,)`): time of each frame.

    Returns: `np.ndarray` of shape `(num_frames,)`, int64, never decreasing.
    """
    by_count = uniform_indices(len(seconds), num_frames)
    if len(seconds) == 1 or not (np.diff(seconds) > 0).all():  # NaN is not above 0
        return by_count
    instants = np.linspace(seconds[0], seconds[-1], num_frames)
    after = np.searchsorted(seconds, instants).clip(1, len(seconds) - 1)
    nearest = after - (instants - seconds[after - 1] <= seconds[after] - instants)
    farther = np.abs(seconds[by_count] - instants) - np.abs(seconds[nearest] - instants)
    return np.maximum.accumulate(np.where(farther <= ROUNDING, by_count, nearest))


def read_clip(
    source: Source,
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
    name = _name(source)
    part = _Part(name, start, end)
    limits = _Limits(name, max_seconds, max_pixels, max_decode_seconds)
    if not isinstance(source, bytes) and os.path.isdir(source):
        if not part.is_whole:
            raise MediaError(
                f"{name}: a folder of images has no times. Leave start and end out, or put the "
                "images of the part into a folder of their own."
            )
        return _read_folder(source, num_frames, limits)
    clip = None
    if num_frames is not None or not part.is_whole:
        clip = _read_by_packets(source, num_frames, part, limits)
    if clip is None:
        clip = _read_linearly(source, num_frames, part, limits)
    return clip


def read_image(source: Source | Image.Image, *, max_pixels: int | None = None) -> np.ndarray:
    """Read an image as a one-frame clip: upright (EXIF orientation applied), RGB.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): path of an image file, its
            content, or the image.
        max_pixels (`int`, *optional*): refuse a larger image, before it is decoded.

    Returns: `np.ndarray` of shape `(1, H, W, 3)`, uint8. Of 16 bits, the upper 8; of an animation,
        its first picture.
    Raises: `MediaError` naming the file.
    """
    if isinstance(source, Image.Image):
        return _pixels(source, "the image")
    name = _name(source)
    formats = IMAGE_FORMATS if isinstance(source, bytes) else None
    try:
        with _file(source) as file, Image.open(file, formats=formats) as image:
            _Limits(name, max_pixels=max_pixels).check_size(*image.size)
            return _pixels(image, name)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image that PIL can read. Check the file type.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: too large ({error}). Make it smaller.") from error
    # PIL's readers raise what they like: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise MediaError(f"{name}: damaged image ({error}). Fetch or export it again.") from error


@dataclass(frozen=True)
class _Limits:
    """What is refused of the file `name`; `None` bounds nothing. The clock starts here."""

    name: str
    max_seconds: float | None = None
    max_pixels: int | None = None
    max_decode_seconds: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())

    def check_size(self, width: int, height: int) -> None:
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise MediaError(
                f"{self.name}: {width} x {height} pixels, but at most {self.max_pixels} are "
                "taken. Make it smaller."
            )

    def check_time(self, frames: int, seconds: float) -> None:
        if self.max_seconds is None:
            return
        if seconds > self.max_seconds or frames > self.max_seconds * MAX_FRAME_RATE:
            raise MediaError(
                f"{self.name}: longer than {self.max_seconds:g} seconds, or more than "
                f"{MAX_FRAME_RATE} frames in each. Cut it."
            )

    def check_clock(self) -> None:
        limit = self.max_decode_seconds
        if limit is not None and time.monotonic() - self.started > limit:
            raise MediaError(
                f"{self.name}: not decoded within {limit:g} seconds. It is damaged, or too long "
                "or too large for this limit: cut or re-encode it."
            )


@dataclass(frozen=True)
class _Part:
    """From `start` to `end`, in seconds since the first frame; `None` is the video's own."""

    name: str
    start: float | None
    end: float | None

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.end is None

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end in seconds; of impossible ones, which `check` refuses, the whole video."""
        start = 0.0 if self.start is None else self.start
        end = math.inf if self.end is None else self.end
        return (start, end) if 0 <= start < end else (0.0, math.inf)  # NaN is not either

    def check(self, duration: float) -> None:
        """Refuse times that are not those of a video of so many seconds."""
        start = 0.0 if self.start is None else self.start
        end = duration if self.end is None else self.end
        if not (0 <= start < end and start < duration and end <= duration + SLACK):
            raise MediaError(
                f"{self.name}: has no part from {start:g} to {end:g} seconds, for it lasts "
                f"{duration:.3f}. Give 0 <= start < end <= its length."
            )

    def window(self, seconds: np.ndarray) -> tuple[int, int]:
        """The frames `first:last` of this part, at least one, of all that appear at `seconds`."""
        start, end = self.bounds
        first = max(np.searchsorted(seconds, start + ROUNDING / 2, side="right") - 1, 0)
        last = np.searchsorted(seconds, end - ROUNDING / 2)
        return int(first), int(max(last, first + 1))


def _name(source: Source) -> str:
    """What to call it in a message: a path, or an excerpt of a string too long to be one."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    name = os.fspath(source)
    return name if len(name) < 1000 else f"{name[:50]}..."


def _reason(error: Exception) -> str:
    """FFmpeg's, or that of the file in which it looked for a place before the beginning."""
    return error.strerror if isinstance(error, av.FFmpegError | OSError) else str(error)


# -- images --------------------------------------------------------------------------------


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """Upright RGB, `(1, H, W, 3)` uint8."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise MediaError(f"{name}: its pixels are fractions of an unknown range. Save it as PNG.")
    if upright.mode == "I" or upright.mode.startswith("I;"):
        # PIL would cut all above 255 off, which is nearly everything.
        upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
    return np.array(upright.convert("RGB"))[None]


def _natural(name: str) -> list[str | int]:
    """Sorts `2.png` before `10.png`."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _read_folder(folder: str | os.PathLike, num_frames: int | None, limits: _Limits) -> Clip:
    """The images of a folder, which hold nothing else, as a clip without times."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    for name in names:
        if not name.lower().endswith(IMAGE_SUFFIXES):
            raise MediaError(
                f"{limits.name}: holds {name}, which is no image. A folder is a clip if it holds "
                f"the clip's frames alone ({', '.join(IMAGE_SUFFIXES)})."
            )
    if not names:
        raise MediaError(f"{limits.name}: the folder holds no image. Put the clip's frames in it.")
    limits.check_time(len(names), 0.0)
    names.sort(key=_natural)
    indices = uniform_indices(len(names), len(names) if num_frames is None else num_frames)
    pictures = {}
    for index in sorted(set(indices.tolist())):
        limits.check_clock()
        path = os.path.join(folder, names[index])
        pictures[index] = read_image(path, max_pixels=limits.max_pixels)[0]
    return _clip(
        [pictures[index] for index in indices.tolist()], np.full(len(indices), np.nan), limits
    )


# -- opening -------------------------------------------------------------------------------


class _Watched:
    """The file that FFmpeg reads from, which is the one thing it must ask for: an endless search
    for something readable in it ends here, when the time is up."""

    def __init__(self, file: io.BufferedIOBase, source: Source, limits: _Limits) -> None:
        self.file = file
        self.limits = limits
        self.name = "" if isinstance(source, bytes) else _name(source)  # its ending is a hint

    def read(self, size: int) -> bytes:
        self.limits.check_clock()
        return self.file.read(size)

    def seek(self, offset: int, whence: int) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


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
def _open(source: Source, limits: _Limits) -> Iterator["av.container.InputContainer"]:
    """A container that has a video stream, or the reason why it cannot be used."""
    with _file(source) as file:
        try:
            # No protocol: what is no more than a list of other files or addresses opens none.
            watched = _Watched(file, source, limits)
            container = av.open(watched, options={"protocol_whitelist": "none"})
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: cannot be opened as a video ({_reason(error)}). It is not a "
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


def _picture(
    frame: "av.VideoFrame", reformatter: "VideoReformatter", limits: _Limits
) -> np.ndarray:
    """A decoded frame, upright, `(H, W, 3)` uint8. One reformatter serves all frames of a video."""
    limits.check_size(frame.width, frame.height)
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, round(frame.rotation / 90))


def _clip(pictures: list[np.ndarray], seconds: np.ndarray, limits: _Limits) -> Clip:
    if len({picture.shape for picture in pictures}) > 1:
        raise MediaError(
            f"{limits.name}: the frame size changes within the video. Re-encode it to one."
        )
    return Clip(np.stack(pictures), seconds)


# -- packets first -------------------------------------------------------------------------


def _read_by_packets(
    source: Source, num_frames: int | None, part: _Part, limits: _Limits
) -> Clip | None:
    """The clip, or `None` where only linear decoding can tell."""
    with _open(source, limits) as container:
        stream = container.streams.video[0]
        codecs = _TRUSTED.get(container.format.name, set())
        if stream.codec_context.codec.canonical_name not in codecs:
            return None
        try:
            packets = _read_packets(container, stream, part, limits)
            if packets is None:
                return None
            shown, seconds = packets.shown(stream.time_base)
            if packets.is_complete:
                part.check(_duration(seconds, stream))
            first, last = part.window(seconds)
            shown, seconds = shown[first:last], seconds[first:last]
            limits.check_time(len(seconds), seconds[-1] - seconds[0])
            indices = _sample(seconds, num_frames)
            pictures = _decode_packets(container, packets, set(shown[indices].tolist()), limits)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError):
            return None
    if pictures is None:
        return None
    return _clip([pictures[pts] for pts in shown[indices].tolist()], seconds[indices], limits)


@dataclass(frozen=True)
class _Packets:
    """What the packets of a part tell, in the order of decoding; times in the stream's ticks.

    Attributes:
        times: when the frame of each is shown; no two are alike.
        is_key: whether decoding can begin there; the first is.
        origin: when the video's first frame is shown.
        is_complete: whether the last one is the video's last.
    """

    times: list[int]
    is_key: list[bool]
    origin: int
    is_complete: bool

    def shown(self, time_base: "av.AVRational") -> tuple[np.ndarray, np.ndarray]:
        """Times in the order of showing: in ticks, and in seconds since the video's first frame.

        Frames that are shown before the first key frame cannot be decoded from there.
        """
        ticks = np.sort(np.array([pts for pts in self.times if pts >= self.times[0]]))
        origin = float(self.origin) * time_base.numerator / time_base.denominator
        return ticks, ticks * float(time_base.numerator) / time_base.denominator - origin

    def runs(self, wanted: set[int]) -> list[tuple[int, int]]:
        """Which packets the wanted frames need: from a key frame to a frame, both included."""
        runs: list[tuple[int, int]] = []
        key = previous = 0
        for position, pts in enumerate(self.times):
            if self.is_key[position]:
                previous, key = key, position
            if pts not in wanted:
                continue
            # Shown before its key frame, it may refer to frames before that ("open GOP").
            first = key if pts >= self.times[key] else previous
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, position))
        return runs


def _read_packets(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    part: _Part,
    limits: _Limits,
) -> _Packets | None:
    """Read a part's packets without decoding them; `None` where they do not tell the frames."""
    packets = container.demux(stream)
    head = next(packets)
    if head.pts is None:
        return None
    origin, per_second = head.pts, float(1 / stream.time_base)
    start, end = part.bounds
    begin = origin + (start + ROUNDING / 2) * per_second
    if start > 0:
        container.seek(int(min(begin, 2**62)), stream=stream)
        packets = container.demux(stream)
        head = next(packets)
        if head.pts is not None and head.pts > begin and head.dts is not None:
            # Found by when it is decoded, it is shown too late: the key frame before it.
            container.seek(head.dts - 1, stream=stream)
            packets = container.demux(stream)
            head = next(packets)
    times, is_key, is_complete = [], [], False
    for packet in chain([head], packets):
        limits.check_clock()
        is_complete = packet.pts is None and packet.size == 0  # what demuxing ends with
        # No packet is decoded after it is shown, so what follows is shown after the end.
        if is_complete or (packet.dts is not None and packet.dts - origin > end * per_second):
            break
        if packet.pts is None or packet.size == 0 or packet.is_corrupt or packet.is_discard:
            return None
        times.append(packet.pts)
        is_key.append(packet.is_keyframe)
        if part.is_whole:
            limits.check_time(len(times), (packet.pts - origin) / per_second)
    if not times or not is_key[0] or len(set(times)) < len(times):
        return None
    if times[0] > begin:
        return None  # the search went too far
    if start == 0 and min(times) < times[0]:
        return None  # a recording that begins in the middle: some frames cannot be decoded
    if start == 0 and is_complete and stream.frames not in (0, len(times)):
        return None
    return _Packets(times, is_key, origin, is_complete)


def _decode_packets(
    container: "av.container.InputContainer", packets: _Packets, wanted: set[int], limits: _Limits
) -> dict[int, np.ndarray] | None:
    """Decode the frames that are wanted, and of the others no more than they need.

    Returns: pictures by time, each `(H, W, 3)` uint8; `None` where anything was unexpected.
    """
    stream = container.streams.video[0]
    stream.codec_context.open(strict=False)  # AV1's decoder asks once, here, what to leave out
    places = {pts: position for position, pts in enumerate(packets.times)}
    reformatter = VideoReformatter()
    pictures: dict[int, np.ndarray] = {}
    for first, last in packets.runs(wanted):
        container.seek(packets.times[first], stream=stream)
        latest = -math.inf
        for frame in _decode_run(container, stream, range(first, last + 1), places, wanted):
            limits.check_clock()
            if frame.is_corrupt or frame.pts is None or frame.pts <= latest:
                return None
            if frame.interlaced_frame:
                return None  # a packet may have been half a frame
            latest = frame.pts
            if frame.pts in wanted:
                pictures[frame.pts] = _picture(frame, reformatter, limits)
    return pictures if pictures.keys() == wanted else None


def _decode_run(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    run: range,
    places: dict[int, int],
    wanted: set[int],
) -> Iterator["av.VideoFrame"]:
    """The frames of the packets at the places of `run`, less those that nothing needs."""
    due = iter(run)
    position = next(due)
    for packet in container.demux(stream):
        place = places.get(packet.pts, len(places))
        if place < position:
            continue  # the search ended at an earlier key frame
        if place > position:
            raise ValueError("the packets are not those of the first reading")
        # Frames to which no other refers are left out by the decoder, which knows them.
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()
        if position == run[-1]:
            yield from stream.codec_context.decode(None)  # those that it held back
            return
        position = next(due)


# -- linear --------------------------------------------------------------------------------


def _read_linearly(source: Source, num_frames: int | None, part: _Part, limits: _Limits) -> Clip:
    """One pass from the first frame to the last, keeping the frames that the header makes one
    expect; a second where the header has no count (Matroska, WebM) or a wrong one, or the frame
    rate varies."""
    # The length of a part is not that of the video.
    bounds = limits if part.is_whole else replace(limits, max_seconds=None)
    keep = None
    if not part.is_whole:
        keep = set()
    elif num_frames is not None:
        keep = set(uniform_indices(max(_header_count(source, limits), 1), num_frames).tolist())
    pictures, seconds, duration = _decode(source, keep, bounds)
    first, last = 0, len(seconds)
    if not part.is_whole:
        if not np.isfinite(seconds).all():
            raise MediaError(f"{limits.name}: has no times. Re-encode it, or take the whole.")
        part.check(duration)
        first, last = part.window(seconds)
        limits.check_time(last - first, seconds[last - 1] - seconds[first])
    indices = first + _sample(seconds[first:last], num_frames)
    if not pictures.keys() >= set(indices.tolist()):
        pictures, seconds, _ = _decode(source, set(indices.tolist()), bounds)
    return _clip([pictures[index] for index in indices.tolist()], seconds[indices], limits)


def _header_count(source: Source, limits: _Limits) -> int:
    with _open(source, limits) as container:
        return container.streams.video[0].frames


def _decode(
    source: Source, keep: set[int] | None, limits: _Limits
) -> tuple[dict[int, np.ndarray], np.ndarray, float]:
    """One pass over the file, keeping the frames whose index is in `keep` (`None`: all).

    Returns: the kept frames by index, each `(H, W, 3)` uint8; the times of all frames in
    seconds since the first, float64; and how long they last, in seconds.
    """
    pictures: dict[int, np.ndarray] = {}
    times: list[float] = []
    with _open(source, limits) as container:
        stream = container.streams.video[0]
        reformatter = VideoReformatter()
        # Bare H.264 streams carry no times; few streams carry neither times nor a rate.
        rate = float(stream.guessed_rate or math.nan)
        try:
            for index, frame in enumerate(container.decode(stream)):
                limits.check_clock()
                limits.check_size(frame.width, frame.height)
                times.append(index / rate if frame.time is None else frame.time)
                limits.check_time(len(times), times[-1] - times[0])
                if keep is None or index in keep:
                    pictures[index] = _picture(frame, reformatter, limits)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: truncated or damaged after {len(times)} frames "
                f"({_reason(error)}). Fetch or export it again."
            ) from error
        if not times:
            raise MediaError(
                f"{limits.name}: no frame could be decoded: truncated or empty. Fetch or export "
                "it again."
            )
        # AVI gives the times of reordered frames out of order; as shown, they ascend.
        seconds = np.sort(np.array(times, dtype=np.float64))
        seconds -= seconds[0]
        return pictures, seconds, _duration(seconds, stream)


def _sample(seconds: np.ndarray, num_frames: int | None) -> np.ndarray:
    """Indices into `seconds` of `num_frames` frames, or of all."""
    if num_frames is None:
        return np.arange(len(seconds))
    return even_indices(seconds, num_frames)


def _duration(seconds: np.ndarray, stream: "av.VideoStream") -> float:
    """Until the last frame is no longer shown: for as long as most are."""
    shown = np.median(np.diff(seconds)) if len(seconds) > 1 else 1 / (stream.guessed_rate or 25)
    return float(seconds[-1] + shown)


__all__ = [
    "Clip",
    "Excerpt",
    "MediaError",
    "even_indices",
    "read_clip",
    "read_image",
    "uniform_indices",
]
