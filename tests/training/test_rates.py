"""Each part of a model has its learning rate, its first step and its clipping."""

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import tiny_model, tiny_recipe, tiny_rows
from training import train as command
from training.arguments import RecipeError, read_recipe
from training.loop.rates import layer_of, learning_rates, part_of
from training.model.adapters import add_adapters
from training.train import main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tiny_rows(tmp_path_factory.mktemp("rates")), max_steps=4)


def arguments(recipe, **changes):
    overrides = [f"training.{name}={value}" for name, value in changes.items()]
    return read_recipe(str(recipe), overrides).training


@pytest.mark.parametrize(
    ("name", "part", "layer"),
    [
        ("x_encoder.backbone.encoder.layer.3.attention.query.weight", "x_encoder", 3),
        ("x_encoder.backbone.encoder.embeddings.patch_embeddings.proj.bias", "x_encoder", -1),
        ("x_encoder.backbone.encoder.layernorm.weight", "x_encoder", None),
        ("predictor.backbone.layers.11.mlp.up_proj.weight", "predictor", 11),
        ("predictor.backbone.embed_tokens.weight", "predictor", -1),
        ("base_model.model.predictor.backbone.layers.0.mlp.up_proj.lora_A.default.weight",
         "predictor", 0),
        ("predictor.backbone.norm.weight", "predictor", None),
        ("predictor.visual_projection.weight", "new", None),
        ("base_model.model.y_head.modules_to_save.default.projection.weight", "new", None),
        ("y_encoder.backbone.layers.2.norm.weight", "y_encoder", 2),
        ("y_encoder.dense.0.weight", "y_encoder", None),
        ("logit_scale.weight", "loss", None),
    ],
)  # fmt: skip
def test_part_of_and_layer_of_read_names_with_and_without_adapters(name, part, layer):
    assert (part_of(name), layer_of(name)) == (part, layer)


def test_learning_rates_fall_from_the_last_layer_to_the_embeddings(recipe):
    args = arguments(
        recipe, learning_rate=1.0, new_learning_rate_scale=10, layer_decay=0.5,
        text_learning_rate_scale=0.1, vision_learning_rate_scale=0.2,
    )  # fmt: skip
    model = tiny_model(freeze_vision=False)
    found = learning_rates([name for name, _ in model.named_parameters()], args)
    assert found["predictor.visual_projection.weight"] == 10
    assert found["y_head.projection.bias"] == found["predictor_head.projection.weight"] == 10
    assert found["logit_scale.weight"] == found["predictor.backbone.norm.weight"] == 1
    assert found["predictor.backbone.layers.1.self_attn.q_proj.weight"] == 1
    assert found["predictor.backbone.layers.0.self_attn.q_proj.weight"] == 0.5
    assert found["predictor.backbone.embed_tokens.weight"] == 0.25
    assert found["y_encoder.backbone.layers.0.mlp.up_proj.weight"] == pytest.approx(0.05)
    patches = "x_encoder.backbone.encoder.embeddings.patch_embeddings.proj.weight"
    assert found[patches] == pytest.approx(0.05)


def test_learning_rates_of_adapters_are_those_of_their_layers(recipe):
    args = arguments(recipe, learning_rate=1.0, layer_decay=0.5, new_learning_rate_scale=3)
    adapted = add_adapters(tiny_model(), {"r": 2})
    rates = learning_rates([name for name, _ in adapted.named_parameters()], args)
    trained = {name: rates[name] for name, p in adapted.named_parameters() if p.requires_grad}
    for name, rate in trained.items():
        if "lora_" in name:
            assert rate == (0.5 if ".layers.0." in name else 1.0), name
        elif "visual_projection" in name or "_head" in name:
            assert rate == 3.0, name
    assert sum("lora_" in name for name in trained) > 10


def test_new_parts_alone_moves_only_new_parts_in_its_steps(recipe):
    """The share of its rate that each group has in each step, and the weights after the steps."""
    rates, weights = [], []

    def watch(trainer):
        step = trainer.optimizer.step

        def stepped(*args, **kwargs):
            groups = trainer.optimizer.param_groups
            rates.append({group["new"]: group["lr"] / group["initial_lr"] for group in groups})
            step(*args, **kwargs)
            weights.append(
                {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            )

        trainer.optimizer.step = stepped

    run(recipe, watch, new_parts_alone=2, warmup_steps=2, max_steps=5, learning_rate=0.01,
        lr_scheduler_type="constant_with_warmup")  # fmt: skip
    assert [each[True] for each in rates] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [each[False] for each in rates] == pytest.approx([0, 0, 0, 0.5, 1])
    changed = {name for name, p in weights[0].items() if not torch.equal(p, weights[2][name])}
    assert {part_of(name) for name in changed} == {"new"}
    changed = {name for name, p in weights[2].items() if not torch.equal(p, weights[4][name])}
    assert {part_of(name) for name in changed} == {"new", "predictor", "y_encoder", "loss"}


def run(recipe, watch, **changes):
    """Train, and call `watch` with the trainer when it has an optimizer."""

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            watch(self.trainer)

    build = command.build_trainer

    def watched(*args, **kwargs):
        trainer = build(*args, **kwargs)
        callback = Watch()
        callback.trainer = trainer
        trainer.add_callback(callback)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "build_trainer", watched)
        return main([str(recipe), *(f"training.{name}={value}" for name, value in changes.items())])


def test_clip_by_part_clips_each_part_by_itself(recipe):
    norms = []

    def watch(trainer):
        clip = trainer._clip_grad_norm

        def clipped(model):
            before = by_part(model)
            total = clip(model)
            norms.append((before, float(total), by_part(model)))
            return total

        trainer._clip_grad_norm = clipped

    def by_part(model):
        squares = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                part = part_of(name)
                squares[part] = squares.get(part, 0) + parameter.grad.square().sum().item()
        return {part: square**0.5 for part, square in squares.items()}

    for by_itself in (True, False):
        norms.clear()
        run(recipe, watch, clip_by_part=by_itself, max_grad_norm=0.01, max_steps=1)
        ((before, total, after),) = norms
        whole = sum(norm**2 for norm in before.values()) ** 0.5
        assert total == pytest.approx(whole, rel=1e-4)
        for part, norm in before.items():
            least = min(norm, 0.01) if by_itself else norm * 0.01 / whole
            assert after[part] == pytest.approx(least, rel=1e-3), part


def test_new_parts_alone_continues_after_a_checkpoint(recipe, tmp_path):
    settings = {"new_parts_alone": 2, "max_steps": 4, "learning_rate": 0.01}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": "null"}
    whole = run(recipe, lambda trainer: None, **settings, output_dir=tmp_path / "run")
    again = run(
        recipe, lambda trainer: None, **settings, output_dir=tmp_path / "again",
        resume_from_checkpoint=tmp_path / "run" / "checkpoint-1",
    )  # fmt: skip
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_decay": 0}, "layer_decay: it is 0.0; give more than 0, at most 1"),
        ({"layer_decay": 1.5}, "layer_decay: it is 1.5"),
        ({"new_parts_alone": 4}, "new_parts_alone: it is 4; give a whole number of steps below"),
        ({"new_parts_alone": 1.5}, "new_parts_alone: it is 1.5"),
        ({"new_parts_alone": 1, "lr_scheduler_type": "greedy"}, "greedy has no steps to wait for"),
        ({"new_learning_rate_scale": -1}, "new_learning_rate_scale: it is -1.0"),
    ],
)
def test_rates_that_cannot_be_followed_are_refused(recipe, changes, words):
    with pytest.raises(RecipeError, match=words):
        arguments(recipe, **changes)
