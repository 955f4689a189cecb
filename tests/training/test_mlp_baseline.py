"""The MLP on cached features learns what features and queries decide."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from eval.benchmarks import load_benchmarks
from eval.embed import embed_texts
from processing.rows import clip_key
from tests.tiny import TOWER, noise, tiny_model, tiny_processor, tiny_recipe, tiny_rows, write_rows
from training import cache_features, mlp_baseline, train
from training.arguments import RecipeError, SourceArguments
from training.data.sources import read_source
from training.mlp_baseline import Baseline, main

ANSWERS = ("red", "green", "blue", "a red dog", "a green cat", "a blue bike")
BENCHMARKS = """
found:
  task: retrieval
  description: d
  rows: {folder}/captions.jsonl
asked:
  task: vqa
  description: d
  rows: {folder}/questions.jsonl
  train_rows: {folder}/questions.jsonl
"""


class Features(dict):
    """Features by file, in place of a store."""

    def __getitem__(self, row: dict) -> torch.Tensor:
        return super().__getitem__(clip_key(row))

    def check(self, rows: list[dict]) -> None:
        assert all(clip_key(row) in self for row in rows)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_baseline, "HIDDEN", 64)
    monkeypatch.setattr(mlp_baseline, "BATCH", 12)
    monkeypatch.setattr(mlp_baseline, "CHECKS", 2)
    monkeypatch.setattr(mlp_baseline, "DROPOUT", 0.0)


def images(folder: Path) -> list[str]:
    for number, pixels in enumerate(noise(len(ANSWERS), 4, 4, 3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(len(ANSWERS))]


@pytest.mark.parametrize(("concatenated", "adapter"), [(False, None), (True, None), (True, 8)])
def test_mlp_baseline_learns_labels_and_questions_of_its_sources(
    concatenated: bool, adapter: int | None, tmp_path: Path
) -> None:
    names = images(tmp_path)
    captions = [{"image": n, "target": each} for n, each in zip(names, ANSWERS, strict=True)]
    # The same question has another answer for each clip, and another question another one.
    questions = [
        {"image": name, "query": query, "target": ANSWERS[(index + shift) % len(ANSWERS)]}
        for index, name in enumerate(names)
        for shift, query in ((1, "open ?"), (2, "close ?"))
    ]
    write_rows(tmp_path / "captions.jsonl", captions)
    write_rows(tmp_path / "questions.jsonl", questions)
    (tmp_path / "b.yaml").write_text(BENCHMARKS.format(folder=tmp_path))
    retrieval, vqa = load_benchmarks(tmp_path / "b.yaml", ["all"])
    vision = {"vision_config": {"model_type": "dinov2", **TOWER}} if concatenated else {}
    model = tiny_model(concatenate_class_token=concatenated, **vision)
    processor = tiny_processor()
    sources = [
        read_source(SourceArguments(rows=str(tmp_path / f"{name}.jsonl"), query=query))
        for name, query in (
            ("captions", model.config.prompts["retrieval"]),
            ("questions", None),
        )
    ]
    torch.manual_seed(0)
    rows = [row for source in sources for row in source.rows]
    shape = (4, 96) if concatenated else (5, 48)
    features = Features({clip_key(row): torch.randn(shape) for row in rows})
    options = {"bf16": False, "seed": 0, "adapter_size": adapter}
    baseline = Baseline(model, processor, features, sources, **options)
    # Texts without the model's projection, which has learnt.
    width = model.y_encoder.output_size
    plain = tiny_model(project_target=False, embedding_dim=width)
    plain.y_encoder = model.y_encoder
    found = baseline.vectors.texts[baseline.vectors.of_texts(["red"])]
    expected = embed_texts(plain, processor, ["red"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    before = baseline.measure(vqa).scores["accuracy"].value
    baseline.train(0.3, [retrieval])
    assert baseline.best == 1
    assert baseline.measure(retrieval).scores["text to image R@1"].value == 1
    assert before < 0.5 < baseline.measure(vqa).scores["accuracy"].value
    with torch.no_grad():
        moved = (baseline.mlp.text_head(found) - found).abs().max()
    assert moved > 1e-3 if adapter else moved < 1e-6


@pytest.mark.slow
def test_mlp_baseline_reads_a_trained_model_and_writes_what_evaluate_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [json.loads(line) for line in tiny_rows(tmp_path).read_text().splitlines()]
    rows = [row for row in rows if "image" in row]
    rows = [{**row, "query": "", "target": f"text {i}"} for i, row in enumerate(rows)]
    path = write_rows(tmp_path / "captions.jsonl", rows)
    questions = [row | {"query": "open ?", "target": "yes"} for row in rows]
    write_rows(tmp_path / "questions.jsonl", questions)
    (tmp_path / "b.yaml").write_text(BENCHMARKS.format(folder=tmp_path))
    recipe, features = tiny_recipe(path), tmp_path / "features"
    train.main([str(recipe)])
    again = yaml.safe_load(recipe.read_text()) | {"model": {"checkpoint": str(tmp_path / "out")}}
    recipe.write_text(yaml.safe_dump(again))
    cache_features.main([str(recipe), "--output", str(features)])
    options = ["--features", features, "--benchmarks", tmp_path / "b.yaml"]
    options = [*map(str, [*options, "--validation", tmp_path / "b.yaml"])]
    main([str(tmp_path / "out"), *options, "--cpu-seconds", "0.1"])
    results = json.loads((tmp_path / "out/mlp/results.json").read_text())
    assert results["mlp_of"] == "out"
    assert results["benchmarks"].keys() == {"found", "asked"}
    assert (tmp_path / "out/mlp/items.jsonl").is_file()
    assert "validation" in capsys.readouterr().out

    with pytest.raises(RecipeError, match="--adapter: .*out has no adapter"):
        main([str(tmp_path / "out"), *options, "--adapter"])
    entry = yaml.safe_load(BENCHMARKS.format(folder=tmp_path))["asked"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"asked": entry}))
    with pytest.raises(RecipeError, match="has no retrieval benchmark"):
        main([str(tmp_path / "out"), *options[:-1], str(tmp_path / "c.yaml")])
    (tmp_path / "out/training_runs.json").unlink()
    with pytest.raises(RecipeError, match="it was not trained here"):
        main([str(tmp_path / "out"), *options])
