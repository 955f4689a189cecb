"""Perception Encoder's image tower (arXiv 2504.13181), which transformers does not have.

The differences to transformers' CLIP image tower:

| Perception Encoder                                                   | CLIP                      |
|----------------------------------------------------------------------|---------------------------|
| queries and keys are rotated by column and row                       | not rotated               |
| the table of positions is interpolated to any grid of patches        | one grid                  |
| with a class token, columns and rows begin at 1; its angle is 0      | no angles                 |
| some models scale the residuals of a layer, or have no final norm    | never; of the class token |
| a learnt query pools the tokens by attention; an MLP follows         | the class token           |

The text tower of the same checkpoint needs no class of its own: it is transformers' `CLIPTextModel`
with `hidden_act="gelu"`, pooled at the last token and projected without a bias.

Shapes: B images, C channels, h and w patches, N = h * w tokens, 1 more with a class token, D hidden
size, A attention heads, d head size.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .vjepa21 import rotate

POOLER_MLP_RATIO = 4  # in all published models, also in G, whose layers have another ratio

# Settings that are sizes or counts; `output_dim` may also be `None`.
POSITIVE = (
    "attn_pooler_heads",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "output_dim",
    "patch_size",
)


@strict  # values of another type are errors, as in transformers' own configurations
class PerceptionEncoderVisionConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PerceptionEncoderVisionModel`]. The defaults are those of PE-Core L14-336;
    the names are those of transformers' image towers and of the published code.

    PE-Lang and PE-Spatial have no `ln_post`, no pooling and no projection; PE-Lang and the largest
    PE-Spatial have an `ls_init_value` of 0.1.

    Args:
        image_size (`int`, *optional*, defaults to 336): edge of the images in pretraining, which
            gives the size of the table of positions. The model reads any whole number of patches.
        patch_size (`int`, *optional*, defaults to 14): edge of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3): C.
        hidden_size (`int`, *optional*, defaults to 1024): D.
        intermediate_size (`int`, *optional*, defaults to 4096): width of the layers' MLPs.
        num_hidden_layers (`int`, *optional*, defaults to 24): number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16): A. D / A must be a multiple of 4.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of the norms.
        use_cls_token (`bool`, *optional*, defaults to `True`): put a class token before the
            patches. Only G has none.
        use_ln_post (`bool`, *optional*, defaults to `True`): normalise the last layer's states.
        ls_init_value (`float`, *optional*): initial value of the scales of the layers' residuals.
            Default: no scales.
        pool_type (`str`, *optional*, defaults to `"attn"`): `"attn"` pools the tokens by attention,
            `"none"` does not pool.
        attn_pooler_heads (`int`, *optional*, defaults to 8): heads of that attention.
        output_dim (`int`, *optional*, defaults to 1024): width of the pooled feature after a
            projection. `None` does not project.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new
            weights.
    """

    model_type = "perception_encoder_vision"

    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_cls_token: bool = True
    use_ln_post: bool = True
    ls_init_value: int | float | None = None
    pool_type: str = "attn"
    attn_pooler_heads: int = 8
    output_dim: int | None = 1024
    initializer_range: float = 0.02


def check(config: PerceptionEncoderVisionConfig) -> None:
    """Raise `ValueError` for values of a configuration that contradict each other."""
    for name in POSITIVE:
        if (value := vars(config)[name]) is not None and value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    size = config.hidden_size
    if size % (4 * config.num_attention_heads):
        raise ValueError(
            f"hidden_size is {size} for {config.num_attention_heads} heads: the size of a head "
            "must be a multiple of 4, because pairs of channels are rotated on two axes."
        )
    if config.image_size < config.patch_size:
        raise ValueError(
            f"image_size is {config.image_size} and patch_size {config.patch_size}: an image must "
            "have at least one patch."
        )
    if config.pool_type not in ("attn", "none"):
        raise ValueError(f"pool_type is {config.pool_type!r}: give 'attn' or 'none'.")
    if config.pool_type == "none" and config.output_dim is not None:
        raise ValueError(
            f"output_dim is {config.output_dim} with a pool_type of 'none': set output_dim to "
            "null, because only pooled features are projected."
        )
    if config.pool_type == "attn" and size % config.attn_pooler_heads:
        raise ValueError(
            f"hidden_size is {size} for {config.attn_pooler_heads} attn_pooler_heads: it must be a "
            "multiple of them."
        )


def rotations(
    height: int, width: int, head_size: int, has_class_token: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `(N, d)` of the angles by which the tokens of a grid are rotated.

    The first half of a head belongs to the column, the second half to the row. With a class token,
    columns and rows count from 1, and the class token is at 0.
    """
    half = head_size // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = 10000**-exponents  # (d / 4,)
    first = int(has_class_token)
    rows, columns = (
        torch.arange(n, dtype=torch.float32, device=device).add(first).unsqueeze(-1) * frequencies
        for n in (height, width)
    )  # (h, d / 4), (w, d / 4)
    axes = (columns.expand(height, -1, -1), rows.unsqueeze(1).expand(-1, width, -1))
    # Both channels of a pair have one angle.
    angles = torch.cat(axes, dim=-1).flatten(0, 1).repeat_interleave(2, dim=-1)  # (h * w, d)
    angles = nn.functional.pad(angles, (0, 0, first, 0))
    return angles.cos(), angles.sin()


class PerceptionEncoderEmbeddings(nn.Module):
    """Patches, a class token, and the positions of both."""

    def __init__(self, config: PerceptionEncoderVisionConfig):
        super().__init__()
        self.has_class_token = config.use_cls_token
        self.side = config.image_size // config.patch_size
        size, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, size, kernel_size=patch, stride=patch, bias=False
        )
        if config.use_cls_token:
            self.class_embedding = nn.Parameter(torch.zeros(size))
        rows = config.use_cls_token + self.side**2
        self.position_embedding = nn.Parameter(torch.zeros(rows, size))

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Return the positions `(h * w, D)` of a grid of patches.

        The published code does not interpolate to the table's own grid, which changes nothing.
        """
        grid = self.position_embedding[int(self.has_class_token) :].unflatten(0, (self.side, -1))
        grid = nn.functional.interpolate(
            grid.permute(2, 0, 1).unsqueeze(0).float(),  # (1, D, side, side)
            size=(height, width),
            mode="bilinear",
            align_corners=False,
        )
        return grid[0].flatten(1).T.to(self.position_embedding.dtype)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Embed `(B, C, H, W)`; return the tokens `(B, N, D)` and their grid (h, w).

        Raises:
            ValueError: another number of axes.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, channels, "
                "height, width)."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        if self.has_class_token:
            class_token = self.class_embedding + self.position_embedding[0]
            tokens = torch.cat([class_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        return tokens, (height, width)


class PerceptionEncoderAttention(nn.Module):
    """Attention of tokens to tokens, rotated if angles are given."""

    def __init__(self, config: PerceptionEncoderVisionConfig, num_heads: int):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_size = size // num_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.scaling = self.head_size**-0.5
        self.is_causal = False

    def forward(
        self,
        queries: torch.Tensor,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `(B, L, D)` to `(B, N, D)`.

        Return the new states `(B, L, D)` and, with "eager", the weights `(B, A, L, N)`.
        """
        projected = (self.q_proj(queries), self.k_proj(hidden_states), self.v_proj(hidden_states))
        heads = (states.unflatten(-1, (-1, self.head_size)) for states in projected)
        query, key, value = (states.transpose(1, 2) for states in heads)  # (B, A, L or N, d)
        if rotation is not None:
            # Under autocast the three are bf16. Kernels need one dtype.
            cos, sin = (part.to(query.dtype) for part in rotation)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states, weights = attend(
            self,
            query,
            key,
            value,
            None,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=0.0,
            **kwargs,
        )  # (B, L, A, d)
        return self.out_proj(states.flatten(2)), weights


class PerceptionEncoderMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PerceptionEncoderVisionConfig, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PerceptionEncoderLayer(GradientCheckpointingLayer):
    """Attention and an MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, config: PerceptionEncoderVisionConfig):
        super().__init__()
        self.is_scaled = config.ls_init_value is not None
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PerceptionEncoderAttention(config, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PerceptionEncoderMLP(config, config.intermediate_size)
        if self.is_scaled:
            self.layer_scale1 = nn.Parameter(torch.zeros(config.hidden_size))
            self.layer_scale2 = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.layer_norm1(hidden_states)
        residual, _ = self.self_attn(normed, normed, rotation, **kwargs)
        hidden_states = hidden_states + (
            residual * self.layer_scale1 if self.is_scaled else residual
        )
        residual = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + (residual * self.layer_scale2 if self.is_scaled else residual)


class PerceptionEncoderPooler(nn.Module):
    """Attention of one learnt query to all tokens, an MLP, and the projection."""

    def __init__(self, config: PerceptionEncoderVisionConfig):
        super().__init__()
        size = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, size))
        self.attention = PerceptionEncoderAttention(config, config.attn_pooler_heads)
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = PerceptionEncoderMLP(config, POOLER_MLP_RATIO * size)
        self.projection = nn.Identity()
        if config.output_dim is not None:
            self.projection = nn.Linear(size, config.output_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Pool `(B, N, D)` to `(B, output_dim)`."""
        probe = self.probe.expand(hidden_states.shape[0], -1, -1).to(hidden_states.dtype)
        pooled, _ = self.attention(probe, hidden_states)
        pooled = pooled.squeeze(1)
        return self.projection(pooled + self.mlp(self.layernorm(pooled)))


class PerceptionEncoderPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and initialisation, whose special values are the published ones.

    | weights                                     | initial value                                  |
    |---------------------------------------------|------------------------------------------------|
    | linear layers and the stem                  | normal, `initializer_range`                    |
    | class token and positions                   | normal, 1 / sqrt(D)                            |
    | scales of residuals                         | `ls_init_value`                                |
    | query of the pooling                        | normal, 1                                      |
    """

    config: PerceptionEncoderVisionConfig
    config_class = PerceptionEncoderVisionConfig
    base_model_prefix = "perception_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "PerceptionEncoderEmbeddings",
        "PerceptionEncoderLayer",
        "PerceptionEncoderPooler",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(PerceptionEncoderLayer, layer_name="layers"),
        # Of the layers, not of the pooling.
        "attentions": OutputRecorder(PerceptionEncoderAttention, index=1, layer_name="layers"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceptionEncoderEmbeddings):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.hidden_size**-0.5)
        elif isinstance(module, PerceptionEncoderLayer):
            for parameter in module.parameters(recurse=False):
                init.constant_(parameter, self.config.ls_init_value)
        elif isinstance(module, PerceptionEncoderPooler):
            init.normal_(module.probe, std=1.0)


class PerceptionEncoderVisionModel(PerceptionEncoderPreTrainedModel):
    """Perception Encoder's image tower: PE-Core, PE-Lang or PE-Spatial."""

    def __init__(self, config: PerceptionEncoderVisionConfig):
        check(config)
        super().__init__(config)
        self.embeddings = PerceptionEncoderEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            PerceptionEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.Identity()
        if config.use_ln_post:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = PerceptionEncoderPooler(config) if config.pool_type == "attn" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode `(B, C, H, W)`.

        `last_hidden_state` `(B, N, D)` are the class token, if the model has one, and the patches,
        row by row, after `ln_post` and before the pooling. `pooler_output` `(B, output_dim)` is
        the feature that the published model compares with texts, not normalised; `None` without a
        pooling.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): H and W of at least one
                patch.
            kwargs: `output_hidden_states`, `output_attentions`.
        """
        config = self.config
        hidden_states, grid = self.embeddings(pixel_values)  # (B, N, D)
        hidden_states = self.pre_layernorm(hidden_states)
        # Once for all layers, in fp32, in which the angles of all positions differ.
        rotation = rotations(
            *grid,
            config.hidden_size // config.num_attention_heads,
            config.use_cls_token,
            hidden_states.device,
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotation, **kwargs)  # (B, N, D)
        hidden_states = self.post_layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)  # (B, output_dim)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


# By class, not by name: code that was loaded from the Hub registers a class of its own. `exist_ok`,
# because a later transformers may have classes of the same names.
AutoModel.register(PerceptionEncoderVisionConfig, PerceptionEncoderVisionModel, exist_ok=True)

__all__ = ["PerceptionEncoderVisionConfig", "PerceptionEncoderVisionModel"]
