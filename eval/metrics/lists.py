"""Lists as the evaluate library gives them: checked, and as tensors for the plain functions.

Shapes: R rows (queries), C candidates (ranked for each row).
"""

from collections.abc import Sequence

import torch


def as_matrices(
    predictions: Sequence[Sequence[float]], references: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return similarities, float64, and the relevant candidates, bool: both `(R, C)`.

    Args:
        predictions: R lists of C similarities.
        references: R lists of indices of relevant candidates.

    Raises: `ValueError` for no row, rows of different lengths, and an index without a candidate.
    """
    check_rows(predictions)
    lengths = sorted({len(row) for row in predictions})
    if lengths[0] != lengths[-1] or not lengths[0]:
        raise ValueError(
            f"predictions: rows have {lengths[0]} to {lengths[-1]} similarities; give one for each "
            "candidate in every row."
        )
    relevant = torch.zeros(len(predictions), lengths[0], dtype=torch.bool)
    for row, indices in enumerate(references):
        if outside := [index for index in indices if not 0 <= index < lengths[0]]:
            raise ValueError(
                f"references: row {row} has candidate {outside[0]}; indices are 0 to "
                f"{lengths[0] - 1}."
            )
        relevant[row, indices] = True
    return torch.tensor(predictions, dtype=torch.float64), relevant


def check_references(references: Sequence[Sequence[str]]) -> None:
    """Raise `ValueError` if there is no row, or a row without a reference."""
    check_rows(references)
    if empty := [row for row, texts in enumerate(references) if not texts]:
        raise ValueError(f"references: row {empty[0]} has none; give every row one or more texts.")


def as_cutoffs(k: int | Sequence[int]) -> list[int]:
    """Return the cutoffs as a list. Raises: `ValueError` unless each is a whole number from 1."""
    cutoffs = list(k) if isinstance(k, Sequence) else [k]
    if not cutoffs:
        raise ValueError("k is empty; give whole numbers from 1.")
    for cutoff in cutoffs:
        if not isinstance(cutoff, int) or isinstance(cutoff, bool) or cutoff < 1:
            raise ValueError(f"k is {cutoff!r}; give whole numbers from 1.")
    return cutoffs


def check_rows(rows: Sequence) -> None:
    """Raise `ValueError` if there is no row."""
    if not len(rows):
        raise ValueError("predictions: no row was given; the mean over none is undefined.")


__all__ = ["as_cutoffs", "as_matrices", "check_references", "check_rows"]
