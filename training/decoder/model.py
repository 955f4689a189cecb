"""The model in which a Y-Decoder is trained: a frozen VL-JEPA with a decoder."""

import torch
from transformers import AutoConfig, PreTrainedConfig

from eval.models import check_vljepa
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from processing import VLJEPAProcessor
from training.arguments import RecipeError
from training.decoder.recipe import DecoderModelArguments
from training.model.backbones import read_decoder, set_special_tokens
from training.model.checkpoint_files import load
from training.model.recipe_model import check_config


def new_decoder_config(settings: dict, processor: VLJEPAProcessor) -> PreTrainedConfig:
    """Return the configuration of a new decoder, with the query tokenizer's vocabulary.

    Raises:
        RecipeError: the query tokenizer has no end token.
    """
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise RecipeError(
            "model.config.decoder_config: a new decoder shares the query tokenizer, which has no "
            "eos_token. Give a pretrained model.decoder."
        )
    settings = {"model_type": "llama", **settings, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(**settings)
    set_special_tokens(config, tokenizer)
    return config


def check_decoder_config(arguments: DecoderModelArguments) -> dict:
    """Return `model.config` if all its settings are valid for a decoder.

    Raises:
        RecipeError: a setting of another module, or an invalid value.
    """
    config = check_config(arguments.config)
    for name in config:
        if not name.startswith("decoder_"):
            raise RecipeError(
                f"model.config.{name}: only settings that begin with decoder_ can change here; "
                "remove it."
            )
    if arguments.decoder is not None and "decoder_config" in config:
        raise RecipeError(
            "model.config.decoder_config: it defines a new decoder, but model.decoder has its own. "
            "Remove one of them, for example with 'model.config={decoder_prefix_tokens: 4}'."
        )
    if (tokens := config.get("decoder_prefix_tokens", 1)) < 1:
        raise RecipeError(f"model.config.decoder_prefix_tokens: it is {tokens}; give 1 or more.")
    return config


def load_decoder(path: str, config: dict) -> VLJEPAForConditionalGeneration:
    """Load a checkpoint that has a decoder; only the decoder is trainable.

    Raises:
        RecipeError: it does not load, or its decoder has other settings than `config`.
    """
    model = load(VLJEPAForConditionalGeneration, "model.checkpoint", path)
    for name, value in config.items():
        if (current := vars(model.config)[name]) != value:
            raise RecipeError(
                f"model.config.{name}: the checkpoint's decoder has {current!r}, which cannot "
                "change. Remove it, or give model.decoder or model.config.decoder_config."
            )
    model.y_decoder.float()  # bf16 weights would hardly move
    model.vljepa.requires_grad_(False)
    return model


def with_decoder(
    arguments: DecoderModelArguments, seed: int
) -> tuple[VLJEPAForConditionalGeneration, VLJEPAProcessor]:
    """Return the checkpoint's model and processor with the recipe's decoder.

    The decoder is the checkpoint's own, a pretrained one or a new one. Only it is trainable.

    Args:
        seed: seed of the decoder's new weights.

    Raises:
        RecipeError: the checkpoint or decoder does not load, or the settings do not fit it.
        TokenModelError: the checkpoint predicts tokens.
    """
    config = check_decoder_config(arguments)
    path = arguments.checkpoint
    saved = load(AutoConfig, "model.checkpoint", path)
    check_vljepa("model.checkpoint", path, saved, "a Y-Decoder decodes a VL-JEPA's embeddings")
    processor = load(VLJEPAProcessor, "model.checkpoint", path)
    if arguments.decoder is None and "decoder_config" not in config:
        return load_decoder(path, config), processor

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
    # Built whole, then given the loaded base: `load` on the checkpoint would raise for the missing
    # weights of the decoder.
    model = VLJEPAForConditionalGeneration(base.config)
    model.vljepa = base
    if part is not None:
        missing, _ = model.y_decoder.load_state_dict(part.weights, strict=False)
        if absent := [name for name in missing if name.startswith("backbone.")]:
            raise RecipeError(
                f"model.decoder: {arguments.decoder} lacks {absent[0]}; give a complete checkpoint."
            )
    model.vljepa.requires_grad_(False)
    return model, processor
