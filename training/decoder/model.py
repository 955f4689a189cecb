"""The model that a Y-Decoder is trained in: the checkpoint of a VL-JEPA, frozen, with a decoder."""

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)

from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from processing import VLJEPAProcessor
from training.arguments import (
    RecipeError,
)
from training.decoder.recipe import DecoderModelArguments
from training.model.backbones import read_decoder
from training.model.checkpoint_files import load
from training.model.recipe_model import check_config


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
