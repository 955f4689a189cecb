"""The Perception Encoder's weights, from the published `.pt` files and from safetensors.

A file of PE core has both towers; names of its image tower begin with `visual.`. Files of PE lang
and PE spatial have the image tower alone. The text tower is transformers' CLIP text model.

| published                                  | here                                              |
|--------------------------------------------|---------------------------------------------------|
| `conv1.weight`                             | `embeddings.patch_embedding.weight`               |
| `class_embedding`                          | `embeddings.class_embedding`                      |
| `token_embedding.weight`                   | `embeddings.token_embedding.weight`               |
| `positional_embedding`                     | `embeddings.position_embedding`, text: `….weight` |
| `ln_pre.*`, `ln_post.*`, `ln_final.*`      | `pre_layernorm.*`, `post_…`, `final_layer_norm.*` |
| `transformer.resblocks.i.…`                | `layers.i.…`, text: `encoder.layers.i.…`          |
| `….ln_1.*`, `ln_2.*`                       | `….layer_norm1.*`, `layer_norm2.*`                |
| `….attn.in_proj_weight`, `in_proj_bias`    | `….self_attn.q_proj.*`, `k_proj.*`, `v_proj.*`    |
| `….attn.out_proj.*`                        | `….self_attn.out_proj.*`                          |
| `….ls_1.gamma`, `ls_2.gamma`               | `….layer_scale1`, `layer_scale2`                  |
| `….mlp.c_fc.*`, `c_proj.*`                 | `….mlp.fc1.*`, `fc2.*`                            |
| `attn_pool.*`, `proj`                      | `pooler.*`, `pooler.projection.weight`            |
| `text_projection`                          | the Dense layer after the Y-Encoder's pooling     |

Safetensors of timm and OpenCLIP have timm's names in the image tower (`TIMM`). OpenCLIP's names of
the text tower begin with `text.`.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTextConfig

from modeling_vljepa.perception_encoder import (
    POOLER_MLP_RATIO,
    PerceptionEncoderVisionConfig,
    PerceptionEncoderVisionModel,
)
from training.arguments import RecipeError
from training.model.checkpoint_files import (
    Weights,
    check_shapes,
    is_weights,
    read_tensors,
    strip_prefixes,
)

MODEL = "Perception Encoder"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """An image tower of the published code, `core/vision_encoder/config.py`.

    PE lang and PE spatial have no `output`: neither the last norm nor the pooling, which follow the
    layers in PE core.
    """

    name: str
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    side: int  # pixels
    has_class: bool = True
    is_scaled: bool = False  # layer scales
    output: int | None = None
    text: int | None = None  # width of the text tower


@dataclass(frozen=True)
class TextSize:
    """A text tower of the published code."""

    heads: int
    depth: int
    context: int  # tokens
    output: int
    vocabulary: int = 49408


SIZES = [
    Size("PE-Core-T16-384", 192, 12, 3, 768, 16, 384, output=512, text=512),
    Size("PE-Core-S16-384", 384, 12, 6, 1536, 16, 384, output=512, text=512),
    Size("PE-Core-B16-224", 768, 12, 12, 3072, 16, 224, output=1024, text=1024),
    Size("PE-Core-L14-336", 1024, 24, 16, 4096, 14, 336, output=1024, text=1024),
    Size("PE-Core-G14-448", 1536, 50, 16, 8960, 14, 448, False, output=1280, text=1280),
    Size("PE-Lang-L14-448", 1024, 23, 16, 4096, 14, 448, is_scaled=True),
    Size("PE-Lang-G14-448", 1536, 47, 16, 8960, 14, 448, False, is_scaled=True),
    Size("PE-Spatial-T16-512", 192, 12, 3, 768, 16, 512),
    Size("PE-Spatial-S16-512", 384, 12, 6, 1536, 16, 512),
    Size("PE-Spatial-B16-512", 768, 12, 12, 3072, 16, 512),
    Size("PE-Spatial-L14-448", 1024, 24, 16, 4096, 14, 448),
    Size("PE-Spatial-G14-448", 1536, 50, 16, 8960, 14, 448, False, is_scaled=True),
]
TEXT_SIZES = {  # by width
    512: TextSize(8, 12, 32, 512),
    1024: TextSize(16, 24, 32, 1024),
    1280: TextSize(20, 24, 72, 1280),
}
TEXT_MLP_RATIO = 4

# Keys under which a `.pt` file may have the tensors.
CONTAINERS = ("state_dict", "weights", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")
VISUAL, TRUNK, TEXT = "visual.", "visual.trunk.", "text."
IN_TIMM = "norm_pre."  # in timm's names, but in no published one

# timm's names of the image tower as patterns, and the published names.
TIMM = (
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^pos_embed$", "positional_embedding"),
    (r"^cls_token$", "class_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^head\.weight$", "proj"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.gamma_([12])$", r".ls_\1.gamma"),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"^attn_pool\.latent$", "attn_pool.probe"),
    (r"^attn_pool\.norm\.", "attn_pool.layernorm."),
    (r"^attn_pool\.proj\.", "attn_pool.attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
# Published names as patterns, and ours; `to_ours` also splits fused projections.
OURS = (
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^(class|token)_embedding", r"embeddings.\1_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding"),
    (r"^ln_(pre|post)\.", r"\1_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^proj$", "pooler.projection.weight"),
    (r"^transformer\.resblocks\.", "layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.ls_([12])\.gamma$", r".layer_scale\1"),
    (r"^attn_pool\.attn\.", "pooler.attention."),
    (r"^attn_pool\.", "pooler."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


# -- names and shapes ----------------------------------------------------------------------


def rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def to_ours(weights: Weights) -> Weights:
    """Return the published weights of a tower, without `text_projection`, under our names."""
    is_text = "token_embedding.weight" in weights
    ours = {}
    for published, tensor in weights.items():
        name = rename(published, OURS)
        if is_text:
            name = re.sub(r"^layers\.", "encoder.layers.", name)
            name = re.sub(r"position_embedding$", "position_embedding.weight", name)
        if match := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
            # Copies: safetensors does not save tensors that share memory.
            parts = zip("qkv", tensor.chunk(3), strict=True)
            ours |= {f"{match[1]}.{part}_proj.{match[2]}": third.clone() for part, third in parts}
        elif published == "proj":
            ours[name] = tensor.T.contiguous()
        elif published != "text_projection":
            ours[name] = tensor
    return ours


def from_timm(weights: Weights) -> Weights:
    """Return timm's weights of an image tower under the published names."""
    # timm's head has a bias of 0. The published projection has none.
    weights = {name: tensor for name, tensor in weights.items() if name != "head.bias"}
    for part in ("weight", "bias"):
        query, rest = f"attn_pool.q.{part}", f"attn_pool.kv.{part}"
        if query in weights and rest in weights:
            parts = weights.pop(query), weights.pop(rest)
            if parts[0].shape[1:] == parts[1].shape[1:]:
                weights[f"attn_pool.attn.in_proj_{part}"] = torch.cat(parts)
    published = {rename(name, TIMM): tensor for name, tensor in weights.items()}
    reshape = {
        "positional_embedding": lambda tensor: tensor.flatten(0, -2),
        "class_embedding": torch.Tensor.flatten,
        "proj": lambda tensor: tensor.T,
    }
    for name in reshape.keys() & published.keys():
        published[name] = reshape[name](published[name])
    return published


def layer_shapes(width: int, depth: int, mlp: int, is_scaled: bool) -> Shapes:
    shapes = {}
    for i in range(depth):
        name = f"transformer.resblocks.{i}"
        shapes |= linear_shapes(f"{name}.mlp.c_fc", width, mlp)
        shapes |= linear_shapes(f"{name}.mlp.c_proj", mlp, width)
        shapes |= attention_shapes(f"{name}.attn", width)
        for k in (1, 2):
            shapes |= norm_shapes(f"{name}.ln_{k}", width)
            if is_scaled:
                shapes[f"{name}.ls_{k}.gamma"] = (width,)
    return shapes


def attention_shapes(name: str, width: int) -> Shapes:
    shapes = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return shapes | linear_shapes(f"{name}.out_proj", width, width)


def linear_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes(size: Size) -> Shapes:
    """Return the shapes of an image tower under the published names, without `visual.`."""
    width = size.width
    shapes = {
        "conv1.weight": (width, 3, size.patch, size.patch),
        "positional_embedding": (size.has_class + (size.side // size.patch) ** 2, width),
        **norm_shapes("ln_pre", width),
        **layer_shapes(width, size.depth, size.mlp, size.is_scaled),
    }
    if size.has_class:
        shapes["class_embedding"] = (width,)
    if size.output is not None:
        mlp = POOLER_MLP_RATIO * width
        shapes |= norm_shapes("ln_post", width) | norm_shapes("attn_pool.layernorm", width)
        shapes |= attention_shapes("attn_pool.attn", width)
        shapes |= linear_shapes("attn_pool.mlp.c_fc", width, mlp)
        shapes |= linear_shapes("attn_pool.mlp.c_proj", mlp, width)
        shapes |= {"attn_pool.probe": (1, 1, width), "proj": (width, size.output)}
    return shapes


def text_shapes(width: int, size: TextSize) -> Shapes:
    """Return the shapes of a text tower under the published names."""
    return {
        "token_embedding.weight": (size.vocabulary, width),
        "positional_embedding": (size.context, width),
        **layer_shapes(width, size.depth, TEXT_MLP_RATIO * width, False),
        **norm_shapes("ln_final", width),
        "text_projection": (width, size.output),
    }


# -- files ---------------------------------------------------------------------------------


def tensors_of(content: Any) -> Any:
    """Return the tensors in the content of a file, or the content if it has none."""
    for name in CONTAINERS:
        if isinstance(content, dict) and is_weights(content.get(name)):
            return content[name]
    return content


def is_perception(content: Any) -> bool:
    """Return True if the tensors' names are those of a Perception Encoder, or of a CLIP."""
    tensors = tensors_of(content)
    if not is_weights(tensors):
        return False
    return any("resblocks." in name or IN_TIMM in name for name in tensors)


def split_towers(key: str, source: str, content: Any) -> tuple[Weights, Weights, str]:
    """Return the image tower's tensors, the text tower's, and the prefix of the first ones' names.

    The tensors have the published names, those of the image tower without the prefix.
    """
    weights = strip_prefixes(key, source, tensors_of(content), PREFIXES)
    has_trunk = any(name.startswith(TRUNK) for name in weights)
    for prefix in (TRUNK, VISUAL):
        visual = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        if visual:
            text = {n: t for n, t in weights.items() if not n.startswith(prefix)}
            if has_trunk:
                text = {name.removeprefix(TEXT): tensor for name, tensor in text.items()}
            return from_timm(visual) if has_trunk else visual, text, VISUAL
    if "token_embedding.weight" in weights:
        return {}, weights, VISUAL
    is_timms = any(IN_TIMM in name for name in weights)
    return from_timm(weights) if is_timms else weights, {}, ""


def read_towers(
    key: str, source: str, content: Any, *, text: bool
) -> tuple[Size | None, Weights, Weights]:
    """Return the image tower's size and tensors, and the text tower's.

    Args:
        text: the text tower is read, so the image tower may be incomplete or missing; otherwise the
            text tower may be.

    Raises:
        RecipeError: the file lacks the tower that is read or is of no published size, or a tensor
            is missing, extra or misshapen.
    """
    visual, rest, prefix = split_towers(key, source, content)
    size, wanted = None, {}
    if visual:
        size = vision_size(key, source, visual)
        wanted = {prefix + name: shape for name, shape in vision_shapes(size).items()}
    elif not text:
        raise RecipeError(f"{key}: {source} has a text tower, but no image tower; give another.")
    # Without a prefix, an image tower is alone: the text tower has names of its own without one.
    width = size.text if size and prefix else None
    if size is None:
        width = text_width(key, source, rest)
    if text and width is None:
        raise RecipeError(
            f"{key}: {source} has the image tower of {size.name} alone; give a file of PE core "
            "with both towers."
        )
    optional = set(wanted) if text else set()
    if width is not None:
        of_text = text_shapes(width, TEXT_SIZES[width]) | {"logit_scale": ()}
        wanted |= of_text
        optional |= {"logit_scale"} if text else of_text.keys()
    found = {prefix + name: tensor for name, tensor in visual.items()} | rest
    check_shapes(key, source, MODEL, found, wanted, optional)
    return size, visual, rest


def vision_size(key: str, source: str, visual: Weights) -> Size:
    """Return the published size to which an image tower's weights belong.

    Raises:
        RecipeError: no published size has this width, or the tower is a CLIP's.
    """
    stem = visual.get("conv1.weight")
    if stem is None or stem.ndim != 4:
        raise RecipeError(f"{key}: {source} lacks a conv1.weight of four axes; give another file.")
    width = len(stem)
    pooled = any(name.startswith("attn_pool.") for name in visual)
    projected = pooled or any(name == "proj" or name.startswith("ln_post.") for name in visual)
    if projected and not pooled:
        raise RecipeError(
            f"{key}: {source} has no attn_pool, as a CLIP; give a complete {MODEL}, or a CLIP's "
            "checkpoint for transformers, such as openai/clip-vit-large-patch14-336."
        )
    scaled = any(re.search(r"\.ls_[12]\.", name) for name in visual)
    layers = [int(m[1]) for name in visual if (m := re.search(r"\.resblocks\.(\d+)\.", name))]
    depth = 1 + max(layers, default=-1)

    def distance(size: Size) -> tuple[bool, bool, int]:
        is_core = size.output is not None
        return is_core != projected, size.is_scaled != scaled, abs(size.depth - depth)

    sizes = [size for size in SIZES if size.width == width]
    if not sizes:
        widths = sorted({size.width for size in SIZES})
        raise RecipeError(
            f"{key}: {source} has {width} features, but the {MODEL} was published with "
            f"{', '.join(map(str, widths))}; give a file such as PE-Core-L14-336.pt."
        )
    return min(sizes, key=distance)


def text_width(key: str, source: str, rest: Weights) -> int:
    """Return the width of a text tower that is alone in its file.

    Raises:
        RecipeError: no published size has it.
    """
    table = rest.get("token_embedding.weight")
    width = None if table is None or table.ndim != 2 else table.shape[1]
    if width not in TEXT_SIZES:
        raise RecipeError(
            f"{key}: {source} has no token_embedding.weight of {', '.join(map(str, TEXT_SIZES))} "
            f"features, as text towers of the {MODEL} have; give another file."
        )
    return width


def read_vision_tower(
    key: str, source: str, content: Any
) -> tuple[PerceptionEncoderVisionConfig, Weights]:
    """Return the configuration and the weights, under our names, of a file's image tower.

    Raises:
        RecipeError: as `read_towers`.
    """
    size, weights, _ = read_towers(key, source, content, text=False)
    config = PerceptionEncoderVisionConfig(
        image_size=size.side,
        patch_size=size.patch,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        use_cls_token=size.has_class,
        use_ln_post=size.output is not None,
        ls_init_value=0.1 if size.is_scaled else None,
        pool_type="none" if size.output is None else "attn",
        output_dim=size.output,
    )
    return config, to_ours(weights)


def read_text_tower(
    key: str, source: str, content: Any
) -> tuple[CLIPTextConfig, Weights, torch.Tensor]:
    """Return the configuration of a file's text tower, its weights and its projection's weight.

    Raises:
        RecipeError: as `read_towers`.
    """
    _, _, weights = read_towers(key, source, content, text=True)
    width = weights["token_embedding.weight"].shape[1]
    size = TEXT_SIZES[width]
    weights.pop("logit_scale", None)
    projection = weights.pop("text_projection").T.contiguous()
    config = CLIPTextConfig(
        vocab_size=size.vocabulary,
        hidden_size=width,
        intermediate_size=TEXT_MLP_RATIO * width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        projection_dim=size.output,
        hidden_act="gelu",
        # The two last tokens of the vocabulary begin and end a text.
        bos_token_id=size.vocabulary - 2,
        eos_token_id=size.vocabulary - 1,
        pad_token_id=None,
    )
    return config, to_ours(weights), projection


def read_saved_vision(key: str, source: str, config: PerceptionEncoderVisionConfig) -> Weights:
    """Return the weights of a saved `PerceptionEncoderVisionModel`, of any size.

    Raises:
        RecipeError: the settings contradict each other, or a tensor is missing, extra or misshapen.
    """
    try:
        with torch.device("meta"):
            wanted = PerceptionEncoderVisionModel(config).state_dict()
    except (KeyError, ValueError) as error:
        raise RecipeError(f"{key}: {source}: config.json: {error}") from error
    weights = read_tensors(key, source, lambda name: name)
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    check_shapes(key, source, MODEL, weights, shapes)
    return weights
