"""Y-Encoder: a target text to the pooled state whose projection the Predictor learns to predict.

Shapes: B batch, L target tokens, Dy hidden size, Dt width of the pooled state.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import from_config
from .embedding_head import masked_mean
from .input_checks import check_tokens, position_limit

POOLINGS = ("mean", "cls", "lasttoken")  # sentence-transformers' names


def pool(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str
) -> torch.Tensor:
    """Pool `(B, L, Dy)` with the mask `(B, L)` to `(B, Dy)`: the mean of the real tokens, the
    first token, or the last real one.

    Texts are padded on the right, as `VLJEPAProcessor` does, so the first token is real.
    """
    if pooling == "mean":
        return masked_mean(hidden_states, attention_mask)
    if pooling == "cls":
        return hidden_states[:, 0]
    if attention_mask is None:
        return hidden_states[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask).argmax(dim=1)  # (B,); `sum - 1` would miss holes
    return hidden_states[torch.arange(last.shape[0], device=last.device), last]


def gemma_masks(
    config: PreTrainedConfig, embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Return the masks of a bidirectional Gemma's kinds of layers, `None` where nothing is hidden.

    Gemma's own code builds a mask `(B, 1, L, L)` for both kinds, also for texts without padding
    that are shorter than the window. With a mask, CUDA has no flash kernel.

    Args:
        embeds (`torch.FloatTensor` of shape `(B, L, Dy)`): the embedded tokens.
        attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*)
    """
    full = near = None
    if attention_mask is not None:
        # The caller drops masks that hide nothing; to look for them here would read the device.
        full = near = create_bidirectional_mask(
            config, embeds, attention_mask, allow_is_bidirectional_skip=False
        )
    window = config.sliding_window  # of each side, the token itself included
    if embeds.shape[1] > window:
        # Not `create_bidirectional_sliding_window_mask`, whose windows are one token wider.
        near = create_bidirectional_mask(
            config, embeds, attention_mask, and_mask_function=lambda b, h, i, j: abs(i - j) < window
        )
    return {"full_attention": full, "sliding_attention": near}


class Dense(nn.Module):
    """A Dense layer of a sentence-transformers model, between its pooling and its embedding."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = ACT2FN[activation]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `(B, in_features)` to `(B, out_features)`."""
        return self.activation(self.linear(pooled.to(self.linear.weight.dtype)))


class YEncoder(nn.Module):
    """A text encoder, its pooling and its Dense layers: EmbeddingGemma in the paper (section 3.1),
    or a BERT, Qwen3-Embedding, a text tower of CLIP or Perception Encoder, the encoder of a T5 or
    of SONAR's kind.

    A frozen Y-Encoder records no graph and stays in evaluation mode; the model around it sets
    `requires_grad` of the parameters. The embedding head after it still trains.

    Args:
        config: configuration of the encoder, or of an encoder-decoder, whose encoder is used.
        frozen: see above.
        pooling: "mean", "cls" or "lasttoken", as in the encoder's own training.
        dense: one dictionary for each Dense layer: `out_features`, `bias`, `activation`.
    """

    def __init__(
        self, config: PreTrainedConfig, frozen: bool, pooling: str = "mean", dense: tuple = ()
    ):
        super().__init__()
        if config.model_type == "gemma3_text" and not config.use_bidirectional_attention:
            raise ValueError(
                "text_config is a causal Gemma, whose first tokens never see the last: set "
                "use_bidirectional_attention to true, as in EmbeddingGemma."
            )
        if pooling not in POOLINGS:
            raise ValueError(f"text_pooling is {pooling!r}: expected one of {POOLINGS}.")
        self.backbone = from_config(AutoModel, config)
        if config.is_encoder_decoder:
            self.backbone = self.backbone.get_encoder()
        if "pooler" in dict(self.backbone.named_children()):
            # Nothing here reads BERT's own pooler. Its parameters would get no gradient, and
            # data-parallel training stops at such parameters.
            self.backbone.pooler = None
        # A language model would store the keys and values of every layer for tokens that never
        # follow; an exported one would also cut them at its window, which fixes lengths.
        self.backbone.config.use_cache = False
        self.limit = position_limit(self.backbone)
        self.pooling = pooling
        self.dense = nn.Sequential()
        self.output_size = config.hidden_size  # Dt
        for layer in dense:
            self.dense.append(Dense(self.output_size, **layer))
            self.output_size = layer["out_features"]
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "YEncoder":
        return super().train(mode and not self.frozen)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode the tokens `(B, L)` with their mask `(B, L)` to pooled states `(B, Dt)`."""
        attention_mask = self.check("target_", input_ids, attention_mask)
        hidden_states = self.read(input_ids, attention_mask).last_hidden_state  # (B, L, Dy)
        return self.pool(hidden_states, attention_mask)  # (B, Dt)

    def check(
        self, prefix: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Raise `ValueError` for texts without a token, and for those that it cannot read.

        Return the mask, or `None` if it hides no token.
        """
        config, limit = self.backbone.config, self.limit
        return check_tokens(prefix, input_ids, attention_mask, config, needs_text=True, limit=limit)

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Return the encoder's own output for `(B, L)` and `(B, L)`.

        Its `last_hidden_state` is `(B, L, Dy)`. `kwargs`: `output_hidden_states`,
        `output_attentions`.
        """
        config = self.backbone.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            # An exported program has free lengths, so it cannot choose masks by the length.
            if config.model_type != "gemma3_text" or torch.compiler.is_exporting():
                return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            embeds = self.backbone.get_input_embeddings()(input_ids)  # (B, L, Dy)
            masks = gemma_masks(config, embeds, attention_mask)
            return self.backbone(inputs_embeds=embeds, attention_mask=masks, **kwargs)

    def pool(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool states `(B, L, Dy)` with the mask `(B, L)` and apply the Dense layers: `(B, Dt)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.dense(pool(hidden_states, attention_mask, self.pooling))


__all__ = ["YEncoder", "pool"]
