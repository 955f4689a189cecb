"""Embeddings to texts with a trained model's Y-Decoder.

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
    """Embeddings `(B, D)` to texts, with one pass of the Y-Decoder.

    Args:
        model ([`VLJEPAForConditionalGeneration`])
        processor ([`VLJEPAProcessor`])
        queries, previous (`list[str]` of length B, *optional*): what was asked, and what was said
            of the segment before; a decoder that does not read them leaves them out.
        kwargs: those of `generate`. With `num_return_sequences` n there are B * n texts, the n of
            the first embedding first.
    """
    queries = queries or [""] * len(embeds)
    previous = previous or [""] * len(embeds)
    pairs = zip(queries, previous, strict=True)
    contexts = processor(contexts=[model.config.decoder_context(*pair) for pair in pairs])
    embeds = embeds.to(model.device)
    tokens = model.generate(predicted_embeds=embeds, **contexts.to(model.device), **kwargs)
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


__all__ = ["decode_texts"]
