"""VL-JEPA: predict the embedding of a text from a video and a query.

| paper (arXiv 2512.10942)  | here                                            |
|---------------------------|-------------------------------------------------|
| X_V, visual input         | `pixel_values_videos` `(V, T, C, H, W)`         |
| S_V, visual embedding     | `visual_embeds` `(V, N, Dx)`                    |
| X_Q, textual query        | `input_ids` `(B, L)`                            |
| Y, textual target         | `target_input_ids` `(B, Ly)`                    |
| Ŝ_Y, predicted embedding  | `predicted_embeds` `(B, D)`                     |
| S_Y, target embedding     | `target_embeds` `(B, D)`                        |
| 1 / τ                     | `logit_scale()`                                 |

Shapes: B batch, V videos (B, or fewer if queries share them), T frames, C channels, N visual
tokens, L tokens, D embedding size.
"""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_vljepa import VLJEPAConfig
from .embedding_head import EmbeddingHead, PredictorHead, ZeroLinear
from .input_checks import check_labels, check_shape, check_tokens
from .losses import info_nce
from .predictor import Predictor, VisualStandardization
from .x_encoder import XEncoder
from .y_decoder import YDecoder
from .y_encoder import YEncoder

# For `peft.LoraConfig`. peft matches the expression against whole names; a list of suffixes such
# as ["q_proj"] would adapt the Y-Encoder too. The saved modules are new to a pretrained model, or
# shared by both sides of the loss.
LORA_TARGET_MODULES = (
    r"predictor\.backbone\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
LORA_MODULES_TO_SAVE = ["visual_projection", "predictor_head", "y_head", "logit_scale"]

MAX_SCALE = 100.0  # of the inverse temperature


@dataclass
class VLJEPAOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with `return_loss=True`):
            Bi-directional InfoNCE over this batch alone. Training over several processes gathers
            the embeddings and computes its loss outside the model.
        predicted_embeds (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`, *optional*):
            Ŝ_Y, unit vectors.
        target_embeds (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`, *optional*):
            S_Y, unit vectors. Without `target_index`, row i belongs to target text i: in training,
            where only the U distinct texts of a batch are encoded, the shape is
            `(U, embedding_dim)`.
        visual_embeds (`torch.FloatTensor` of shape `(videos, tokens, vision_hidden_size)`):
            The X-Encoder's output. Pass it as `visual_embeds` for the next question on the same
            input.
        logit_scale (`torch.FloatTensor` of shape `(1,)`): the inverse temperature.
        logit_bias (`torch.FloatTensor` of shape `(1,)`, *optional*): the sigmoid loss's bias.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
            The Predictor's states, of shape `(batch_size, tokens + query_length, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, with `output_attentions=True`):
            The Predictor's attention weights.
    """

    loss: torch.FloatTensor | None = None
    predicted_embeds: torch.FloatTensor | None = None
    target_embeds: torch.FloatTensor | None = None
    visual_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    logit_bias: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LogitScale(nn.Module):
    """The inverse temperature, learnt as a logarithm and bounded to 1/100 ... 100.

    CLIP clips it at 100 (Radford et al. 2021, section 2.5). A clip of the value alone would be a
    trap: beyond the bound its gradient is 0, so a scale that has once passed it would never come
    back, and later stages of training would start with it. Here the gradient passes the bound, as
    if the value were not bounded (straight-through). The lower bound is this project's: a scale of
    0 would have no gradient.

    A module, not a bare parameter, so that adapters can name it in `modules_to_save`.
    """

    def __init__(self, init_value: float):
        super().__init__()
        self.init_value = init_value
        # Shape (1,), not (): sharded data parallelism rejects scalar parameters.
        self.weight = nn.Parameter(torch.full((1,), init_value))

    def forward(self) -> torch.Tensor:
        logarithm = self.weight.float()
        # Without gradient: that of `exp` would overflow, or be multiplied by the clip's 0.
        scale = logarithm.detach().exp().clamp(1 / MAX_SCALE, MAX_SCALE)
        # The added term is 0; its derivative is that of `exp` where the value is not bounded.
        return scale + scale * (logarithm - logarithm.detach())  # (1,)


class LogitBias(nn.Module):
    """Learnt bias that the sigmoid loss adds to every logit."""

    def __init__(self, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.full((1,), init_value))

    def forward(self) -> torch.Tensor:
        return self.weight.float()  # (1,)


# Attributes that transformers reads from a model's direct children, to place, shard, tie and load
# them.
BACKBONE_ATTRIBUTES = (
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
)
BACKBONE_PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")  # keys are parameter names


def copy_backbone_attributes(module: nn.Module) -> None:
    """Copy placement, sharding and weight-tying attributes from a module's backbone to the module.

    transformers inspects direct children only, and the backbone is one level deeper.
    """
    for name in BACKBONE_ATTRIBUTES:
        setattr(module, name, getattr(module.backbone, name))
    for name in BACKBONE_PLANS:
        plan = getattr(module.backbone, name)
        setattr(module, name, {f"backbone.{key}": value for key, value in plan.items()})
    tied = module.backbone.all_tied_weights_keys
    module.all_tied_weights_keys = {f"backbone.{k}": f"backbone.{v}" for k, v in tied.items()}


def check_context_rows(context_input_ids: torch.Tensor | None, embeds: torch.Tensor) -> None:
    """Raise `ValueError` unless every embedding `(B, D)` has a context `(B, C)`, if any has."""
    if context_input_ids is not None and len(context_input_ids) != len(embeds):
        raise ValueError(
            f"context_input_ids has {len(context_input_ids)} rows for {len(embeds)} embeddings: "
            "give one for each."
        )


class VLJEPAPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving and initialisation.

    | weights                                                     | initial value               |
    |-------------------------------------------------------------|-----------------------------|
    | backbones: x_encoder, predictor, y_encoder, y_decoder       | pretrained, or as their own |
    | visual_projection, prefix_projection and those of the heads | normal, `initializer_range` |
    | an adapter's second layer, so that the adapter adds 0       | 0                           |
    | the learnt vector of `"attention"` pooling                  | 0                           |
    | logit_scale                                                 | `logit_scale_init_value`    |
    | logit_bias, if the model has one                            | `logit_bias_init_value`     |
    """

    config: VLJEPAConfig
    config_class = VLJEPAConfig
    base_model_prefix = "vljepa"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model and freeze the parameters that its configuration freezes."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Upstream replaces the parameters, and the new ones have `requires_grad=True`.
        (loaded[0] if kwargs.get("output_loading_info") else loaded).freeze()
        return loaded

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trainable weights.

        Upstream reports that of the first parameter, which may be a frozen encoder's in bf16.
        """
        return next(p.dtype for name, p in self.named_parameters() if "logit_scale" in name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            for weight in module.parameters():
                init.zeros_(weight)
            return
        super()._init_weights(module)
        if isinstance(module, LogitScale | LogitBias):
            init.constant_(module.weight, module.init_value)
        if isinstance(module, VisualStandardization):
            init.zeros_(module.mean)
            init.ones_(module.scale)


class TwoSidedModel(VLJEPAPreTrainedModel):
    """What VL-JEPA and the token baseline compute alike: visual tokens, and embeddings of texts.

    A token baseline that is no hybrid has no `y_encoder`, `y_head` and `logit_scale`.
    """

    def freeze(self) -> None:
        """Freeze the parameters that the configuration freezes; leave the others unchanged."""
        for frozen, part in (
            (self.config.freeze_vision, self.x_encoder),
            (self.config.freeze_text, self.y_encoder),
            (self.config.freeze_token_embedding, self.get_input_embeddings()),
            (self.config.freeze_logit_scale, self.logit_scale),
        ):
            if frozen and part is not None:
                part.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.predictor.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.predictor.backbone.set_input_embeddings(value)

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Encode videos `(V, T, C, H, W)` to visual tokens `(V, N, Dx)`.

        With `config.visual_token_pooling`, the tokens are pooled. With
        `config.concatenate_class_token`, each has the frame's class token behind it.
        """
        return self.x_encoder(pixel_values_videos)

    def encode_target(
        self,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_pooler_output: torch.Tensor | None = None,
        truncate_dim: int | None = None,
    ) -> torch.Tensor:
        """Embed a text (target, label or answer): S_Y, unit vectors `(B, D)`.

        Give the tokens, or the stored output of a frozen Y-Encoder.

        Args:
            target_input_ids (`torch.LongTensor` of shape `(B, Ly)`, *optional*)
            target_attention_mask (`torch.LongTensor` of shape `(B, Ly)`, *optional*)
            target_pooler_output (`torch.FloatTensor` of shape `(B, Dt)`, *optional*): the
                Y-Encoder's output.
            truncate_dim (`int`, *optional*): keep the first dimensions only and normalize again.
                Meant for a space trained to allow it, such as EmbeddingGemma's own
                (`project_target=False`). Give `predict` the same number.

        Raises:
            ValueError: inputs missing or given twice, token ids outside the vocabulary, padding
                without a mask, a text without a token, or one that is longer than the position
                table of the Y-Encoder.
        """
        if (target_input_ids is None) == (target_pooler_output is None):
            raise ValueError("encode_target needs target_input_ids or target_pooler_output.")
        if target_pooler_output is None:
            target_pooler_output = self.y_encoder(target_input_ids, target_attention_mask)
        check_shape("target_pooler_output", target_pooler_output, "batch", "width")
        return self.y_head(target_pooler_output, truncate_dim)  # (B, D)


class VLJEPAModel(TwoSidedModel):
    """The joint model: `predict` returns Ŝ_Y, `encode_target` S_Y; their product ranks texts."""

    # A checkpoint may also hold a Y-Decoder, which this model does not load.
    _keys_to_ignore_on_load_unexpected = [r"^y_decoder\."]

    def __init__(self, config: VLJEPAConfig):
        super().__init__(config)
        self.x_encoder = XEncoder(
            config.vision_config,
            frozen=config.freeze_vision,
            pooling=config.visual_token_pooling,
            concatenate_class=config.concatenate_class_token,
        )
        self.predictor = Predictor(
            config.predictor_config,
            visual_hidden_size=self.x_encoder.output_size,
            standardize=config.standardize_visual_tokens,
            visual_dropout=config.visual_dropout,
        )
        self.predictor_head = PredictorHead(
            config.predictor_config.hidden_size, config.embedding_dim, config.predictor_pooling
        )
        self.y_encoder = YEncoder(
            config.text_config,
            frozen=config.freeze_text,
            pooling=config.text_pooling,
            dense=tuple(config.text_dense),
        )
        self.y_head = EmbeddingHead(
            self.y_encoder.output_size,
            config.embedding_dim,
            project=config.project_target,
            adapter_size=config.target_adapter_size,
        )
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.logit_bias = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = LogitBias(config.logit_bias_init_value)
        for module in (self.x_encoder, self.predictor, self.y_encoder):
            copy_backbone_attributes(module)
        self.post_init()
        self.freeze()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model with a configuration that names no Y-Decoder, because it has none."""
        self.config = copy.copy(self.config)  # a model around this one may share the original
        self.config.decoder_config = None
        super().save_pretrained(save_directory, **kwargs)

    def fold_standardization(self) -> None:
        """Replace the standardisation of the visual tokens by an equal change of their projection.

        The model then computes the same with one operation less, and has no such vectors.
        """
        if self.config.standardize_visual_tokens:
            self.predictor.fold_standardization()
            self.config.standardize_visual_tokens = False

    def predict(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        truncate_dim: int | None = None,
        visual_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the embedding of the answer to a query about a video: Ŝ_Y, unit vectors `(B, D)`.

        Give the pixels, or their `visual_embeds` from `encode_video`. With one video, or with
        `visual_index`, any number of queries about a video cost one pass of the X-Encoder.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(V, T, C, H, W)`, *optional*): B
                videos, or one for all queries; any number with `visual_index`.
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): the query. Without one,
                or with an L of 0, the model predicts a caption (the paper's pretraining).
            attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*): 1 for real tokens.
            visual_embeds (`torch.FloatTensor` of shape `(V, N, Dx)`, *optional*): the videos as
                `encode_video` returns them.
            truncate_dim (`int`, *optional*): keep the first dimensions only, see `encode_target`.
            visual_index (`torch.LongTensor` of shape `(B,)`, *optional*): each query's video among
                the V.

        Raises:
            ValueError: inputs missing, empty or given twice, numbers of videos and queries that
                do not match, token ids outside the vocabulary, or padding without a mask.
        """
        if (pixel_values_videos is None) == (visual_embeds is None):
            raise ValueError("predict needs pixel_values_videos or visual_embeds, and not both.")
        if visual_embeds is None:
            visual_embeds = self.encode_video(pixel_values_videos)  # (V, N, Dx)
        return self.read(visual_embeds, input_ids, attention_mask, truncate_dim, visual_index)[0]

    def read(
        self,
        visual_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        truncate_dim: int | None = None,
        visual_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, BaseModelOutput]:
        """Return Ŝ_Y `(B, D)` and the Predictor's output over [visual tokens ; query]."""
        if input_ids is None:
            shape = ((visual_embeds if visual_index is None else visual_index).shape[0], 0)
            input_ids = torch.empty(shape, dtype=torch.long, device=visual_embeds.device)
        check_shape("visual_embeds", visual_embeds, "batch", "tokens", "hidden size")
        attention_mask = check_tokens("", input_ids, attention_mask, self.config.predictor_config)
        states, mask = self.predictor(
            visual_embeds, input_ids, attention_mask, visual_index, **kwargs
        )  # (B, N + L, Dp), (B, N + L)
        embeds = self.predictor_head(
            states.last_hidden_state, mask, visual_embeds.shape[1], truncate_dim
        )  # (B, D)
        return embeds, states

    def check_values(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        **kwargs: torch.Tensor,
    ) -> None:
        """Raise the errors of `forward` for the tokens of a batch, which may be on the CPU still.

        A training step calls this before the batch moves, and then `forward` within
        `values_checked`. `kwargs` are the other parts of the batch, which have no tokens.
        """
        if input_ids is not None:
            check_tokens("", input_ids, attention_mask, self.config.predictor_config)
        if target_input_ids is not None:
            self.y_encoder.check("target_", target_input_ids, target_attention_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_pooler_output: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        return_loss: bool = False,
        visual_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLJEPAOutput:
        """Embed a batch of (video, query, target) triples.

        Args:
            visual_index (`torch.LongTensor` of shape `(B,)`, *optional*): each sample's video among
                the V, so that a video which many samples share is encoded once. Default: video i.
            target_index (`torch.LongTensor` of shape `(B,)`, *optional*): each sample's row among
                the targets, so that a text which many samples share is encoded once. Default: row
                i.
            return_loss (`bool`, *optional*): compute the loss over this batch.
            kwargs: `output_hidden_states` and `output_attentions`, for the Predictor.

        The other arguments are those of `predict` and `encode_target`.
        """
        if visual_embeds is None and pixel_values_videos is not None:
            visual_embeds = self.encode_video(pixel_values_videos)  # (V, N, Dx)
        given = (visual_embeds, target_input_ids, target_pooler_output)
        if all(each is None for each in given):
            raise ValueError(
                "forward needs a video (pixel_values_videos or visual_embeds) or a target "
                "(target_input_ids or target_pooler_output); input_ids alone is a query. To embed "
                "texts, tokenize them with processor(targets=...) or use SentenceTransformer."
            )
        predicted_embeds = target_embeds = loss = None
        states = BaseModelOutput()
        if visual_embeds is not None:
            predicted_embeds, states = self.read(
                visual_embeds, input_ids, attention_mask, visual_index=visual_index, **kwargs
            )  # (B, D)
        if target_input_ids is not None or target_pooler_output is not None:
            target_embeds = distinct_target_embeds = self.encode_target(
                target_input_ids, target_attention_mask, target_pooler_output
            )  # (U, D)
            if target_index is not None:
                target_embeds = distinct_target_embeds[target_index]  # (B, D)
        scale = self.logit_scale()
        if return_loss:
            loss = info_nce(predicted_embeds, target_embeds, scale, target_index).loss
        return VLJEPAOutput(
            loss=loss,
            predicted_embeds=predicted_embeds,
            target_embeds=target_embeds,
            visual_embeds=visual_embeds,
            logit_scale=scale,
            logit_bias=None if self.logit_bias is None else self.logit_bias(),
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )

    # The methods of transformers' other two-tower models.

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Predict Ŝ_Y from a video, with or without a query.

        `pooler_output` is Ŝ_Y `(B, D)`, `last_hidden_state` the visual tokens `(B, N, Dx)`. The
        optional `hidden_states` and `attentions` are the Predictor's.
        """
        visual_embeds = self.encode_video(pixel_values_videos)  # (B, N, Dx)
        predicted_embeds, states = self.read(visual_embeds, input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=visual_embeds,
            pooler_output=predicted_embeds,  # (B, D)
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Call `get_video_features` on images `(B, C, H, W)`, each as a video of one frame."""
        return self.get_video_features(pixel_values.unsqueeze(1), **kwargs)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embed texts, given as tokens of the target tokenizer.

        `pooler_output` is S_Y `(B, D)`, `last_hidden_state` the Y-Encoder's states `(B, L, Dy)`.
        """
        attention_mask = self.y_encoder.check("", input_ids, attention_mask)
        states = self.y_encoder.read(input_ids, attention_mask, **kwargs)
        pooled = self.y_encoder.pool(states.last_hidden_state, attention_mask)  # (B, Dt)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=self.y_head(pooled),  # (B, D)
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )


@dataclass
class VLJEPAForZeroShotImageClassificationOutput(ModelOutput):
    """
    Args:
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): cosines divided by the
            temperature.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): the same, transposed.
    """

    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None


class VLJEPAForZeroShotImageClassification(VLJEPAPreTrainedModel):
    """Model class for transformers' `zero-shot-image-classification` pipeline; it loads the
    checkpoints of [`VLJEPAModel`].

    Give that pipeline the target tokenizer, `tokenizer=processor.target_tokenizer`: its default is
    the Predictor's.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_unexpected = [r"^y_decoder\."]

    def __init__(self, config: VLJEPAConfig):
        super().__init__(config)
        self.vljepa = VLJEPAModel(config)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        self.vljepa.freeze()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLJEPAForZeroShotImageClassificationOutput:
        """Compare every image with every text.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, C, H, W)`): the images. The query
                is empty, so the model predicts captions.
            input_ids, attention_mask (`torch.LongTensor` of shape `(texts, Ly)`): texts, encoded by
                the target tokenizer.
            token_type_ids (*optional*): ignored; some tokenizers add it.
        """
        predicted_embeds = self.vljepa.predict(pixel_values.unsqueeze(1))  # (images, D)
        target_embeds = self.vljepa.encode_target(input_ids, attention_mask)  # (texts, D)
        logits = self.vljepa.logit_scale() * predicted_embeds @ target_embeds.T
        return VLJEPAForZeroShotImageClassificationOutput(
            logits_per_image=logits, logits_per_text=logits.T
        )


@dataclass
class VLJEPAForConditionalGenerationOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): mean cross-entropy over the text's tokens.
        logits (`torch.FloatTensor` of shape `(batch_size, tokens, vocab_size)`): over
            [context ; embedding ; text].
        predicted_embeds (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`): the decoded
            embeddings.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    predicted_embeds: torch.FloatTensor | None = None


class VLJEPAForConditionalGeneration(VLJEPAPreTrainedModel):
    """A [`VLJEPAModel`] with a Y-Decoder, which decodes a predicted embedding to text.

    The decoder reads the embedding and no other input from the video, so it cannot write what Ŝ_Y
    does not encode. If the configuration enables it, the decoder also reads the query
    (`decoder_reads_query`) and the text of the previous segment (`decoder_reads_previous`). Both
    are passed as `context_input_ids`, from
    `processor(contexts=[config.decoder_context(query, previous)])`.

    `python -m training.train_decoder` adds a Y-Decoder to a checkpoint without one.
    """

    def __init__(self, config: VLJEPAConfig):
        super().__init__(config)
        if config.decoder_config is None:
            raise ValueError(
                "this checkpoint has no Y-Decoder (decoder_config is empty): train one with "
                "`python -m training.train_decoder`, or load it as a VLJEPAModel."
            )
        self.vljepa = VLJEPAModel(config)
        self.y_decoder = YDecoder(
            config.decoder_config, config.embedding_dim, config.decoder_prefix_tokens
        )
        copy_backbone_attributes(self.y_decoder)
        self.post_init()
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a model; raise ValueError if the Y-Decoder's weights are missing.

        Upstream would warn and initialise them at random.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any(name.startswith("y_decoder.") for name in info["missing_keys"]):
            raise ValueError(
                "this checkpoint lacks the weights of the Y-Decoder that its configuration names, "
                "because it was saved as a VLJEPAModel: load it as one, or train the decoder again."
            )
        return (model, info) if output_loading_info else model

    def freeze(self) -> None:
        self.vljepa.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.vljepa.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vljepa.set_input_embeddings(value)

    def embed(
        self,
        pixel_values_videos: torch.Tensor | None,
        predicted_embeds: torch.Tensor | None,
        **kwargs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return Ŝ_Y `(B, D)`, given or predicted; `kwargs` are other arguments of `predict`."""
        if predicted_embeds is None:
            return self.vljepa.predict(pixel_values_videos, **kwargs)
        if any(value is not None for value in (pixel_values_videos, *kwargs.values())):
            raise ValueError("give predicted_embeds, or the inputs to predict them from, not both.")
        check_shape("predicted_embeds", predicted_embeds, "batch", "embedding size")
        if predicted_embeds.shape[1] != self.config.embedding_dim:
            raise ValueError(
                f"predicted_embeds has {predicted_embeds.shape[1]} dimensions, but this Y-Decoder "
                f"reads {self.config.embedding_dim}: give embeddings of this model, not truncated."
            )
        return predicted_embeds

    def check_context(
        self, context_input_ids: torch.Tensor | None, context_attention_mask: torch.Tensor | None
    ) -> None:
        """Reject a context that this decoder was not trained to read, or a missing one."""
        reads = self.config.decoder_reads_query or self.config.decoder_reads_previous
        if reads and context_input_ids is None:
            raise ValueError(
                "context_input_ids is missing: this Y-Decoder reads the query or the previous text "
                "(decoder_reads_query, decoder_reads_previous). Use processor(contexts=[...])."
            )
        if not reads and context_input_ids is not None and context_input_ids.shape[1]:
            raise ValueError(
                "context_input_ids is given, but this Y-Decoder reads the embedding alone: leave "
                "it out, or train one with decoder_reads_query or decoder_reads_previous."
            )
        if context_input_ids is not None:
            config = self.config.decoder_config
            check_tokens("context_", context_input_ids, context_attention_mask, config)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        predicted_embeds: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLJEPAForConditionalGenerationOutput:
        """Compute the loss of a text, given an embedding.

        Args:
            predicted_embeds (`torch.FloatTensor` of shape `(B, D)`, *optional*): embeddings to
                decode, in place of the inputs to predict them from, which are the arguments of
                `VLJEPAModel.predict`. The Y-Encoder's embeddings of texts are in the same space.
            context_input_ids, context_attention_mask (`torch.LongTensor` of shape `(B, C)`,
                *optional*): read before the embedding; padded on the left.
            labels (`torch.LongTensor` of shape `(B, L)`): the text's tokens and an end token,
                padded with -100.
        """
        self.check_context(context_input_ids, context_attention_mask)
        embeds = self.embed(
            pixel_values_videos,
            predicted_embeds,
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_embeds=visual_embeds,
        )  # (B, D)
        check_context_rows(context_input_ids, embeds)
        check_labels(labels, len(embeds), self.config.decoder_config)
        output = self.y_decoder(embeds, labels, context_input_ids, context_attention_mask, **kwargs)
        return VLJEPAForConditionalGenerationOutput(
            loss=output.loss, logits=output.logits, predicted_embeds=embeds
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        visual_embeds: torch.Tensor | None = None,
        predicted_embeds: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """Generate the answer to a query about a video: the text's tokens `(B, L)`.

        The class docstring lists the decoder's inputs.

        Args:
            kwargs: arguments of transformers' `generate`: `num_beams`, `do_sample`,
                `max_new_tokens`, `num_return_sequences`, `stop_strings`, `generation_config`, ...
                Default: one greedy text of at most 64 new tokens for each embedding.

        The other arguments are those of `forward`. `processor.batch_decode` converts the tokens to
        text; `decode_texts` does both steps.
        """
        self.check_context(context_input_ids, context_attention_mask)
        embeds = self.embed(
            pixel_values_videos,
            predicted_embeds,
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_embeds=visual_embeds,
        )  # (B, D)
        check_context_rows(context_input_ids, embeds)
        return self.y_decoder.generate(embeds, context_input_ids, context_attention_mask, **kwargs)


__all__ = [
    "LORA_MODULES_TO_SAVE",
    "LORA_TARGET_MODULES",
    "VLJEPAForConditionalGeneration",
    "VLJEPAForConditionalGenerationOutput",
    "VLJEPAForZeroShotImageClassification",
    "VLJEPAForZeroShotImageClassificationOutput",
    "VLJEPAModel",
    "VLJEPAOutput",
    "VLJEPAPreTrainedModel",
]
