"""Train a VL-JEPA from a recipe.

    python -m training.train RECIPE.yaml [training.seed=1 …]
    accelerate launch -m training.train RECIPE.yaml
    torchrun --nproc_per_node 2 -m training.train RECIPE.yaml

The paper's stages are different recipes for this one command.
"""

import argparse
import sys

from processing.feature_store import FeatureError
from processing.output import OutputError
from training.arguments import RecipeError, read_recipe
from training.data.sources import read_source
from training.loop.callbacks import CollapseWarning, ProgressLine
from training.loop.fingerprint import compare
from training.loop.run import (
    begin,
    build_trainer,
    chance_line,
    read_benchmarks,
    read_data,
    run_settings,
    save,
    start_report,
    train,
)
from training.loop.run_facts import RunFacts
from training.loop.trainer import VLJEPATrainer
from training.model.recipe_model import start_model


def main(argv: list[str] | None = None) -> VLJEPATrainer:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/babyai_pretrain.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe: training.seed=1")
    arguments = parser.parse_args(argv)

    # 1. The recipe, checked against the number of processes that were started
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    resume_from = begin(recipe)

    # 2. Benchmarks and rows; wrong ones are reported before a model is loaded, as are settings with
    #    which the checkpoint cannot continue
    benchmarks = read_benchmarks(recipe.evaluation, recipe.training)
    sources = [read_source(source) for source in recipe.data.sources]
    settings = run_settings(recipe, sources)
    changes = compare(resume_from, settings)

    # 3. Model and processor, new or from a checkpoint
    model, processor = start_model(recipe, sources)

    # 4. Clips or their features, and targets
    dataset, collator = read_data(recipe, model, processor, sources)

    # 5. Train
    trainer = build_trainer(
        recipe,
        model,
        processor,
        dataset=dataset,
        collator=collator,
        benchmarks=benchmarks,
        settings=settings,
        callbacks=[ProgressLine(), CollapseWarning(), RunFacts(recipe.model.checkpoint)],
    )
    if trainer.is_world_process_zero():
        print(start_report(model, recipe, sources, chance_line(recipe)), flush=True)
    train(trainer, resume_from, changes)

    # 6. Save everything that a user loads
    save(trainer, recipe)
    return trainer


if __name__ == "__main__":
    try:
        main().accelerator.end_training()  # closes the connections between processes
    except (FeatureError, OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
