"""Scores over parts of the rows, such as question types, and scores other than means over rows.

The mean of the parts' scores weighs each part the same, whatever its number of rows. Its interval
and that of F1 need a mean over rows, so the score is linearised: each row gets the score plus its
influence on it. The mean of these values is the score, and resampling them approximates the
resampling of the score (the delta method). An interval is cut to 0 and 1.

Shapes: R rows, K parts.
"""

from dataclasses import replace

import numpy as np

from eval.metrics import precision_recall_f1
from eval.results import Score


def rows_of_parts(parts: list[str]) -> dict[str, np.ndarray]:
    """Return the indices of the rows of each part, in the order of the parts' names."""
    names = np.array(parts)
    return {name: np.flatnonzero(names == name) for name in sorted(set(parts))}


def equal_parts(values: np.ndarray, parts: list[str], *, drawn: bool = False) -> np.ndarray:
    """Return values `(R,)` whose mean is the mean of the parts' means: see the top of this file.

    Args:
        values (`np.ndarray` of shape `(R,)`): a row's score.
        parts (`list[str]` of length R): the part of each row.
        drawn: the parts are a sample as the rows are, such as classes with a row or two. Then the
            differences between their means count as variance, since a part of one row has none. In
            simulations of such classes an interval without them held the true mean 58 to 91 % of
            the time, one with them 94 to 95 %.
    """
    _, part, counts = np.unique(parts, return_inverse=True, return_counts=True)  # (R,), (K,)
    means = np.bincount(part, weights=values) / counts
    mean, weights = means.mean(), len(values) / (len(means) * counts[part])
    return mean + weights * (values - (mean if drawn else means[part]))


def mean_of_parts(
    by_part: dict[str, Score], values: np.ndarray, parts: list[str], clusters: np.ndarray
) -> Score:
    """Return the mean of the parts' scores, in which each part counts the same.

    Args:
        by_part: the score of each part; also its baselines are averaged.
        values (`np.ndarray` of shape `(R,)`): the parts' scores are means of these.
        parts (`list[str]` of length R): the part of each row.
        clusters (`np.ndarray` of shape `(R,)`): number of each row's cluster.
    """
    scores = list(by_part.values())
    baselines = {
        name: sum(score.baselines[name] for score in scores) / len(scores)
        for name in scores[0].baselines
    }
    return within_one(Score.of(equal_parts(values, parts), clusters, baselines))


def f1_score(
    found: np.ndarray,
    wanted: np.ndarray,
    parts: list[str],
    clusters: np.ndarray,
    baselines: dict[str, np.ndarray | float],
) -> Score:
    """Return the mean of the parts' F1.

    Args:
        found, wanted (`np.ndarray` of shape `(R,)`): rows with the positive answer, predicted and
            true.
        baselines: rows for which a baseline gives the positive answer `(R,)`; or the probability
            with which it gives it, whatever the row, for F1 of the expected counts.
    """
    groups = list(rows_of_parts(parts).values())
    values = [precision_recall_f1(found[rows], wanted[rows])[2] for rows in groups]
    mean = sum(values) / len(values)
    linear = np.full(len(found), mean)
    for value, rows in zip(values, groups, strict=True):
        # F1 is a ratio of two sums over rows: twice the hits, and the positives of both kinds.
        hits, either = 2.0 * (found & wanted)[rows], found[rows] + 1.0 * wanted[rows]
        if either.any():
            influence = (hits - value * either) / either.sum()
            linear[rows] += len(found) / len(groups) * influence
    means = {
        name: sum(_baseline_f1(given, wanted, rows) for rows in groups) / len(groups)
        for name, given in baselines.items()
    }
    return within_one(Score.of(linear, clusters, means))


def _baseline_f1(given: np.ndarray | float, wanted: np.ndarray, rows: np.ndarray) -> float:
    if isinstance(given, float):
        share = float(wanted[rows].mean())
        return 2 * share * given / (share + given)
    return precision_recall_f1(given[rows], wanted[rows])[2]


def within_one(score: Score) -> Score:
    """Return a score with its interval cut to 0 and 1."""
    return replace(score, low=max(0.0, score.low), high=min(1.0, score.high))


__all__ = ["equal_parts", "f1_score", "mean_of_parts", "rows_of_parts", "within_one"]
