"""Teach a trained VL-JEPA to write: add a Y-Decoder to its checkpoint.

    python -m training.train_decoder RECIPE.yaml [training.seed=1 …]

The decoder learns from texts alone: the frozen Y-Encoder embeds each of them, and the decoder
writes it down again. It will have to read predicted embeddings, which only lie near those of
texts; so it trains on embeddings moved at random by about as much (`data.noise`), or on the
predicted embeddings of clips (`data.embeddings`). Nothing else of the model changes.
"""

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from eval.embed import embed_texts, predict_rows
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa.y_decoder import IGNORED
from processing import VLJEPAProcessor, bad_rows_report, read_rows
from training.arguments import (
    RecipeError,
    check_keys,
    check_least,
    read_sections,
    save_recipes,
    training_arguments,
    use_bf16,
)
from training.loop.callbacks import ProgressLine
from training.model.backbones import load, read_decoder
from training.model.parameters import parameter_table
from training.model.recipe_model import check_config

EMBEDDINGS = ("text", "predicted", "both")
LOG = "decoder_trainer_state.json"  # beside the log of the model itself


# -- the recipe ----------------------------------------------------------------------------


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
                f"data.embeddings: {self.embeddings!r} is none of {', '.join(EMBEDDINGS)}."
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


# -- the model -----------------------------------------------------------------------------


def new_decoder_config(settings: dict, processor: VLJEPAProcessor) -> PreTrainedConfig:
    """A new decoder's configuration, which has the query tokenizer's vocabulary."""
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise RecipeError(
            "model.config.decoder_config: the query tokenizer has no token that ends a text, so "
            "a new decoder cannot share it. Give a pretrained model.decoder."
        )
    settings = {"model_type": "llama", **settings, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(**settings)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def check_decoder_config(arguments: DecoderModelArguments) -> dict:
    """The settings, each of its type.

    Raises:
        RecipeError: one that is not the decoder's, or none that it can have.
    """
    config = check_config(arguments.config)
    for name in config:
        if not name.startswith("decoder_"):
            raise RecipeError(f"model.config.{name}: only what begins with decoder_ changes here.")
    if arguments.decoder is not None and "decoder_config" in config:
        raise RecipeError(
            "model.config.decoder_config: it is of a new decoder, and model.decoder brings its "
            "own. Leave one of them out, as with 'model.config={decoder_prefix_tokens: 4}'."
        )
    if (tokens := config.get("decoder_prefix_tokens", 1)) < 1:
        raise RecipeError(f"model.config.decoder_prefix_tokens: it is {tokens}; give 1 or more.")
    return config


def with_decoder(
    arguments: DecoderModelArguments, seed: int
) -> tuple[VLJEPAForConditionalGeneration, VLJEPAProcessor]:
    """The checkpoint's model and processor with the decoder that the recipe asks for; only the
    decoder takes a gradient."""
    config = check_decoder_config(arguments)
    path = arguments.checkpoint
    processor = load(VLJEPAProcessor, "model.checkpoint", path)
    if arguments.decoder is None and "decoder_config" not in config:
        model = load(VLJEPAForConditionalGeneration, "model.checkpoint", path)
        for name, value in config.items():
            if (is_so := vars(model.config)[name]) != value:
                raise RecipeError(
                    f"model.config.{name}: the checkpoint's decoder has {is_so!r} and trains on as "
                    "it is. For another one give model.decoder or model.config.decoder_config."
                )
        model.y_decoder.float()
        model.vljepa.requires_grad_(False)
        return model, processor

    base = load(VLJEPAModel, "model.checkpoint", path)
    for name, value in config.items():
        setattr(base.config, name, value)
    part = None
    if arguments.decoder is not None:
        part = read_decoder("model.decoder", arguments.decoder)
        base.config.backbones["decoder"] = part.name
        base.config.decoder_config = part.config
        processor.decoder_tokenizer = part.tokenizer
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part.config, token, getattr(part.tokenizer, token))
    else:
        settings = config["decoder_config"]
        base.config.backbones.pop("decoder", None)
        base.config.decoder_config = new_decoder_config(settings, processor)
        processor.decoder_tokenizer = None
    torch.manual_seed(seed)
    model = VLJEPAForConditionalGeneration(base.config)
    model.vljepa = base
    if part is not None:
        missing, _ = model.y_decoder.load_state_dict(part.weights, strict=False)
        if absent := [name for name in missing if name.startswith("backbone.")]:
            raise RecipeError(f"model.decoder: {arguments.decoder} lacks {absent[0]}.")
    model.vljepa.requires_grad_(False)
    return model, processor


# -- the data ------------------------------------------------------------------------------


def on_the_sphere(embeds: torch.Tensor, noise: float) -> torch.Tensor:
    """Unit vectors `(…, D)`, moved by gaussian noise of expected length `noise`, back on it."""
    moved = embeds + torch.randn_like(embeds) * noise / embeds.shape[-1] ** 0.5
    return F.normalize(moved, dim=-1)


class EmbeddedTexts(Dataset):
    """Texts with their embeddings and contexts; every look at an embedding moves it anew.

    Args:
        embeds (`torch.FloatTensor` of shape `(N, D)`)
        contexts, texts (`list[str]` of length N)
        noise: see `DecoderDataArguments`.
    """

    def __init__(
        self, embeds: torch.Tensor, contexts: list[str], texts: list[str], noise: float = 0.0
    ):
        self.embeds, self.contexts, self.texts, self.noise = embeds, contexts, texts, noise

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, place: int) -> dict:
        embeds = on_the_sphere(self.embeds[place], self.noise) if self.noise else self.embeds[place]
        return {"embeds": embeds, "context": self.contexts[place], "text": self.texts[place]}


class DecoderCollator:
    """A batch for [`VLJEPAForConditionalGeneration`]: embeddings, contexts, and the texts' tokens
    with the one that ends them."""

    def __init__(self, processor: VLJEPAProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.text_tokenizer
        tokens = tokenizer(
            [sample["text"] for sample in samples],
            add_special_tokens=False,
            truncation=True,
            max_length=min(self.processor.max_target_length, tokenizer.model_max_length) - 1,
        )["input_ids"]
        ended = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokens]
        contexts = self.processor(contexts=[sample["context"] for sample in samples])
        return {
            "predicted_embeds": torch.stack([sample["embeds"] for sample in samples]),  # (B, D)
            "labels": pad_sequence(ended, batch_first=True, padding_value=IGNORED),  # (B, L)
            **contexts,
        }


def read_source(source: DecoderSource, max_bad_share: float) -> list[dict]:
    """The usable rows, with the query they are asked here."""
    try:
        rows, bad = read_rows(source.rows)
        if bad:
            print(bad_rows_report(bad, len(rows) + len(bad), max_bad_share), flush=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source.rows}: {error}") from error
    return rows if source.query is None else [row | {"query": source.query} for row in rows]


def contexts_of(config: PreTrainedConfig, rows: Iterable[dict]) -> list[str]:
    return [config.decoder_context(row["query"], row.get("previous", "")) for row in rows]


def embedded_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    rows: list[dict],
    noise: float,
) -> EmbeddedTexts:
    """Each distinct text (under each context that is read), as the Y-Encoder embeds it."""
    pairs = zip(contexts_of(model.config, rows), (row["target"] for row in rows), strict=True)
    contexts, texts = (list(part) for part in zip(*dict.fromkeys(pairs), strict=True))
    embeds = embed_texts(model.vljepa, processor, texts)
    return EmbeddedTexts(embeds, contexts, texts, noise)


def predicted_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    sources: list[list[dict]],
    noise: float = 0.0,
    max_bad_share: float = 0.0,
) -> list[Subset]:
    """Of each source, every row's text as the model predicts its embedding from the clip and the
    query. A clip is read once, however many sources ask about it.

    Raises:
        RecipeError: more than `max_bad_share` of a source's rows have a clip that is broken.
    """
    rows = [row | {"source": place} for place, source in enumerate(sources) for row in source]
    predictions = predict_rows(model.vljepa, processor, rows)
    for path, reason in predictions.broken.items():
        print(f"left out: {path}: {reason}", flush=True)
    places = defaultdict(list)
    for index, row in enumerate(predictions.rows):
        places[row["source"]].append(index)
    for place, source in enumerate(sources):
        if len(source) - len(places[place]) > max_bad_share * len(source):
            raise RecipeError(
                f"source {place}: {len(source) - len(places[place])} of {len(source)} rows have a "
                f"file that cannot be read, named above; at most {max_bad_share:.1%} may. Mend "
                "them, or raise data.max_bad_share."
            )
    contexts = contexts_of(model.config, predictions.rows)
    texts = [row["target"] for row in predictions.rows]
    whole = EmbeddedTexts(predictions.embeds, contexts, texts, noise)
    return [Subset(whole, places[place]) for place in range(len(sources))]


def training_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    arguments: DecoderDataArguments,
) -> ConcatDataset:
    """What a pass over all sources sees."""
    noise = arguments.noise
    sources = [read_source(source, arguments.max_bad_share) for source in arguments.sources]
    kinds = []
    if arguments.embeddings != "predicted":
        kinds.append([embedded_texts(model, processor, rows, noise) for rows in sources])
    if arguments.embeddings != "text":
        kinds.append(predicted_texts(model, processor, sources, noise, arguments.max_bad_share))
    parts = []
    for source, *of_source in zip(arguments.sources, *kinds, strict=True):
        size = sum(map(len, of_source))
        print(f"{source.rows}: {size} embeddings, repeat {source.repeat}", flush=True)
        parts += of_source * source.repeat
    return ConcatDataset(parts)


# -- training ------------------------------------------------------------------------------


class ValidationLine(TrainerCallback):
    """Prints the loss on validation clips."""

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


def save(trainer: Trainer, processor: VLJEPAProcessor, recipe: DecoderRecipe) -> None:
    """The whole checkpoint, with the logs and recipes of the model it was made from."""
    source, output = Path(recipe.model.checkpoint), Path(recipe.training.output_dir)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    processor.save_pretrained(output)
    trainer.state.save_to_json(output / LOG)
    if (source / "trainer_state.json").is_file():
        shutil.copy(source / "trainer_state.json", output)
    save_recipes(recipe.model.checkpoint, recipe.training.output_dir, recipe.given)


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(
        prog="training.train_decoder", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/babyai_decoder.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to it, such as training.seed=1")
    arguments = parser.parse_args(argv)

    # 1. The recipe; what it starts from is not overwritten
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = recipe.training
    if Path(args.output_dir).resolve() == Path(recipe.model.checkpoint).resolve():
        raise RecipeError("training.output_dir: it is model.checkpoint; give a new folder.")
    set_seed(args.seed)

    # 2. The model, frozen, with a decoder that trains
    model, processor = with_decoder(recipe.model, args.seed)
    model.to(args.device)

    # 3. Embeddings, computed once
    texts = training_texts(model, processor, recipe.data)
    clips = [read_source(source, 0.0) for source in recipe.data.validation]
    held_out = ConcatDataset(predicted_texts(model, processor, clips)) if clips else None
    if held_out is None and args.eval_strategy != "no":
        raise RecipeError("data.validation: training.eval_strategy asks for some; name sources.")

    # 4. Train
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=texts,
        eval_dataset=held_out,
        data_collator=DecoderCollator(processor),
        callbacks=[ProgressLine(), ValidationLine()],
    )
    trainer.remove_callback(PrinterCallback)  # its dictionary says less than the progress line
    if trainer.is_world_process_zero():
        print(parameter_table(model))
        print(f"{len(texts)} embeddings of texts, {len(held_out or [])} of validation clips")
    trainer.train()
    if held_out is not None:
        trainer.evaluate()

    # 5. Save what a user loads
    save(trainer, processor, recipe)
    return trainer


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
