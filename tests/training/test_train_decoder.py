"""Training a Y-Decoder changes only the decoder and saves the whole checkpoint."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import ConcatDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from eval.embed import embed_texts
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel, decode_texts
from processing import VLJEPAProcessor
from tests.tiny import (
    DECODER,
    tiny_model,
    tiny_processor,
    tiny_rows,
    tiny_tokenizer,
    tiny_writer,
    write_rows,
)
from training.arguments import RecipeError
from training.decoder.model import with_decoder
from training.decoder.recipe import DecoderDataArguments, DecoderModelArguments, read_recipe
from training.decoder.texts import (
    DecoderCollator,
    EmbeddedTexts,
    embedded_texts,
    on_the_sphere,
    predicted_texts,
    read_source,
    training_texts,
)
from training.train_decoder import main

ROOT = Path(__file__).parents[2]
SIZES = {name: DECODER[name] for name in ("hidden_size", "intermediate_size", "head_dim")}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The output folder of a training, next to rows with their media."""
    folder = tmp_path / "trained"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "recipes.yaml").write_text(yaml.safe_dump([{"model": {"checkpoint": "before"}}]))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0}]}))
    tiny_rows(tmp_path)
    return folder


def recipe(checkpoint: Path, **changes: dict) -> Path:
    """Write a recipe next to the checkpoint; `changes` by section."""
    folder = checkpoint.parent
    sections = {
        "model": {
            "checkpoint": str(checkpoint),
            "config": {"decoder_config": {**SIZES, **LAYERS}, "decoder_prefix_tokens": 2},
        },
        "data": {"sources": [{"rows": str(folder / "rows.jsonl")}]},
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 60,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "use_cpu": True,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
        },
    }
    for name, section in changes.items():
        sections[name] = sections[name] | section
    path = folder / "decoder.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


# -- the command -----------------------------------------------------------------------------


def test_train_decoder_adds_a_decoder_and_changes_nothing_else(checkpoint, capsys):
    path = recipe(
        checkpoint, data={"validation": [{"rows": str(checkpoint.parent / "rows.jsonl")}]}
    )
    trainer = main([str(path), "training.eval_strategy=steps", "training.eval_steps=30"])
    out = checkpoint.parent / "out"
    model, info = VLJEPAForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    before = VLJEPAModel.from_pretrained(checkpoint)
    state = before.state_dict()
    assert all(
        torch.equal(state[name], weight) for name, weight in model.vljepa.state_dict().items()
    )

    # The decoder reproduces the texts that the Y-Encoder embeds.
    processor = VLJEPAProcessor.from_pretrained(out)
    texts = ["a cat", "red", "he rides a bike", "the door opens"]
    embeds = embed_texts(model.vljepa, processor, texts)
    assert decode_texts(model, processor, embeds) == texts
    assert model.config.backbones == {} and model.config.decoder_prefix_tokens == 2
    # Parameters that were trainable before are trainable in the loaded model.
    trains = {name for name, weight in before.named_parameters() if weight.requires_grad}
    found = {n for n, weight in model.vljepa.named_parameters() if weight.requires_grad}
    assert found == trains and trains

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.05 < losses[0]
    log = json.loads((out / "decoder_trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [30, 60, 60]
    stages = yaml.safe_load((out / "recipes.yaml").read_text())
    assert stages == [
        {"model": {"checkpoint": "before"}},
        yaml.safe_load(path.read_text()) | {"training": stages[1]["training"]},
    ]
    assert json.loads((out / "trainer_state.json").read_text())["log_history"] == [{"loss": 1.0}]
    printed = capsys.readouterr().out
    assert "4 embeddings of texts, 4 of validation clips" in printed
    assert "1 process(es) on cpu · fp32 compute" in printed
    assert "loss on predicted embeddings of validation clips" in printed


def test_pretrained_decoder_keeps_its_weights_and_tokenizer(checkpoint, tmp_path):
    own = tiny_tokenizer(("she reads a book",), vocab_size=270)
    language_model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**DECODER | {"vocab_size": len(own)})
    )
    language_model.save_pretrained(tmp_path / "language_model")
    own.save_pretrained(tmp_path / "language_model")
    source = str(tmp_path / "language_model")
    with pytest.raises(RecipeError, match="model.decoder: cannot load gone as a folder or Hub id"):
        with_decoder(DecoderModelArguments(checkpoint=str(checkpoint), decoder="gone"), seed=0)
    model, processor = with_decoder(
        DecoderModelArguments(checkpoint=str(checkpoint), decoder=source), seed=0
    )
    state = language_model.state_dict()
    assert all(torch.equal(state[n], w) for n, w in model.y_decoder.backbone.state_dict().items())
    assert model.config.backbones["decoder"] == "language_model"
    assert processor.text_tokenizer("book")["input_ids"] == own("book")["input_ids"]
    names = {name.split(".")[0] for name, w in model.named_parameters() if w.requires_grad}
    assert names == {"y_decoder"}

    changes = {"checkpoint": str(checkpoint), "decoder": source, "config": {}}
    main([str(recipe(checkpoint, model=changes)), "training.max_steps=40"])
    out = tmp_path / "out"
    processor = VLJEPAProcessor.from_pretrained(out)
    model = VLJEPAForConditionalGeneration.from_pretrained(out)
    assert processor.text_tokenizer("book")["input_ids"] == own("book")["input_ids"]
    texts = ["a cat", "the door opens"]
    assert decode_texts(model, processor, embed_texts(model.vljepa, processor, texts)) == texts


def test_with_decoder_continues_the_checkpoints_decoder(tmp_path):
    model, processor = tiny_writer(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = with_decoder(DecoderModelArguments(checkpoint=str(tmp_path)), seed=0)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in again.state_dict().items())
    fresh, _ = with_decoder(
        DecoderModelArguments(checkpoint=str(tmp_path), config={"decoder_config": SIZES | LAYERS}),
        seed=1,
    )
    name = "y_decoder.prefix_projection.weight"
    assert not torch.equal(fresh.state_dict()[name], state[name])
    same = {"decoder_prefix_tokens": model.config.decoder_prefix_tokens}
    with_decoder(DecoderModelArguments(checkpoint=str(tmp_path), config=same), seed=0)
    other = same | {"decoder_reads_previous": True}
    with pytest.raises(
        RecipeError, match="decoder_reads_previous: .*decoder has False, which cannot"
    ):
        with_decoder(DecoderModelArguments(checkpoint=str(tmp_path), config=other), seed=0)


def test_train_decoder_resumes_a_killed_run_from_its_default_checkpoint(
    checkpoint, tmp_path, monkeypatch
):
    path = recipe(checkpoint, data={"noise": 0.5})
    content = yaml.safe_load(path.read_text())
    del content["training"]["save_strategy"]
    path.write_text(yaml.safe_dump(content))
    arguments = [str(path), "training.max_steps=10", "training.logging_steps=1"]
    expected = main(arguments).model.state_dict()
    shutil.rmtree(tmp_path / "out")
    step = Trainer.training_step

    def killed(trainer: Trainer, *given) -> torch.Tensor:
        if trainer.state.global_step == 7:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-6"]
    resumed = main([*arguments, "training.resume_from_checkpoint=true"])
    losses = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [*range(1, 11)]
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_train_decoder_resumes_with_more_steps_and_refuses_another_batch(
    checkpoint, tmp_path, monkeypatch, capsys
):
    path = str(recipe(checkpoint, training={"max_steps": 4, "logging_steps": 1}))
    saves = ["training.save_strategy=steps", "training.save_steps=4"]
    whole = main([path, "training.max_steps=8", f"training.output_dir={tmp_path}/whole"])
    main([path, *saves])
    resume = [path, "training.resume_from_checkpoint=true"]
    capsys.readouterr()
    longer = main([*resume, "training.max_steps=8"])
    rates = [
        [line["learning_rate"] for line in run.state.log_history if "learning_rate" in line]
        for run in (whole, longer)
    ]
    assert len(rates[1]) == 8 and rates[1][4:] == pytest.approx(rates[0][4:])
    assert (
        "other settings than before: training.max_steps is 8 and was 4" in capsys.readouterr().out
    )

    rows = str(tmp_path / "rows.jsonl")
    monkeypatch.setattr("training.train_decoder.with_decoder", lambda *_: pytest.fail("too late"))
    for override, message in (
        ("training.per_device_train_batch_size=2", "per_device_train_batch_size is 2 and was 4"),
        ("training.seed=1", "training.seed is 1 and was 42"),
        ("data.embeddings=both", "data.embeddings is both and was text"),
        (f"data.sources=[{{rows: {rows}, repeat: 2}}]", r"data.sources\[0\].repeat is 2 and was 1"),
    ):
        with pytest.raises(RecipeError, match=f"checkpoint-4 cannot continue with .*{message}"):
            main([*resume, override])


def test_train_decoder_gives_the_same_losses_for_the_same_seed(checkpoint):
    path = recipe(checkpoint, data={"noise": 0.5})

    def losses(*overrides: str) -> list[float]:
        trainer = main([str(path), "training.max_steps=3", "training.logging_steps=1", *overrides])
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    first = losses()
    assert losses() == first and len(first) == 3
    assert losses("training.seed=1") != first


# -- the data --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_on_the_sphere_adds_noise_of_the_given_length(noise):
    torch.manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(500, 384), dim=1)
    moved = on_the_sphere(embeds, noise)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(500))
    cosines = (moved * embeds).sum(dim=1)
    assert cosines.mean().item() == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.01)


def test_embedded_texts_are_distinct_and_predicted_texts_are_per_row(tmp_path):
    model, processor = tiny_writer(decoder_reads_query=True), tiny_processor()
    rows = [
        {"query": query, "target": target, "image": "wide.png"}
        for query, target in [("what ?", "red"), ("who ?", "red"), ("what ?", "red")]
    ]
    tiny_rows(tmp_path)
    rows = [row | {"image": str(tmp_path / row["image"])} for row in rows]
    texts = embedded_texts(model, processor, rows, noise=0.5)
    assert [(text["context"], text["text"]) for text in texts] == [
        ("what ?\n", "red"),
        ("who ?\n", "red"),
    ]
    expected = embed_texts(model.vljepa, processor, ["red"])[0]
    # A batch of two texts and one of one: other matrix products, and so another last bit.
    torch.testing.assert_close(texts.embeds, expected.expand(2, -1), rtol=0, atol=1e-6)
    assert not torch.equal(texts[0]["embeds"], texts[0]["embeds"])  # new noise at each access
    [clips] = predicted_texts(model, processor, [rows])
    assert len(clips) == 3
    pixels = processor(images=rows[0]["image"], text="who ?")
    torch.testing.assert_close(
        clips[1]["embeds"], model.vljepa.predict(**pixels)[0], atol=1e-5, rtol=0
    )
    model.config.decoder_reads_query = False
    model.config.decoder_reads_previous = True
    rows[1]["previous"] = "the door opens"
    texts = embedded_texts(model, processor, rows, noise=0.0)
    assert texts.contexts == ["\n", "the door opens\n"]


def texts_of(model, processor, arguments: DecoderDataArguments) -> ConcatDataset:
    rows = [read_source(source, arguments.max_bad_share) for source in arguments.sources]
    return training_texts(model, processor, arguments, rows)


def test_training_texts_repeat_a_source(tmp_path):
    model, processor = tiny_writer(), tiny_processor()
    tiny_rows(tmp_path)
    sources = [{"rows": str(tmp_path / "rows.jsonl"), "repeat": 3}]
    write_rows(tmp_path / "more.jsonl", [{"image": "wide.png", "target": "he rides a bike"}])
    sources.append({"rows": str(tmp_path / "more.jsonl")})
    texts = texts_of(model, processor, DecoderDataArguments(sources=sources))
    seen = Counter(sample["text"] for sample in texts)
    assert seen == {"a cat": 3, "red": 3, "he rides a bike": 3 + 1, "the door opens": 3}


def test_training_texts_read_a_shared_clip_once(tmp_path, capsys, monkeypatch):
    model, processor = tiny_writer(), tiny_processor()
    tiny_rows(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    captions = [{"image": "wide.png", "target": "a cat"}, {"image": "broken.png", "target": "red"}]
    answers = [{"image": name, "target": "red"} for name in ("broken.png", "tall.jpg", "wide.png")]
    write_rows(tmp_path / "captions.jsonl", captions)
    write_rows(tmp_path / "answers.jsonl", answers)
    seen = []
    encode_video = VLJEPAModel.encode_video
    monkeypatch.setattr(
        VLJEPAModel, "encode_video", lambda *args: seen.append(len(args[1])) or encode_video(*args)
    )
    sources = [
        {"rows": str(tmp_path / "captions.jsonl"), "query": "what ?", "repeat": 2},
        {"rows": str(tmp_path / "answers.jsonl"), "query": "who ?"},
    ]
    arguments = {"sources": sources, "embeddings": "predicted"}
    with pytest.raises(RecipeError, match="source 0: 1 of 2 rows .* at most 40.0% may"):
        texts_of(model, processor, DecoderDataArguments(max_bad_share=0.4, **arguments))
    assert sum(seen) == 2  # wide and tall
    assert capsys.readouterr().out.count("left out: ") == 1

    arguments = DecoderDataArguments(max_bad_share=0.5, **arguments)
    texts = texts_of(model, processor, arguments)
    # Each part contains its own source's rows, predicted with its own query.
    assert [sample["text"] for sample in texts] == ["a cat", "a cat", "red", "red"]
    for sample, (name, query) in zip(
        texts,
        [("wide.png", "what ?")] * 2 + [("tall.jpg", "who ?"), ("wide.png", "who ?")],
        strict=True,
    ):
        asked = processor(images=str(tmp_path / name), text=query)
        expected = model.vljepa.predict(**asked)[0]
        torch.testing.assert_close(sample["embeds"], expected, atol=1e-5, rtol=0)


def test_decoder_collator_adds_the_end_token():
    processor = tiny_processor()
    texts = EmbeddedTexts(torch.eye(24)[:2], ["what ?\n", "\n"], ["a cat", "the door opens"])
    batch = DecoderCollator(processor)([texts[0], texts[1]])
    assert torch.equal(batch["predicted_embeds"], torch.eye(24)[:2])
    for row, text in zip(batch["labels"], texts.texts, strict=True):
        tokens = row[row != -100].tolist()
        assert tokens[-1] == DECODER["eos_token_id"]
        assert processor.decode(tokens[:-1]) == text
    assert (batch["labels"][0] == -100).any()
    assert batch["context_attention_mask"][:, -1].tolist() == [1, 1]
    assert set(batch) == {
        "predicted_embeds",
        "labels",
        "context_input_ids",
        "context_attention_mask",
    }


# -- recipes ---------------------------------------------------------------------------------


def test_read_recipe_accepts_the_published_decoder_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "training/recipes/babyai_decoder.yaml"
    read = read_recipe(str(path), ["training.use_cpu=true", "training.precision=fp32"])
    assert read.data.noise > 0 and read.data.validation
    width = read.model.config["decoder_config"]["hidden_size"]
    assert read.model.config["decoder_prefix_tokens"] * width >= 384  # the model's embedding_dim


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.nose=1", "data.nose: no such key. Did you mean 'noise'"),
        ("data.noise=-1", "data.noise: it is -1.0; give 0 or more"),
        ("data.embeddings=words", "data.embeddings: 'words' is not one of text, predicted, both"),
        ("data.sources=[]", "data.sources: give at least one"),
        ("data.sources=[{row: a}]", r"data.sources\[0\].row: no such key"),
        ("data.sources=[{rows: gone.jsonl}]", "gone.jsonl: .*no such JSONL file"),
        ("data.sources=[{rows: a, repeat: 0}]", "data.sources: a.repeat: it is 0; give 1 or"),
        ("training.max_steps=0", "training.max_steps: it is 0; give 1 or more"),
        ("training.steps=1", "training.steps: no such key"),
        ("training.eval_strategy=steps", "data.validation: training.eval_strategy needs sources"),
        ("processor.num_frames=1", "processor: no such section"),
        (
            "model.config={freeze_text: true}",
            "model.config.freeze_text: only settings that begin with",
        ),
        ("model.config={decoder_prefix: 1}", "model.config.decoder_prefix: no such setting"),
        ("model.config={decoder_config: {width: 1}}", "decoder_config.width: no such setting"),
        ("model.config={}", "model.checkpoint: .*has no Y-Decoder"),
        ("model.decoder=gone", "model.config.decoder_config: it defines a new decoder"),
        ("model.config.decoder_prefix_tokens=0", "decoder_prefix_tokens: it is 0; give 1"),
        ("model.config.decoder_prefix_tokens=true", "prefix_tokens: .* expected int, got bool"),
        ("model.config.decoder_reads_query=maybe", "reads_query: .* expected bool, got str"),
        ("model.checkpoint=gone", "model.checkpoint: cannot load gone as a folder or Hub id"),
    ],
)
def test_train_decoder_names_a_wrong_key(checkpoint, override, message):
    with pytest.raises(RecipeError, match=message):
        main([str(recipe(checkpoint)), override])


def test_train_decoder_publishes_the_saved_folder(checkpoint, monkeypatch):
    sent = []

    def publish(folder: str, repo: str, **options: object) -> None:
        assert Path(folder, "processor_config.json").is_file()
        sent.append((folder, repo, options))

    def init_hf_repo(trainer: Trainer) -> None:
        trainer.hub_model_id = "me/decoder"

    monkeypatch.setattr("training.train_decoder.publish", publish)
    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    hub = {"push_to_hub": True, "hub_private_repo": True, "hub_token": "hf_x"}
    main([str(recipe(checkpoint, training={"max_steps": 1, **hub}))])
    folder = str(checkpoint.parent / "out")
    assert sent == [(folder, "me/decoder", {"private": True, "token": "hf_x"})]
    [run] = json.loads(Path(folder, "training_runs.json").read_text())
    assert (run["stage"], run["last_step"]) == ("out", 1)


def test_train_decoder_does_not_overwrite_the_checkpoint(checkpoint):
    with pytest.raises(
        RecipeError, match="training.output_dir: it is the folder of model.checkpoint"
    ):
        main([str(recipe(checkpoint)), f"training.output_dir={checkpoint}"])


def test_train_decoder_stops_at_an_unusable_row(checkpoint):
    write_rows(checkpoint.parent / "rows.jsonl", [{"image": "gone.png", "target": "red"}])
    with pytest.raises(RecipeError, match="rows.jsonl:1: image file is missing"):
        main([str(recipe(checkpoint))])
