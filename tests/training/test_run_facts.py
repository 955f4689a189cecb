"""Time and hardware of a training are recorded over resumed runs and stages."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.tiny import tiny_recipe
from training.arguments import VLJEPATrainingArguments, read_recipe
from training.hub.training_facts import (
    data_table,
    duration,
    read_runs,
    run_table,
    training_data,
)
from training.loop import run_facts
from training.loop.run_facts import RunFacts, device_name

MODEL = torch.nn.Linear(2, 3)
MODEL.bias.requires_grad_(False)


@pytest.fixture
def args(tmp_path) -> VLJEPATrainingArguments:
    arguments = read_recipe(str(tiny_recipe(tmp_path / "rows.jsonl"))).training
    Path(arguments.output_dir).mkdir()
    return arguments


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    times = SimpleNamespace(monotonic=lambda: clock.now, process_time=lambda: clock.now / 2)
    monkeypatch.setattr(run_facts, "time", times)
    return clock


def test_run_facts_records_resumed_runs_and_earlier_stages(args, clock, tmp_path):
    checkpoint = tmp_path / "before"
    checkpoint.mkdir()
    (checkpoint / "training_runs.json").write_text('[{"stage": "before"}]')
    control = TrainerControl()

    # A run that is killed after step 4; its last checkpoint is of step 3.
    first = RunFacts(str(checkpoint))
    state = TrainerState(stateful_callbacks=[first], is_world_process_zero=True)
    first.on_train_begin(args, state, control, model=MODEL)
    clock.now, state.global_step = 130.0, 3
    saved = first.state()
    clock.now, state.global_step = 190.0, 4

    # It resumes, and finishes.
    state = TrainerState(global_step=3, is_world_process_zero=True)
    state.stateful_callbacks["RunFacts"] = json.loads(json.dumps(saved))
    second = RunFacts(str(checkpoint))
    clock.now = 1000.0
    second.on_train_begin(args, state, control, model=MODEL)
    clock.now, state.global_step = 1012.0, 5
    second.on_train_end(args, state, control)

    before, *runs = read_runs(args.output_dir)
    assert before == {"stage": "before"}
    made = ("first_step", "last_step", "seconds", "cpu_seconds")
    assert [tuple(run[name] for name in made) for run in runs] == [
        (1, 3, 30.0, 15.0),
        (4, 5, 12.0, 6.0),
    ]
    same = {"stage": "out", "device": device_name(args.device), "processes": 1, "precision": "fp32"}
    same["trainable_parameters"] = 6  # without the bias
    assert all(same.items() <= run.items() for run in runs)

    # Resumed again, it has no step left and adds nothing.
    state.stateful_callbacks["RunFacts"] = second.state()
    third = RunFacts(str(checkpoint))
    third.on_train_begin(args, state, control, model=MODEL)
    third.on_train_end(args, state, control)
    assert read_runs(args.output_dir) == [before, *runs]


def test_run_facts_of_a_new_model_start_empty(args, clock):
    facts = RunFacts()
    state = TrainerState(stateful_callbacks=[facts], is_world_process_zero=True)
    facts.on_train_begin(args, state, TrainerControl(), model=MODEL)
    assert facts.all_runs() == []


def test_device_name_of_a_cpu_counts_its_threads():
    threads = torch.get_num_threads()
    assert device_name(torch.device("cpu")).endswith(f", {threads} thread{'s' * (threads > 1)}")
    assert device_name(torch.device("meta")) == "meta"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1.0 min"), (9000, "2.5 h")]
)
def test_duration_uses_the_largest_unit(seconds, text):
    assert duration(seconds) == text


def test_run_table_has_a_row_for_each_run():
    run = {"stage": "a|b", "first_step": 1, "last_step": 9, "seconds": 90, "device": "CPU"}
    *_, row = run_table([run | {"processes": 2, "precision": "bf16"}]).splitlines()
    assert row == "| a\\|b | 1 to 9 | 1.5 min | 2 | CPU | bf16 |"


def test_training_data_merges_equal_sources_and_takes_a_stated_licence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "set").mkdir(parents=True)
    here, there = str(tmp_path / "rows.jsonl"), str(tmp_path / "other" / "rows.jsonl")
    stages = [
        [{"rows": here}, {"rows": there, "licence": "mit"}, {"dataset": "owner/set"}],
        [
            {"rows": here, "licence": "cc-by-4.0"},
            {"rows": here, "query": "what ?"},
            {"dataset": "owner/set", "config": "part", "licence": "a|b"},
            {"dataset": "parquet", "data_files": [f"{tmp_path}/x.parquet"]},
            {"dataset": "local/set"},
        ],
    ]
    data = training_data([{"data": {"sources": sources}} for sources in stages])
    assert [(each.name, each.hub_id, each.licence) for each in data] == [
        ("rows.jsonl", None, "cc-by-4.0"),
        ("rows.jsonl", None, "mit"),
        ("owner/set", "owner/set", None),
        ("owner/set part", "owner/set", "a|b"),
        ("parquet x.parquet", None, None),
        ("local/set", None, None),
    ]
    rows = data_table(data).splitlines()[2:]
    assert rows[0] == "| `rows.jsonl` | cc-by-4.0 |"
    assert rows[2] == "| [`owner/set`](https://huggingface.co/datasets/owner/set) | unknown |"
    assert rows[3].endswith("| a\\|b |")
