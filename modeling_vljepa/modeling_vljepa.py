"""VL-JEPA: predict the embedding of a text from what is seen and what is asked.

| paper (arXiv 2512.10942)  | here                                            |
|---------------------------|-------------------------------------------------|
| X_V, visual input         | `pixel_values_videos` `(B, T, C, H, W)`         |
| S_V, visual embedding     | `visual_embeds` `(B, N, Dx)`                    |
| X_Q, textual query        | `input_ids` `(B, L)`                            |
| Y, textual target         | `target_input_ids` `(B, Ly)`                    |
| Ŝ_Y, predicted embedding  | `predicted_embeds` `(B, D)`                     |
| S_Y, target embedding     | `target_embeds` `(B, D)`                        |
| 1 / τ                     | `logit_scale()`                                 |

Shapes: B batch, T frames, C channels, N visual tokens, L tokens, D embedding size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_vljepa import VLJEPAConfig
from .embedding_head import EmbeddingHead
from .losses import info_nce
from .predictor import Predictor
from .x_encoder import XEncoder
from .y_encoder import YEncoder


@dataclass
class VLJEPAOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with `return_loss=True`):
            Bi-directional InfoNCE over this batch alone. Training over several processes gathers
            the embeddings first and calls the loss itself.
        predicted_embeds (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`, *optional*):
            Ŝ_Y, unit vectors.
        target_embeds (`torch.FloatTensor` of shape `(batch_size, embedding_dim)`, *optional*):
            S_Y, unit vectors.
        visual_embeds (`torch.FloatTensor` of shape `(batch_size, tokens, vision_hidden_size)`):
            The X-Encoder's output, to be handed back in for the next question on the same input.
        logit_scale (`torch.FloatTensor` of shape `(1,)`): the inverse temperature.
    """

    loss: torch.FloatTensor | None = None
    predicted_embeds: torch.FloatTensor | None = None
    target_embeds: torch.FloatTensor | None = None
    visual_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None


class LogitScale(nn.Module):
    """The inverse temperature, learnt as a logarithm and at most 100 (CLIP's bound).

    A module, not a bare parameter, so that adapters can name it in `modules_to_save`.
    """

    def __init__(self, init_value: float):
        super().__init__()
        self.init_value = init_value
        # One axis: sharded data parallelism refuses parameters that have none.
        self.weight = nn.Parameter(torch.full((1,), init_value))

    def forward(self) -> torch.Tensor:
        return self.weight.float().exp().clamp(max=100.0)  # (1,)


class VLJEPAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation.

    | weights                                            | initial value                     |
    |----------------------------------------------------|-----------------------------------|
    | backbones inside x_encoder, predictor, y_encoder   | pretrained, or as their own class |
    | visual_projection and the projections of the heads | normal, std `initializer_range`   |
    | logit_scale                                        | `logit_scale_init_value`          |
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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LogitScale):
            init.constant_(module.weight, module.init_value)


class VLJEPAModel(VLJEPAPreTrainedModel):
    """`predict` makes Ŝ_Y, `encode_target` makes S_Y, and their product ranks texts."""

    def __init__(self, config: VLJEPAConfig):
        super().__init__(config)
        self.x_encoder = XEncoder(config.vision_config, frozen=config.freeze_vision)
        self.predictor = Predictor(
            config.predictor_config, visual_hidden_size=config.vision_config.hidden_size
        )
        self.predictor_head = EmbeddingHead(
            config.predictor_config.hidden_size, config.embedding_dim
        )
        self.y_encoder = YEncoder(config.text_config, frozen=config.freeze_text)
        self.y_head = EmbeddingHead(config.text_config.hidden_size, config.embedding_dim)
        self.logit_scale = LogitScale(config.logit_scale_init_value)
        self.post_init()
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model; what its configuration freezes takes no gradient here either."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Upstream replaces every parameter by a new one, and a new one takes a gradient.
        (loaded[0] if kwargs.get("output_loading_info") else loaded).freeze()
        return loaded

    def freeze(self) -> None:
        """Stop the gradient of what the configuration freezes; the rest stays as it is."""
        for frozen, part in (
            (self.config.freeze_vision, self.x_encoder),
            (self.config.freeze_text, self.y_encoder),
            (self.config.freeze_token_embedding, self.get_input_embeddings()),
            (self.config.freeze_logit_scale, self.logit_scale),
        ):
            if frozen:
                part.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.predictor.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.predictor.backbone.set_input_embeddings(value)

    def predict(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the expected answer to a query about a video: Ŝ_Y, unit vectors `(B, D)`.

        Give the pixels, or the `visual_embeds` that `encode_video` made of them: many questions
        on one video then cost one pass of the X-Encoder.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, T, C, H, W)`, *optional*)
            input_ids (`torch.LongTensor` of shape `(B, L)`): the query; L may be 0.
            attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*): 1 for real tokens.
            visual_embeds (`torch.FloatTensor` of shape `(B, N, Dx)`, *optional*)
        """
        if (pixel_values_videos is None) == (visual_embeds is None):
            raise ValueError("predict needs pixel_values_videos or visual_embeds, and not both.")
        if input_ids is None:
            raise ValueError("predict needs input_ids: an empty query is a (batch, 0) tensor.")
        if visual_embeds is None:
            visual_embeds = self.encode_video(pixel_values_videos)  # (B, N, Dx)
        hidden_states, mask = self.predictor(visual_embeds, input_ids, attention_mask)
        return self.predictor_head(hidden_states, mask)  # (B, D)

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """The X-Encoder alone: `(B, T, C, H, W)` to visual tokens `(B, N, Dx)`."""
        return self.x_encoder(pixel_values_videos)

    def encode_target(
        self,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed a text, be it a target, a label or an answer: S_Y, unit vectors `(B, D)`.

        Give the tokens, or the states that a frozen Y-Encoder made of them before.

        Args:
            target_input_ids (`torch.LongTensor` of shape `(B, Ly)`, *optional*)
            target_attention_mask (`torch.LongTensor` of shape `(B, Ly)`, *optional*)
            target_hidden_states (`torch.FloatTensor` of shape `(B, Ly, Dy)`, *optional*): the
                Y-Encoder's output; its mean, as `(B, 1, Dy)`, serves as well.
        """
        if (target_input_ids is None) == (target_hidden_states is None):
            raise ValueError("encode_target needs target_input_ids or target_hidden_states.")
        if target_hidden_states is None:
            target_hidden_states = self.y_encoder(target_input_ids, target_attention_mask)
        return self.y_head(target_hidden_states, target_attention_mask)  # (B, D)

    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_hidden_states: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> VLJEPAOutput:
        """Embed a batch of (video, query, target) triples.

        Args:
            target_index (`torch.LongTensor` of shape `(B,)`, *optional*): which row of
                the target rows is each sample's, so that a batch of answers in which
                "yes" stands fifty times encodes it once. Default: row i.
            return_loss (`bool`, *optional*): compute the loss over this batch.

        The other arguments are those of `predict` and `encode_target`.
        """
        if visual_embeds is None and pixel_values_videos is not None:
            visual_embeds = self.encode_video(pixel_values_videos)  # (B, N, Dx)
        predicted_embeds = target_embeds = loss = None
        if visual_embeds is not None:
            predicted_embeds = self.predict(
                input_ids=input_ids, attention_mask=attention_mask, visual_embeds=visual_embeds
            )  # (B, D)
        if target_input_ids is not None or target_hidden_states is not None:
            target_embeds = self.encode_target(
                target_input_ids, target_attention_mask, target_hidden_states
            )  # (U, D)
            if target_index is not None:
                target_embeds = target_embeds[target_index]  # (B, D)
        scale = self.logit_scale()
        if return_loss:
            loss = info_nce(predicted_embeds, target_embeds, scale, target_index).loss
        return VLJEPAOutput(
            loss=loss,
            predicted_embeds=predicted_embeds,
            target_embeds=target_embeds,
            visual_embeds=visual_embeds,
            logit_scale=scale,
        )


__all__ = ["VLJEPAModel", "VLJEPAOutput", "VLJEPAPreTrainedModel"]
