"""The token baseline: trained from a VL-JEPA's recipe by the same trainer, and measured."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from eval.likelihood import LIKELIHOODS
from eval.models import TokenModelError, load_model
from eval.task import Task
from eval.tasks import captioning, classification
from modeling_vljepa import VLJEPATokenModel
from tests.tiny import (
    DECODER,
    noise,
    tiny_batch,
    tiny_processor,
    tiny_recipe,
    tiny_token_model,
    tiny_tokenizer,
    write_rows,
)
from training import train
from training.arguments import RecipeError
from training.data.collator import to_pixel_values
from training.data.mixture import MixtureSampler
from training.data.sources import read_source
from training.hub.publishing import load_trained
from training.loop.run import read_data
from training.loop.speed import training_flops
from training.loop.trainer import VLJEPATrainer
from training.model.recipe_model import start_model
from training.token_baseline import main
from training.tokens.model import start_token_model
from training.tokens.recipe import read_recipe
from training.tokens.trainer import HybridCollator, TokenCollator, TokenTrainer

WORDS = ("red", "green", "blue", "black", "white", "a cat", "a dog", "a bike")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with one batch: eight images of noise, each with its own target."""
    folder = tmp_path_factory.mktemp("tokens")
    for number, picture in enumerate(noise(8, 40, 40, 3)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "query": ("what ?", "what is it ?")[number % 2], "target": word}
        for number, word in enumerate(WORDS)
    ]
    return tiny_recipe(write_rows(folder / "rows.jsonl", rows), global_batch_size=8, max_steps=2)


def start(recipe: Path, *overrides: str):
    read = read_recipe(str(recipe), overrides)
    sources = [read_source(source) for source in read.data.sources]
    return read, sources, *start_token_model(read, sources)


def changed(recipe: Path, name: str, **sections: dict) -> Path:
    """Write a copy of the recipe whose sections have other keys."""
    content = yaml.safe_load(recipe.read_text())
    for section, keys in sections.items():
        content[section] |= keys
    path = recipe.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained language model of the Predictor's shape with a vocabulary of 300 tokens."""
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(5)
    settings = DECODER | {"num_hidden_layers": 3, "tie_word_embeddings": True}
    settings.pop("model_type")
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- the model -------------------------------------------------------------------------------


def test_token_model_starts_from_the_weights_of_the_recipes_vljepa(recipe):
    read, sources, model, _ = start(recipe)
    base, _ = start_model(read, sources)
    assert model.config.predictor_config.num_hidden_layers == 4
    assert base.config.predictor_config.num_hidden_layers == 2
    own, given = model.state_dict(), base.state_dict()
    shared = [name for name in given if name.startswith("x_encoder.") or "projection" in name]
    shared = [name for name in shared if name in own]
    assert "predictor.visual_projection.weight" in shared and len(shared) > 20
    assert all(torch.equal(own[name], given[name]) for name in shared)
    assert not any(name.startswith(("y_", "predictor_head")) for name in own)
    frozen = {name.split(".")[0] for name, w in model.named_parameters() if not w.requires_grad}
    assert frozen == {"x_encoder"}


def test_hybrid_starts_with_the_y_encoder_of_the_recipes_vljepa(recipe):
    read, sources, model, _ = start(recipe, "training.token_loss_weight=0.5")
    own, given = model.state_dict(), start_model(read, sources)[0].state_dict()
    parts = ("y_encoder.", "y_head.", "predictor_head.", "logit_scale.")
    names = [name for name in given if name.startswith(parts)]
    assert len(names) > 10
    assert all(torch.equal(own[name], given[name]) for name in names)


def test_token_model_has_all_weights_of_a_pretrained_language_model(
    recipe, language_model, tmp_path
):
    with pytest.raises(RecipeError, match="has another tokenizer than the recipe's Predictor: "):
        start(recipe, f"model.language_model={language_model}")
    language_model = Path(shutil.copytree(language_model, tmp_path / "language_model"))
    start(recipe)[3].tokenizer.save_pretrained(language_model)
    _, _, model, _ = start(recipe, f"model.language_model={language_model}")
    pretrained = LlamaForCausalLM.from_pretrained(language_model).state_dict()
    own = model.predictor.backbone.state_dict()
    assert own.keys() == pretrained.keys()
    assert all(torch.equal(own[name], pretrained[name]) for name in own)
    assert model.config.backbones["predictor"] == language_model.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={r: 4}"], "^model.lora: the token baseline trains its whole language model"),
        (["training.token_loss_weight=0"], "^training.token_loss_weight: it is 0.0; give more"),
        (["training.token_loss_weight=1.5"], "^training.token_loss_weight: it is 1.5; give more"),
        (
            ["training.gradient_cache_rows=3"],
            "^training.gradient_cache_rows: .* training.gradient_accumulation_steps=3",
        ),
        (["training.push_to_hub=true"], "^training.push_to_hub: model cards describe a VL-JEPA"),
        (
            ["model.config.backbones={predictor: smollm}"],
            "^model.language_model: the recipe's Predictor has layers of smollm; give",
        ),
        (
            ["model.config.predictor_config.hidden_size=64", "model.language_model={lm}"],
            "^model.language_model: .* has hidden_size 32, but the recipe's Predictor has 64",
        ),
    ],
)
def test_token_baseline_names_settings_that_it_cannot_follow(
    recipe, language_model, overrides, message
):
    with pytest.raises(RecipeError, match=message):
        start(recipe, *(each.replace("{lm}", str(language_model)) for each in overrides))


# -- batches and the loss ----------------------------------------------------------------------


def test_token_collator_adds_ended_targets_and_reads_no_y_encoder():
    processor = tiny_processor()
    samples = [
        {
            "frames": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            "clip_id": text,
            "query": "what ?",
            "target": text,
            "target_id": 0,
            "group_id": 0,
            "negatives": [],
        }
        for text in ("red", "he rides a bike")
    ]
    batch = TokenCollator(processor)(samples)
    tokens = processor.tokenizer(["red", "he rides a bike"], add_special_tokens=False)["input_ids"]
    padding = [-100] * (len(tokens[1]) - len(tokens[0]))
    assert batch["labels"].tolist() == [[*tokens[0], 2, *padding], [*tokens[1], 2]]
    assert "target_input_ids" not in batch
    assert "target_input_ids" in HybridCollator(processor)(samples)


def trainer_of(recipe: Path, *overrides: str) -> TokenTrainer:
    return main([str(recipe), *overrides])


def lines_of(trainer: TokenTrainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_first_loss_of_the_trainer_is_the_causal_language_models(recipe):
    """The trainer's batches through transformers' own model and loss, without padding."""
    read, sources, model, processor = start(recipe)
    dataset, collator = read_data(read, model, processor, sources, TokenCollator)
    mixture = MixtureSampler(dataset.buckets, batch_size=8, num_batches=1, seed=read.training.seed)
    batch = collator(dataset.__getitems__(next(iter(mixture))).samples)
    llama = LlamaForCausalLM(model.predictor.backbone.config).eval()
    llama.load_state_dict(model.predictor.backbone.state_dict())
    pixels = to_pixel_values(batch["frames"], processor.video_processor)
    visual = model.eval().predictor.visual_projection(model.encode_video(pixels)).detach()
    total, count = 0.0, 0
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for row in range(8):
        text = batch["labels"][row][batch["labels"][row] != -100]
        ids = torch.cat([batch["input_ids"][row][mask[row] == 1], text])
        joined = torch.cat([visual[row], llama.get_input_embeddings()(ids)])[None]
        labels = torch.full((1, joined.shape[1]), -100)
        labels[0, -len(text) :] = text
        total += llama(inputs_embeds=joined, labels=labels).loss.item() * len(text)
        count += len(text)
    trainer = trainer_of(recipe, "training.max_steps=1")
    assert lines_of(trainer)[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_hybrid_loss_is_the_weighted_sum_of_both(recipe):
    folder = recipe.parent / "hybrid"
    trainer = trainer_of(recipe, "training.token_loss_weight=0.25", f"training.output_dir={folder}")
    for line in lines_of(trainer):
        expected = 0.25 * line["token_loss"] + 0.75 * line["embedding_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["embedding_chance_loss"] == pytest.approx(math.log(8), abs=1e-5)
    # Saved, loaded and trained further, with the same recipe.
    further = changed(recipe, "further", processor={"image_size": None})
    content = yaml.safe_load(further.read_text())
    content["model"] = {"checkpoint": str(folder)}
    further.write_text(yaml.safe_dump(content))
    options = ["training.token_loss_weight=0.25", f"training.output_dir={folder}2"]
    later = trainer_of(further, *options, "training.precision=bf16", "training.max_steps=1")
    assert lines_of(later)[0]["loss"] < lines_of(trainer)[0]["loss"]
    assert next(later.model.x_encoder.parameters()).dtype == torch.bfloat16
    assert later.model.dtype == torch.float32
    with pytest.raises(RecipeError, match="is a hybrid; give less than 1"):
        start(further)
    with pytest.raises(RecipeError, match="predicts tokens; train it with training.token_baseline"):
        VLJEPATrainer.check(later.model, later.args)
    with pytest.raises(TokenModelError, match="^--model: .* predicts tokens, and model cards"):
        load_trained(str(folder))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("training.train", "training.token_baseline"),
        ("training.train", "hybrid"),
        ("training.token_baseline", "training.train"),
        ("hybrid", "training.train"),
    ],
)
def test_resume_refuses_a_checkpoint_of_another_command(recipe, tmp_path, first, second):
    options = [f"training.output_dir={tmp_path}", "training.save_strategy=steps"]
    options += ["training.save_steps=1", "training.max_steps=1"]
    started = {
        "training.train": train.main,
        "training.token_baseline": main,
        "hybrid": lambda given: main([*given, "training.token_loss_weight=0.5"]),
    }
    started[first]([str(recipe), *options])
    names = [name.replace("hybrid", "training.token_baseline") for name in (first, second)]
    message = "checkpoint-1 is a checkpoint of {}, which {} cannot continue. Give one of {}"
    options.append("training.max_steps=2")
    for resume in ("true", tmp_path / "checkpoint-1"):
        with pytest.raises(RecipeError, match=message.format(*names, names[1])):
            started[second]([str(recipe), *options, f"training.resume_from_checkpoint={resume}"])


def test_resume_refuses_a_hybrid_for_the_baseline(recipe, tmp_path):
    options = [f"training.output_dir={tmp_path}", "training.save_strategy=steps"]
    options += ["training.save_steps=1", "training.resume_from_checkpoint=true"]
    trainer_of(recipe, *options, "training.token_loss_weight=0.5", "training.max_steps=1")
    with pytest.raises(RecipeError, match="token_loss_weight is 1.0 and was 0.5. Set them back"):
        trainer_of(recipe, *options)


def test_gradient_accumulation_keeps_the_mean_over_the_tokens_of_a_step(recipe):
    steps = "training.gradient_accumulation_steps="
    overrides = ["training.max_steps=1", f"training.output_dir={recipe.parent / 'parts'}"]
    whole, parts = (lines_of(trainer_of(recipe, *overrides, f"{steps}{n}"))[0] for n in (1, 4))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["token_loss"] == pytest.approx(whole["token_loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_training_flops_counts_the_targets_and_the_output_layer():
    model, batch = tiny_token_model(), tiny_batch()
    inputs = {name: batch[name] for name in ("pixel_values_videos", "input_ids")}
    inputs["labels"] = torch.zeros(3, 6, dtype=torch.long)
    visual, length = 8, 8 + 5 + 6
    sizes = {n: p.numel() for n, p in model.predictor.named_parameters() if p.ndim == 2}
    layers = sum(size for name, size in sizes.items() if "embed" not in name) - 32 * 300
    # Forward, gradient of the activations, gradient of the weights; attention is twice two
    # products, of 4 heads of 8 dimensions in 4 layers.
    expected = 3 * 2 * 3 * length * layers
    expected += 3 * 2 * 3 * (length - visual + 1) * 32 * 300
    expected += 3 * 2 * 2 * 4 * 3 * length * length * 32
    # The X-Encoder is frozen.
    products = (torch.nn.Linear, torch.nn.Conv3d)
    encoder = [m.weight.numel() for m in model.x_encoder.modules() if isinstance(m, products)]
    expected += 2 * 3 * visual * sum(encoder) + 2 * 2 * 2 * 3 * visual * visual * 48
    assert training_flops(model, inputs) == expected


# -- commands that need a VL-JEPA ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    folder = recipe.parent / "trained"
    trainer_of(recipe, f"training.output_dir={folder}", "training.max_steps=1")
    entry = "found: {task: retrieval, description: d, rows: rows.jsonl}"
    (recipe.parent / "retrieval.yaml").write_text(entry)
    decoder = {
        "model": {"checkpoint": str(folder), "config": {"decoder_config": {"hidden_size": 32}}},
        "data": {"sources": [{"rows": str(recipe.parent / "rows.jsonl")}]},
        "training": {"output_dir": str(recipe.parent / "decoder"), "max_steps": 1, "use_cpu": True},
    }
    (recipe.parent / "decoder.yaml").write_text(yaml.safe_dump(decoder))
    return folder


@pytest.mark.parametrize(
    ("command", "key", "purpose"),
    [
        ("training.export --model trained --output new", "--model", "the two towers are"),
        ("training.publish --model trained --repo a/b --output new", "--model", "model cards"),
        ("training.train_decoder decoder.yaml", "model.checkpoint", "a Y-Decoder decodes"),
        (
            "training.mlp_baseline trained --features f --benchmarks retrieval.yaml --validation "
            "retrieval.yaml",
            "MODEL",
            "the MLP predicts embeddings",
        ),
        ("eval.watch --model trained --source 0.mp4 --candidates a b", "--model", "captions are"),
        ("experiments.variants trained --output new", "source", "variants change a VL-JEPA"),
    ],
    ids=lambda value: value.split()[0],
)
def test_commands_of_a_vljepa_refuse_a_token_model(trained, monkeypatch, command, key, purpose):
    monkeypatch.chdir(trained.parent)
    name, *words = command.split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__")
    path = str(trained) if name == "training.train_decoder" else "trained"
    assert stopped.value.code.startswith(f"error: {key}: {path} predicts tokens, and {purpose}")
    assert stopped.value.code.endswith("; give a model of training.train.")
    assert not (trained.parent / "new").exists()


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_token_baseline_learns_and_is_measured_by_the_same_tasks(recipe):
    folder = recipe.parent / "learnt"
    rows = recipe.parent / "rows.jsonl"
    trainer = trainer_of(
        recipe,
        f"training.output_dir={folder}",
        "training.max_steps=80",
        "training.learning_rate=5.0e-3",
        "training.lr_scheduler_type=constant",
    )
    losses = [line["loss"] for line in lines_of(trainer)]
    assert losses[0] > 4 and losses[-1] < 0.05
    model, processor = load_model(str(folder))
    assert type(model) is VLJEPATokenModel
    labels = classification.ClassificationBenchmark(
        name="labels", task="classification", rows=rows, description="L."
    )
    for form in LIKELIHOODS:
        result = classification.evaluate(Task(model, processor, labels, likelihood=form))
        assert result.scores["top-1"].value == 1
    # Without the pixels it is at chance: it has not learnt the order of the rows.
    blind = classification.evaluate(Task(model, processor, labels, ablation="grey"))
    assert blind.scores["top-1"].value <= 0.5
    odd = write_rows(
        rows.with_name("odd.jsonl"),
        [json.loads(line) for line in rows.read_text().splitlines()][1::2],
    )
    captions = captioning.CaptioningBenchmark("captions", "captioning", odd, "C.")
    result = captioning.evaluate(Task(model, processor, captions))
    assert result.scores["exact match"].value == 1
