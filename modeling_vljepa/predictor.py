"""Predictor: visual tokens and a text query to the states that predict the answer's embedding.

Shapes: B batch, N visual tokens, L query tokens, Dx visual width, Dp predictor width.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


def join_masks(
    visual_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the mask `(B, N + L)` over [visual tokens ; query]; every visual token is real."""
    if attention_mask is None:
        return None
    return torch.cat([attention_mask.new_ones(visual_embeds.shape[:2]), attention_mask], dim=1)


class Predictor(nn.Module):
    """Llama layers in which every position attends to every real one (paper section 3.1).

    The visual tokens come first and the query after them, at rotary positions 0 ... N + L - 1.
    """

    def __init__(self, config: PreTrainedConfig, visual_hidden_size: int):
        super().__init__()
        self.visual_projection = nn.Linear(visual_hidden_size, config.hidden_size)
        self.backbone = AutoModel.from_config(config)

    def forward(
        self,
        visual_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutput, torch.Tensor | None]:
        """Read `(B, N, Dx)`, `(B, L)` and `(B, L)`; return the backbone's output and the mask.

        The output's `last_hidden_state` is `(B, N + L, Dp)`, the mask `(B, N + L)`. Without
        `attention_mask`, every query token is real and no mask is built, which is faster for a
        batch of equal lengths. Queries are padded on the right.
        """
        visual = self.visual_projection(visual_embeds)  # (B, N, Dp)
        query = self.backbone.get_input_embeddings()(input_ids).to(visual.dtype)  # (B, L, Dp)
        mask = join_masks(visual, attention_mask)  # (B, N + L)
        states = self.backbone(
            inputs_embeds=torch.cat([visual, query], dim=1),  # (B, N + L, Dp)
            attention_mask=mask,
            use_cache=False,
            **kwargs,
        )
        return states, mask


__all__ = ["Predictor"]
