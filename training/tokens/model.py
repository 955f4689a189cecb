"""The token model that a recipe starts with, from the VL-JEPA that the recipe starts with."""

import copy

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_vljepa import VLJEPAConfig, VLJEPAModel, VLJEPATokenConfig, VLJEPATokenModel
from processing import VLJEPAProcessor
from training.arguments import Recipe, RecipeError
from training.data.sources import Source, StreamedSource
from training.model.backbones import DecoderBackbone, read_decoder, set_special_tokens
from training.model.checkpoint_files import load
from training.model.recipe_model import check_config, load_processor, start_model
from training.tokens.recipe import TokenModelArguments

KEY = "model.language_model"
# Weights that the token model shares with the VL-JEPA of its recipe; those of the second line
# belong to a hybrid.
SHARED = ("x_encoder.", "predictor.visual_standardization.", "predictor.visual_projection.")
EMBEDDING = ("predictor_head.", "y_encoder.", "y_head.", "logit_scale.", "logit_bias.")


def language_model_config(
    base: VLJEPAConfig, part: DecoderBackbone | None, processor: VLJEPAProcessor
) -> PreTrainedConfig:
    """Return the configuration of the language model: a pretrained one's, or a new one's with
    twice the Predictor's layers.

    Raises:
        RecipeError: the language model is of another family or width, or has another vocabulary.
    """
    predictor = base.predictor_config
    if part is None:
        config = copy.deepcopy(predictor)
        config.num_hidden_layers = 2 * predictor.num_hidden_layers
        if "layer_types" in config.to_dict() and config.layer_types is not None:
            config.layer_types = 2 * list(predictor.layer_types)
        return config
    config = part.config
    for name in ("model_type", "hidden_size"):
        found, wanted = getattr(config, name), getattr(predictor, name)
        if found != wanted:
            raise RecipeError(
                f"{KEY}: {part.name} has {name} {found!r}, but the recipe's Predictor has "
                f"{wanted!r}; give the language model of which it has layers."
            )
    if config.vocab_size < len(processor.tokenizer):
        raise RecipeError(
            f"{KEY}: {part.name} has {config.vocab_size} tokens, but the query tokenizer has "
            f"{len(processor.tokenizer)}; give the language model of which the Predictor has "
            "layers."
        )
    theirs = part.tokenizer.get_vocab()
    for token, index in processor.tokenizer.get_vocab().items():
        if theirs.get(token) != index:
            raise RecipeError(
                f"{KEY}: {part.name} has another tokenizer than the recipe's Predictor: {token!r} "
                f"is {theirs.get(token, 'missing')} and not {index}; give the language model of "
                "which the Predictor has layers."
            )
    set_special_tokens(config, processor.tokenizer)
    return config


def token_model(
    base: VLJEPAModel,
    processor: VLJEPAProcessor,
    *,
    part: DecoderBackbone | None,
    is_hybrid: bool,
    seed: int,
) -> VLJEPATokenModel:
    """Build the token model that is compared with a VL-JEPA.

    X-Encoder and visual projection start from the same weights. The language model trains with its
    token table, which a new or tied output layer needs.

    Args:
        base: the VL-JEPA that the recipe starts with.
        part: the pretrained language model; without one, it starts from random weights.
        is_hybrid: the model also predicts embeddings, from the same heads and Y-Encoder.
        seed: seed of the random weights.

    Raises:
        RecipeError: the language model does not fit, or lacks a weight.
    """
    if processor.tokenizer.eos_token is None:
        raise RecipeError(
            "model: the query tokenizer has no eos_token, so a language model could not end a "
            "text; set one."
        )
    # The fields that VLJEPAConfig declares, without the facts of saving.
    names = VLJEPAConfig.__annotations__.keys() - {"decoder_config"}
    settings = {name: copy.deepcopy(getattr(base.config, name)) for name in names}
    settings["predictor_config"] = language_model_config(base.config, part, processor)
    settings["backbones"].pop("decoder", None)
    if part is not None:
        settings["backbones"]["predictor"] = part.name
    settings |= {"freeze_token_embedding": False, "predicts_embeddings": is_hybrid}
    torch.manual_seed(seed)
    model = VLJEPATokenModel(VLJEPATokenConfig(**settings))
    shared = SHARED + EMBEDDING * is_hybrid
    weights = {name: w for name, w in base.state_dict().items() if name.startswith(shared)}
    if part is not None:
        weights |= {f"predictor.{name}": weight for name, weight in part.weights.items()}
    missing, _ = model.load_state_dict(weights, strict=False)
    tied = model.predictor.all_tied_weights_keys.keys()
    absent = [
        name
        for name in missing
        if name.startswith("predictor.backbone.") and name.removeprefix("predictor.") not in tied
    ]
    if part is not None and absent:
        raise RecipeError(f"{KEY}: {part.name} lacks {absent[0]}; give a complete checkpoint.")
    model.freeze()
    return model


def load_token_model(
    arguments: TokenModelArguments, recipe: Recipe
) -> tuple[VLJEPATokenModel, VLJEPAProcessor]:
    """Load the token model and processor of `checkpoint`, to train it further.

    Raises:
        RecipeError: they do not load, or the recipe changes other settings than those that freeze.
    """
    path = arguments.checkpoint
    if arguments.language_model is not None:
        raise RecipeError(f"{KEY}: {path} has a language model already; remove it.")
    config = load(AutoConfig, "model.checkpoint", path)
    for name, value in check_config(arguments.config, config).items():
        if not name.startswith("freeze_"):
            raise RecipeError(
                f"model.config.{name}: {path} is a token model already, of which only settings "
                "that begin with freeze_ change; remove it."
            )
        setattr(config, name, value)
    config.freeze_token_embedding = False
    model = load(VLJEPATokenModel, "model.checkpoint", path, config=config, dtype=torch.float32)
    is_hybrid = recipe.training.is_hybrid
    if model.config.predicts_embeddings != is_hybrid:
        raise RecipeError(
            f"training.token_loss_weight: it is {recipe.training.token_loss_weight}, but "
            f"{path} {'has no embeddings' if is_hybrid else 'is a hybrid'}; give "
            f"{'1' if is_hybrid else 'less than 1'}."
        )
    for name in ("prompts", "target_prompts"):  # the configuration keeps those not given
        setattr(model.config, name, vars(arguments)[name])
    return model, load_processor(arguments, recipe.processor)


def start_token_model(
    recipe: Recipe, sources: list[Source | StreamedSource]
) -> tuple[VLJEPATokenModel, VLJEPAProcessor]:
    """Return the token model and processor that training starts with.

    Raises:
        RecipeError: see `token_model`; or the Predictor has pretrained layers, and
            `model.language_model` does not name the model that they are from.
    """
    arguments = recipe.model
    if arguments.checkpoint is not None:
        settings, _ = VLJEPAConfig.get_config_dict(arguments.checkpoint)
        if settings.get("model_type") == VLJEPATokenConfig.model_type:
            return load_token_model(arguments, recipe)
    base, processor = start_model(recipe, sources)
    processor.decoder_tokenizer = None
    origin = base.config.backbones.get("predictor")
    if origin is not None and arguments.language_model is None:
        raise RecipeError(
            f"{KEY}: the recipe's Predictor has layers of {origin}; give this language model's "
            "folder or Hub id."
        )
    part = None
    if arguments.language_model is not None:
        part = read_decoder(KEY, arguments.language_model)
    model = token_model(
        base,
        processor,
        part=part,
        is_hybrid=recipe.training.is_hybrid,
        seed=recipe.training.seed,
    )
    return model, processor


__all__ = ["start_token_model", "token_model"]
