"""Token prediction: the model that VL-JEPA is compared with (paper section 4.5), and a hybrid.

The same X-Encoder and visual projection, but all layers of the causal language model of which the
Predictor has a part. It reads one sequence and learns the next token of the target:

    [visual tokens]  [query]  [target]  <end>

With `config.predicts_embeddings` the model is a hybrid. The states of [visual tokens ; query],
which no token of the target reaches, also predict the target's embedding, as VL-JEPA's do.

Shapes: B queries, V videos, N visual tokens, L query tokens, Ly target tokens, C texts, K texts of
a pass, H hidden size, D embedding size.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import SubConfigSpec
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_vljepa import VLJEPAConfig
from .embedding_head import EmbeddingHead, PredictorHead
from .input_checks import IGNORED, check_labels, check_shape, check_tokens
from .modeling_vljepa import (
    LogitBias,
    LogitScale,
    TwoSidedModel,
    copy_backbone_attributes,
)
from .predictor import Predictor, join_masks
from .x_encoder import XEncoder
from .y_decoder import MAX_NEW_TOKENS, positions
from .y_encoder import YEncoder

TOKEN_AUTO_MAP = {
    "AutoConfig": "token_model.VLJEPATokenConfig",
    "AutoModel": "token_model.VLJEPATokenModel",
}
_PREDICTOR = VLJEPAConfig.sub_configs_defaults["predictor_config"]


class VLJEPATokenConfig(VLJEPAConfig):
    r"""
    Configuration of a [`VLJEPATokenModel`]. It has the fields of [`VLJEPAConfig`], of which those
    of the Y-Encoder and of the shared space matter to a hybrid alone.

    Args:
        predictor_config (`dict` or `PreTrainedConfig`, *optional*):
            The causal language model. Default: the sixteen layers of the shape of Llama-3.2-1B.
        predicts_embeddings (`bool`, *optional*, defaults to `False`):
            The model is a hybrid, which also predicts embeddings.
    """

    model_type = "vljepa_tokens"
    sub_configs_defaults = {
        **VLJEPAConfig.sub_configs_defaults,
        "predictor_config": SubConfigSpec(
            AutoConfig,
            model_type=_PREDICTOR.model_type,
            init_kwargs={**_PREDICTOR.init_kwargs, "num_hidden_layers": 16},
        ),
    }

    predicts_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.predictor_config.is_causal = True  # the parent's Predictor reads in both directions

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the configuration; it names the code of the token model, and no pipelines."""
        self.prompts, self.target_prompts = self.prompts, self.target_prompts
        self.auto_map = dict(TOKEN_AUTO_MAP)
        super(VLJEPAConfig, self).save_pretrained(save_directory, **kwargs)


@dataclass
class VLJEPATokenOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with `labels`):
            Mean cross-entropy over the target tokens of the batch.
        target_tokens (`torch.LongTensor` of shape `()`, *optional*, with `labels`):
            The number of these tokens.
        logits (`torch.FloatTensor` of shape `(batch_size, query_length + labels_length + 1,
            vocab_size)`, *optional*, with `labels`):
            From the last visual token on.
        predicted_embeds, target_embeds, logit_scale, logit_bias (*optional*, of a hybrid):
            As those of [`VLJEPAOutput`].
        visual_embeds (`torch.FloatTensor` of shape `(videos, tokens, vision_hidden_size)`):
            The X-Encoder's output.
    """

    loss: torch.FloatTensor | None = None
    target_tokens: torch.LongTensor | None = None
    logits: torch.FloatTensor | None = None
    predicted_embeds: torch.FloatTensor | None = None
    target_embeds: torch.FloatTensor | None = None
    visual_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    logit_bias: torch.FloatTensor | None = None


class TokenPredictor(Predictor):
    """The Predictor's visual projection, before a whole causal language model."""

    auto_class = AutoModelForCausalLM

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone.generation_config.max_new_tokens = MAX_NEW_TOKENS


def append_text(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return [query ; target] without padding between both, its labels, and the query's mask.

    The padding of a query moves behind its target. Otherwise the first token of the target would
    be predicted from a padding position, and every later one from a shifted position.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(B, L)`): padded on the right.
        labels (`torch.LongTensor` of shape `(B, Ly)`): the target, padded with -100.

    Returns: three tensors `(B, L + Ly)`; the labels are -100 outside the target.
    """
    is_text = labels != IGNORED
    is_query = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    is_query = is_query.bool()
    order = torch.cat([is_query, is_text], dim=1).logical_not().to(torch.uint8)
    order = order.argsort(dim=1, stable=True)  # (B, L + Ly), real tokens first
    parts = (
        (input_ids, labels.masked_fill(~is_text, 0)),  # -100 has no row in the token table
        (torch.full_like(input_ids, IGNORED), labels),
        (is_query, torch.zeros_like(is_text)),
    )
    ids, joined_labels, query = (torch.cat(part, dim=1).gather(1, order) for part in parts)
    return ids, joined_labels, query


class VLJEPATokenModel(TwoSidedModel):
    """A vision-language model that predicts the tokens of the target, and with
    `config.predicts_embeddings` its embedding too.

    `python -m training.token_baseline` trains one.
    """

    config: VLJEPATokenConfig
    config_class = VLJEPATokenConfig
    accepts_loss_kwargs = False  # otherwise Trainer counts the labels without the first of each row

    def __init__(self, config: VLJEPATokenConfig):
        super().__init__(config)
        self.x_encoder = XEncoder(
            config.vision_config,
            frozen=config.freeze_vision,
            pooling=config.visual_token_pooling,
            concatenate_class=config.concatenate_class_token,
        )
        self.predictor = TokenPredictor(
            config.predictor_config,
            visual_hidden_size=self.x_encoder.output_size,
            standardize=config.standardize_visual_tokens,
            visual_dropout=config.visual_dropout,
        )
        self.predictor_head = self.y_encoder = self.y_head = None
        self.logit_scale = self.logit_bias = None
        if config.predicts_embeddings:
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
            if config.logit_bias_init_value is not None:
                self.logit_bias = LogitBias(config.logit_bias_init_value)
            copy_backbone_attributes(self.y_encoder)
        for module in (self.x_encoder, self.predictor):
            copy_backbone_attributes(module)
        self.post_init()
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trainable weights."""
        return self.predictor.visual_projection.weight.dtype

    # -- inputs ----------------------------------------------------------------------------

    def check_values(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        **kwargs: torch.Tensor,
    ) -> None:
        """Raise the errors of `forward` for the tokens of a batch, which may be on the CPU still.

        See `VLJEPAModel.check_values`.
        """
        config = self.config.predictor_config
        if input_ids is not None:
            check_tokens("", input_ids, attention_mask, config)
        if labels is not None:
            check_labels(labels, len(labels if input_ids is None else input_ids), config)
        if target_input_ids is not None and self.y_encoder is not None:
            self.y_encoder.check("target_", target_input_ids, target_attention_mask)

    def read_inputs(
        self,
        pixel_values_videos: torch.Tensor | None,
        visual_embeds: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        visual_index: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the checked visual tokens `(V, N, Dx)`, query and mask `(B, L)`.

        Raises:
            ValueError: inputs missing or given twice, token ids outside the vocabulary, or padding
                without a mask.
        """
        if (pixel_values_videos is None) == (visual_embeds is None):
            raise ValueError("give pixel_values_videos or visual_embeds, and not both.")
        if visual_embeds is None:
            visual_embeds = self.encode_video(pixel_values_videos)  # (V, N, Dx)
        check_shape("visual_embeds", visual_embeds, "batch", "tokens", "hidden size")
        if input_ids is None:
            shape = ((visual_embeds if visual_index is None else visual_index).shape[0], 0)
            input_ids = torch.empty(shape, dtype=torch.long, device=visual_embeds.device)
        config = self.config.predictor_config
        return visual_embeds, input_ids, check_tokens("", input_ids, attention_mask, config)

    def prefix(
        self,
        visual_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        visual_index: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input states [padding ; visual tokens ; query] `(B, N + L, H)` and their mask.

        Padding is on the left, so that the text that follows is next to the query.
        """
        joined = self.predictor.join(visual_embeds, input_ids, visual_index)  # (B, N + L, H)
        visual = joined[:, : joined.shape[1] - input_ids.shape[1]]  # (B, N, H)
        if attention_mask is None:
            return joined, torch.ones(joined.shape[:2], dtype=torch.long, device=joined.device)
        mask = join_masks(visual, attention_mask)  # (B, N + L)
        order = mask.argsort(dim=1, stable=True)
        moved = joined.gather(1, order.unsqueeze(-1).expand_as(joined))
        return moved, mask.gather(1, order)

    # -- embeddings, of a hybrid -------------------------------------------------------------

    def check_hybrid(self) -> None:
        """Raise `ValueError` for a model that predicts tokens alone."""
        if not self.config.predicts_embeddings:
            raise ValueError(
                "this model predicts tokens alone and has no embeddings: score texts with "
                "`score_texts`, or train a hybrid with training.token_loss_weight below 1."
            )

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

        The arguments and errors are those of `VLJEPAModel.predict`.
        """
        self.check_hybrid()
        visual_embeds, input_ids, attention_mask = self.read_inputs(
            pixel_values_videos, visual_embeds, input_ids, attention_mask, visual_index
        )
        joined = self.predictor.join(visual_embeds, input_ids, visual_index)  # (B, N + L, H)
        # No mask: later positions, and so padding on the right, are hidden from real ones.
        states = self.predictor.backbone.base_model(inputs_embeds=joined, use_cache=False)
        visual = joined[:, : joined.shape[1] - input_ids.shape[1]]
        mask = join_masks(visual, attention_mask)  # (B, N + L)
        return self.predictor_head(states.last_hidden_state, mask, visual.shape[1], truncate_dim)

    def encode_target(
        self,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_pooler_output: torch.Tensor | None = None,
        truncate_dim: int | None = None,
    ) -> torch.Tensor:
        """Embed a text: S_Y, unit vectors `(B, D)`; see `VLJEPAModel.encode_target`."""
        self.check_hybrid()
        return super().encode_target(
            target_input_ids, target_attention_mask, target_pooler_output, truncate_dim
        )

    # -- tokens ------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        target_pooler_output: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        visual_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VLJEPATokenOutput:
        """Compute the loss of the targets' tokens, and in a hybrid both embeddings.

        Args:
            labels (`torch.LongTensor` of shape `(B, Ly)`): the targets' tokens, each text with an
                end token, padded with -100.
            target_input_ids, target_attention_mask, target_pooler_output (*optional*): the targets
                as a hybrid's Y-Encoder reads them; see `VLJEPAModel.encode_target`.

        The other arguments are those of `predict`.
        """
        visual_embeds, input_ids, attention_mask = self.read_inputs(
            pixel_values_videos, visual_embeds, input_ids, attention_mask, visual_index
        )
        check_labels(labels, len(input_ids), self.config.predictor_config)
        ids, joined_labels, is_query = append_text(input_ids, attention_mask, labels)
        joined = self.predictor.join(visual_embeds, ids, visual_index)  # (B, N + L + Ly, H)
        is_hybrid = self.config.predicts_embeddings
        # No mask: padding is on the right, and a causal model hides it from all real positions.
        output = self.predictor.backbone(
            inputs_embeds=joined,
            use_cache=False,
            output_hidden_states=is_hybrid,
            logits_to_keep=ids.shape[1] + 1,  # from the last visual token on
            **kwargs,
        )
        # Position i predicts label i + 1, so the last visual token predicts the first label.
        loss = self.predictor.backbone.loss_function(
            logits=output.logits,
            labels=F.pad(joined_labels, (1, 0), value=IGNORED),
            vocab_size=output.logits.shape[-1],
        )
        predicted_embeds = target_embeds = scale = bias = None
        if is_hybrid:
            visual = joined[:, : joined.shape[1] - ids.shape[1]]
            mask = join_masks(visual, is_query.long())  # (B, N + L + Ly), without the target
            states = output.hidden_states[-1]  # (B, N + L + Ly, H)
            predicted_embeds = self.predictor_head(states, mask, visual.shape[1])
            if target_input_ids is not None or target_pooler_output is not None:
                target_embeds = self.encode_target(
                    target_input_ids, target_attention_mask, target_pooler_output
                )
            scale = self.logit_scale()
            bias = None if self.logit_bias is None else self.logit_bias()
        return VLJEPATokenOutput(
            loss=loss,
            target_tokens=(labels != IGNORED).sum(),
            logits=output.logits,
            predicted_embeds=predicted_embeds,
            target_embeds=target_embeds,
            visual_embeds=visual_embeds,
            logit_scale=scale,
            logit_bias=bias,
        )

    @torch.no_grad()
    def score_texts(
        self,
        text_labels: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values_videos: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        visual_index: torch.Tensor | None = None,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """Return the log-likelihood `(B, C)` of each of C texts as the answer to each query.

        It is the sum over the text's tokens, the end token included. [visual tokens ; query] is
        computed once for all texts.

        Args:
            text_labels (`torch.LongTensor` of shape `(C, Ly)`): the texts as `labels` of `forward`.
            batch_size: pairs of a query and a text in a pass.
        """
        visual_embeds, input_ids, attention_mask = self.read_inputs(
            pixel_values_videos, visual_embeds, input_ids, attention_mask, visual_index
        )
        check_labels(text_labels, len(text_labels), self.config.predictor_config)
        language_model = self.predictor.backbone
        prefix, mask = self.prefix(visual_embeds, input_ids, attention_mask, visual_index)
        read = language_model(
            inputs_embeds=prefix,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        first = read.logits[:, -1].float().log_softmax(dim=-1)  # (B, vocabulary)
        is_text = text_labels != IGNORED
        texts = text_labels.masked_fill(~is_text, 0)  # (C, Ly)
        scores = first[:, texts[:, 0]]  # (B, C)
        # A pass has texts of about one length, so that little of it is padding.
        lengths = is_text.sum(dim=1)
        queries = torch.arange(len(prefix), device=texts.device)
        pairs = torch.cartesian_prod(lengths.argsort(stable=True), queries)
        for columns, rows in (chunk.unbind(dim=1) for chunk in pairs.split(batch_size)):
            longest = int(lengths[columns].max())
            if longest == 1:
                continue
            cache = copy.deepcopy(read.past_key_values)  # a pass appends to it
            cache.batch_select_indices(rows)
            tokens = texts[columns, :longest]  # (K, L)
            known = torch.cat([mask[rows], torch.ones_like(tokens[:, 1:])], dim=1)
            logits = language_model(
                input_ids=tokens[:, :-1],
                attention_mask=known,
                position_ids=positions(known)[:, mask.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            ).logits.float()  # (K, L - 1, vocabulary)
            found = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
            found = found.masked_fill(~is_text[columns, 1:longest], 0)
            scores[rows, columns] += found.sum(dim=1)
        return scores

    @torch.no_grad()
    def generate(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        visual_embeds: torch.Tensor | None = None,
        visual_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """Generate the answer to a query about a video: the text's tokens, padded on the right.

        Args:
            kwargs: arguments of transformers' `generate`. Default: one greedy text of at most 64
                new tokens for each query.

        The other arguments are those of `predict`.
        """
        if "max_length" in kwargs:
            kwargs.setdefault("max_new_tokens", None)  # else MAX_NEW_TOKENS takes precedence
        visual_embeds, input_ids, attention_mask = self.read_inputs(
            pixel_values_videos, visual_embeds, input_ids, attention_mask, visual_index
        )
        prefix, mask = self.prefix(visual_embeds, input_ids, attention_mask, visual_index)
        return self.predictor.backbone.generate(inputs_embeds=prefix, attention_mask=mask, **kwargs)


__all__ = ["VLJEPATokenConfig", "VLJEPATokenModel", "VLJEPATokenOutput"]
