"""Benchmarks: their report, and small runs of all parts, which compare results in fp32."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import growth, predict, step_options, train_step
from benchmarks.report import Goal, Report, chosen, read_lines, section
from modeling_vljepa import VLJEPAConfig


def test_report_appends_each_line_at_once(tmp_path, capsys):
    output = tmp_path / "new" / "lines.jsonl"
    report = Report("part", output)
    report.add("small", {"plain": 2.0, "ours": 3.0}, Goal("ours", most=2.5))
    [line] = read_lines(output)
    assert line["goal"] == {"column": "ours", "least": None, "most": 2.5, "met": False}
    assert {"processor", "cores", "instructions", "torch", "transformers"} <= line["machine"].keys()
    printed = capsys.readouterr().out
    assert "part: small: plain 2; ours 3; goal: ours at most 2.5, MISSED" in printed
    report.add("large", {"plain": 2.0, "ours": np.float64(3.0)}, Goal("ours", least=3), note="busy")
    assert [each["case"] for each in read_lines(output)] == ["small", "large"]


def test_report_without_goals_if_quick():
    report = Report("part", quick=True)
    assert "goal" not in report.add("small", {"ours": 3.0}, Goal("ours", most=1))


def test_report_section_has_one_table_for_equal_columns(tmp_path):
    output = tmp_path / "lines.jsonl"
    report = Report("part", output)
    report.add("a", {"ratio": 1.0312, "count": 12345}, Goal("ratio", most=1.05))
    report.add("b", {"ratio": 0.5, "count": 1}, Goal("ratio", least=0.9), note="hot")
    report.add("c", {"peak GiB": 2e-5})
    text = section(read_lines(output), "make bench")
    assert "| a    | 1.03  | 12,345 | ratio at most 1.05: met        |      |" in text
    assert "| b    | 0.5   | 1      | ratio at least 0.9: **missed** | hot  |" in text
    assert "| c    | 2e-05    |" in text
    assert text.count("| part | ") == 2


def test_chosen_reports_an_unknown_case(capsys):
    cases = {"a": 1, "b": 2}
    assert chosen(cases, None, argparse.ArgumentParser()) == cases
    assert chosen(cases, ["b"], argparse.ArgumentParser()) == {"b": 2}
    with pytest.raises(SystemExit):
        chosen(cases, ["c"], argparse.ArgumentParser())
    assert "--only c: no such case; there are a, b" in capsys.readouterr().err


@pytest.mark.parametrize("other", [3.0004, float("nan")])
def test_train_step_rejects_other_losses_in_fp32(other):
    steps = train_step.Steps(["clips"] * 2, [1.0] * 2, [1.0] * 2, [(3.0, 3.0), (3.0, other)])
    with pytest.raises(RuntimeError, match="losses of the trainer and of the plain loop differ"):
        train_step.check_losses(steps, "fp32")
    train_step.check_losses(steps, "bf16")


def test_train_step_mean_weights_the_least_of_each_kind():
    kinds = ["clips", "clips", "images", "images", "clips"]
    steps = train_step.Steps(kinds, [0.1, 5.0, 2.0, 1.0, 4.0])
    assert steps.mean("trainer", {"clips": 3.0, "images": 1.0}, warm_up=1) == (3 * 4 + 1) / 4
    assert steps.mean("trainer", {"clips": 3.0, "images": 0.0}, warm_up=1) == 4


def test_train_step_half_paper_has_the_widths_and_half_the_layers():
    paper, half = VLJEPAConfig(), VLJEPAConfig(**train_step.half_paper())
    for name in ("vision_config", "predictor_config", "text_config"):
        whole, part = getattr(paper, name), getattr(half, name)
        assert part.num_hidden_layers == whole.num_hidden_layers / 2
        for width in ("hidden_size", "num_attention_heads", "intermediate_size", "head_dim"):
            assert getattr(part, width, None) == getattr(whole, width, None)


# `main` raises an error if a result in fp32 differs from the plain modules'.
QUICK = {
    "train_step": (
        train_step,
        ["--only", "demo", "--precision", "fp32"],
        {"trainer / plain", "difference of losses", "trainer, peak GiB"},
    ),
    "step_options": (step_options, ["--only", "shared clips"], {"gain"}),
    "predict": (predict, ["--precision", "fp32"], {"ours / plain", "again, CPU-s"}),
    "growth": (growth, ["--only", "batch", "library"], {"peak GiB", "search / product"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_benchmark_runs_quickly(name, tmp_path):
    benchmark, arguments, columns = QUICK[name]
    output = tmp_path / "lines.jsonl"
    lines = benchmark.main(["--quick", "--output", str(output), *arguments])
    written = read_lines(output)
    assert [each["case"] for each in lines] == [each["case"] for each in written]
    assert columns <= {column for line in lines for column in line["numbers"]}
    for line in lines:
        assert line["part"] == name
        assert all(value >= 0 for value in line["numbers"].values()), json.dumps(line)
