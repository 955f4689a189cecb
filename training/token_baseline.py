"""Train the token-prediction model that a recipe's VL-JEPA is compared with (paper section 4.5).

    python -m training.token_baseline RECIPE.yaml [training.seed=1 …]
    python -m training.token_baseline RECIPE.yaml training.token_loss_weight=0.5

X-Encoder, visual projection, data, batch, steps and schedule are the recipe's. A causal language
model, of which the Predictor has half of the layers, learns the next token of the target. With a
`token_loss_weight` below 1 the model is a hybrid, which learns the recipe's objective too.

`python -m eval.evaluate` measures it, by the likelihood of candidates and by generated captions.
"""

import argparse
import sys

from processing.feature_store import FeatureError
from processing.output import OutputError
from training.arguments import Recipe, RecipeError
from training.data.sources import read_source
from training.loop.callbacks import ProgressLine
from training.loop.fingerprint import compare
from training.loop.run import (
    begin,
    build_trainer,
    read_benchmarks,
    read_data,
    run_settings,
    save,
    start_report,
    train,
)
from training.loop.run_facts import RunFacts
from training.tokens.model import start_token_model
from training.tokens.recipe import read_recipe
from training.tokens.trainer import HybridCollator, TokenCollator, TokenTrainer


def loss_line(recipe: Recipe) -> str:
    """Return the line of the log that states the loss."""
    weight = recipe.training.token_loss_weight
    if not recipe.training.is_hybrid:
        return "loss of the targets' tokens; no Y-Encoder"
    objective = recipe.training.objective
    return f"{weight:g} of the loss of the targets' tokens, {1 - weight:g} of {objective}"


def main(argv: list[str] | None = None) -> TokenTrainer:
    parser = argparse.ArgumentParser(
        prog="training.token_baseline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/babyai_pretrain.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe: training.seed=1")
    arguments = parser.parse_args(argv)

    # 1. The recipe, checked against the number of processes that were started
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = recipe.training
    resume_from = begin(recipe)

    # 2. Benchmarks and rows; wrong ones are reported before a model is loaded
    benchmarks = read_benchmarks(
        recipe.evaluation, args, has_tokens=True, has_embeddings=args.is_hybrid
    )
    sources = [read_source(source) for source in recipe.data.sources]
    settings = run_settings(recipe, sources)
    changes = compare(resume_from, settings)

    # 3. Model and processor, from those of the recipe's VL-JEPA
    model, processor = start_token_model(recipe, sources)

    # 4. Clips or their features, and a hybrid's targets
    collator = HybridCollator if args.is_hybrid else TokenCollator
    dataset, collator = read_data(recipe, model, processor, sources, collator)

    # 5. Train
    trainer = build_trainer(
        recipe,
        model,
        processor,
        dataset=dataset,
        collator=collator,
        benchmarks=benchmarks,
        settings=settings,
        callbacks=[ProgressLine(), RunFacts(recipe.model.checkpoint)],
        trainer_class=TokenTrainer,
    )
    if trainer.is_world_process_zero():
        print(start_report(model, recipe, sources, loss_line(recipe)), flush=True)
    train(trainer, resume_from, changes)

    # 6. Save everything that a user loads
    save(trainer, recipe)
    return trainer


if __name__ == "__main__":
    try:
        main().accelerator.end_training()  # closes the connections between processes
    except (FeatureError, OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
