"""The recipe of a Y-Decoder."""

from dataclasses import dataclass, field

import torch
from transformers import (
    TrainingArguments,
)

from training.arguments import (
    RecipeError,
    check_keys,
    check_least,
    read_sections,
    training_arguments,
    use_bf16,
)

EMBEDDINGS = ("text", "predicted", "both")


@dataclass(kw_only=True)
class DecoderModelArguments:
    """
    Attributes:
        checkpoint: folder or Hub id of a trained VL-JEPA. If it has a decoder and the keys below
            are empty, that one trains on.
        decoder: folder, Hub id or GGUF file of a pretrained language model to make it of.
        config: fields of `VLJEPAConfig` that begin with `decoder_`; without a pretrained `decoder`,
            `decoder_config` is that of a new one, which shares the query tokenizer.
    """

    checkpoint: str
    decoder: str | None = None
    config: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class DecoderSource:
    """
    Attributes:
        rows: a JSONL file; `processing/rows.py` says what a row holds. A column `previous` is
            the text of the segment before, for a decoder that reads it.
        query: asked of every row in place of its own query.
        repeat: how often each of its embeddings comes in a pass over all sources.
    """

    rows: str
    query: str | None = None
    repeat: int = 1

    def __post_init__(self):
        check_least(self, f"data.sources: {self.rows}", repeat=1)


@dataclass(kw_only=True)
class DecoderDataArguments:
    """
    Attributes:
        sources: what to learn from; at least one.
        validation: sources with clips, held out: the loss on their predicted embeddings is what
            `noise` is chosen by.
        embeddings: of the "text", each distinct one of a source once; "predicted" of every row's
            clip; or "both" together.
        noise: expected length of the gaussian noise that moves each embedding, a unit vector,
            before it is put back on the sphere: the cosine between both is about
            1 / sqrt(1 + noise^2).
        max_bad_share: refuse to start when more than this share of a source cannot be used.
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
    """`transformers.TrainingArguments`, counted in steps.

    Attributes:
        precision: compute in "fp32" or "bf16", or "auto", as of the model itself.
    """

    output_dir: str = field()  # `field()`: or the parent's default would make it optional
    max_steps: int = field()
    precision: str = "auto"
    logging_steps: float = 20
    save_strategy: str = "no"
    disable_tqdm: bool = True
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    prediction_loss_only: bool = True
    bf16: bool = field(default=False, init=False)  # `precision` decides
    fp16: bool = field(default=False, init=False)

    def __post_init__(self):
        check_least(self, "training", max_steps=1, seed=0, learning_rate=0, weight_decay=0)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = use_bf16(self.precision, torch.device("cpu") if self.use_cpu else None)
        super().__post_init__()


@dataclass(kw_only=True)
class DecoderRecipe:
    """A whole recipe, checked, and as it was given."""

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
