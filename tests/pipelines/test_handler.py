"""The endpoint answers like the pipelines and reads nothing but the request."""

import base64
import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_vljepa.pipelines import handler as handler_module
from modeling_vljepa.pipelines.handler import EndpointHandler
from modeling_vljepa.pipelines.pipeline_vljepa import (
    VLJEPARetrievalPipeline,
    VLJEPAVisualQuestionAnsweringPipeline,
    VLJEPAZeroShotClassificationPipeline,
)
from tests.pipelines.rounding import approximately
from tests.tiny import noise, run_elsewhere, tiny_model, tiny_processor, write_clip

ANSWERS = ["red", "a cat", "it rides a bike"]
QUESTION = "what is the dog doing ?"
DESCRIBE = "Describe this video in one sentence."  # the default retrieval prompt


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a published model, a clip and an image."""
    path = tmp_path_factory.mktemp("endpoint")
    pipe = VLJEPARetrievalPipeline(model=tiny_model(answers=ANSWERS), processor=tiny_processor())
    pipe.save_pretrained(path / "model")
    shutil.copy(handler_module.__file__, path / "model")
    write_clip(path / "clip.mp4", noise(6, 48, 64, 3))
    shutil.copy(path / "clip.mp4", path / "clipmp4a")  # eight letters: base64, and a path
    Image.fromarray(noise(40, 60, 3)).save(path / "image.png")
    return path


@pytest.fixture(scope="module")
def handler(folder: Path) -> EndpointHandler:
    return EndpointHandler(str(folder / "model"))


@pytest.fixture(scope="module")
def post(handler: EndpointHandler) -> Iterator[Callable[[Any], Any]]:
    """Function that sends JSON to the handler over HTTP, like an endpoint's server."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(handler(data)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past a machine's proxy

    def send(data: Any) -> Any:
        url = f"http://127.0.0.1:{server.server_port}"
        with opener.open(url, data=json.dumps(data).encode()) as response:
            return json.loads(response.read())

    yield send
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def parts() -> dict:
    return {"model": tiny_model(answers=ANSWERS), "processor": tiny_processor()}


def assert_same(found: list[dict], expected: list[dict], tolerance: float = 1e-6) -> None:
    assert len(expected) > 0
    assert found == approximately(expected, tolerance)


def test_handler_answers_like_the_pipelines(post, folder, parts):
    clip, image = folder / "clip.mp4", folder / "image.png"
    vqa = VLJEPAVisualQuestionAnsweringPipeline(**parts)
    ask = {"question": QUESTION, "candidates": ["red", "green"]}
    assert_same(post({"inputs": {"video": encoded(clip), **ask}}), vqa(video=clip, **ask))
    assert_same(post({"inputs": {"image": encoded(image), **ask}}), vqa(image=image, **ask))
    stored = {"video": encoded(clip), "question": QUESTION, "candidates": None}
    options = {"top_k": 2, "calibrated": True}
    assert_same(
        post({"inputs": stored, "parameters": options}),
        vqa(video=clip, question=QUESTION, **options),
        tolerance=1e-5,  # probabilities: the temperature multiplies the error of a cosine
    )
    assert_same(
        post(
            {
                "inputs": {"video": encoded(clip), "texts": ANSWERS},
                "parameters": {"task": "video-text-retrieval", "query": "who ?", "top_k": 2},
            }
        ),
        VLJEPARetrievalPipeline(**parts)(video=clip, texts=ANSWERS, query="who ?", top_k=2),
    )
    template = {"hypothesis_template": "a man {}"}
    assert_same(
        post(
            {
                "inputs": {"video": encoded(clip), "candidate_labels": ANSWERS},
                "parameters": {"task": "zero-shot-video-classification", **template},
            }
        ),
        VLJEPAZeroShotClassificationPipeline(**parts)(clip, candidate_labels=ANSWERS, **template),
    )


@torch.no_grad()
def test_handler_embeds_like_the_model(post, folder, parts):
    model, processor = parts["model"], parts["processor"]
    clip = folder / "clip.mp4"
    for inputs, query, expected in (
        ({"text": "a cat"}, None, model.encode_target(**processor(targets="a cat"))),
        (
            {"video": encoded(clip)},
            None,
            model.predict(**processor(videos=clip, text=DESCRIBE)),
        ),
        (
            {"video": encoded(clip)},
            "who ?",
            model.predict(**processor(videos=clip, text="who ?")),
        ),
    ):
        found = post({"inputs": inputs, "parameters": {"task": "embed", "query": query}})
        assert found["embedding"] == pytest.approx(expected[0].tolist(), abs=1e-6)


def changed(request: dict, changes: dict) -> Any:
    """Return the request with other inputs or parameters, without fields that are "absent"."""
    if "whole" in changes:
        return changes["whole"]
    inputs = request["inputs"] | changes.get("inputs", {})
    return {
        "inputs": {name: value for name, value in inputs.items() if value != "absent"},
        "parameters": changes.get("parameters", {}),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": [1, 2]}, "the request is a list"),
        ({"whole": {}}, "inputs is missing"),
        ({"whole": {"inputs": "a.mp4"}}, "inputs of visual-question-answering is a str"),
        ({"whole": {"inputs": {}, "extra": 1}}, "the request has no field 'extra'"),
        ({"inputs": {"path": "a.mp4"}}, "has no field 'path'"),
        ({"inputs": {"video": "absent"}}, "neither video nor image"),
        ({"inputs": {"image": "aGVsbG8="}}, "both video and image"),
        ({"inputs": {"video": 7}}, "video is a int"),
        ({"inputs": {"video": ""}}, "video is empty"),
        ({"inputs": {"video": "not base64!"}}, "video is not base64"),
        ({"inputs": {"video": "aGVs-bG8="}}, "video is not base64"),
        ({"inputs": {"video": "aGVsbG8="}}, "video: 5 bytes: cannot be opened"),
        ({"inputs": {"video": "absent", "image": "aGVsbG8="}}, "image: 5 bytes: not an image"),
        ({"inputs": {"video": "https://example.org/a.mp4"}}, "video is a URL"),
        ({"inputs": {"question": "absent"}}, "question is missing"),
        ({"inputs": {"question": " "}}, "question is empty"),
        ({"inputs": {"question": ["a"]}}, "question is a list"),
        ({"inputs": {"question": "a" * 2001}}, "question has 2001 characters"),
        ({"inputs": {"candidates": "red"}}, "candidates is a str"),
        ({"inputs": {"candidates": []}}, "candidates is empty"),
        ({"inputs": {"candidates": ["red", 3]}}, "candidates[1] is a int"),
        ({"inputs": {"candidates": ["a"] * 1_001}}, "candidates has 1001 texts"),
        ({"inputs": {"question": "\ud83d"}}, "question holds half a character, '\\ud83d'"),
        ({"inputs": {"candidates": ["a", "\ud83d"]}}, "candidates[1] holds half a character"),
        ({"inputs": {"candidates": ["a"] * 50 + ["b" * 2000]}}, "51 texts of up to 2000 char"),
        ({"inputs": {"video": "\ud83d"}}, "video is not base64"),
        ({"inputs": {"video": "http://a/" + "b" * 2000}}, "video is a URL of 2009 characters"),
        ({"parameters": {"top_k": 0}}, "top_k is 0"),
        ({"parameters": {"top_k": True}}, "top_k is True"),
        ({"parameters": {"calibrated": "yes"}}, "calibrated is a str"),
        ({"parameters": {"allow_urls": True}}, "parameters has no field 'allow_urls'"),
        ({"parameters": {"query": "a"}}, "has no field 'query'"),
        ({"parameters": {"task": "translation"}}, "task is 'translation'"),
        ({"parameters": {"task": ["embed"]}}, "task is"),
        ({"parameters": {"task": "embed"}}, "inputs of embed has no field 'candidates'"),
    ],
)
def test_handler_rejects_a_malformed_request_and_serves_the_next(post, folder, changes, message):
    good = {
        "inputs": {
            "video": encoded(folder / "clip.mp4"),
            "question": QUESTION,
            "candidates": ["red", "green"],
        }
    }
    expected = post(good)
    answer = post(changed(good, changes))
    assert list(answer) == ["error"] and message in answer["error"]
    assert str(folder) not in answer["error"]
    assert_same(post(good), expected)
    assert len(expected) == 2


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        ("video-text-retrieval", {"video": True}, "texts is missing"),
        ("zero-shot-video-classification", {"video": True}, "candidate_labels is missing"),
        ("embed", {}, "embed needs one of video, image and text"),
        ("embed", {"text": "a", "video": True}, "embed needs one of video, image and text"),
    ],
)
def test_handler_names_the_missing_field_of_a_task(post, folder, task, inputs, message):
    if "video" in inputs:
        inputs = inputs | {"video": encoded(folder / "clip.mp4")}
    answer = post({"inputs": inputs, "parameters": {"task": task}})
    assert message in answer["error"]


@pytest.mark.parametrize(
    ("task", "texts", "parameters", "message"),
    [
        ("zero-shot-video-classification", ["a"], {"hypothesis_template": "{}" * 1000}, "1000 tim"),
        (
            "zero-shot-video-classification",
            ["a", "b" * 1999],
            {"hypothesis_template": "a {}"},
            "candidate_labels[1] in hypothesis_template has 2001 characters: give at most 2000",
        ),
        (
            "zero-shot-video-classification",
            ["a"] * 1000,
            {"hypothesis_template": "a" * 500 + "{}"},
            "candidate_labels in hypothesis_template has 1000 texts of up to 501 characters",
        ),
        ("zero-shot-video-classification", ["\ud83d"], {}, "candidate_labels[0] holds half"),
        (
            "zero-shot-video-classification",
            ["a"],
            {"hypothesis_template": "\ud83d{}"},
            "hypothesis_template holds half a character",
        ),
        ("video-text-retrieval", ["a", "\ud83d"], {}, "texts[1] holds half a character"),
        ("video-text-retrieval", ["a"], {"query": "\ud83d"}, "query holds half a character"),
        ("embed", "\ud83d", {}, "text holds half a character"),
        ("embed", "a" * 2001, {}, "text has 2001 characters"),
    ],
)
def test_handler_limits_and_checks_texts_of_every_task(
    post, folder, task, texts, parameters, message
):
    field = {"zero-shot-video-classification": "candidate_labels", "embed": "text"}
    inputs = {field.get(task, "texts"): texts}
    if task != "embed":
        inputs["video"] = encoded(folder / "clip.mp4")
    start = time.process_time()
    answer = post({"inputs": inputs, "parameters": {"task": task} | parameters})
    assert message in answer["error"]
    assert time.process_time() - start < 2


def test_handler_reads_no_file_of_the_machine(handler, folder, monkeypatch):
    """Paths, addresses and playlists in the field of a file's content open no file."""
    monkeypatch.chdir(folder)
    script = base64.b64encode(f"ffconcat version 1.0\nfile {folder}/clip.mp4\n".encode()).decode()
    for video in (
        str(folder / "clip.mp4"),
        "clip.mp4",
        "clipmp4a",
        "model/config.json",
        f"file://{folder}/clip.mp4",
        f"concat:{folder}/clip.mp4",
        "data:video/mp4;base64,AAAA",
        script,
    ):
        answer = handler({"inputs": {"video": video, "question": "a"}})
        assert "not base64" in answer["error"] or "cannot be opened" in answer["error"], answer
        assert str(folder) not in answer["error"]
    ok = {"inputs": {"video": encoded(folder / "clip.mp4"), "question": "a"}}
    assert len(handler(ok)) == 3  # positive control


def test_handler_fetches_addresses_only_if_the_environment_allows_it(
    handler, post, folder, monkeypatch
):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / "clip.mp4").read_bytes())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    request = {"inputs": {"video": f"http://127.0.0.1:{server.server_port}/a", "question": "a"}}
    try:
        assert "video is a URL" in handler(request)["error"]
        monkeypatch.setenv("VLJEPA_ALLOW_URLS", "1")
        sent = {"inputs": {"video": encoded(folder / "clip.mp4"), "question": "a"}}
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert_same(handler(request), handler(sent))
        monkeypatch.setattr(handler, "max_bytes", 1000)
        assert "larger than 1000 bytes" in handler(request)["error"]
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be fetched" in handler(request)["error"]


@pytest.mark.parametrize(
    ("limit", "value", "name", "message"),
    [
        ("max_bytes", 1000, "clip.mp4", "larger than 1000 bytes"),
        ("max_seconds", 0.3, "clip.mp4", "longer than 0.3 seconds"),
        ("max_pixels", 2000, "clip.mp4", "64 x 48 pixels"),
        ("max_pixels", 2000, "image.png", "60 x 40 pixels"),
    ],
)
def test_handler_limits_files(folder, tmp_path, monkeypatch, limit, value, name, message):
    ask = {"question": "a", "candidates": ["red"]}
    monkeypatch.setattr(EndpointHandler, limit, value)
    handler = EndpointHandler(str(folder / "model"))
    kind = "video" if name == "clip.mp4" else "image"
    answer = handler({"inputs": {kind: encoded(folder / name)} | ask})
    assert message in answer["error"]
    if limit != "max_bytes":
        small = write_clip(tmp_path / "small.mp4", np.zeros((2, 16, 16, 3), np.uint8))
        assert len(handler({"inputs": {"video": encoded(small)} | ask})) == 1


def test_handler_serves_simultaneous_requests_one_at_a_time(handler, post, folder, monkeypatch):
    predict, running, most = handler.model.predict, [], []

    def watched(*args, **kwargs):
        running.append(0)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return predict(*args, **kwargs)

    monkeypatch.setattr(handler.model, "predict", watched)
    clip = encoded(folder / "clip.mp4")
    requests = [
        {"inputs": {"video": clip, "question": "a" * length, "candidates": ANSWERS[:count]}}
        for length in (1, 5, 40)
        for count in (1, 2, 3)
    ]
    alone = [post(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(post, requests * 3))
    assert found == [approximately(answers) for answers in alone * 3]
    assert len(most) == 36 and max(most) == 1


def test_handler_answers_an_error_for_numbers_that_are_not_finite(handler, folder, monkeypatch):
    weight = handler.model.predictor_head.projection.weight
    monkeypatch.setattr(weight, "data", weight.data * torch.nan)
    clip = encoded(folder / "clip.mp4")
    for inputs, task in (
        ({"question": "a"}, "visual-question-answering"),
        ({}, "embed"),
    ):
        answer = handler({"inputs": {"video": clip} | inputs, "parameters": {"task": task}})
        assert "a predicted embedding of this model is not finite" in answer["error"]


def test_handler_rejects_a_checkpoint_that_lacks_weights(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["y_head.projection.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing, such as y_head.projection.weight"):
        EndpointHandler(str(tmp_path / "model"))


@pytest.mark.slow
def test_handler_of_a_published_folder_serves_without_this_package(folder, post, tmp_path):
    """Import the file by its path as a module of its own, like the endpoint's server."""
    request = {"inputs": {"video": encoded(folder / "clip.mp4"), "question": QUESTION}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("handler", {str(folder / "model" / "handler.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler()
assert type(handler.model).__module__.startswith("transformers_modules"), type(handler.model)
print(json.dumps(handler(json.load(open({str(tmp_path / "request.json")!r})))))
"""
    assert_same(json.loads(run_elsewhere(script, tmp_path).splitlines()[-1]), post(request))
