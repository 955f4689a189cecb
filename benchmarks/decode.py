"""Compare the training loader with plain decoding: `python -m benchmarks.decode`.

"plain" is PyAV's loop over all frames on one thread, `for frame in container.decode(...)`; it
converts and stores nothing. "arrays" is the same loop with `to_ndarray(format="rgb24")`, which
makes the pixels. The loader decodes four, eight or sixteen frames, converts them, and resizes and
crops them to `(T, 3, 256, 256)`, uint8; they are normalised on the device. The clips are made here:
a moving scene with noise at 30 frames per second, with x264's default key frames (at most every 250
frames), with those of streaming sites (every 60), and short clips like BabyAI's, which are read at
their own size. `--steps` prints the time of each step of the loader.
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
from processing import VLJEPAVideoProcessor, read_clip
from processing.containers import open_video
from processing.media import Limits
from processing.packets import read_packets
from processing.sampling import Part
from training.data.dataset import read_frames

# name: frames, height, width, frames per second, x264's options
SMALL = "BabyAI, 2 s, 64 x 64"
CLIPS = {
    SMALL: (11, 64, 64, 5, {}),
    "2 s, 320 x 240": (60, 240, 320, 30, {}),
    "10 s, 340 x 256": (300, 256, 340, 30, {}),
    "10 s, 340 x 256, key frames every 2 s": (300, 256, 340, 30, {"g": "60"}),
    "10 s, 340 x 256, no B-frames": (300, 256, 340, 30, {"tune": "zerolatency"}),
    "10 s, 640 x 480": (300, 480, 640, 30, {}),
    "60 s, 340 x 256": (1800, 256, 340, 30, {}),
}
WANTED = (4, 8, 16)  # frames


def write(path: Path, frames: int, height: int, width: int, rate: int, options: dict) -> None:
    """Write a moving background, an object that moves across it, and noise like a camera's."""
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


def plain(path: Path, *, to_arrays: bool = False) -> None:
    """Decode all frames with PyAV's loop."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if to_arrays:
                frame.to_ndarray(format="rgb24")


def least(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the least CPU-seconds of each call; the calls alternate."""
    found = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, call in enumerate(calls):
            since = cpu_seconds()
            call()
            found[index] = min(found[index], cpu_seconds() - since)
    return found


class Files(Dataset):
    """The pixels of one clip, `count` times."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.processor = VLJEPAVideoProcessor()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_frames({"video": str(self.path)}, self.processor)


def clips_per_second(path: Path, workers: int, count: int) -> float:
    """Return clips per second of wall-clock time, without the start of the workers."""
    loader = DataLoader(Files(path, count + 4 * workers), batch_size=4, num_workers=workers)
    batches = iter(loader)
    next(batches)
    since = time.monotonic()
    clips = sum(len(batch) for batch in batches)
    return clips / (time.monotonic() - since)


def processor_of(name: str, num_frames: int) -> VLJEPAVideoProcessor:
    """Return the default processor, or one that reads a small clip at its own size."""
    if name != SMALL:
        return VLJEPAVideoProcessor(num_frames=num_frames)
    crop = {"height": 64, "width": 64}
    return VLJEPAVideoProcessor(size={"shortest_edge": 64}, crop_size=crop, num_frames=num_frames)


def steps(path: Path, processor: VLJEPAVideoProcessor, repeats: int) -> dict[str, float]:
    """Return the CPU-seconds of the loader's steps, and of opening the file in plain decoding.

    A step is the difference between two calls of which the second does one step more.
    """
    source, num_frames = str(path), processor.num_frames
    limits, whole = Limits(source), Part(source, None, None)
    frames = read_clip(source, num_frames).frames
    options = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False}

    def opened(*, for_packets: bool, read: bool) -> None:
        with open_video(source, limits, for_packets=for_packets) as stream:
            if read:
                read_packets(stream, whole, limits)

    calls = [
        partial(opened, for_packets=False, read=False),
        partial(opened, for_packets=True, read=False),
        partial(opened, for_packets=True, read=True),
        partial(read_clip, source, num_frames),
        partial(processor, [frames], **options),
        partial(read_frames, {"video": source}, processor),
    ]
    full, opening, packets, clip, transform, whole_loader = least(calls, repeats)
    return {
        "plain's opening": full,
        "opening": opening,
        "packets": packets - opening,
        "decoding, converting": clip - packets,
        "resizing, cropping": transform,
        "the rest": whole_loader - clip - transform,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="ten times more for short clips")
    parser.add_argument(
        "--clips", type=int, default=80, help="clips to read per number of workers; 0: skip"
    )
    parser.add_argument("--steps", action="store_true", help="also print the time of each step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(f"CPU-seconds x 1000 per clip, least of {args.repeats}, at {WANTED} frames;")
        print("ratios of clips per CPU-second: loader / plain, loader / arrays")
        print(f"{'':40}{'plain':>8}{'arrays':>8}{'loader':>24}{'/ plain':>21}{'/ arrays':>21}")
        for number, (name, clip) in enumerate(CLIPS.items()):
            path = Path(folder) / f"{number}.mp4"
            write(path, *clip)
            processors = [processor_of(name, num_frames) for num_frames in WANTED]
            loaders = [partial(read_frames, {"video": str(path)}, each) for each in processors]
            repeats = args.repeats * (10 if clip[0] < 100 else 1)
            baselines = [partial(plain, path), partial(plain, path, to_arrays=True)]
            alone, arrays, *found = least([*baselines, *loaders], repeats)
            times = "".join(f"{1e3 * seconds:>8.1f}" for seconds in (alone, arrays, *found))
            ratios = "".join(f"{base / each:>7.2f}" for base in (alone, arrays) for each in found)
            print(f"{name:<40}{times}{ratios}", flush=True)
            if args.steps:
                parts = steps(path, processors[1], repeats).items()
                text = ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in parts)
                print(f"    at {WANTED[1]} frames: {text}", flush=True)
        if args.clips:
            path = Path(folder) / "2.mp4"
            runs = [[clips_per_second(path, each, args.clips) for each in (1, 2)] for _ in "123"]
            one, two = (max(column) for column in zip(*runs, strict=True))
            print(f"workers, wall-clock time: 1: {one:.1f} clips/s, 2: {two:.1f}, {two / one:.2f}")


if __name__ == "__main__":
    main()
