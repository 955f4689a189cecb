"""X-Encoder: a video, or an image as a video of one frame, to visual tokens.

Shapes: B batch, T frames, C channels, F frames of a batch or tubelets of V-JEPA, h and w patches or
positions of a feature map, P tokens of a frame, N visual tokens, Dx output size.
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .attention import from_config
from .perception_encoder import PerceptionEncoderVisionConfig
from .vjepa21 import VJEPA21Config

V_JEPA_2, V_JEPA_2_1 = "vjepa2", VJEPA21Config.model_type
PERCEPTION = PerceptionEncoderVisionConfig.model_type
VIDEO = (V_JEPA_2, V_JEPA_2_1)  # encoders of tubelets; every other one reads single frames
# Convolutional towers, whose tokens are the positions of the last feature map.
CONVNEXT, RESNET = ("convnext", "convnextv2"), ("bit", "resnet")
CONVOLUTIONAL = (*CONVNEXT, *RESNET)
# Image towers whose first token of a frame is a class token.
WITH_CLASS_TOKEN = ("clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")

# Encoders without a table of positions, or whose positions are rotary with the grid of the input or
# trained to be interpolated from a table: they accept any grid of whole patches. Every other one is
# correct at its own size only.
ANY_SIZE = (
    V_JEPA_2_1,
    PERCEPTION,
    *CONVOLUTIONAL,
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
)

# Settings of V-JEPA 2.1 in configurations of a V-JEPA 2, as huggingface/transformers#45497 and the
# ports on the Hub name them. transformers' V-JEPA 2 would ignore them and compute wrong features.
V_JEPA_2_1_SETTINGS = {
    "hierarchical_layers",
    "img_temporal_dim_size",
    "interpolate_rope",
    "modality_embedding",
    "n_output_distillation",
    "num_distillation_outputs",
    "pretrained_crop_size",
    "return_all_tokens",
    "teacher_embed_dim",
    "use_context_projection",
    "use_image_patch_embedder",
    "use_modality_embeddings",
    "use_rope_interleave",
}
# Settings of the published Perception Encoder that no other image tower of transformers has.
PERCEPTION_SETTINGS = {"attn_pooler_heads", "ls_init_value", "use_abs_posemb", "use_rope2d"}
# Settings of V-JEPA configurations that change nothing in the encoder, `pred_...` apart: facts of
# saving, values that repeat another one, and parts that are never built here.
WITHOUT_EFFECT = {
    "attention_dropout",
    "auto_map",
    "image_size",
    "is_composition",
    "num_labels",
    "num_pooler_heads",
    "num_pooler_layers",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "uniform_power",
    "use_cache",
    "use_sdpa",
    "wide_SiLU",
}
# Settings that these encoders always have on. Where one is false, the checkpoint is another model.
ALWAYS_ON = {
    V_JEPA_2: {"use_rope"},
    V_JEPA_2_1: {"use_rope", "use_rope_interleave"},
    PERCEPTION: {"use_abs_posemb", "use_ln_pre", "use_rope2d"},
}


def patch_edge(config: PreTrainedConfig) -> int:
    """Return the edge of a patch in pixels; of a convolutional tower, the stride of all stages."""
    if config.model_type not in CONVOLUTIONAL:
        return config.patch_size
    stem = config.patch_size if config.model_type in CONVNEXT else 4
    edge = stem * 2 ** (len(config.depths) - 1)  # every stage but the first halves the feature map
    if config.model_type == "bit":
        return min(edge, config.output_stride)
    if config.model_type == "resnet" and config.downsample_in_first_stage:
        return 2 * edge
    return edge


def frame_side(config: PreTrainedConfig) -> int:
    """Return the height and width in pixels of the frames that a configuration is made for.

    It matters to estimates only, if a ResNet does not state it: it reads frames of any size.
    """
    if config.model_type in VIDEO:
        return config.crop_size
    return config.to_dict().get("image_size", 224)


def fill_tubelets(pixel_values_videos: torch.Tensor, tubelet_size: int) -> torch.Tensor:
    """Repeat the last frame `(B, T, C, H, W)` until T is a multiple of the tubelet.

    V-JEPA 2 repeats a single image, as the paper does (section 3.2), but drops the last frames of
    a video that do not fill a tubelet.
    """
    missing = -pixel_values_videos.shape[1] % tubelet_size
    if not missing:
        return pixel_values_videos
    last = pixel_values_videos[:, -1:].expand(-1, missing, -1, -1, -1)
    return torch.cat([pixel_values_videos, last], dim=1)


def pool_patches(tokens: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """Average windows of `size` x `size` patches of each frame `(F, P, Dx)`; return `(F, P', Dx)`.

    The patches are the last h x w tokens of a frame, row by row. Class and register tokens, which
    come first, are kept. If `size` does not divide the grid, the windows at its right and bottom
    edges average the patches that they contain.

    Raises:
        ValueError: a frame has fewer tokens than patches, so the encoder has merged patches.
    """
    special = tokens.shape[1] - height * width
    if special < 0:
        raise ValueError(
            f"visual_token_pooling is {size}, but this X-Encoder gives {tokens.shape[1]} tokens "
            f"for {height} x {width} patches, so their grid is unknown: set it to 1."
        )
    grid = tokens[:, special:].transpose(1, 2).unflatten(2, (height, width))  # (F, Dx, h, w)
    pooled = avg_pool2d(grid, size, ceil_mode=True)  # the default drops incomplete windows
    return torch.cat([tokens[:, :special], pooled.flatten(2).transpose(1, 2)], dim=1)


def append_class_token(tokens: torch.Tensor, patches: int) -> torch.Tensor:
    """Append the first token of each frame `(F, P, Dx)` to its last `patches` tokens.

    Returns:
        `(F, patches, 2 Dx)`: patch and class token. Other tokens of the frame are left out.
    """
    patch_tokens = tokens[:, -patches:]
    return torch.cat([patch_tokens, tokens[:, :1].expand_as(patch_tokens)], dim=-1)


class XEncoder(nn.Module):
    """V-JEPA 2 or 2.1 without the masked-token predictor of its own training (paper section 3.1),
    or an image tower applied to each frame, as in the paper's controlled comparison (section 4.5).

    An image tower does not encode time, and nothing is added here: the tokens of its frames are
    concatenated, and the Predictor's rotary positions, which run over all visual tokens, order
    them. Every token of its last layer is a visual token, class and register tokens included.
    Perception Encoder's class token is left out, so that a frame has h x w tokens, 24 x 24 at 336
    pixels: the paper does not state it, and the model that it compares with in section 4.5 was
    trained by the recipe of PerceptionLM, which leaves it out. Its patches come from the last layer
    and `ln_post`, before the attention pooling.

    The visual tokens of a convolutional tower (ResNet, BiT, ConvNeXt) are the positions of its last
    feature map, row by row: h x w of them, where h is the height in pixels divided by the stride of
    all stages. ConvNeXt's norm, which follows its average pooling, is left out.

    With a `pooling` above 1, each window of `pooling` x `pooling` patches of a frame, or of a
    tubelet, becomes one visual token: their mean. With `concatenate_class`, the class token of a
    frame is appended to each of them instead of being one.

    One frame is repeated to fill a tubelet of V-JEPA 2, as in the paper (section 3.2). V-JEPA 2.1
    has a stem for images, which gives h x w tokens of the frame itself; its configuration's
    `img_temporal_dim_size` of `None` repeats the frame there, too.

    A frozen X-Encoder records no graph and stays in evaluation mode, even when `train()` is called
    on the model around it. That model sets `requires_grad` of the parameters.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        frozen: bool,
        pooling: int = 1,
        concatenate_class: bool = False,
    ):
        super().__init__()
        self.is_video = config.model_type in VIDEO
        self.pooling = pooling
        self.concatenate_class = concatenate_class
        check_config(config, pooling, concatenate_class)
        self.backbone = build_backbone(config)
        is_newer = config.model_type == V_JEPA_2_1
        self.has_image_stem = is_newer and config.img_temporal_dim_size is not None
        # Class tokens that are no visual tokens.
        self.left_out = int(config.model_type == PERCEPTION and config.use_cls_token)
        self.is_convolutional = config.model_type in CONVOLUTIONAL
        if self.is_convolutional:
            self.output_size = config.hidden_sizes[-1]  # Dx
        else:
            self.output_size = config.output_size if is_newer else config.hidden_size
        self.output_size *= 1 + concatenate_class
        # The rest of V-JEPA 2 is its predictor, of which nothing is left.
        self.options = {"skip_predictor": True} if config.model_type == V_JEPA_2 else {}
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "XEncoder":
        return super().train(mode and not self.frozen)

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Encode `(B, T, C, H, W)` to `(B, N, Dx)`, for any T.

        Without pooling, N is ceil(T / tubelet) x patches for V-JEPA, T x P for an image tower,
        and T x patches with `concatenate_class`, which doubles Dx.

        Raises:
            ValueError: another layout, or a resolution that the position embeddings do not
                support; the stock encoder would compute wrong features without an error.
        """
        self._check(pixel_values_videos)
        batch_size, *_, height, width = pixel_values_videos.shape
        height, width = (edge // patch_edge(self.backbone.config) for edge in (height, width))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.is_video:
                frames = pixel_values_videos
                if frames.shape[1] > 1 or not self.has_image_stem:
                    frames = fill_tubelets(frames, self.backbone.config.tubelet_size)
                tokens = self.backbone(frames, **self.options).last_hidden_state
                tokens = tokens.unflatten(1, (-1, height * width)).flatten(0, 1)  # (F, P, Dx)
            else:
                frames = pixel_values_videos.flatten(0, 1)  # (B * T, C, H, W)
                if self.is_convolutional:  # a fifth less time on a CPU, with equal results
                    frames = frames.contiguous(memory_format=torch.channels_last)
                tokens = self.backbone(pixel_values=frames).last_hidden_state
                if self.is_convolutional:
                    tokens = tokens.flatten(2).transpose(1, 2)  # (F, Dx, h, w) to (F, P, Dx)
                tokens = tokens[:, self.left_out :]  # (F, P, Dx)
            if self.concatenate_class:
                tokens = append_class_token(tokens, height * width)  # (F, h w, 2 Dx)
            if self.pooling > 1:
                tokens = pool_patches(tokens, height, width, self.pooling)  # (F, P', Dx)
            return tokens.reshape(batch_size, -1, tokens.shape[-1])  # (B, N, Dx)

    def _check(self, pixel_values_videos: torch.Tensor) -> None:
        config = self.backbone.config
        shape = tuple(pixel_values_videos.shape)
        channels = config.in_chans if self.is_video else config.num_channels
        side = frame_side(config)
        if config.model_type in ANY_SIZE:
            edge = patch_edge(config)
            sizes = f"height and width multiples of {edge}"
            fits = len(shape) == 5 and not any(size % edge for size in shape[3:])
        else:
            sizes = f"height and width {side}"
            fits = shape[3:] == (side, side)
        if len(shape) != 5 or shape[2] != channels or not fits or 0 in shape:
            raise ValueError(
                f"pixel_values_videos has shape {shape}; expected (batch, frames, channels, "
                f"height, width) with {channels} channels, {sizes}. VLJEPAProcessor makes it."
            )


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the stock encoder without the parts that nothing here reads.

    They would cost time, or stop data-parallel training as parameters without a gradient.
    """
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    if config.model_type == "dinov2":
        config.use_mask_token = False
    if config.model_type in CONVOLUTIONAL:
        config._attn_implementation = "eager"  # it has no attention; transformers refuses others
    backbone = from_config(AutoModel, config)
    if config.model_type == V_JEPA_2_1 and not config.hierarchical_output:
        for level in range(len(config.levels) - 1):
            backbone.encoder.norms_block[level] = nn.Identity()
    if config.model_type == V_JEPA_2:
        del backbone.predictor  # 22M parameters, a third of the time of a forward pass
    if config.model_type in CONVNEXT:
        backbone.layernorm = nn.Identity()  # normalizes the pooled output only
    if config.model_type in RESNET:
        backbone.pooler = nn.Identity()
    elif "pooler" in dict(backbone.named_children()):
        backbone.pooler = None
    if config.model_type in CONVOLUTIONAL:
        # Without these, transformers refuses to set the attention of the other parts.
        backbone._supports_sdpa = backbone._supports_flash_attn = True
    if config.model_type == "clip_vision_model":
        backbone.post_layernorm = nn.Identity()  # normalizes the pooled class token only
    return backbone


def unknown_settings(config: PreTrainedConfig) -> list[str]:
    """Return the settings of a configuration that its encoder would ignore, those of V-JEPA 2.1
    first.

    transformers accepts any name. A setting that is off (false, 0 or null) changes nothing, unless
    the encoder always has it on. Other image towers than Perception Encoder have old settings of no
    effect, so only those of V-JEPA 2.1 and Perception Encoder are looked for there.
    """
    always = ALWAYS_ON.get(config.model_type, set())
    settings = {
        name
        for name, value in config.to_dict().items()
        if value is not None and bool(value) != (name in always)
    }
    settings -= type(config).__dataclass_fields__.keys()
    newer = sorted(V_JEPA_2_1_SETTINGS & settings)
    if config.model_type not in ALWAYS_ON:
        return newer + sorted(PERCEPTION_SETTINGS & settings)
    known = WITHOUT_EFFECT | {"model_type"}
    other = sorted(name for name in settings - known if not name.startswith(("_", "pred_")))
    return newer + [name for name in other if name not in newer]


def check_config(
    config: PreTrainedConfig, pooling: int = 1, concatenate_class: bool = False
) -> None:
    """Reject a configuration whose encoder would give wrong visual tokens or none."""
    name = f"vision_config is a {config.model_type!r}"
    if concatenate_class and config.model_type not in WITH_CLASS_TOKEN:
        raise ValueError(
            f"concatenate_class_token is true, but {name}, from which no class token can be taken: "
            f"set it to false, or take one of {', '.join(WITH_CLASS_TOKEN)}."
        )
    unknown = unknown_settings(config)
    if unknown and unknown[0] in V_JEPA_2_1_SETTINGS and config.model_type != V_JEPA_2_1:
        raise ValueError(
            f"{name} with {unknown[0]!r}: that is V-JEPA 2.1, which transformers' class computes "
            f"wrongly. Give its checkpoint to training.init_checkpoint, which makes a "
            f"{V_JEPA_2_1!r} of it."
        )
    if unknown:
        value = config.to_dict()[unknown[0]]
        raise ValueError(
            f"{name} whose {unknown[0]!r} is {value!r}, which this encoder does not implement: it "
            "would compute other features than the checkpoint's own code. Use another checkpoint."
        )
    if config.model_type in CONVOLUTIONAL:
        check_stages(name, config)
        needed = {"num_channels"}
    else:
        needed = {"hidden_size", "patch_size"}
        needed |= set() if config.model_type in VIDEO else {"image_size", "num_channels"}
    if missing := needed - config.to_dict().keys():
        raise ValueError(
            f"{name}, which has no {min(missing)}: an X-Encoder is V-JEPA 2, 2.1, a convolutional "
            f"tower ({', '.join(CONVOLUTIONAL)}), or an image transformer whose last hidden states "
            "are one sequence of tokens per frame, such as dinov2, dinov3_vit, clip_vision_model "
            "or siglip_vision_model."
        )
    side, edge = frame_side(config), patch_edge(config)
    if config.model_type in CONVOLUTIONAL and side % edge:
        raise ValueError(
            f"{name} whose image_size is {side}, but its stages have a stride of {edge} pixels: "
            f"give frames of a multiple of {edge}."
        )
    if pooling > 1 and pooling > (most := side // edge):
        raise ValueError(
            f"visual_token_pooling is {pooling}, but a frame has {most} x {most} patches: give "
            f"1 to {most}."
        )


def check_stages(name: str, config: PreTrainedConfig) -> None:
    """Raise `ValueError` unless each stage of a convolutional tower has a width and a depth."""
    widths, depths = len(config.hidden_sizes), len(config.depths)
    if widths != depths:
        raise ValueError(
            f"{name} with {widths} hidden_sizes and {depths} depths: give one of each for a stage."
        )
    if config.model_type not in CONVNEXT:
        return
    if not isinstance(config.patch_size, int):
        raise ValueError(
            f"{name} whose patch_size is {config.patch_size!r}: give one number, of square patches."
        )
    if config.num_stages != widths:
        raise ValueError(
            f"{name} with {widths} hidden_sizes, but num_stages is {config.num_stages}: make them "
            "equal."
        )


__all__ = [
    "CONVOLUTIONAL",
    "PERCEPTION",
    "VIDEO",
    "V_JEPA_2",
    "V_JEPA_2_1",
    "XEncoder",
    "frame_side",
    "patch_edge",
]
