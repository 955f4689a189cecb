"""Train a Y-Decoder for a trained VL-JEPA and add it to the checkpoint.

    python -m training.train_decoder RECIPE.yaml [training.seed=1 …]

The decoder learns from texts alone: the frozen Y-Encoder embeds a text, and the decoder reproduces
the text from the embedding. Later it decodes predicted embeddings, which differ from those of
texts. So it trains on embeddings with noise of about this size (`data.noise`), or on the predicted
embeddings of clips (`data.embeddings`). The rest of the model does not change.
"""

import argparse
import shutil
import sys
from pathlib import Path

from torch.utils.data import ConcatDataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from eval.models import TokenModelError
from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError, precision_line, save_recipes
from training.decoder.model import with_decoder
from training.decoder.recipe import DecoderRecipe, read_recipe
from training.decoder.texts import DecoderCollator, predicted_texts, read_source, training_texts
from training.hub.publishing import publish
from training.loop.callbacks import ProgressLine
from training.loop.checkpoints import PARTS, AtomicCheckpoints, checkpoint_to_resume
from training.loop.fingerprint import compare, fingerprint, rows_content
from training.loop.run_facts import RunFacts
from training.model.parameters import parameter_table

LOG = "decoder_trainer_state.json"  # `trainer_state.json` is the log of the model itself


class ValidationLine(TrainerCallback):
    """Log line with the loss on validation clips."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs,
    ) -> None:
        if state.is_world_process_zero:
            loss = metrics["eval_loss"]
            print(f"  loss on predicted embeddings of validation clips {loss:.3f}", flush=True)


def save(trainer: Trainer, recipe: DecoderRecipe) -> None:
    """Save model, processor and log, with the log and recipes of `model.checkpoint`."""
    source, output = Path(recipe.model.checkpoint), Path(recipe.training.output_dir)
    trainer.save_model(_internal_call=True)  # otherwise upstream pushes a folder without processor
    if not trainer.is_world_process_zero():
        return
    trainer.state.save_to_json(output / LOG)
    if (source / "trainer_state.json").is_file():
        shutil.copy(source / "trainer_state.json", output)
    save_recipes(recipe.model.checkpoint, recipe.training.output_dir, recipe.given)


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(
        prog="training.train_decoder", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/babyai_decoder.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe: training.seed=1")
    arguments = parser.parse_args(argv)

    # 1. The recipe; its checkpoint must not be overwritten
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = recipe.training
    check_output_folder("training.output_dir", args.output_dir)
    if Path(args.output_dir).resolve() == Path(recipe.model.checkpoint).resolve():
        raise RecipeError(
            "training.output_dir: it is the folder of model.checkpoint; give a new one."
        )
    set_seed(args.seed)
    # Its rows are shuffled by the seed alone, so a checkpoint has no positions in them.
    parts = [part for part in PARTS if part != "place in the data"]
    resume_from = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, parts)
    rows = [read_source(source, recipe.data.max_bad_share) for source in recipe.data.sources]
    settings = fingerprint(recipe, [rows_content(each) for each in rows])
    settings["training.per_device_train_batch_size"] *= args.world_size  # rows of a step
    changes = compare(resume_from, settings)

    # 2. The frozen model and its trainable decoder
    model, processor = with_decoder(recipe.model, args.seed)
    model.to(args.device)

    # 3. Embeddings, computed once
    texts = training_texts(model, processor, recipe.data, rows)
    clips = [read_source(source, 0.0) for source in recipe.data.validation]
    held_out = ConcatDataset(predicted_texts(model, processor, clips)) if clips else None
    if held_out is None and args.eval_strategy != "no":
        raise RecipeError("data.validation: training.eval_strategy needs sources; name some.")

    # 4. Train
    trainer = AtomicCheckpoints(
        model=model,
        args=args,
        train_dataset=texts,
        eval_dataset=held_out,
        data_collator=DecoderCollator(processor),
        processing_class=processor,  # every checkpoint is a complete folder
        callbacks=[ProgressLine(), ValidationLine(), RunFacts(recipe.model.checkpoint)],
        settings=settings,
    )
    trainer.remove_callback(PrinterCallback)  # it would print the same values as a dictionary
    if trainer.is_world_process_zero():
        print(parameter_table(model))
        print(f"{len(texts)} embeddings of texts, {len(held_out or [])} of validation clips")
        print(f"{args.world_size} process(es) on {args.device} · {precision_line(args)}")
        if changes:
            print(f"other settings than before: {changes}", flush=True)
    trainer.train(resume_from_checkpoint=resume_from)
    if held_out is not None:
        trainer.evaluate()

    # 5. Save everything that a user loads
    with writing(f"training.output_dir: {args.output_dir}", "Its checkpoint is kept."):
        save(trainer, recipe)
    if args.push_to_hub and trainer.is_world_process_zero():
        private, token = args.hub_private_repo, args.hub_token
        publish(args.output_dir, trainer.hub_model_id, private=private, token=token)
    return trainer


if __name__ == "__main__":
    try:
        main().accelerator.end_training()  # closes the connections between processes
    except (OutputError, RecipeError, TokenModelError) as error:
        sys.exit(f"error: {error}")
