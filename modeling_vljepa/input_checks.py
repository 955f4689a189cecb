"""Checks of a model's inputs: the name of the tensor, what is wrong with it, and the cure.

On a GPU, most of these faults would end in an assertion that names no tensor, or in a zero vector
or NaN without any error. Shapes are checked at no cost. Values are read from the device once for
each tensor of tokens. Compiled and exported programs have no checks.

A read waits for the device, so a training step checks the values of its batch on the CPU, before
the batch moves, and runs the model within `values_checked`.

Shapes: B batch, L tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import PreTrainedConfig

IGNORED = -100  # label of positions outside the text

# Names of tables of absolute positions in transformers' encoders and language models.
POSITION_TABLES = {"position_embedding", "position_embeddings", "embed_positions", "wpe"}

# A variable of the context, not of the module: other threads and calls stay checked.
VALUES_CHECKED = ContextVar("VALUES_CHECKED", default=False)


@contextmanager
def values_checked() -> Iterator[None]:
    """Read no values in the checks within the block, because the caller has checked them.

    The caller has also removed masks that hide nothing. Shapes are still checked.
    """
    token = VALUES_CHECKED.set(True)
    try:
        yield
    finally:
        VALUES_CHECKED.reset(token)


def position_limit(backbone: nn.Module) -> int | None:
    """Return how many tokens a backbone with a table of absolute positions can read, else `None`.

    Rotary, relative and sinusoidal positions have no table and no such limit.
    """
    limits = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in POSITION_TABLES:
            # RoBERTa's kind begins after the padding index. Tables of BART's kind have more rows
            # than the configuration's positions.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits += [module.num_embeddings - first, backbone.config.max_position_embeddings]
    return min(limits, default=None)


def check_shape(name: str, tensor: torch.Tensor, *axes: str) -> None:
    """Raise `ValueError` unless a tensor has these axes, none of them empty."""
    if torch.compiler.is_compiling():
        return
    if tensor.ndim != len(axes) or 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: give ({', '.join(axes)}), each at least 1."
        )


def check_tokens(
    prefix: str,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: PreTrainedConfig,
    *,
    needs_text: bool = False,
    limit: int | None = None,
) -> torch.Tensor | None:
    """Reject tokens that an encoder cannot read, and padding that would be read as text.

    Return the mask, or `None` if it hides no token: attention without a mask has faster kernels,
    and backbones would read the mask again to find that out.

    Args:
        prefix: of the names of the tensors, such as "target_".
        input_ids (`torch.LongTensor` of shape `(B, L)`)
        attention_mask (`torch.LongTensor` of shape `(B, L)`, *optional*)
        config: the encoder's.
        needs_text: reject rows without a real token, which have no embedding. A query may have
            none: the visual tokens are enough to predict from.
        limit: the encoder's `position_limit`.
    """
    if torch.compiler.is_compiling():
        return attention_mask
    name, shape = f"{prefix}input_ids", tuple(input_ids.shape)
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"{name} has shape {shape}: give (batch, length), with at least one row.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{prefix}attention_mask has shape {tuple(attention_mask.shape)}, {name} has {shape}: "
            "give masks and ids of one shape."
        )
    if needs_text and not shape[1]:
        raise ValueError(
            f"{name} has shape {shape}, no token in any row: an empty text has no embedding, so "
            "leave it out, or use a tokenizer that adds a token to every text."
        )
    if limit is not None and shape[1] > limit:
        raise ValueError(
            f"{name} has {shape[1]} tokens, but the position table of this {config.model_type} "
            f"ends at {limit}: give the processor a max_{prefix or 'query_'}length of {limit}."
        )
    if not shape[1]:
        return None
    if VALUES_CHECKED.get():
        return attention_mask
    pad = config.pad_token_id
    least, most = input_ids.aminmax()
    if attention_mask is not None:
        is_right = attention_mask.any(dim=1).all() | (not needs_text)
        hides = (attention_mask != 1).any()
    else:
        is_right = hides = (input_ids != (-1 if pad is None else pad)).all()
    # One transfer: each one waits for the device.
    values = [least, most, is_right.to(least.dtype), hides.to(least.dtype)]
    least, most, is_right, hides = torch.stack(values).tolist()
    if least < 0 or most >= config.vocab_size:
        raise ValueError(
            f"{name} holds the id {least if least < 0 else most}, but the vocabulary of this "
            f"encoder has {config.vocab_size}: use the tokenizer of this encoder."
        )
    if not is_right and attention_mask is None:
        raise ValueError(
            f"{name} holds padding (id {pad}), which would be read as text: also give "
            f"{prefix}attention_mask."
        )
    if not is_right:
        row = (attention_mask == 0).all(dim=1).nonzero()[0].item()
        raise ValueError(
            f"{prefix}attention_mask has no real token in row {row}: an empty text has no "
            "embedding, so leave it out, or use a tokenizer that adds a token to every text."
        )
    return attention_mask if hides else None


def check_labels(labels: torch.Tensor | None, rows: int, config: PreTrainedConfig) -> None:
    """Reject labels `(B, L)` that a language model cannot learn, such as a row without a text."""
    if torch.compiler.is_compiling():
        return
    if labels is None:
        raise ValueError("labels is missing: give the tokens of the texts, or call generate.")
    check_shape("labels", labels, "batch", "length")
    if len(labels) != rows:
        raise ValueError(f"labels has {len(labels)} rows for {rows} embeddings: give one for each.")
    if VALUES_CHECKED.get():
        return
    is_text = labels != IGNORED
    real = labels.masked_fill(~is_text, 0)
    least, most = real.aminmax()
    has_text = is_text.any(dim=1).all()
    least, most, has_text = torch.stack([least, most, has_text.to(least.dtype)]).tolist()
    if least < 0 or most >= config.vocab_size:
        raise ValueError(
            f"labels holds the id {least if least < 0 else most}, but the vocabulary of this "
            f"Y-Decoder has {config.vocab_size}: use its tokenizer, and {IGNORED} for padding."
        )
    if not has_text:
        row = (~is_text).all(dim=1).nonzero()[0].item()
        raise ValueError(
            f"labels has no token in row {row}, only {IGNORED}: end every text with the end token."
        )


__all__ = [
    "IGNORED",
    "check_labels",
    "check_shape",
    "check_tokens",
    "position_limit",
    "values_checked",
]
