"""The steps of a training that its commands share."""

import json
import math
from pathlib import Path

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from eval.benchmarks import load_benchmarks, measurable
from eval.task import Benchmark
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.output import check_output_folder, writing
from training.arguments import (
    EvaluationArguments,
    Recipe,
    RecipeError,
    SourceArguments,
    VLJEPATrainingArguments,
    precision_line,
    save_recipes,
)
from training.data.collator import ContrastiveCollator
from training.data.dataset import ContrastiveDataset, build_dataset
from training.data.feature_writer import check_recipe
from training.data.sources import Source, StreamedSource, read_source
from training.data.target_states import read_target_states
from training.loop.checkpoints import checkpoint_to_resume
from training.loop.distributed import check_world_size
from training.loop.fingerprint import Fingerprint, content_of, fingerprint
from training.loop.objective import trains_batch_norms
from training.loop.speed import reachable_flops
from training.loop.trainer import VLJEPATrainer, default_lanes
from training.model.adapters import prepare_for_training, store_frozen_in_bf16
from training.model.parameters import parameter_table


def begin(recipe: Recipe) -> str | None:
    """Check the number of processes and the folders, and set the seed.

    Returns: the checkpoint to resume from; `None` to start from the beginning.

    Raises:
        OutputError: a folder of the recipe cannot be written to.
        RecipeError: another number of processes was started than the recipe expects, or the
            checkpoint is missing or incomplete.
    """
    args = recipe.training
    check_world_size(args.world_size, args.world_size_expected)
    check_output_folder("training.output_dir", args.output_dir)
    if recipe.data.cache_targets or (recipe.data.decode_once and recipe.data.features is None):
        check_output_folder("data.cache_dir", recipe.data.cache_dir)
    set_seed(args.seed)
    return checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)


def read_benchmarks(
    arguments: EvaluationArguments, args: VLJEPATrainingArguments, **abilities: bool
) -> list[Benchmark]:
    """Return the benchmarks of the recipe, with their rows.

    Args:
        abilities: kinds of the model's outputs; see `measurable`. Default: embeddings.

    Raises:
        RecipeError: a benchmark is unknown, needs a Y-Decoder or cannot be read, or the recipe
            evaluates but names none.
    """
    if not arguments.tasks:
        if args.eval_strategy != "no":
            raise RecipeError(
                "evaluation.tasks: training.eval_strategy needs benchmarks; name some."
            )
        return []
    try:
        benchmarks = load_benchmarks(Path(arguments.benchmarks), arguments.tasks)
        benchmarks = measurable(benchmarks, arguments.tasks, has_decoder=False, **abilities)
        for benchmark in benchmarks:
            benchmark.load()
        return benchmarks
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"evaluation: {error}") from error


def small_source(source: Source | StreamedSource, batch_size: int) -> list[str]:
    """Return a line for each kind of clip of which the source has fewer rows than a batch."""
    if isinstance(source, StreamedSource):
        return []
    counts = {kind: sum(kind in row for row in source.rows) for kind in ("image", "video")}
    return [
        f"note: {count} {kind} rows are fewer than a batch of {batch_size} (training."
        "global_batch_size), so rows repeat within each batch"
        for kind, count in counts.items()
        if 0 < count < batch_size
    ]


def fixed_query(source: Source | StreamedSource) -> str | None:
    """Return the query of all rows of a source, or of the first ones if it is streamed; `None` if
    they ask different queries."""
    rows = source.fallback_rows if isinstance(source, StreamedSource) else source.rows
    first = rows[0]["query"]
    return first if all(row["query"] == first for row in rows) else None


def untrained_prompts(prompts: dict[str, str], sources: list[Source | StreamedSource]) -> list[str]:
    """Return a warning if sources train with fixed queries, but with none of the model's prompts.

    Args:
        prompts: `config.prompts`.
    """
    queries = dict.fromkeys(fixed_query(source) for source in sources)
    queries = [json.dumps(query) for query in queries if query is not None]
    names = [name for name in prompts if name != "question"]  # a template
    if not queries or any(json.dumps(prompts[name]) in queries for name in names):
        return []
    return [
        f"WARNING: no source trains with a prompt of the model ({', '.join(names)}), but with "
        f"{', '.join(queries[:5])}. Pipelines, libraries and benchmarks would ask queries that the "
        f"model was not trained with. Set model.prompts, such as 'model.prompts={{caption: "
        f"{queries[0]}}}'."
    ]


def peak_flops(args: VLJEPATrainingArguments) -> float:
    """Return the operations per second that one device can reach, as given or as measured."""
    if args.device_tflops is not None:
        return args.device_tflops * 1e12
    return reachable_flops(args.device, torch.bfloat16 if args.bf16 else torch.float32)


def chance_line(recipe: Recipe) -> str:
    """Return the line of the log that states the chance loss."""
    args = recipe.training
    rows = args.global_batch_size // args.gradient_accumulation_steps
    texts = rows * (1 + recipe.data.hard_negatives)
    # InfoNCE averages two directions: each row among the texts, and each target among the rows.
    return (
        f"chance loss of {rows} rows and {texts} texts at most "
        f"{(math.log(rows) + math.log(texts)) / 2:.3f}; each line gives its own, lower if rows "
        "share a target"
    )


def start_report(
    model: PreTrainedModel, recipe: Recipe, sources: list[Source | StreamedSource], loss: str
) -> str:
    """Return the start of the log: parameters, sources, precision, peak of mfu, loss.

    Args:
        loss: the line about the loss.
    """
    args = recipe.training
    lines = [parameter_table(model), ""]
    for source in sources:
        lines.append(str(source))
        lines += [source.report] if isinstance(source, Source) and source.bad else []
        lines += small_source(source, args.global_batch_size)
    lines += untrained_prompts(model.config.prompts, sources)
    if args.world_size > 1 and trains_batch_norms(model):
        lines.append(
            f"note: the X-Encoder's batch norms average over the {args.per_device_train_batch_size}"
            " rows of each process, so the loss depends on the number of processes"
        )
    lines.append(
        f"{args.world_size} process(es) on {args.device} · {args.max_steps} steps of "
        f"{args.global_batch_size} rows · {precision_line(args)}, fp32 weights"
    )
    given = "measured" if args.device_tflops is None else "training.device_tflops"
    lines.append(f"mfu is a share of {peak_flops(args) / 1e12:.3g} TFLOP/s ({given})")
    return "\n".join([*lines, loss])


def open_features(
    recipe: Recipe,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    sources: list[Source | StreamedSource],
) -> FeatureStore | None:
    """Open the recipe's feature store; `None` if the recipe names none.

    Raises:
        FeatureError: another X-Encoder or video processor wrote the store, or the recipe trains
            the X-Encoder or augments frames, so that stored features would be wrong.
    """
    if recipe.data.features is None:
        return None
    check_recipe(model, sources)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    return FeatureStore.open(recipe.data.features, model, processor.video_processor, dtype=dtype)


def read_data(
    recipe: Recipe,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    sources: list[Source | StreamedSource],
    collator: type[ContrastiveCollator] = ContrastiveCollator,
) -> tuple[ContrastiveDataset, ContrastiveCollator]:
    """Build the dataset and its collator; decode clips and encode targets that the recipe caches.

    Args:
        collator: class of the collator.

    Raises:
        FeatureError: see `open_features`.
        OutputError: `data.cache_dir` cannot be written to.
        RecipeError: too many clips of a source cannot be read, or the recipe caches targets that
            change or are not known before training.
    """
    args, data = recipe.training, recipe.data
    features = open_features(recipe, model, processor, sources)
    with args.main_process_first(desc="reading clips"):  # it decodes, the others find the cache
        dataset = build_dataset(sources, processor.video_processor, data, features)
    states = None
    if data.cache_targets:
        if any(isinstance(source, StreamedSource) for source in sources):
            raise RecipeError(
                "data.cache_targets: the texts of a streamed source are not known before training. "
                "Set it to false."
            )
        texts = [t for row in dataset.rows for t in (row["target"], *row.get("negatives", []))]
        if args.bf16:
            store_frozen_in_bf16(model)  # as the step would compute them
        model.to(args.device)
        folder = Path(data.cache_dir)
        with args.main_process_first(desc="encoding targets"):
            states = read_target_states(model, processor, texts, folder, args.bf16)
    return dataset, collator(processor, states, data.hard_negatives)


def build_trainer(
    recipe: Recipe,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    *,
    dataset: ContrastiveDataset,
    collator: ContrastiveCollator,
    benchmarks: list[Benchmark],
    settings: Fingerprint,
    callbacks: list[TrainerCallback],
    trainer_class: type[VLJEPATrainer] = VLJEPATrainer,
) -> VLJEPATrainer:
    """Add adapters, store frozen weights in bf16, and build the trainer.

    Args:
        callbacks: those that report the run.

    Raises:
        RecipeError: the model cannot be trained with the recipe's objective or adapters.
    """
    args = recipe.training
    trainer_class.check(model, args)
    model = prepare_for_training(model, recipe.model.lora, args)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        benchmarks=benchmarks,
        limit=recipe.evaluation.limit,
        peak_flops=peak_flops(args),
        lanes=recipe.data.lanes,
        max_bad_share=recipe.data.max_bad_share,
        settings=settings,
    )
    trainer.remove_callback(PrinterCallback)  # it would print the same values as a dictionary
    return trainer


def run_settings(recipe: Recipe, sources: list[Source | StreamedSource]) -> Fingerprint:
    """Return the settings that a checkpoint of this run contains."""
    lanes = None
    if any(isinstance(source, StreamedSource) for source in sources):
        lanes = recipe.data.lanes or default_lanes(recipe.training)
    settings = fingerprint(recipe, [content_of(source) for source in sources], lanes)
    # A tokenizer of other rows would give the model's embeddings to other tokens.
    rows = (SourceArguments(rows=path) for path in recipe.model.tokenizer_rows)
    more = [content_of(read_source(each, "model.tokenizer_rows")) for each in rows]
    return settings | {"model.tokenizer_rows": more}


def train(trainer: VLJEPATrainer, resume_from: str | None, changes: str) -> None:
    """Train, from the beginning or from a checkpoint.

    Args:
        changes: the settings that differ from those of the checkpoint's run, for the log.
    """
    if trainer.is_world_process_zero():
        if trainer.args.resume_from_checkpoint:
            print(f"resuming from {resume_from or 'the beginning: there are no checkpoints yet'}")
        if changes:
            print(f"other settings than before: {changes}", flush=True)
    trainer.train(resume_from_checkpoint=resume_from)


def save(trainer: VLJEPATrainer, recipe: Recipe) -> None:
    """Save the log, the recipes, the adapters, the model that contains them, and the processor.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
        RecipeError: too many rows since the last log line are unusable. The model is saved then,
            but not published.
    """
    output_dir, is_first = recipe.training.output_dir, trainer.is_world_process_zero()
    kept = "Checkpoints are kept; training.resume_from_checkpoint=true continues from the last one."
    with writing(f"training.output_dir: {output_dir}", kept):
        trainer.save_state()
        if is_first:
            save_recipes(recipe.model.checkpoint, output_dir, recipe.given)
        if recipe.model.lora is not None:
            adapter = Path(output_dir, "adapter")
            trainer.model.save_pretrained(adapter, is_main_process=is_first)
            if is_first:
                trainer.processing_class.save_pretrained(adapter)
            trainer.model = trainer.model.merge_and_unload()
        trainer.save_model(_internal_call=True)
    trainer.report_bad_rows()
    if recipe.training.push_to_hub:
        trainer.push_to_hub()


__all__ = [
    "begin",
    "build_trainer",
    "chance_line",
    "fixed_query",
    "open_features",
    "peak_flops",
    "read_benchmarks",
    "read_data",
    "run_settings",
    "save",
    "small_source",
    "start_report",
    "train",
    "untrained_prompts",
]
