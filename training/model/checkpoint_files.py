"""Files of a checkpoint, from a folder or Hub id; each error names the setting."""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from training.arguments import RecipeError

MODELS = (PreTrainedModel, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)


Weights = dict[str, torch.Tensor]


def load(auto: type, key: str, path: str, *, new: tuple[str, ...] = (), **options: Any) -> Any:
    """`auto.from_pretrained(path)`, with an error that names the setting `key`.

    Args:
        new: how the names of weights begin that need not be there; others would be random.

    Raises:
        RecipeError: it does not load, or a model lacks weights, or they are of other shapes.
    """
    is_model = issubclass(auto, MODELS) and "output_loading_info" not in options
    if is_model:  # upstream warns of what is missing, and its error on shapes is a table
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded = auto.from_pretrained(path, **options)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{key}: {path} is no folder or Hub id that loads. {error}") from error
    except (ValueError, KeyError) as error:
        raise RecipeError(f"{key}: {path} does not load: {error}") from error
    if not is_model:
        return loaded
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise RecipeError(
            f"{key}: {path} has {name} of shape {tuple(found)}, and the configuration asks for "
            f"{tuple(wanted)}. Leave a change of sizes away."
        )
    for name in sorted(info["missing_keys"]):
        if not name.startswith(new):
            raise RecipeError(
                f"{key}: {path} lacks {name}, which would begin at random. Give a checkpoint that "
                "has all that the configuration asks for."
            )
    return model


def public_name(source: str) -> str:
    """A Hub id as it is; of a folder only its own name, because paths are nobody's business."""
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) else source


def find_file(source: str, name: str) -> str | None:
    """The local path of a file of a folder or Hub id, or `None` where there is none."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
    )


def read_json(source: str, name: str) -> Any:
    """A JSON file of a folder or Hub id, or `None` where there is none."""
    path = find_file(source, name)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_tensors(
    key: str, source: str, rename: Callable[[str], str | None], folder: str = ""
) -> Weights:
    """The tensors for which `rename` has a name; a shard without one is not even fetched.

    `folder` is the one inside the source in which the weights lie.
    """
    index = read_json(source, os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME))
    try:
        files = shard_names(key, source, folder) if index is None else index["weight_map"]
        wanted = defaultdict(dict)
        for name, file in files.items():
            if (new := rename(name)) is not None:
                wanted[file][new] = name
        tensors = {}
        for file, names in wanted.items():
            path = find_file(source, os.path.join(folder, file))
            if path is None:
                raise RecipeError(f"{key}: {source} lacks {file}, which its index names.")
            with safe_open(path, "pt") as shard:
                tensors |= {new: shard.get_tensor(name) for new, name in names.items()}
    except SafetensorError as error:
        raise RecipeError(f"{key}: a weight file of {source} is broken: {error}") from error
    return tensors


def shard_names(key: str, source: str, folder: str) -> dict[str, str]:
    """The tensors of a checkpoint of one file, each with that file's name."""
    path = find_file(source, os.path.join(folder, SAFE_WEIGHTS_NAME))
    if path is None:
        raise RecipeError(
            f"{key}: {os.path.join(source, folder)} has no {SAFE_WEIGHTS_NAME} and no "
            f"{SAFE_WEIGHTS_INDEX_NAME}; weights in other formats are not read."
        )
    with safe_open(path, "pt") as shard:
        return dict.fromkeys(shard.keys(), SAFE_WEIGHTS_NAME)


def load_weights(key: str, source: str, config: PreTrainedConfig, cls: type, **options) -> Weights:
    """What a stock model of this configuration reads from the checkpoint, and nothing random."""
    model, info = load(
        cls,
        key,
        source,
        config=config,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    return {f"backbone.{k}": v for k, v in model.state_dict().items() if k not in absent}


def split_gguf(source: str) -> tuple[str, dict[str, str]]:
    """The folder or Hub id, and the option that names a GGUF file in it where `source` is one."""
    if not source.endswith(".gguf"):
        return source, {}
    folder, file = os.path.split(source)
    return folder, {"gguf_file": file}
