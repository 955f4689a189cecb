"""Y-Decoder: an embedding to text, used only if text output is needed.

The paper calls it lightweight and gives no details (section 3.1). Here it is a causal language
model that reads the embedding as a few tokens:

    [query, previous text]  [the embedding as k tokens]  the text  <end>

The first part is optional (`decoder_reads_query`, `decoder_reads_previous`) and is padded on the
left, so that in a batch the embedding always directly precedes the text.

Shapes: B batch, D embedding size, k prefix tokens, C context tokens, L text tokens, H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import from_config
from .input_checks import IGNORED, position_limit

MAX_NEW_TOKENS = 64  # default of `generate`; the default of transformers, 20, cuts sentences


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position `(B, L)` of each real token among the real ones, from 0."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


class YDecoder(nn.Module):
    """A causal language model conditioned on embeddings.

    Args:
        config: configuration of the language model.
        embedding_dim: D.
        prefix_tokens: k.
    """

    def __init__(self, config: PreTrainedConfig, embedding_dim: int, prefix_tokens: int):
        super().__init__()
        self.prefix_projection = nn.Linear(embedding_dim, prefix_tokens * config.hidden_size)
        self.backbone = from_config(AutoModelForCausalLM, config)
        self.backbone.generation_config.max_new_tokens = MAX_NEW_TOKENS
        self.limit = position_limit(self.backbone)

    def check_length(self, prompt: torch.Tensor, text: int) -> None:
        """Raise `ValueError` if a prompt `(B, C + k, H)` and a text exceed the position table."""
        total = prompt.shape[1] + text
        if self.limit is not None and total > self.limit:
            raise ValueError(
                f"context, embedding and {text} tokens of text have {total} positions, but the "
                f"position table of this Y-Decoder ends at {self.limit}: shorten labels or "
                "context_input_ids, or give a lower max_new_tokens."
            )

    def prompt(
        self,
        embeds: torch.Tensor,
        context_input_ids: torch.Tensor | None,
        context_attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input states before the text, `(B, C + k, H)`, and their mask `(B, C + k)`.

        The embeddings `(B, D)` are normalized first, because the mean of a segment's embeddings
        is shorter than a unit vector.
        """
        unit = F.normalize(embeds.float(), dim=-1).to(self.prefix_projection.weight.dtype)
        prefix = self.prefix_projection(unit)  # (B, k * H)
        prefix = prefix.unflatten(1, (-1, self.backbone.config.hidden_size))  # (B, k, H)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)  # (B, k)
        if context_input_ids is None:
            return prefix, mask
        context = self.backbone.get_input_embeddings()(context_input_ids).to(prefix.dtype)
        if context_attention_mask is None:
            context_attention_mask = torch.ones_like(context_input_ids)
        return (
            torch.cat([context, prefix], dim=1),  # (B, C + k, H)
            torch.cat([context_attention_mask, mask], dim=1),  # (B, C + k)
        )

    def forward(
        self,
        embeds: torch.Tensor,
        labels: torch.Tensor,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return the language model's output over [context ; embedding ; text].

        Its loss is the mean over the text. `labels` `(B, L)` are the text's tokens with an end
        token, padded with -100.
        """
        prompt, mask = self.prompt(embeds, context_input_ids, context_attention_mask)
        self.check_length(prompt, labels.shape[1])
        is_text = labels != IGNORED
        # -100 has no row in the token table; the mask hides the token 0 that replaces it.
        text = self.backbone.get_input_embeddings()(labels.masked_fill(~is_text, 0))  # (B, L, H)
        mask = torch.cat([mask, is_text.long()], dim=1)  # (B, C + k + L)
        return self.backbone(
            inputs_embeds=torch.cat([prompt, text.to(prompt.dtype)], dim=1),
            attention_mask=mask,
            position_ids=positions(mask),
            labels=F.pad(labels, (prompt.shape[1], 0), value=IGNORED),  # (B, C + k + L)
            use_cache=False,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        embeds: torch.Tensor,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Generate the text's tokens `(B, L)`, padded on the right.

        `kwargs` are arguments of transformers' `generate`. `max_length` includes the context and
        the embedding.
        """
        if "max_length" in kwargs:
            kwargs.setdefault("max_new_tokens", None)  # else MAX_NEW_TOKENS takes precedence
        prompt, mask = self.prompt(embeds, context_input_ids, context_attention_mask)
        other = kwargs.keys() & {"max_length", "generation_config"}  # these may state a length
        self.check_length(prompt, kwargs.get("max_new_tokens") or (1 if other else MAX_NEW_TOKENS))
        return self.backbone.generate(inputs_embeds=prompt, attention_mask=mask, **kwargs)


__all__ = ["IGNORED", "MAX_NEW_TOKENS", "YDecoder"]
