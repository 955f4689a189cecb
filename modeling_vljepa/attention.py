"""Attention of the backbones: PyTorch's `sdpa`, except where it is slower than plain products.

PyTorch's "flash" kernel for CPUs computes the gradient of bf16 attention slowly. For at most 256
tokens two plain matrix products and a softmax take 0.1 to 0.9 of its time forward and backward, if
the CPU multiplies bf16 natively. `benchmarks/attention.py` measures it, and `benchmarks/RESULTS.md`
has the table. Plain products gain little in inference and nothing in fp32, so these compute `sdpa`,
as GPUs do.

Shapes: B batch, H heads, L query positions, S key positions, d head size.
"""

from functools import cache

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_OR_PLAIN = "sdpa_or_plain"  # value of `attn_implementation`, the default of every backbone

# The longest sequences for which plain products are faster forward and backward at the head sizes
# 32, 64 and 128, with and without a mask.
LONGEST = 256


@cache
def cpu_has_bf16() -> bool:
    """Return True if this CPU multiplies bf16 natively: x86 with avx512_bf16, as all with AMX have.

    Other CPUs convert to fp32 and back.
    """
    return torch.cpu._is_avx512_bf16_supported()


def is_plain_faster(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return True if plain products are faster than `sdpa` for `(B, H, L, d)` and `(B, H, S, d)`.

    `module.training` decides, not `torch.is_grad_enabled()`: GradCache and gradient checkpointing
    run a part first without gradients and then with them, and both passes need the same kernel.
    """
    if not module.training or query.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a program also serves other lengths
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    if dtype != torch.bfloat16 or not cpu_has_bf16():
        return False
    return query.shape[2] <= LONGEST and key.shape[2] <= LONGEST


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """Return softmax(query key^T) value, `(B, L, H, d)`.

    The arguments are those of `sdpa_or_plain`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # (B, H, S, d)
    if attention_mask is None and is_causal:
        shape = query.shape[2], key.shape[2]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    # The query is smaller than the scores, so scaling it is cheaper.
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3)  # (B, H, L, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # Not -inf: a padded position may see no key, and its softmax would be NaN.
        least = torch.finfo(scores.dtype).min
        bias = torch.zeros_like(attention_mask, dtype=scores.dtype)
        attention_mask = bias.masked_fill_(~attention_mask, least)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout)  # p is 0 in evaluation
    return (weights @ value).transpose(1, 2).contiguous()


def sdpa_or_plain(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return the attention of a layer, `(B, L, H, d)`, as transformers' `sdpa` does.

    Args:
        module: the attention layer.
        query: `(B, H, L, d)`.
        key, value: `(B, H, S, d)`, or fewer heads, which groups of query heads share.
        attention_mask: `(B or 1, H or 1, L, S)`, True for visible keys, or added to the scores.
        dropout: share of the weights that are set to 0.
        scaling: factor on the scores; default 1 / sqrt(d).
        is_causal: without a mask, hide later keys; default `module.is_causal`, or True.
        kwargs: features such as `softcap` and `position_bias`, which are left to `sdpa`.
    """
    is_special = any(kwargs.get(name) is not None for name in ("cache", "position_bias", "softcap"))
    is_special |= bool(kwargs.get("output_attentions"))  # `sdpa` warns that it returns no weights
    if not is_special and is_plain_faster(module, query, key):
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)  # as transformers' `sdpa` reads it
        states = plain_attention(query, key, value, attention_mask, dropout, scaling, is_causal)
        return states, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


AttentionInterface.register(SDPA_OR_PLAIN, sdpa_or_plain)
AttentionMaskInterface.register(SDPA_OR_PLAIN, sdpa_mask)


def from_config(auto_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a transformers model whose attention is `sdpa_or_plain`, unless another was requested.

    Args:
        auto_class: `AutoModel` or one of its kind.
    """
    requested = config._attn_implementation  # transformers replaces `None` by "sdpa" or "eager"
    backbone = auto_class.from_config(config)
    is_default = requested is None and backbone.config._attn_implementation == "sdpa"
    if is_default and backbone._can_set_attn_implementation():
        backbone.set_attn_implementation(SDPA_OR_PLAIN)
    return backbone


__all__ = ["SDPA_OR_PLAIN", "cpu_has_bf16", "from_config", "sdpa_or_plain"]
