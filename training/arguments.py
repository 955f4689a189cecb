"""Recipes: their keys, defaults and checks.

A recipe is a YAML file with the sections `model`, `data` and `training`, and optionally `processor`
and `evaluation`. Every key is a field of a dataclass below, which alone defines its default.
"""

import difflib
import importlib.util
import json
import math
import os
import re
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available

from eval.yaml_text import parse_yaml
from modeling_vljepa.attention import cpu_has_bf16
from modeling_vljepa.losses import LOSSES
from modeling_vljepa.prompts import complete_prompts, complete_target_prompts

PROMPT_SETTINGS = {"prompts": complete_prompts, "target_prompts": complete_target_prompts}


class RecipeError(ValueError):
    """An invalid recipe or command; the message names the key, the fault and the cure."""


def check_least(arguments: Any, where: str, **least: int) -> None:
    """Raise `RecipeError` if a number is below its least value, infinite or NaN.

    Args:
        arguments: dataclass of a section; a field that is `None` passes.
        where: the section's name.
        least: the least value of each field to check.
    """
    for name, limit in least.items():
        value = vars(arguments)[name]
        # `not <=` instead of `>`: every comparison with NaN is false.
        if value is not None and not limit <= value < math.inf:
            raise RecipeError(f"{where}.{name}: it is {value}; give {limit} or more.")


@dataclass(kw_only=True)
class ModelArguments:
    """The section `model`: a `checkpoint`, or a new model from `config`.

    Attributes:
        checkpoint: folder or Hub id of a VL-JEPA; training starts from its weights and processor.
        config: fields of `VLJEPAConfig` for a new model. With a `checkpoint`, they change its
            configuration (for example `freeze_vision: false`).
        text_encoder: folder or Hub id of a pretrained Y-Encoder; its configuration, weights and
            tokenizer replace `text_config`.
        vocab_size: size of the query tokenizer, which is trained on the recipe's own texts.
        tokenizer_rows: JSONL files whose texts also train the tokenizer, such as the questions of
            a later stage. Without them it splits their words into bytes.
        lora: settings of `peft.LoraConfig`, such as `{r: 16, lora_alpha: 32}`. The Predictor's
            layers are frozen and get adapters. The projections, the temperature and, unless
            `freeze_text`, the Y-Encoder train too.
        prompts: the queries that this recipe trains with, by their names in `VLJEPAConfig.prompts`:
            everyone who uses the model asks them by default. Those that are not given are the
            checkpoint's, or the defaults of a new model.
        target_prompts: the same of `VLJEPAConfig.target_prompts`, the templates of labels.
    """

    checkpoint: str | None = None
    config: dict = field(default_factory=dict)
    text_encoder: str | None = None
    vocab_size: int = 2000
    tokenizer_rows: list[str] = field(default_factory=list)
    lora: dict | None = None
    prompts: dict = field(default_factory=dict)
    target_prompts: dict = field(default_factory=dict)

    def __post_init__(self):
        check_least(self, "model", vocab_size=1)
        for name, complete in PROMPT_SETTINGS.items():
            if name in self.config:
                raise RecipeError(f"model.config.{name}: give it as model.{name}.")
            try:
                complete(vars(self)[name])
            except ValueError as error:
                raise RecipeError(f"model.{error}") from error
        if self.checkpoint is not None:
            for name in ("text_encoder", "tokenizer_rows"):
                if vars(self)[name]:
                    raise RecipeError(
                        f"model.{name}: a checkpoint has a Y-Encoder and tokenizers already; "
                        f"remove {name} or checkpoint."
                    )


@dataclass(kw_only=True)
class ProcessorArguments:
    """The section `processor`: conversion of media to tensors.

    Attributes:
        image_size: side of the square crop in pixels, or of the square that a checkpoint squashes
            frames to; `vision_config.crop_size` of a new model.
        shortest_edge: length of the shortest edge in pixels after the resize, before the centre
            crop. Default: V-JEPA 2's ratio, 256/224 of the crop.
        num_frames: frames sampled from a video, its first and last included. Default: those of the
            checkpoint, 8 of a new model.
    """

    image_size: int | None = None
    shortest_edge: int | None = None
    num_frames: int | None = None

    def __post_init__(self):
        check_least(self, "processor", image_size=1, shortest_edge=1, num_frames=1)


@dataclass(kw_only=True)
class AugmentArguments:
    """The mapping `augment` of a source: random changes, new in every epoch.

    All frames of a clip change alike. Uncovered pixels repeat the edge.

    Attributes:
        mirror: mirror half of the clips. Not for texts that mention sides.
        shift: largest shift to each side, as a share of height and width. Not for texts that
            mention positions.
        scale: least and greatest factor on the size of what a frame shows, such as `[0.7, 1.2]`.
        rotation: largest rotation to either side, in degrees. Not for texts that mention
            directions.
        colour: largest relative change of saturation, contrast and brightness; half of it is that
            of the balance of red, green and blue. Not for texts that mention colours, unless it is
            small.
    """

    mirror: bool = False
    shift: float = 0.0
    scale: list = field(default_factory=lambda: [1.0, 1.0])
    rotation: float = 0.0
    colour: float = 0.0

    def __post_init__(self):
        name = "data.sources: augment"
        check_least(self, name, shift=0, rotation=0, colour=0)
        for key, most in (("shift", 1), ("rotation", 180), ("colour", 1)):
            if vars(self)[key] > most:
                raise RecipeError(f"{name}.{key}: it is {vars(self)[key]}; give {most} or less.")
        numbers = all(type(factor) in (int, float) for factor in self.scale)
        if not numbers or len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise RecipeError(
                f"{name}.scale: it is {self.scale}; give the least and the greatest factor, such "
                "as [0.7, 1.2]."
            )

    @property
    def turns(self) -> bool:
        """Whether frames are scaled or rotated, so that their pixels are interpolated."""
        return self.rotation > 0 or self.scale != [1, 1]


@dataclass(kw_only=True)
class SourceArguments:
    """An item of `data.sources`: either `rows` or `dataset`.

    Attributes:
        rows: a JSONL file, or a pattern such as `data/*.jsonl`; `processing/rows.py` defines the
            keys of a row.
        dataset: first argument of `datasets.load_dataset`: a Hub id, a folder, or a format such as
            `parquet` or `webdataset`, whose files are then `data_files`.
        config, split, data_files, revision: further arguments of `datasets.load_dataset`.
        columns: the columns of a row's parts: the name of a public set
            (`training/data/public_sets.yaml`), or a mapping (`processing/columns.py`).
            Default: those of the public set with this Hub id.
        media_folder: folder of media that a dataset names by relative paths.
        streaming: read rows during training, instead of all before it.
        shuffle_rows: number of rows of a streamed source that are in memory and shuffled.
        weight: share of the global batches drawn from this source, relative to the others.
        query: replaces the query of every row.
        augment: random changes of the frames, new in every epoch: keys of [`AugmentArguments`].
            `true` is `{mirror: true, shift: 0.125}`. Some changes do not suit texts that mention
            positions, sides, directions or colours.
        group_by_length: make batches of texts of similar length, to save padding. Their negatives
            then have that length too.
        rows_per_clip: put up to this many rows of a clip into one batch, where they share one pass
            of the X-Encoder, and one augmented view. They are negatives of each other, unless they
            share a `group_id`.
        licence: licence of the data, for the model card; nothing else reads it.
    """

    rows: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    revision: str | None = None
    columns: str | dict | None = None
    media_folder: str | None = None
    streaming: bool = False
    shuffle_rows: int = 10_000
    weight: float = 1.0
    query: str | None = None
    augment: bool | dict = False
    group_by_length: bool = False
    rows_per_clip: int = 1
    licence: str | None = None

    def __post_init__(self):
        if (self.rows is None) == (self.dataset is None):
            raise RecipeError("data.sources: each source needs either rows or dataset, not both.")
        if not 0 < self.weight < math.inf:
            raise RecipeError(
                f"data.sources: {self.name}: weight is {self.weight}; give more than 0."
            )
        check_least(self, f"data.sources: {self.name}", shuffle_rows=1, rows_per_clip=1)
        self.augmentation = read_augment(self.augment, f"data.sources: {self.name}: augment")
        if self.rows_per_clip > 1:
            for name in ("streaming", "group_by_length"):
                if vars(self)[name]:
                    raise RecipeError(
                        f"data.sources: {self.name}: rows_per_clip and {name} exclude each other; "
                        f"set {name} to false, or rows_per_clip to 1."
                    )
        if self.streaming and self.group_by_length:
            raise RecipeError(
                f"data.sources: {self.name}: group_by_length needs all rows in memory; set it or "
                "streaming to false."
            )
        if self.rows is not None:
            given = ("config", "data_files", "revision", "columns", "media_folder")
            for name in given:
                if vars(self)[name] is not None:
                    raise RecipeError(
                        f"data.sources: {self.name}: {name} is a setting of dataset, not of rows; "
                        "remove it."
                    )

    @property
    def name(self) -> str:
        """The source's name in messages."""
        if self.rows is not None:
            return self.rows
        files = [] if self.data_files is None else [self.data_files]
        return " ".join(map(str, [self.dataset, *filter(None, [self.config]), *files]))


@dataclass(kw_only=True)
class DataArguments:
    """The section `data`.

    Attributes:
        sources: at least one.
        max_bad_share: training stops if more than this share of a source's rows is unusable. Rows
            that are read before training are checked then, others as they are read.
        decode_once: decode the media of sources that are not streamed before training, and store
            the frames in `cache_dir`. If false, `training.dataloader_num_workers` processes decode
            them during training.
        cache_dir: folder of the sampled, resized frames and of encoded targets, for this run and
            later ones.
        num_workers: number of processes that decode media before training.
        features: a folder that `python -m training.cache_features` wrote: the visual tokens of a
            frozen X-Encoder, read instead of the media.
        lanes: number of shards of a streamed source, each read in order. The rows of every step
            depend on it, and not on the number of processes, which must divide it. Default: 8, or
            the largest divisor of 8 that divides the batch; the number of processes if that does
            not divide it.
        cache_targets: encode every distinct target once before training, and store the
            Y-Encoder's outputs in `cache_dir`. It needs a frozen Y-Encoder.
        hard_negatives: number of each row's `negatives` that are added to the batch's texts.
    """

    sources: list
    max_bad_share: float = 0.0
    decode_once: bool = True
    cache_dir: str = "data/cache"
    num_workers: int = os.cpu_count() or 1
    features: str | None = None
    lanes: int | None = None
    cache_targets: bool = False
    hard_negatives: int = 0

    def __post_init__(self):
        if not 0 <= self.max_bad_share <= 1:
            raise RecipeError(f"data.max_bad_share: it is {self.max_bad_share}; give 0 to 1.")
        check_least(self, "data", num_workers=1, lanes=1, hard_negatives=0)


@dataclass(kw_only=True)
class EvaluationArguments:
    """The section `evaluation`: benchmarks measured during training.

    Attributes:
        tasks: names of benchmarks. `training.eval_strategy` and `eval_steps` decide when they are
            measured; `training.metric_for_best_model` names a score as the log does.
        benchmarks: YAML file that defines them.
        limit: maximum number of rows of each.
    """

    tasks: list[str] = field(default_factory=list)
    benchmarks: str = "eval/benchmarks.yaml"
    limit: int | None = None

    def __post_init__(self):
        check_least(self, "evaluation", limit=1)


INTERCHANGEABLE = ("masked", "positives")
LEAST = {
    **dict.fromkeys(("max_steps", "global_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("gradient_cache_rows", "world_size_expected"), 1),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), 0),
    **dict.fromkeys(("text_learning_rate_scale", "vision_learning_rate_scale"), 0),
    **dict.fromkeys(("new_learning_rate_scale", "new_parts_alone"), 0),
    **dict.fromkeys(("sigreg_weight", "variance_weight", "covariance_weight"), 0),
}


# Larger numbers are mistakes: NumPy takes no larger seed, and the order of the rows of all steps is
# drawn before the first.
MOST = {
    **dict.fromkeys(("max_steps", "global_batch_size", "gradient_accumulation_steps"), 10**8),
    **dict.fromkeys(("seed", "data_seed"), 2**32 - 1),
}
MAPPINGS = (
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
FILES_OR_MAPPINGS = ("deepspeed", "fsdp_config")
# Optional packages, which transformers imports late: parts of the names of optimizers, the module
# and the name on PyPI. The first match counts: `galore_adamw_8bit` contains `8bit` too.
OPTIMIZERS = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    **dict.fromkeys(("8bit", "paged", "lion", "ademamix", "rmsprop_bnb"), ("bitsandbytes",) * 2),
}
REPORTERS = {
    **{name: (name, name) for name in ("tensorboard", "wandb", "mlflow", "trackio", "clearml")},
    **{name: (name, name) for name in ("codecarbon", "dagshub", "dvclive", "neptune", "swanlab")},
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "azure_ml": ("azureml.core", "azureml-core"),
}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of transformers.TrainingArguments that both commands read, by themselves or in Trainer.
READ = words(
    """
    output_dir max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    gradient_accumulation_steps activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend
    torch_compile_mode neftune_noise_alpha torch_empty_cache_steps tf32 use_cpu full_determinism
    seed data_seed
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id skip_memory_metrics debug
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit save_only_model save_on_each_node
    enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better
    resume_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_revision dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed
    """
)
# All others, with the reason why another value than the default is refused: Trainer would accept it
# without a word and train as before.
NO_EVALUATION_LOOP = "evaluation measures benchmarks (section 'evaluation')"
NO_METRICS = "evaluation computes the loss alone"
UNREAD = {
    "label_smoothing_factor": "no objective here has labels to smooth",
    "average_tokens_across_devices": "the loss is a mean over rows",
    "optim_target_modules": "GaLore and APOLLO would replace the groups of parameters",
    "bf16_full_eval": "precision decides",
    "fp16_full_eval": "precision decides",
    "use_liger_kernel": "Liger has no kernels for this model",
    "liger_kernel_config": "Liger has no kernels for this model",
    "use_cache": "training generates nothing",
    "auto_find_batch_size": "global_batch_size is fixed, and gradient_cache_rows saves memory",
    "include_num_input_tokens_seen": "the log counts samples",
    "per_device_eval_batch_size": NO_EVALUATION_LOOP,
    "prediction_loss_only": NO_EVALUATION_LOOP,
    "eval_do_concat_batches": NO_EVALUATION_LOOP,
    "eval_use_gather_object": NO_EVALUATION_LOOP,
    "eval_accumulation_steps": NO_EVALUATION_LOOP,
    "include_for_metrics": NO_EVALUATION_LOOP,
    "batch_eval_metrics": NO_EVALUATION_LOOP,
    "hub_always_push": "push_to_hub publishes once, after training",
    "restore_callback_states_from_checkpoint": "callbacks restore their states themselves",
    "accelerator_config": "the mixture deals the rows to the processes, not accelerate",
    "parallelism_config": "name the parallelism in fsdp or in accelerate's own file",
    "dataloader_drop_last": "the mixture makes full batches only",
    "dataloader_in_order": "the order of the rows must not depend on the workers",
    "remove_unused_columns": "the collator reads every column",
    "train_sampling_strategy": "the mixture orders the rows; group_by_length of a source in "
    "data.sources makes batches of texts of similar length",
    "length_column_name": "group_by_length of a source in data.sources measures texts itself",
    "do_train": "the command trains",
    "do_eval": "eval_strategy decides",
    "do_predict": "eval.evaluate measures a trained model",
    "local_rank": "the launcher sets it",
}


def check_unread(arguments: TrainingArguments, read: frozenset[str], unread: dict) -> None:
    """Check that every setting that is given has a reader.

    Args:
        read: names of the fields of transformers.TrainingArguments that something reads.
        unread: reasons why nothing reads a field.

    Raises:
        RecipeError: a field has another value than its default, and nothing reads it.
    """
    inherited = {each.name for each in fields(TrainingArguments)} - read
    for each in fields(arguments):
        if not each.init or each.name not in inherited:
            continue
        value = vars(arguments)[each.name]
        if value != (each.default_factory() if each.default is MISSING else each.default):
            reason = unread.get(each.name, "this version of transformers has added it")
            raise RecipeError(
                f"training.{each.name}: it is {value!r}, but nothing here reads it: {reason}. "
                "Remove it."
            )
    for each in fields(arguments):
        value = vars(arguments).get(each.name)
        other, kinds = UNREAD_WITH.get(each.name, ("optim", ()))
        kind = str(vars(arguments)[other])
        if kind in kinds and value != each.default:
            raise RecipeError(
                f"training.{each.name}: it is {value!r}, but training.{other}: {kind} does not "
                "read it. Remove it."
            )


# Optimizers and schedules that do not read a setting which others do.
WITHOUT_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop", "lomo", "adalomo")
WITHOUT_ARGUMENTS = ("adafactor", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
UNREAD_WITH = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), ("optim", WITHOUT_ADAM)),
    "optim_args": ("optim", WITHOUT_ARGUMENTS),
    "warmup_steps": ("lr_scheduler_type", WITHOUT_WARMUP),
}


def check_schedule(arguments: TrainingArguments) -> None:
    """Check the schedule's arguments, which Trainer reads after the clips are decoded.

    Raises:
        RecipeError: the schedule cannot be built with `lr_scheduler_kwargs`.
    """
    steps = arguments.max_steps
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        kind = arguments.lr_scheduler_type.value
        raise RecipeError(f"training.lr_scheduler_kwargs: of {kind}: {error}") from error


def check_package(key: str, value: str | bool, module: str, package: str) -> None:
    """Raise `RecipeError` if a package that a setting needs is not installed."""
    # A module's parents are imported to find it, so their absence is an error of its own.
    try:
        found = module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise RecipeError(
            f"training.{key}: {value} needs {package}, which is not installed: pip install "
            f"{package}"
        )


def check_deepspeed(settings: dict | str) -> None:
    """Check a DeepSpeed configuration, or the JSON file of one.

    Raises:
        RecipeError: it is not JSON, deepspeed is not installed, a launcher did not start this
            process, or the configuration shards the weights.
    """
    check_package("deepspeed", "it", "deepspeed", "deepspeed")
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"training.deepspeed: {settings} is not JSON: {error}") from error
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError(
            "training.deepspeed: start the processes with torchrun or accelerate launch, even one."
        )
    if not isinstance(settings, dict):
        raise RecipeError(f"training.deepspeed: expected keys and values, found {settings!r}.")
    zero = settings.get("zero_optimization")
    # With stage 3 upstream builds the model from empty weights, which `_init_weights` cannot fill.
    if isinstance(zero, dict) and zero.get("stage") == 3:
        raise RecipeError(
            "training.deepspeed: ZeRO stage 3 does not work with this model; give stage 1 or 2, or "
            "use FSDP2 (docs/training.md)."
        )


def check_inherited(arguments: TrainingArguments) -> None:
    """Check fields of transformers whose wrong values it reports late, or as a traceback.

    Raises:
        RecipeError: a number is too large, a mapping or its file is missing, or a package is not
            installed.
    """
    given = vars(arguments)
    for name, limit in MOST.items():
        if name in given and given[name] is not None and given[name] > limit:
            raise RecipeError(f"training.{name}: it is {given[name]}; give {limit} or less.")
    for name in MAPPINGS:
        if isinstance(given[name], str):
            raise RecipeError(f"training.{name}: expected keys and values, found {given[name]!r}.")
    for name in FILES_OR_MAPPINGS:
        if isinstance(given[name], str) and not Path(given[name]).is_file():
            raise RecipeError(
                f"training.{name}: {given[name]}: no such file; give keys and values."
            )
    for name, only in (("hub_strategy", "end"), ("hub_revision", None)):
        if given[name] != only:
            cure = "remove it" if only is None else f"give {only!r}"
            raise RecipeError(
                f"training.{name}: it is {given[name]!r}, but push_to_hub publishes the finished "
                f"model on the main branch; {cure}."
            )
    if given["deepspeed"]:
        check_deepspeed(given["deepspeed"])
    for part, (module, package) in OPTIMIZERS.items():
        if part in given["optim"]:
            check_package("optim", given["optim"], module, package)
            break
    report_to = given["report_to"] or "none"
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("all", "none"):
            continue
        if name not in REPORTERS:
            raise RecipeError(
                f"training.report_to: {name!r} is not one of none, all, {', '.join(REPORTERS)}."
            )
        check_package("report_to", name, *REPORTERS[name])


@dataclass(kw_only=True)
class VLJEPATrainingArguments(TrainingArguments):
    """The section `training`: `transformers.TrainingArguments` for this objective.

    A dataset here is a mixture without epochs, so training is counted in steps.

    Attributes:
        global_batch_size: rows of one step over all processes; they are each other's negatives.
            The learning rate depends on it, so it is fixed and the per-device batch follows.
            With `gradient_accumulation_steps` it is the sum over these, and a row's negatives are
            those of its own part: accumulation adds none, `gradient_cache_rows` does.
        gradient_cache_rows: rows of a process that go through the model at a time, by GradCache:
            the loss of the whole batch in the memory of these rows.
        objective: the name of a loss in `modeling_vljepa/losses.py`: "info_nce"; "sigmoid"
            (SigLIP's; the model needs a `logit_bias_init_value`); or "cosine", "l1", "l2", which
            collapse unless the Y-Encoder is frozen.
        interchangeable: treatment of rows that share a target text or group: "masked" (not each
            other's negatives) or "positives".
        sigreg_weight, variance_weight, covariance_weight: weights of LeJEPA's and VICReg's terms.
        precision: compute in "fp32" or "bf16" (weights stay in fp32, except those of frozen
            encoders), or "auto": bf16 if the device multiplies it natively, see `use_bf16`.
        text_learning_rate_scale: factor on a Y-Encoder's backbone (paper section 3.2: 0.05 for
            a pretrained one; a random one needs 1).
        vision_learning_rate_scale: factor on an X-Encoder that is trained.
        new_learning_rate_scale: factor on the projection of the visual tokens and on both heads,
            which are new to a model of pretrained parts.
        layer_decay: factor between the learning rates of a backbone's layer and of the next one;
            below 1, early layers change less.
        new_parts_alone: number of first steps, or share of all steps below 1, in which only the
            parts of `new_learning_rate_scale` change.
        clip_by_part: apply `max_grad_norm` to the gradient of each part by itself, not to that of
            the whole model.
        resume_from_checkpoint: a checkpoint's folder; or true for the last checkpoint in
            `output_dir`, or the beginning if it has no checkpoint.
        device_tflops: peak of a device in 10^12 operations per second at this precision, from its
            data sheet: the denominator of `mfu` in the log. Default: the speed of a large matrix
            product, measured for two seconds.
        world_size_expected: number of processes that the recipe is meant for, checked at start-up.
        dataloader_num_workers: number of processes that read batches ahead, for each training
            process. Default: see `loader_defaults`.
        dataloader_pin_memory: read batches into pinned memory, and move them to the device without
            waiting. Default: see `loader_defaults`.
        command: the command of the recipe. No key.
    """

    command: ClassVar[str] = "training.train"

    output_dir: str = field()  # `field()`: or the parent's default would make it optional
    max_steps: int = field()
    global_batch_size: int
    gradient_cache_rows: int | None = None
    objective: str = "info_nce"
    interchangeable: str = "masked"
    sigreg_weight: float = 0.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    precision: str = "auto"
    text_learning_rate_scale: float = 0.05
    vision_learning_rate_scale: float = 1.0
    new_learning_rate_scale: float = 1.0
    layer_decay: float = 1.0
    new_parts_alone: float = 0.0
    clip_by_part: bool = False
    resume_from_checkpoint: str | bool | None = None
    device_tflops: float | None = None
    world_size_expected: int | None = None
    max_grad_norm: float = 1.0
    logging_steps: float = 20
    save_strategy: str = "steps"
    save_steps: float = 0.2  # a share of all steps
    save_total_limit: int | None = 1
    hub_strategy: str = "end"  # upstream would publish the model of every checkpoint
    adam_beta2: float = 0.98
    disable_tqdm: bool = True
    logging_nan_inf_filter: bool = False  # upstream would log the average of earlier losses
    remove_unused_columns: bool = False
    dataloader_num_workers: int | None = None
    dataloader_pin_memory: bool | None = None
    ddp_find_unused_parameters: bool | None = False  # every module is used in every step
    # Derived from the fields above. `init=False`: a recipe that sets one is refused.
    per_device_train_batch_size: int = field(default=1, init=False)
    num_train_epochs: float = field(default=1.0, init=False)
    bf16: bool = field(default=False, init=False)
    fp16: bool = field(default=False, init=False)
    label_names: list[str] = field(default_factory=list, init=False)
    ignore_data_skip: bool = field(default=False, init=False)  # positions are always restored

    def __post_init__(self):
        check_least(self, "training", **LEAST)
        check_unread(self, READ, UNREAD)
        check_inherited(self)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        set_loader_defaults(self)
        if not self.dataloader_num_workers:
            for name in ("dataloader_multiprocessing_context", "dataloader_persistent_workers"):
                if vars(self)[name]:
                    raise RecipeError(
                        f"training.{name}: it is {vars(self)[name]!r}, but there are no workers; "
                        "give training.dataloader_num_workers, or remove it."
                    )
        if self.torch_empty_cache_steps is not None and self.gradient_cache_rows is not None:
            raise RecipeError(
                "training.torch_empty_cache_steps: steps with gradient_cache_rows do not read it. "
                "Remove one of them."
            )
        for name in ("save_steps", "device_tflops"):  # not in LEAST: a share of the steps is valid
            value = vars(self)[name]
            if value is not None and value <= 0:
                raise RecipeError(f"training.{name}: it is {value}; give more than 0.")
        if Path(self.output_dir).is_file():
            raise RecipeError(f"training.output_dir: {self.output_dir} is a file; name a folder.")
        for name, choices in (("objective", LOSSES), ("interchangeable", INTERCHANGEABLE)):
            if vars(self)[name] not in choices:
                raise RecipeError(
                    f"training.{name}: {vars(self)[name]!r} is not one of {', '.join(choices)}."
                )
        by_loss = self.metric_for_best_model in (None, "loss", "eval_loss")
        if by_loss and (self.load_best_model_at_end or self.save_strategy == "best"):
            raise RecipeError(
                "training.metric_for_best_model: the loss still falls while retrieval gets worse; "
                "name a score of the section 'evaluation'."
            )
        check_parts(self)
        self.bf16 = use_bf16(self.precision, torch.device("cpu") if self.use_cpu else None)
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher's choice; the recipe decides
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "no"
        super().__post_init__()
        check_schedule(self)
        per_device, rest = divmod(
            self.global_batch_size, self.world_size * self.gradient_accumulation_steps
        )
        if rest or not per_device:
            raise RecipeError(
                f"training.global_batch_size: {self.global_batch_size} rows do not divide among "
                f"{self.world_size} processes x {self.gradient_accumulation_steps} "
                "gradient_accumulation_steps; give a multiple."
            )
        self.per_device_train_batch_size = per_device


def check_parts(arguments: VLJEPATrainingArguments) -> None:
    """Raise `RecipeError` for settings of the parts' learning rates that cannot be followed."""
    decay, alone = arguments.layer_decay, arguments.new_parts_alone
    if not 0 < decay <= 1:
        raise RecipeError(f"training.layer_decay: it is {decay}; give more than 0, at most 1.")
    if alone >= 1 and (alone >= arguments.max_steps or alone % 1):
        raise RecipeError(
            f"training.new_parts_alone: it is {alone:g}; give a whole number of steps below "
            f"max_steps ({arguments.max_steps}), or a share of them below 1."
        )
    schedule = SchedulerType(arguments.lr_scheduler_type)
    if alone and schedule in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise RecipeError(
            f"training.new_parts_alone: lr_scheduler_type {schedule.value} has no steps to wait "
            "for; remove one of them."
        )


MOST_WORKERS = 4  # by default; each holds batches of its own in memory


def loader_defaults(device: str, cores: int) -> tuple[int, bool]:
    """Return the default number of workers of a DataLoader, and whether it pins memory.

    On CUDA, up to four workers read ahead on the cores that the training process leaves, and it
    pins memory. On a CPU, training needs the cores itself, and memory cannot be pinned.

    Args:
        device: type of the device.
        cores: cores for each training process.
    """
    if device != "cuda":
        return 0, False
    return min(MOST_WORKERS, cores - 1), True


def cores_of_process() -> int:
    """Return the number of cores for each of this machine's training processes."""
    # Those that this process may use, not all of the machine: a scheduler gives a job some.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // processes)


def set_loader_defaults(arguments: VLJEPATrainingArguments) -> None:
    """Set the loader's arguments that are not given."""
    device = "cpu" if arguments.use_cpu else torch.accelerator.current_accelerator().type
    # Counted on CUDA only: macOS has no `sched_getaffinity`.
    workers, pins = loader_defaults(device, cores_of_process() if device == "cuda" else 1)
    if arguments.dataloader_num_workers is None:
        arguments.dataloader_num_workers = workers
    if arguments.dataloader_pin_memory is None:
        arguments.dataloader_pin_memory = pins


def gpu_has_bf16() -> bool:
    """Return True if the GPU multiplies bf16 natively; NVIDIA's do since Ampere, others emulate."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def use_bf16(precision: str, device: torch.device | None) -> bool:
    """Return True to compute in bf16.

    "auto" is bf16 on a device that multiplies it natively, else fp32. It is a property of the
    device: a measurement could give one run two precisions.

    Args:
        precision: "fp32", "bf16" or "auto".
        device: the CPU, or `None` for an accelerator.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise RecipeError(f"training.precision: {precision!r} is not one of auto, fp32, bf16.")
    if precision != "auto":
        return precision == "bf16"
    return gpu_has_bf16() if device is None else cpu_has_bf16()


def precision_line(args: TrainingArguments) -> str:
    """Return the precision of a run and its reason, for the start of the log."""
    line = f"{'bf16' if args.bf16 else 'fp32'} compute"
    if args.precision != "auto":
        return line
    device, found = "CPU" if args.use_cpu else "GPU", "" if args.bf16 else "no "
    return f"{line} (auto: this {device} has {found}native bf16)"


@dataclass(kw_only=True)
class Recipe:
    """A checked recipe; `given` is its YAML with the overrides."""

    model: ModelArguments
    processor: ProcessorArguments
    data: DataArguments
    training: VLJEPATrainingArguments
    evaluation: EvaluationArguments
    given: dict


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Return the value if it has the type `hint`; convert a whole number to a float.

    Raises:
        RecipeError: it has another type.
    """
    kinds = {hint, *typing.get_args(hint)}
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    try:
        type_validator(name, value, hint)
    except (TypeError, ValueError) as error:
        cure = ""
        if isinstance(value, str) and re.fullmatch(r"[\d.]+[eE][-+]?\d+", value):
            cure = " YAML reads 1e-3 as text: write 1.0e-3, with a point and a sign."
        if isinstance(value, bool):
            cure = " YAML reads yes and no as true and false unless quoted: '\"no\"'."
        raise RecipeError(f"{name}: {error}.{cure}") from error
    return value


def check_keys(given: Any, cls: type, where: str) -> dict:
    """Return the mapping `given` with every value checked against the fields of `cls`.

    Raises:
        RecipeError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected keys and values, found {given!r}.")
    known = {f.name for f in fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    checked = {}
    for key, value in given.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{name}: no such key.{hint}")
        checked[key] = check_value(name, value, hints[key])
    missing = [
        f.name
        for f in fields(cls)
        if f.init and f.name not in given and f.default is f.default_factory is MISSING
    ]
    if missing:
        raise RecipeError(f"{where or 'the recipe'}: {missing[0]!r} is missing.")
    return checked


def read_augment(given: bool | dict, where: str) -> AugmentArguments | None:
    """Return the changes that a source's `augment` states, or `None` for no change."""
    if given is True:
        given = {"mirror": True, "shift": 0.125}
    return AugmentArguments(**check_keys(given, AugmentArguments, where)) if given else None


def apply_override(recipe: dict, override: str) -> None:
    """Set one value of `recipe` in place, such as `training.seed=1`; the value is YAML.

    A number is an index of a list: `data.sources.0.rows=mine.jsonl`.

    Raises:
        RecipeError: not of this form.
    """
    dotted, equals, value = override.partition("=")
    *sections, key = dotted.split(".")
    if not equals or not sections:
        raise RecipeError(f"{override!r}: an override looks like training.seed=1.")
    for section in sections:
        if isinstance(recipe, list):
            if not section.isdecimal() or int(section) >= len(recipe):
                raise RecipeError(
                    f"{override!r}: {section!r} is not the index of one of {len(recipe)} items."
                )
            recipe = recipe[int(section)]
        else:
            recipe = recipe.setdefault(section, {})
        if not isinstance(recipe, dict | list):
            raise RecipeError(f"{override!r}: the recipe has no keys below {section!r}.")
    if isinstance(recipe, list):
        raise RecipeError(f"{override!r}: name a key of an item, as in data.sources.0.rows=FILE.")
    try:
        recipe[key] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: not a YAML value: {error}") from error


def training_arguments(given: Any, cls: type[TrainingArguments]) -> TrainingArguments:
    """Return the section `training`, checked here and by transformers."""
    checked = check_keys(given, cls, "training")
    try:
        return cls(**checked)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error


def read_sections(path: str, overrides: list[str], cls: type, optional: set[str]) -> dict:
    """Return the sections of a YAML recipe: the fields of `cls` except `given`.

    Raises:
        RecipeError: no such file, not YAML, an unknown section or one that is missing.
    """
    sections = [f.name for f in fields(cls) if f.name != "given"]
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such recipe.")
    try:
        given = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: a recipe needs the sections {', '.join(sections)}.")
    for override in overrides:
        apply_override(given, override)
    given = {name: {} for name in optional} | given
    for name in given:
        if name not in sections:
            raise RecipeError(f"{name}: no such section; a recipe has {', '.join(sections)}.")
    for name in sections:
        if name not in given:
            raise RecipeError(f"{path}: the section {name!r} is missing.")
    return given


def read_recipe(
    path: str,
    overrides: list[str] = (),
    model: type[ModelArguments] = ModelArguments,
    training: type[VLJEPATrainingArguments] = VLJEPATrainingArguments,
) -> Recipe:
    """Read and check a YAML recipe.

    Args:
        model, training: classes of these sections.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, a value of another type.
    """
    given = read_sections(path, overrides, Recipe, optional={"processor", "evaluation"})
    data = DataArguments(**check_keys(given["data"], DataArguments, "data"))
    data.sources = [
        SourceArguments(**check_keys(source, SourceArguments, f"data.sources[{i}]"))
        for i, source in enumerate(data.sources)
    ]
    if not data.sources:
        raise RecipeError("data.sources: give at least one source.")
    return Recipe(
        model=model(**check_keys(given["model"], model, "model")),
        processor=ProcessorArguments(
            **check_keys(given["processor"], ProcessorArguments, "processor")
        ),
        data=data,
        training=training_arguments(given["training"], training),
        evaluation=EvaluationArguments(
            **check_keys(given["evaluation"], EvaluationArguments, "evaluation")
        ),
        given=given,
    )


def save_recipes(checkpoint: str | None, output_dir: str, given: dict) -> None:
    """Write `recipes.yaml`: the recipes of `checkpoint`, followed by this one."""
    stages = []
    if checkpoint is not None and (before := Path(checkpoint, "recipes.yaml")).is_file():
        stages = yaml.safe_load(before.read_text(encoding="utf-8"))
    path = Path(output_dir, "recipes.yaml")
    path.write_text(yaml.safe_dump([*stages, given], sort_keys=False), encoding="utf-8")
