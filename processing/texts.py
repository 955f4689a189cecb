"""Texts to tokens, and their checks, for JSONL rows and the processor.

Pipelines have their own in `text_checks.py`: they are shipped without this package, and also bound
the lengths of texts.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from transformers import PreTrainedTokenizerBase

from .options import check_token_count


def check_text(name: str, text: str) -> str:
    """Return a text.

    Args:
        name: what the error calls the text, such as "question" or "candidates[3]".

    Raises: `ValueError` for another type, and for half of a surrogate pair, which JSON has if a
        text was cut within an emoji and which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a string but a {type(text).__name__}: give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{name} holds half a character, {half}: cut texts between characters"
        ) from error
    return text


def check_texts(name: str, texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list.

    Raises: `ValueError` that names the argument, and the index of a text that is not one.
    """
    if isinstance(texts, str):
        return [check_text(name, texts)]
    # A set has no order, so its texts would belong to no medium of the batch.
    if isinstance(texts, bytes | Mapping | Set) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} is a {type(texts).__name__}: give a string or a list of strings")
    try:
        texts = list(texts)
    except TypeError as error:  # an array without a dimension
        raise ValueError(f"{name} is a single {type(texts).__name__}: give a string") from error
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    *,
    prefix: str = "",
    padding: str = "longest",
    truncation: bool = True,
    pad_to_multiple_of: int | None = None,
    padding_side: str = "right",
    add_special_tokens: bool = True,
) -> dict[str, torch.Tensor]:
    """Return token ids and mask, both int64 `(B, L)`.

    Args:
        max_length: the limit; the tokenizer's own if that is lower.
        prefix: put before the names `input_ids` and `attention_mask`.
        padding, truncation, pad_to_multiple_of, add_special_tokens: see [`VLJEPATextKwargs`].

    Raises: `ValueError` for a limit that leaves no room for the tokenizer's own tokens, and for
        texts of several lengths that these options leave as they are.
    """
    max_length = min(max_length, tokenizer.model_max_length, 2**31)  # tokenizers count in 64 bits
    own = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
    if max_length < max(own, 1):
        raise ValueError(
            f"max_{'target' if prefix == 'target_' else 'query'}_length is {max_length}, but the "
            f"tokenizer adds {own} tokens to every text: give at least {own}"
        )
    if padding == "max_length":
        check_token_count("max_length, to which texts are padded,", max_length)
    if pad_to_multiple_of and truncation and padding != "do_not_pad":
        # Upstream refuses a limit that is not a multiple, because padding would exceed it.
        max_length -= max_length % pad_to_multiple_of
        if max_length < max(own, 1):
            raise ValueError(
                f"pad_to_multiple_of is {pad_to_multiple_of}, more than the limit of a text: give "
                "a smaller number or a larger max_length"
            )
    tokens = tokenizer(
        list(texts),
        padding=padding,
        padding_side=padding_side,
        pad_to_multiple_of=pad_to_multiple_of,
        truncation=truncation,
        add_special_tokens=add_special_tokens,
        max_length=max_length,
        return_attention_mask=True,
    )
    lengths = sorted({len(ids) for ids in tokens["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"the texts of a batch have {lengths[0]} and {lengths[-1]} tokens: give padding=True, "
            "and truncation=True if texts are longer than their limit"
        )
    # Not by the tokenizer's return_tensors, which makes float32 tensors if every text is empty.
    return {
        prefix + name: torch.tensor(tokens[name], dtype=torch.long)
        for name in ("input_ids", "attention_mask")
    }


__all__ = ["check_text", "check_texts", "tokenize"]
