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

import os
import pickle
import re
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_vljepa.vjepa21 import VJEPA21Config, VJEPA21Model
from modeling_vljepa.x_encoder import V_JEPA_2_1, V_JEPA_2_1_SETTINGS, unknown_settings
from training.arguments import RecipeError
from training.model.checkpoint_files import Weights, find_file, read_json, read_tensors


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
FILES = (".pt", ".safetensors")  # a single file with published names, without a configuration
PREFIXES = ("module.", "backbone.", "model.", "vjepa21.", "vjepa2.")
# Parts of ports that are no part of the encoder.
OTHER_PARTS = ("predictor.", "pooler.", "classifier.")

# Names of model types of ports. Their classes have names such as VJEPA21Model.
PORTS = (V_JEPA_2_1, "vjepa21", "vjepa2.1")
# Other names of settings, and what they are here.
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


def plain_name(name: str) -> str:
    """Return the name of a tensor without the prefixes of wrappers."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


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


def check_shapes(
    key: str,
    source: str,
    found: dict[str, torch.Size],
    wanted: dict[str, torch.Size],
    optional: set[str],
) -> None:
    """Raise `RecipeError` for a missing, extra or misshapen tensor, with its name."""
    for name in sorted(wanted.keys() - found.keys() - optional):
        raise RecipeError(f"{key}: {source} lacks {name}; give a complete V-JEPA 2.1.")
    for name in sorted(found.keys() - wanted.keys()):
        raise RecipeError(
            f"{key}: {source} has {name}, which this V-JEPA 2.1 does not have; give another file."
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise RecipeError(
                f"{key}: {source} has {name} of shape {tuple(shape)}, but this size of V-JEPA 2.1 "
                f"has {tuple(wanted[name])}; give another file."
            )


# -- published files -----------------------------------------------------------------------


def read_published(key: str, source: str) -> tuple[VJEPA21Config, Weights]:
    """Read a published `.pt` file, with torch's restricted unpickler, or the same as safetensors.

    Raises:
        RecipeError: it is missing or broken, and as `from_published` raises it.
    """
    folder, file = os.path.split(source)
    try:
        path = source if os.path.isfile(source) else find_file(folder, file) if folder else None
    except OSError as error:
        raise RecipeError(f"{key}: cannot load {source}: {error}") from error
    if path is None:
        raise RecipeError(f"{key}: {source} does not exist; give a .pt file, a folder or a Hub id.")
    try:
        if path.endswith(".safetensors"):
            return from_published(key, source, {ENCODERS[0]: load_file(path)})
        # Mapped, because a file also holds the predictor and the optimizer's state.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{key}: {source} is not a file of tensors: {reason}") from error
    return from_published(key, source, content)


def from_published(key: str, source: str, content: Any) -> tuple[VJEPA21Config, Weights]:
    """Return the configuration and the weights, under our names, in the content of a `.pt` file.

    Raises:
        RecipeError: it is no V-JEPA 2.1 of a published size.
    """
    weights = encoder_of(key, source, content)
    config = published_config(key, source, weights)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check_shapes(key, source, shapes, published_shapes(config), set())
    return config, to_ours(weights)


def is_weights(content: Any) -> bool:
    """Return True for a dictionary of named tensors."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    )


def encoder_of(key: str, source: str, content: Any) -> Weights:
    """Return the encoder's tensors of a `.pt` file under their names without prefixes."""
    names = list(content) if isinstance(content, dict) else []
    for name in ENCODERS:
        if name in names and is_weights(content[name]):
            weights = {plain_name(k): v for k, v in content[name].items()}
            if len(weights) < len(content[name]):
                raise RecipeError(f"{key}: {source} has two tensors of one name in {name}.")
            return weights
    raise RecipeError(
        f"{key}: {source} has no {' or '.join(ENCODERS)}, the encoders of V-JEPA 2.1's files; it "
        f"has {', '.join(map(str, names[:5])) or 'no names'}."
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
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(name, None)
    try:
        config = VJEPA21Config(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(f"{key}: {source}: config.json: {error}") from error
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
        name = plain_name(name)
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
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check_shapes(key, source, shapes, wanted, optional)
    return config, to_ours(weights) if is_published else weights


def read_vjepa21(key: str, source: str) -> tuple[VJEPA21Config, Weights] | None:
    """Read a V-JEPA 2.1 from a `.pt` file, or a folder or Hub id; `None` for anything else.

    Weights are named as in `VJEPA21Model`.
    """
    if source.endswith(FILES):
        return read_published(key, source)
    try:
        settings = read_json(source, "config.json")
    except (OSError, ValueError):  # `load` names the fault
        return None
    if not isinstance(settings, dict) or not is_port(settings):
        return None
    return read_port(key, source, settings)
