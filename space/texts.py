"""Candidate texts that a user types, one per line, and their embeddings.

Shapes: C texts, D embedding size.
"""

from functools import lru_cache

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .uploads import user_error

MAX_TEXTS = 200
BATCH = 100  # texts per pass of the Y-Encoder
CACHED_LISTS = 32


def read_lines(lines: str | None) -> tuple[str, ...]:
    """Return the distinct texts in their order. Raises: `gr.Error` if there are too many."""
    stripped = (line.strip() for line in (lines or "").splitlines())
    texts = tuple(dict.fromkeys(line for line in stripped if line))
    if len(texts) > MAX_TEXTS:
        raise user_error(f"There are {len(texts)} candidate texts: give up to {MAX_TEXTS}.")
    return texts


class TextEmbedder:
    """Target embeddings of lists of texts; the last `CACHED_LISTS` lists are cached.

    Args:
        model ([`VLJEPAModel`]), processor ([`VLJEPAProcessor`]): one pair.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        # A cache of this object alone: decorating the method would share one between all objects
        # and keep every model alive.
        self.embed = lru_cache(CACHED_LISTS)(self.embed)

    @torch.inference_mode()
    def embed(self, texts: tuple[str, ...]) -> torch.Tensor:
        """Return the target embeddings `(C, D)`."""
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        batches = [self.processor(targets=part).to(self.model.device) for part in parts]
        return torch.cat([self.model.encode_target(**batch) for batch in batches])
