"""Decode embeddings with a trained model's Y-Decoder.

Shapes: B batch, D embedding size.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin


def decode_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    embeds: torch.Tensor,
    *,
    queries: Sequence[str] | None = None,
    previous: Sequence[str] | None = None,
    **kwargs,
) -> list[str]:
    """Decode embeddings `(B, D)` to texts, in one batch.

    Args:
        model ([`VLJEPAForConditionalGeneration`]): the model.
        processor ([`VLJEPAProcessor`]): its processor.
        queries, previous (`list[str]` of length B, *optional*): the query of each embedding, and
            the text of the segment before it; ignored by a decoder that does not read them. Texts
            that are not given are empty.
        kwargs: arguments of `generate`. With `num_return_sequences=n`, B * n texts are returned,
            first the n texts of the first embedding.
    """
    queries = queries or [""] * len(embeds)
    previous = previous or [""] * len(embeds)
    pairs = zip(queries, previous, strict=True)
    contexts = processor(contexts=[model.config.decoder_context(*pair) for pair in pairs])
    embeds = embeds.to(model.device)
    tokens = model.generate(predicted_embeds=embeds, **contexts.to(model.device), **kwargs)
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


__all__ = ["decode_texts"]
