"""Compute the frozen X-Encoder's features of a recipe's clips once, for any number of trainings.

    python -m training.cache_features RECIPE.yaml --output DIR [--dtype int8] [training.seed=1 …]
    torchrun --nproc_per_node 2 -m training.cache_features RECIPE.yaml --output DIR
    python -m training.cache_features RECIPE.yaml --output DIR \\
        --streams BENCHMARK --benchmarks eval/streams.yaml

With `--streams` it also stores every window of the streams of these benchmarks. The same command
continues after a killed run. docs/features.md explains when a store saves time.
"""

import argparse
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from eval.evaluate import at_least_one
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FACTS, FeatureError, FeatureStore, made_with, read_facts
from processing.output import OutputError, check_output_folder
from training.arguments import Recipe, RecipeError, precision_line, read_recipe
from training.data.dataset import ContrastiveDataset, build_dataset
from training.data.feature_writer import (
    Encoder,
    Shard,
    begin,
    check_recipe,
    clip_bytes,
    cut_into_shards,
    distinct_clips,
    make_plan,
    missing_shards,
    only_writer,
    write_index,
    write_shards,
)
from training.data.sources import Source, StreamedSource, read_source
from training.data.stream_writer import Settings, streams_of, write_stream
from training.loop.distributed import rank, world_size
from training.model.adapters import store_frozen_in_bf16
from training.model.recipe_model import start_model


def print_once(text: str) -> None:
    """Print a text in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def readable(size: int) -> str:
    """Return a number of bytes as 5.24GB."""
    return tqdm.format_sizeof(size, "B")


# -- reading as training does ------------------------------------------------------------------


def check_in_memory(sources: list[Source | StreamedSource]) -> None:
    """Check that all clips are known from the start.

    Raises:
        FeatureError: a source is streamed.
    """
    for source in sources:
        if isinstance(source, StreamedSource):
            raise FeatureError(
                f"data.sources: {source.arguments.name} is streamed, so its clips are unknown "
                "until they are read. Cache sources whose rows fit into memory."
            )


def read_as_training(recipe: Recipe) -> tuple[VLJEPAModel, VLJEPAProcessor, ContrastiveDataset]:
    """Return the model, the processor and the dataset with which training would start.

    Raises:
        FeatureError: the recipe's features cannot be cached.
    """
    args = recipe.training
    sources = [read_source(source) for source in recipe.data.sources]
    model, processor = start_model(recipe, sources)
    check_recipe(model, sources)
    check_in_memory(sources)
    if args.bf16:
        store_frozen_in_bf16(model)
    model.x_encoder.to(args.device)  # the other modules are not used
    # The first process decodes the clips into an Arrow file, which the others find.
    with args.main_process_first(desc="reading clips"):
        dataset = build_dataset(sources, processor.video_processor, recipe.data)
    for source in sources:
        if source.bad:
            print_once(f"{source.arguments.name}: {source.report}")
    return model, processor, dataset


# -- size and time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Result of the first batch of a kind of clip.

    Attributes:
        shape: shape `(N, Dx)` of a clip's tokens.
        seconds: time to read and encode one clip.
    """

    shape: tuple[int, int]
    seconds: float


def try_out(
    dataset: ContrastiveDataset, encoder: Encoder, clips: dict[str, list[int]], batch_size: int
) -> dict[str, Trial]:
    """Encode one batch of each kind of clip."""
    trials = {}
    for kind, indices in clips.items():
        encoder([dataset[indices[0]]])  # the first call allocates memory and selects kernels
        since = time.perf_counter()
        tokens = encoder([dataset[index] for index in indices[:batch_size]])  # (B, N, Dx)
        seconds = (time.perf_counter() - since) / len(tokens)
        trials[kind] = Trial(tuple(tokens.shape[1:]), seconds)
    return trials


def estimate(
    folder: Path,
    clips: dict[str, list[int]],
    missing: list[Shard],
    trials: dict[str, Trial],
    dtype: str,
) -> str:
    """Return a report of the missing clips, their size and the time that they take.

    Raises:
        FeatureError: they do not fit on the disk.
    """
    left = {index for shard in missing for index in shard.indices}
    lines, size, seconds = [], 0, 0.0
    for kind, indices in clips.items():
        trial, count = trials[kind], len(left.intersection(indices))
        each = clip_bytes(trial.shape, dtype)
        size, seconds = size + count * each, seconds + count * trial.seconds
        lines.append(
            f"{len(indices)} {kind}s of {trial.shape[0]} tokens of {trial.shape[1]}: "
            f"{readable(each)} and {trial.seconds:.3f} s each, {count} to do"
        )
    took = timedelta(seconds=round(seconds / world_size()))
    free = shutil.disk_usage(folder).free
    lines.append(
        f"{readable(size)} in {dtype}, with {readable(free)} free in {folder}; about {took} by "
        f"{world_size()} process(es)"
    )
    if size > free:
        raise FeatureError(
            f"{folder}: {readable(size)} are to be written and {readable(free)} are free. Free "
            "space, give a folder on another disk"
            + (", or halve the size with --dtype int8." if dtype == "bfloat16" else ".")
        )
    return "\n".join(lines)


# -- the store ---------------------------------------------------------------------------------


def report(folder: Path, facts: dict) -> str:
    """Return a summary of a complete store."""
    error = facts["relative_error"]
    return (
        f"{folder}: {facts['clips']} clips in {facts['shards']} shards, "
        f"{readable(facts['bytes'])} in {facts['dtype']}; relative error {error['mean']:.2e} "
        f"on average, {error['max']:.2e} at most"
    )


def write_missing(
    folder: Path,
    missing: list[Shard],
    dataset: ContrastiveDataset,
    encoder: Encoder,
    recipe: Recipe,
    options: argparse.Namespace,
) -> None:
    """Write this process's shards, with a progress bar in the first process."""
    own = missing[rank() :: world_size()]
    clips = sum(len(shard.indices) for shard in own)
    with tqdm(total=clips, unit="clip", disable=rank() > 0) as progress:
        for count in write_shards(
            folder,
            own,
            dataset,
            encoder,
            dtype=options.dtype,
            batch_size=options.batch_size,
            num_workers=recipe.training.dataloader_num_workers,
        ):
            progress.update(count)


def write(
    folder: Path,
    plan: dict,
    clips: dict[str, list[int]],
    dataset: ContrastiveDataset,
    encoder: Encoder,
    recipe: Recipe,
    options: argparse.Namespace,
) -> None:
    """Print the estimate and write the rest of the store, with a summary at the end."""
    wait_for_everyone = recipe.training.distributed_state.wait_for_everyone
    print_once(f"{world_size()} process(es) · {precision_line(recipe.training)}")
    # 1. Size and time
    trials = try_out(dataset, encoder, clips, options.batch_size)
    shapes = {kind: trial.shape for kind, trial in trials.items()}
    shards = cut_into_shards(clips, shapes, options.dtype)
    missing = missing_shards(folder, shards)
    print_once(estimate(folder, clips, missing, trials, options.dtype))

    # 2. The shards, each by one process
    # All processes list the missing shards before the first of them writes one.
    wait_for_everyone()
    write_missing(folder, missing, dataset, encoder, recipe, options)
    wait_for_everyone()

    # 3. The index, which completes the store
    if rank() == 0:
        facts = write_index(folder, plan, shards)
        # A killed run's shards may hold files that have changed since.
        FeatureStore(folder, facts).check(dataset.rows)
        print(report(folder, facts))


def write_streams(
    folder: Path,
    streams: list[tuple[str, Settings]],
    facts: dict,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    bf16: bool,
    options: argparse.Namespace,
) -> None:
    """Write this process's streams, and print the number of their windows."""
    for video, settings in streams[rank() :: world_size()]:
        count = write_stream(
            folder,
            video,
            settings,
            facts,
            model,
            processor,
            dtype=options.dtype,
            batch_size=options.batch_size,
            bf16=bf16,
        )
        print(f"{video}: {count} windows of {settings[0]} frames", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.cache_features", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="recipe of the training that will read the features")
    parser.add_argument("overrides", nargs="*", help="changed keys, such as training.seed=1")
    parser.add_argument("--output", required=True, type=Path, help="folder of the store")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="dtype of the stored features; int8 halves the size",
    )
    parser.add_argument("--batch-size", type=at_least_one, default=32, help="clips per batch")
    parser.add_argument(
        "--streams", nargs="+", default=[], metavar="BENCHMARK", help="benchmarks of streams"
    )
    parser.add_argument(
        "--benchmarks", type=Path, help="file of the benchmarks that --streams names"
    )
    options = parser.parse_intermixed_args(argv)
    if bool(options.streams) != (options.benchmarks is not None):
        parser.error("--streams and --benchmarks: give both or neither")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    folder = options.output

    # 1. Model, processor and rows, as training reads them
    recipe = read_recipe(options.recipe, options.overrides)
    check_output_folder("--output", folder)
    if recipe.data.decode_once:
        check_output_folder("data.cache_dir", recipe.data.cache_dir)
    args = recipe.training
    model, processor, dataset = read_as_training(recipe)
    video = processor.video_processor
    streams = []
    if options.streams:
        streams = streams_of(options.benchmarks, options.streams, video.num_frames)

    # 2. A new store, or one to continue; the first process locks it for all of this run
    clips = distinct_clips(dataset.rows)
    facts = made_with(model, video, video.num_frames)
    plan = make_plan(dataset.rows, clips, facts, options.dtype, options.batch_size, args.bf16)
    with only_writer(folder) if rank() == 0 else nullcontext():
        with args.main_process_first(local=False, desc="finding the folder"):
            begin(folder, plan)
        if (folder / FACTS).is_file():
            stored = read_facts(folder / FACTS)
            FeatureStore(folder, stored).check(dataset.rows)
            print_once(f"complete already. {report(folder, stored)}")
        else:
            write(folder, plan, clips, dataset, Encoder(model, video, args.bf16), recipe, options)

    # 3. The streams of benchmarks, each by one process
    write_streams(folder, streams, facts, model.eval(), processor, args.bf16, options)


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
