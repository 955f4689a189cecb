"""Scores from similarities: plain functions of tensors.

Shapes: R rows (what is asked), C candidates (what is ranked).
"""

import math

import torch


def first_relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Rank of the best relevant candidate of each row, from 1: int64 `(R,)`.

    Ties are pessimistic: rank = 1 + irrelevant candidates that score at least as high. A model
    that gives one score to everything is last, not first. A row without any relevant candidate
    gets C + 1.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`): the higher, the better.
        relevant (`torch.BoolTensor` of shape `(R, C)`): several candidates of a row may be right.
    """
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # (R, 1)
    # "not lower" instead of "higher or equal": NaN is neither, and must not win.
    ahead = ~relevant & ~(similarity < best)  # (R, C)
    return 1 + ahead.sum(dim=1)


def relevant_index(index: torch.Tensor, candidates: int) -> torch.Tensor:
    """One right candidate per row: `(R,)` indices to bool `(R, C)`; -1 stands for none."""
    return index.unsqueeze(1) == torch.arange(candidates)


def chance_recall(relevant: torch.Tensor, k: int) -> float:
    """Expected recall@k of a random order: k / C where each row has one relevant candidate.

    With m relevant ones, 1 - C(C - m, k) / C(C, k) (hypergeometric), averaged over the rows.
    """
    candidates = relevant.shape[1]
    k = min(k, candidates)
    ways = math.comb(candidates, k)
    return sum(
        (1 - math.comb(candidates - m, k) / ways) * rows
        for m, rows in enumerate(torch.bincount(relevant.sum(dim=1)).tolist())
    ) / len(relevant)


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion (Wilson, 1927), 95 % by default: `(low, high)`.

    It takes the rows for independent. Questions about one clip are not quite, so the true
    interval is somewhat wider.
    """
    share, spread = hits / total, z * z / total
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


__all__ = ["chance_recall", "first_relevant_ranks", "relevant_index", "wilson"]
