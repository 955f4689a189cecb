"""Intervals over clusters of rows, against values computed by hand and by scipy."""

import numpy as np
import pytest
from scipy import stats

from eval import intervals
from eval.intervals import (
    BOOTSTRAP,
    WILSON,
    difference_interval,
    mean_interval,
    numbered,
    sign_flip_p,
)
from eval.metrics import wilson

EACH = np.arange(200)  # every row is a cluster
VALUES = np.random.default_rng(0).gamma(0.5, 1.0, 200).clip(0, 10)  # skewed


def test_numbered_counts_names_in_the_order_of_first_occurrence():
    assert numbered(["b", "a", "b", ("c", 1)]).tolist() == [0, 1, 0, 2]


def test_mean_interval_equals_that_of_scipy_for_clusters_of_one_row():
    found = mean_interval(VALUES, EACH, 10.0)
    expected = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=2000, rng=np.random.default_rng(0), method="BCa"
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (found.clusters, found.kind) == (200, BOOTSTRAP)


@pytest.mark.parametrize("copies", [2, 4, 9])
def test_mean_interval_of_copies_is_that_of_the_clusters(copies):
    """k copies of a row hold no more information than the row."""
    alone = mean_interval(VALUES, EACH, 10.0)
    many = mean_interval(np.repeat(VALUES, copies), np.repeat(EACH, copies), 10.0)
    assert (many.low, many.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    # Positive control: as if copies were clusters, the interval is sqrt(k) times narrower.
    rows = mean_interval(np.repeat(VALUES, copies), np.arange(200 * copies), 10.0)
    ratio = (alone.high - alone.low) / (rows.high - rows.low)
    assert ratio == pytest.approx(copies**0.5, rel=0.08)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_mean_interval_of_shares_agrees_with_wilson(share):
    hits = (200 * share > EACH).astype(float)
    alone = mean_interval(hits, EACH)
    assert alone.kind == WILSON
    assert (alone.low, alone.high) == pytest.approx(wilson(200 * share, 200))
    # With a copy of each row the clusters are resampled.
    copied = mean_interval(np.repeat(hits, 2), np.repeat(EACH, 2))
    assert (copied.kind, copied.clusters) == (BOOTSTRAP, 200)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=0.015)


@pytest.mark.parametrize(
    ("values", "highest", "expected"),
    [
        ([1.0] * 5, 1.0, (0.722467, 1.0)),  # Wilson's for 10 of 10
        ([0.0] * 5, 1.0, (0.0, 0.277533)),
        ([0.0] * 5, 10.0, (0.0, 2.77533)),
        ([1.0, 0.0], 1.0, (0.236593, 0.763407)),  # Wilson's for 5 of 10
    ],
)
def test_mean_interval_of_equal_clusters_is_wilsons_for_their_number(values, highest, expected):
    """Resamples of ten equal clusters do not vary, whatever the number of rows."""
    found = mean_interval(np.tile(values, 10), np.repeat(np.arange(10), len(values)), highest)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-5)
    assert (found.clusters, found.kind) == (10, WILSON)


def test_mean_interval_weighs_clusters_by_their_rows():
    """Two clusters of 1 and 3 rows: the mean is 1/4. Draws give 1, 1/4 and 0."""
    found = mean_interval(np.array([1.0, 0, 0, 0]), np.array([0, 1, 1, 1]))
    assert (found.low, found.high) == (0.0, 1.0)


def test_mean_interval_hardly_depends_on_the_size_of_chunks(monkeypatch):
    whole = mean_interval(VALUES, EACH // 2, 10.0)
    monkeypatch.setattr(intervals, "MOST_AT_ONCE", 777)
    chunks = mean_interval(VALUES, EACH // 2, 10.0)
    width = whole.high - whole.low
    assert (chunks.low, chunks.high) == pytest.approx((whole.low, whole.high), abs=0.1 * width)


def test_mean_interval_contains_the_true_share_of_clustered_rows():
    """Three of the four rows of a cluster agree, and the true share is 0.9."""
    random, k = np.random.default_rng(0), 4
    clusters = np.repeat(np.arange(50), k)
    contained, by_rows = 0, 0
    for _ in range(300):
        hits = np.repeat((random.random(50) < 0.9).astype(float), k)
        hits[::k] = random.random(50) < 0.9  # one row of each cluster is independent
        found = mean_interval(hits, clusters)
        contained += found.low <= 0.9 <= found.high
        low, high = wilson(hits.sum(), len(hits))
        by_rows += low <= 0.9 <= high
    assert 0.92 <= contained / 300 <= 0.98
    assert by_rows / 300 < 0.85  # positive control: intervals over rows are too narrow


def test_difference_interval_of_equal_results_is_zero():
    found = difference_interval(np.zeros(6), np.array([0, 0, 1, 1, 2, 2]), 0.0)
    assert (found.low, found.high, found.clusters) == (0.0, 0.0, 3)
    assert sign_flip_p(np.zeros(6), np.array([0, 0, 1, 1, 2, 2])) == 1.0


def test_difference_interval_of_equal_clusters_is_wilsons_on_the_whole_range():
    """All three clusters gain 1: the share of the range from -1 to 1 is 3 of 3."""
    found = difference_interval(np.ones(6), np.array([0, 0, 1, 1, 2, 2]), 1.0)
    low, high = wilson(3, 3)
    assert (found.low, found.high) == pytest.approx((2 * low - 1, 2 * high - 1))


def test_difference_interval_of_pairs_excludes_zero_where_single_intervals_overlap():
    a = np.random.default_rng(1).random(100)
    b = a + np.where(np.arange(100) % 2, 0.02, 0.03)
    found = difference_interval(b - a, np.arange(100), b.max())
    assert 0.02 < found.low < 0.025 < found.high < 0.03
    assert mean_interval(a, np.arange(100)).high > mean_interval(b, np.arange(100), 2.0).low


@pytest.mark.parametrize(
    ("differences", "clusters", "p"),
    [
        ([1, 1, 1], [0, 1, 2], 2 / 8),  # only +++ and --- reach 3
        ([1, 1, -1], [0, 1, 2], 1.0),  # all flips reach 1
        ([3, 1, 1], [0, 1, 2], 2 / 8),
        ([2, 1, -1], [0, 1, 2], 6 / 8),  # sums 4, 2, 2, 0 and their negatives; 2 is reached by 6
        ([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2], 2 / 4),  # two clusters with a difference
        ([1, -1, 1], [0, 0, 1], 1.0),  # one cluster with a difference
        ([0.1] * 10, list(range(10)), 2 / 1024),  # 0.1 ten times is not exactly 1
    ],
)
def test_sign_flip_p_counts_the_flips_of_clusters(differences, clusters, p):
    assert sign_flip_p(np.array(differences, dtype=float), np.array(clusters)) == pytest.approx(p)


def test_sign_flip_p_of_random_flips_estimates_that_of_all():
    """Twenty clusters, 14 with +1 and 6 with -1: P(|sum| >= 8) is that of a binomial."""
    differences = np.repeat([1.0, -1.0], [14, 6])
    exact = 2 * stats.binom.sf(13, 20, 0.5)
    assert sign_flip_p(differences, np.arange(20)) == pytest.approx(exact, abs=0.01)
    copies = sign_flip_p(np.repeat(differences, 5), np.repeat(np.arange(20), 5))
    assert copies == sign_flip_p(differences, np.arange(20))
