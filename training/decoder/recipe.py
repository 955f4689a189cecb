"""Recipes of Y-Decoders: their keys, defaults and checks."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments

from training.arguments import (
    NO_METRICS,
    READ,
    UNREAD,
    RecipeError,
    check_inherited,
    check_keys,
    check_least,
    check_schedule,
    check_unread,
    read_sections,
    training_arguments,
    use_bf16,
    words,
)

EMBEDDINGS = ("text", "predicted", "both")
# Its batches, loss and evaluation are those of Trainer, which reads more settings.
READ_HERE = READ - {"neftune_noise_alpha"} | words(
    """
    per_device_train_batch_size per_device_eval_batch_size ignore_data_skip accelerator_config
    average_tokens_across_devices
    """
)
UNREAD_HERE = UNREAD | {
    "num_train_epochs": "training is counted in max_steps",
    "label_smoothing_factor": "the loss is the decoder's own",
    "auto_find_batch_size": "the learning rate belongs to a batch size",
    "neftune_noise_alpha": "data.noise is the noise of its inputs",
    "include_num_input_tokens_seen": "its inputs are embeddings, not tokens",
    "dataloader_drop_last": "it would drop rows of data.validation too",
    "label_names": "the labels are the tokens of the texts",
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), NO_METRICS
    ),
    **dict.fromkeys(
        ("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"), NO_METRICS
    ),
    "dataloader_in_order": "the order of the texts must not depend on the workers",
    "train_sampling_strategy": "texts are shuffled",
    "length_column_name": "texts are shuffled",
}


@dataclass(kw_only=True)
class DecoderModelArguments:
    """The section `model`.

    Attributes:
        checkpoint: folder or Hub id of a trained VL-JEPA. If it has a decoder and the keys below
            are empty, training continues with that decoder.
        decoder: folder, Hub id or GGUF file of a pretrained language model for the decoder.
        config: fields of `VLJEPAConfig` that begin with `decoder_`. Without `decoder`,
            `decoder_config` defines a new decoder, which shares the query tokenizer.
    """

    checkpoint: str
    decoder: str | None = None
    config: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class DecoderSource:
    """An item of `data.sources` or `data.validation`.

    Attributes:
        rows: a JSONL file; `processing/rows.py` defines the keys of a row. The key `previous` is
            the text of the previous segment, for a decoder that reads it.
        query: replaces the query of every row.
        repeat: number of times that each embedding of the source occurs in an epoch.
        licence: licence of the data, for the model card; nothing else reads it.
    """

    rows: str
    query: str | None = None
    repeat: int = 1
    licence: str | None = None

    def __post_init__(self):
        check_least(self, f"data.sources: {self.rows}", repeat=1)


@dataclass(kw_only=True)
class DecoderDataArguments:
    """The section `data`.

    Attributes:
        sources: training data, at least one source.
        validation: held-out sources with clips; `noise` is chosen by the loss on their predicted
            embeddings.
        embeddings: "text", one embedding of each distinct text of a source; "predicted", one
            predicted from the clip of every row; or "both" together.
        noise: expected length of the Gaussian noise that is added to each embedding, a unit
            vector, before it is normalised again. The cosine between both embeddings is about
            1 / sqrt(1 + noise^2).
        max_bad_share: largest share of a source's rows that may be unusable.
    """

    sources: list
    validation: list = field(default_factory=list)
    embeddings: str = "text"
    noise: float = 0.0
    max_bad_share: float = 0.0

    def __post_init__(self):
        if not self.sources:
            raise RecipeError("data.sources: give at least one source.")
        for name in ("sources", "validation"):
            given = enumerate(vars(self)[name])
            checked = [check_keys(each, DecoderSource, f"data.{name}[{i}]") for i, each in given]
            setattr(self, name, [DecoderSource(**each) for each in checked])
        if self.embeddings not in EMBEDDINGS:
            raise RecipeError(
                f"data.embeddings: {self.embeddings!r} is not one of {', '.join(EMBEDDINGS)}."
            )
        check_least(self, "data", noise=0, max_bad_share=0)


@dataclass(kw_only=True)
class DecoderTrainingArguments(TrainingArguments):
    """The section `training`: `transformers.TrainingArguments`, counted in steps.

    Attributes:
        precision, resume_from_checkpoint, command: see `VLJEPATrainingArguments`.
    """

    command: ClassVar[str] = "training.train_decoder"

    output_dir: str = field()  # `field()`: or the parent's default would make it optional
    max_steps: int = field()
    precision: str = "auto"
    logging_steps: float = 20
    resume_from_checkpoint: str | bool | None = None
    save_strategy: str = "steps"
    save_steps: float = 0.2  # a share of all steps
    save_total_limit: int | None = 1
    hub_strategy: str = "end"
    disable_tqdm: bool = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    prediction_loss_only: bool = True
    bf16: bool = field(default=False, init=False)  # `precision` decides
    fp16: bool = field(default=False, init=False)

    def __post_init__(self):
        check_least(self, "training", max_steps=1, seed=0, learning_rate=0, weight_decay=0)
        check_unread(self, READ_HERE, UNREAD_HERE)
        check_inherited(self)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = use_bf16(self.precision, torch.device("cpu") if self.use_cpu else None)
        super().__post_init__()
        check_schedule(self)


@dataclass(kw_only=True)
class DecoderRecipe:
    """A checked recipe; `given` is its YAML with the overrides."""

    model: DecoderModelArguments
    data: DecoderDataArguments
    training: DecoderTrainingArguments
    given: dict


def read_recipe(path: str, overrides: list[str] = ()) -> DecoderRecipe:
    """Read and check a YAML recipe of the sections `model`, `data` and `training`.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, a value of another type.
    """
    given = read_sections(path, overrides, DecoderRecipe, optional=set())
    return DecoderRecipe(
        model=DecoderModelArguments(**check_keys(given["model"], DecoderModelArguments, "model")),
        data=DecoderDataArguments(**check_keys(given["data"], DecoderDataArguments, "data")),
        training=training_arguments(given["training"], DecoderTrainingArguments),
        given=given,
    )
