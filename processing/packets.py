"""A clip by its packets, which are read without decoding them.

Their times say which frames are sampled, and their key frames where decoding can begin. What no
sampled frame needs is left out: all that lies between a sampled frame and the next key frame, and
frames to which no other refers.

Shapes: H height, W width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers.utils import is_av_available

from .containers import duration_of, open_container, picture_of
from .media import Clip, Limits, MediaError, MediaSource, stack
from .sampling import ROUNDING, Part, sample

if is_av_available():
    import av
    from av.video.reformatter import VideoReformatter

# Where each packet is one frame, shown at the packet's time, and a search by time exact. Not VP8
# (hidden frames), not AVI (no times), not MPEG-TS (searched by guessing).
TRUSTED_FORMATS = {"mp4", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
TRUSTED_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
HELD = 2**25  # bytes of packets that are held; those of a longer clip are read again


def read_by_packets(
    source: MediaSource, num_frames: int | None, part: Part, limits: Limits
) -> Clip | None:
    """The clip, or `None` where only linear decoding can tell."""
    with open_container(source, limits, for_packets=True) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.codec.canonical_name
        if container.format.name not in TRUSTED_FORMATS or codec not in TRUSTED_CODECS:
            return None
        try:
            packets = read_packets(container, stream, part, limits)
            if packets is None:
                return None
            shown, seconds = packets.shown(stream.time_base)
            if packets.is_complete and not part.is_whole:
                part.check(duration_of(seconds, stream))
            first, last = part.window(seconds)
            shown, seconds = shown[first:last], seconds[first:last]
            limits.check_time(len(seconds), seconds[-1] - seconds[0])
            indices = sample(seconds, num_frames)
            pictures = decode_packets(container, packets, set(shown[indices].tolist()), limits)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError):
            return None
    if pictures is None:
        return None
    return stack([pictures[pts] for pts in shown[indices].tolist()], seconds[indices], limits)


@dataclass(frozen=True)
class Packets:
    """What the packets of a part tell, in the order of decoding; times in the stream's ticks.

    Attributes:
        times: when the frame of each is shown; no two are alike.
        is_key: whether decoding can begin there; the first is.
        origin: when the video's first frame is shown.
        is_complete: whether the last one is the video's last.
        held: the packets themselves; empty where they are too large to be held.
    """

    times: list[int]
    is_key: list[bool]
    origin: int
    is_complete: bool
    held: list["av.Packet"]

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


def read_packets(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    part: Part,
    limits: Limits,
) -> Packets | None:
    """Read a part's packets without decoding them; `None` where they do not tell the frames."""
    packets = container.demux(stream)
    head = next(packets)
    if head.pts is None:
        return None
    origin, per_second = head.pts, stream.time_base.denominator / stream.time_base.numerator
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
    times, is_key, is_complete, held, room = [], [], False, [], HELD
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
        room -= packet.size
        if room >= 0:
            held.append(packet)
        else:
            held.clear()
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
    return Packets(times, is_key, origin, is_complete, held)


def decode_packets(
    container: "av.container.InputContainer", packets: Packets, wanted: set[int], limits: Limits
) -> dict[int, np.ndarray] | None:
    """Decode the frames that are wanted, and of the others no more than they need.

    Returns: pictures by time, each `(H, W, 3)` uint8; `None` where anything was unexpected.
    """
    stream = container.streams.video[0]
    stream.codec_context.open(strict=False)  # AV1's decoder asks once, here, what to leave out
    reformatter = VideoReformatter()
    pictures: dict[int, np.ndarray] = {}
    for run in packets.runs(wanted):
        latest = -math.inf
        for frame in decode_run(container, stream, packets, run, wanted):
            limits.check_clock()
            limits.check_size(frame.width, frame.height)
            if frame.is_corrupt or frame.pts is None or frame.pts <= latest:
                return None
            if frame.interlaced_frame:
                return None  # a packet may have been half a frame
            latest = frame.pts
            if latest in wanted:
                pictures[latest] = picture_of(frame, reformatter)
    return pictures if pictures.keys() == wanted else None


def decode_run(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    packets: Packets,
    run: tuple[int, int],
    wanted: set[int],
) -> Iterator["av.VideoFrame"]:
    """The frames of the packets of `run`, less those that nothing needs."""
    decoder = stream.codec_context
    decoder.flush_buffers()
    for packet in packets_of(container, stream, packets, run):
        # Frames to which no other refers are left out by the decoder, which knows them.
        decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from decoder.decode(packet)
    yield from decoder.decode(None)  # those that it held back


def packets_of(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    packets: Packets,
    run: tuple[int, int],
) -> Iterator["av.Packet"]:
    """The packets of `run`, as they were held, or read again."""
    first, last = run
    if packets.held:
        yield from packets.held[first : last + 1]
        return
    container.seek(packets.times[first], stream=stream)
    before = set(packets.times[:first])
    found = container.demux(stream)
    for pts in packets.times[first : last + 1]:
        packet = next(found)
        while packet.pts in before:
            packet = next(found)  # the search ended at an earlier key frame
        if packet.pts != pts:
            raise ValueError("the packets are not those of the first reading")
        yield packet
