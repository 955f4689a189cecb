"""Anticipation: clips before an action, next steps of a video, and the recall of classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.compare import paired
from eval.embed import Predictions
from eval.task import Paper, Task
from eval.tasks import anticipation
from eval.tasks.anticipation import (
    MOMENT,
    AnticipationBenchmark,
    Majority,
    clip_before,
    next_steps,
    scores_of,
)
from tests.shade_model import ShadeModel, write_media
from tests.tiny import write_rows

STEPS = [
    {"video": "a.mp4", "start": 0.4, "end": 0.8, "target": "stir", "activity": "tea"},
    {"video": "a.mp4", "start": 0, "end": 0.4, "target": "pour", "activity": "tea"},
    {"video": "b.mp4", "start": 0, "end": 0.4, "target": "pour", "activity": "milk"},
    {"video": "b.mp4", "start": 0.4, "end": 0.8, "target": "drink", "activity": "milk"},
]


def benchmark(folder: Path, rows: list[dict], **keys: object) -> AnticipationBenchmark:
    for name in ("a", "b"):
        write_media(folder / f"{name}.mp4", 0, 1)
    path = write_rows(folder / "rows.jsonl", rows)
    return AnticipationBenchmark("next", "anticipation", path, "", **keys)


@pytest.mark.parametrize(
    ("start", "seconds", "context", "clip"),
    [
        (10, 1, 4, (5, 9)),
        (10, 0, 4, (6, 10)),
        (3, 1, 4, (0, 2)),  # the video begins within the clip
        (1, 1, 4, (0, MOMENT)),  # and here at its end: the first frame
        (0, 10, 4, (0, MOMENT)),
        (1.03, 1, 4, (0, MOMENT)),
    ],
)
def test_clip_before_ends_before_the_action(start, seconds, context, clip):
    action = {"video": "a.mp4", "start": start, "end": start + 1, "target": "stir"}
    row = clip_before(action, seconds, context)
    assert (row["start"], row["end"], row["seconds_before"]) == (*clip, seconds)
    assert (row["video"], row["target"]) == ("a.mp4", "stir")


def test_next_steps_pair_the_steps_of_a_video_by_their_starts():
    found = [(row["video"], row["start"], row["step"], row["target"]) for row in next_steps(STEPS)]
    assert found == [("a.mp4", 0, "pour", "stir"), ("b.mp4", 0, "pour", "drink")]
    assert next_steps(STEPS[:1] + STEPS[2:3]) == []


def test_anticipation_class_mean_recall_equals_a_loop():
    """The loop goes through rows and classes, and knows nothing of weights."""
    random = np.random.default_rng(0)
    rows, candidates = 300, 12
    truth = random.choice(7, rows, p=[0.7, *[0.05] * 6])  # one frequent class and rare ones
    similarity = random.normal(size=(rows, candidates))
    similarity[np.arange(rows), truth] += np.where(truth == 0, 3, 0.5)  # the frequent one is easy
    relevant = torch.tensor(truth)[:, None] == torch.arange(candidates)
    found = torch.tensor(similarity)
    ranks = 1 + (found > found[relevant][:, None]).sum(dim=1)
    named = [{"video": f"{row % 40}.mp4", "target": str(each)} for row, each in enumerate(truth)]
    scores, values = scores_of(named, ranks, relevant, Majority(named))

    hits, counts, best = {}, {}, 0
    for row in range(rows):
        five = np.argsort(-similarity[row])[:5]
        counts[truth[row]] = counts.get(truth[row], 0) + 1
        hits[truth[row]] = hits.get(truth[row], 0) + (truth[row] in five)
        best += np.argmax(similarity[row]) == truth[row]
    expected = sum(hits[each] / counts[each] for each in counts) / len(counts)
    recall = scores["class-mean R@5"]
    assert recall.value == pytest.approx(expected, abs=1e-9)
    assert abs(expected - sum(hits.values()) / rows) > 0.02  # not the share of rows
    assert scores["top-1"].value == pytest.approx(best / rows, abs=1e-9)
    assert recall.baselines["majority"] == pytest.approx(5 / len(counts), abs=1e-9)
    assert recall.baselines["chance"] == pytest.approx(5 / candidates)
    assert 0 <= recall.low < recall.value < recall.high <= 1 and recall.clusters == 40
    # The interval against one that draws videos and computes the recall anew
    hit, found = (ranks <= 5).numpy(), []
    for _ in range(500):
        drawn = np.concatenate(
            [np.arange(video, rows, 40) for video in random.integers(40, size=40)]
        )
        means = [hit[drawn][truth[drawn] == each].mean() for each in set(truth[drawn].tolist())]
        found.append(np.mean(means))
    assert (recall.low, recall.high) == pytest.approx(np.quantile(found, (0.025, 0.975)), abs=0.03)
    # A comparison of two models pairs these values: its difference is that of the recalls.
    others = np.zeros(rows)
    compared = paired(others[None], values["class-mean R@5"][None], np.arange(rows), ("", ""), None)
    assert compared.difference == pytest.approx(expected)


def test_anticipation_interval_of_classes_with_one_row_is_that_of_the_rows():
    rows = [{"video": f"{row // 2}.mp4", "target": str(row)} for row in range(40)]
    ranks = torch.tensor([1, 9, 1, 1] * 10)
    relevant = torch.eye(40, dtype=torch.bool)
    found, _ = scores_of(rows, ranks, relevant, Majority(rows))
    top1, recall = found["top-1"], found["class-mean R@5"]
    assert recall.low < 0.7 < recall.value == 0.75 < 0.8 < recall.high
    assert (recall.low, recall.high) == pytest.approx((top1.low, top1.high))


@pytest.mark.parametrize("rank", [1, 9])
def test_anticipation_interval_of_equal_classes_stays_within_one(rank):
    """All classes have the same recall: resampled rows do not vary, whatever their weights."""
    rows = [{"video": f"{row}.mp4", "target": "often" if row else "once"} for row in range(9)]
    ranks = torch.full((9,), rank)
    relevant = torch.zeros(9, 10, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    score = scores_of(rows, ranks, relevant, Majority(rows))[0]["class-mean R@5"]
    assert score.value == pytest.approx(float(rank == 1))
    assert 0 <= score.low <= score.high <= 1 and score.low < score.high


def test_majority_knows_the_activity_and_fills_up_with_all():
    rows = [
        {"target": target, "activity": activity}
        for activity, target in [("tea", "stir"), ("tea", "stir"), ("milk", "pour")]
    ] + [{"target": "pour"}] * 2
    majority = Majority(rows)
    assert majority.best(1) == ["pour"] and majority.best(5) == ["pour", "stir"]
    assert majority.best_of("tea", 1) == ["stir"] and majority.best_of("tea", 2) == ["stir", "pour"]
    assert majority.best_of("cake", 1) == ["pour"]
    hits = majority.hits([{"target": "stir", "activity": "tea"}, {"target": "stir"}], 1)
    assert [each.tolist() for each in hits.values()] == [[False, False], [True, False]]
    assert list(Majority([{"target": "stir"}]).hits([{"target": "stir"}], 1)) == ["majority"]


def test_anticipation_learns_candidates_and_majority_from_training_rows(tmp_path):
    train = write_rows(
        tmp_path / "train.jsonl",
        [{"video": "a.mp4", "target": target} for target in ("stir", "stir", "pour")],
    )
    measured = benchmark(tmp_path, STEPS, train_rows=train)
    model = ShadeModel([[1.0, 0], [0, 1.0]], {"pour": [0, 1.0], "stir": [1.0, 0]})
    result = anticipation.evaluate(Task(model, model.processor, measured))
    # "drink" is not among the training actions, so that one of the two next steps is left.
    assert (result.scores["top-1"].value, result.scores["top-1"].n) == (1, 1)
    assert result.scores["top-1"].baselines == {"chance": 1 / 2, "majority": 1}
    assert result.protocol["rows_of_other_actions"] == 1
    assert result.protocol["train_rows_file"] == "train.jsonl"
    assert result.pool is None  # only a benchmark of the paper has one


def test_anticipation_pool_is_that_of_the_time_with_the_fewest_clips(tmp_path, monkeypatch):
    """A clip that is unusable at one time leaves that time's score without the whole pool."""

    def without_the_last(task, rows, texts, templates):
        found = Predictions(rows[:-1], queries=[""] * 7, embeds=torch.ones(7, 2), broken={})
        return found, torch.zeros(7, len(texts))

    monkeypatch.setattr(anticipation, "compare", without_the_last)
    paper = Paper(name="Steps", metric="top-1 at 1 s", pool=4)
    measured = benchmark(tmp_path, STEPS, seconds_before=[1, 2], paper=paper)
    model = ShadeModel([[1.0, 0]], {})
    result = anticipation.evaluate(Task(model, model.processor, measured))
    assert [result.scores[f"top-1 at {seconds} s"].n for seconds in (1, 2)] == [4, 3]
    assert result.title == "Steps (3 of 4 rows)"


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (STEPS[:1], {}, "no video has two usable steps"),
        (STEPS, {"candidates": ["sing"]}, "no action is among the candidates: sing"),
        (
            [{"video": "a.mp4", "target": "stir"}],
            {},
            "rows.jsonl:1: start of the action is missing",
        ),
        ([{"video": "a.mp4", "start": 0, "target": "stir"}], {}, "end of the action is missing"),
        (STEPS, {"seconds_before": []}, "seconds_before is empty"),
        (STEPS, {"seconds_before": [1, "2"]}, "seconds_before holds '2'"),
        (STEPS, {"seconds_before": [-1]}, "seconds_before holds -1"),
        (STEPS, {"seconds_before": [True]}, "seconds_before holds True"),
        (STEPS, {"seconds_before": [1, 1.0]}, "holds a time twice"),
        (STEPS, {"seconds_before": [float("nan")]}, "seconds_before holds nan"),
        (STEPS, {"context": 0}, "context is 0, must be above 0 seconds"),
        (STEPS, {"context": float("inf")}, "context is inf, must be above 0 seconds"),
        (STEPS, {"train_rows": Path("x"), "train_source": "x"}, "train_rows or train_source"),
        (STEPS, {"candidates": ["x"], "candidates_source": "x"}, "exclude each other"),
    ],
)
def test_anticipation_names_what_it_cannot_measure(tmp_path, rows, keys, message):
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, rows, **keys).load()


def test_anticipation_passes_over_a_bad_step(tmp_path):
    bad = {"video": "a.mp4", "start": 0.2, "end": 0.1, "target": "spill"}
    rows, found = benchmark(tmp_path, [*STEPS, bad]).load()
    assert [row["target"] for row in rows] == ["stir", "drink"]
    assert [each.line for each in found] == [5]
    rows, _ = replace(benchmark(tmp_path, STEPS), seconds_before=[1]).load()
    assert len(rows) == 4  # each action, the first of a video too
