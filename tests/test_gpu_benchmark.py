"""The GPU script: it runs on a CPU, and no part's fault loses the lines of another."""

import json
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_lines import Lines, Part, Skip, run_parts
from training.memory import Need

PARTS = ("parity", "train", "loss", "predict", "gradcache", "profile")


@pytest.fixture
def lines(tmp_path) -> Lines:
    return Lines(tmp_path / "lines.jsonl", {"gpu": "none"})


def read(lines: Lines) -> list[dict]:
    return [json.loads(line) for line in lines.output.read_text().splitlines()]


def test_gpu_benchmark_names_each_missing_and_each_old_package(monkeypatch):
    def version(name: str) -> str:
        if name == "av":
            raise PackageNotFoundError(name)
        return "5.17.0" if name == "transformers" else "99.0"

    monkeypatch.setattr(gpu, "version", version)
    old, missing = gpu.faults()
    assert old.startswith("transformers 5.17.0 is installed: transformers<6,>=5.")
    assert missing.startswith("av is missing: install av>=")
    with pytest.raises(SystemExit, match="^transformers 5.17.0 is installed"):
        gpu.main(["--tiny"])


def test_gpu_benchmark_has_all_packages_of_this_environment():
    assert gpu.faults() == []


def test_gpu_benchmark_goes_on_after_a_part_that_fails(lines, capsys):
    def broken() -> None:
        raise RuntimeError("two\nlines")

    done = Part("after it", 0, lambda: lines.add("b", "case", {"ms": 2.0}))
    run_parts([Part("broken part", 0, broken), done], lines, time.monotonic() + 60)
    failed, added, finished = read(lines)
    assert failed["note"] == "failed: RuntimeError: two lines"
    assert 'raise RuntimeError("two\\nlines")' in failed["traceback"]
    assert (added["numbers"], finished["case"]) == ({"ms": 2.0}, "after it")
    assert lines.failed == ["broken part"]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "run: broken part: failed: RuntimeError: two lines",
        "b: case: ms 2",
    ]


def test_gpu_benchmark_skips_parts_by_name_that_do_not_fit_or_cannot_run(lines):
    def cannot() -> None:
        raise Skip("the package is not installed")

    run_parts(
        [Part("long", 61, cannot), Part("no package", 59, cannot)], lines, time.monotonic() + 60
    )
    assert lines.skipped == ["long", "no package"]
    assert [line["case"] for line in read(lines)] == ["long", "no package"]
    assert lines.failed == []


@pytest.mark.parametrize("difference", [0.2, float("nan")])
def test_gpu_benchmark_fails_a_comparison_beyond_its_tolerance(lines, difference):
    lines.compare("small", 0.1, 0.1)
    lines.compare("large", difference, 0.1)
    assert [line["goal"]["met"] for line in read(lines)] == [True, False]
    assert lines.failed == ["parity large"]


def test_gpu_benchmark_tries_fewer_rows_after_a_lack_of_memory(lines, monkeypatch):
    tried = []

    def train(lab, case, rows, **steps):
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2.0, 1e12, {"peak GiB": 3.0}

    monkeypatch.setattr(gpu_parts, "train", train)
    need = Need(weights=2**30, gradients=0, trained=0, steps={1: 0, 9: 2**30})
    lab = gpu_parts.Lab(torch.device("cpu"), lines, replace(gpu_parts.TINY, rows=10))
    lab.reachable, lab.needs = 1e12, {"full": need}
    gpu_parts.train_case(lab, gpu_parts.Case("full"))
    assert tried == [10, 9, 8]
    found = read(lines)[-1]["numbers"]
    assert found.pop("predicted GiB") == pytest.approx(1 + 7 / 8)
    assert found.pop("peak GiB / predicted") == pytest.approx(3 / (1 + 7 / 8))
    expected = {"rows": 8, "samples/s": 4.0, "s/step": 2.0, "MFU": 0.5, "peak GiB": 3.0}
    assert found == pytest.approx(expected)


def test_gpu_benchmark_idle_time_is_that_of_no_interval():
    assert gpu_parts.covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert gpu_parts.covered([]) == 0


@pytest.mark.slow
def test_gpu_benchmark_tiny_run_measures_every_part(tmp_path):
    found = gpu.main(["--tiny", "--minutes", "60", "--output", str(tmp_path / "lines.jsonl")])
    assert found.failed == []
    assert {line["part"] for line in read(found)} == {*PARTS, "run"}
    trained = [line for line in read(found) if line["part"] == "train" and "MFU" in line["numbers"]]
    assert len(trained) >= 7  # full, LoRA, live, cached, flash, compiled
    assert all(line["numbers"]["samples/s"] > 0 for line in trained)
