"""Y-Decoder: an embedding to text, for when words are needed.

The paper calls it lightweight and says no more (section 3.1). Here it is a causal language model
that reads the embedding as a few tokens:

    [what was asked, what was said before]  [the embedding as k tokens]  the text  <end>

The first part is optional (`decoder_reads_query`, `decoder_reads_previous`) and is padded on the
left, so that in a batch the embedding always stands right before the text.

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

MAX_NEW_TOKENS = 64  # unless the call says otherwise; the library's 20 would cut sentences
IGNORED = -100  # the label of what is not text


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each real token's place among the real ones, from 0: `(B, L)` to `(B, L)`."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


class YDecoder(nn.Module):
    """A causal language model conditioned on embeddings.

    Args:
        config: of the language model.
        embedding_dim: D.
        prefix_tokens: k.
    """

    def __init__(self, config: PreTrainedConfig, embedding_dim: int, prefix_tokens: int):
        super().__init__()
        self.prefix_projection = nn.Linear(embedding_dim, prefix_tokens * config.hidden_size)
        self.backbone = AutoModelForCausalLM.from_config(config)
        self.backbone.generation_config.max_new_tokens = MAX_NEW_TOKENS

    def prompt(
        self,
        embeds: torch.Tensor,
        context_input_ids: torch.Tensor | None,
        context_attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, D)`, `(B, C)` and `(B, C)` to what stands before the text, `(B, C + k, H)`, and its
        mask `(B, C + k)`.

        The embeddings are put on the unit sphere first: the average of a segment's is not on it.
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
        """The language model's output over [context ; embedding ; text], with its mean loss over
        the text: `labels` `(B, L)` are the text's tokens with an end, -100 where there are none.
        """
        prompt, mask = self.prompt(embeds, context_input_ids, context_attention_mask)
        is_text = labels != IGNORED
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
        """The text's tokens as the library's `generate` returns them: `(B, L)`, padded on the
        right; `kwargs` are its arguments. `max_length` counts what stands before the text, too."""
        if "max_length" in kwargs:
            kwargs.setdefault("max_new_tokens", None)  # or our default would win
        prompt, mask = self.prompt(embeds, context_input_ids, context_attention_mask)
        return self.backbone.generate(inputs_embeds=prompt, attention_mask=mask, **kwargs)


__all__ = ["IGNORED", "MAX_NEW_TOKENS", "YDecoder"]
