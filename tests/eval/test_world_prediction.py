"""World prediction: unusable rows are named, and the others are scored and shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval.report import write_report
from eval.task import Task
from eval.tasks import world_prediction
from eval.tasks.world_prediction import WorldPredictionBenchmark
from tests.shade_model import ShadeModel, write_media
from tests.tiny import write_rows

ROW = {
    "video": "states.mp4",
    "target": "b",
    "candidates": ["a.mp4", "b.mp4"],
    "candidate_ids": ["a", "b"],
}


def write(folder: Path, *rows: dict) -> WorldPredictionBenchmark:
    """Write rows, and states that show the clips 0 and 2, which have clip 1 as their mean."""
    for index, name in enumerate(("a", "b", "c")):
        write_media(folder / f"{name}.mp4", index + 3)
    write_media(folder / "states.mp4", 0, 2)
    path = write_rows(folder / "rows.jsonl", list(rows))
    return WorldPredictionBenchmark("wp", "world_prediction", path, "")


def measure(benchmark: WorldPredictionBenchmark, clips: list[list[float]], **options: object):
    model = ShadeModel(clips, {})
    return world_prediction.evaluate(Task(model, model.processor, benchmark, **options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": "c"}, "target 'c' is not among candidate_ids: a, b"),
        ({"candidate_ids": ["b", "b"]}, "candidate_ids holds 'b' twice"),
        ({"candidate_ids": ["b"]}, "candidates and candidate_ids have 2 and 1 elements"),
        ({"candidate_labels": ["x"]}, "candidates and candidate_labels have 2 and 1 elements"),
        ({"candidates": ["b.mp4"], "candidate_ids": ["b"]}, "there is one candidate"),
        ({"candidates": ["a.mp4", "a.mp4"]}, "two candidates are the same clip"),
        ({"candidate_starts": [0, 2], "candidate_ends": [1, 1]}, "candidate b is from 2 to 1 s"),
        ({"candidate_starts": [0, -1]}, "candidate b is from -1 to inf seconds"),
        ({"candidate_starts": [0, "x"]}, "candidate_starts is not a list of numbers"),
        ({"candidates": ["a.mp4", "gone.mp4"]}, "candidates file is missing"),
        ({"candidates": None}, "candidates is missing"),
        ({"candidate_ids": None}, "candidate_ids is missing"),
        ({"target": None}, "target is missing"),
        ({"video": None, "image": "a.png"}, "an image has one state: give a video"),
    ],
)
def test_world_prediction_names_rows_that_it_cannot_use(tmp_path, change, reason):
    write_media(tmp_path / "a.png", 0)
    bad = {name: value for name, value in (ROW | change).items() if value is not None}
    rows, found = write(tmp_path, ROW, bad).load()
    assert [row["line"] for row in rows] == [1]
    assert [each.line for each in found] == [2] and reason in found[0].reason
    with pytest.raises(ValueError, match="no usable row. The first reason: .*") as error:
        write(tmp_path, bad).load()
    assert reason in str(error.value)


def test_world_prediction_refuses_rows_with_different_queries_and_too_few_frames(tmp_path):
    asked = [ROW | {"query": query} for query in ("what ?", "why ?")]
    with pytest.raises(ValueError, match="asks one query"):
        write(tmp_path, *asked).load()
    with pytest.raises(ValueError, match="1 frame cannot show two states"):
        replace(write(tmp_path, ROW), state_frames=1)


def test_world_prediction_takes_candidates_of_any_number_and_parts_of_videos(tmp_path):
    """Clip 1 is the mean of both states. Two candidates are parts of one video."""
    write_media(tmp_path / "long.mp4", 3, 4, 5)
    three = {
        "video": "states.mp4",
        "target": "last",
        "candidates": ["long.mp4"] * 3,
        "candidate_ids": ["first", "second", "last"],
        "candidate_starts": [0, 0.4, 0.8],
        "candidate_ends": [0.4, 0.8, 1.2],
    }
    # Clip 4 is nearest to the states, and 5 to the final one, clip 2.
    clips = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    result = measure(write(tmp_path, ROW, three), clips)
    accuracy = result.scores["accuracy"]
    assert accuracy.value == 1 / 2
    assert accuracy.baselines["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    # The candidates are at right angles, so that all tie; a tie is wrong.
    assert accuracy.baselines["candidates only"] == 0
    assert accuracy.baselines["final state only"] == 1 / 2
    assert result.protocol["candidates_per_row"] == "2, 3"
    assert result.items[0].predictions == ["b", "second"]
    write_report(tmp_path / "report.html", "model", [result], tmp_path / "none")
    page = (tmp_path / "report.html").read_text()
    assert page.count('alt="initial and final state"') == 2
    assert page.count('alt="candidate at rank 3"') == 1 and page.count('class="hit"') == 2
    lines = list(result.items[0].as_json())
    assert len({line["item"] for line in lines}) == 2 and json.dumps(lines)


def test_world_prediction_leaves_out_a_row_with_an_unreadable_candidate(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    unreadable = ROW | {"candidates": ["broken.mp4", "b.mp4"]}
    benchmark = write(tmp_path, ROW, unreadable, ROW)
    clips = [[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]]
    result = measure(benchmark, clips)
    assert (result.scores["accuracy"].n, result.scores["accuracy"].value) == (2, 1)
    [left_out] = result.skipped
    assert left_out.startswith("rows.jsonl:2: candidate a: ") and "broken.mp4" in left_out
    assert measure(benchmark, clips, limit=1).scores["accuracy"].n == 1
    with pytest.raises(ValueError, match="wp: no row has readable candidates. .*broken.mp4"):
        measure(write(tmp_path, unreadable), clips)


def test_world_prediction_counts_right_candidates_of_the_states_own_video(tmp_path):
    write_media(tmp_path / "one.mp4", 3, 3)
    own = {
        "video": "one.mp4",
        "start": 0,
        "end": 0.4,
        "target": "b",
        "candidates": ["a.mp4", "one.mp4"],
        "candidate_ids": ["a", "b"],
        "candidate_starts": [0, 0.4],
        "candidate_ends": [0.4, 0.8],
    }
    result = measure(write(tmp_path, ROW, own), [[1, 0]] * 4 + [[0, 1]])
    assert result.protocol["right_candidates_of_the_same_video"] == 1
