"""Benchmarks of a model that predicts tokens: likelihoods of texts, and generated texts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks import measurable
from eval.candidates import compare
from eval.embed import grey_frame
from eval.embedding_store import EmbeddingStore
from eval.evaluate import main
from eval.likelihood import LIKELIHOODS
from eval.task import Benchmark, Task
from eval.tasks import captioning, classification
from modeling_vljepa import VLJEPATokenModel
from processing import VLJEPAProcessor, read_rows
from tests.tiny import tiny_model, tiny_processor, tiny_rows, tiny_token_model, write_rows

TEXTS = ["a cat", "red", "he rides a bike", "the door opens"]
KINDS = ("image", "video")
LABELS = classification.ClassificationBenchmark


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likelihood")
    tiny_rows(folder)
    return folder


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> VLJEPATokenModel:
    return tiny_token_model()


@pytest.fixture
def labels(data) -> LABELS:
    return LABELS(
        name="labels", task="classification", rows=data / "rows.jsonl", description="Labels."
    )


def log_likelihood(model, processor, pixels, query: str, text: str) -> float:
    """Return the sum over the text's tokens and the end token, from one forward pass."""
    labels = torch.tensor([[*processor.tokenizer(text, add_special_tokens=False)["input_ids"], 2]])
    read = processor(text=[query])
    with torch.no_grad():
        output = model(pixel_values_videos=pixels, input_ids=read["input_ids"], labels=labels)
    return -output.loss.item() * labels.shape[1]


def pixels_of(processor, row: dict) -> torch.Tensor:
    kind = "images" if "image" in row else "videos"
    return processor(**{kind: [row[kind[:-1]]]})["pixel_values_videos"]


@pytest.mark.parametrize("form", LIKELIHOODS)
def test_compare_equals_a_loop_of_single_forward_passes(model, processor, labels, form):
    task = Task(model, processor, labels, likelihood=form)
    rows = task.rows()
    predictions, scores = compare(task, rows, TEXTS, ["{}"])
    assert predictions.rows == rows
    lengths = [len(processor.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    grey = grey_frame(processor)
    frames = {kind: 1 if kind == "image" else 4 for row in rows for kind in row if kind in KINDS}
    assert len(frames) == 2
    for column, text in enumerate(TEXTS):
        priors = dict.fromkeys(frames, 0.0)
        for kind in frames if form == "ratio" else ():
            clip = grey.expand(-1, frames[kind], -1, -1, -1)
            found = [log_likelihood(model, processor, clip, row["query"], text) for row in rows]
            priors[kind] = math.log(np.exp(found).mean())
        for index, row in enumerate(rows):
            pixels = pixels_of(processor, row)
            prior = priors["image" if "image" in row else "video"]
            expected = log_likelihood(model, processor, pixels, row["query"], text) - prior
            if form == "mean":
                expected /= lengths[column] + 1  # the end token
            assert scores[index, column].item() == pytest.approx(expected, abs=2e-3)


def test_classification_by_likelihood_chooses_the_likeliest_label(model, processor, labels):
    task = Task(model, processor, labels)
    assert task.scoring == "mean"  # the lowest perplexity, as in the paper
    result = classification.evaluate(task)
    _, scores = compare(task, task.rows(), sorted(TEXTS), ["{}"])
    targets = [sorted(TEXTS).index(row["target"]) for row in task.rows()]
    right = (scores.argmax(dim=1) == torch.tensor(targets)).double().mean().item()
    assert result.scores["top-1"].value == right
    assert result.protocol["likelihood"] == "mean"
    assert result.protocol["likelihood_from"] == "the default, the paper's"


def test_compare_gives_texts_of_equal_tokens_one_score(model, processor, labels):
    task = Task(model, processor, labels)
    _, scores = compare(task, task.rows()[:2], [*TEXTS, *TEXTS], ["{}"])
    assert torch.equal(scores[:, :4], scores[:, 4:])


def test_compare_averages_the_likelihoods_of_templates(model, processor, labels):
    task = Task(model, processor, labels)
    rows = task.rows()[:1]
    _, both = compare(task, rows, TEXTS, ["{}", "a photo of {}"])
    each = [compare(task, rows, TEXTS, [text])[1] for text in ("{}", "a photo of {}")]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_stored_likelihoods_are_not_computed_again(model, processor, labels, tmp_path, monkeypatch):
    store = EmbeddingStore.open(tmp_path / "embeddings", {"model": "tiny"})
    rows = Task(model, processor, labels).rows()
    first = compare(Task(model, processor, labels, store=store), rows, TEXTS, ["{}"])[1]
    # Other candidates are computed.
    other = compare(Task(model, processor, labels, store=store), rows, TEXTS[:2], ["{}"])[1]
    assert other.shape == (4, 2)
    monkeypatch.setattr(model, "score_texts", lambda *_, **__: pytest.fail("computed again"))
    store = EmbeddingStore.open(tmp_path / "embeddings", {"model": "tiny"})
    again = compare(Task(model, processor, labels, store=store), rows, TEXTS, ["{}"])[1]
    torch.testing.assert_close(again, first)


def test_captioning_scores_the_texts_that_a_token_model_generates(
    model, processor, data, monkeypatch
):
    settings = model.predictor.backbone.generation_config
    monkeypatch.setattr(settings, "max_new_tokens", 5)  # random weights would write all 64
    benchmark = captioning.CaptioningBenchmark(
        "clips", "captioning", data / "rows.jsonl", "Captions.", "what is it ?"
    )
    task = Task(model, processor, benchmark, limit=2)
    result = captioning.evaluate(task)
    for row, written in zip(task.rows(), result.items[0].predictions, strict=True):
        tokens = model.generate(pixels_of(processor, row), **processor(text=["what is it ?"]))
        assert written == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert result.scores["CIDEr"].baselines.keys() == {"unconditional"}
    assert result.protocol["written_by"] == "the language model, token by token"


def test_captioning_compares_with_the_caption_of_a_grey_clip_of_the_same_kind(processor, data):
    model = tiny_token_model(seed=3)  # writes another text about a grey image than a grey video
    model.predictor.backbone.generation_config.max_new_tokens = 5
    benchmark = captioning.CaptioningBenchmark(
        "clips", "captioning", data / "rows.jsonl", "Captions.", "what is it ?"
    )
    task = Task(model, processor, benchmark)
    found = captioning.generated(task, task.rows())
    grey, expected = grey_frame(processor), []
    for row in found.predictions.rows:
        pixels = grey.expand_as(pixels_of(processor, row))
        tokens = model.generate(pixels, **processor(text=["what is it ?"]))
        expected += processor.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(expected)) == 2
    assert found.others["unconditional"] == [text.strip() for text in expected]


def test_hybrid_is_measured_by_embeddings_or_by_likelihood(processor, labels):
    hybrid = tiny_token_model(predicts_embeddings=True)
    assert Task(hybrid, processor, labels).scoring is None
    by_embedding = Task(hybrid, processor, labels)
    _, cosines = compare(by_embedding, by_embedding.rows(), TEXTS, ["{}"])
    assert cosines.abs().max() <= 1
    assert Task(hybrid, processor, labels, likelihood="sum").scoring == "sum"
    assert "likelihood" not in classification.evaluate(by_embedding).protocol


def test_measurable_leaves_out_benchmarks_that_need_embeddings(data, capsys):
    rows = data / "rows.jsonl"
    kinds = ("classification", "retrieval", "captioning", "streaming")
    every = [Benchmark(kind, kind, rows, "B.") for kind in kinds]
    tokens = {"has_tokens": True, "has_embeddings": False}
    found = measurable(every, ["all"], has_decoder=False, **tokens)
    assert [each.name for each in found] == ["classification", "captioning"]
    assert "has no embeddings: retrieval, streaming" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^retrieval needs embeddings, and this model predicts"):
        measurable(every[1:2], ["retrieval"], has_decoder=False, **tokens)
    hybrid = measurable(every, ["all"], has_decoder=False, has_tokens=True)
    assert [each.name for each in hybrid] == ["classification", "retrieval", "captioning"]


def test_evaluate_chooses_the_likelihood_on_validation_data(
    model, processor, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(data)
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    write_rows(data / "val.jsonl", rows[:2])
    keys = "task: classification, description: L., candidates: [a cat, red, a dog]"
    entry = f"val: {{{keys}, rows: val.jsonl}}\n"
    (data / "validation.yaml").write_text(entry)
    (data / "b.yaml").write_text("labels: {task: classification, rows: rows.jsonl, description: L}")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--benchmarks", "b.yaml", "--tasks", "labels", "--model", str(tmp_path / "model")]
    main([*options, "--validation", "val", "--validation-benchmarks", "validation.yaml"])
    results = json.loads((tmp_path / "model/eval/results.json").read_text())
    protocol = results["benchmarks"]["labels"]["protocol"]

    expected = {}
    for form in LIKELIHOODS:
        own = LABELS(
            name="val",
            task="classification",
            rows=data / "val.jsonl",
            description="L.",
            candidates=["a cat", "red", "a dog"],
        )
        result = classification.evaluate(Task(model, processor, own, likelihood=form))
        expected[form] = result.scores["top-1"].value
    assert protocol["likelihood"] == max(expected, key=expected.get)
    listed = ", ".join(f"{form} {value:.4f}" for form, value in expected.items())
    assert protocol["likelihood_from"] == f"validation on val: {listed}"
    assert f"labels: likelihood {protocol['likelihood']}, validation" in capsys.readouterr().out


def test_evaluate_chooses_the_likelihood_of_one_benchmark_on_its_own_validation_data(
    model, processor, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(data)
    keys = "task: classification, rows: rows.jsonl, description: L."
    (data / "b.yaml").write_text(f"plain: {{{keys}}}\nother: {{{keys}}}\n")
    write_rows(data / "val.jsonl", read_rows(data / "rows.jsonl")[0])
    ours = keys.replace("rows.jsonl", "val.jsonl")
    (data / "v.yaml").write_text(
        f"all: {{{ours}}}\nown: {{{ours}}}\ntested: {{{keys}}}\n"
        f"asked: {{{ours.replace('classification', 'vqa')}, candidates: [a cat, red]}}\n"
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--benchmarks", "b.yaml", "--model", str(tmp_path / "model")]
    options += ["--tasks", "plain", "other", "--validation-benchmarks", "v.yaml", "--validation"]
    main([*options, "other=own", "all"])
    results = json.loads((tmp_path / "model/eval/results.json").read_text())["benchmarks"]
    reasons = {name: one["protocol"]["likelihood_from"] for name, one in results.items()}
    assert reasons["plain"].startswith("validation on all: ")
    assert reasons["other"].startswith("validation on own: ")
    for word in ("wrong=own", "other=asked", "asked"):
        with pytest.raises(ValueError, match=f"^--validation {word} is of the kind "):
            main([*options, word])
    with pytest.raises(ValueError, match="^--validation tested has the rows of the test plain"):
        main([*options, "tested"])


@pytest.mark.parametrize("is_hybrid", [False, True], ids=["tokens", "hybrid"])
def test_evaluate_states_that_the_user_chose_the_likelihood(
    processor, data, tmp_path, monkeypatch, is_hybrid
):
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text("labels: {task: classification, rows: rows.jsonl, description: L}")
    tiny_token_model(predicts_embeddings=is_hybrid).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--benchmarks", "b.yaml", "--tasks", "labels", "--model", str(tmp_path / "model")]
    main([*options, "--likelihood", "sum"])
    results = json.loads((tmp_path / "model/eval/results.json").read_text())
    protocol = results["benchmarks"]["labels"]["protocol"]
    assert (protocol["likelihood"], protocol["likelihood_from"]) == ("sum", "--likelihood")


def test_evaluate_limits_the_rows_of_validation_data(
    model, processor, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(data)
    row = json.loads((data / "rows.jsonl").read_text().splitlines()[0])
    # One of the three targets of a clip is chosen, so all rows give 1/3.
    for name in ("same", "val"):
        write_rows(data / f"{name}.jsonl", [row | {"target": text} for text in TEXTS[:3]])
        entry = f"{name}: {{task: classification, rows: {name}.jsonl, description: L}}"
        (data / f"{name}.yaml").write_text(entry)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--benchmarks", "same.yaml", "--tasks", "same", "--model", str(tmp_path / "model")]
    options += ["--validation", "val", "--validation-benchmarks", "val.yaml"]
    main(options)
    assert "sum 0.3333, mean 0.3333, ratio 0.3333" in capsys.readouterr().out
    main([*options, "--limit", "1"])
    printed = capsys.readouterr().out
    assert "same: likelihood " in printed and "sum 0.3333" not in printed


def test_evaluate_refuses_likelihoods_of_a_model_of_embeddings(
    processor, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text("labels: {task: classification, rows: rows.jsonl, description: L}")
    tiny_model().save_pretrained(tmp_path / "vljepa")
    processor.save_pretrained(tmp_path / "vljepa")
    options = ["--benchmarks", "b.yaml", "--tasks", "labels", "--model", str(tmp_path / "vljepa")]
    with pytest.raises(ValueError, match="^--likelihood: this model predicts embeddings"):
        main([*options, "--likelihood", "sum"])
