"""Training from a recipe to a saved folder, with a model of 200,000 parameters."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import send_to_device
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import is_torchao_available

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from tests.tiny import (
    BERT,
    RESNET,
    noise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_recipe,
    tiny_rows,
    tiny_settings,
    tiny_tokenizer,
    tiny_writer,
    write_rows,
)
from training.arguments import ModelArguments, ProcessorArguments, RecipeError
from training.loop import grad_cache
from training.loop.trainer import VLJEPATrainer
from training.model.adapters import (
    AdaptedModel,
    add_adapters,
    prepare_for_training,
    store_frozen_in_bf16,
)
from training.model.recipe_model import load_checkpoint, new_model
from training.train import main

ROOT = Path(__file__).parents[2]
WORDS = ("red", "green", "blue", "black", "white", "a cat", "a dog", "a bike")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with one batch: eight images of noise, each with its own target."""
    folder = tmp_path_factory.mktemp("eight")
    pixels = noise(8, 40, 40, 3)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "query": f"what is number {number} ?", "target": word}
        for number, word in enumerate(WORDS)
    ]
    return tiny_recipe(write_rows(folder / "rows.jsonl", rows), global_batch_size=8)


def run(recipe: Path, *overrides: str) -> VLJEPATrainer:
    return main([str(recipe), *(f"training.{override}" for override in overrides)])


def losses(trainer: VLJEPATrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def start(trainer: VLJEPATrainer) -> VLJEPAModel:
    """Build the model as it was before training."""
    arguments = ModelArguments(config=tiny_settings(), vocab_size=300)
    processing = ProcessorArguments(image_size=32, num_frames=4)
    texts = [row[part] for row in trainer.train_dataset.rows for part in ("query", "target")]
    return new_model(arguments, processing, texts, trainer.args.seed)[0]


@pytest.fixture(scope="module")
def overfit(recipe: Path) -> VLJEPATrainer:
    folder = recipe.parent / "overfit"
    return run(
        recipe,
        f"output_dir={folder}",
        "max_steps=60",
        "learning_rate=3.0e-3",
        "text_learning_rate_scale=1.0",
        "weight_decay=0.1",
    )


# -- training ------------------------------------------------------------------------------


def test_trainer_overfits_one_batch(overfit):
    history = losses(overfit)
    assert len(history) == 60
    assert history[0] > 1.5
    assert max(history[-5:]) < 0.05
    assert overfit.state.log_history[-2]["accuracy"] == 1


def test_trainer_changes_trainable_parameters_only(overfit):
    before = dict(start(overfit).named_parameters())
    after = dict(overfit.model.named_parameters())
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name, p in after.items() if not p.requires_grad}
    modules = {name.split(".")[0] for name in same}
    assert modules == {"x_encoder", "predictor"}  # in the Predictor, the token table


def test_log_contains_the_parts_of_the_loss(overfit, recipe):
    lines = [line for line in overfit.state.log_history if "loss" in line]
    for line in lines:
        assert line["chance_loss"] == pytest.approx(math.log(8), abs=1e-6)
        assert 0 <= line["accuracy"] <= 1
    assert lines[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert lines[-1]["logit_scale"] != lines[0]["logit_scale"]
    saved = json.loads((recipe.parent / "overfit" / "trainer_state.json").read_text())
    assert [line.get("loss") for line in saved["log_history"]] == [
        line.get("loss") for line in overfit.state.log_history
    ]


def test_log_line_averages_the_parts_since_the_last_line(recipe):
    every = run(recipe, "max_steps=4", "seed=3").state.log_history
    second = run(recipe, "max_steps=4", "seed=3", "logging_steps=2").state.log_history
    for name in ("loss", "accuracy", "logit_scale"):
        means = [(every[i][name] + every[i + 1][name]) / 2 for i in (0, 2)]
        assert [line[name] for line in second[:2]] == pytest.approx(means, rel=1e-6)


def test_chance_loss_is_lower_with_repeated_targets(recipe, tmp_path):
    rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(recipe.parent / row["image"])
        row["target"] = "yes" if row["target"].startswith("a ") else "no"
    trainer = run(tiny_recipe(write_rows(tmp_path / "rows.jsonl", rows), global_batch_size=8))
    expected = (3 * math.log(1 + 5) + 5 * math.log(1 + 3)) / 8  # three times yes, five times no
    assert trainer.state.log_history[0]["chance_loss"] == pytest.approx(expected, abs=1e-6)


def test_seed_determines_the_losses(recipe):
    first, again, other = (losses(run(recipe, f"seed={seed}")) for seed in (1, 1, 2))
    assert first == again
    assert all(abs(a - b) > 1e-4 for a, b in zip(first, other, strict=True))


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Four steps equal two steps and two resumed ones: the same rows, rates and weights.

    Bitwise: Trainer copies the checkpoint's weights into the new model's own memory, so both runs
    do the same operations on equally aligned data.
    """
    recipe = tiny_recipe(tiny_rows(tmp_path), save_strategy="steps", save_steps=2)
    whole = run(recipe)
    expected = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    resumed = run(recipe, f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-2'}")
    assert losses(resumed) == losses(whole)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad == dict(whole.model.named_parameters())[name].requires_grad


def test_bf16_training_keeps_trained_weights_in_fp32(recipe):
    """Weights in bf16 would round away most updates at 5e-6: after ten steps, 92 % of them would
    be unchanged."""
    trainer = run(recipe, "precision=bf16", "learning_rate=5.0e-6", "text_learning_rate_scale=1.0")
    before = dict(start(trainer).named_parameters())
    moved = total = 0
    for name, parameter in trainer.model.named_parameters():
        # Frozen weights are stored in bf16.
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        if parameter.requires_grad:
            changed = parameter != before[name]
            if "embed_tokens" in name:  # words that occur in no text have no gradient
                changed = changed[changed.any(dim=1)]
            moved, total = moved + changed.sum().item(), total + changed.numel()
    assert moved / total > 0.99
    # Positive control: the same weights rounded to bf16.
    after = dict(trainer.model.named_parameters())
    rounded = sum((p.bfloat16() != before[name].bfloat16()).sum() for name, p in after.items())
    assert rounded / total < 0.5
    # The saved dtype is fp32, so that trained weights are not rounded when they are loaded.
    saved = AutoModel.from_pretrained(trainer.args.output_dir)
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, after[name].float()), name


# -- objectives ----------------------------------------------------------------------------


FROZEN_TARGETS = {"freeze_text": True, "project_target": False, "embedding_dim": 32}


def run_with(recipe: Path, config: dict, *overrides: str) -> VLJEPATrainer:
    """Run four steps with these settings of the model."""
    changes = [f"model.config.{name}={json.dumps(value)}" for name, value in config.items()]
    return main([str(recipe), *changes, *(f"training.{override}" for override in overrides)])


def test_grad_cache_trains_like_the_whole_batch(recipe):
    plain, cached = run(recipe), run(recipe, "gradient_cache_rows=3")
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    for name in ("accuracy", "chance_loss", "logit_scale", "predicted_spread", "grad_norm"):
        found, expected = (run.state.log_history[3][name] for run in (cached, plain))
        assert found == pytest.approx(expected, rel=1e-3), name
    # Positive control: accumulation has other negatives, so its loss differs.
    accumulated = run(recipe, "gradient_accumulation_steps=4")
    assert abs(losses(accumulated)[0] - losses(plain)[0]) > 0.3


# -- waiting for the device ----------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Operations on a device that would wait for it, because the host needs a value or a size.

    The device is the CPU here: everything after the batch's move, except the split into parts.
    """

    aten = torch.ops.aten
    NAMES = (
        *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
        *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default),
    )

    def __init__(self):
        super().__init__()
        self.moved, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function is self.aten.index.Tensor else ()
        is_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if self.moved and (function in self.NAMES or is_mask):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))

    def move(self, data, device, non_blocking):
        self.moved = True
        return data

    def split(self, *args):
        self.moved = False
        parts = SPLIT(*args)
        self.moved = True
        return parts


SPLIT = grad_cache.split
PADDED = ("is it red ?", "what is it ?", "")


def batch_of(trainer: VLJEPATrainer, texts: tuple[str, ...]) -> dict:
    samples = [
        trainer.train_dataset[index] | {"query": texts[index % len(texts)]} for index in range(8)
    ]
    return trainer.data_collator(samples) | {"source": 0, "bad_rows": []}


def reads_of_a_step(trainer: VLJEPATrainer, monkeypatch, texts: tuple[str, ...]) -> list[str]:
    reads, model = Reads(), copy.deepcopy(trainer.model)
    monkeypatch.setattr("training.loop.trainer.send_to_device", reads.move)
    monkeypatch.setattr(grad_cache, "split", reads.split)
    weights = {"sigreg_weight": 0.1, "variance_weight": 0.1}
    monkeypatch.setattr(trainer, "objective", replace(trainer.objective, **weights))
    monkeypatch.setattr(trainer, "_parts", defaultdict(list))
    with reads:
        trainer.training_step(model, batch_of(trainer, texts))
    assert reads.moved and any(p.grad is not None for p in model.parameters())
    return reads.found


@pytest.mark.parametrize(
    "rows, texts",
    [(None, PADDED[:1]), (None, PADDED), (3, PADDED)],
    ids=["equal", "padded", "parts"],
)
def test_trainer_step_reads_no_values_from_the_device(overfit, monkeypatch, rows, texts):
    monkeypatch.setattr(overfit.args, "gradient_cache_rows", rows)
    assert reads_of_a_step(overfit, monkeypatch, texts) == []


def test_trainer_step_reads_the_mask_that_its_backbone_makes(overfit, monkeypatch):
    """Positive control of the test above."""
    monkeypatch.setattr("modeling_vljepa.predictor.mask_for", lambda config, states, mask: mask)
    assert reads_of_a_step(overfit, monkeypatch, PADDED) == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("checks", ["before the move", "in the model"])
def test_trainer_step_runs_on_tensors_without_values(overfit, monkeypatch, checks):
    """Reads of Python, such as `tolist`, are no operations on a CPU, but fake tensors raise an
    error. transformers skips its own reads of these, so the tests above are needed too."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def move(data, device, non_blocking):
        if not isinstance(data, dict):
            return data
        return {name: fakes.from_tensor(each) for name, each in data.items()}

    monkeypatch.setattr("training.loop.trainer.send_to_device", move)
    monkeypatch.setattr(overfit, "_parts", defaultdict(list))
    with FakeCopyMode(fakes):
        model = copy.deepcopy(overfit.model)
    batch = batch_of(overfit, PADDED)
    if checks == "in the model":  # positive control
        monkeypatch.setattr("training.loop.trainer.values_checked", nullcontext)
        with pytest.raises(DataDependentOutputException):
            overfit.training_step(model, batch)
    else:
        assert isinstance(overfit.training_step(model, batch), FakeTensor)


def test_trainer_checks_a_batch_before_it_moves_and_the_model_every_other_call(
    overfit, monkeypatch
):
    batch = overfit.data_collator([overfit.train_dataset[index] for index in range(8)])
    batch["input_ids"][2, 1] = 300
    monkeypatch.setattr("training.loop.trainer.send_to_device", None)
    for rows in (None, 3):
        monkeypatch.setattr(overfit.args, "gradient_cache_rows", rows)
        with pytest.raises(ValueError, match="^input_ids holds the id 300, but the vocabulary"):
            overfit.training_step(overfit.model, batch | {"source": 0, "bad_rows": []})
    with pytest.raises(ValueError, match="^input_ids holds the id 300, but the vocabulary"):
        overfit.model(torch.zeros(8, 2, 3, 32, 32), batch["input_ids"])


@pytest.mark.parametrize("pinned", [False, True])
def test_trainer_make_ready_waits_only_for_memory_that_is_not_pinned(overfit, monkeypatch, pinned):
    waits = []

    def move(data, device, non_blocking):
        waits.append(not non_blocking)
        return send_to_device(data, device)

    monkeypatch.setattr(overfit.args, "dataloader_pin_memory", pinned)
    monkeypatch.setattr("training.loop.trainer.send_to_device", move)
    ready = overfit.make_ready({"frames": torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)})
    assert ready["pixel_values_videos"].dtype == torch.float32
    assert set(waits) == {not pinned}


def test_grad_cache_moves_one_part_at_a_time_to_the_device(recipe, monkeypatch):
    """Ids move first, all at once. Then the parts move: uint8 frames in the first pass, the visual
    tokens that replaced them in the second."""
    moved, prepare = [], VLJEPATrainer._prepare_inputs

    def spy(self, inputs):
        names = ("frames", "visual_embeds")
        moved.append([(len(inputs[name]), inputs[name].dtype) for name in names if name in inputs])
        return prepare(self, inputs)

    monkeypatch.setattr(VLJEPATrainer, "_prepare_inputs", spy)
    run(recipe, "max_steps=1", "gradient_cache_rows=3", "precision=bf16")
    sizes = (3, 3, 2)
    expected = [[(rows, dtype)] for dtype in (torch.uint8, torch.bfloat16) for rows in sizes]
    assert moved == [[], *expected]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_grad_cache_stored_tokens_equal_recomputed_ones(recipe, monkeypatch, precision):
    arguments = ("gradient_cache_rows=3", f"precision={precision}")
    waited = losses(run(recipe, *arguments))
    monkeypatch.setattr(grad_cache, "frozen_vision", lambda model: None)
    assert losses(run(recipe, *arguments)) == pytest.approx(waited, rel=1e-5)


def test_grad_cache_works_with_gradient_accumulation(recipe):
    plain = run(recipe, "gradient_accumulation_steps=2")
    cached = run(recipe, "gradient_accumulation_steps=2", "gradient_cache_rows=1")
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    assert cached.state.log_history[0]["grad_norm"] == pytest.approx(
        plain.state.log_history[0]["grad_norm"], rel=1e-4
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_activation_checkpointing_changes_no_loss(recipe, frozen):
    config = {"freeze_vision": frozen}
    plain = run_with(recipe, config)
    again = run_with(recipe, config, "activation_checkpointing=true")
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    assert again.model.is_activation_checkpointing and not plain.model.is_activation_checkpointing


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"logit_bias_init_value": -2.0}, ["objective=sigmoid"]),
        (FROZEN_TARGETS, ["objective=cosine"]),
        (FROZEN_TARGETS, ["objective=l1"]),
        (FROZEN_TARGETS, ["objective=l2", "gradient_cache_rows=3"]),
        ({}, ["objective=cosine", "variance_weight=1.0", "covariance_weight=0.1"]),
        ({}, ["sigreg_weight=0.05"]),
        ({}, ["interchangeable=positives"]),
    ],
    ids=str,
)
def test_every_objective_lowers_its_loss(recipe, config, overrides):
    trainer = run_with(
        recipe, config, *overrides, "max_steps=25", "learning_rate=3.0e-3", "weight_decay=0.0"
    )
    history = losses(trainer)
    assert history[-1] < 0.9 * history[0]
    moved = trainer.model.logit_scale.weight.item() != pytest.approx(math.log(1 / 0.07))
    assert moved == (trainer.args.objective not in ("cosine", "l1", "l2"))


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ({}, "objective=cosine", "'cosine' has no negatives, and the targets' y_encoder trains"),
        ({"freeze_text": True}, "objective=l2", "the targets' y_head trains"),
        ({}, "objective=sigmoid", "set model.config.logit_bias_init_value"),
        (
            {"vision_config": RESNET, "freeze_vision": False},
            "gradient_cache_rows=1",
            "a 'resnet', has batch norms, which would average over 1 rows",
        ),
        ({}, "objective=infonce", "'infonce' is not one of info_nce, sigmoid, cosine, l1, l2"),
        ({}, "interchangeable=x", "'x' is not one of masked, positives"),
        ({}, "gradient_cache_rows=0", "gradient_cache_rows: it is 0; give 1 or more"),
        ({}, "load_best_model_at_end=true", "name a score of the section 'evaluation'"),
    ],
)
def test_training_refuses_an_objective_that_cannot_work(recipe, config, override, message):
    with pytest.raises(RecipeError, match=message):
        run_with(recipe, config, override)


def test_hard_negatives_are_added_to_the_batch(recipe, tmp_path):
    rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["image"] = str(recipe.parent / row["image"])
        row["negatives"] = ["a hat", "purple", "never read"][: 3 * (number % 2)]
    again = tiny_recipe(write_rows(tmp_path / "rows.jsonl", rows), global_batch_size=8)
    chances = [
        main([str(again), f"data.hard_negatives={n}"]).state.log_history[0]["chance_loss"]
        for n in (0, 1, 2)
    ]
    cached = ["model.config.freeze_text=true", "data.cache_targets=true"]
    trainer = main([str(again), "data.hard_negatives=2", *cached])
    assert trainer.state.log_history[0]["chance_loss"] == pytest.approx(chances[2])
    # Four rows have n negatives each; every prediction is compared with all of them.
    expected = [(math.log(8) + math.log(8 + 4 * n)) / 2 for n in (0, 1, 2)]
    assert chances == pytest.approx(expected, abs=1e-6)


# -- adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_text", [True, False])
def test_adapters_train_and_the_predictor_stays_frozen(recipe, freeze_text, tmp_path):
    trainer = run_with(
        recipe,
        {"freeze_text": freeze_text},
        f"output_dir={tmp_path}",
        "learning_rate=1.0e-2",
        "text_learning_rate_scale=1.0",
        "save_strategy=steps",
        "save_steps=2",
    )
    plain = dict(trainer.model.named_parameters())
    lora = "model.lora={r: 2, lora_alpha: 4}"
    config = f"model.config.freeze_text={str(freeze_text).lower()}"
    overrides = ["learning_rate=1.0e-2", "text_learning_rate_scale=1.0"]
    overrides += ["save_strategy=steps", "save_steps=2", f"output_dir={tmp_path / 'lora'}"]
    arguments = [str(recipe), config, lora, *(f"training.{o}" for o in overrides)]
    adapted = main(arguments)
    before = dict(start(adapted).named_parameters())
    after = dict(AutoModel.from_pretrained(tmp_path / "lora").named_parameters())
    assert after.keys() == before.keys() == plain.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    layers = r"predictor\.backbone\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
    moved = before.keys() - same
    assert {name for name in moved if "backbone.layers" in name and "predictor" in name} == {
        name for name in before if re.fullmatch(layers, name)
    }
    assert {name.split(".")[0] for name in moved} == {
        *("predictor", "predictor_head", "y_head", "logit_scale"),
        *([] if freeze_text else ["y_encoder"]),
    }
    for name in before:  # an adapter changes a weight by a product of rank 2
        if re.fullmatch(layers, name):
            change = after[name] - before[name]
            assert torch.linalg.matrix_rank(change, atol=1e-5) <= 2 < min(change.shape)
    loaded = PeftModel.from_pretrained(start(adapted), tmp_path / "lora" / "adapter")
    merged = dict(loaded.merge_and_unload().named_parameters())
    for name, parameter in after.items():
        torch.testing.assert_close(merged[name], parameter, msg=name)
    # A run with adapters resumes from a checkpoint.
    resume = f"training.resume_from_checkpoint={tmp_path / 'lora' / 'checkpoint-2'}"
    again = main([*arguments, resume, f"training.output_dir={tmp_path / 'again'}"])
    assert losses(again) == losses(adapted)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(adapted.model.named_parameters())[name]), name


def test_layers_under_adapters_in_bf16_change_neither_losses_nor_merged_weights(
    recipe, monkeypatch, tmp_path
):
    """Autocast rounds these weights to bf16 in any case. The adapters are merged into the fp32
    weights, because bf16 ones would lose their small changes."""
    arguments = [str(recipe), "model.lora={r: 2}", "training.precision=bf16"]
    arguments += ["training.learning_rate=1.0e-2", f"training.output_dir={tmp_path}"]
    trainer = main(arguments)
    saved = AutoModel.from_pretrained(tmp_path).predictor.backbone.layers.state_dict()
    before = start(trainer).predictor.backbone.layers.state_dict()
    loaded = PeftModel.from_pretrained(start(trainer), tmp_path / "adapter").merge_and_unload()
    expected = loaded.predictor.backbone.layers.state_dict()
    for name in expected:  # a bf16 weight would be off by up to 4e-3 of it
        torch.testing.assert_close(saved[name], expected[name], rtol=1e-6, atol=1e-7, msg=name)
    assert any((saved[name] != before[name]).any() for name in before)
    assert any((saved[name] != saved[name].bfloat16()).any() for name in saved)  # positive control
    monkeypatch.setattr(AdaptedModel, "store_base_in_bf16", lambda model: None)
    assert losses(main(arguments)) == pytest.approx(losses(trainer), rel=1e-5)


def test_store_frozen_in_bf16_keeps_the_frequencies_of_rotary_positions():
    model, other = (tiny_model(freeze_text=True) for _ in range(2))
    store_frozen_in_bf16(model)
    other.y_encoder.to(torch.bfloat16)  # positive control
    assert {p.dtype for p in model.y_encoder.parameters()} == {torch.bfloat16}
    expected = dict(tiny_model(freeze_text=True).y_encoder.named_buffers())
    assert any("inv_freq" in name for name in expected)
    for name, buffer in model.y_encoder.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    rounded = dict(other.y_encoder.named_buffers())
    assert any((rounded[name].float() - expected[name]).abs().max() > 1e-4 for name in expected)


def test_adapted_model_holds_trained_weights_once_and_in_fp32(recipe):
    """Also a trained Y-Encoder, of which peft alone would keep a second copy."""
    model = tiny_model()
    counts = {name: p.numel() for name, p in model.named_parameters()}
    adapted = prepare_for_training(model, {"r": 2}, run(recipe, "precision=bf16").args)
    found = {id(p): (name, p) for name, p in adapted.named_parameters(remove_duplicate=False)}
    adapters = sum(p.numel() for name, p in found.values() if ".lora_" in name)
    assert adapters > 0
    assert sum(p.numel() for _, p in found.values()) == sum(counts.values()) + adapters
    assert any("y_encoder" in name and p.requires_grad for name, p in found.values())
    for name, parameter in found.values():
        trains_or_norm = parameter.requires_grad or "predictor.backbone" in name and "norm" in name
        expected = torch.float32 if trains_or_norm else torch.bfloat16
        assert parameter.dtype == expected, name


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2}, "model.lora.rank: no such key"),
        ({"r": 0}, "model.lora: `r` should be a positive integer value"),
        ({"r": "abc"}, "model.lora.r: .* expected int, got str"),
        ({"lora_alpha": "x"}, "model.lora.lora_alpha: .* expected int, got str"),
        ({"lora_dropout": 2}, "model.lora: dropout probability has to be between 0 and 1"),
        ({"init_lora_weights": "foo"}, "model.lora.init_lora_weights: "),
        ({"task_type": "X"}, "model.lora.*task.type"),
        ({"bias": "foo"}, "model.lora.bias: "),
        ({"target_modules": ["q_proj"]}, "model.lora: .*target_modules"),
    ],
)
def test_add_adapters_names_a_wrong_setting(lora, message):
    with pytest.raises(RecipeError, match=message):
        add_adapters(tiny_model(), lora)


def test_tensorboard_gets_the_parts_of_the_loss(recipe, tmp_path):
    run(recipe, "report_to=tensorboard", f"output_dir={tmp_path}")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    for name in ("loss", "chance_loss", "accuracy", "target_spread", "mfu", "samples_per_second"):
        found = [event.value for event in events.Scalars(f"train/{name}")]
        expected = [line[name] for line in state["log_history"] if name in line]
        assert found == pytest.approx(expected[: len(found)], rel=1e-5) and len(found) == 4


# -- evaluation and the collapse warning ---------------------------------------------------


@pytest.fixture
def evaluated(recipe, tmp_path) -> tuple[Path, list[str]]:
    """A recipe and overrides with which it is evaluated on its own rows."""
    rows = str(recipe.parent / "rows.jsonl")
    benchmarks = {
        "words": {"task": "vqa", "rows": rows, "train_rows": rows, "description": "words"},
        "find": {"task": "retrieval", "rows": rows, "query": "", "description": "images"},
        "asks": {"task": "retrieval", "rows": rows, "description": "images"},
        "writes": {"task": "captioning", "rows": rows, "train_rows": rows, "description": "texts"},
    }
    path = tmp_path / "benchmarks.yaml"
    path.write_text(yaml.safe_dump(benchmarks))
    return recipe, [
        f"evaluation.benchmarks={path}",
        "evaluation.tasks=[words, find]",
        "training.eval_strategy=steps",
        f"training.output_dir={tmp_path / 'out'}",
    ]


def test_best_checkpoint_has_the_best_score(evaluated, tmp_path, capsys):
    """The best checkpoint by training loss would be the last one."""
    recipe, overrides = evaluated
    trainer = main(
        [
            *(str(recipe), *overrides),
            *("training.eval_steps=10", "training.save_steps=10", "training.max_steps=40"),
            *("training.save_strategy=steps", "training.load_best_model_at_end=true"),
            "training.metric_for_best_model=words_accuracy",
            "training.learning_rate=3.0e-3",
            "training.text_learning_rate_scale=1.0",
        ]
    )
    scores = {
        line["step"]: line["eval_words_accuracy"]
        for line in trainer.state.log_history
        if "eval_words_accuracy" in line
    }
    assert list(scores)[:4] == [10, 20, 30, 40]
    assert max(scores.values()) > 0.5
    best = max(scores, key=lambda step: (scores[step], -step))
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    saved = AutoModel.from_pretrained(tmp_path / "out" / f"checkpoint-{best}").state_dict()
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(parameter, saved[name]), name
    printed = capsys.readouterr().out
    assert printed.count("eval_words_accuracy 0.") + printed.count("eval_words_accuracy 1.") >= 4
    assert "eval_find_text_to_image_R@1" in printed and "(chance 0.125)" in printed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_does_not_change_the_losses(evaluated, precision):
    """Evaluations between log lines and at the end of a run, also with encoders in bf16."""
    recipe, overrides = evaluated
    same = [f"precision={precision}", "logging_steps=3", "max_steps=5"]
    overrides = [*overrides, "training.eval_steps=1", *(f"training.{one}" for one in same)]
    assert losses(main([str(recipe), *overrides])) == losses(run(recipe, *same))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks=[]", "evaluation.tasks: training.eval_strategy needs benchmarks"),
        ("evaluation.tasks=[wrods]", "evaluation: .* has no wrods. It has: asks, find, w"),
        ("evaluation.benchmarks=nowhere.yaml", "evaluation: .*nowhere.yaml"),
        ("evaluation.tasks=[asks]", "evaluation: asks: retrieval asks one query; give it as"),
        ("evaluation.tasks=[writes]", "evaluation: writes needs a Y-Decoder"),
    ],
)
def test_training_names_a_wrong_evaluation(evaluated, override, message, capsys):
    """The error comes before the first step."""
    recipe, overrides = evaluated
    with pytest.raises(RecipeError, match=message):
        main([str(recipe), *overrides, override])
    assert "chance loss of" not in capsys.readouterr().out


def test_collapse_warning_is_printed_for_equal_rows(recipe, capsys):
    """Here all eight clips and queries are equal, so all predicted embeddings are one point."""
    rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    same = [
        {**row, "image": "0.png", "query": "", "target": f"x {n}"} for n, row in enumerate(rows)
    ]
    path = write_rows(recipe.parent / "same.jsonl", same)
    main([str(recipe), f"data.sources=[{{rows: {path}}}]", "training.max_steps=8"])
    printed = capsys.readouterr().out
    assert printed.count("WARNING: collapse: predicted embeddings are one point") == 1
    run(recipe, "max_steps=8")
    assert "collapse" not in capsys.readouterr().out  # positive control


# -- parameter groups ----------------------------------------------------------------------


def test_optimizer_groups_have_the_rate_and_decay_of_each_parameter(recipe):
    trainer = run_with(
        recipe,
        {"freeze_vision": False},
        *("max_steps=1", "weight_decay=0.1", "vision_learning_rate_scale=0.2"),
    )
    rate = trainer.args.learning_rate
    trainer.optimizer = None
    groups = trainer.create_optimizer().param_groups
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert settings.keys() == {id(p) for p in trainable.values()}
    factors = {"y_encoder": 0.05, "x_encoder": 0.2}
    for name, parameter in trainable.items():
        expected = rate * factors.get(name.split(".")[0], 1)
        decay = 0.1 if parameter.ndim > 1 else 0.0
        assert settings[id(parameter)] == (pytest.approx(expected), decay), name
    undecayed = {name for name, p in trainable.items() if settings[id(p)][1] == 0}
    assert {"logit_scale.weight", "y_head.projection.bias"} < undecayed
    ends = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "scale.weight")
    assert all(name.endswith(ends) for name in undecayed)


def test_8_bit_optimizer_keeps_fp32_states_for_embeddings(recipe, monkeypatch):
    """Upstream requires it for bitsandbytes: states of rare words are mostly zero, and 8 bits with
    a shared scale would lose the others."""
    asked = []
    manager = SimpleNamespace(register_module_override=lambda *given: asked.append(given))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))

    class EightBit(torch.optim.SGD):
        def __init__(self, params, lr, optim_bits):
            super().__init__(params, lr)

    trainer = run(recipe, "max_steps=1")
    trainer.optimizer = None
    for name, expected in (("torch.optim", 0), ("bitsandbytes.optim", 2)):
        EightBit.__module__ = name
        chosen = (EightBit, {"lr": 0.1, "optim_bits": 8})
        monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_, c=chosen: c)
        trainer.optimizer = None
        assert len(trainer.create_optimizer().param_groups) == 4
        assert len(asked) == expected
    tables = {trainer.model.get_input_embeddings(), trainer.model.y_encoder.backbone.embed_tokens}
    assert {module for module, _, _ in asked} == tables
    assert all(given[1:] == ("weight", {"optim_bits": 32}) for given in asked)


@pytest.mark.slow  # torchao compiles the step
@pytest.mark.skipif(
    not is_torchao_available(), reason="torchao is not installed: pip install '.[eight-bit]'"
)
def test_8_bit_optimizer_lowers_the_loss(recipe):
    trainer = run_with(
        recipe,
        {"freeze_vision": False},
        *("optim=adamw_torch_8bit", "max_steps=30", "learning_rate=3.0e-3"),
        "text_learning_rate_scale=1.0",
    )
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    states = trainer.optimizer.optimizer.state
    name = "x_encoder.backbone.encoder.embeddings.patch_embeddings.proj.weight"
    parameter = dict(trainer.model.named_parameters())[name]
    assert parameter.dtype == torch.float32
    for average in ("exp_avg", "exp_avg_sq"):
        assert states[parameter][average].codes.dtype == torch.uint8
    rates = {float(group["lr"]) for group in trainer.optimizer.param_groups}
    assert rates == {
        0.0
    }  # the schedule also changes torchao's rates, which are tensors, to its end


# -- the model at the start ----------------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained BERT in bf16."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    bert = AutoModel.from_config(tiny_config(text_config=BERT).text_config)
    bert.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(eos=True).save_pretrained(folder)
    return folder


def test_new_model_loads_a_pretrained_text_encoder_in_fp32(text_encoder):
    arguments = ModelArguments(text_encoder=str(text_encoder), config=tiny_settings())
    model, processor = new_model(arguments, ProcessorArguments(image_size=32), ["a b c"], seed=0)
    weights = AutoModel.from_pretrained(text_encoder, dtype=torch.float32).state_dict()
    loaded = model.y_encoder.backbone.state_dict()
    assert weights.keys() - loaded.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert processor.target_tokenizer.get_vocab() == tiny_tokenizer(eos=True).get_vocab()
    assert processor.tokenizer.get_vocab() != processor.target_tokenizer.get_vocab()


def test_load_checkpoint_converts_to_fp32_and_applies_changes(overfit, tmp_path):
    # Not `overfit.model`, which other tests use: bf16 would round its weights.
    trained = AutoModel.from_pretrained(overfit.args.output_dir, dtype=torch.bfloat16)
    trained.save_pretrained(tmp_path)
    overfit.processing_class.save_pretrained(tmp_path)
    changes = {"freeze_vision": False, "predictor_config": {"attention_dropout": 0.1}}
    changes["visual_token_pooling"] = 2
    arguments = ModelArguments(checkpoint=str(tmp_path), config=changes)
    model, processor = load_checkpoint(arguments, ProcessorArguments(image_size=48))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.x_encoder.parameters())
    assert model.predictor.backbone.config.attention_dropout == 0.1
    assert model.config.visual_token_pooling == 2
    assert model.encode_video(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 1, 48)
    assert model.predictor.backbone.config.hidden_size == 32  # unchanged
    assert not model.predictor.backbone.config.is_causal
    assert isinstance(processor, VLJEPAProcessor)
    assert processor.video_processor.crop_size == {"height": 48, "width": 48}
    assert processor.video_processor.num_frames == 4  # the checkpoint's
    with pytest.raises(RecipeError, match="model.config.freeze_visio: no such setting"):
        load_checkpoint(
            ModelArguments(checkpoint=str(tmp_path), config={"freeze_visio": True}),
            ProcessorArguments(),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": -3}, "model.config: .*negative dimension -3"),
        ({"text_pooling": "max"}, "model.config: text_pooling is 'max'"),
        ({"freeze_text": "maybe"}, "model.config.freeze_text: .* expected bool, got str"),
    ],
)
def test_new_model_names_an_invalid_configuration(changes, message):
    arguments = ModelArguments(config=tiny_settings(**changes))
    with pytest.raises(RecipeError, match=message):
        new_model(arguments, ProcessorArguments(image_size=32), ["a b c"], seed=0)


def without(folder: Path, start: str) -> None:
    """Remove the weights whose names begin with `start` from a checkpoint."""
    path = folder / "model.safetensors"
    kept = {name: w for name, w in load_file(path).items() if not name.startswith(start)}
    save_file(kept, path, metadata={"format": "pt"})


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"embedding_dim": 12},
            r"embedding_dim.* has predictor_head.* of shape \(24,\), .* \(12,\)",
        ),
        ({"embedding_dim": "abc"}, "model.config.embedding_dim: .* expected int, got str"),
        ({"freeze_vision": "maybe"}, "model.config.freeze_vision: .* expected bool, got str"),
        ({"visual_token_pooling": True}, "model.config.visual_token_pooling: .* got bool"),
        ({"visual_token_pooling": 0}, "model.config: visual_token_pooling is 0: give a whole"),
        ({"visual_token_pooling": 3}, "with changed visual_token_pooling: .* has 2 x 2 patches"),
        ({"logit_bias_init_value": "abc"}, "model.config.logit_bias_init_value: "),
        (
            {"vision_config": {"num_hidden_layers": "x"}},
            "(?s)model.config.vision_config: .* expected int",
        ),
        (
            {"predictor_config": {"num_hidden_layers": 3}},
            "lacks predictor.backbone.layers.2.*would be random",
        ),
    ],
)
def test_load_checkpoint_names_changes_that_do_not_fit(tmp_path, changes, message):
    arguments = ModelArguments(checkpoint=saved(tiny_model(), tmp_path), config=changes)
    with pytest.raises(RecipeError, match=message):
        load_checkpoint(arguments, ProcessorArguments())


def test_load_checkpoint_refuses_missing_weights(tmp_path):
    """They would be random, and nothing in the log would show it."""
    arguments = ModelArguments(checkpoint=saved(tiny_model(), tmp_path))
    load_checkpoint(arguments, ProcessorArguments())
    without(tmp_path, "y_head")
    with pytest.raises(RecipeError, match="model.checkpoint.* lacks y_head.* would be random"):
        load_checkpoint(arguments, ProcessorArguments())
    arguments.config = {"project_target": True}  # the checkpoint's own setting
    with pytest.raises(RecipeError, match="lacks y_head"):
        load_checkpoint(arguments, ProcessorArguments())


def test_load_checkpoint_adds_a_bias_and_ignores_the_decoder(tmp_path):
    changes = {"logit_bias_init_value": -10}
    arguments = ModelArguments(checkpoint=saved(tiny_writer(), tmp_path), config=changes)
    model, _ = load_checkpoint(arguments, ProcessorArguments())
    assert model.logit_bias.weight.item() == -10
    expected = tiny_writer().vljepa.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("logit_bias") or torch.equal(value, expected[name]), name


def test_load_checkpoint_adds_parts_that_change_nothing_yet(tmp_path):
    changes = {"target_adapter_size": 9, "visual_dropout": 0.5, "predictor_pooling": "attention"}
    arguments = ModelArguments(checkpoint=saved(tiny_model(), tmp_path), config=changes)
    model, _ = load_checkpoint(arguments, ProcessorArguments())
    adapter = model.y_head.adapter
    assert adapter.fc1.weight.std() > 0.01 and (adapter.fc2.weight == 0).all()
    assert (model.predictor_head.attention.vector.weight == 0).all()
    expected = tiny_model().encode_target(torch.tensor([[5, 6, 7]]))
    found = model.eval().encode_target(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert model.predictor.visual_dropout.p == 0.5
    without(tmp_path, "y_head.projection")  # the adapter alone is new
    with pytest.raises(RecipeError, match="lacks y_head.projection.*would be random"):
        load_checkpoint(arguments, ProcessorArguments())


def test_cached_targets_do_not_change_the_losses(recipe):
    frozen = "model.config.freeze_text=true"
    plain = losses(main([str(recipe), frozen]))
    cached = losses(main([str(recipe), frozen, "data.cache_targets=true"]))
    assert cached == pytest.approx(plain, rel=1e-4)
    assert cached[0] == pytest.approx(plain[0], rel=1e-6)
    assert plain[1:] != pytest.approx(losses(main([str(recipe)]))[1:], rel=1e-4)  # positive control
    with pytest.raises(RecipeError, match="data.cache_targets: the Y-Encoder is trained here"):
        main([str(recipe), "data.cache_targets=true"])


# -- the command ---------------------------------------------------------------------------


@pytest.mark.slow
def test_train_command_trains_on_images_and_clips_of_any_size(tmp_path):
    recipe = tiny_recipe(tiny_rows(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "training.train", str(recipe), "training.max_steps=6"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # a busy machine needs minutes
    )
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl: 4 rows, weight 1" in done.stdout
    assert "1 process(es) on cpu · 6 steps of 2 rows · fp32 compute, fp32 weights" in done.stdout
    assert "mfu is a share of 1 TFLOP/s (training.device_tflops)" in done.stdout
    assert "chance loss of 2 rows and 2 texts at most 0.693" in done.stdout
    assert "x_encoder               0.130M        0.000M" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    assert lines[-1].startswith("step     6/6 (100%) · loss ")
    assert re.search(r"samples/s · mfu 0\.\d\d · \d+\.\d GiB · eta 0:00$", lines[-1])
    assert "(chance 0.693)" in lines[-1]

    model = AutoModel.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, VLJEPAProcessor)
    images = [tmp_path / "wide.png", tmp_path / "tall.jpg"]
    batch = processor(images=images, text=["what is it ?", ""], targets=["a cat", "red"])
    with torch.no_grad():
        assert model(**batch, return_loss=True).loss.isfinite()
    # The same training in this process finds the decoded clips and has the same losses.
    again = run(recipe, "max_steps=6", f"output_dir={tmp_path / 'again'}")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    found = [line["loss"] for line in state["log_history"] if "loss" in line]
    # Not to the last bit: the other process may have another number of threads.
    assert found == pytest.approx(losses(again), rel=1e-4)


def test_train_command_names_a_wrong_recipe(tmp_path):
    with pytest.raises(RecipeError, match="rows.jsonl: no such JSONL file"):
        main([str(tiny_recipe(tmp_path / "rows.jsonl"))])
    tiny_rows(tmp_path)
    recipe = tiny_recipe(tmp_path / "rows.jsonl", world_size_expected=2)
    with pytest.raises(RecipeError, match="expects 2 process.es. and 1 run. Use: torchrun"):
        main([str(recipe)])


def test_tokenizer_rows_train_the_tokenizer(recipe):
    """Without them, a word that only a later stage uses would be split into bytes."""
    rows = [{"image": f"{i}.png", "query": "extraordinary ?", "target": "yes"} for i in range(8)]
    later = write_rows(recipe.parent / "later.jsonl", rows)
    lengths = []
    for files in ([], [str(later)]):
        overrides = (
            f"model.tokenizer_rows={files}",
            "model.vocab_size=400",
            "training.max_steps=1",
        )
        tokenizer = main([str(recipe), *overrides]).processing_class.tokenizer
        lengths.append(len(tokenizer.tokenize("extraordinary")))
    assert lengths[0] > 8 and lengths[1] == 1


@pytest.mark.parametrize("key", ["checkpoint", "text_encoder"])
def test_train_command_names_a_missing_model(recipe, key):
    with pytest.raises(RecipeError, match=rf"model.{key}: cannot load nowhere/at-all as a folder"):
        main([str(recipe), f"model.{key}=nowhere/at-all"])


def test_training_from_a_checkpoint_starts_at_its_loss(overfit, recipe):
    again = yaml.safe_load(recipe.read_text())
    again["model"] = {"checkpoint": str(recipe.parent / "overfit")}
    path = recipe.parent / "again.yaml"
    path.write_text(yaml.safe_dump(again))
    trainer = run(path, "max_steps=1")
    assert losses(trainer)[0] < 0.05
    assert {p.requires_grad for p in trainer.model.x_encoder.parameters()} == {False}
    assert losses(run(recipe, "max_steps=1"))[0] > 1.5  # positive control: a new model
