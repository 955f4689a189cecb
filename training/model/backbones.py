"""Pretrained parts for a new VL-JEPA, from Hub ids or folders.

Weights are read from safetensors, or from GGUF for a language model. Nothing is unpickled, except
published `.pt` files of V-JEPA 2.1 and the Perception Encoder, by torch's restricted unpickler,
which runs no code. Each reader returns a part's configuration, its weights under the names that our
module uses, and its video processor or tokenizer, pooling and prompts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import get_size_dict

from modeling_vljepa.x_encoder import (
    PERCEPTION,
    V_JEPA_2,
    V_JEPA_2_1,
    VIDEO,
    check_config,
    frame_side,
)
from modeling_vljepa.y_encoder import POOLINGS
from processing import VLJEPAVideoProcessor
from processing.video_processing_vljepa import shortest_edge
from training.arguments import RecipeError
from training.model import perception_files, vjepa21_files
from training.model.checkpoint_files import (
    FILES,
    Weights,
    load,
    load_weights,
    public_name,
    read_file,
    read_json,
    read_tensors,
    split_gguf,
    tensor_files,
)

# Decoder-only language models whose masks follow `is_causal = False`; each is tested.
PREDICTORS = ("llama", "mistral", "qwen2", "qwen3")
LLAMA_3_PAD = "<|finetune_right_pad_id|>"  # reserved by Llama 3 and in no text
# Parts of the names of weights that V-JEPA 2.1 has and V-JEPA 2 has not.
V_JEPA_2_1_WEIGHTS = ("norms_block.", "_mod_embed", "patch_embeddings_img.", "patch_embed_img.")
# The Perception Encoder's files have no tokenizer; core/vision_encoder/tokenizer.py is CLIP's.
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
CLIP_TEXT, CLIP_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]
ACTIVATIONS = {"Identity": "linear", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}


@dataclass
class VisionBackbone:
    """An X-Encoder; `weights` are named as in `XEncoder`."""

    name: str
    config: PreTrainedConfig
    weights: Weights
    video_processor: VLJEPAVideoProcessor


@dataclass
class PredictorBackbone:
    """Layers of a language model, its token table and final norm, named as in `Predictor`."""

    name: str
    config: PreTrainedConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase


@dataclass
class TextBackbone:
    """A Y-Encoder with its Dense layers; `weights` are named as in `YEncoder`."""

    name: str
    config: PreTrainedConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "mean"
    dense: list[dict] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    prompt_name: str | None = None


@dataclass
class DecoderBackbone:
    """A whole language model; `weights` are named as in `YDecoder`."""

    name: str
    config: PreTrainedConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase


# -- the X-Encoder -------------------------------------------------------------------------


def read_vision(key: str, source: str, *, hierarchical: bool = False) -> VisionBackbone:
    """Read an X-Encoder and its preprocessing; from CLIP or SigLIP, the image tower.

    A single file is a V-JEPA 2.1 or a Perception Encoder, by the names of its tensors.

    Args:
        hierarchical: give the four levels of V-JEPA 2.1 as visual tokens, not only the last.

    Raises:
        RecipeError: it cannot be read, is not an X-Encoder, or has only one level.
    """
    if source.endswith(FILES):
        published = read_vision_file(key, source)
    else:
        published = vjepa21_files.read_vjepa21(key, source)
    if published is not None:
        config, weights = published
        check_levels(source, config, hierarchical)
        weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        if source.endswith(FILES):
            processor = pretraining_processor(config)
        else:
            processor = read_video_processor(key, source, config)
        return VisionBackbone(public_name(source), config, weights, processor)
    config = load(AutoConfig, key, source)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    try:
        check_config(config)
    except ValueError as error:
        raise RecipeError(f"{key}: {source}: {error}") from error
    check_levels(source, config, hierarchical)
    if config.model_type == V_JEPA_2:
        check_stock_weights(key, source)
    if config.model_type == PERCEPTION:  # transformers only warns of weights that are left over
        saved = perception_files.read_saved_vision(key, source, config)
        weights = {f"backbone.{name}": tensor for name, tensor in saved.items()}
    else:
        weights = load_weights(key, source, config, AutoModel)
    config.name_or_path = ""
    name = public_name(source)
    return VisionBackbone(name, config, weights, read_video_processor(key, source, config))


def read_vision_file(key: str, source: str) -> tuple[PreTrainedConfig, Weights]:
    """Return the configuration and the weights of a published file, of either kind by its names."""
    content = read_file(key, source)
    if perception_files.is_perception(content):
        return perception_files.read_vision_tower(key, source, content)
    return vjepa21_files.from_published(key, source, content)


def check_levels(source: str, config: PreTrainedConfig, hierarchical: bool) -> None:
    """Set the output of a V-JEPA 2.1; raise `RecipeError` for levels that an encoder lacks."""
    if config.model_type == V_JEPA_2_1:
        config.hierarchical_output = hierarchical
    elif hierarchical:
        raise RecipeError(
            f"--hierarchical: {source} is a {config.model_type!r}; only V-JEPA 2.1 has levels."
        )


def pretraining_processor(config: PreTrainedConfig) -> VLJEPAVideoProcessor | None:
    """Return the preprocessing of an encoder whose kind determines it; `None` for other kinds."""
    if config.model_type == PERCEPTION:  # core/vision_encoder/transforms.py: squashed, not cropped
        side = {"height": config.image_size, "width": config.image_size}
        half = [0.5, 0.5, 0.5]
        return VLJEPAVideoProcessor(size=side, crop_size=side, image_mean=half, image_std=half)
    if config.model_type in VIDEO:
        return VLJEPAVideoProcessor(crop_size=config.crop_size)
    return None


def check_stock_weights(key: str, source: str) -> None:
    """Raise `RecipeError` if the weights of a V-JEPA 2 are those of a V-JEPA 2.1.

    transformers would leave out the weights that it does not know, and only warn.
    """
    for name in sorted(tensor_files(key, source)):
        if not name.startswith("predictor.") and any(part in name for part in V_JEPA_2_1_WEIGHTS):
            raise RecipeError(
                f"{key}: {source} has {name}, a weight of V-JEPA 2.1, but its config.json "
                "describes a V-JEPA 2. Give the published file, or a port of V-JEPA 2.1."
            )


def read_video_processor(key: str, source: str, config: PreTrainedConfig) -> VLJEPAVideoProcessor:
    """Read the encoder's own resize, crop and normalisation.

    Raises:
        RecipeError: they are missing, or the crop does not fit the encoder.
    """
    settings = read_json(source, "video_preprocessor_config.json") or read_json(
        source, "preprocessor_config.json"
    )
    is_video = config.model_type in VIDEO
    if settings is None:
        if processor := pretraining_processor(config):
            return processor
        raise RecipeError(
            f"{key}: {source} has no preprocessor_config.json, so its normalisation of pixels is "
            "unknown. Save its image processor into the folder."
        )
    kept = {
        name: settings[name]
        for name in ("resample", "rescale_factor", "image_mean", "image_std")
        if settings.get(name) is not None
    }
    side = frame_side(config)
    size = settings.get("size") or (shortest_edge(side) if is_video else side)
    size = get_size_dict(size, default_to_square=False)
    # A tower trained on frames resized to squares has a size but no crop; then crop to that size.
    crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    if "crop_pct" in settings:
        crop, size = crop_of_share(size["shortest_edge"], settings["crop_pct"])
    crop = get_size_dict(crop or size.get("shortest_edge") or dict(size), param_name="crop_size")
    processor = VLJEPAVideoProcessor(size=dict(size), crop_size=dict(crop), **kept)
    if is_video and processor.crop_size["height"] != config.crop_size:
        raise RecipeError(
            f"{key}: {source} crops to {processor.crop_size['height']} pixels, but its config.json "
            f"states a crop_size of {config.crop_size}. Correct its video_preprocessor_config.json."
        )
    return processor


def crop_of_share(side: int, share: float) -> tuple[dict[str, int], dict[str, int]]:
    """Return the crop and the size of frames as ConvNeXt's image processor computes them.

    Frames are resized so that the crop is this share of their shortest edge, or squashed from 384
    pixels on.
    """
    crop = {"height": side, "width": side}
    return crop, {"shortest_edge": int(side / share)} if side < 384 else crop


# -- the Predictor -------------------------------------------------------------------------


def parse_layers(key: str, layers: str, total: int) -> range:
    """Parse `"8"`, the last eight layers, or `"0-8"`, the first eight, as in the paper's table 7d.

    `"0"` is no layer: the final norm alone, a baseline.

    Args:
        total: number of layers of the language model.

    Raises:
        RecipeError: neither form, or layers that the model does not have.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", layers)
    if match is None:
        raise RecipeError(
            f"{key}: {layers!r} is neither a number nor a range of layers such as 8-16."
        )
    first, last = int(match[1]), match[2]
    kept = range(total - first, total) if last is None else range(first, int(last))
    if not kept and layers != "0" or kept.start < 0 or kept.stop > total:
        raise RecipeError(f"{key}: {layers} is not within the model's {total} layers.")
    return kept


def layer_name(kept: range) -> Callable[[str], str | None]:
    """Return a function that renames tensors of the language model for the Predictor.

    It returns `None` for layers that are not `kept`, and renumbers the others from 0.
    """

    def rename(name: str) -> str | None:
        name = name.removeprefix("model.")
        if name in ("embed_tokens.weight", "norm.weight"):
            return f"backbone.{name}"
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None or int(match[1]) not in kept:
            return None
        return f"backbone.layers.{kept.index(int(match[1]))}.{match[2]}"

    return rename


def read_predictor(source: str, layers: str, pad_token: str | None = None) -> PredictorBackbone:
    """Read layers of a language model, its final norm and its token table.

    Shards that contain only other layers are not read. transformers reads a GGUF file as a whole.

    Args:
        layers: see `parse_layers`.
        pad_token: padding token of the queries; default: see `choose_pad_token`.
    """
    key, (folder, options) = "--predictor", split_gguf(source)
    config = load(AutoConfig, key, folder, **options)
    if config.model_type not in PREDICTORS:
        raise RecipeError(
            f"{key}: {source} is a {config.model_type!r}; give a decoder-only language model: "
            f"{', '.join(PREDICTORS)}."
        )
    total = config.num_hidden_layers
    kept = parse_layers("--layers", layers, total)
    rename = layer_name(kept)
    if options:
        model = load(AutoModel, key, folder, dtype=torch.float32, **options)
        weights = {rename(k): v for k, v in model.state_dict().items() if rename(k) is not None}
    else:
        weights = read_tensors(key, folder, rename)
    config.num_hidden_layers = len(kept)
    if "layer_types" in config.to_dict():
        config.layer_types = config.layer_types[kept.start : kept.stop]
    tokenizer = load(AutoTokenizer, key, folder, **options)
    tokenizer.pad_token = choose_pad_token(tokenizer, pad_token)
    set_special_tokens(config, tokenizer)
    config.name_or_path = ""
    return PredictorBackbone(public_name(source), config, weights, tokenizer)


def set_special_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a language model's special tokens to its tokenizer's; Trainer would do so and warn."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None:
            setattr(config, name, token)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, wished: str | None) -> str:
    """Return a padding token that occurs in no text.

    A token that also ends texts would be masked there, so such a padding token is not used.

    Args:
        wished: token to use instead of the default: Llama 3's reserved one or the tokenizer's own.

    Raises:
        RecipeError: the tokenizer lacks `wished`, or has no suitable token.
    """
    vocabulary = tokenizer.get_vocab()
    if wished is not None:
        if wished not in vocabulary:
            raise RecipeError(f"--pad-token: the query tokenizer has no token {wished!r}.")
        return wished
    if LLAMA_3_PAD in vocabulary:
        return LLAMA_3_PAD
    if tokenizer.pad_token not in (None, tokenizer.eos_token, tokenizer.bos_token):
        return tokenizer.pad_token
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    raise RecipeError(
        "--pad-token: the query tokenizer has no padding token, or one that also begins or ends "
        f"texts. Choose one that occurs in no query, among {special[:20]}."
    )


# -- the Y-Encoder -------------------------------------------------------------------------


def read_text(
    key: str,
    source: str,
    *,
    with_dense: bool = True,
    pooling: str | None = None,
    tokenizer: str | None = None,
) -> TextBackbone:
    """Read a text encoder.

    A sentence-transformers model comes with its pooling, Dense layers, length limit and prompts,
    CLIP's text tower with its projection; from an encoder-decoder, only the encoder is read.

    Args:
        key: the setting that names the source, for errors.
        source: folder or Hub id.
        with_dense: keep the Dense layers or projection.
        pooling: replaces the source's own pooling, which defaults to the mean.
        tokenizer: folder or Hub id of the tokenizer of a source that has none, a published file of
            a Perception Encoder. Default: `CLIP_TOKENIZER`.

    Raises:
        RecipeError: it cannot be read, or has a tokenizer of its own.
    """
    if source.endswith(FILES):
        part = read_text_file(key, source, tokenizer or CLIP_TOKENIZER, with_dense)
        part.pooling = pooling or part.pooling
        return part
    if tokenizer is not None:
        raise RecipeError(
            f"--text-tokenizer: {source} has a tokenizer of its own; remove the option."
        )
    modules = read_json(source, "modules.json")
    own = load(AutoConfig, key, source)
    config = own.text_config if "text_config" in own.sub_configs else own
    part = TextBackbone(public_name(source), config, {}, load(AutoTokenizer, key, source))
    part.weights = read_text_weights(key, source, config)
    if modules is not None:
        read_sentence_transformer(key, source, modules, part, with_dense)
    elif config.model_type == "clip_text_model":
        part.pooling = "lasttoken"
        if with_dense:
            names = {"text_projection.weight": "dense.0.linear.weight"}
            part.weights |= read_tensors(key, source, names.get)
            width = own.projection_dim
            part.dense = [{"out_features": width, "bias": False, "activation": "linear"}]
    if pooling is not None:
        part.pooling = pooling
    # CLIP pads with the token that also ends texts, so there its id does not mark padding.
    pad = part.tokenizer.pad_token_id
    if pad in part.tokenizer("a text")["input_ids"]:
        pad = None
    config.pad_token_id = pad
    config.name_or_path = ""
    return part


def read_text_file(key: str, source: str, tokenizer: str, with_dense: bool) -> TextBackbone:
    """Read the text tower of a Perception Encoder, with its projection as a Dense layer.

    Raises:
        RecipeError: it cannot be read, or the tokenizer is not CLIP's.
    """
    content = read_file(key, source)
    if not perception_files.is_perception(content):
        raise RecipeError(
            f"{key}: {source} is not a Perception Encoder, the only model whose text tower is read "
            "from a single file; give a folder or Hub id."
        )
    config, weights, projection = perception_files.read_text_tower(key, source, content)
    part = TextBackbone(public_name(source), config, {}, load(AutoTokenizer, key, tokenizer))
    check_clip_tokenizer(tokenizer, part.tokenizer, config)
    part.tokenizer.model_max_length = config.max_position_embeddings
    part.pooling = "lasttoken"  # published: the token of the highest id, which ends a text
    part.weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    if with_dense:
        part.weights["dense.0.linear.weight"] = projection
        out = config.projection_dim
        part.dense = [{"out_features": out, "bias": False, "activation": "linear"}]
    return part


def check_clip_tokenizer(
    source: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> None:
    """Raise `RecipeError` unless a tokenizer gives the ids of the published one.

    One sentence reveals another vocabulary, another order and missing special tokens.
    """
    ids = tokenizer(CLIP_TEXT)["input_ids"]
    if len(tokenizer) != config.vocab_size or ids != CLIP_IDS:
        raise RecipeError(
            f"--text-tokenizer: {source} is not CLIP's, which the Perception Encoder reads: it "
            f"encodes {CLIP_TEXT!r} as {ids}, not as {CLIP_IDS}. Give {CLIP_TOKENIZER}."
        )


def read_text_weights(key: str, source: str, config: PreTrainedConfig) -> Weights:
    """Read the weights of the encoder, which may have been saved alone or with a decoder."""
    if not config.is_encoder_decoder:
        return load_weights(key, source, config, AutoModel)
    with torch.device("meta"):
        encoder = type(AutoModel.from_config(config).get_encoder())
    names = {r"^(model\.)?encoder\.": "", r"^(model\.)?shared\.": "embed_tokens."}
    return load_weights(key, source, config, encoder, key_mapping=names)


def read_sentence_transformer(
    key: str, source: str, modules: list[dict], part: TextBackbone, with_dense: bool
) -> None:
    """Fill in `part` from the modules of a sentence-transformers model.

    Raises:
        RecipeError: a module that the Y-Encoder does not have.
    """
    for module in modules:
        kind, path = module["type"].rsplit(".", 1)[-1], module["path"]
        if kind == "Transformer" and path == "":
            limits = read_json(source, "sentence_bert_config.json") or {}
            if limit := limits.get("max_seq_length"):
                part.tokenizer.model_max_length = min(limit, part.tokenizer.model_max_length)
        elif kind == "Pooling":
            part.pooling = read_pooling(key, read_json(source, f"{path}/config.json"))
        elif kind == "Dense":
            if with_dense:
                read_dense(key, source, path, part)
        elif kind != "Normalize":
            raise RecipeError(
                f"{key}: {source} has a module {module['type']} at {path!r}. Supported are a "
                "transformer in the root folder, a pooling, Dense layers and a normalisation."
            )
    prompts = read_json(source, "config_sentence_transformers.json") or {}
    part.prompts = prompts.get("prompts") or {}
    part.prompt_name = prompts.get("default_prompt_name")


def read_pooling(key: str, settings: dict) -> str:
    """Return the name of the pooling, from settings of any version of sentence-transformers.

    Version 6 stores a name, older ones a boolean for each kind.
    """
    name = settings.get("pooling_mode")
    if name is None:
        prefix = "pooling_mode_"
        old = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
        chosen = [k.removeprefix(prefix) for k, on in settings.items() if k[:13] == prefix and on]
        name = old.get(chosen[0], chosen[0]) if len(chosen) == 1 else " + ".join(chosen)
    if name not in POOLINGS:
        raise RecipeError(f"{key}: the pooling {name!r} is not one of {', '.join(POOLINGS)}.")
    if not settings.get("include_prompt", True):
        raise RecipeError(f"{key}: a pooling that leaves the prompt out is not supported.")
    return name


def read_dense(key: str, source: str, path: str, part: TextBackbone) -> None:
    """Append to `part` the Dense layer in the sub-folder `path`."""
    settings = read_json(source, f"{path}/config.json")
    activation = settings["activation_function"].rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise RecipeError(
            f"{key}: the activation {activation} of {path} is not one of {', '.join(ACTIVATIONS)}."
        )
    prefix = f"dense.{len(part.dense)}."
    part.weights |= read_tensors(key, source, prefix.__add__, folder=path)
    part.dense.append(
        {
            "out_features": settings["out_features"],
            "bias": settings["bias"],
            "activation": ACTIVATIONS[activation],
        }
    )


# -- the Y-Decoder -------------------------------------------------------------------------


def read_decoder(key: str, source: str) -> DecoderBackbone:
    """Read a language model and its tokenizer, from a folder, a Hub id or a GGUF file."""
    folder, options = split_gguf(source)
    config = load(AutoConfig, key, folder, **options)
    tokenizer = load(AutoTokenizer, key, folder, **options)
    if tokenizer.eos_token is None:
        raise RecipeError(f"{key}: the tokenizer of {source} has no eos_token; set one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless here: a mask marks the padding
    if options:
        model = load(AutoModelForCausalLM, key, folder, dtype=torch.float32, **options)
        weights = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    else:
        weights = load_weights(key, folder, config, AutoModelForCausalLM)
    config.name_or_path = ""
    return DecoderBackbone(public_name(source), config, weights, tokenizer)
