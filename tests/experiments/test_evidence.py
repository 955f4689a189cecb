"""Verdicts on the paper's claims, and the page of hand-made results."""

import json
import re
from pathlib import Path

import pytest
import yaml

from experiments import evidence
from experiments.report import Mean, ReportError
from experiments.results import append_line
from tests.experiments.test_experiment_report import line

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.5, 9.0, 1, "holds"),
        (0.5, 9.0, -1, "does not hold"),
        (-9.0, -0.5, -1, "holds"),
        (-9.0, -0.5, 1, "does not hold"),
        (0.5, 9.0, None, "higher"),
        (-9.0, -0.5, None, "lower"),
        (-1.9, 1.9, 1, "cannot tell"),
        (-1.9, 2.1, 1, "open"),
        (-2.1, 1.9, None, "open"),
    ],
)
def test_verdict_is_by_the_interval_and_the_papers_sign(low, high, sign, expected):
    mean = Mean((low + high) / 2, low, high)
    assert evidence.verdict(mean, sign, seeds=2) == expected
    assert evidence.verdict(mean, sign, seeds=1) == "one seed"


def test_sign_of_reads_directions_and_numbers_of_a_point_or_more():
    given = (3.2, -1.0, "+", "-", None, 0.9, -0.1, 0.0)
    assert [evidence.sign_of(each) for each in given] == [1, -1, 1, -1, None, None, None, None]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.23, 4.56, "x +2.9 (+1.2 to +4.6)"),
        (0.04, 4.5, "x +2.27 (+0.04 to +4.50)"),  # not +0.0
        (-1.9, 2.04, "x +0.07 (-1.90 to +2.04)"),  # not +2.0
        (1.99, 4.5, "x +3.2 (+2.0 to +4.5)"),
        (-4.0, 0.0, "x -2.0 (-4.0 to +0.0)"),
    ],
)
def test_found_shows_the_digits_that_its_verdict_needs(low, high, expected):
    mean = Mean((low + high) / 2, low, high)
    assert evidence.Found("x", mean, "").text == expected


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A repository with a claim on two data sets, of which one has results of two seeds."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "c9"
    folder.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 1}")
    settings = {f"{data}-{name}": None for data in ("x", "y") for name in ("old", "new")}
    grid = {"recipe": "recipe.yaml", "seeds": [0, 1], "settings": settings}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    claim = {
        "name": "C9",
        "title": "New is better",
        "folder": "c9",
        "scores": {data: {"VQA": "vqa accuracy", "other": "none"} for data in ("x", "y")},
        "statements": [
            {"text": "new instead of old", "pair": ["old", "new"], "paper": {"VQA": -3}}
        ],
        "about": "Why.",
        "short": "It is worse.",
        "cost": ["new"],
        "data": {"x": "The X"},
    }
    (tmp_path / "experiments" / "claims.yaml").write_text(yaml.safe_dump([claim]))
    hashes = {
        (run.setting, run.seed): run.settings
        for run in evidence.read_grid(folder / "grid.yaml").runs()
    }
    values = {"x-old": [[0, 0, 1, 0, 0]] * 2, "x-new": [[1, 1, 1, 1, 1]] * 2}
    for name, both in values.items():
        for seed, each in enumerate(both):
            more = {
                "parameters": {"x_encoder": 7_000_000, "predictor": 2_000_000, "y_encoder": 30_000}
            }
            made = line(folder, name, seed, [1.0], each, **more)
            baselines = {"question only": 0.25 + 0.5 * seed, "chance": 0.1}
            made["scores"]["vqa accuracy"] = {"baselines": baselines}
            append_line(folder, made | {"settings": hashes[name, seed]})
    page = tmp_path / "docs" / "evidence.md"
    page.parent.mkdir()
    page.write_text(f"# Evidence\n\n{evidence.BEGIN}\n{evidence.END}\n\nAfter.\n")
    return page


def test_evidence_writes_verdicts_costs_and_figures_of_the_results(page):
    evidence.main([])
    text = page.read_text()
    measured, missing = [row for row in text.splitlines() if row.startswith("| [C9]")]
    assert "| The X (2) | VQA -3.0 | VQA +80.0 (" in measured
    assert ")‡ |" in measured  # neither is above the question alone, 50 %, by its interval
    # Four runs of 90 CPU-seconds
    command = "`python -m experiments.run experiments/c9/grid.yaml --only x-old x-new`"
    assert measured.endswith(f"| VQA: does not hold | 0.1 | {command} |")
    assert "| y | VQA -3.0 | not run yet | not run yet | – |" in missing
    assert "\n- **[C9](#c9) New is better.** It is worse. (1 does not hold)\n" in text
    assert "Comparisons: 1 of several seeds (1 does not hold), and 0 of one seed." in text
    assert (
        "## C9\n\n**New is better.**\n\nWhy.\n\n![C9: New is better](figures/evidence/c9.svg)"
        in text
    )
    assert "| x-new | 1.50 M | 2.00 M | 0.03 M | 0.00 M | 400 | 60 | 0 | 30 |" in text
    assert "\nTimes of the seeds 0, 1 on " in text
    assert "each counted once, took 0.1 CPU-hours" in text
    scores = text[text.index("Scores on The X") :]
    assert "| setting | seeds | VQA |" in scores and "Scores on y" not in text
    assert re.search(r"\n\| x-new \| 2 \| 100\.0 \(.*\)<br>question only 50\.0 \|\n", scores)
    assert "\n| *chance* |  | 10.0 |\n" in scores  # equal for both settings
    assert text.endswith("After.\n")
    evidence.main(["--check"])
    svg = page.parent / "figures" / "evidence" / "c9.svg"
    drawn = svg.read_text()
    evidence.main([])
    assert svg.read_text() == drawn
    svg.write_text("other")
    with pytest.raises(ReportError, match="not of these results"):
        evidence.main(["--check"])
    svg.write_text(drawn)
    claims = page.parents[1] / "experiments" / "claims.yaml"
    claims.write_text(claims.read_text().replace("VQA: -3", "VQA: -4"))  # a cross in the figure
    with pytest.raises(ReportError, match="c9.svg: not of these results"):
        evidence.main(["--check"])


def test_cost_table_has_the_seeds_that_all_settings_share(page):
    results = page.parents[1] / "experiments" / "c9" / "results.jsonl"
    (claim,) = evidence.read_claims()
    claim = evidence.replace(claim, cost=["new", "old"])
    found = evidence.results(claim)
    assert "\nTimes of the seeds 0, 1 on " in evidence.cost_table(claim, found)
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    for each in lines:
        if each["seed"] == 1:
            each["process_cpu_seconds"]["training"] = 600
    kept = [each for each in lines if (each["setting"], each["seed"]) != ("x-old", 1)]
    results.write_text("".join(json.dumps(each) + "\n" for each in kept))
    text = evidence.cost_table(claim, evidence.results(claim))
    assert "\nTimes of the seeds 0 on " in text and "| 60 |" in text and "600" not in text


def test_is_above_blind_compares_the_interval_with_the_best_baseline_without_clip(page):
    (claim,) = evidence.read_claims()
    lines, folder = evidence.results(claim)["x-new"], Path("experiments/c9")
    low = evidence.mean_score(folder, lines, "vqa accuracy").low
    assert 0.3 < low < 0.9

    def is_above(**baselines) -> bool:
        for each in lines:
            each["scores"]["vqa accuracy"] = {"baselines": baselines}
        return evidence.is_above_blind(folder, lines, "vqa accuracy")

    assert is_above(chance=0.1, majority=low - 0.01)
    assert not is_above(chance=0.1, majority=low + 0.01)
    assert is_above(**{"chance": 0.1, "nearest caption": 0.99})  # this one sees the clip


def test_figure_has_an_axis_for_each_score_with_results_and_a_row_for_each_statement(page):
    (claim,) = evidence.read_claims()
    (axis,) = evidence.draw(evidence.Measured.of(claim)).axes
    assert axis.get_title() == "VQA"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["new instead of old"]
    assert axis.get_ylim() == (0.5, -0.5)


def test_difference_of_one_seed_has_no_verdict_and_a_hollow_marker(page):
    results = page.parents[1] / "experiments" / "c9" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(each for each in lines if json.loads(each)["seed"] == 0))
    evidence.main([])
    text = page.read_text()
    assert "| The X (1) | VQA -3.0 | VQA +80.0 (" in text and "| VQA: one seed |" in text
    assert "It is worse. (1 of one seed)\n" in text
    assert "Comparisons: 0 of several seeds (no verdict), and 1 of one seed." in text
    (claim,) = evidence.read_claims()
    figure = evidence.draw(evidence.Measured.of(claim))
    (bars,) = figure.axes[0].containers
    assert bars.lines[0].get_markerfacecolor() == "white"
    (legend,) = figure.legends
    assert [each.get_text() for each in legend.get_texts()] == ["The X (one seed)", "paper"]


def test_curves_have_a_row_of_axes_for_each_data_set_with_results(page):
    path = page.parents[1] / "experiments" / "claims.yaml"
    (given,) = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump([given | {"curves": {"both": ["old", "new"]}}]))
    (claim,) = evidence.read_claims()
    axes = evidence.draw(evidence.Measured.of(claim)).axes
    assert [axis.get_title() for axis in axes] == ["The X: VQA", "The X: other"]
    assert [len(axis.containers) for axis in axes] == [1, 0]  # "other" has no result


def test_query_table_has_the_last_measurement(tmp_path):
    assert evidence.query_table(tmp_path) == ""
    lines = [
        {"rows": "r", "device": "d", "milliseconds": {"tokens": {"X": time}}} for time in (1, 2.5)
    ]
    (tmp_path / "cost.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    text = evidence.query_table(tmp_path)
    assert "| tokens | X | 2.5 |" in text and text.endswith("d; rows of r.")


def test_evidence_without_results_says_so(page):
    (page.parents[1] / "experiments" / "c9" / "results.jsonl").unlink()
    evidence.main([])
    text = page.read_text()
    assert text.count("| not run yet | not run yet | – |") == 2
    assert "Comparisons: none yet." in text and "Figure: not run yet." in text
    assert not (page.parent / "figures").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a YAML file"),
        ("# none", "None is not a list of claims"),
        ("[text]", "'text' is not a claim"),
        (None, "is not a pair"),
    ],
)
def test_evidence_names_claims_that_are_none(page, text, message):
    path = page.parents[1] / "experiments" / "claims.yaml"
    claims = yaml.safe_load(path.read_text())
    claims[0]["statements"][0]["pair"] = ["old"]
    path.write_text(text or yaml.safe_dump(claims))
    with pytest.raises(ReportError, match=f"claims.yaml: .*{message}"):
        evidence.read_claims()


def test_evidence_names_an_unknown_setting_or_score(page):
    path = page.parents[1] / "experiments" / "claims.yaml"
    claims = yaml.safe_load(path.read_text())
    claims[0]["statements"][0]["paper"] = {"none": 1}
    path.write_text(yaml.safe_dump(claims))
    with pytest.raises(ReportError, match="C9: no score is named none"):
        evidence.read_claims()
    claims[0]["cost"] = ["none"]
    path.write_text(yaml.safe_dump(claims))
    with pytest.raises(ValueError, match="C9: 'x-none': no such setting"):
        evidence.read_claims()


def test_shipped_page_is_that_of_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    evidence.main(["--check"])
