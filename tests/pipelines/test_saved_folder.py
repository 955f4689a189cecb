"""A saved model's folder is complete: pipelines and sentence-transformers load it anywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from eval.task import Benchmark, Task
from eval.tasks.retrieval import RetrievalBenchmark
from modeling_vljepa import StreamEncoder, VLJEPAModel, pipelines
from modeling_vljepa.hub_files import CUSTOM_PIPELINES
from modeling_vljepa.pipelines.handler import EndpointHandler
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPARetrievalPipeline
from modeling_vljepa.pipelines.st_vljepa import VLJEPAModule
from tests.tiny import (
    DECODER,
    noise,
    run_elsewhere,
    tiny_model,
    tiny_processor,
    tiny_recipe,
    tiny_rows,
    tiny_writer,
    write_clip,
    write_rows,
)
from training.train import main as train
from training.train_decoder import main as train_decoder

CAPTION = "what is it ?"
LORA = "model.lora={r: 2, lora_alpha: 4}"


def test_every_saved_model_has_the_code_of_all_pipelines(tmp_path):
    shipped = {path.name for path in Path(pipelines.__file__).parent.glob("[!_]*.py")}
    for name, model in (("model", tiny_model()), ("writer", tiny_writer())):
        model.save_pretrained(tmp_path / name)
        assert shipped <= {path.name for path in (tmp_path / name).iterdir()}
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["custom_pipelines"] == CUSTOM_PIPELINES
        assert config["auto_map"]["AutoModel"] == "modeling_vljepa.VLJEPAModel"
        modules = json.loads((tmp_path / name / "modules.json").read_text())
        assert [module["type"] for module in modules] == ["st_vljepa.VLJEPAModule"]
        settings = tmp_path / name / "config_sentence_transformers.json"
        assert json.loads(settings.read_text())["prompts"] == model.config.prompts


def test_settings_leave_out_an_empty_prompt_that_would_mean_another(tmp_path):
    """sentence-transformers passes an empty prompt if there is none; retrieval is the default."""
    for prompts, names in (
        ({"caption": "", "retrieval": "which ?"}, {"detail", "question", "action", "retrieval"}),
        ({"caption": ""}, {"caption", "detail", "question", "action", "retrieval"}),
    ):
        tiny_model(prompts=prompts).config.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
        assert settings["prompts"].keys() == names


# -- one query everywhere ------------------------------------------------------------------


@pytest.mark.parametrize("query", [CAPTION, ""])
def test_every_use_of_a_trained_model_embeds_a_clip_under_its_prompt(tmp_path, query):
    """The recipe's prompt is the default of pipelines, library, endpoint and evaluation."""
    rows = tiny_rows(tmp_path)
    clip = str(tmp_path / "wide.mp4")
    prompts = {"caption": query, "detail": query, "action": query}
    train([str(tiny_recipe(rows, max_steps=1)), f"model.prompts={json.dumps(prompts)}"])
    folder = tmp_path / "out"
    model = VLJEPAModel.from_pretrained(folder)
    processor = tiny_processor().from_pretrained(folder)
    assert model.config.prompts["retrieval"] == query

    pipe = VLJEPARetrievalPipeline(model=model, processor=processor, device="cpu")
    [library] = pipe.build_library([clip], tmp_path / "library").dataset["embedding"]
    task = Task(model, processor, benchmark(tmp_path, clip))
    endpoint = EndpointHandler(str(folder))
    endpoint.max_pixels = 10**8
    with processor.watch(clip, window=2, stride=2) as windows:
        frames = [next(iter(windows))]
    watched, by_hand = StreamEncoder(model, processor), StreamEncoder(model, processor, query)
    embeds = {
        "pipeline": pipe.forward([pipe.preprocess({"video": clip})])[0],
        "library": library,
        "endpoint": endpoint.embed({"video": Path(clip).read_bytes()}, {}),
        "evaluation": task.predict(task.rows()).embeds[0],
        "sentence-transformers": sentence_transformer(folder).encode([clip])[0],
    }
    with torch.no_grad():
        expected = model.predict(**processor(videos=clip, text=query))[0]
        other = model.predict(**processor(videos=clip, text="Describe this video in detail."))[0]
    assert (other - expected).abs().max() > 1e-3  # positive control: another query, another vector
    for name, embedding in embeds.items():
        np.testing.assert_allclose(embedding, expected, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        watched.embed(frames)[0].embedding, by_hand.embed(frames)[0].embedding, atol=1e-6
    )
    changed = VLJEPAModel.from_pretrained(folder, prompts={"retrieval": "another ?"})
    pipe = VLJEPARetrievalPipeline(model=changed, processor=processor, device="cpu")
    assert (pipe.forward([pipe.preprocess({"video": clip})])[0] - expected).abs().max() > 1e-3


def benchmark(folder: Path, clip: str) -> Benchmark:
    rows = write_rows(folder / "test.jsonl", [{"video": clip, "target": "a cat"}])
    return RetrievalBenchmark("clips", "retrieval", rows, "One clip.")


def sentence_transformer(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[VLJEPAModule.load(str(folder))], device="cpu")


# -- without this package ------------------------------------------------------------------

# Every registered task on the first folder, and sentence-transformers, which saves it again; one
# task and sentence-transformers on the others.
USE = """
import sys
sys.modules.update(dict.fromkeys(("modeling_vljepa", "processing", "training", "eval")))
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, pipeline
clip = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
image, texts = Image.fromarray(clip[0]), ["a red ball", "a cat"]
frames = [(second / 10, frame) for second, frame in enumerate(clip)]
calls = {
    "visual-question-answering": lambda p: p(video=clip, question="what ?", candidates=texts),
    "video-text-retrieval": lambda p: p(video=clip, texts=texts),
    "zero-shot-video-classification": lambda p: p(video=clip, candidate_labels=texts),
    "zero-shot-image-classification": lambda p: p(image, candidate_labels=texts),
    "image-feature-extraction": lambda p: p(image),
    "streaming-caption": lambda p: list(p(iter(frames), candidates=texts)),
    "image-text-to-text": lambda p: p(image, text="what ?", max_new_tokens=2),
}
lengths = [2, 2, 2, 2, 24, 1, 1]
trusted = {"trust_remote_code": True, "device": "cpu"}

def refused(message, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

def check(folder, has_decoder, is_adapter, is_first):
    for (task, call), length in zip(calls.items(), lengths, strict=True):
        if not is_first and task != "visual-question-answering":
            continue
        if task == "image-text-to-text" and not has_decoder:
            message = "this checkpoint has no Y-Decoder"
            refused(message, pipeline, task, model=folder, trust_remote_code=True)
            continue
        pipe = pipeline(task, model=folder, **trusted)
        assert type(pipe).__module__.startswith("transformers_modules"), task
        assert len(call(pipe)) == length, task
        if task in ("visual-question-answering", "streaming-caption"):
            assert pipe.has_decoder == has_decoder
    assert set(pipe.model.config.custom_pipelines) == set(calls)
    if is_first:
        features = pipeline("feature-extraction", model=folder, **trusted)
        refused("use SentenceTransformer", features, "a cat")

    first = SentenceTransformer(folder, **trusted)
    expected = first.encode([image, "a cat"])
    asked = first.encode([image], prompt_name="detail")
    assert np.abs(asked - expected[:1]).max() > 1e-4
    if is_adapter or not is_first:
        return
    again = folder + "-again"
    first.save_pretrained(again)
    second = SentenceTransformer(again, **trusted)
    assert np.abs(second.encode([image, "a cat"]) - expected).max() <= 1e-6
    assert second.prompts == first.prompts
    rank = pipeline("video-text-retrieval", model=again, **trusted)
    assert len(rank(video=clip, texts=texts)) == 2
    if has_decoder:
        kept, old = (
            AutoModelForImageTextToText.from_pretrained(each, trust_remote_code=True).state_dict()
            for each in (again, folder)
        )
        assert kept.keys() == old.keys()
        assert all(weight.equal(old[name]) for name, weight in kept.items())

for number, arguments in enumerate(FOLDERS):
    check(*arguments, is_first=number == 0)
print("complete")
"""


def check_folders(tmp_path: Path, *folders: str, decoder: bool, adapter: bool = False) -> None:
    arguments = [(str(tmp_path / folder), decoder, adapter) for folder in folders]
    assert run_elsewhere(f"FOLDERS = {arguments!r}\n{USE}", tmp_path).splitlines()[-1] == "complete"


@pytest.mark.slow
def test_trained_folders_and_checkpoints_work_without_this_package(tmp_path):
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)
    train([str(recipe)])
    check_folders(tmp_path, "out", "out/checkpoint-1", decoder=False)


@pytest.mark.slow
def test_folders_with_a_decoder_work_without_this_package(tmp_path):
    rows = tiny_rows(tmp_path)
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    size = {name: DECODER[name] for name in ("hidden_size", "intermediate_size", "head_dim")}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    recipe = {
        "model": {
            "checkpoint": str(tmp_path / "base"),
            "config": {"decoder_config": size | layers},
        },
        "data": {"sources": [{"rows": str(rows)}]},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "save_steps": 1,
            "save_total_limit": None,
            "use_cpu": True,
            "precision": "fp32",
            "report_to": "none",
        },
    }
    (tmp_path / "decoder.yaml").write_text(yaml.safe_dump(recipe))
    train_decoder([str(tmp_path / "decoder.yaml")])
    check_folders(tmp_path, "out", "out/checkpoint-1", decoder=True)


@pytest.mark.slow
def test_adapters_work_with_their_base_without_this_package(tmp_path):
    base = tmp_path / "base"
    tiny_model(prompts={"caption": "", "detail": "more"}).save_pretrained(base)
    tiny_processor().save_pretrained(base)
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)
    given = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(given | {"model": {"checkpoint": str(base)}}))
    prompts = json.dumps({"caption": CAPTION})
    train([str(recipe), LORA, f"model.prompts={prompts}"])
    check_folders(tmp_path, "out/adapter", "out/checkpoint-1", decoder=False, adapter=True)
    for name in ("out/adapter", "out/checkpoint-1"):
        # sentence-transformers asks the recipe's query; other uses ask the base's.
        module = VLJEPAModule.load(str(tmp_path / name))
        assert module.query == CAPTION
        assert AutoModel.from_pretrained(tmp_path / name).config.prompts["retrieval"] == ""
    merged = VLJEPAModel.from_pretrained(tmp_path / "out")
    assert merged.config.prompts["retrieval"] == CAPTION


@pytest.mark.slow
def test_model_saved_by_downloaded_code_is_complete(tmp_path):
    """The code of the pipelines is copied from the folder that the model was loaded from."""
    tiny_writer().save_pretrained(tmp_path / "first")
    tiny_processor().save_pretrained(tmp_path / "first")
    script = """
import shutil, sys
sys.modules.update(dict.fromkeys(("modeling_vljepa", "processing", "training", "eval")))
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("first", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("first", trust_remote_code=True)
for folder in ("first", "second"):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
shutil.rmtree("first")
model.save_pretrained("third")
"""
    run_elsewhere(script, tmp_path)
    check_folders(tmp_path, "second", decoder=True)
    # Without the first folder the weights are saved nevertheless, and a warning names the folder.
    assert (tmp_path / "third" / "model.safetensors").is_file()
    assert not (tmp_path / "third" / "pipeline_vljepa.py").exists()


def test_sentence_transformers_keeps_the_prompts_of_its_user(tmp_path):
    tiny_writer().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    model = sentence_transformer(tmp_path / "model")
    model.prompts["mine"] = "who ?"
    clip = str(write_clip(tmp_path / "clip.mp4", noise(6, 48, 64, 3)))
    model.default_prompt_name = "mine"
    model[0].query = "what ?"
    model.save_pretrained(str(tmp_path / "again"))
    settings = json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"]["mine"] == "who ?"
    assert settings["default_prompt_name"] == "mine"
    again = VLJEPAModule.load(str(tmp_path / "again"))
    assert again.query == "what ?"
    assert "y_decoder" in dict(again.model.named_children())
    assert again.query_of({"video": clip}, None) == "what ?"
