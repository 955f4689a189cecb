"""Embedding heads: token states to a unit vector in the shared space.

Shapes: B batch, N visual tokens, L tokens, H hidden size, D embedding size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Average the states `(B, L, H)` of the real tokens, in fp32, to `(B, H)`.

    `attention_mask` `(B, L)` is 1 for real tokens; with `None`, all tokens are real. A row without
    any real token has no mean: its result is zero.
    """
    hidden_states = hidden_states.float()
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (B, L, 1)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


class ZeroLinear(nn.Linear):
    """A linear layer that is 0 in a new model (`VLJEPAPreTrainedModel._init_weights`)."""


class ResidualAdapter(nn.Module):
    """Two linear layers whose output is added to their input: CLIP-Adapter (arXiv 2110.04544).

    A new adapter adds 0, so training starts in the space of the frozen encoder before it.
    """

    def __init__(self, hidden_size: int, adapter_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, adapter_size)
        self.fc2 = ZeroLinear(adapter_size, hidden_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return `(B, H)` of about unit variance from `(B, H)` of any length."""
        scaled = F.rms_norm(pooled, pooled.shape[-1:])  # (B, H)
        return scaled + self.fc2(F.gelu(self.fc1(scaled)))  # (B, H)


class EmbeddingHead(nn.Module):
    """Projection of a pooled state to the unit sphere; both sides of the loss use this class.

    Args:
        hidden_size: width of the pooled state.
        embedding_dim: width of the shared space.
        project: without a projection (the paper's 7c, on the target side), the shared space is the
            encoder's own.
        adapter_size: hidden width of a `ResidualAdapter` before the projection; default: none.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_dim: int,
        project: bool = True,
        adapter_size: int | None = None,
    ):
        super().__init__()
        if not project and hidden_size != embedding_dim:
            raise ValueError(
                f"project_target is false, so the shared space is the Y-Encoder's own of "
                f"{hidden_size} dimensions, but embedding_dim is {embedding_dim}: make them equal."
            )
        self.adapter = nn.Identity()
        if adapter_size is not None:
            self.adapter = ResidualAdapter(hidden_size, adapter_size)
        self.projection = nn.Linear(hidden_size, embedding_dim) if project else nn.Identity()

    def forward(self, pooled: torch.Tensor, truncate_dim: int | None = None) -> torch.Tensor:
        """Project `(B, H)` to fp32 unit vectors `(B, D)`.

        With `truncate_dim`, keep the first dimensions only and normalize again: `(B,
        truncate_dim)`, for spaces trained to allow it (Matryoshka, arXiv 2205.13147).
        """
        # The loss multiplies similarities by up to 100, and with them the rounding error of bf16.
        # In fp32, one vector per sample costs little, so the head disables autocast.
        with torch.autocast(pooled.device.type, enabled=False):
            adapted = self.adapter(pooled.to(self.dtype))  # (B, H)
            embeds = self.projection(adapted).float()  # (B, D)
            if truncate_dim is not None and not 1 <= truncate_dim <= embeds.shape[-1]:
                raise ValueError(
                    f"truncate_dim is {truncate_dim}, but an embedding has "
                    f"{embeds.shape[-1]} dimensions."
                )
            return F.normalize(embeds[..., :truncate_dim], dim=-1)  # (B, D)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's weights; fp32 if it has none."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)


def query_mask(mask: torch.Tensor, visual_tokens: int) -> torch.Tensor:
    """Return the mask `(B, N + L)` of the query's tokens alone.

    A row whose query has no token keeps its mask: it has no states but those of the video.
    """
    query = mask.clone()
    query[:, :visual_tokens] = 0
    return torch.where(query.any(dim=1, keepdim=True), query, mask)


class AttentionPooling(nn.Module):
    """Mean of the states, weighted by the softmax of their products with a learnt vector.

    The vector of a new model is 0, so training starts with the plain mean.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.vector = ZeroLinear(hidden_size, 1, bias=False)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Pool the real tokens of `(B, L, H)`, by the mask `(B, L)`, in fp32 to `(B, H)`."""
        states = states.float()
        scores = F.linear(states, self.vector.weight.float())  # (B, L, 1)
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
        return (states * scores.softmax(dim=1)).sum(dim=1)  # (B, H)


class PredictorHead(EmbeddingHead):
    """Pooling of the Predictor's states over [visual tokens ; query], then the projection.

    Args:
        hidden_size: width of the states.
        embedding_dim: width of the shared space.
        pooling: `config.predictor_pooling`.
    """

    def __init__(self, hidden_size: int, embedding_dim: int, pooling: str = "mean"):
        super().__init__(hidden_size, embedding_dim)
        self.pools_query = pooling == "query"
        self.attention = AttentionPooling(hidden_size) if pooling == "attention" else None

    def forward(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        visual_tokens: int,
        truncate_dim: int | None = None,
    ) -> torch.Tensor:
        """Return fp32 unit vectors `(B, D)` of states `(B, N + L, H)`.

        Args:
            mask: `(B, N + L)`, 1 for the positions to pool; with `None`, all.
            visual_tokens: N.
            truncate_dim: see `EmbeddingHead.forward`.
        """
        if self.pools_query:
            if mask is None:
                mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
            mask = query_mask(mask, visual_tokens)  # (B, N + L)
        if self.attention is None:
            pooled = masked_mean(states, mask)  # (B, H)
        else:
            with torch.autocast(states.device.type, enabled=False):
                pooled = self.attention(states, mask)  # (B, H)
        return super().forward(pooled, truncate_dim)  # (B, D)


__all__ = ["EmbeddingHead", "PredictorHead", "ResidualAdapter", "ZeroLinear", "masked_mean"]
