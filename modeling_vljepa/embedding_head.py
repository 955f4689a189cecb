"""From token states to a point in the shared space; the same class on both sides of the loss.

Shapes: B batch, L tokens, H hidden size, D embedding size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Average the states `(B, L, H)` of the real tokens, in fp32, to `(B, H)`.

    `attention_mask` `(B, L)` is 1 where a token is real; `None` says that all of them are. A row
    without any real token has no mean: its result is zero.
    """
    hidden_states = hidden_states.float()
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (B, L, 1)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


class EmbeddingHead(nn.Module):
    """Pool, project, and put on the unit sphere (paper section 3.1: average, then linear)."""

    def __init__(self, hidden_size: int, embedding_dim: int):
        super().__init__()
        self.projection = nn.Linear(hidden_size, embedding_dim)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, L, H)` and `(B, L)` to fp32 unit vectors `(B, D)`."""
        # One vector per sample is cheap; rounding it to bf16 is not, because the loss multiplies
        # similarities by up to 100. So the head leaves autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            pooled = masked_mean(hidden_states, attention_mask)  # (B, H)
            embeds = self.projection(pooled.to(self.projection.weight.dtype))  # (B, D)
            return F.normalize(embeds.float(), dim=-1)  # (B, D)


__all__ = ["EmbeddingHead", "masked_mean"]
