"""Frames of a source that may have no end: a file, a camera, an address, or any iterator.

    with FrameStream("kitchen.mp4", fps=4) as frames:
        for window in windows(frames, processor.video_processor, size=8, stride=4):
            window.pixel_values  # (8, 3, 256, 256)
        print(frames.report)

`processor.watch("kitchen.mp4", fps=4, window=8, stride=4)` is both in one, a `WindowStream`.

Each frame is decoded, converted and preprocessed once, however many windows it is in; at most a
window and a queue of them are held. A source that stalls, breaks off, changes its size or sends
what cannot be decoded is survived; `report` counts and names what happened.

Files are opened here, never by FFmpeg, as in `video_io`. An address is given to FFmpeg if the
caller allows addresses, and then http(s) or rtsp alone. What it finds there may lead it to further
addresses of the same protocols (a playlist, a redirect), within the network too, never to a file.

Shapes: T frames, H and W pixels as they come, h and w as cropped.
"""

import io
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from transformers.utils import is_av_available, logging

from .video_io import MediaError

if is_av_available():
    import av

logger = logging.get_logger(__name__)

StreamSource = str | os.PathLike | bytes | int | Iterable[tuple[float, np.ndarray | None]]

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# What FFmpeg may use for each kind of address; `file` is nowhere among them.
PROTOCOLS = {
    "http": "http,https,tcp,tls,httpproxy",
    "https": "http,https,tcp,tls,httpproxy",
    "rtsp": "rtsp,rtp,tcp,udp,tls",
}
EVENTS = 100  # that a report remembers
TRIES = 3  # to go on reading after an error of the container, without a frame in between
LEAP_SECONDS = 0.5


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        number (`int`): its place among the frames of the stream, dropped ones counted.
        time (`float`): seconds since the first frame; of an iterator, as it says.
        pixels (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
    """

    number: int
    time: float
    pixels: np.ndarray


@dataclass
class StreamReport:
    """What happened to a stream so far.

    Attributes:
        frames (`int`): handed out.
        dropped (`int`): thrown away because newer ones had come (live sources).
        broken (`int`): packets and frames that could not be decoded, and were left out.
        size_changes (`int`): changes of resolution.
        leaps (`int`): times that go backwards, or ahead by more than half a second and three
            frames. Where a container skips what is damaged by itself (Matroska), nothing else
            tells.
        stalls (`int`): times that nothing came for `stall_seconds`.
        ended (`str`, *optional*): why there is no further frame.
        events (`deque[str]`): the last of these, in words.
    """

    frames: int = 0
    dropped: int = 0
    broken: int = 0
    size_changes: int = 0
    leaps: int = 0
    stalls: int = 0
    ended: str | None = None
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS))

    def note(self, event: str) -> None:
        self.events.append(event)
        logger.warning(event)


class Mailbox:
    """A queue of bounded length between two threads, which drops the oldest or makes the sender
    wait."""

    def __init__(self, size: int, drop: bool, report: StreamReport):
        self.items: deque[Any] = deque()
        self.size, self.drop, self.report = size, drop, report
        self.closed = False
        self.changed = threading.Condition()

    def put(self, item: Any) -> bool:
        """Whether anybody still wants it."""
        with self.changed:
            if not self.drop:
                self.changed.wait_for(lambda: self.closed or len(self.items) < self.size)
            elif len(self.items) >= self.size:
                self.items.popleft()
                self.report.dropped += 1
            self.items.append(item)
            self.changed.notify_all()
            return not self.closed

    def get(self, seconds: float) -> Any:
        """The oldest item; `None` if nothing comes in this time."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.items, seconds):
                return None
            self.changed.notify_all()
            return self.items.popleft()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class FrameStream:
    """The frames of a source, one after the other, each of them once.

    Files and iterators wait for whoever reads them. Cameras and addresses are live: they are read
    by a thread, and where the reader is slower than the source, the oldest of `queue_size` frames
    are dropped and counted. `live=False` makes an address wait as well, for one that is a file;
    `live=True` makes an iterator live.

    Args:
        source: path or content of a video file, the number of a camera (Linux), an http(s) or
            rtsp address, or an iterator of pairs: seconds, and a uint8 array `(H, W, 3)`, or
            `None` for a frame that could not be had.
        fps (`float`, *optional*): frames kept per second of the stream; all by default. The
            others are decoded, as the next ones need them, but not converted.
        live (`bool`, *optional*): see above.
        allow_urls (`bool`, *optional*, defaults to `False`): open addresses.
        queue_size (`int`, *optional*, defaults to 8): frames that wait, of a live source.
        stall_seconds (`float`, *optional*, defaults to 5): without a frame for so long, a live
            source or an address is said to stall.
        give_up_seconds (`float`, *optional*, defaults to 30): and after so long it has ended.
        max_pixels (`int`, *optional*): leave out frames of more.

    Raises: `MediaError` for a source that cannot be opened, when it is iterated.
    """

    def __init__(
        self,
        source: StreamSource,
        *,
        fps: float | None = None,
        live: bool | None = None,
        allow_urls: bool = False,
        queue_size: int = 8,
        stall_seconds: float = 5.0,
        give_up_seconds: float = 30.0,
        max_pixels: int | None = None,
    ):
        if fps is not None and not (isinstance(fps, Real) and 0 < fps < math.inf):
            raise ValueError(f"fps is {fps!r}: give more than 0, or leave it out for all frames.")
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}: give at least 1.")
        if isinstance(source, bool) or not isinstance(
            source, str | os.PathLike | bytes | int | Iterable
        ):
            raise ValueError(
                f"source is a {type(source).__name__}: give a path or content of a video, the "
                "number of a camera, an address, or an iterator of (seconds, frame)."
            )
        self.source = source
        self.scheme = check_address(source, allow_urls)
        self.is_camera = isinstance(source, int)
        self.live = (self.is_camera or self.scheme is not None) if live is None else live
        self.fps = fps
        self.queue_size = queue_size
        self.stall_seconds = stall_seconds
        self.give_up_seconds = give_up_seconds
        self.max_pixels = max_pixels
        self.report = StreamReport()
        self.running: Iterator[Frame] | None = None

    def __enter__(self) -> "FrameStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading. A thread that waits for its source ends when that sends or gives up."""
        if self.running is not None:
            self.running.close()

    def __iter__(self) -> Iterator[Frame]:
        if self.running is not None:
            raise ValueError("a stream is read once: make another FrameStream.")
        threaded = self.live or self.scheme is not None
        self.running = self.counted(self.from_thread() if threaded else self.read())
        return self.running

    def counted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        with closing(frames):
            for frame in frames:
                self.report.frames += 1
                yield frame
        self.report.ended = self.report.ended or "the source has ended"

    def end(self, reason: str) -> None:
        self.report.ended = reason
        self.report.note(f"{self.name}: {reason}")

    @property
    def name(self) -> str:
        if self.is_camera:
            return f"camera {self.source}"
        if isinstance(self.source, str | os.PathLike):
            # An address may hold a password.
            return re.sub(r"//[^/]*@", "//", os.fspath(self.source))
        return f"{len(self.source)} bytes" if isinstance(self.source, bytes) else "the iterator"

    # -- a thread of its own ---------------------------------------------------------------

    def from_thread(self) -> Iterator[Frame]:
        mailbox = Mailbox(self.queue_size, self.live, self.report)
        thread = threading.Thread(target=self.work, args=(mailbox,), daemon=True)
        thread.start()
        waited = 0.0
        try:
            while True:
                since = time.monotonic()
                item = mailbox.get(min(self.stall_seconds, self.give_up_seconds - waited))
                if isinstance(item, Frame):
                    waited = 0.0
                    yield item
                elif isinstance(item, BaseException):
                    raise item
                elif item is not None:  # the end
                    return
                else:
                    if not waited:
                        self.report.stalls += 1
                        self.report.note(f"{self.name}: nothing for {self.stall_seconds:g} s")
                    waited += time.monotonic() - since
                    if waited >= self.give_up_seconds:
                        self.end(f"nothing for {self.give_up_seconds:g} s: given up")
                        return
        finally:
            mailbox.close()
            thread.join(timeout=1.0)

    def work(self, mailbox: Mailbox) -> None:
        """Read the source into the mailbox; what comes last is an error, or `True`."""
        last: Any = True
        frames = self.read()
        try:
            for frame in frames:
                if not mailbox.put(frame):
                    break
        except BaseException as error:  # the reader's thread raises it
            last = error
        finally:
            frames.close()
        mailbox.drop = False  # neither the end nor a frame before it is dropped for the end's sake
        mailbox.put(last)

    # -- what is read ----------------------------------------------------------------------

    def read(self) -> Iterator[Frame]:
        """The frames of the source at the rate asked for."""
        number, slot, size = 0, None, None
        for seconds, picture in self.pictures():
            # A thousandth of a slot of rounding decides nothing.
            this = None if self.fps is None else int(seconds * self.fps + 1e-3)
            if this is not None and this == slot:
                continue
            pixels = self.pixels(picture)
            if pixels is None:
                continue
            slot = this
            if size is not None and pixels.shape != size:
                self.report.size_changes += 1
                sizes = [f"{width} x {height}" for height, width, _ in (size, pixels.shape)]
                self.report.note(f"{self.name}: {sizes[0]} becomes {sizes[1]} at {seconds:g} s")
            size = pixels.shape
            yield Frame(number, seconds, pixels)
            number += 1

    def pixels(self, picture: Any) -> np.ndarray | None:
        """Upright RGB; `None`, and a word in the report, for what is none."""
        if picture is None:
            self.broken("a frame that could not be had")
            return None
        shape = picture.shape if isinstance(picture, np.ndarray) else None
        if shape is None and not (is_av_available() and isinstance(picture, av.VideoFrame)):
            raise TypeError(f"a frame is a {type(picture).__name__}: give uint8 arrays (H, W, 3).")
        if shape is not None and (picture.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3):
            raise ValueError(f"a frame is {picture.dtype} of {shape}: give uint8 (H, W, 3).")
        height, width = shape[:2] if shape else (picture.height, picture.width)
        if not height * width:
            self.broken(f"a frame of {width} x {height}")
            return None
        if self.max_pixels is not None and height * width > self.max_pixels:
            self.broken(f"a frame of {width} x {height}, more than {self.max_pixels} pixels")
            return None
        if shape is not None:
            return picture
        return np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90))

    def broken(self, what: str) -> None:
        self.report.broken += 1
        self.report.note(f"{self.name}: {what}")

    def pictures(self) -> Iterator[tuple[float, Any]]:
        """Each picture with its time, which never goes backwards."""
        if not isinstance(self.source, str | os.PathLike | bytes | int):
            yield from self.in_order(pairs(self.source), period=0.0)
            return
        with self.container() as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            period = float(1 / stream.guessed_rate) if stream.guessed_rate else 0.04
            last = 0.0
            for last, picture in self.in_order(self.decode(container, stream), period):
                yield last, picture
            total = (container.duration or 0) / 1e6  # AV_TIME_BASE
            if self.report.ended is None and last + 2 * period + LEAP_SECONDS < total:
                self.end(f"ends early, after {last:g} of {total:g} seconds")

    def in_order(
        self, pictures: Iterator[tuple[float, Any]], period: float
    ) -> Iterator[tuple[float, Any]]:
        """The same, with times that never go backwards: where a clock has begun anew (joined files,
        a camera that restarts), the time goes on from where it was."""
        last, shift = None, 0.0
        for seconds, picture in pictures:
            seconds += shift
            ahead = 0.0 if last is None else seconds - last
            if ahead < 0 or (period and ahead > max(LEAP_SECONDS, 3 * period)):
                self.report.leaps += 1
                self.report.note(f"{self.name}: from {last:g} s to {seconds:g} s")
            if ahead < -LEAP_SECONDS:
                shift += last + period - seconds
                seconds = last + period
            last = seconds if last is None else max(last, seconds)
            yield last, picture

    def decode(self, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
        """Every picture that can be decoded, with seconds since the first."""
        packets, failures, count, first = container.demux(stream), 0, 0, None
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.InvalidDataError as error:
                failures += 1
                if failures > TRIES:
                    self.end(f"cannot be read any further ({reason(error)})")
                    return
                self.broken(f"damaged after {count} frames ({reason(error)})")
                packets = container.demux(stream)  # an error ends the former
                continue
            except (av.error.ExitError, av.error.TimeoutError):
                self.end(f"nothing for {self.give_up_seconds:g} s: given up")
                return
            except (av.FFmpegError, OSError, ValueError) as error:
                self.end(f"breaks off after {count} frames ({reason(error)})")
                return
            try:
                pictures = packet.decode()
            except av.FFmpegError as error:
                self.broken(f"a packet after {count} frames ({reason(error)})")
                continue
            for picture in pictures:
                seconds = picture.time
                # Bare streams carry no times, and AVI those of reordered frames out of order.
                if seconds is None or container.format.name == "avi":
                    seconds = count * float(1 / (stream.guessed_rate or 25))
                first = seconds if first is None else first
                count, failures = count + 1, 0
                yield seconds - first, None if picture.is_corrupt else picture

    @contextmanager
    def container(self) -> Iterator[Any]:
        """The opened source.

        Raises: `MediaError` naming it and the cure; `ImportError` if PyAV is missing.
        """
        if not is_av_available():
            raise ImportError("reading video needs PyAV: pip install av")
        try:
            container = self.open()
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            # FFmpeg's own error holds the address, and with it the password.
            raise MediaError(
                f"{self.name}: cannot be opened as a video ({reason(error)}). Check that it is "
                "there, that it is a video, and that it is whole."
            ) from (error if self.scheme is None else None)
        with container:
            found = container.streams.video
            # FFmpeg "plays" plain text files as terminal art, through its tty demuxer.
            if not found or found[0].codec_context is None or container.format.name == "tty":
                raise MediaError(f"{self.name}: has no video stream that FFmpeg can decode.")
            yield container

    def open(self) -> Any:
        limits = {"timeout": (self.give_up_seconds, self.give_up_seconds)}
        if self.scheme is not None:
            rest = ADDRESS.sub("", os.fspath(self.source), count=1)
            options = {"protocol_whitelist": PROTOCOLS[self.scheme]}
            if self.scheme == "rtsp":
                options["rtsp_transport"] = "tcp"  # over UDP, packets get lost
            # In small letters, which alone FFmpeg knows.
            return av.open(f"{self.scheme}://{rest}", options=options, **limits)
        if self.is_camera:
            if sys.platform != "linux":
                raise MediaError(
                    f"{self.name}: cameras are read through Video4Linux alone. Read it with "
                    "another library and give an iterator of (seconds, frame)."
                )
            return av.open(f"/dev/video{self.source}", format="v4l2", **limits)
        if not isinstance(self.source, bytes) and not os.path.isfile(self.source):
            if os.path.isdir(self.source):
                raise MediaError(f"{self.name}: is a folder. Give one of the videos in it.")
            raise MediaError(f"{self.name}: no such file. Check the path.")
        source = self.source
        # Closed by the collector, with the container.
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        # No protocol: what is no more than a list of other files or addresses opens none.
        return av.open(file, options={"protocol_whitelist": "none"})


def pairs(source: Iterable[tuple[float, np.ndarray | None]]) -> Iterator[tuple[float, Any]]:
    """What an iterator gives.

    Raises: `ValueError` for what is no pair, and for times that are no numbers.
    """
    for item in source:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(
                f"the iterator gave a {type(item).__name__}: it has to give pairs of seconds and a "
                "frame. Of several videos, watch one after the other."
            )
        seconds, picture = item
        if not isinstance(seconds, Real) or not math.isfinite(seconds):
            raise ValueError(f"the iterator gave a frame at {seconds!r}: times are seconds.")
        yield float(seconds), picture


def reason(error: Exception) -> str:
    return error.strerror if isinstance(error, av.FFmpegError | OSError) else str(error)


def check_address(source: StreamSource, allow_urls: bool) -> str | None:
    """The protocol of an address that may be opened; `None` for what is no address."""
    found = ADDRESS.match(source) if isinstance(source, str) else None
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in PROTOCOLS:
        raise MediaError(f"{scheme}:// is not opened, only {', '.join(PROTOCOLS)}, and files.")
    if not allow_urls:
        raise MediaError(
            "an address is opened with allow_urls=True alone (--allow-urls of a command): see what "
            "it allows."
        )
    return scheme


# -- windows -------------------------------------------------------------------------------


__all__ = ["Frame", "FrameStream", "StreamReport"]
