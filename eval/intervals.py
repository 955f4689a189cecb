"""Intervals of means over rows that come in clusters, such as all questions about a clip.

Rows of one cluster resemble each other, so k of them hold less information than k rows of k
clusters. Whole clusters are drawn with replacement here (Davison and Hinkley, 1997, section 3.8),
and the quantiles are bias-corrected and accelerated, BCa (Efron, 1987): near 0 and 100 % plain
percentiles contain the true share too rarely, 88 to 92 % of the time in a simulation of 10 to 100
clusters of four rows with a share of 90 or 98 %. `scipy.stats.bootstrap` draws single rows.

Shapes: R rows, C clusters, B resamples.
"""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from eval.metrics import wilson

Z = (-1.959964, 1.959964)  # the 95 % interval in standard deviations
RESAMPLES = 2000
FLIPS = 9999  # of signs; the lowest p value is then 1 / 10,000
MOST_AT_ONCE = 4_000_000  # random numbers in memory
NORMAL = NormalDist()
BOOTSTRAP, WILSON = "cluster bootstrap (BCa)", "Wilson"


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a mean.

    Attributes:
        low, high (`float`)
        clusters (`int`): number of clusters.
        kind (`str`): `BOOTSTRAP` or `WILSON`.
    """

    low: float
    high: float
    clusters: int
    kind: str


def numbered(names: Iterable[Hashable]) -> np.ndarray:
    """Return the number of each name, from 0 in the order of first occurrence: int64 `(R,)`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def mean_interval(values: np.ndarray, clusters: np.ndarray, highest: float = 1.0) -> Interval:
    """Return the 95 % interval of the mean of `(R,)` values from 0 to `highest`.

    It is Wilson's (1927) where a bootstrap fails or is not needed:

    - all clusters have the same mean, for example 0 or 100 %. Resamples do not vary then. The
      number of clusters is the number of observations, whatever the number of rows.
    - every cluster has one row, and the values are 0 or `highest`.

    Args:
        values: a row's score.
        clusters: number of each row's cluster, `(R,)`, see [`numbered`].
    """
    sums, counts = _totals(values, clusters)
    binary = np.isin(values, (0.0, highest)).all()
    if _all_equal(sums / counts) or (binary and (counts == 1).all()):
        share = float(values.mean()) / highest
        low, high = wilson(share * len(sums), len(sums))
        return Interval(low * highest, high * highest, len(sums), WILSON)
    return Interval(*_bootstrap(sums, counts), len(sums), BOOTSTRAP)


def difference_interval(differences: np.ndarray, clusters: np.ndarray, largest: float) -> Interval:
    """Return the 95 % interval of the mean of `(R,)` differences between two scores of a row.

    If all differences are 0, the interval is 0. If all clusters have the same mean difference, and
    it is not 0, resamples do not vary: the interval is Wilson's for the share of the range from
    `-largest` to `largest`, with the number of clusters as the number of observations.

    Args:
        largest: the largest score of both results, above 0 unless all differences are 0.
    """
    sums, counts = _totals(differences, clusters)
    if differences.any() and _all_equal(sums / counts):
        share = (float(differences.mean()) / largest + 1) / 2
        low, high = wilson(share * len(sums), len(sums))
        return Interval((2 * low - 1) * largest, (2 * high - 1) * largest, len(sums), WILSON)
    return Interval(*_bootstrap(sums, counts), len(sums), BOOTSTRAP)


def sign_flip_p(differences: np.ndarray, clusters: np.ndarray) -> float:
    """Return the two-sided p value of a mean difference: the share of sign flips that reach it.

    If both results were equally good, each cluster's sum could have either sign (Fisher, 1935).
    Up to 13 clusters with a difference, all flips are tried; above, `FLIPS` random ones.
    """
    sums, _ = _totals(differences, clusters)
    sums = sums[sums != 0]  # flipping a 0 changes nothing
    observed = abs(sums.sum()) * (1 - 1e-9)  # rounding must not lose the observed signs
    if len(sums) <= 13:
        flips = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((1 - 2 * flips) @ sums) >= observed).mean())
    random = np.random.default_rng(0)
    reached, step = 0, max(1, MOST_AT_ONCE // len(sums))
    for start in range(0, FLIPS, step):
        flips = random.integers(2, size=(min(step, FLIPS - start), len(sums)), dtype=np.int8)
        # 1 - 2 * flips, without a second matrix of signs
        reached += int((np.abs(sums.sum() - 2 * (flips @ sums)) >= observed).sum())
    return (reached + 1) / (FLIPS + 1)


def _totals(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of the rows of each cluster, `(C,)`; a subset of rows is allowed."""
    _, clusters = np.unique(clusters, return_inverse=True)
    return np.bincount(clusters, weights=values), np.bincount(clusters)


def _all_equal(means: np.ndarray) -> bool:
    return math.isclose(means.min(), means.max(), rel_tol=1e-9, abs_tol=1e-12)


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the BCa interval of the mean, from `RESAMPLES` draws of C clusters."""
    mean = sums.sum() / counts.sum()
    if _all_equal(sums / counts):
        return float(mean), float(mean)
    random, found = np.random.default_rng(0), []
    step = max(1, MOST_AT_ONCE // len(sums))
    for start in range(0, RESAMPLES, step):
        shape = (min(step, RESAMPLES - start), len(sums))  # (B, C)
        drawn = random.integers(len(sums), size=shape)
        # Clusters differ in size, so the mean is a ratio of two sums.
        found.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    means = np.concatenate(found)

    # Bias: the share of resamples below the mean, and half of those equal to it. A share of 0 or 1
    # has no finite normal quantile.
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = NORMAL.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    # Acceleration: the skewness of the means without one cluster (jackknife)
    without = (sums.sum() - sums) / (counts.sum() - counts)
    away = without.mean() - without
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    shifted = [bias + z for z in Z]
    levels = [NORMAL.cdf(bias + each / (1 - acceleration * each)) for each in shifted]
    low, high = np.quantile(means, levels).tolist()
    return low, high


__all__ = [
    "BOOTSTRAP",
    "RESAMPLES",
    "WILSON",
    "Interval",
    "difference_interval",
    "mean_interval",
    "numbered",
    "sign_flip_p",
]
