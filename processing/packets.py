"""Clips by their packets, which can be read without decoding them.

The times of the packets determine which frames are sampled, and the key frames determine where
decoding can begin. Packets that no sampled frame needs are not decoded: those between a sampled
frame and the next key frame, and frames that no other frame refers to.

Shapes: H height, W width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers.utils import is_av_available

from .containers import Pictures, duration_of, gap_before, has_stored_alpha, open_video
from .media import Clip, Limits, MediaError, MediaSource, Prepare, stack
from .sampling import ROUNDING, Part, sample

if is_av_available():
    import av

# Formats and codecs where each packet is one frame, shown at the packet's time, and a seek by time
# is exact. Not VP8 (has hidden frames), AVI (has no times) or MPEG-TS (FFmpeg seeks by guessing).
TRUSTED_FORMATS = {"mp4", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
TRUSTED_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
CACHE_BYTES = 2**25  # packets of a clip up to this size are cached; others are read twice


def read_by_packets(
    source: MediaSource,
    num_frames: int | None,
    part: Part,
    limits: Limits,
    prepare: Prepare | None = None,
) -> Clip | None:
    """Return the clip, or `None` if it has to be decoded linearly."""
    with open_video(source, limits, for_packets=True) as stream:
        codec = stream.codec_context.codec.canonical_name
        if stream.container.format.name not in TRUSTED_FORMATS or codec not in TRUSTED_CODECS:
            return None
        brand = stream.container.metadata.get("major_brand")
        if has_stored_alpha(stream) or brand in ("avif", "avis"):
            return None  # alpha may need another decoder
        try:
            packets = read_packets(stream, part, limits)
            if packets is None:
                return None
            shown, seconds = packets.shown(stream.time_base)
            if not part.is_whole:
                end = duration_of(seconds, stream) if packets.is_complete else math.inf
                part.check(seconds[0], end)
            first, last = part.window(seconds)
            shown, seconds = shown[first:last], seconds[first:last]
            limits.check_time(len(seconds), seconds[-1] - seconds[0])
            indices = sample(seconds, num_frames)
            wanted = set(shown[indices].tolist())
            pictures = decode_packets(stream, packets, wanted, limits, prepare)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError):
            return None
    if pictures is None:
        return None
    return stack([pictures[pts] for pts in shown[indices].tolist()], seconds[indices], limits)


@dataclass(frozen=True)
class Packets:
    """Packets of a part in decoding order; times in the stream's ticks.

    Attributes:
        times: when the frame of each packet is shown; all differ.
        is_key: whether decoding can begin at the packet; true for the first one.
        origin: the beginning of the file, as a player counts.
        is_complete: whether the last packet is the video's last.
        cached: the packets themselves; empty if they exceed `CACHE_BYTES`.
    """

    times: list[int]
    is_key: list[bool]
    origin: float
    is_complete: bool
    cached: list["av.Packet"]

    def shown(self, time_base: "av.AVRational") -> tuple[np.ndarray, np.ndarray]:
        """Return times in the order of showing: ticks, and seconds since the file's beginning.

        Frames shown before the first key frame are left out: they refer to earlier packets.
        """
        ticks = np.sort(np.array([pts for pts in self.times if pts >= self.times[0]]))
        # In floating point, in the order of PyAV's `frame.time`: ticks * numerator as int64 could
        # overflow.
        origin = float(self.origin) * time_base.numerator / time_base.denominator
        return ticks, ticks * float(time_base.numerator) / time_base.denominator - origin

    def runs(self, wanted: set[int]) -> list[tuple[int, int]]:
        """Return the runs of packets to decode for the wanted frames.

        Args:
            wanted: times at which the frames are shown.

        Returns: index ranges, ends included. Each begins at a key frame, ends at a wanted frame,
            and has no packet in common with another.
        """
        runs: list[tuple[int, int]] = []
        key = previous = 0  # indices of the latest key frame and of the one before
        for index, pts in enumerate(self.times):
            if self.is_key[index]:
                previous, key = key, index
            if pts not in wanted:
                continue
            # A frame that is decoded after a key frame but shown before it may refer to frames
            # before the key frame ("open GOP"), so decoding has to begin one key frame earlier.
            first = key if pts >= self.times[key] else previous
            # Merge overlapping runs, or their packets would be decoded twice. A loop, because the
            # earlier key frame can be before several runs.
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, index))
        return runs


def read_packets(stream: "av.VideoStream", part: Part, limits: Limits) -> Packets | None:
    """Read a part's packets without decoding; return `None` if they do not determine its frames."""
    container = stream.container
    packets = container.demux(stream)
    head = next(packets)
    if head.pts is None:
        return None
    first, per_second = head.pts, stream.time_base.denominator / stream.time_base.numerator
    gap = gap_before(stream, first / per_second)
    origin = first - gap * per_second if gap else first
    start, end = part.bounds
    is_late = start > gap  # does not begin with the first frame
    # The same tolerance as in `Part.window`.
    begin = origin + (max(start, gap) + ROUNDING / 2) * per_second
    if is_late:
        container.seek(int(min(begin, 2**62)), stream=stream)  # FFmpeg takes 64 bits
        packets = container.demux(stream)
        head = next(packets)
        if head.pts is not None and head.pts > begin and head.dts is not None:
            # FFmpeg seeks by decoding time (dts): this key frame is decoded before `begin`, but
            # shown after it. Go to the key frame before.
            container.seek(head.dts - 1, stream=stream)
            packets = container.demux(stream)
            head = next(packets)
    times, is_key, is_complete, cached, room = [], [], False, [], CACHE_BYTES
    for packet in chain([head], packets):
        limits.check_clock()
        is_complete = packet.pts is None and packet.size == 0  # demuxing ends with such a packet
        # No packet is decoded after it is shown (dts <= pts), so all later ones are shown after
        # the end, too.
        if is_complete or (packet.dts is not None and packet.dts - origin > end * per_second):
            break
        if packet.pts is None or packet.size == 0 or packet.is_corrupt or packet.is_discard:
            return None  # not one shown frame
        times.append(packet.pts)
        is_key.append(packet.is_keyframe)
        room -= packet.size
        if room >= 0:
            cached.append(packet)
        else:
            cached.clear()  # all or none: `packets_of` indexes this list as it does `times`
        if part.is_whole:
            limits.check_time(len(times), (packet.pts - first) / per_second)
    if not times or not is_key[0] or len(set(times)) < len(times):
        return None
    if times[0] > begin:
        return None  # the seek went too far
    if not is_late and min(times) < times[0]:
        return None  # a recording that begins within a GOP: some frames cannot be decoded
    if not is_late and is_complete and stream.frames not in (0, len(times)):
        return None  # the header has another count
    return Packets(times, is_key, origin, is_complete, cached)


def decode_packets(
    stream: "av.VideoStream",
    packets: Packets,
    wanted: set[int],
    limits: Limits,
    prepare: Prepare | None,
) -> dict[int, np.ndarray] | None:
    """Decode the wanted frames and the frames that they need.

    Returns: pictures by time, each `(H, W, 3)` uint8; `None` if any frame was unexpected.
    """
    # Open the decoder before `decode_run` sets `skip_frame`: AV1's reads it only on opening, and
    # would skip wanted frames.
    stream.codec_context.open(strict=False)
    picture_of = Pictures(stream, limits.name, limits.max_pixels)
    pictures: dict[int, np.ndarray] = {}
    for run in packets.runs(wanted):
        latest = -math.inf
        for frame in decode_run(stream, packets, run, wanted):
            limits.check_clock()
            limits.check_size(frame.width, frame.height)
            if frame.is_corrupt or frame.pts is None or frame.pts <= latest:
                return None
            if frame.interlaced_frame:
                return None  # a packet may have been half a frame
            latest = frame.pts
            if latest in wanted:
                picture = picture_of(frame)
                pictures[latest] = picture if prepare is None else prepare(picture)
    return pictures if pictures.keys() == wanted else None


def decode_run(
    stream: "av.VideoStream",
    packets: Packets,
    run: tuple[int, int],
    wanted: set[int],
) -> Iterator["av.VideoFrame"]:
    """Yield the frames of the packets of `run`, without those that no wanted frame needs."""
    decoder = stream.codec_context
    decoder.flush_buffers()
    for packet in packets_of(stream, packets, run):
        # Only the decoder knows which frames no other frame refers to (NONREF); it skips them.
        decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from decoder.decode(packet)
    yield from decoder.decode(None)  # the frames that the decoder still buffers


def packets_of(
    stream: "av.VideoStream", packets: Packets, run: tuple[int, int]
) -> Iterator["av.Packet"]:
    """Yield the packets of `run`, from the cache or from the file again."""
    first, last = run
    if packets.cached:
        yield from packets.cached[first : last + 1]
        return
    stream.container.seek(packets.times[first], stream=stream)
    before = set(packets.times[:first])
    found = stream.container.demux(stream)
    for pts in packets.times[first : last + 1]:
        packet = next(found)
        while packet.pts in before:
            packet = next(found)  # the seek ended at an earlier key frame
        if packet.pts != pts:
            raise ValueError("the packets differ from those of the first reading")
        yield packet
