"""Outputs of a frozen Y-Encoder for every target text, computed once before training."""

import torch
from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from training.arguments import RecipeError


@torch.no_grad()
def encode_target_states(
    model: VLJEPAModel, processor: VLJEPAProcessor, texts: list[str], batch_size: int = 256
) -> dict[str, torch.Tensor]:
    """Return the Y-Encoder's output `(Dt,)` for each distinct text, on the CPU.

    Raises:
        RecipeError: the Y-Encoder is trained, so its outputs change.
    """
    if not model.config.freeze_text:
        raise RecipeError(
            "data.cache_targets: the Y-Encoder is trained here, so its outputs change. Set it to "
            "false, or model.config.freeze_text to true."
        )
    distinct = sorted(set(texts), key=len)  # texts of one length share a batch: little padding
    states = {}
    for start in tqdm(range(0, len(distinct), batch_size), desc="Encoding targets"):
        batch_texts = distinct[start : start + batch_size]
        batch = processor(targets=batch_texts).to(model.device)
        pooled = model.y_encoder(batch["target_input_ids"], batch["target_attention_mask"])
        states |= zip(batch_texts, pooled.cpu(), strict=True)  # (U, Dt)
    return states
