"""Compute the frozen X-Encoder's features of a recipe's clips once, for any number of trainings.

    python -m training.cache_features RECIPE.yaml --output DIR [--dtype int8] [training.seed=1 …]
    torchrun --nproc_per_node 2 -m training.cache_features RECIPE.yaml --output DIR

The same command goes on with what a killed run has left; docs/features.md says when this pays.
"""

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FACTS, FeatureError, made_with, read_facts
from training.arguments import Recipe, RecipeError, read_recipe
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
    write_index,
    write_shards,
)
from training.data.sources import Source, StreamedSource, read_source
from training.loop.distributed import rank, world_size
from training.model.adapters import store_frozen_in_bf16
from training.model.recipe_model import start_model


def readable(size: int) -> str:
    """Bytes as 5.24GB."""
    return tqdm.format_sizeof(size, "B")


@dataclass(frozen=True)
class Trial:
    """What the first batch of a kind of clip said: the shape `(N, Dx)` of a clip, and the seconds
    that one takes, reading included."""

    shape: tuple[int, int]
    seconds: float


def read_model(
    recipe: Recipe, sources: list[Source | StreamedSource]
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """The model and processor with which training would start, on its device."""
    model, processor = start_model(recipe, sources)
    if recipe.training.bf16:
        store_frozen_in_bf16(model)
    model.x_encoder.to(recipe.training.device)
    return model, processor


def check_held(sources: list[Source | StreamedSource]) -> None:
    """
    Raises:
        FeatureError: a source is streamed.
    """
    for source in sources:
        if isinstance(source, StreamedSource):
            raise FeatureError(
                f"data.sources: {source.arguments.name} is streamed, so its clips are not known "
                "before they are met. Cache sources whose rows fit into memory."
            )


def try_out(
    dataset: ContrastiveDataset, encoder: Encoder, clips: dict[str, list[int]], batch_size: int
) -> dict[str, Trial]:
    """Encode one batch of each kind of clip."""
    trials = {}
    for kind, indices in clips.items():
        encoder([dataset[indices[0]]])  # takes memory and chooses kernels
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
    """What is to be done, how large it will be and how long it takes.

    Raises:
        FeatureError: it does not fit on the disk.
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
            f"{folder}: {readable(size)} are to be written and {readable(free)} are free. Make "
            "room, give a folder on another disk"
            + (", or take half as much with --dtype int8." if dtype == "bfloat16" else ".")
        )
    return "\n".join(lines)


def report(folder: Path, facts: dict) -> str:
    error = facts["relative_error"]
    return (
        f"{folder}: {facts['clips']} clips in {facts['shards']} shards, "
        f"{readable(facts['bytes'])} in {facts['dtype']}; relative error {error['mean']:.2e} "
        f"on average, {error['max']:.2e} at most"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.cache_features", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="of the training that will read the features")
    parser.add_argument("overrides", nargs="*", help="changes to it, such as training.seed=1")
    parser.add_argument("--output", required=True, type=Path, help="folder of the store")
    parser.add_argument("--dtype", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=32, help="clips encoded at a time")
    arguments = parser.parse_intermixed_args(argv)
    folder, dtype, batch_size = arguments.output, arguments.dtype, arguments.batch_size

    # 1. Recipe, rows, model and clips, as training reads them
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = recipe.training
    is_first = rank() == 0
    sources = [read_source(source) for source in recipe.data.sources]
    model, processor = read_model(recipe, sources)
    check_recipe(model, sources)
    check_held(sources)
    video = processor.video_processor
    with args.main_process_first(desc="reading clips"):
        dataset = build_dataset(sources, video, recipe.data)
    for source in sources:
        if is_first and source.bad:
            print(f"{source.arguments.name}: {source.report}")

    # 2. A new store, or one to go on with
    clips = distinct_clips(dataset.rows)
    facts = made_with(model, video, video.num_frames)
    plan = make_plan(dataset.rows, clips, facts, dtype, batch_size, args.bf16)
    with args.main_process_first(local=False, desc="finding the folder"):
        begin(folder, plan)
    if (folder / FACTS).is_file():
        if is_first:
            print(f"complete already. {report(folder, read_facts(folder / FACTS))}")
        return

    # 3. How large, and how long
    encoder = Encoder(model, video, args.bf16)
    trials = try_out(dataset, encoder, clips, batch_size)
    shards = cut_into_shards(clips, {kind: trial.shape for kind, trial in trials.items()}, dtype)
    missing = missing_shards(folder, shards)
    text = estimate(folder, clips, missing, trials, dtype)
    if is_first:
        print(text, flush=True)

    # 4. The shards; each process has its own
    args.distributed_state.wait_for_everyone()  # all have seen the same shards missing
    mine = missing[rank() :: world_size()]
    with tqdm(
        total=sum(len(shard.indices) for shard in mine), unit="clip", disable=not is_first
    ) as progress:
        for count in write_shards(
            folder,
            mine,
            dataset,
            encoder,
            dtype=dtype,
            batch_size=batch_size,
            num_workers=args.dataloader_num_workers,
        ):
            progress.update(count)
    args.distributed_state.wait_for_everyone()

    # 5. What makes it a store
    if is_first:
        print(report(folder, write_index(folder, plan, shards)))


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, RecipeError) as error:
        sys.exit(f"error: {error}")
