"""Clips by decoding a whole file, from its first frame to its last.

Shapes: H height, W width.
"""

import math
from dataclasses import replace

import numpy as np
from transformers.utils import is_av_available

from .containers import Decoder, Pictures, duration_of, gap_before, open_video, reason_of
from .images import animation_frames, animation_in
from .media import Clip, Limits, MediaError, MediaSource, Prepare, stack
from .sampling import Part, sample, uniform_indices

if is_av_available():
    import av


def read_linearly(
    source: MediaSource,
    num_frames: int | None,
    part: Part,
    limits: Limits,
    prepare: Prepare | None = None,
) -> Clip:
    """Read a clip in one pass over the file, or in two.

    The first pass keeps the frames that the header's frame count suggests. They are the wrong
    ones if the header has no count (Matroska, WebM) or a wrong one, or if the frame rate varies;
    then a second pass keeps the right ones.
    """
    # `max_seconds` limits the part, not the whole video.
    bounds = limits if part.is_whole else replace(limits, max_seconds=None)
    is_animation = animation_in(source)
    decode_file = decode_animation if is_animation else decode
    keep = None
    if not part.is_whole:
        keep = set()  # the times of all frames decide which belong to the part
    elif num_frames is not None:
        count = 0 if is_animation else header_count(source, limits)
        keep = set(uniform_indices(max(count, 1), num_frames).tolist())
    pictures, seconds, duration = decode_file(source, keep, bounds, prepare)
    first, last = 0, len(seconds)
    if not part.is_whole:
        if not np.isfinite(seconds).all():
            raise MediaError(
                f"{limits.name}: its frames have no times. Re-encode it, or take the whole video."
            )
        part.check(seconds[0], duration)
        first, last = part.window(seconds)
        limits.check_time(last - first, seconds[last - 1] - seconds[first])
    indices = first + sample(seconds[first:last], num_frames)
    if not pictures.keys() >= set(indices.tolist()):
        pictures, seconds, _ = decode_file(source, set(indices.tolist()), bounds, prepare)
    return stack([pictures[index] for index in indices.tolist()], seconds[indices], limits)


def header_count(source: MediaSource, limits: Limits) -> int:
    """Return the number of frames that the header states, 0 if it states none."""
    with open_video(source, limits) as stream:
        return stream.frames


def decode_animation(
    source: MediaSource, keep: set[int] | None, limits: Limits, prepare: Prepare | None
) -> tuple[dict[int, np.ndarray], np.ndarray, float]:
    """Decode an animated image with PIL; arguments and return values are those of `decode`."""
    pictures: dict[int, np.ndarray] = {}
    times: list[float] = []
    end = 0.0
    for index, (start, stop, picture) in enumerate(animation_frames(source, limits)):
        times.append(start)
        end = stop
        limits.check_time(len(times), start)
        if keep is None or index in keep:
            pictures[index] = picture if prepare is None else prepare(picture)
    return pictures, np.array(times), end


def decode(
    source: MediaSource, keep: set[int] | None, limits: Limits, prepare: Prepare | None
) -> tuple[dict[int, np.ndarray], np.ndarray, float]:
    """Decode the whole file; keep the frames whose index is in `keep` (`None`: all).

    Returns: pictures by index, each `(H, W, 3)` uint8; the times of all frames in seconds since
    the beginning of the file, float64; and when the last one disappears.
    """
    pictures: dict[int, np.ndarray] = {}
    times: list[float] = []
    with open_video(source, limits) as stream:
        picture_of = Pictures(stream, limits.name, limits.max_pixels)
        decode_packet = Decoder(stream)
        # Raw H.264 streams have no times, and a few streams have no frame rate either.
        rate = float(stream.guessed_rate or math.nan)
        try:
            packets = stream.container.demux(stream)
            frames = (found for packet in packets for found in decode_packet(packet))
            for index, (time, frame) in enumerate(frames):
                limits.check_clock()
                limits.check_size(frame.width, frame.height)
                times.append(index / rate if time is None else time)
                limits.check_time(len(times), times[-1] - times[0])
                if keep is None or index in keep:
                    picture = picture_of(frame)
                    pictures[index] = picture if prepare is None else prepare(picture)
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{limits.name}: truncated or damaged after {len(times)} frames "
                f"({reason_of(error)}). Fetch or export it again."
            ) from error
        if not times:
            raise MediaError(
                f"{limits.name}: no frame could be decoded: truncated or empty. Fetch or export "
                "it again."
            )
        # Times of damaged files may not ascend.
        seconds = np.sort(np.array(times, dtype=np.float64))
        seconds -= seconds[0] - gap_before(stream, seconds[0])
        return pictures, seconds, duration_of(seconds, stream)
