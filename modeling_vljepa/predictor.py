"""Predictor: visual tokens and a text query to the states that predict the answer's embedding.

Shapes: B queries, V videos, N visual tokens, L query tokens, Dx visual width, Dp predictor width.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import from_config


def join_masks(
    visual_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask `(B, N + L)` over [visual tokens ; query]; every visual token is real."""
    if attention_mask is None:
        return None
    return torch.cat([attention_mask.new_ones(visual_embeds.shape[:2]), attention_mask], dim=1)


def one_for_each(
    visual: torch.Tensor, input_ids: torch.Tensor, visual_index: torch.Tensor | None
) -> torch.Tensor:
    """Return the visual tokens `(B, N, Dp)` of B queries, from those of V videos `(V, N, Dp)`.

    Query i is about video `visual_index[i]`. Without an index it is about video i, or about the
    only video.

    Raises:
        ValueError: the numbers of videos, queries and indices do not match.
    """
    videos, queries = visual.shape[0], input_ids.shape[0]
    if visual_index is not None:
        if visual_index.shape != (queries,):
            raise ValueError(
                f"visual_index has shape {tuple(visual_index.shape)} for {queries} queries: give "
                "the index of one video for each query."
            )
        # Not `visual[visual_index]`: on a CPU its gradient is several times slower.
        return visual.index_select(0, visual_index)
    if videos == 1:
        return visual.expand(queries, -1, -1)
    if videos != queries:
        raise ValueError(
            f"{videos} videos and {queries} queries: give one query for each video, one video for "
            "all queries, or visual_index."
        )
    return visual


def mask_for(
    config: PreTrainedConfig, states: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask of padding `(B, N + L)` as the backbone's attention reads it: with torch's
    kernels `(B, 1, 1, N + L)`.

    From `(B, N + L)` the backbone would make a mask `(B, 1, N + L, N + L)`, after it has read it
    from the device to find out whether it hides anything. The caller drops masks that do not.
    """
    windows = ("sliding_window", "attention_chunk_size")
    has_windows = any(vars(config).get(name) is not None for name in windows)
    if mask is None or has_windows or config.is_causal:
        return mask  # causal layers, and those with a window, need masks of their own
    # For one position, because a hidden token is hidden from all of them.
    return create_bidirectional_mask(config, states[:, :1], mask, allow_is_bidirectional_skip=False)


class VisualStandardization(nn.Module):
    """Fixed shift and scale of each dimension of the visual tokens, before their projection.

    Most of the energy of a frozen encoder's tokens can be common to all inputs, and a few
    dimensions can have most of the rest. `init_checkpoint --calibrate` measures both vectors. They
    are buffers, so they do not train.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))

    def forward(self, visual_embeds: torch.Tensor) -> torch.Tensor:
        return (visual_embeds - self.mean) * self.scale  # (V, N, Dx)


class Predictor(nn.Module):
    """Llama layers in which every position attends to every real one (paper section 3.1), or with
    `config.is_causal` to every real one before it, which is the paper's ablation 7d.

    The visual tokens come first and the query after them, at rotary positions 0 ... N + L - 1.
    """

    auto_class = AutoModel

    def __init__(
        self,
        config: PreTrainedConfig,
        visual_hidden_size: int,
        *,
        standardize: bool = False,
        visual_dropout: float = 0.0,
    ):
        super().__init__()
        self.visual_standardization = nn.Identity()
        if standardize:
            self.visual_standardization = VisualStandardization(visual_hidden_size)
        self.visual_dropout = nn.Dropout(visual_dropout)
        self.visual_projection = nn.Linear(visual_hidden_size, config.hidden_size)
        self.backbone = from_config(self.auto_class, config)

    def join(
        self,
        visual_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        visual_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the backbone's inputs [visual tokens ; query], `(B, N + L, Dp)`.

        The arguments are those of `forward`.
        """
        visual = self.visual_standardization(visual_embeds)  # (V, N, Dx)
        visual = self.visual_projection(self.visual_dropout(visual))  # (V, N, Dp)
        visual = one_for_each(visual, input_ids, visual_index)  # (B, N, Dp)
        query = self.backbone.get_input_embeddings()(input_ids).to(visual.dtype)  # (B, L, Dp)
        return torch.cat([visual, query], dim=1)

    def forward(
        self,
        visual_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        visual_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutput, torch.Tensor | None]:
        """Read `(V, N, Dx)`, `(B, L)`, `(B, L)` and `(B,)`; return the backbone's output and the
        mask.

        The output's `last_hidden_state` is `(B, N + L, Dp)`, the mask `(B, N + L)`. Without
        `attention_mask`, every query token is real and no mask is built, which is faster for a
        batch of equal lengths. Queries are padded on the right.
        """
        joined = self.join(visual_embeds, input_ids, visual_index)  # (B, N + L, Dp)
        visual = joined[:, : joined.shape[1] - input_ids.shape[1]]  # (B, N, Dp)
        mask = join_masks(visual, attention_mask)  # (B, N + L)
        states = self.backbone(
            inputs_embeds=joined,
            attention_mask=mask_for(self.backbone.config, joined, mask),
            use_cache=False,
            **kwargs,
        )
        return states, mask

    @torch.no_grad()
    def fold_standardization(self) -> None:
        """Replace the standardisation by an equal change of the projection's weights and bias."""
        standard, projection = self.visual_standardization, self.visual_projection
        weight = projection.weight.double() * standard.scale.double()
        projection.bias.copy_(projection.bias.double() - weight @ standard.mean.double())
        projection.weight.copy_(weight)
        self.visual_standardization = nn.Identity()


__all__ = ["Predictor", "VisualStandardization"]
