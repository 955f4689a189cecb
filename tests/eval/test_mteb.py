"""A VL-JEPA in the mteb library: the scores of its tasks are those of this library's evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Video
from PIL import Image as Pillow

from tests.tiny import noise, tiny_model, tiny_processor, tiny_token_model, write_clip, write_rows

pytest.importorskip("mteb", reason='needs mteb: pip install -e ".[mteb]"')

from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from eval.benchmarks import load_benchmarks
from eval.mteb_model import VLJEPAEncoder, get_model
from eval.mteb_tasks import main, mteb_tasks
from eval.task import Task
from eval.tasks import TASKS

pytestmark = pytest.mark.slow  # imports mteb
QUERY = "what is it ?"
TEXTS = ["a man rides a bike", "the cat sits on the mat", "red", "a green cube", "the door opens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, five clips, five images and a benchmark file."""
    folder = tmp_path_factory.mktemp("mteb")
    for index, pixels in enumerate(noise(5, 6, 48, 64, 3)):
        write_clip(folder / f"{index}.mp4", pixels)
        Pillow.fromarray(pixels[0]).save(folder / f"{index}.png")
    clips = [{"video": f"{row}.mp4", "target": text} for row, text in enumerate(TEXTS)]
    # Several images are right for a text.
    images = [{"image": f"{row}.png", "target": TEXTS[row % 3]} for row in range(5)]
    asked = [{**row, "query": f"{QUERY} {index}"} for index, row in enumerate(clips)]
    cut = [row | {"start": 0.0, "end": 0.3} for row in clips]
    files = {"clips": clips, "images": images, "asked": asked, "cut": cut, "mixed": clips + images}
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    entries = {
        "clips": {"task": "retrieval", "rows": "clips", "query": QUERY},
        "images": {"task": "retrieval", "rows": "images"},
        "actions": {"task": "classification", "rows": "clips", "templates": ["a {} ."]},
        "things": {"task": "classification", "rows": "images", "query": QUERY},
        "cut": {"task": "retrieval", "rows": "cut"},
        "mixed": {"task": "retrieval", "rows": "mixed"},
        "asked": {"task": "classification", "rows": "asked"},
        "ensemble": {"task": "classification", "rows": "clips", "templates": ["{} .", "a {}"]},
        "captions": {"task": "captioning", "rows": "clips"},
    }
    for entry in entries.values():
        entry |= {"rows": str(folder / f"{entry['rows']}.jsonl"), "description": "Noise."}
    (folder / "benchmarks.yaml").write_text(json.dumps(entries))  # JSON is YAML
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> VLJEPAEncoder:
    return get_model(str(folder / "model"), device="cpu")


def test_mteb_tasks_of_a_benchmark_file_give_the_scores_of_eval_evaluate(folder, encoder, capsys):
    names = ["clips", "images", "actions", "things"]
    file = folder / "benchmarks.yaml"
    main(
        ["--model", str(folder / "model"), "--benchmarks", str(file), "--tasks", *names]
        + ["--output", str(folder / "results"), "--batch-size", "2"]
    )
    assert "clips_t2v: hit_rate_at_1" in capsys.readouterr().out
    found = {
        path.stem: json.loads(path.read_text())["scores"]["test"][0]
        for path in (folder / "results").rglob("*.json")
        if path.name != "model_meta.json"
    }
    own = {
        benchmark.name: TASKS[benchmark.task]
        .evaluate(Task(encoder.model, encoder.processor, benchmark))
        .scores
        for benchmark in load_benchmarks(file, names)
    }
    directions = [("clips", "v", "video"), ("images", "i", "image")]
    for name, letter, kind in directions:
        for task, direction in (
            (f"{name}_t2{letter}", f"text to {kind}"),
            (f"{name}_{letter}2t", f"{kind} to text"),
        ):
            scores = found.pop(task)
            for k in (1, 5, 10):
                value = own[name][f"{direction} R@{k}"].value
                assert scores[f"hit_rate_at_{k}"] == pytest.approx(value, abs=1e-4)
            value = own[name][f"{direction} nDCG@10"].value
            assert scores["ndcg_at_10"] == pytest.approx(value, abs=1e-4)
    for name in ("actions", "things"):
        assert found.pop(name)["accuracy"] == pytest.approx(own[name]["top-1"].value)
    assert not found


def description(task_type: str, category: str, modalities: list[str]) -> TaskMetadata:
    return TaskMetadata(
        name="Own",
        description="Noise.",
        dataset={"path": "none", "revision": "none"},
        type=task_type,
        category=category,
        modalities=modalities,
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )


@pytest.mark.parametrize(
    ("task_type", "category", "kind", "prompts", "query"),
    [
        ("Any2AnyRetrieval", "t2v", "video", None, "retrieval"),
        ("Any2AnyRetrieval", "t2i", "image", None, "retrieval"),
        ("VideoClassification", "v2c", "video", None, "action"),
        ("ImageClustering", "i2i", "image", None, "action"),
        ("VideoClassification", "v2c", "video", {"Own": QUERY}, QUERY),
        ("Any2AnyRetrieval", "t2v", "video", {"Any2AnyRetrieval-document": QUERY}, QUERY),
    ],
)
def test_mteb_encoder_asks_the_prompt_of_the_task(
    folder, encoder, task_type, category, kind, prompts, query
):
    """Also of videos that `datasets` would decode with torchcodec, as in the published tasks."""
    suffix, feature = {"video": ("mp4", Video()), "image": ("png", Image())}[kind]
    paths = [str(folder / f"{index}.{suffix}") for index in range(3)]
    data = Dataset.from_dict({"id": list("abc"), kind: paths}).cast_column(kind, feature)
    task = description(task_type, category, ["text", kind])
    side = PromptType.document if category.startswith("t2") else None
    batches = create_dataloader(data, task_metadata=task, prompt_type=side, batch_size=2)
    own = VLJEPAEncoder(encoder.model, encoder.processor, encoder.mteb_model_meta, prompts=prompts)
    found = own.encode(
        batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=side
    )
    text = encoder.model.config.prompts.get(query, query)
    batch = encoder.processor(**{f"{kind}s": paths}, text=[text] * 3)
    with torch.inference_mode():
        expected = encoder.model.predict(**batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_mteb_encoder_asks_the_text_of_a_medium(folder, encoder):
    questions = ["what color is it ?", "what does the man do ?"]
    image_bytes = [(folder / f"{index}.png").read_bytes() for index in range(2)]
    data = Dataset.from_dict({"id": ["a", "b"], "image": image_bytes, "text": questions})
    data = data.cast_column("image", Image())
    task = description("VisionCentricQA", "it2t", ["image", "text"])
    side = PromptType.query
    batches = create_dataloader(data, task_metadata=task, prompt_type=side)
    options = {"hf_split": "test", "hf_subset": "default", "prompt_type": side}
    found = encoder.encode(batches, task_metadata=task, **options)
    pixels = [Pillow.open(folder / f"{index}.png") for index in range(2)]
    with torch.inference_mode():
        expected = encoder.model.predict(**encoder.processor(images=pixels, text=questions))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mteb_encoder_names_inputs_that_it_cannot_embed(encoder):
    task = description("AudioClassification", "a2c", ["audio"])
    batches = torch.utils.data.DataLoader(Dataset.from_dict({"audio": ["a.wav"]}))
    with pytest.raises(ValueError, match="Own: the inputs have audio; a VL-JEPA embeds text, im"):
        encoder.encode(batches, task_metadata=task, hf_split="test", hf_subset="default")


def test_mteb_model_states_its_modalities_and_the_hash_of_its_weights(folder, encoder):
    meta = encoder.mteb_model_meta
    assert meta.modalities == ["text", "image", "video"]
    assert meta.name == f"{folder.name}/model"
    assert meta.embed_dim == 24
    other = tiny_model(seed=1)
    other.save_pretrained(folder / "other")
    tiny_processor().save_pretrained(folder / "other")
    assert get_model(str(folder / "other")).mteb_model_meta.revision != meta.revision


def test_mteb_model_refuses_a_model_that_predicts_tokens(tmp_path):
    tiny_token_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="predicts tokens, and mteb measures embeddings"):
        get_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("captions", "captions: captioning has no task in mteb"),
        ("mixed", "mixed: mteb has no pool of images and videos"),
        ("cut", "cut: mteb's tasks have whole videos"),
        ("asked", "asked: classification asks one query"),
        ("ensemble", "ensemble: mteb has one text per label; leave 1 of"),
    ],
)
def test_mteb_tasks_refuse_entries_that_mteb_cannot_express(folder, encoder, name, words):
    [benchmark] = load_benchmarks(folder / "benchmarks.yaml", [name])
    with pytest.raises(ValueError, match=words):
        mteb_tasks(Task(encoder.model, encoder.processor, benchmark))
