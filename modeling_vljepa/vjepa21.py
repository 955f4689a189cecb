"""V-JEPA 2.1's encoder (arXiv 2603.14482), which transformers does not have.

The differences to transformers' V-JEPA 2:

| V-JEPA 2.1                                                            | V-JEPA 2                 |
|-----------------------------------------------------------------------|--------------------------|
| the two channels of a pair are rotated by one angle                   | by two, a mistake        |
| rows and columns are scaled to the range of the pretrained grid       | not scaled               |
| rows and columns of the input's own grid, which may have any size     | of the configured grid   |
| a stem of its own for images, with tubelets of one frame              | the frame is repeated    |
| a vector that marks images or videos is added to the patches          | none                     |
| a LayerNorm for each of four levels; the last one's is the output     | one LayerNorm            |

Shapes: B batch, T frames, C channels, t tubelets, h and w patches, N = t * h * w tokens, D hidden
size, A attention heads, d head size.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vjepa2.modeling_vjepa2 import (
    VJEPA2MLP,
    VJEPA2DropPath,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# Layers whose states are the four levels, by the number of layers of the published sizes.
LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}

# Settings that are sizes or counts.
POSITIVE = (
    "crop_size",
    "hidden_size",
    "in_chans",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
    "tubelet_size",
)


@strict  # values of another type are errors, as in transformers' own configurations
class VJEPA21Config(PreTrainedConfig):
    r"""
    Configuration of a [`VJEPA21Model`]. The defaults are those of V-JEPA 2.1 ViT-L; the names are
    those of transformers' `VJEPA2Config` and of the published code.

    Args:
        patch_size (`int`, *optional*, defaults to 16): edge of a patch in pixels.
        crop_size (`int`, *optional*, defaults to 384): edge of the frames of the last stage of
            pretraining, for processors. The model reads any whole number of patches.
        frames_per_clip (`int`, *optional*, defaults to 64): frames in pretraining. The model reads
            any number.
        tubelet_size (`int`, *optional*, defaults to 2): frames of one token of a video.
        img_temporal_dim_size (`int`, *optional*, defaults to 1): with 1, an input of one frame is
            an image and gets 1 x h x w tokens from the stem of images. With `None`, there is no
            such stem, and the frame is repeated to fill a tubelet, as the VL-JEPA paper does with
            V-JEPA 2 (arXiv 2512.10942, section 3.2).
        modality_embedding (`bool`, *optional*, defaults to `True`): add a vector that marks images
            or videos to the patches.
        interpolate_rope (`bool`, *optional*, defaults to `True`): scale rows and columns to the
            range of the pretrained grid.
        pretrained_crop_size (`int`, *optional*, defaults to 256): edge of the frames whose grid
            has that range.
        hierarchical_layers (`list[int]`, *optional*): layers whose states are the levels. Default:
            the published four of models with 12, 24, 40 or 48 layers, only the last layer of
            others.
        hierarchical_output (`bool`, *optional*, defaults to `False`): return the normalised states
            of all levels, concatenated along the features, instead of the last level's. The
            published ViT-B and ViT-L were distilled without the first three, so these norms are
            untrained there.
        hidden_size (`int`, *optional*, defaults to 1024): D.
        in_chans (`int`, *optional*, defaults to 3): C.
        num_attention_heads (`int`, *optional*, defaults to 16): A. D / A must be an even number.
        num_hidden_layers (`int`, *optional*, defaults to 24): number of layers.
        mlp_ratio (`float`, *optional*, defaults to 4.0): width of an MLP, as a multiple of D.
        drop_path_rate (`float`, *optional*, defaults to 0.0): stochastic depth of the last layer.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): epsilon of the norms.
        qkv_bias (`bool`, *optional*, defaults to `True`): bias of queries, keys and values.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): dropout of weights.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation of the MLPs.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new
            weights.
    """

    model_type = "vjepa2_1"

    patch_size: int = 16
    crop_size: int = 384
    frames_per_clip: int = 64
    tubelet_size: int = 2
    img_temporal_dim_size: int | None = 1
    modality_embedding: bool = True
    interpolate_rope: bool = True
    pretrained_crop_size: int = 256
    hierarchical_layers: list[int] | None = None
    hierarchical_output: bool = False
    hidden_size: int = 1024
    in_chans: int = 3
    num_attention_heads: int = 16
    num_hidden_layers: int = 24
    mlp_ratio: int | float = 4.0
    drop_path_rate: int | float = 0.0
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    attention_probs_dropout_prob: int | float = 0.0
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    @property
    def levels(self) -> tuple[int, ...]:
        """The layers whose states are normalised as levels, in order."""
        last = self.num_hidden_layers - 1
        return tuple(self.hierarchical_layers or LEVELS.get(self.num_hidden_layers, (last,)))

    @property
    def output_size(self) -> int:
        """Width of the last hidden states."""
        return self.hidden_size * (len(self.levels) if self.hierarchical_output else 1)


def check(config: VJEPA21Config) -> None:
    """Raise `ValueError` for values of a [`VJEPA21Config`] that contradict each other."""
    for name in POSITIVE:
        if (value := vars(config)[name]) < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    if config.pretrained_crop_size < config.patch_size:
        raise ValueError(
            f"pretrained_crop_size is {config.pretrained_crop_size} and patch_size "
            f"{config.patch_size}: the pretrained grid must have at least one patch."
        )
    levels, last = config.levels, config.num_hidden_layers - 1
    ascending = list(levels) == sorted(set(levels))
    if not ascending or levels[0] < 0 or levels[-1] != last:
        raise ValueError(
            f"hierarchical_layers is {list(levels)}, but the model has {config.num_hidden_layers} "
            "layers: give indices in ascending order that end with the last layer."
        )
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ValueError(
            f"hidden_size is {config.hidden_size} for {config.num_attention_heads} heads: the size "
            "of a head must be an even whole number, because its channels are rotated in pairs."
        )
    if config.img_temporal_dim_size not in (None, 1):
        raise ValueError(
            f"img_temporal_dim_size is {config.img_temporal_dim_size}: give 1, or null to repeat "
            "the frame of an image."
        )


def positions(
    tubelets: int, height: int, width: int, scale_to: int | None, device: torch.device
) -> torch.Tensor:
    """Return the position of each token on the three axes, `(N, 3)`.

    Args:
        scale_to: edge of the pretrained grid. Rows and columns are scaled to 0 ... `scale_to` - 1.
            `None` scales nothing.
    """
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (tubelets, height, width)]
    if scale_to is not None:
        # A single row or column is at 0 in any scale; the published code divides by zero there.
        axes[1:] = [axis * ((scale_to - 1) / max(len(axis) - 1, 1)) for axis in axes[1:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rotations(position: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `(N, d)` of the angles by which tokens at `(N, 3)` are rotated.

    A third of a head, rounded down to pairs, belongs to each axis: 20 of 64 channels. The rest (4)
    is not rotated: its angle is 0.
    """
    pairs = head_size // 3 // 2
    exponents = torch.arange(pairs, dtype=torch.float32, device=position.device) / max(pairs, 1)
    angles = position.unsqueeze(-1) / 10000**exponents  # (N, 3, pairs)
    # Both channels of a pair have one angle. V-JEPA 2 repeats the whole list instead.
    angles = angles.flatten(1).repeat_interleave(2, dim=-1)  # (N, 3 * 2 * pairs)
    angles = nn.functional.pad(angles, (0, head_size - angles.shape[-1]))  # (N, d)
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels of `(B, A, N, d)` by the angles of `(N, d)` and `(N, d)`."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)  # by a quarter
    return states * cos + turned * sin


class VJEPA21PatchEmbeddings(nn.Module):
    """Projection of patches of `tubelet_size` frames."""

    def __init__(self, config: VJEPA21Config, tubelet_size: int):
        super().__init__()
        size = (tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values)  # (B, D, t, h, w)


class VJEPA21Embeddings(nn.Module):
    """Patches of videos or of images, each with a stem and a vector of its own."""

    def __init__(self, config: VJEPA21Config):
        super().__init__()
        self.config = config
        self.has_image_stem = config.img_temporal_dim_size is not None
        self.patch_embeddings = VJEPA21PatchEmbeddings(config, config.tubelet_size)
        if self.has_image_stem:
            self.patch_embeddings_img = VJEPA21PatchEmbeddings(config, 1)
        if config.modality_embedding:
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
            if self.has_image_stem:
                self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(
        self, pixel_values_videos: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Embed `(B, T, C, H, W)`; return the patches `(B, N, D)` and their grid (t, h, w).

        Raises:
            ValueError: another number of axes.
        """
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; expected "
                "(batch, frames, channels, height, width), also of an image, whose frames are 1."
            )
        pixels = pixel_values_videos.transpose(1, 2)  # (B, C, T, H, W)
        pixels = pixels.to(self.patch_embeddings.proj.weight.dtype)
        is_image = self.has_image_stem and pixels.shape[2] == 1
        if not is_image and pixels.shape[2] < self.config.tubelet_size:
            pixels = pixels.repeat(1, 1, self.config.tubelet_size, 1, 1)
        patches = (self.patch_embeddings_img if is_image else self.patch_embeddings)(pixels)
        grid = tuple(patches.shape[2:])
        embeddings = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        if self.config.modality_embedding:
            embeddings = embeddings + (self.img_mod_embed if is_image else self.video_mod_embed)
        return embeddings + self.unread(is_image), grid

    def unread(self, is_image: bool) -> torch.Tensor | float:
        """Return 0 with a gradient of 0 for the parameters that this input does not read.

        Data-parallel training would stop at parameters without a gradient.
        """
        if not (self.training and torch.is_grad_enabled() and self.has_image_stem):
            return 0.0
        kind = "patch_embeddings." if is_image else "patch_embeddings_img."
        vector = "video_mod_embed" if is_image else "img_mod_embed"
        named = self.named_parameters()
        other = [p for name, p in named if name.startswith(kind) or name == vector]
        return sum(0.0 * p.sum() for p in other if p.requires_grad)


class VJEPA21Attention(nn.Module):
    """Attention between all tokens, with rotary positions on three axes."""

    def __init__(self, config: VJEPA21Config):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.query = nn.Linear(size, size, bias=config.qkv_bias)
        self.key = nn.Linear(size, size, bias=config.qkv_bias)
        self.value = nn.Linear(size, size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)
        self.scaling = self.head_size**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the new states `(B, N, D)` and, with "eager", the weights `(B, A, N, N)`."""
        layers = (self.query, self.key, self.value)
        heads = [layer(hidden_states).unflatten(-1, (-1, self.head_size)) for layer in layers]
        query, key, value = (states.transpose(1, 2) for states in heads)  # (B, A, N, d)
        # Under autocast the three are bf16. Kernels need one dtype.
        cos, sin = (part.to(query.dtype) for part in rotation)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states, weights = attend(
            self,
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            None,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )  # (B, N, A, d)
        return self.proj(states.flatten(2)), weights


class VJEPA21Layer(GradientCheckpointingLayer):
    """Attention and an MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, config: VJEPA21Config, index: int):
        super().__init__()
        self.index = index
        drop_path_rate = config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VJEPA21Attention(config)
        self.drop_path = VJEPA2DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VJEPA2MLP(config, hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), rotation, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))  # (B, N, D)


class VJEPA21Encoder(nn.Module):
    """Stems, layers, and the norms of the levels."""

    def __init__(self, config: VJEPA21Config):
        super().__init__()
        self.config = config
        self.embeddings = VJEPA21Embeddings(config)
        self.layer = nn.ModuleList(
            VJEPA21Layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norms_block = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in config.levels
        )
        self.gradient_checkpointing = False

    def forward(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        config = self.config
        hidden_states, grid = self.embeddings(pixel_values_videos)  # (B, N, D)
        scale_to = config.pretrained_crop_size // config.patch_size
        position = positions(
            *grid, scale_to if config.interpolate_rope else None, hidden_states.device
        )
        # Once for all layers, in fp32: positions above 256 have no exact value in bf16.
        rotation = rotations(position, config.hidden_size // config.num_attention_heads)
        levels = []
        for layer in self.layer:
            hidden_states = layer(hidden_states, rotation, **kwargs)  # (B, N, D)
            if config.hierarchical_output and layer.index in config.levels:
                levels.append(self.norms_block[len(levels)](hidden_states))
        if config.hierarchical_output:
            return torch.cat(levels, dim=-1)  # (B, N, levels * D)
        return self.norms_block[-1](hidden_states)  # (B, N, D)


class VJEPA21PreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and initialisation, as of transformers' V-JEPA 2.

    | weights                                     | initial value                                  |
    |---------------------------------------------|------------------------------------------------|
    | linear layers and stems                     | truncated normal, `initializer_range`          |
    | vectors of images and videos                | normal, 1e-6                                   |
    """

    config: VJEPA21Config
    config_class = VJEPA21Config
    base_model_prefix = "vjepa21"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VJEPA21Layer", "VJEPA21Embeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(VJEPA21Layer, layer_name="encoder.layer"),
        "attentions": OutputRecorder(VJEPA21Attention, index=1, layer_name="encoder.layer"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv3d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VJEPA21Embeddings):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=1e-6)


class VJEPA21Model(VJEPA21PreTrainedModel):
    """V-JEPA 2.1's encoder without the predictor of its own training."""

    def __init__(self, config: VJEPA21Config):
        check(config)
        super().__init__(config)
        self.encoder = VJEPA21Encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.patch_embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """Encode `(B, T, C, H, W)`; `last_hidden_state` is `(B, N, D)`.

        N is h x w for one frame, else T // tubelet x h x w: the last frames that do not fill a
        tubelet are dropped, as in V-JEPA 2. With `hierarchical_output`, D is `output_size`.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, T, C, H, W)`): H and W of at
                least one patch.
            kwargs: `output_hidden_states`, `output_attentions`.
        """
        return BaseModelOutput(last_hidden_state=self.encoder(pixel_values_videos, **kwargs))


# By class, not by name: code that was loaded from the Hub registers a class of its own. `exist_ok`,
# because a later transformers may have classes of the same names.
AutoModel.register(VJEPA21Config, VJEPA21Model, exist_ok=True)

__all__ = ["VJEPA21Config", "VJEPA21Model"]
