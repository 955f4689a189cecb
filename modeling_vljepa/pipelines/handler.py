"""Inference endpoint of a published VL-JEPA: this file is in the root of the model's repository.

A request is JSON, and its task is a parameter:

    {"inputs": {...}, "parameters": {"task": "visual-question-answering", ...}}

| task                                  | inputs                                    |
|---------------------------------------|-------------------------------------------|
| `visual-question-answering` (default) | medium, `question`, `candidates`          |
| `video-text-retrieval`                | medium, `texts`                           |
| `zero-shot-video-classification`      | medium, `candidate_labels`                |
| `embed`                               | medium, or `text`                         |

The medium is `video` or `image`: the file in base64. With the environment variable
`VLJEPA_ALLOW_URLS=1` it can be an http(s) address; callers can then make this machine fetch any
address that it can reach. A path is rejected: no file of this machine is read. `candidates` is
optional for a model with answers of its own.

The other parameters are those of the pipelines: `top_k`, `calibrated`, `query` (the query about the
medium, in the last three tasks) and `hypothesis_template`. The defaults of the last two are the
model's own (`config.prompts`, `config.target_prompts`); `embed` asks the retrieval query.

The answer is `[{"answer" | "text" | "label": ..., "score": ...}]`, best first. `embed` returns
`{"embedding": [...]}`, a unit vector. An invalid request returns `{"error": ...}`, which names the
field.
"""

import base64
import binascii
import os
from threading import Lock
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MEDIA = {"video", "image"}
LISTS = {"candidates", "texts", "candidate_labels"}
INPUTS = {
    "visual-question-answering": MEDIA | {"question", "candidates"},
    "video-text-retrieval": MEDIA | {"texts"},
    "zero-shot-video-classification": MEDIA | {"candidate_labels"},
    "embed": MEDIA | {"text"},
}
PARAMETERS = {
    "visual-question-answering": {"top_k", "calibrated"},
    "video-text-retrieval": {"top_k", "calibrated", "query"},
    "zero-shot-video-classification": {"top_k", "calibrated", "query", "hypothesis_template"},
    "embed": {"query"},
}


def check_object(name: str, value: Any, allowed: set[str]) -> dict[str, Any]:
    """Return the fields of a JSON object that are not `null`.

    Raises: `ValueError` for other types and for a field that is not allowed.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}: give a JSON object.")
    if unknown := sorted(str(field)[:50] for field in value.keys() - allowed):
        raise ValueError(f"{name} has no field {unknown[0]!r}, only {sorted(allowed)}.")
    return {field: content for field, content in value.items() if content is not None}


class EndpointHandler:
    """Server of one model; its name and its methods are those that Inference Endpoints expects.

    Args:
        path (`str`, *optional*): the model's folder; defaults to the folder of this file.
    """

    max_bytes = 50 * 2**20  # per file
    max_seconds = 600  # per video
    max_pixels = 25_000_000  # per image or frame
    max_texts = 1_000
    max_characters = 2_000  # per text; of a label, in its template
    max_total_characters = 100_000  # per request: texts times the characters of the longest
    max_address = 2_000  # characters

    def __init__(self, path: str = ""):
        path = path or os.path.dirname(os.path.abspath(__file__))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, report = AutoModel.from_pretrained(
            path, trust_remote_code=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would leave them random
            raise ValueError(
                f"{path}: {len(missing)} weights are missing, such as {missing[0]}. Upload the "
                "whole checkpoint."
            )
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.processor.video_processor.max_seconds = self.max_seconds
        self.processor.video_processor.max_pixels = self.max_pixels
        self.pipelines = {
            task: get_class_from_dynamic_module(entry["impl"], path)(
                model=self.model, processor=self.processor, task=task, device=device
            )
            for task, entry in self.model.config.custom_pipelines.items()
            if task in INPUTS
        }
        self.checks = self.pipelines["video-text-retrieval"]
        # Requests run one at a time: each is limited in memory, but their number is not.
        self.lock = Lock()

    def __call__(self, data: dict[str, Any]) -> list[dict] | dict:
        """Answer one request; the module's docstring has the format."""
        try:
            task, inputs, parameters = self.read(data)
            with self.lock:
                if task == "embed":
                    return {"embedding": self.embed(inputs, parameters).tolist()}
                medium = {name: inputs.pop(name) for name in MEDIA & inputs.keys()}
                question = {name: inputs.pop(name) for name in {"question"} & inputs.keys()}
                return self.pipelines[task](medium | question, **inputs, **parameters)
        except ValueError as error:
            return {"error": str(error)}

    def embed(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> torch.Tensor:
        """Return a text's target embedding or a medium's predicted embedding, `(D,)`."""
        pipe = self.pipelines["video-text-retrieval"]
        if "text" in inputs and len(inputs) == 1:
            return pipe.embed_texts([inputs["text"]])[0]
        if "text" in inputs or not inputs:
            raise ValueError("inputs: embed needs one of video, image and text.")
        return pipe.forward([pipe.preprocess(inputs, **parameters)])[0]

    def read(self, data: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Return the task, its inputs (media as bytes) and its parameters, after all checks."""
        data = check_object("the request", data, {"inputs", "parameters"})
        if "inputs" not in data:
            raise ValueError("inputs is missing.")
        parameters = data.get("parameters", {})
        every = set().union({"task"}, *PARAMETERS.values())
        parameters = check_object("parameters", parameters, every)
        task = parameters.pop("task", "visual-question-answering")
        if not isinstance(task, str) or task not in INPUTS:
            raise ValueError(f"task is {str(task)[:50]!r}: choose one of {sorted(INPUTS)}.")
        parameters = check_object(f"parameters of {task}", parameters, PARAMETERS[task])
        inputs = check_object(f"inputs of {task}", data["inputs"], INPUTS[task])
        inputs = {name: self.check(name, value) for name, value in inputs.items()}
        parameters = {name: self.check(name, value) for name, value in parameters.items()}
        if "candidate_labels" in inputs and "hypothesis_template" in parameters:
            # The pipeline fills the template too, but with its own limits, which are higher.
            self.checks.fill_template(
                parameters["hypothesis_template"],
                inputs["candidate_labels"],
                self.max_characters,
                self.max_total_characters,
            )
        return task, inputs, parameters

    def check(self, name: str, value: Any) -> Any:
        """Return one field, a medium as bytes; raise `ValueError` if it is beyond a limit."""
        if name in MEDIA:
            return self.read_medium(name, value)
        if name == "calibrated":
            if not isinstance(value, bool):
                raise ValueError(f"{name} is a {type(value).__name__}: give true or false.")
            return value
        if name == "top_k":
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {str(value)[:50]}: give a whole number of at least 1.")
            return value
        if name in LISTS:
            if not isinstance(value, list):
                raise ValueError(f"{name} is a {type(value).__name__}: give a list of strings.")
            if len(value) > self.max_texts:
                raise ValueError(f"{name} has {len(value)} texts: give at most {self.max_texts}.")
            limits = self.max_characters, self.max_total_characters
            return self.checks.check_texts(name, value, *limits)
        return self.checks.check_text(name, value, self.max_characters)

    def read_medium(self, name: str, value: Any) -> bytes:
        if not isinstance(value, str):
            raise ValueError(f"{name} is a {type(value).__name__}: give the file in base64.")
        if value.lower().startswith(("http://", "https://")):
            if len(value) > self.max_address:
                raise ValueError(
                    f"{name} is a URL of {len(value)} characters: give at most {self.max_address}."
                )
            if os.environ.get("VLJEPA_ALLOW_URLS") != "1":
                raise ValueError(f"{name} is a URL, but URLs are off here: send base64.")
            return self.checks.fetch(value, self.max_bytes)
        if len(value) * 3 // 4 > self.max_bytes:  # before decoding, which would need the memory
            raise ValueError(f"{name} is larger than {self.max_bytes} bytes: send a smaller file.")
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{name} is not base64 ({error}): send the file's content.") from error
        if not content:
            raise ValueError(f"{name} is empty.")
        return content


__all__ = ["EndpointHandler"]
