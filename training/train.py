"""Train a VL-JEPA as a recipe says.

    python -m training.train RECIPE.yaml [training.seed=1 …]
    accelerate launch -m training.train RECIPE.yaml
    torchrun --nproc_per_node 2 -m training.train RECIPE.yaml

The stages of the paper differ by their recipes only.
"""

import argparse
import math
import sys
from pathlib import Path

import yaml
from transformers import PrinterCallback, set_seed

from modeling_vljepa import VLJEPAModel

from .arguments import (
    Recipe,
    RecipeError,
    SourceArguments,
    VLJEPATrainingArguments,
    read_recipe,
)
from .callbacks import ProgressLine
from .collator import ContrastiveCollator
from .data import Source, build_dataset, read_source, texts_of
from .distributed import check_world_size
from .parameters import parameter_table
from .recipe_model import load_checkpoint, new_model
from .target_states import encode_target_states
from .trainer import VLJEPATrainer


def start_report(model: VLJEPAModel, args: VLJEPATrainingArguments, sources: list[Source]) -> str:
    """What a person checks before leaving a run alone."""
    lines = [parameter_table(model), ""]
    for source in sources:
        path, weight = source.arguments.rows, source.arguments.weight
        lines.append(f"{path}: {len(source.rows)} rows, weight {weight:g}")
        lines += [source.report] if source.bad else []
    lines.append(
        f"{args.world_size} process(es) on {args.device} · {args.max_steps} steps of "
        f"{args.global_batch_size} rows · {'bf16' if args.bf16 else 'fp32'} compute, fp32 weights"
    )
    lines.append(
        f"chance loss at most ln({args.global_batch_size}) = "
        f"{math.log(args.global_batch_size):.3f}; less where rows of a batch share a target "
        "(each line gives its own)"
    )
    return "\n".join(lines)


def save_recipes(recipe: Recipe) -> None:
    """Write `recipes.yaml`: this recipe, behind those of the stages before it."""
    before = Path(recipe.model.checkpoint or "", "recipes.yaml")
    stages = yaml.safe_load(before.read_text()) if before.is_file() else []
    path = Path(recipe.training.output_dir, "recipes.yaml")
    path.write_text(yaml.safe_dump([*stages, recipe.given], sort_keys=False))


def main(argv: list[str] | None = None) -> VLJEPATrainer:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/babyai_pretrain.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to it, such as training.seed=1")
    arguments = parser.parse_args(argv)

    # 1. The recipe, and as many processes as it and the command ask for
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = recipe.training
    check_world_size(args.world_size, args.world_size_expected)
    set_seed(args.seed)

    # 2. Rows
    sources = [read_source(source) for source in recipe.data.sources]

    # 3. Processor and model, new or from a checkpoint
    if recipe.model.checkpoint is None:
        more = [read_source(SourceArguments(rows=path)) for path in recipe.model.tokenizer_rows]
        texts = texts_of(sources + more)
        model, processor = new_model(recipe.model, recipe.processor, texts, args.seed)
    else:
        model, processor = load_checkpoint(recipe.model)
        processor.video_processor.num_frames = recipe.processor.num_frames

    # 4. Clips, decoded once, by the first process for all; targets, if they stay the same
    with args.main_process_first(desc="reading clips"):
        dataset = build_dataset(sources, processor.video_processor, recipe.data)
    states = None
    if recipe.data.cache_targets:
        targets = [row["target"] for row in dataset.rows]
        states = encode_target_states(model, processor, targets)

    # 5. Train
    trainer = VLJEPATrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=ContrastiveCollator(processor, states),
        processing_class=processor,
        callbacks=[ProgressLine()],
    )
    trainer.remove_callback(PrinterCallback)  # its dictionary says less than the progress line
    if trainer.is_world_process_zero():
        print(start_report(model, args, sources), flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 6. Save what a user loads: the log for the report, the recipes for the card, model and
    #    processor; these last, because with `push_to_hub` they take the others along
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_recipes(recipe)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
