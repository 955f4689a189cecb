"""Segments compared with brute force, scikit-learn and streams with known boundaries.

Two errors of public code are tested: a detector that compares neighbours only finds one meaning in
a slow turn by 180 degrees, and a "selective" decoder without a limit selects every frame.
"""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.sparse import diags
from sklearn.cluster import AgglomerativeClustering

from modeling_vljepa.pipelines.segmentation import (
    EvenSample,
    OnlineSegmenter,
    WardSegmenter,
    as_unit,
    merge_order,
)


def spans(segments) -> list[tuple[int, int]]:
    return [(each.start, each.end) for each in segments]


def meanings(lengths: list[int], dim: int = 32, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """Return a stream of orthogonal meanings with noise, `(sum(lengths), dim)`."""
    random = np.random.default_rng(seed)
    axes = np.eye(dim)[: len(lengths)]
    clean = np.repeat(axes, lengths, axis=0)
    return clean + noise * random.standard_normal(clean.shape)


def half_turn(steps: int = 200, dim: int = 32) -> np.ndarray:
    """Return a stream from a vector to its opposite, at constant speed."""
    stream = np.zeros((steps, dim))
    angles = np.linspace(0, math.pi, steps)
    stream[:, 0], stream[:, 1] = np.cos(angles), np.sin(angles)
    return stream


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def assert_tiles(segments, length: int, start_time: float, end_time: float):
    assert segments[0].start == 0 and segments[-1].end == length
    assert segments[0].start_time == start_time and segments[-1].end_time == end_time
    for one, two in zip(segments, segments[1:], strict=False):
        assert one.end == two.start and one.end_time == two.start_time
    assert all(each.start < each.end for each in segments)


def squared_distances(points: np.ndarray) -> float:
    return ((points - points.mean(axis=0)) ** 2).sum()


def brute_force(points: np.ndarray, keep: int, threshold: float = math.inf) -> list[int]:
    """Merge by Ward's definition, computed from all points at every step."""
    bounds = list(range(len(points) + 1))
    while len(bounds) - 1 > keep:
        costs = [
            squared_distances(points[a:c])
            - squared_distances(points[a:b])
            - squared_distances(points[b:c])
            for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False)
        ]
        best = int(np.argmin(costs))
        if math.sqrt(2 * costs[best]) >= threshold:
            break
        del bounds[best + 1]
    return bounds[1:-1]


def scikit_learn(points: np.ndarray, **settings) -> list[int]:
    """Return the steps whose label differs from that of the step before."""
    ones = np.ones(len(points) - 1)
    chain = diags([ones, ones], [-1, 1], format="csr")
    found = AgglomerativeClustering(linkage="ward", connectivity=chain, **settings).fit(points)
    return (np.flatnonzero(np.diff(found.labels_)) + 1).tolist()


# -- offline -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_ward_segmenter_equals_brute_force_and_scikit_learn(seed):
    points = as_unit(np.random.default_rng(seed).standard_normal((40, 6)))
    for number in (1, 2, 3, 7, 20, 39, 40):
        found = WardSegmenter(number).boundaries(points)
        assert found == brute_force(points, number)
        assert found == scikit_learn(points, n_clusters=number)
    _, distances = merge_order(points)
    for threshold in np.quantile(distances, [0.1, 0.4, 0.8]):
        found = WardSegmenter(threshold=threshold).boundaries(points)
        assert found == brute_force(points, 1, threshold)


def test_ward_segmenter_stops_at_the_threshold_unlike_scikit_learn():
    """Points A, B, A: the merge of the first two is nearer to the third than they were to each
    other."""
    points = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    _, distances = merge_order(points)
    assert distances.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2 / 3)])
    assert len(WardSegmenter(threshold=1.0).segment(points)) == 3
    assert len(scikit_learn(points, n_clusters=None, distance_threshold=1.0)) + 1 == 2


@pytest.mark.parametrize("number", [1, 2, 5, 24, 25, 26, 1000])
def test_ward_segmenter_returns_num_segments(number):
    stream = np.random.default_rng(0).standard_normal((25, 8))
    times = np.arange(25) / 4 + 3
    segments = WardSegmenter(number).segment(stream, times, end_time=9.5)
    assert len(segments) == min(number, 25)
    assert_tiles(segments, 25, 3.0, 9.5)


def test_ward_segmenter_finds_known_boundaries():
    stream = meanings([10, 25, 7, 18])
    assert spans(WardSegmenter(4).segment(stream)) == [(0, 10), (10, 35), (35, 42), (42, 60)]
    assert spans(WardSegmenter(threshold=2.0).segment(stream)) == [
        (0, 10),
        (10, 35),
        (35, 42),
        (42, 60),
    ]


def test_ward_segmenter_with_a_larger_threshold_gives_a_subset_of_the_boundaries():
    stream = np.random.default_rng(1).standard_normal((60, 8))
    found = [
        set(WardSegmenter(threshold=threshold).boundaries(as_unit(stream)))
        for threshold in np.linspace(0, 4, 30)
    ]
    assert all(larger <= smaller for smaller, larger in zip(found, found[1:], strict=False))
    assert len(found[0]) == 59 and not found[-1]


def test_ward_segmenter_decodes_the_midpoint_or_the_mean():
    stream = np.array([[1.0, 0.0], [1.0, 0.1], [0.8, 0.6], [0.0, 2.0]])
    [middle] = WardSegmenter(1).segment(stream)
    [mean] = WardSegmenter(1, decode_from="mean").segment(stream)
    torch.testing.assert_close(middle.embedding, torch.tensor(as_unit(stream[1])).float())
    average = as_unit(stream).mean(axis=0)
    torch.testing.assert_close(mean.embedding, torch.tensor(as_unit(average)).float())
    torch.testing.assert_close(mean.mean, torch.tensor(average).float())
    assert mean.confidence == pytest.approx(np.linalg.norm(average), abs=1e-6)
    assert WardSegmenter(4).segment(stream)[3].confidence == pytest.approx(1, abs=1e-6)


def test_segmenters_take_streams_of_no_and_of_one_embedding():
    assert WardSegmenter(3).segment(np.zeros((0, 8))) == []
    assert WardSegmenter(3).close() == [] and OnlineSegmenter().close() == []
    for segmenter in (WardSegmenter(3), WardSegmenter(threshold=1.0), OnlineSegmenter()):
        [only] = segmenter.segment(np.ones((1, 8)), [2.5])
        assert (only.start, only.end, only.start_time, only.end_time) == (0, 1, 2.5, 2.5)


# -- both ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: WardSegmenter(4), OnlineSegmenter])
def test_segmenter_push_equals_segment(make):
    stream, times = meanings([20, 30, 20, 30]), np.arange(100) / 10
    segmenter = make()
    pushed = [
        each
        for embedding, time in zip(torch.from_numpy(stream), times, strict=True)
        for each in segmenter.push(embedding, time)
    ]
    pushed += segmenter.close()
    whole = make().segment(stream, times)
    assert spans(pushed) == spans(whole) and len(pushed) == 4
    assert_tiles(pushed, 100, 0.0, 9.9)
    for one, two in zip(pushed, whole, strict=True):
        assert_close(one.embedding, two.embedding)
    # After `close` the segmenter takes another stream.
    assert spans(segmenter.segment(stream, times)) == spans(whole)


@pytest.mark.parametrize("make", [lambda: WardSegmenter(4), OnlineSegmenter])
@pytest.mark.parametrize(
    ("embeds", "times", "message"),
    [
        (np.zeros((1, 4)), None, "zero or not finite"),
        (torch.tensor([[1.0, math.nan]]), None, "zero or not finite"),
        (np.ones((3, 4)), [0.0, 2.0, 1.0], "never decrease"),
        (np.ones((3, 4)), [0.0, 2.0], "2 timestamps for 3 embeddings"),
    ],
    ids=["zero", "nan", "times", "timestamps"],
)
def test_segmenter_rejects_invalid_streams(make, embeds, times, message):
    with pytest.raises(ValueError, match=message):
        make().segment(embeds, times)


@pytest.mark.parametrize("make", [lambda: WardSegmenter(4), OnlineSegmenter])
def test_segmenter_push_rejects_a_zero_embedding(make):
    with pytest.raises(ValueError, match="zero or not finite"):
        make().push(np.zeros(4), 0.0)


@pytest.mark.parametrize(
    ("segmenter", "settings", "message"),
    [
        (WardSegmenter, {}, "num_segments"),
        (WardSegmenter, {"num_segments": 2, "threshold": 0.1}, "num_segments"),
        (WardSegmenter, {"num_segments": 0}, "num_segments"),
        (WardSegmenter, {"num_segments": 2, "decode_from": "middle"}, "'midpoint', 'mean'"),
        (OnlineSegmenter, {"window": 1}, "window"),
        (OnlineSegmenter, {"patience": 0}, "patience"),
        (OnlineSegmenter, {"burst": 1}, "burst"),
        (OnlineSegmenter, {"max_decodes": 0}, "max_decodes"),
    ],
)
def test_segmenter_rejects_invalid_settings(segmenter, settings, message):
    with pytest.raises(ValueError, match=message):
        segmenter(**settings)


@pytest.mark.parametrize(
    "setting",
    [
        {"window": 2.5},
        {"window": "abc"},
        {"patience": True},
        {"max_decodes": 1.5},
        {"burst": math.inf},
        {"drift_threshold": math.nan},
        {"drift_threshold": "abc"},
        {"variance_threshold": None},
        {"variance_threshold": -0.1},
        {"smoothing": math.nan},
        {"decodes_per_second": math.nan},
        {"decodes_per_second": math.inf},
    ],
)
def test_online_segmenter_names_an_invalid_number(setting):
    """Without a check, NaN never triggers, and a string fails only when the stream runs."""
    with pytest.raises(ValueError, match=f"{min(setting)} is .*: (give|leave it out)"):
        OnlineSegmenter(**setting)


@pytest.mark.parametrize("value", [math.nan, -1, "a"])
def test_ward_segmenter_threshold_is_a_distance(value):
    with pytest.raises(ValueError, match="threshold is .*: give at least 0"):
        WardSegmenter(threshold=value)
    assert len(WardSegmenter(threshold=math.inf).segment(np.eye(4))) == 1
    assert len(WardSegmenter(threshold=0).segment(np.ones((4, 4)))) == 4  # 0 is not below 0


@pytest.mark.parametrize("make", [lambda: WardSegmenter(4), OnlineSegmenter])
def test_segmenter_rejects_other_sizes_and_an_end_before_the_last_embedding(make):
    segmenter = make()
    segmenter.push(np.ones(4), 5.0)
    with pytest.raises(ValueError, match="expected .4,."):
        segmenter.push(np.ones(5), 6.0)
    with pytest.raises(ValueError, match="expected .4,."):
        segmenter.push(np.ones((1, 4)), 6.0)
    with pytest.raises(ValueError, match="time 4.0 after 5.0"):
        segmenter.close(4.0)


# -- online --------------------------------------------------------------------------------


def test_online_segmenter_finds_known_boundaries():
    lengths = [20, 35, 15, 40, 12]
    segments = OnlineSegmenter().segment(meanings(lengths))
    bounds = np.cumsum([0, *lengths]).tolist()
    assert spans(segments) == list(zip(bounds, bounds[1:], strict=False))


def test_online_segmenter_returns_one_segment_for_a_constant_stream():
    constant = np.tile(np.random.default_rng(0).standard_normal(16), (500, 1))
    assert spans(OnlineSegmenter().segment(constant)) == [(0, 500)]
    noisy = meanings([500])
    assert spans(OnlineSegmenter().segment(noisy)) == [(0, 500)]
    assert len(OnlineSegmenter(variance_threshold=1e-4).segment(noisy)) > 50  # positive control


def test_online_segmenter_divides_a_slow_half_turn():
    """Nothing changes from step to step: only the comparison with the first steps finds it."""
    stream = half_turn(200)
    segments = OnlineSegmenter().segment(stream)
    assert 3 <= len(segments) <= 12
    for each in segments:  # no segment spans 90 degrees or more
        assert stream[each.start] @ stream[each.end - 1] > 0
    assert len(OnlineSegmenter(drift_threshold=2.0).segment(stream)) == 1  # positive control


def test_online_segmenter_ignores_one_odd_frame():
    stream = meanings([60, 1, 60])
    stream[61:] = meanings([60], seed=1)
    assert spans(OnlineSegmenter().segment(stream)) == [(0, 121)]
    hasty = OnlineSegmenter(patience=1, smoothing=1.0)
    assert len(hasty.segment(stream)) > 1  # positive control


def test_online_segmenter_does_not_change_closed_segments():
    random = np.random.default_rng(3)
    stream = np.concatenate([meanings([15, 9, 30, 12, 25]), random.standard_normal((60, 32))])
    whole = OnlineSegmenter().segment(stream)
    assert len(whole) > 5
    for length in range(1, len(stream), 7):
        online = OnlineSegmenter()
        pushed = [each for e in stream[:length] for each in online.push(e, float(online.count))]
        for one, two in zip(pushed, whole, strict=False):
            assert (one.start, one.end) == (two.start, two.end)
            assert_close(one.embedding, two.embedding)
        assert len(pushed) <= len(whole)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 2.5])
def test_online_segmenter_keeps_decodes_per_second_in_any_interval(rate):
    """The stream is noise, in which every step is a change, at ten steps a second."""
    stream = np.random.default_rng(0).standard_normal((600, 16))
    times = np.arange(600) / 10
    online = OnlineSegmenter(decodes_per_second=rate, burst=4, patience=1)
    decoded = []
    for embedding, time in zip(stream, times, strict=True):
        decoded += [time] * len(online.push(embedding, time))
    decoded += [times[-1]] * len(online.close())
    assert len(decoded) <= 1 + rate * times[-1]
    assert len(decoded) >= 0.9 * rate * times[-1]  # and it is used
    for i, first in enumerate(decoded):
        for j in range(i, len(decoded)):
            assert j - i + 1 <= 4 + rate * (decoded[j] - first) + 1e-9
    free = OnlineSegmenter(patience=1).segment(stream, times)
    assert len(free) > 1 + 2.5 * 59.9  # positive control


@pytest.mark.parametrize("most", [1, 2, 10])
def test_online_segmenter_keeps_max_decodes(most):
    stream = np.random.default_rng(0).standard_normal((600, 16))
    segments = OnlineSegmenter(max_decodes=most).segment(stream)
    assert len(segments) == most
    assert_tiles(segments, 600, 0, 599)


def test_online_segmenter_closes_a_delayed_segment_when_a_decode_is_earned():
    """A decode is earned every 32 steps. When it is, the variance of the change at step 45 is over,
    but the drift remains. The boundary is then one of the last steps, not step 45."""
    stream = meanings([40, 5, 55])
    online = OnlineSegmenter(decodes_per_second=1 / 32)
    closed = {
        step: each
        for step, embedding in enumerate(stream)
        for each in online.push(embedding, float(step))
    }
    first, second = closed
    assert closed[first].end == 40 and first < 45
    assert second == first + 32
    assert second - 11 < closed[second].end <= second


def test_online_segmenter_ends_a_segment_at_the_largest_ward_distance():
    """The boundary is one of the last `window + patience` steps; noise gives many segments."""
    stream = as_unit(np.random.default_rng(0).standard_normal((120, 6)))
    online, start, checked = OnlineSegmenter(patience=2), 0, 0
    for step, embedding in enumerate(stream):
        for segment in online.push(embedding, float(step)):
            seen = stream[start : step + 1]
            steps = range(max(1, len(seen) - 10), len(seen))
            gains = [
                squared_distances(seen) - squared_distances(seen[:i]) - squared_distances(seen[i:])
                for i in steps
            ]
            assert segment.end == start + steps[int(np.argmax(gains))]
            start, checked = segment.end, checked + 1
    assert checked > 10


def test_online_segmenter_continues_from_a_restored_state():
    stream = np.concatenate([meanings([30, 20, 45]), half_turn(120)])
    settings = {"decodes_per_second": 0.2, "burst": 3}

    def push(online: OnlineSegmenter, start: int, end: int) -> list:
        """Return the segments, each with the step that closed it."""
        return [
            (step, each)
            for step in range(start, end)
            for each in online.push(stream[step], float(step))
        ]

    expected = push(OnlineSegmenter(**settings), 0, len(stream))
    assert len(expected) > 3
    suspicions = 0
    for cut in (0, 1, 5, 31, 32, 33, 36, 60, 150, 214):
        first, second = OnlineSegmenter(**settings), OnlineSegmenter(**settings)
        found = push(first, 0, cut)
        suspicions += first.suspected > 0
        state = first.state_dict()
        if state:
            state = load(save(state))  # through safetensors
        second.load_state_dict(state)
        first.push(stream[0], 1e6)  # the second shares no memory with the first
        found += push(second, cut, len(stream))
        assert [step for step, _ in found] == [step for step, _ in expected]
        for (_, one), (_, two) in zip(found, expected, strict=True):
            assert (one.start, one.end) == (two.start, two.end)
            assert_close(one.embedding, two.embedding)
            assert_close(one.mean, two.mean)
    assert suspicions > 0


def test_online_segmenter_memory_does_not_grow():
    online = OnlineSegmenter()
    constant = np.ones(64) / 8
    tracemalloc.start()
    held = []
    for step in range(2000):
        online.push(constant, step / 10)
        if step % 500 == 499:
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(online.sample.items) <= 32 and len(online.recent) == 11
    assert abs(held[-1] - held[0]) < 20_000


@pytest.mark.parametrize("length", [1, 2, 9, 33, 100, 1000])
def test_even_sample_is_evenly_spaced_and_has_the_newest(length):
    sample = EvenSample(8)
    for index in range(length):
        sample.add(index, index)
    indices = [index for index, _ in sample.items]
    assert len(indices) <= 8 and indices[0] == 0 and indices[-1] == length - 1
    gaps = np.diff(indices)
    assert (gaps[:-1] == sample.stride).all() and (gaps[-1:] <= sample.stride).all()
    assert abs(sample.nearest(length // 2, length) - length // 2) <= sample.stride


@pytest.mark.parametrize("make", [OnlineSegmenter, lambda: WardSegmenter(2)])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones(5), r"shape \(5,\), expected \(S, D\)"),
        (np.ones((2, 3, 4)), r"shape \(2, 3, 4\), expected \(S, D\)"),
        (np.array([[1.0, 0.0], [0.0, 0.0]]), "zero or not finite"),
    ],
    ids=["vector", "cube", "zero"],
)
def test_segmenter_is_unchanged_by_a_rejected_stream(make, bad, message):
    segmenter, good = make(), np.eye(4)
    expected = spans(segmenter.segment(good))
    with pytest.raises(ValueError, match=message):
        segmenter.segment(bad)
    assert spans(segmenter.segment(good)) == expected
    assert segmenter.segment([]) == []
