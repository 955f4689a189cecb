"""X-Encoder: a video, or an image as a video of one frame, to visual tokens.

Shapes: B batch, T frames, C channels, N visual tokens, Dx hidden size.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


class XEncoder(nn.Module):
    """V-JEPA 2 without the masked-token predictor of its own training (paper section 3.1).

    A frozen X-Encoder records no graph and stays in evaluation mode, whatever is called on the
    model around it, which takes the gradient from its parameters.
    """

    def __init__(self, config: PreTrainedConfig, frozen: bool):
        super().__init__()
        if config.model_type != "vjepa2":
            raise ValueError(
                f"vision_config.model_type is {config.model_type!r}, but the X-Encoder is a "
                "V-JEPA 2 model: give a vision_config of model_type 'vjepa2'."
            )
        self.backbone = AutoModel.from_config(config)
        # 22M parameters that would add a third to the cost of a forward pass and serve nothing.
        del self.backbone.predictor
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "XEncoder":
        return super().train(mode and not self.frozen)

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to `(B, N, Dx)`, N = max(1, T / tubelet) x patches.

        Raises:
            ValueError: where V-JEPA 2 would go on in silence: another layout, a resolution other
                than `crop_size` (its position grid), a last frame that fills no tubelet.
        """
        self._check(pixel_values_videos)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            # A single frame fills its tubelet by repetition, inside V-JEPA 2.
            return self.backbone(pixel_values_videos, skip_predictor=True).last_hidden_state

    def _check(self, pixel_values_videos: torch.Tensor) -> None:
        config = self.backbone.config
        expected = (config.in_chans, config.crop_size, config.crop_size)
        shape = tuple(pixel_values_videos.shape)
        if len(shape) != 5 or shape[2:] != expected:
            raise ValueError(
                f"pixel_values_videos has shape {shape}; expected (batch, frames, channels, "
                f"height, width) with channels, height, width = {expected}. "
                "VLJEPAProcessor makes it."
            )
        if shape[1] > 1 and shape[1] % config.tubelet_size:
            raise ValueError(
                f"{shape[1]} frames do not fill tubelets of {config.tubelet_size}: V-JEPA 2 would "
                "drop the last one. Sample a multiple of it, or a single frame."
            )


__all__ = ["XEncoder"]
