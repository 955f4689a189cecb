"""Compare torchcodec with `read_clip`: `python -m benchmarks.torchcodec_frames`.

It needs `pip install torchcodec`, in the version for the installed torch, and FFmpeg's shared
libraries (Debian: `apt-get install ffmpeg`). For every kind of file, torchcodec decodes the eight
frames that `read_clip` samples, by their indices. Then both read the clips of `benchmarks.decode`.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from torchcodec.decoders import VideoDecoder

from benchmarks.decode import CLIPS, least, plain, write
from processing import even_indices, read_clip

# container, codec, height, width, the codec's options
KINDS = {
    "H.264": ("mp4", "libx264", 48, 64, {}),
    "H.264, no B-frames": ("mp4", "libx264", 48, 64, {"tune": "zerolatency"}),
    "H.264, interlaced": ("mp4", "libx264", 48, 64, {"flags": "+ildct+ilme"}),
    "H.264, 66 x 48": ("mkv", "libx264", 48, 66, {}),
    "HEVC": ("mp4", "libx265", 48, 64, {"x265-params": "log-level=none:pools=none"}),
    "MPEG-4": ("mp4", "mpeg4", 48, 64, {"bf": "2"}),
    "MPEG-4, 63 x 45": ("mov", "mpeg4", 45, 63, {}),
    "MPEG-4 in AVI": ("avi", "mpeg4", 48, 64, {"bf": "2"}),
    "H.264 in MPEG-TS": ("ts", "libx264", 48, 64, {}),
    "H.264, bare": ("h264", "libx264", 48, 64, {}),
    "VP9": ("webm", "libvpx-vp9", 48, 64, {"deadline": "realtime", "cpu-used": "8"}),
    "VP8": ("webm", "libvpx", 48, 64, {}),
    "MJPEG": ("mp4", "mjpeg", 48, 64, {}),
}


def encode(path: Path, codec: str, height: int, width: int, options: dict) -> None:
    """Write twenty frames of blocks in random colors."""
    generator = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options
        for _ in range(20):
            blocks = generator.integers(0, 256, (6, 9, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            frame = np.ascontiguousarray(blocks[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def frames_at(path: Path, indices: list[int]) -> np.ndarray:
    """Decode frames `(T, H, W, 3)`, uint8, with torchcodec and one thread."""
    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(indices).data.numpy()


def compared(path: Path) -> str:
    """Return a line on the difference between the frames of torchcodec and of `read_clip`."""
    whole, sampled = read_clip(path), read_clip(path, 8)
    indices = even_indices(whole.timestamps, 8).tolist()
    try:
        found = frames_at(path, indices)
    except (RuntimeError, IndexError) as error:
        return f"torchcodec refuses: {str(error).splitlines()[0][:60]}"
    differ = (found != sampled.frames).mean()
    return "equal" if differ == 0 else f"{100 * differ:.0f} % of the values differ"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torchcodec_frames", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (ending, *options)) in enumerate(KINDS.items()):
            path = Path(folder) / f"{number}.{ending}"
            encode(path, *options)
            print(f"{name:<24}{compared(path)}", flush=True)
        print("CPU-seconds x 1000 of eight frames: plain decoding of all, read_clip, torchcodec")
        for number, (name, clip) in enumerate(CLIPS.items()):
            if clip[0] > 300:  # frames: the longest clip takes minutes
                continue
            path = Path(folder) / f"clip{number}.mp4"
            write(path, *clip)
            indices = even_indices(read_clip(path).timestamps, 8).tolist()
            calls = [
                partial(plain, path),
                partial(read_clip, path, 8),
                partial(frames_at, path, indices),
            ]
            repeats = args.repeats * (10 if clip[0] < 100 else 1)
            times = "".join(f"{1e3 * each:>8.1f}" for each in least(calls, repeats))
            print(f"{name:<40}{times}", flush=True)


if __name__ == "__main__":
    main()
