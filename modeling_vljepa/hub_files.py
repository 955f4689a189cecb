"""Files that make a saved model's folder complete, as a repository on the Hub is.

With them, `pipeline(task, model=folder, trust_remote_code=True)` and
`SentenceTransformer(folder, trust_remote_code=True)` work without this package.
"""

import json
import os
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_vljepa.VLJEPAConfig",
    "AutoModel": "modeling_vljepa.VLJEPAModel",
    "AutoModelForImageTextToText": "modeling_vljepa.VLJEPAForConditionalGeneration",
    "AutoModelForZeroShotImageClassification": (
        "modeling_vljepa.VLJEPAForZeroShotImageClassification"
    ),
}
# `config.custom_pipelines`. Every class is given as a name in the one module that imports all
# others: transformers downloads this module and its imports, so the files of all pipelines are
# there, whichever pipeline is loaded.
CUSTOM_PIPELINES = {
    "visual-question-answering": {
        "impl": "pipeline_vljepa.VLJEPAVisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText", "AutoModel"],  # with a Y-Decoder, or without
    },
    "video-text-retrieval": {
        "impl": "pipeline_vljepa.VLJEPARetrievalPipeline",
        "pt": ["AutoModel"],
    },
    "zero-shot-video-classification": {
        "impl": "pipeline_vljepa.VLJEPAZeroShotClassificationPipeline",
        "pt": ["AutoModel"],
    },
    # transformers' own pipelines of the next three names do not fit: they look for an image
    # processor and for the target tokenizer in the root, or for a model that is a language model.
    "zero-shot-image-classification": {
        "impl": "pipeline_vljepa.VLJEPAZeroShotImageClassificationPipeline",
        "pt": ["AutoModel"],
    },
    "image-text-to-text": {
        "impl": "pipeline_vljepa.VLJEPAImageTextToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
    },
    "image-feature-extraction": {
        "impl": "pipeline_vljepa.VLJEPAImageFeatureExtractionPipeline",
        "pt": ["AutoModel"],
    },
    "streaming-caption": {
        "impl": "pipeline_vljepa.VLJEPAStreamingCaptionPipeline",
        "pt": ["AutoModelForImageTextToText", "AutoModel"],  # with a Y-Decoder, or without
    },
}
# Modules that transformers, an inference endpoint and sentence-transformers load; they import all
# others of `modeling_vljepa/pipelines/`.
ENTRIES = ("pipeline_vljepa.py", "handler.py", "st_vljepa.py")


def find_code(name: str, source: str) -> Path | None:
    """Return a module of the installed package, or of the repository that this code is from.

    Args:
        source: the folder or Hub id from which the model was loaded.
    """
    installed = Path(__file__).parent / "pipelines" / name
    if installed.is_file():
        return installed
    if not source:
        return None
    try:
        # transformers downloads the code of a commit into a folder with the commit's name.
        commit = Path(__file__).parent.name
        found = cached_file(
            source, name, revision=commit, _raise_exceptions_for_missing_entries=False
        )
    except OSError:  # the folder was removed, or there is no network
        return None
    return None if found is None else Path(found)


def pipeline_code(source: str) -> dict[str, Path]:
    """Return the modules of all pipelines by name.

    Raises: `FileNotFoundError`, with a name, if one is not found.
    """
    # Not a list of the folder: downloaded code is next to what imports it, and nothing else is.
    found, waiting = {}, list(ENTRIES)
    while waiting:
        name = waiting.pop()
        if name not in found:
            path = find_code(name, source)
            if path is None:
                raise FileNotFoundError(name)
            found[name] = path
            waiting += [f"{module}.py" for module in get_relative_imports(path)]
    return found


def sentence_transformers_prompts(prompts: dict[str, str]) -> dict[str, str]:
    """Return the queries that `encode(media, prompt_name=...)` can name.

    sentence-transformers passes an empty prompt where it means none, and a medium without a prompt
    gets the retrieval query. So an empty one is left out if it would give another query.
    """
    return {name: text for name, text in prompts.items() if text or not prompts["retrieval"]}


def write_hub_files(
    folder: str | os.PathLike,
    prompts: dict[str, str],
    *,
    query: str | None = None,
    source: str = "",
) -> bool:
    """Write the code of the pipelines, and the settings of sentence-transformers.

    Args:
        folder: the saved model's folder.
        prompts: `config.prompts` of the model.
        query: default query of a `SentenceTransformer`; by default the model's.
        source: see `find_code`.

    Returns: `False`, after a warning, if the code was not found; then nothing was written.
    """
    try:
        code = pipeline_code(source)
    except FileNotFoundError as missing:
        logger.warning(
            f"{folder} is saved without the code of the pipelines: {missing} is not in {source!r}, "
            "from which the model was loaded. Copy the .py files of the model's repository."
        )
        return False
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in code.items():
        # Not `shutil.copy`: a model may be saved into the folder from which it was loaded.
        (folder / name).write_bytes(path.read_bytes())
    settings = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "st_vljepa.VLJEPAModule"}],
        "sentence_transformer_vljepa.json": {} if query is None else {"query": query},
        "config_sentence_transformers.json": {
            "similarity_fn_name": "cosine",
            "prompts": sentence_transformers_prompts(prompts),
            "default_prompt_name": None,
        },
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return True


__all__ = ["AUTO_MAP", "CUSTOM_PIPELINES", "write_hub_files"]
