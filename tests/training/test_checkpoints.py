"""Checkpoints are complete or absent; a killed run resumes as if it had not been interrupted.

A resumed run is compared bitwise: Trainer copies the weights of a checkpoint into the new model's
own memory, so both runs do the same operations on equally aligned data.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.kills import kill_and_resume
from tests.tiny import tiny_recipe, tiny_rows, write_rows
from training.arguments import RecipeError, read_recipe
from training.loop.checkpoints import INCOMPLETE, REPLACED, checkpoint_to_resume
from training.loop.fingerprint import compare, fingerprint, write_fingerprint
from training.loop.trainer import VLJEPATrainer
from training.train import main

SAVED = {
    *("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json", "positions_0.json", "recipe.json"),
}


def weights(trainer: VLJEPATrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run of four steps that saves at each step and keeps two checkpoints."""
    recipe = tiny_recipe(
        tiny_rows(tmp_path), save_strategy="steps", save_steps=1, save_total_limit=2
    )
    return [str(recipe)]


def test_checkpoints_are_complete_and_old_ones_are_deleted(arguments, tmp_path):
    main(arguments)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert {"checkpoint-3", "checkpoint-4"} <= folders
    assert not {"checkpoint-1", "checkpoint-2", INCOMPLETE} & folders
    for number in (3, 4):
        folder = tmp_path / "out" / f"checkpoint-{number}"
        assert {path.name for path in folder.iterdir()} >= SAVED
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == number


def test_train_keeps_the_last_fifth_of_a_run_by_default(tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=10)
    content = yaml.safe_load(recipe.read_text())
    for name in ("save_strategy", "save_total_limit"):  # of tests; the defaults are tested
        del content["training"][name]
    recipe.write_text(yaml.safe_dump(content))
    out, step = tmp_path / "out", VLJEPATrainer.training_step

    def killed(trainer: VLJEPATrainer, *given) -> torch.Tensor:
        if trainer.state.global_step == 7:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(VLJEPATrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main([str(recipe)])
    assert [path.name for path in out.iterdir()] == ["checkpoint-6"]
    main([str(recipe), "training.resume_from_checkpoint=true"])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-10"]
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_interrupted_checkpoint_is_not_resumed_from(arguments, tmp_path, monkeypatch, part):
    """A run stops while it writes the third checkpoint. The second one is complete, the third has
    another name, and the next run deletes it."""
    expected = weights(main(arguments))
    shutil.rmtree(tmp_path / "out")

    def stop(trainer: VLJEPATrainer, *_) -> None:
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        original(trainer, *_)

    original = getattr(VLJEPATrainer, part)
    with monkeypatch.context() as patch:
        patch.setattr(VLJEPATrainer, part, stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {"checkpoint-1", "checkpoint-2", INCOMPLETE}
    assert (tmp_path / "out" / INCOMPLETE / "model.safetensors").is_file()

    resumed = main([*arguments, "training.resume_from_checkpoint=true"])
    assert len(resumed.state.log_history) >= 4
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert not (tmp_path / "out" / INCOMPLETE).exists()


def test_resume_starts_at_the_last_checkpoint_or_the_beginning(arguments, tmp_path, capsys):
    resume = "training.resume_from_checkpoint=true"
    first = weights(main([*arguments, resume]))
    assert "resuming from the beginning: there are no checkpoints yet" in capsys.readouterr().out
    again = main([*arguments, resume])  # which has reached its last step
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    for name, parameter in weights(again).items():
        assert torch.equal(parameter, first[name])


@pytest.mark.parametrize("name", ["checkpoint-9", "empty"])
def test_resume_refuses_a_folder_without_a_checkpoint(arguments, tmp_path, name):
    folder = tmp_path / "out" / name
    if name == "empty":
        folder.mkdir(parents=True)
    with pytest.raises(
        RecipeError, match=f"{name} is not a complete checkpoint: it lacks .*Give a folder"
    ):
        main([*arguments, f"training.resume_from_checkpoint={folder}"])


def test_checkpoint_to_resume_refuses_an_incomplete_checkpoint(arguments, tmp_path):
    """Trainer would continue with a new optimizer, or with the first rows again."""
    main(arguments)
    out = tmp_path / "out"
    last = out / "checkpoint-4"

    def resume(wanted: Path | bool) -> str | None:
        return checkpoint_to_resume(wanted, str(out))

    def refused(wanted: Path | bool, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            resume(wanted)

    assert resume(True) == str(last) and resume(last) == last
    refused(out, "out is not a complete checkpoint: it lacks the run's optimizer's state")
    for name in SAVED - {"config.json"}:
        (last / name).rename(out / "away")
        refused(True, f"checkpoint-4 is not a complete .*: it lacks the run's .*{name[:5]}.*Remove")
        refused(last, "checkpoint-4 is not a complete checkpoint: it lacks .*, or start a new run")
        (out / "away").rename(last / name)
    whole = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(whole[:5000])
    refused(True, "checkpoint-4 is not a complete checkpoint: model.safetensors is broken")
    # The files that accelerate writes for a model sharded over processes.
    for name, other in (("model.safetensors", "pytorch_model_fsdp_0"), ("optimizer.pt", "")):
        (last / name).unlink()
        (last / (other or "optimizer_0")).mkdir()
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    assert resume(True) == str(last)
    for name in (INCOMPLETE, REPLACED):  # complete, but not renamed yet
        shutil.copytree(last, out / name)
        refused(out / name, f"{name} is not a complete checkpoint: it was being written")
        assert resume(True) == str(last)


def test_checkpoint_is_replaced_only_by_a_complete_one(arguments, tmp_path, monkeypatch):
    """A resumed run is killed while it deletes the old checkpoint of the same step."""
    out = tmp_path / "out"
    main(arguments)
    expected = (out / "checkpoint-4" / "model.safetensors").read_bytes()
    original = shutil.rmtree

    def stop(path: Path, **options) -> None:
        if (Path(path) / "optimizer.pt").is_file() and Path(path).name != "checkpoint-3":
            (Path(path) / "optimizer.pt").unlink()
            raise KeyboardInterrupt
        original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, f"training.resume_from_checkpoint={out / 'checkpoint-3'}"])
    assert (out / REPLACED).is_dir()
    assert {path.name for path in (out / "checkpoint-4").iterdir()} >= SAVED
    assert (out / "checkpoint-4" / "model.safetensors").read_bytes() == expected
    main([*arguments, "training.resume_from_checkpoint=true", "training.max_steps=5"])
    assert not (out / REPLACED).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_a_streamed_source_at_its_position(tmp_path, workers):
    """Unusable rows are counted once, although the workers read ahead of the training."""
    tiny_rows(tmp_path)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    images = [line for line in lines if "image" in line]
    bad = ['{"image": "torn.png", "target": "torn"}', "{oops"]
    (tmp_path / "stream.jsonl").write_text("\n".join([*images, *bad, *images]) + "\n")
    recipe = tiny_recipe(
        tmp_path / "rows.jsonl",
        save_strategy="steps",
        save_steps=3,
        max_steps=7,
        dataloader_num_workers=workers,
    )
    content = yaml.safe_load(recipe.read_text())
    content["data"]["sources"].append(
        {"rows": str(tmp_path / "stream.jsonl"), "streaming": True, "shuffle_rows": 4, "weight": 3}
    )
    content["data"]["max_bad_share"] = 0.9
    recipe.write_text(yaml.safe_dump(content))

    expected = main([str(recipe)])
    assert expected.bad_rows.bad[0] == 0 and expected.bad_rows.bad[1] >= 2
    named = (tmp_path / "out" / "bad_rows.txt").read_text(encoding="utf-8")
    assert "stream.jsonl:4: not valid JSON" in named
    assert "torn.png: not an image" in named
    for step in (6, 7):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    resumed = main([str(recipe), "training.resume_from_checkpoint=true"])
    counts = [(run.bad_rows.seen, run.bad_rows.bad) for run in (resumed, expected)]
    assert counts[0] == counts[1]
    losses = [[line.get("loss") for line in r.state.log_history] for r in (expected, resumed)]
    assert losses[0] == losses[1]
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, weights(expected)[name]), name
    positions = tmp_path / "out" / "checkpoint-3" / "positions_0.json"
    content = json.loads(positions.read_text())
    content["positions"] = {}  # positive control: the stream starts again, the losses differ
    positions.write_text(json.dumps(content))
    for step in (6, 7):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    other = main([str(recipe), "training.resume_from_checkpoint=true"])
    assert [line.get("loss") for line in other.state.log_history] != losses[0]


def test_resume_refuses_another_number_of_sources(tmp_path):
    tiny_rows(tmp_path)
    recipe = tiny_recipe(tmp_path / "rows.jsonl", save_strategy="steps", save_steps=2)
    main([str(recipe)])
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    rows = str(tmp_path / "rows.jsonl")
    with pytest.raises(RecipeError, match="checkpoint-2 was trained on 1 sources, and .* has 2"):
        main(
            [
                str(recipe),
                f"data.sources=[{{rows: {rows}}}, {{rows: {rows}}}]",
                "training.resume_from_checkpoint=true",
            ]
        )


def test_resume_refuses_positions_that_mean_other_rows(tmp_path):
    """With other lanes or blocks, some rows would be read twice and others never."""
    tiny_rows(tmp_path)
    rows = [{"image": "wide.png", "target": f"text {number}"} for number in range(16)]
    stream = write_rows(tmp_path / "stream.jsonl", rows)
    source = f"data.sources=[{{rows: {stream}, streaming: true, shuffle_rows: 4}}]"
    recipe = tiny_recipe(stream, save_strategy="steps", save_steps=2)
    main([str(recipe), source])
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resume = [str(recipe), source, "training.resume_from_checkpoint=true"]
    for override, message in (
        ("data.lanes=1", "data.lanes is 1 and was 2"),
        (source.replace("4}", "8}"), r"data.sources\[0\].shuffle_rows is 8 and was 4"),
        (source.replace("true", "false"), r"data.sources\[0\].streaming is False and was True"),
    ):
        with pytest.raises(RecipeError, match=f"checkpoint-2 cannot continue with .*{message}"):
            main([*resume, override])
    places = tmp_path / "out" / "checkpoint-2" / "positions_0.json"
    whole = json.loads(places.read_text())
    places.write_text(json.dumps(whole | {"positions": {"0": {"0": whole["positions"]["0"]["0"]}}}))
    with pytest.raises(RecipeError, match="lacks positions_N.json of some processes"):
        main(resume)
    places.write_text(json.dumps(whole))
    assert main([*resume, "data.lanes=2"]).state.global_step == 4


def rates(trainer: VLJEPATrainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.fixture
def half(tmp_path: Path) -> list[str]:
    """The arguments that resume a run of four steps at its last one."""
    recipe = tiny_recipe(tiny_rows(tmp_path), save_strategy="steps", save_steps=4)
    main([str(recipe)])
    return [str(recipe), "training.resume_from_checkpoint=true"]


def test_resume_follows_more_steps_and_another_rate(half, tmp_path, capsys):
    """Upstream would take the rate, the weight decay and the schedule of the checkpoint: 0."""
    whole = rates(main([half[0], "training.max_steps=8", f"training.output_dir={tmp_path}/whole"]))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    capsys.readouterr()
    longer = main([*half, "training.max_steps=8"])
    assert rates(longer)[4:] == pytest.approx(whole[4:])
    assert (
        "other settings than before: training.max_steps is 8 and was 4" in capsys.readouterr().out
    )

    changes = ["max_steps=8", "learning_rate=5.0e-4", "weight_decay=0.5", "adam_beta1=0.5"]
    changes += [f"output_dir={tmp_path}/copy", "save_steps=3", "logging_steps=2"]
    other = main([*half, *(f"training.{change}" for change in changes)])
    # Two log lines with the rates of steps 6 and 8; the intervals are the recipe's, too.
    assert rates(other)[4:] == pytest.approx([whole[5] / 2, whole[7] / 2])
    assert {path.name for path in (tmp_path / "copy").glob("checkpoint-*")} >= {"checkpoint-6"}
    decays = {group["weight_decay"] for group in other.optimizer.param_groups}
    betas = {group["betas"] for group in other.optimizer.param_groups}
    assert decays == {0.0, 0.5} and betas == {(0.5, 0.98)}
    printed = capsys.readouterr().out
    for name in ("max_steps", "learning_rate", "weight_decay", "adam_beta1"):
        assert f"training.{name} is " in printed
    assert "output_dir is" not in printed and "save_steps is" not in printed


def test_resume_refuses_settings_that_the_checkpoint_depends_on(half, tmp_path, monkeypatch):
    rows = str(tmp_path / "rows.jsonl")
    # Refused before the model is built and the clips are decoded.
    monkeypatch.setattr("training.train.start_model", lambda *_: pytest.fail("a model was built"))
    for override, message in (
        ("training.global_batch_size=4", "training.global_batch_size is 4 and was 2"),
        ("training.gradient_accumulation_steps=2", "gradient_accumulation_steps is 2 and was 1"),
        ("training.seed=1", "training.seed is 1 and was 42"),
        ("training.data_seed=1", "training.data_seed is 1 and was None"),
        ("training.sigreg_weight=0.1", "training.sigreg_weight is 0.1 and was 0.0"),
        ("training.objective=cosine", "training.objective is cosine and was info_nce"),
        ("training.optim=sgd", "training.optim is sgd and was adamw_torch"),
        ("training.learning_rate=0", "training.learning_rate is 0.0 and was 0.001"),
        ("training.text_learning_rate_scale=1", "text_learning_rate_scale is 1.0 and was 0.05"),
        ("processor.num_frames=2", "processor.num_frames is 2 and was 4"),
        ("model.vocab_size=299", "model.vocab_size is 299 and was 300"),
        (
            "model.config.vision_config.num_hidden_layers=1",
            "vision_config.num_hidden_layers is 1 and",
        ),
        (
            f"model.tokenizer_rows=[{rows}]",
            r"model.tokenizer_rows is \[\['4 rows', .* and was \[\]",
        ),
        ("data.hard_negatives=1", "data.hard_negatives is 1 and was 0"),
        (f"data.sources=[{{rows: {rows}, weight: 2}}]", r"data.sources\[0\].weight is 2.0 and was"),
        (
            f"data.sources=[{{rows: {rows}, query: a}}]",
            r"data.sources\[0\].query is a and was None",
        ),
    ):
        with pytest.raises(RecipeError, match=f"checkpoint-4 cannot continue with .*{message}"):
            main([*half, override])
    with pytest.raises(
        RecipeError, match="max_steps: it is 3, but .*checkpoint-4 has made 4 steps"
    ):
        main([*half, "training.max_steps=3"])
    lines = Path(rows).read_text().splitlines()
    Path(rows).write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(
        RecipeError, match=r"data.sources\[0\] has other rows \(3 rows, before 4 row"
    ):
        main(half)
    Path(rows).write_text("\n".join([*lines[:3], lines[3].replace("door", "gate")]) + "\n")
    with pytest.raises(
        RecipeError, match=r"data.sources\[0\] has other rows \(4 rows, before 4 row"
    ):
        main(half)


@pytest.mark.parametrize(
    ("changes", "applied"),
    [
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3.0}, True),
        ({"lr_scheduler_type": "greedy"}, False),  # its rate is a state
        ({"learning_rate": 0.0}, False),  # one group of parameters
        ({"learning_rate": 0.1, "deepspeed": {"train_batch_size": 2}}, False),
        ({"precision": "bf16", "gradient_cache_rows": 2}, True),
        ({"fsdp": "full_shard"}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_compare_applies_what_a_run_can_follow(tmp_path, changes, applied):
    recipe = read_recipe(str(tiny_recipe(tmp_path / "rows.jsonl")))
    before = fingerprint(recipe, [["4 rows", "hash"]])
    write_fingerprint(tmp_path, before)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    now = before | {f"training.{name}": value for name, value in changes.items()}
    assert compare(str(tmp_path), before) == compare(None, now) == ""
    if applied:
        line = compare(str(tmp_path), now)
        assert all(
            f"training.{name} is {value} and was " in line for name, value in changes.items()
        )
    else:
        with pytest.raises(RecipeError, match="cannot continue with other settings: training"):
            compare(str(tmp_path), now)


def test_compare_accepts_a_checkpoint_without_a_command(tmp_path):
    """Earlier versions did not state it."""
    recipe = read_recipe(str(tiny_recipe(tmp_path / "rows.jsonl")))
    now = fingerprint(recipe, [["4 rows", "hash"]])
    assert now["command"] == "training.train"
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    write_fingerprint(tmp_path, {key: now[key] for key in now if key != "command"})
    assert compare(str(tmp_path), now) == ""
    write_fingerprint(tmp_path, now | {"command": "training.train_decoder"})
    with pytest.raises(RecipeError, match="is a checkpoint of training.train_decoder, which"):
        compare(str(tmp_path), now)


def test_resume_continues_with_moved_files_and_without_secrets(half, tmp_path, capsys):
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    capsys.readouterr()
    main([*half, "training.hub_token=secret", "training.dataloader_num_workers=1"])
    assert "other settings" not in capsys.readouterr().out
    moved = f"data.sources=[{{rows: {tmp_path / 'moved.jsonl'}, licence: mit}}]"
    main([*half, moved, "training.max_steps=5", "training.hub_token=secret"])
    printed = capsys.readouterr().out
    assert "other settings than before: data.sources[0].rows is " in printed
    assert "licence" not in printed
    settings = (tmp_path / "out" / "checkpoint-5" / "recipe.json").read_text()
    assert "secret" not in settings and json.loads(settings)["training.max_steps"] == 5


def test_training_stops_at_too_many_bad_rows(tmp_path):
    """Rows of a streamed source are not known to be unusable before training."""
    (tmp_path / "torn.png").write_bytes(b"no picture")
    tiny_rows(tmp_path)
    rows = [{"image": "wide.png", "target": "a"}, {"image": "torn.png", "target": "b"}]
    (tmp_path / "stream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    recipe = tiny_recipe(tmp_path / "stream.jsonl", max_steps=7, logging_steps=2)
    content = yaml.safe_load(recipe.read_text())
    content["data"]["sources"][0] |= {"streaming": True}
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(
        RecipeError, match="stream.jsonl: [1-9] of [0-9]+ rows are unusable"
    ) as error:
        main([str(recipe)])
    assert "torn.png: not an image" in str(error.value)
    assert "At most 0% may be unusable (data.max_bad_share), and " in str(error.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    # Without log lines nothing stops the run before its end, and the model is saved.
    with pytest.raises(RecipeError, match="stream.jsonl: [1-9] of [0-9]+ rows are unusable"):
        main([str(recipe), 'training.logging_strategy="no"'])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.long
def test_killed_runs_resume_to_the_weights_of_an_uninterrupted_one(tmp_path):
    """`python -m benchmarks.kills` kills twenty runs; here is one for each setting."""
    lines = kill_and_resume(tmp_path, kills=4)
    assert len(lines) == 4
    assert any("one process" in line for line in lines)


def test_checkpoint_to_resume_finds_the_optimizer_of_deepspeed(arguments, tmp_path):
    main(arguments)
    last = tmp_path / "out" / "checkpoint-4"
    shards = last / "global_step4"
    shards.mkdir()
    (last / "optimizer.pt").rename(shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert checkpoint_to_resume(str(last), str(tmp_path / "out")) == str(last)
