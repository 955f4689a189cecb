"""The progress line and the collapse warning."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from tests.tiny import tiny_recipe
from training.arguments import VLJEPATrainingArguments, read_recipe
from training.loop import callbacks
from training.loop.callbacks import PATIENCE, CollapseWarning, ProgressLine

LOGS = {
    "loss": 1.25,
    "chance_loss": 4.852,
    "accuracy": 0.5,
    "logit_scale": 14.3,
    "learning_rate": 1e-3,
    "grad_norm": 2.5,
    "samples_per_second": 341.2,
    "mfu": 0.314,
    "peak_memory_gib": 1.26,
    "predicted_spread": 0.8,
    "target_spread": 0.5,
}


@pytest.fixture
def args(tmp_path) -> VLJEPATrainingArguments:
    return read_recipe(str(tiny_recipe(tmp_path / "rows.jsonl", warmup_steps=10))).training


def log(callback, args, step: int, **changes: float | None) -> None:
    state = TrainerState(global_step=step, max_steps=100, is_world_process_zero=True)
    logs = {name: value for name, value in {**LOGS, **changes}.items() if value is not None}
    if step == 0:
        callback.on_train_begin(args, state, TrainerControl())
    else:
        callback.on_log(args, state, TrainerControl(), logs=logs)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that a test advances, so that the ETA does not depend on the machine."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_progress_line_has_fixed_fields(args, capsys, clock):
    callback = ProgressLine()
    log(callback, args, 0)
    clock.now += 50  # for 25 steps; 75 remain
    log(callback, args, 25)
    assert capsys.readouterr().out == (
        "step    25/100 ( 25%) · loss 1.250 (chance 4.852) · in-batch acc 0.500 · scale  14.3 · "
        "lr 1.0e-03 · grad  2.50 ·   341 samples/s · mfu 0.31 · 1.3 GiB · eta 2:30\n"
    )


def test_progress_line_leaves_out_missing_fields(args, capsys):
    """An objective without negatives has neither a chance loss nor an accuracy."""
    callback = ProgressLine()
    log(callback, args, 0)
    log(callback, args, 25, chance_loss=None, accuracy=None, mfu=None)
    line = capsys.readouterr().out
    assert line.startswith("step    25/100 ( 25%) · loss 1.250 · scale  14.3 · lr")
    assert "chance" not in line and "mfu" not in line


@pytest.mark.parametrize(
    ("sign", "message"),
    [
        ({"target_spread": 0.001}, "target embeddings are one point"),
        ({"loss": 4.85}, "the loss is the chance loss"),
    ],
)
def test_collapse_warning_is_printed_once_and_not_during_warm_up(args, capsys, sign, message):
    callback = CollapseWarning()
    log(callback, args, 0)
    for step in range(1, 11):
        log(callback, args, step, **sign)
    for step in range(11, 11 + PATIENCE - 1):
        log(callback, args, step, **sign)
    log(callback, args, 20)  # it recovers
    assert capsys.readouterr().out == ""
    for step in range(21, 21 + 3 * PATIENCE):
        log(callback, args, step, **sign)
    printed = capsys.readouterr().out
    assert printed.count("WARNING: collapse") == 1
    assert f"{message}, for {PATIENCE} lines" in printed
