"""V-JEPA 2.1's weights, from the published `.pt` files and from the safetensors ports of others.

Both name their tensors in one of two ways:

| published                        | ports for transformers, and here                           |
|----------------------------------|------------------------------------------------------------|
| `patch_embed.proj.*`             | `encoder.embeddings.patch_embeddings.proj.*`               |
| `patch_embed_img.proj.*`         | `encoder.embeddings.patch_embeddings_img.proj.*`           |
| `img_mod_embed`, `video_mod_…`   | `encoder.embeddings.img_mod_embed`, `….video_mod_embed`    |
| `blocks.i.norm1.*`, `norm2.*`    | `encoder.layer.i.norm1.*`, `norm2.*`                       |
| `blocks.i.attn.qkv.*`            | `encoder.layer.i.attention.query.*`, `key.*`, `value.*`    |
| `blocks.i.attn.proj.*`           | `encoder.layer.i.attention.proj.*`                         |
| `blocks.i.mlp.fc1.*`, `fc2.*`    | `encoder.layer.i.mlp.fc1.*`, `fc2.*`                       |
| `norms_block.k.*`                | `encoder.norms_block.k.*`; the last `encoder.layernorm.*`  |
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_vljepa.vjepa21 import VJEPA21Config, VJEPA21Model
from modeling_vljepa.x_encoder import V_JEPA_2_1, V_JEPA_2_1_SETTINGS, unknown_settings
from training.arguments import RecipeError
from training.model.checkpoint_files import (
    Weights,
    check_shapes,
    is_weights,
    plain_name,
    read_json,
    read_tensors,
    strip_prefixes,
)

MODEL = "V-JEPA 2.1"


@dataclass
class Size:
    """A published size."""

    name: str
    depth: int
    heads: int
    mlp: int
    file: str


# By width: the constructors and file names of the published code.
SIZES = {
    768: Size("ViT-B", 12, 12, 3072, "vjepa2_1_vitb_dist_vitG_384.pt"),
    1024: Size("ViT-L", 24, 16, 4096, "vjepa2_1_vitl_dist_vitG_384.pt"),
    1408: Size("ViT-g", 40, 22, 6144, "vjepa2_1_vitg_384.pt"),
    1664: Size("ViT-G", 48, 26, 8192, "vjepa2_1_vitG_384.pt"),
}
ENCODERS = ("ema_encoder", "target_encoder")  # keys of a `.pt` file: distilled, and trained alone
PREFIXES = ("module.", "backbone.", "model.", "_orig_mod.", "vjepa21.", "vjepa2.")
# Parts of ports that the encoder does not have.
OTHER_PARTS = ("predictor.", "pooler.", "classifier.")

# Names of model types of ports. Their classes have names such as VJEPA21Model.
PORTS = (V_JEPA_2_1, "vjepa21", "vjepa2.1")
# Other names of settings, and their names here.
RENAMED = {"modality_embedding": "use_modality_embeddings"}
# Settings of ports with the one value that is implemented here.
FIXED = {"use_rope_interleave": True, "n_registers": 0, "has_cls_first": False}
# Settings of the predictor, of poolers and of training; `pred_...` belong to them.
NOT_THE_ENCODERS = {
    "n_output_distillation",
    "num_distillation_outputs",
    "return_all_tokens",
    "teacher_embed_dim",
    "use_context_projection",
    "wide_silu",
}


# -- names and shapes ----------------------------------------------------------------------


def our_names(name: str) -> list[str]:
    """Return our names of a published tensor; three for fused queries, keys and values."""
    if name.endswith("_mod_embed"):
        return [f"encoder.embeddings.{name}"]
    if match := re.fullmatch(r"patch_embed(_img)?\.(.+)", name):
        return [f"encoder.embeddings.patch_embeddings{match[1] or ''}.{match[2]}"]
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        layer = f"encoder.layer.{match[1]}.attention"
        return [f"{layer}.{part}.{match[2]}" for part in ("query", "key", "value")]
    name = re.sub(r"^blocks\.(\d+)\.attn\.", r"layer.\1.attention.", name)
    return ["encoder." + re.sub(r"^blocks\.", "layer.", name)]


def to_ours(weights: Weights) -> Weights:
    """Return published weights under our names."""
    ours = {}
    for name, tensor in weights.items():
        names = our_names(name)
        # Copies: safetensors does not save tensors that share memory.
        parts = [part.clone() for part in tensor.chunk(3)] if len(names) == 3 else [tensor]
        ours |= dict(zip(names, parts, strict=True))
    return ours


def our_shapes(config: VJEPA21Config) -> dict[str, torch.Size]:
    """Return the shapes of all weights of an encoder, under our names."""
    with torch.device("meta"):
        model = VJEPA21Model(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def published_shapes(config: VJEPA21Config) -> dict[str, torch.Size]:
    """Return the shapes of all weights of an encoder, under the published names."""
    shapes = {}
    for name, shape in our_shapes(config).items():
        name = name.removeprefix("encoder.").removeprefix("embeddings.")
        name = name.replace("patch_embeddings", "patch_embed")
        name = re.sub(r"^layer\.", "blocks.", name).replace(".attention.", ".attn.")
        name = re.sub(r"\.(query|key|value)\.", ".qkv.", name)
        fused = ".qkv." in name
        shapes[name] = torch.Size([3 * shape[0], *shape[1:]]) if fused else shape
    return shapes


# -- published files -----------------------------------------------------------------------


def from_published(key: str, source: str, content: Any) -> tuple[VJEPA21Config, Weights]:
    """Return the configuration and the weights, under our names, of the content of a file.

    Raises:
        RecipeError: it is not a V-JEPA 2.1 of a published size.
    """
    weights = strip_prefixes(key, source, encoder_of(key, source, content), PREFIXES)
    config = published_config(key, source, weights)
    check_shapes(key, source, MODEL, weights, published_shapes(config))
    return config, to_ours(weights)


def encoder_of(key: str, source: str, content: Any) -> Weights:
    """Return the encoder's tensors in the content of a `.pt` file, or all of a safetensors file."""
    if is_weights(content) and content:
        return content
    names = list(content) if isinstance(content, dict) else []
    for name in ENCODERS:
        if name in names and is_weights(content[name]):
            return content[name]
    raise RecipeError(
        f"{key}: {source} has no {' or '.join(ENCODERS)}, the encoders of V-JEPA 2.1's files, and "
        "no tensors of a Perception Encoder; it has "
        f"{', '.join(map(str, names[:5])) or 'no names'}."
    )


def published_config(key: str, source: str, weights: Weights) -> VJEPA21Config:
    """Return the configuration of the published size to which the weights belong.

    Raises:
        RecipeError: they are of a V-JEPA 2, or of no published size.
    """
    stem = weights.get("patch_embed.proj.weight")
    if stem is not None and "norm.weight" in weights and "norms_block.0.weight" not in weights:
        raise RecipeError(
            f"{key}: {source} is a V-JEPA 2, which has one final norm and no norms_block. Give its "
            "checkpoint for transformers, such as facebook/vjepa2-vitl-fpc64-256."
        )
    if stem is None or stem.ndim != 5:
        raise RecipeError(
            f"{key}: {source} lacks a patch_embed.proj.weight of five axes; give another file."
        )
    if stem.shape[0] not in SIZES:
        files = [size.file for size in SIZES.values()]
        raise RecipeError(
            f"{key}: {source} has {stem.shape[0]} features, but V-JEPA 2.1 was published with "
            f"{', '.join(map(str, SIZES))}; give one of {', '.join(files)}."
        )
    size = SIZES[stem.shape[0]]
    return VJEPA21Config(
        hidden_size=stem.shape[0],
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        mlp_ratio=size.mlp / stem.shape[0],
    )


# -- ports ---------------------------------------------------------------------------------


def is_port(settings: dict) -> bool:
    """Return True if `config.json` describes a V-JEPA 2.1, whatever its class is named.

    Settings that are off, such as a false `use_rope_interleave`, describe a V-JEPA 2.
    """
    kind = str(settings.get("model_type"))
    if kind in PORTS:
        return True
    newer = V_JEPA_2_1_SETTINGS - {"num_distillation_outputs"}
    return kind.startswith("vjepa") and any(settings.get(name) for name in newer)


def port_config(key: str, source: str, settings: dict) -> VJEPA21Config:
    """Return our configuration for a port's `config.json`.

    Raises:
        RecipeError: a setting that is not implemented here.
    """
    settings = dict(settings)
    for name in [n for n in settings if n in NOT_THE_ENCODERS or n.startswith("pred_")]:
        del settings[name]
    for name, only in FIXED.items():
        if settings.pop(name, only) != only:
            raise RecipeError(
                f"{key}: {source} has a {name} other than {only}, which is not implemented; give a "
                "published V-JEPA 2.1."
            )
    for ours, theirs in RENAMED.items():
        if theirs in settings:
            settings[ours] = settings.pop(theirs)
    if "use_image_patch_embedder" in settings:
        has_stem = settings.pop("use_image_patch_embedder")
        settings["img_temporal_dim_size"] = 1 if has_stem else None
    if "image_size" in settings:  # V-JEPA 2's second name of the crop
        side = settings.pop("image_size")
        if settings.setdefault("crop_size", side) != side:
            raise RecipeError(
                f"{key}: {source} has an image_size of {side} and a crop_size of "
                f"{settings['crop_size']}; correct its config.json."
            )
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(name, None)
    try:
        config = VJEPA21Config(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # strict errors have several lines
        raise RecipeError(f"{key}: {source}: config.json: {reason}") from error
    if unknown := unknown_settings(config):
        raise RecipeError(
            f"{key}: {source} has the setting {unknown[0]!r}, which is not implemented; give a "
            "published V-JEPA 2.1."
        )
    return config


def read_port(key: str, source: str, settings: dict) -> tuple[VJEPA21Config, Weights]:
    """Read a port's safetensors, in the published names or in those of transformers.

    Raises:
        RecipeError: a setting that is not implemented, or a missing, extra or misshapen tensor.
    """
    config = port_config(key, source, settings)
    last = len(config.levels) - 1

    def rename(name: str) -> str | None:
        name = plain_name(name, PREFIXES)
        if name.startswith(OTHER_PARTS):
            return None
        # Some ports have published names in a module `encoder`.
        if re.match(r"encoder\.(blocks|patch_embed|patch_embed_img|\w+_mod_embed)\b", name):
            name = name.removeprefix("encoder.")
        return re.sub(r"^encoder\.layernorm\.", f"encoder.norms_block.{last}.", name)

    try:
        wanted = our_shapes(config)
    except (KeyError, ValueError) as error:
        raise RecipeError(f"{key}: {source}: config.json: {error}") from error
    weights = read_tensors(key, source, rename)
    is_published = any(name.startswith("blocks.") for name in weights)
    if is_published:
        wanted = published_shapes(config)
        weights = {re.sub(r"^encoder\.norms", "norms", name): t for name, t in weights.items()}
    # The first levels are not read by default, so a port may lack them.
    first = tuple(f"norms_block.{level}." for level in range(last))
    optional = {name for name in wanted if name.removeprefix("encoder.").startswith(first)}
    check_shapes(key, source, MODEL, weights, wanted, optional)
    return config, to_ours(weights) if is_published else weights


def read_vjepa21(key: str, source: str) -> tuple[VJEPA21Config, Weights] | None:
    """Read a port of V-JEPA 2.1 from a folder or Hub id; return `None` for anything else.

    Weights are named as in `VJEPA21Model`.
    """
    try:
        settings = read_json(source, "config.json")
    except (OSError, ValueError):  # `load` names the fault
        return None
    if not isinstance(settings, dict) or not is_port(settings):
        return None
    return read_port(key, source, settings)
