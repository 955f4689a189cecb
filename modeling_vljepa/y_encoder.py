"""Y-Encoder: the target text to token states, whose mean is the embedding to be predicted.

Shapes: B batch, L target tokens, Dy hidden size.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


class YEncoder(nn.Module):
    """A bidirectional text encoder: EmbeddingGemma in the paper (section 3.1), or a BERT.

    A frozen one records no graph and stays in evaluation mode, and the model around it takes the
    gradient from its parameters; the embedding head behind it still trains.
    """

    def __init__(self, config: PreTrainedConfig, frozen: bool):
        super().__init__()
        if config.model_type == "gemma3_text" and not config.use_bidirectional_attention:
            raise ValueError(
                "text_config is a causal Gemma, whose first tokens never see the last: set "
                "use_bidirectional_attention to true, as in EmbeddingGemma."
            )
        self.backbone = AutoModel.from_config(config)
        if config.model_type == "bert":
            # BERT's own pooler is not read here; left in, it would be a trainable parameter
            # without a gradient, at which data-parallel training stops.
            self.backbone.pooler = None
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "YEncoder":
        return super().train(mode and not self.frozen)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, L)` and `(B, L)` to `(B, L, Dy)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state


__all__ = ["YEncoder"]
