"""Write test videos of any codec and container, and decode them in the plain way."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return moving blocks with noise, `(T, H, W, 3)` uint8: every frame differs."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 200, (height // 8 + 8, width // 8 + 8, 3), np.uint8)
    large = blocks.repeat(8, axis=0).repeat(8, axis=1)
    noise = generator.integers(0, 50, (num_frames, height, width, 3), np.uint8)
    shifts = [(index % 32, 2 * index % 48) for index in range(num_frames)]
    return noise + np.stack([large[y : y + height, x : x + width] for y, x in shifts])


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    *,
    rate: int = 10,
    pix_fmt: str = "yuv420p",
    times: list[float] | None = None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write `(T, H, W, 3)` uint8 at `rate` frames per second, or at `times` in seconds."""
    with av.open(path, "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.options = options
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_tracks(path: Path, *tracks: dict, **options: str) -> Path:
    """Write tracks, each with `frames` (T, H, W, C), and optionally a codec, a pixel format, a
    disposition, the time of the first frame and attributes of the codec or the stream."""
    with av.open(path, "w", options=options) as output:
        streams = []
        for track in tracks:
            stream = output.add_stream(track.get("codec", "libx264"), rate=10)
            stream.height, stream.width = track["frames"].shape[1:3]
            stream.pix_fmt = track.get("pix_fmt", "yuv420p")
            stream.options = track.get("options", {})
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, 1000)
            for name, value in track.get("context", {}).items():
                setattr(stream.codec_context, name, value)
            if "disposition" in track:
                stream.disposition = track["disposition"]
            if "rotation" in track:
                stream.set_display_rotation(**track["rotation"])
            streams.append(stream)
        for stream, track in zip(streams, tracks, strict=True):
            kind = "rgba" if track["frames"].shape[3] == 4 else "rgb24"
            for index, pixels in enumerate(track["frames"]):
                frame = av.VideoFrame.from_ndarray(pixels, format=kind)
                frame.pts = round(1000 * (track.get("late", 0) + index / 10))
                frame.time_base = Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    return path


def plainly(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all frames `(T, H, W, 3)` and their times, decoded as in PyAV's documentation."""
    with av.open(path) as container:
        decoded = list(container.decode(video=0))
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        return frames, np.array([frame.time - decoded[0].time for frame in decoded])
