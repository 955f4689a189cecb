"""Means, intervals and tables of hand-made results, computed by hand."""

import json

import numpy as np
import pytest
import yaml
from scipy import stats

from eval.intervals import difference_interval, mean_interval
from eval.items import Column
from experiments import report
from experiments.results import append_line, pack, pack_all, unpack

CLUSTERS = [7, 7, 3, 3, 5]


def column(values: list[float]) -> Column:
    names = [f"item{index}" for index in range(len(values))]
    return Column(
        dict(zip(names, values, strict=True)),
        dict(zip(names, CLUSTERS, strict=True)),
        dict(zip(names, ["where", "what", "where", "what", "where"], strict=True)),
    )


def line(folder, setting: str, seed: int, losses: list[float], values: list[float], **more) -> dict:
    scores = {name: {} for name in ("vqa accuracy", "vqa where", "vqa what")}
    return {
        "setting": setting,
        "seed": seed,
        "settings": "a",
        "curve": {"step": [10, 20, 30, 40], "loss": losses, "chance": [4.0] * 4},
        "rows": 400,
        "cpu_seconds": 50.0,
        "rows_per_cpu_second": 8.0,
        "process_cpu_seconds": {"training": 60.0, "evaluation": 30.0},
        "trainable_parameters": 1_500_000,
        "scores": scores,
        "items": pack_all(folder, {("vqa", "accuracy"): column(values)}, set(scores)),
        "device": "a processor",
        "precision": "fp32",
        "revision": "abc",
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "prepared": {},
        **more,
    }


def test_quantiles_are_those_of_student():
    expected = [stats.t.ppf(0.975, degrees) for degrees in range(1, len(report.T) + 1)]
    np.testing.assert_allclose(report.T, expected, atol=6e-4)


def test_mean_over_seeds_has_the_interval_of_student():
    mean = report.mean_over_seeds([1.0, 2.0, 3.0])  # s = 1, so t s / sqrt(3) = 4.303 / 1.7321
    assert (mean.value, mean.high - mean.value) == pytest.approx((2.0, 2.4844), abs=1e-3)
    assert report.mean_over_seeds([1.5]) == report.Mean(1.5, None, None)


def test_pack_keeps_values_clusters_and_types(tmp_path):
    made = line(tmp_path, "x", 0, [1.0], [1, 0, 1, 1, 0])
    assert made["items"]["vqa accuracy"]["values"] == "10110"
    values, clusters = unpack(tmp_path, made, "vqa accuracy")
    assert values.tolist() == [1, 0, 1, 1, 0]
    assert clusters.tolist() == [0, 0, 1, 1, 2]
    values, clusters = unpack(tmp_path, made, "vqa where")
    assert (values.tolist(), clusters.tolist()) == ([1, 1, 0], [0, 1, 2])
    assert pack(tmp_path, column([0.12345, 1, 0, 0, 0]))["values"] == [0.1235, 1, 0, 0, 0]


def test_pack_keeps_other_types_of_the_same_items_apart(tmp_path):
    first = pack(tmp_path, column([1, 0, 1, 1, 0]))
    assert pack(tmp_path, column([0, 0, 0, 0, 0]))["items"] == first["items"]
    corrected = column([1, 0, 1, 1, 0])
    corrected.types["item0"] = "what"
    second = pack(tmp_path, corrected)
    assert second["items"] != first["items"]
    assert pack(tmp_path, column([1, 0, 1, 1, 0])) == first
    types = json.loads((tmp_path / "items" / f"{second['items']}.json").read_text())["types"]
    assert types == ["what", "what", "where", "what", "where"]


def test_mean_score_adds_both_intervals_in_quadrature(tmp_path):
    values = [[1, 0, 1, 1, 0], [1, 1, 1, 1, 0]]  # means 0.6 and 0.8
    lines = [line(tmp_path, "x", seed, [1.0], each) for seed, each in enumerate(values)]
    mean = report.mean_score(tmp_path, lines, "vqa accuracy")
    items = mean_interval(np.mean(values, axis=0), np.array([0, 0, 1, 1, 2]))
    seeds = 12.706 * 0.1  # s / sqrt(2) = 0.1
    assert mean.value == pytest.approx(0.7)
    assert mean.low == pytest.approx(0.7 - np.hypot(0.7 - items.low, seeds), abs=1e-6)
    assert mean.high == pytest.approx(0.7 + np.hypot(items.high - 0.7, seeds), abs=1e-6)
    one = report.mean_score(tmp_path, lines[:1], "vqa accuracy")
    alone = mean_interval(np.array(values[0], float), np.array([0, 0, 1, 1, 2]))
    assert (one.low, one.high) == pytest.approx((alone.low, alone.high))


def test_difference_of_scores_is_paired_by_seed_and_item(tmp_path):
    first, second = [[1, 0, 1, 0, 0], [0, 0, 1, 0, 0]], [[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]]
    a, b = (
        [line(tmp_path, name, seed, [1.0], each) for seed, each in enumerate(values)]
        for name, values in (("a", first), ("b", second))
    )
    found = report.difference_of_scores(tmp_path, a, b, "vqa accuracy")
    # Both seeds differ by 0.4: their interval is 0, although the seeds' own means differ.
    items = difference_interval(np.array([0, 1, 0, 0, 1.0]), np.array([0, 0, 1, 1, 2]), 1.0)
    assert (found.value, found.low, found.high) == pytest.approx((0.4, items.low, items.high))
    with pytest.raises(report.ReportError, match="vqa accuracy: a 0, b 0 were measured on diff"):
        other = line(tmp_path, "b", 0, [1.0], [1, 1, 1, 0, 1])
        other["items"]["vqa accuracy"]["items"] = "0" * 16
        report.difference_of_scores(tmp_path, a[:1], [other], "vqa accuracy")
    changed = [a[0] | {"prepared": {"benchmark vqa": "1"}}, b[0]]  # b has none: an old line
    report.difference_of_scores(tmp_path, changed[:1], changed[1:], "vqa accuracy")
    changed[1] |= {"prepared": {"benchmark vqa": "2"}}
    with pytest.raises(report.ReportError, match="entry has changed between the runs of a 0, b 0"):
        report.difference_of_scores(tmp_path, changed[:1], changed[1:], "vqa accuracy")


def test_of_all_stages_adds_what_a_run_started_from():
    line = {"rows": 100, "cpu_seconds": 5.0}
    assert report.of_all_stages(line, "rows") == 100
    line["before"] = {"setting": "first", "rows": 40, "cpu_seconds": 2.5}
    assert (report.of_all_stages(line, "rows"), report.of_all_stages(line, "cpu_seconds")) == (
        140,
        7.5,
    )


def test_share_to_reach_is_that_of_the_first_line_at_most_the_loss():
    curve = {"curve": {"step": [10, 20, 30, 40], "loss": [3.0, 2.0, 1.5, 1.0]}}
    assert [report.share_to_reach(curve, loss) for loss in (2.0, 1.6, 0.5)] == [0.5, 0.75, None]


def test_reached_counts_the_stage_before_on_both_sides():
    def run(rows: int, losses: list[float], before: int) -> dict:
        curve = {"step": [1, 2], "loss": losses}
        first = {"before": {"rows": before, "cpu_seconds": before / 10}} if before else {}
        return {"curve": curve, "rows": rows, "cpu_seconds": rows / 10, **first}

    a, b = run(200, [3.0, 2.0], 0), run(100, [2.0, 1.0], 120)
    # B has 120 rows before, and half of its 100 until the loss of 2: 170 of 200.
    assert report.reached([a], [b]) == ("85 %", "85 %", False)
    assert report.reached([b], [run(400, [1.0, 0.5], 0)]) == ("91 %", "91 %", False)  # 200 of 220
    assert report.reached([a], [run(100, [2.0, 1.0], 0)]) == ("25 %", "25 %", True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An experiment with hand-made results of two settings and two seeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 1}")
    folder = tmp_path / "trial"
    folder.mkdir()
    grid = {
        "recipe": "recipe.yaml",
        "seeds": [0, 1],
        "settings": {"plain": None, "fast": {"training.learning_rate": 1.0}},
        "compare": [["plain", "fast"]],
        "scores": ["vqa accuracy", "vqa where", "none"],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    (folder / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    hashes = {
        (r.setting, r.seed): r.settings for r in report.read_grid(folder / "grid.yaml").runs()
    }
    losses = {
        "plain": [[4, 3, 2.5, 2], [4, 3, 2.6, 2.2]],
        "fast": [[3, 2, 1.5, 1], [3, 2.3, 1.6, 1.4]],
    }
    values = {
        "plain": [[1, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
        "fast": [[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]],
    }
    for name in losses:
        for seed in (0, 1):
            made = line(folder, name, seed, losses[name][seed], values[name][seed])
            made["cpu_seconds"] = {"plain": 50.0, "fast": 40.0}[name]
            made["rows"] = {"plain": 400, "fast": 200}[name]
            append_line(folder, made | {"settings": hashes[name, seed]})
    return folder


def test_other_losses_are_not_compared(folder):
    file = folder / "grid.yaml"
    file.write_text(file.read_text() + "same_loss: false\n")
    report.main([str(folder)])
    text = (folder / "README.md").read_text()
    rows = [each for each in text.splitlines() if each.startswith("| ")]
    assert rows[-1].startswith("| plain → fast | 2 | vqa accuracy +40.0 (")
    assert "Comparisons: 1, not corrected for their number.\n" in text


def test_report_writes_hand_computed_tables(folder, capsys):
    report.main([str(folder)])
    text = (folder / "README.md").read_text()
    rows = [each for each in text.splitlines() if each.startswith("| ")]
    # plain: 2.1 +- 12.706 * 0.1; its accuracies are 0.4 and 0.2
    assert rows[2].startswith("| plain | 2 | 2.10 (0.83 to 3.37) (4.00) | 30.0 (")
    assert rows[2].endswith("| 1.50 M | 400 | 8 | 50 |")
    assert rows[3].startswith("| fast | 2 | 1.20 (-1.34 to 3.74) (4.00) | 70.0 (")
    # Differences are -1 and -0.8; plain's losses are reached at steps 20 and 30 of 40, after 100
    # and 150 rows of plain's 400, and 20 and 30 CPU-seconds of its 50.
    assert rows[-1].startswith(
        "| plain → fast | 2 | -0.900 (-2.171 to +0.371) | 25 %, 38 % | 40 %, 60 % | vqa"
    )
    for part in ("vqa accuracy +40.0 (", "vqa where +33.3 ("):
        assert part in rows[-1]
    assert (
        "Comparisons: 1, not corrected for their number. The loss is lower on average in 1" in text
    )
    assert "with its interval below 0 in 0; every seed reaches" in text
    assert "in at most half of its rows in 1." in text
    assert "4 runs, 6 CPU-minutes of training and evaluation. " in text
    assert "Revision abc; a processor, fp32; python 3, torch 2" in text
    svg = (folder / "figures" / "all-settings.svg").read_text()
    assert report.digest_of(folder) in svg and "![All settings" in text
    report.main([str(folder)])
    assert (folder / "figures" / "all-settings.svg").read_text() == svg
    assert (folder / "README.md").read_text() == text


def test_report_names_missing_failed_and_changed_runs(folder):
    lines = [json.loads(each) for each in (folder / "results.jsonl").read_text().splitlines()]
    (folder / "results.jsonl").unlink()
    failed = {"setting": "plain", "seed": 0, "settings": lines[0]["settings"], "error": "limit"}
    not_listed = lines[3] | {"seed": 5, "settings": "other"}  # a seed that the grid does not list
    for each in (failed, lines[2], lines[3] | {"settings": "other"}, not_listed):
        append_line(folder, each)
    report.main([str(folder)])
    text = (folder / "README.md").read_text()
    assert "1 not run yet: plain 1." in text
    assert "1 failed: plain 0: limit." in text
    assert "2 left out, of other settings: fast 1, fast 5." in text
    assert "1 in `scores` without a result: none." in text
    assert "Comparisons" not in text


def test_report_needs_the_markers_once(folder):
    (folder / "README.md").write_text("nothing")
    with pytest.raises(report.ReportError, match="README.md: it needs the lines"):
        report.main([str(folder)])
