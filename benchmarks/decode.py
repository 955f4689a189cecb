"""From files to the tensors of a model against decoding alone: `python -m benchmarks.decode`.

Plain decoding is PyAV's loop over all frames on one thread, `for frame in container.decode(...)`,
which converts and keeps nothing. Against it stands all that the training's loader does: eight
frames are decoded and converted, resized and cropped to `(8, 3, 256, 256)`, uint8; they are
normalised on the device. Clips are made here: a moving scene with noise, at 30 frames per second,
as x264 stores it by default (a key frame at most every 250 frames) and as streaming sites do (every
60), and short ones like BabyAI's, which are read at their own size.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import cpu_seconds
from processing import VLJEPAVideoProcessor
from training.data import read_frames

# name: frames, height, width, frames per second, x264's options
SMALL = "BabyAI, 2 s, 64 x 64"
CLIPS = {
    "10 s, 320 x 240": (300, 240, 320, 30, {}),
    "10 s, 320 x 240, key frames every 2 s": (300, 240, 320, 30, {"g": "60"}),
    "10 s, 320 x 240, no B-frames": (300, 240, 320, 30, {"tune": "zerolatency"}),
    "10 s, 640 x 480": (300, 480, 640, 30, {}),
    "10 s, 640 x 480, key frames every 2 s": (300, 480, 640, 30, {"g": "60"}),
    "60 s, 320 x 240": (1800, 240, 320, 30, {}),
    SMALL: (11, 64, 64, 5, {}),
}


def write(path: Path, frames: int, height: int, width: int, rate: int, options: dict) -> None:
    """A background that passes by, an object that wanders over it, and the noise of a camera."""
    generator = np.random.default_rng(0)

    def texture(rows: int, columns: int) -> np.ndarray:
        coarse = generator.integers(0, 256, (rows // 8, columns // 8, 3), np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC))

    side = height // 3
    background, wanderer = texture(height + 64, 3 * width), texture(side, side)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = options
        stream.codec_context.thread_count = 1
        for t in range(frames):
            left, top = 2 * t % (2 * width), int(30 + 30 * np.sin(t / 15))
            picture = background[top : top + height, left : left + width].astype(np.int16)
            x = int((width - side) * (0.5 + 0.5 * np.sin(t / 20)))
            y = int((height - side) * (0.5 + 0.5 * np.cos(t / 33)))
            picture[y : y + side, x : x + side] = wanderer
            picture += generator.integers(-6, 7, picture.shape, np.int16)
            pixels = picture.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def plain(path: Path) -> None:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass


def least(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """CPU-seconds of each, the least of several turns."""
    found = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, call in enumerate(calls):
            since = cpu_seconds()
            call()
            found[index] = min(found[index], cpu_seconds() - since)
    return found


class Files(Dataset):
    """`count` times the same clip, as pixels."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.processor = VLJEPAVideoProcessor()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_frames(str(self.path), True, self.processor)


def clips_per_second(path: Path, workers: int, count: int) -> float:
    """By the clock, from the first batch on: the start of the workers does not count."""
    loader = DataLoader(Files(path, count + 4 * workers), batch_size=4, num_workers=workers)
    batches = iter(loader)
    next(batches)
    since = time.monotonic()
    clips = sum(len(batch) for batch in batches)
    return clips / (time.monotonic() - since)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clips", type=int, default=80, help="for each number of workers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual = VLJEPAVideoProcessor()
    small = VLJEPAVideoProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, num_frames=8
    )
    with tempfile.TemporaryDirectory() as folder:
        print(f"CPU-seconds x 1000 of a clip, {usual.num_frames} frames, least of {args.repeats}")
        print(f"{'':<40}{'plain':>8}{'loader':>8}{'ratio':>7}   (of clips per CPU-second)")
        for number, (name, clip) in enumerate(CLIPS.items()):
            path = Path(folder) / f"{number}.mp4"
            write(path, *clip)
            processor = small if name == SMALL else usual
            calls = [partial(plain, path), partial(read_frames, str(path), True, processor)]
            alone, loader = least(calls, args.repeats)
            print(f"{name:<40}{1e3 * alone:>8.1f}{1e3 * loader:>8.1f}{alone / loader:>7.2f}")
        path = Path(folder) / "1.mp4"
        turns = [[clips_per_second(path, workers, args.clips) for workers in (1, 2)] for _ in "123"]
        one, two = (max(column) for column in zip(*turns, strict=True))
        print(f"workers, by the clock: 1: {one:.1f} clips/s, 2: {two:.1f}, ratio {two / one:.2f}")


if __name__ == "__main__":
    main()
