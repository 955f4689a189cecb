"""Texts that people give: one per line, and their embeddings.

Shapes: C texts, D embedding size.
"""

from functools import lru_cache

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .uploads import sorry

MAX_TEXTS = 200
LISTS_KEPT = 32


def read_lines(lines: str | None) -> tuple[str, ...]:
    """The distinct texts, in their order. Raises: `gr.Error` for too many."""
    stripped = (line.strip() for line in (lines or "").splitlines())
    texts = tuple(dict.fromkeys(line for line in stripped if line))
    if len(texts) > MAX_TEXTS:
        raise sorry(f"Give up to {MAX_TEXTS} candidate answers; these are {len(texts)}.")
    return texts


class TextEmbeds:
    """Target embeddings of lists of texts; those of the last lists are kept.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.of = lru_cache(LISTS_KEPT)(self.of)

    @torch.inference_mode()
    def of(self, texts: tuple[str, ...]) -> torch.Tensor:
        """`(C, D)`, a hundred at a time."""
        parts = [texts[start : start + 100] for start in range(0, len(texts), 100)]
        batches = [self.processor(targets=part).to(self.model.device) for part in parts]
        return torch.cat([self.model.encode_target(**batch) for batch in batches])
