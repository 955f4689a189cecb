"""Tests of `processing/output.py`, and of the commands that write: wrong paths and a full disk."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval import egoexo4d, evaluate, watch
from processing.output import OutputError, check_output_file, check_output_folder, writing
from tests.full_disk import message_on_a_full_disk
from tests.tiny import tiny_recipe, tiny_rows
from training import cache_features, export, init_checkpoint, inspect_data, train, train_decoder
from training.hub import publishing
from training.loop.trainer import VLJEPATrainer

AS_ROOT = os.geteuid() == 0


def test_check_output_accepts_what_can_be_made_and_makes_nothing(tmp_path):
    check_output_folder("--output", tmp_path / "a" / "b")
    check_output_file("--output", tmp_path / "a" / "b.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/out", "file/a/out"])
def test_check_output_folder_names_a_file_in_its_way(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"^--output: {tmp_path}/file is a file. Give a folder.$"):
        check_output_folder("--output", tmp_path / path)


def test_check_output_file_names_a_folder_in_its_place(tmp_path):
    with pytest.raises(OutputError, match=f"--output: {tmp_path} is a folder. Give a file."):
        check_output_file("--output", tmp_path)


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_check_output_folder_names_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="closed has no write permission"):
        check_output_folder("--output", tmp_path / "closed" / "out")


def test_check_output_folder_asks_the_system_for_permission(tmp_path, monkeypatch):
    """As above, for a user who may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError, match=f"--output: {tmp_path} has no write permission"):
        check_output_folder("--output", tmp_path / "out")


# -- every command, before its work ------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Run a command whose other inputs are missing: it must check the output before it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    recipe = str(tiny_recipe(tmp_path / "missing.jsonl"))
    decoder = tmp_path / "decoder.yaml"
    decoder.write_text(
        "{model: {checkpoint: missing}, data: {sources: [{rows: missing.jsonl}]}, "
        "training: {output_dir: out, max_steps: 1}}"
    )
    parts = ["--vision", "missing", "--predictor", "missing", "--text", "missing"]
    commands = {
        "cache_features": (cache_features.main, [recipe]),
        "inspect_data": (inspect_data.main, [recipe]),
        "export": (export.main, ["--model", "missing"]),
        "init_checkpoint": (init_checkpoint.main, parts),
        "evaluate": (evaluate.main, ["--model", "missing", "--tasks", "all"]),
        "watch": (watch.main, ["--model", "missing", "--source", "missing.mp4"]),
        "egoexo4d": (egoexo4d.main, ["missing"]),
        "train": (train.main, [recipe]),
        "train_decoder": (train_decoder.main, [str(decoder)]),
    }

    def run(name: str, output: str) -> None:
        main, arguments = commands[name]
        if name.startswith("train"):
            main([*arguments, f"training.output_dir={output}"])
        else:
            main([*arguments, "--output", output])

    return run


@pytest.mark.parametrize(
    "name",
    [
        *("cache_features", "inspect_data", "export", "init_checkpoint", "evaluate", "watch"),
        *("egoexo4d", "train", "train_decoder"),
    ],
)
def test_command_checks_its_output_before_it_reads_anything(command, name, tmp_path):
    key = "training.output_dir" if name.startswith("train") else "--output"
    with pytest.raises(OutputError, match=f"^{key}: {tmp_path}/file is a file. Give a folder.$"):
        command(name, "file/out")


def test_train_checks_the_folder_of_decoded_clips_before_it_reads_anything(tmp_path):
    (tmp_path / "file").touch()
    recipe = tiny_recipe(tmp_path / "missing.jsonl")
    arguments = [str(recipe), f"data.cache_dir={tmp_path}/file/cache"]
    with pytest.raises(OutputError, match="data.cache_dir: .*/file is a file"):
        train.main(arguments)


# -- a disk that is full -----------------------------------------------------------------------


def write_text(path: Path) -> None:
    path.write_text("a" * 100_000)


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)


def write_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)


def written(write: Callable[[Path], None], folder: Path) -> None:
    with writing(folder, "The rest is kept."):
        write(folder / "file")


@pytest.mark.parametrize("write", [write_text, write_safetensors, write_torch])
def test_writing_reports_a_full_disk_in_one_line(write, tmp_path):
    message = message_on_a_full_disk(lambda: written(write, tmp_path), 20_000, OutputError)
    assert message.startswith(f"{tmp_path}: it cannot be written (") and "\n" not in message
    assert message.endswith("Free space there or give another folder. The rest is kept.")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), ConnectionError("x"), RuntimeError("x")]
)
def test_writing_passes_on_other_errors(tmp_path, error):
    with pytest.raises(type(error)), writing(tmp_path):
        raise error


def full(*_, **__) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_train_keeps_earlier_checkpoints_on_a_full_disk_and_continues(tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_rows(tmp_path))
    arguments = [
        str(recipe),
        *("training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4"),
        f"training.output_dir={tmp_path / 'out'}",
    ]
    save = VLJEPATrainer._save_rng_state

    def fill(self, folder):
        full() if self.state.global_step == 4 else save(self, folder)

    monkeypatch.setattr(VLJEPATrainer, "_save_rng_state", fill)
    with pytest.raises(OutputError, match="output_dir: .*out: .*No space left.*checkpoints are k"):
        train.main(arguments)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    monkeypatch.setattr(VLJEPATrainer, "_save_rng_state", save)
    trainer = train.main([*arguments, "training.resume_from_checkpoint=true"])
    steps = [line["step"] for line in trainer.state.log_history if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_publish_reports_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "write_probe", full)
    with pytest.raises(OutputError, match="No space left .*TMPDIR names the folder"):
        publishing.publish("missing", "user/name", dry_run=True)
