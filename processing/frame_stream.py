"""Frames of a source that can be endless: a file, a camera, an address, or any iterator.

    with FrameStream("kitchen.mp4", fps=4) as frames:
        for window in windows(frames, processor.video_processor, size=8, stride=4):
            window.pixel_values  # (8, 3, 256, 256)
        print(frames.report)

`processor.watch("kitchen.mp4", fps=4, window=8, stride=4)` does both; it returns a `WindowStream`.

Each frame is decoded, converted and preprocessed once, even if several windows contain it. Only
one window and one queue of frames are in memory. The stream goes on if the source stalls, changes
its size or sends damaged frames, and ends without an error if the source breaks off; `report`
counts and names these events.

Python opens files, never FFmpeg, as in `video_io`. FFmpeg opens an address if the caller allows
addresses, and only by http(s) or rtsp. A playlist or a redirect there can lead FFmpeg to further
addresses of the same protocols, also within the network, but never to a file.

Shapes: T frames, H and W pixels of the source, h and w after the crop.
"""

import io
import math
import os
import re
import string
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any
from urllib.parse import quote

import numpy as np
from transformers.utils import is_av_available, logging

from .containers import Decoder, Pictures, gap_before, reason_of, stated_end, video_stream
from .images import animation_frames, animation_in
from .media import ADDRESS, Limits, MediaError, is_address, is_remote, open_file

if is_av_available():
    import av

logger = logging.get_logger(__name__)

StreamSource = str | os.PathLike | bytes | int | Iterable[tuple[float, np.ndarray | None]]

# The protocols that FFmpeg may use for each kind of address; `file` is not among them.
PROTOCOLS = {
    "http": "http,https,tcp,tls,httpproxy",
    "https": "http,https,tcp,tls,httpproxy",
    "rtsp": "rtsp,rtp,tcp,udp,tls",
}
EVENTS = 100  # the latest events that a report stores
RETRIES = 3  # after container errors with no frame between them
LEAP_SECONDS = 0.5  # a larger step in time is a leap, not jitter


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        number (`int`): its index in the stream; dropped frames have one, too.
        time (`float`): seconds since the beginning of a file, as a player counts; since the first
            frame of a camera or an rtsp address; for an iterator, the seconds that it gave.
        pixels (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
    """

    number: int
    time: float
    pixels: np.ndarray


@dataclass
class StreamReport:
    """Counts and events of a stream so far.

    Attributes:
        frames (`int`): frames returned to the reader.
        dropped (`int`): frames of a live source dropped because newer ones had come.
        broken (`int`): packets and frames left out because they could not be decoded.
        size_changes (`int`): changes of resolution.
        leaps (`int`): steps back in time, and steps ahead by more than half a second and three
            frames. Matroska's reader skips damaged parts silently; a leap is then the only sign.
        stalls (`int`): how often no frame came for `stall_seconds`.
        ended (`str`, *optional*): why there is no further frame.
        events (`deque[str]`): the latest events as text.
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
    """Queue of limited length between two threads.

    If it is full, the oldest item is dropped (`drop=True`), or the sender waits. `queue.Queue` can
    only wait, and a sender waiting there does not see that the receiver has closed the queue.
    """

    def __init__(self, size: int, drop: bool, report: StreamReport):
        self.items: deque[Any] = deque()
        self.size, self.drop, self.report = size, drop, report
        self.closed = False
        self.changed = threading.Condition()

    def put(self, item: Any) -> bool:
        """Add an item; return whether the queue is still open."""
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
        """Return the oldest item, or `None` if none comes within these seconds."""
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
    """Iterator over the frames of a source, each once.

    Files and iterators wait for the reader. Cameras and addresses are live: a thread reads them,
    and if the reader is slower than the source, the oldest of `queue_size` frames are dropped and
    counted. With `live=False` an address waits too, for example the address of a file; with
    `live=True` an iterator is live.

    Args:
        source: path or content of a video file, the number of a camera (Linux), an http(s) or
            rtsp address, or an iterator of pairs: seconds, and a uint8 array `(H, W, 3)`, or
            `None` for a missing frame.
        fps (`float`, *optional*): frames taken per second of the stream; all by default. The
            others are decoded, because later frames depend on them, but not converted.
        live (`bool`, *optional*): see above.
        allow_urls (`bool`, *optional*, defaults to `False`): open addresses.
        queue_size (`int`, *optional*, defaults to 8): frames of a live source that can wait.
        stall_seconds (`float`, *optional*, defaults to 5): time without a frame after which a live
            source or an address counts as stalled.
        give_up_seconds (`float`, *optional*, defaults to 30): time without a frame after which it
            counts as ended.
        max_pixels (`int`, *optional*): leave out frames with more pixels.

    Raises: `MediaError` for an address that is not allowed, and on iteration for a source that
        cannot be opened.
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
        self.picture_of: Pictures | None = None  # of the open file, camera or address

    def __enter__(self) -> "FrameStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading. A thread waiting for its source ends with the next frame or time-out."""
        if self.running is not None:
            self.running.close()

    def __iter__(self) -> Iterator[Frame]:
        if self.running is not None:
            raise ValueError("a stream can be read only once: make another FrameStream.")
        threaded = self.live or self.scheme is not None
        self.running = self.counted(self.from_thread() if threaded else self.read())
        return self.running

    def counted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Yield the frames and count them in the report."""
        with closing(frames):
            for frame in frames:
                self.report.frames += 1
                yield frame
        self.report.ended = self.report.ended or "the source has ended"

    def end(self, reason: str) -> None:
        """Report why the stream ends."""
        self.report.ended = reason
        self.report.note(f"{self.name}: {reason}")

    @property
    def name(self) -> str:
        """Name of the source for messages, without a password."""
        if self.is_camera:
            return f"camera {self.source}"
        if isinstance(self.source, str | os.PathLike):
            return without_password(os.fspath(self.source))
        return f"{len(self.source)} bytes" if isinstance(self.source, bytes) else "the iterator"

    # -- reading in a thread ---------------------------------------------------------------

    def from_thread(self) -> Iterator[Frame]:
        """Yield the frames that a thread reads; report stalls and give up after a long one."""
        mailbox = Mailbox(self.queue_size, self.live, self.report)
        thread = threading.Thread(target=self.work, args=(mailbox,), daemon=True)
        thread.start()
        waited = 0.0  # seconds since the last frame
        try:
            while True:
                since = time.monotonic()
                item = mailbox.get(min(self.stall_seconds, self.give_up_seconds - waited))
                if isinstance(item, Frame):
                    waited = 0.0
                    yield item
                elif isinstance(item, BaseException):
                    raise item
                elif item is not None:  # `True`: the source has ended
                    return
                else:
                    if not waited:  # a stall is counted once, however long it is
                        self.report.stalls += 1
                        self.report.note(f"{self.name}: no frame for {self.stall_seconds:g} s")
                    waited += time.monotonic() - since
                    if waited >= self.give_up_seconds:
                        self.end(f"no frame for {self.give_up_seconds:g} s: given up")
                        return
        finally:
            mailbox.close()
            thread.join(timeout=1.0)

    def work(self, mailbox: Mailbox) -> None:
        """Read the source into the mailbox; the last item is an error or `True`."""
        last: Any = True
        frames = self.read()
        try:
            for frame in frames:
                if not mailbox.put(frame):
                    break
        except BaseException as error:  # raised in the reader's thread, by `from_thread`
            last = error
        finally:
            frames.close()
        mailbox.drop = False  # the last item must not push out a frame, nor be dropped
        mailbox.put(last)

    # -- reading ---------------------------------------------------------------------------

    def read(self) -> Iterator[Frame]:
        """Yield the frames of the source at the rate `fps`: the first good one of each slot."""
        number, slot, size = 0, None, None
        for seconds, picture in self.pictures():
            # Times are rounded: a frame may begin its slot a thousandth of a slot early.
            this = None if self.fps is None else int(seconds * self.fps + 1e-3)
            if this is not None and this == slot:
                continue
            pixels = self.pixels(picture)
            if pixels is None:
                continue
            slot = this  # only now: a broken frame leaves its slot to the next one
            if size is not None and pixels.shape != size:
                self.report.size_changes += 1
                sizes = [f"{width} x {height}" for height, width, _ in (size, pixels.shape)]
                self.report.note(f"{self.name}: {sizes[0]} becomes {sizes[1]} at {seconds:g} s")
            size = pixels.shape
            yield Frame(number, seconds, pixels)
            number += 1

    def pixels(self, picture: Any) -> np.ndarray | None:
        """Return an upright RGB frame, or `None`, noted in the report, if it is unusable."""
        if picture is None:
            self.broken("a frame is missing")
            return None
        shape = picture.shape if isinstance(picture, np.ndarray) else None
        if shape is None and not (is_av_available() and isinstance(picture, av.VideoFrame)):
            raise TypeError(f"a frame is a {type(picture).__name__}: give uint8 arrays (H, W, 3).")
        if shape is not None and (picture.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3):
            raise ValueError(f"a frame is {picture.dtype} of {shape}: give uint8 (H, W, 3).")
        height, width = shape[:2] if shape else (picture.height, picture.width)
        if not height * width:
            self.broken(f"a frame is {width} x {height} pixels")
            return None
        if self.max_pixels is not None and height * width > self.max_pixels:
            self.broken(f"a frame is {width} x {height}, more than {self.max_pixels} pixels")
            return None
        if shape is not None:
            return picture
        return self.picture_of(picture)

    def broken(self, what: str) -> None:
        """Report a packet or frame that is left out."""
        self.report.broken += 1
        self.report.note(f"{self.name}: {what}")

    def pictures(self) -> Iterator[tuple[float, Any]]:
        """Yield each picture with its time; times never go backwards."""
        if not isinstance(self.source, str | os.PathLike | bytes | int):
            yield from self.in_order(pairs(self.source), period=0.0)
            return
        if self.scheme is None and not self.is_camera and animation_in(self.source):
            limits = Limits(self.name, max_pixels=self.max_pixels)
            start = None
            try:
                for start, _, picture in animation_frames(self.source, limits):
                    yield start, picture
            except MediaError as error:
                if start is None:
                    raise
                self.end(f"cannot be read any further ({error})")
            return
        with self.video() as stream:
            stream.codec_context.thread_count = 1
            self.picture_of = Pictures(stream, self.name, self.max_pixels)
            # 25 frames per second, FFmpeg's own default, if nothing states a rate.
            period = float(1 / stream.guessed_rate) if stream.guessed_rate else 0.04
            last = 0.0
            for last, picture in self.in_order(self.decode(stream), period):
                yield last, picture
            total = stated_end(stream) or 0.0
            # Headers can be wrong by a few frames; beyond that, the end is missing.
            if self.report.ended is None and last + 2 * period + LEAP_SECONDS < total:
                self.end(f"ends early, after {last:g} of {total:g} seconds")

    def in_order(
        self, pictures: Iterator[tuple[float, Any]], period: float
    ) -> Iterator[tuple[float, Any]]:
        """Yield the same pictures, with times that never go backwards.

        If the clock starts again (joined files, a restarted camera), times continue from the last.
        """
        last, shift = None, 0.0  # shift: added to all times since the clock started again
        for seconds, picture in pictures:
            seconds += shift
            ahead = 0.0 if last is None else seconds - last
            if ahead < 0 or (period and ahead > max(LEAP_SECONDS, 3 * period)):
                self.report.leaps += 1
                self.report.note(f"{self.name}: from {last:g} s to {seconds:g} s")
            # A smaller step back is jitter: only this frame is late, so only its time is corrected.
            if ahead < -LEAP_SECONDS:
                shift += last + period - seconds
                seconds = last + period
            last = seconds if last is None else max(last, seconds)
            yield last, picture

    def decode(self, stream: Any) -> Iterator[tuple[float, Any]]:
        """Yield every picture that can be decoded, with its time."""
        container, decode_packet = stream.container, Decoder(stream)
        packets, failures, count, origin = container.demux(stream), 0, 0, None
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.InvalidDataError as error:
                failures += 1
                if failures > RETRIES:
                    self.end(f"cannot be read any further ({reason_of(error)})")
                    return
                self.broken(f"damaged after {count} frames ({reason_of(error)})")
                packets = container.demux(stream)  # an error ends a generator; take a new one
                continue
            except (av.error.ExitError, av.error.TimeoutError):
                self.end(f"no frame for {self.give_up_seconds:g} s: given up")
                return
            except (av.FFmpegError, OSError, ValueError) as error:
                self.end(f"breaks off after {count} frames ({reason_of(error)})")
                return
            try:
                pictures = decode_packet(packet)
            except av.FFmpegError as error:
                self.broken(f"a packet is damaged after {count} frames ({reason_of(error)})")
                continue
            for seconds, picture in pictures:
                if seconds is None:  # raw streams have no times
                    seconds = count * float(1 / (stream.guessed_rate or 25))
                if origin is None:
                    # The clocks of a live source's sound and picture can differ.
                    is_file = not self.is_camera and self.scheme != "rtsp"
                    origin = seconds - (gap_before(stream, seconds) if is_file else 0.0)
                count, failures = count + 1, 0
                yield seconds - origin, None if picture.is_corrupt else picture

    @contextmanager
    def video(self) -> Iterator[Any]:
        """Yield the video stream of the opened source.

        Raises: `MediaError` for a source that is not a video; `ImportError` if PyAV is missing.
        """
        if not is_av_available():
            raise ImportError("reading video needs PyAV: pip install av")
        try:
            container = self.open()
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            # Not chained for an address: FFmpeg's own error contains it, with its password.
            raise MediaError(
                f"{self.name}: cannot be opened as a video ({reason_of(error)}). Check that it "
                "exists, is a video and is complete."
            ) from (error if self.scheme is None else None)
        with container:
            # Packets are looked at in files only: an address would be opened twice.
            is_file = not self.is_camera and self.scheme is None
            yield video_stream(container, self.name, self.open if is_file else None)

    def open(self) -> Any:
        """Open the source with FFmpeg."""
        limits = {"timeout": (self.give_up_seconds, self.give_up_seconds)}
        if self.scheme is not None:
            rest = ADDRESS.sub("", os.fspath(self.source), count=1)
            # FFmpeg sends spaces and other letters as they are, which servers refuse.
            host, slash, path = rest.partition("/")
            rest = host + slash + quote(path, safe=string.punctuation)
            options = {"protocol_whitelist": PROTOCOLS[self.scheme]}
            if self.scheme == "rtsp":
                options["rtsp_transport"] = "tcp"  # over UDP, packets get lost
            # FFmpeg knows schemes in lower case only.
            return av.open(f"{self.scheme}://{rest}", options=options, **limits)
        if self.is_camera:
            if sys.platform != "linux":
                raise MediaError(
                    f"{self.name}: cameras can be read only on Linux (Video4Linux). Read it with "
                    "another library and give an iterator of (seconds, frame)."
                )
            return av.open(f"/dev/video{self.source}", format="v4l2", **limits)
        if is_address(self.source):
            with open_file(self.source) as file:
                return av.open(file, options={"protocol_whitelist": "none"})
        if not isinstance(self.source, bytes) and not os.path.isfile(self.source):
            if os.path.isdir(self.source):
                raise MediaError(f"{self.name}: is a folder. Give one of the videos in it.")
            raise MediaError(f"{self.name}: no such file. Check the path.")
        source = self.source
        # The container reads from it and is used after this method; it is closed when collected.
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        # Without any protocol, a playlist cannot open other files or addresses.
        return av.open(file, options={"protocol_whitelist": "none"})


def pairs(source: Iterable[tuple[float, np.ndarray | None]]) -> Iterator[tuple[float, Any]]:
    """Yield seconds and frame of each pair of an iterator.

    Raises: `ValueError` for an item that is not a pair, or whose time is not a finite number.
    """
    for item in source:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(
                f"the iterator gave a {type(item).__name__}: give pairs (seconds, frame). Watch "
                "several videos one after the other."
            )
        seconds, picture = item
        if not isinstance(seconds, Real) or not math.isfinite(seconds):
            raise ValueError(f"the iterator gave a frame at {seconds!r}: give its time in seconds.")
        yield float(seconds), picture


def without_password(address: str) -> str:
    """Return an address without user name and password, for messages and logs."""
    return re.sub(r"//[^/]*@", "//", address)


def check_address(source: StreamSource, allow_urls: bool) -> str | None:
    """Return the scheme of an address, or `None` for another source.

    Raises: `MediaError` for an address that must not be opened.
    """
    found = ADDRESS.match(source) if isinstance(source, str) else None
    if found is None:
        return None
    scheme = found[1].lower()
    if is_address(source) and not is_remote(source):
        return None  # in an archive on this disk
    if scheme not in PROTOCOLS and not is_address(source):
        raise MediaError(
            f"{without_password(source)}: {scheme}:// is not opened. Give a file, or an address of "
            f"{', '.join(PROTOCOLS)}."
        )
    if not allow_urls:
        raise MediaError(
            f"{without_password(source)}: is an address. Addresses are opened only with "
            "allow_urls=True (--allow-urls of a command)."
        )
    return None if is_address(source) else scheme  # a file, which Python opens


__all__ = ["Frame", "FrameStream", "StreamReport"]
