"""Growth of time and peak memory with the size of the input: `python -m benchmarks.growth`.

Each size runs in its own process. The peak is of resident memory beyond the model and the inputs.

| case       | what grows                                                                     |
|------------|--------------------------------------------------------------------------------|
| batch      | rows of a training step of the mid-size model, 2 frames                        |
| frames     | frames of two clips of such a step                                             |
| query      | query tokens of such a step, without padding                                   |
| candidates | texts that the mid-size model embeds                                           |
| stream     | frames of a stream that a session watches: time per frame and memory are equal |
| library    | clips of a library: built, and ten texts searched in it                        |

A search is compared with one product of a matrix in memory, and `topk`. `--full` adds a library of
1,000,000 clips of 1,536 dimensions, which needs 13 GB of disk and 16 GiB of memory.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.configs import mid_config, small_config
from benchmarks.measure import Cost, cost, in_own_process, return_freed_memory
from benchmarks.report import Goal, Report, add_arguments, chosen
from benchmarks.synthetic import Texts
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.clip_library import ClipLibrary
from modeling_vljepa.pipelines.embedding import embed_texts
from modeling_vljepa.pipelines.library_writer import EmbeddingLog, only_writer
from modeling_vljepa.pipelines.stream_session import StreamSession
from processing import VLJEPAProcessor
from training.arguments import ProcessorArguments
from training.memory import training_step
from training.model.recipe_model import new_processor, train_tokenizer

TARGET = 16  # tokens
DIM = 1536
GIB = 2**30


def new_model(quick: bool) -> VLJEPAModel:
    torch.manual_seed(0)
    return VLJEPAModel(small_config() if quick else mid_config())


def processor_of(model: VLJEPAModel, frames: int) -> VLJEPAProcessor:
    texts = Texts()
    tokenizer = train_tokenizer([texts.narration() for _ in range(200)], 1000)
    side = model.config.vision_config.crop_size
    return new_processor(tokenizer, ProcessorArguments(image_size=side, num_frames=frames), None)


# -- a training step -------------------------------------------------------------------------


def step_of(rows: int, frames: int, query: int, quick: bool) -> Cost:
    """Return the cost of a training step in fp32, without an optimizer."""
    model = new_model(quick).train()
    side = model.config.vision_config.crop_size

    def batch(count: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_values_videos": torch.randn(count, frames, 3, side, side),
            "input_ids": torch.randint(3, 300, (count, query)),
            "target_input_ids": torch.randint(3, 300, (count, TARGET)),
        }

    training_step(model, batch(1), bf16=False)  # allocates gradients and workspaces
    model.zero_grad(set_to_none=False)
    inputs = batch(rows)
    timed = cost(lambda: training_step(model, inputs, bf16=False))
    return_freed_memory()
    peak = cost(lambda: training_step(model, inputs, bf16=False)).peak_bytes
    return Cost(timed.cpu_seconds, peak, None)


STEPS = {  # rows, frames, query tokens
    "batch": [(rows, 2, 16) for rows in (1, 2, 4)],
    "frames": [(2, frames, 16) for frames in (2, 4, 8)],
    "query": [(2, 2, query) for query in (16, 64, 256)],
}


@cache  # each of the three grows from the same size
def measured_step(rows: int, frames: int, query: int, quick: bool, threads: int) -> Cost:
    sizes = (rows, frames, query, quick)
    return step_of(*sizes) if quick else in_own_process(step_of, *sizes, threads=threads)


def steps(name: str, args: argparse.Namespace, report: Report) -> None:
    column = ("batch", "frames", "query").index(name)
    for sizes in STEPS[name][: 2 if args.quick else None]:
        found = measured_step(*sizes, args.quick, args.threads)
        numbers = {"CPU-s": found.cpu_seconds, "peak GiB": found.peak_bytes / GIB}
        report.add(
            f"{name} {sizes[column]}", numbers | {"CPU-s per row": numbers["CPU-s"] / sizes[0]}
        )


# -- texts and streams -----------------------------------------------------------------------


def texts_of(count: int, quick: bool) -> Cost:
    """Return the cost of embedding distinct texts."""
    model = new_model(quick).eval()
    processor = processor_of(model, 2)
    texts = [f"{Texts(seed).narration()} {seed}" for seed in range(count)]
    return_freed_memory()
    with torch.inference_mode():
        return cost(lambda: len(embed_texts(model, processor, texts)))


def candidates(name: str, args: argparse.Namespace, report: Report) -> None:
    for count in (10, 50) if args.quick else (10, 100, 1000):
        found = run(texts_of, count, args.quick, args=args)
        numbers = {"CPU-s": found.cpu_seconds, "peak GiB": found.peak_bytes / GIB}
        report.add(
            f"candidates {count}", numbers | {"CPU-ms per text": 1000 * numbers["CPU-s"] / count}
        )


def moving(frames: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield frames of a scene that changes every 40 frames, with their times."""
    for index in range(frames):
        generator = np.random.default_rng(index // 40)
        picture = generator.integers(0, 256, (64, 64, 3), np.uint8)
        yield index / 8, np.roll(picture, index, axis=1)


def stream_of(frames: int) -> Cost:
    """Return the cost of watching a stream with the small model."""
    model = new_model(quick=True).eval()
    session = StreamSession(model, processor_of(model, 8))

    def watch() -> int:
        with session.encoder.processor.watch(moving(frames)) as windows:
            return sum(1 for _ in session.run(windows))

    return_freed_memory()
    with torch.inference_mode():
        return cost(watch)


def stream(name: str, args: argparse.Namespace, report: Report) -> None:
    for frames in (64, 128) if args.quick else (128, 512, 2048):
        found = run(stream_of, frames, args=args)
        numbers = {"CPU-s": found.cpu_seconds, "peak GiB": found.peak_bytes / GIB}
        per_frame = 1000 * found.cpu_seconds / frames
        report.add(f"stream {frames} frames", numbers | {"CPU-ms per frame": per_frame})


# -- libraries -------------------------------------------------------------------------------


def batches(count: int, size: int = 256) -> Iterator[torch.Tensor]:
    """Yield unit vectors, batch by batch."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, size):
        shape = min(size, count - start), DIM
        yield F.normalize(torch.randn(shape, generator=generator), dim=1)


def build_library(folder: str, count: int) -> Cost:
    """Return the cost of writing a library as `build_library` does, without the model."""
    probe = F.normalize(torch.ones(2, DIM), dim=1)

    def write() -> None:
        done = 0
        with only_writer(folder) as incomplete:
            log = EmbeddingLog(incomplete, "", probe)
            for embeds in batches(count):
                log.add([f"{done + index}.mp4" for index in range(len(embeds))], list(embeds))
                done += len(embeds)
            ClipLibrary(log.dataset(), "", probe, []).write(incomplete, Path(folder))

    return_freed_memory()
    made = cost(lambda: [None for _ in batches(count)]).cpu_seconds
    written = cost(write)
    return Cost(written.cpu_seconds - made, written.peak_bytes, None)


def search_library(folder: str, count: int) -> Cost:
    """Return CPU-seconds of ten searches, and as its value those of a product and `topk`."""
    library = ClipLibrary.load(folder)
    texts = next(batches(10))
    matrix = torch.cat(list(batches(count)))
    best = {"product": float("inf"), "search": float("inf")}
    for _ in range(5):
        since = time.process_time()
        scores = (texts @ matrix.T).topk(10).values
        best["product"] = min(best["product"], time.process_time() - since)
        since = time.process_time()
        found = library.nearest(texts, 10)
        best["search"] = min(best["search"], time.process_time() - since)
    for row, expected in zip(found, scores.tolist(), strict=True):
        if abs(row[0]["score"] - expected[0]) > 1e-4:
            raise RuntimeError("the library's best score is not that of the product")
    return Cost(best["search"], 0, best["product"])


def library(name: str, args: argparse.Namespace, report: Report) -> None:
    sizes = (500, 1000) if args.quick else (10_000, 50_000)
    for count in (*sizes, *[1_000_000] * args.full):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "library"))
            built = run(build_library, path, count, args=args)
            found = run(search_library, path, count, args=args)
        numbers = {
            "build, CPU-s": built.cpu_seconds,
            "build, peak GiB": built.peak_bytes / GIB,
            "data GiB": 4 * DIM * count / GIB,
            "product and topk, CPU-ms": 1000 * found.value,
            "search, CPU-ms": 1000 * found.cpu_seconds,
            "search / product": found.cpu_seconds / found.value,
        }
        # A fixed cost of a few milliseconds counts in a small library, so that has no goals.
        goals = [Goal("search / product", most=1.3), Goal("build, peak GiB", most=8)]
        for goal in goals if count == 1_000_000 else [None]:
            report.add(f"library of {count:,}", numbers, goal)


# -- command ---------------------------------------------------------------------------------


def run(function, *arguments, args: argparse.Namespace) -> Cost:
    """Measure in a process of its own, or in this one for `--quick`."""
    if args.quick:
        return function(*arguments)
    return in_own_process(function, *arguments, threads=args.threads)


CASES = {
    **dict.fromkeys(STEPS, steps),
    "candidates": candidates,
    "stream": stream,
    "library": library,
}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and return the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--full", action="store_true", help="also the library of a million clips")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report("growth", args.output, args.quick)
    for name, case in chosen(CASES, args.only, parser).items():
        report.start(name)
        case(name, args, report)
    return report.close()


if __name__ == "__main__":
    main()
