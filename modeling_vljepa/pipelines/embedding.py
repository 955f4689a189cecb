"""Embed texts with a trained model, and check that embeddings are numbers.

Shapes: N texts, D embedding size.
"""

import torch
from transformers import PreTrainedModel, ProcessorMixin

TEXTS_PER_PASS = 64


def check_finite(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return a tensor; raise `ValueError` if it holds NaN or infinity.

    A ranking would put NaN anywhere, and JSON cannot hold it.
    """
    if not values.isfinite().all():
        raise ValueError(
            f"{name} of this model is not finite: its weights hold NaN, or they overflow in this "
            "dtype. Load it in float32 or bfloat16, or replace the checkpoint."
        )
    return values


@torch.no_grad()
def embed_texts(
    model: PreTrainedModel, processor: ProcessorMixin, texts: list[str]
) -> torch.Tensor:
    """Return target embeddings, unit vectors `(N, D)` in float32 on the CPU.

    Raises: `ValueError` for embeddings that are not finite.
    """
    embeds = []
    for start in range(0, len(texts), TEXTS_PER_PASS):
        batch = processor(targets=texts[start : start + TEXTS_PER_PASS]).to(model.device)
        embeds.append(model.base_model.encode_target(**batch).float().cpu())
    return check_finite("a target embedding", torch.cat(embeds))


__all__ = ["check_finite", "embed_texts"]
