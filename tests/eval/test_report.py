"""Titles, published numbers and charts of results made by hand."""

import json
from dataclasses import replace

import pytest

from eval.report import Bar, charts_of, loss_figure, text_tables, write_report
from eval.results import Score, TaskResult
from eval.task import Paper

PAPER = {
    "name": "MSR-VTT 1k-A",
    "table": "Table 1",
    "pool": 1000,
    "unit": "clips",
    "metric": "text to video R@1",
    "scores": {"VL-JEPA BASE": 40.0, "previous best": 62.8},
    "parts": {"short": {"VL-JEPA BASE": 31.5}},
    "open": "Split and pool are not stated.",
    "choice": "The 1k-A split.",
    "terms": "For research.",
}
SCORE = Score(0.5, 0.4, 0.6, 879, 879, "Wilson", {"chance": 0.001})


def result(**changes: object) -> TaskResult:
    fields = {
        "scores": {"text to video R@5": SCORE, "text to video R@1": SCORE},
        "by_type": {"short": SCORE},
        "protocol": {"ablation": "none"},
        "paper": PAPER,
        "pool": 879,
        "pool_expected": 1000,
    }
    return TaskResult("msr_vtt", "retrieval", "Clips.", **(fields | changes))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"pool": 1000}, "MSR-VTT 1k-A"),
        ({}, "MSR-VTT 1k-A (879 of 1,000 clips)"),
        ({"pool": 1001}, "MSR-VTT 1k-A (1,001 of 1,000 clips)"),
        ({"pool_expected": None}, "MSR-VTT 1k-A (879 clips, the paper does not state how many)"),
        (
            {"pool": 1000, "protocol": {"ablation": "grey"}},
            "MSR-VTT 1k-A (ablation grey)",
        ),
        ({"protocol": {}}, "MSR-VTT 1k-A (879 of 1,000 clips)"),  # texts have no ablation
        ({"paper": None, "pool": None, "pool_expected": None}, "msr_vtt"),
    ],
)
def test_title_of_a_result_is_never_the_bare_name_of_another_pool(changes, title):
    found = result(**changes)
    assert found.title == title
    assert (found.as_json()["title"], bool(found.reservations)) == (title, "(" in title)


def test_paper_block_of_an_entry_has_the_keys_that_a_result_reads():
    assert PAPER.keys() == Paper.__dataclass_fields__.keys()


def test_charts_of_a_result_have_baselines_and_published_numbers():
    main, part = charts_of(result())
    assert (main.title, main.top) == ("text to video R@1", 1.0)
    assert main.bars == [
        Bar("this model", 0.5, "own", 0.4, 0.6),
        Bar("chance", 0.001, "baseline"),
        Bar("VL-JEPA BASE", 0.4, "paper"),
        Bar("previous best", 0.628, "paper"),
    ]
    assert (part.title, part.bars[-1]) == ("short", Bar("VL-JEPA BASE", 0.315, "paper"))
    # A metric that was not measured is not replaced by another one.
    (own, *_) = charts_of(result(paper=PAPER | {"metric": "CIDEr"}))[0].bars
    assert own == Bar("this model", None, "own")
    (alone,) = charts_of(result(paper=None))
    assert (alone.title, len(alone.bars)) == ("text to video R@5", 2)
    assert alone.published_line() == ""
    high = Score(1.2, 1.0, 1.5, 9, 9, "", {})
    assert charts_of(result(scores={"CIDEr": high}, paper=None))[0].top == 1.5


def test_text_tables_and_report_show_the_title_and_the_published_numbers(tmp_path):
    other = Score(0.1, 0.0, 0.2, 4, 4, "Wilson", {"majority": 0.3})  # another baseline
    own = result(scores={"text to video R@1": other}, by_type={}, paper=None)
    results = [result(), replace(own, name="own")]
    printed = text_tables(results)
    assert "MSR-VTT 1k-A (879 of 1,000 clips)  text to video R@5   50.0" in printed
    assert "text to video R@1, published: VL-JEPA BASE 40.0, previous best 62.8" in printed
    (tmp_path / "state.json").write_text(json.dumps({"log_history": []}))
    write_report(tmp_path / "report.html", "m", results, tmp_path / "state.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>MSR-VTT 1k-A (879 of 1,000 clips)</h2>" in page
    assert "Not comparable with the published numbers: 879 of 1,000 clips." in page
    assert "Split and pool are not stated." in page and "For research." in page
    assert page.count('<tr class="paper">') == 3 and '<rect x="0" y="1" width="62.8"' in page
    assert "No examples are shown" in page
    assert ">MSR-VTT 1k-A<" not in page


def test_loss_figure_of_one_step_shows_its_point():
    axes = loss_figure([{"step": 20, "loss": 3.9, "chance_loss": 4.0}]).axes[0]
    assert [line.get_marker() for line in axes.lines] == ["o", "o"]
    assert loss_figure([{"step": 20}]) is None
