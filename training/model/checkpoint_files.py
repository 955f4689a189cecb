"""Loading models and files of a checkpoint from a folder or Hub id.

Every error names the setting, `key`, that named the checkpoint.
"""

import json
import os
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
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

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FILES = (".pt", ".safetensors")  # a single file with published names, without a configuration


def load(auto: type, key: str, path: str, *, new: tuple[str, ...] = (), **options: Any) -> Any:
    """Return `auto.from_pretrained(path)`. Code of the checkpoint is never run.

    Args:
        new: prefixes of the weights that the checkpoint may lack and that are then initialised.

    Raises:
        RecipeError: it does not load, or a model lacks other weights or has other shapes.
    """
    is_model = issubclass(auto, MODELS) and "output_loading_info" not in options
    if is_model:  # upstream only warns of missing weights and prints a table of wrong shapes
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options = {"trust_remote_code": False} | options  # the default asks on a terminal
    try:
        loaded = auto.from_pretrained(path, **options)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{key}: cannot load {path} as a folder or Hub id: {error}") from error
    except ImportError as error:  # a class that needs another package, such as timm
        reason = str(error).strip().split(". ")[0]  # more sentences advise to install it with pip
        raise RecipeError(f"{key}: cannot load {path}: {reason}.") from error
    except StrictDataclassError as error:  # several lines
        raise RecipeError(f"{key}: cannot load {path}: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, ValueError) as error:
        if "trust_remote_code=True" in str(error):
            raise RecipeError(
                f"{key}: {path} needs code of its own, which is not run here; give a checkpoint of "
                "one of transformers' classes."
            ) from error
        raise RecipeError(f"{key}: cannot load {path}: {error}") from error
    if not is_model:
        return loaded
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise RecipeError(
            f"{key}: {path} has {name} of shape {tuple(found)}, but the configuration needs "
            f"{tuple(wanted)}. Remove the size changes from model.config."
        )
    for name in sorted(info["missing_keys"]):
        if not name.startswith(new):
            raise RecipeError(
                f"{key}: {path} lacks {name}, which would be random. Give a checkpoint with all "
                "weights of the configuration."
            )
    return model


def public_name(source: str) -> str:
    """Return a Hub id, also of a file's repository, and only the last name of a local path.

    The rest of a local path is private.
    """
    if os.path.exists(source):
        return os.path.basename(os.path.normpath(source))
    return "/".join(source.split("/")[:2])


def find_file(source: str, name: str) -> str | None:
    """Return the local path of a file of a folder or Hub id; `None` if it is missing."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
    )


def read_json(source: str, name: str) -> Any:
    """Return the content of a JSON file of a folder or Hub id; `None` if it is missing."""
    path = find_file(source, name)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_tensors(
    key: str, source: str, rename: Callable[[str], str | None], folder: str = ""
) -> Weights:
    """Return the tensors for which `rename` returns a name, under that name.

    Shards without such a tensor are not downloaded.

    Args:
        rename: returns the new name of a tensor, or `None` to leave it out.
        folder: folder inside the source that contains the weights.

    Raises:
        RecipeError: a weight file is missing or broken, or two tensors have one name then.
    """
    files = tensor_files(key, source, folder)
    try:
        wanted = defaultdict(dict)
        renamed = set()
        for name, file in files.items():
            if (new := rename(name)) is None:
                continue
            if new in renamed:
                raise RecipeError(f"{key}: {source} has two tensors of one name, {new}.")
            renamed.add(new)
            wanted[file][new] = name
        tensors = {}
        for file, names in wanted.items():
            path = find_file(source, os.path.join(folder, file))
            if path is None:
                raise RecipeError(f"{key}: {source} lacks {file}, which its index lists.")
            with safe_open(path, "pt") as shard:
                tensors |= {new: shard.get_tensor(name) for new, name in names.items()}
    except SafetensorError as error:
        raise RecipeError(f"{key}: a weight file of {source} is broken: {error}") from error
    return tensors


def tensor_files(key: str, source: str, folder: str = "") -> dict[str, str]:
    """Return the name of the weight file of each tensor.

    Raises:
        RecipeError: the weight file is missing or broken.
    """
    index = read_json(source, os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME))
    try:
        return shard_names(key, source, folder) if index is None else index["weight_map"]
    except SafetensorError as error:
        raise RecipeError(f"{key}: a weight file of {source} is broken: {error}") from error


def shard_names(key: str, source: str, folder: str) -> dict[str, str]:
    """Return an index of a checkpoint that is one file: that file's name for each tensor.

    Raises:
        RecipeError: the file is missing.
    """
    path = find_file(source, os.path.join(folder, SAFE_WEIGHTS_NAME))
    if path is None:
        raise RecipeError(
            f"{key}: {os.path.join(source, folder)} has no {SAFE_WEIGHTS_NAME} and no "
            f"{SAFE_WEIGHTS_INDEX_NAME}; other formats are not read, save it as safetensors."
        )
    with safe_open(path, "pt") as shard:
        return dict.fromkeys(shard.keys(), SAFE_WEIGHTS_NAME)


def read_file(key: str, source: str) -> Any:
    """Return the content of a single `.pt` or safetensors file.

    torch's restricted unpickler reads a `.pt` file; it runs no code.

    Args:
        source: path of the file, or its name after a folder or Hub id.

    Raises:
        RecipeError: the file is missing or broken.
    """
    folder, file = os.path.split(source)
    try:
        path = source if os.path.isfile(source) else find_file(folder, file) if folder else None
    except OSError as error:
        raise RecipeError(f"{key}: cannot load {source}: {error}") from error
    if path is None:
        raise RecipeError(f"{key}: {source} does not exist; give a .pt file, a folder or a Hub id.")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        if not zipfile.is_zipfile(path):  # torch's own error advises to save the file again
            raise ValueError("it is incomplete, or older than torch 1.6")
        # Mapped, because a file may also hold parts that are not read, such as the optimizer's.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's message advises to load the file without the restriction, which runs its code.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = found[1] if found else "objects other than tensors"
        raise RecipeError(
            f"{key}: {source} refers to {name}, which torch's restricted unpickler does not read; "
            "give the published file."
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).split(". ")[0].splitlines() or [type(error).__name__]
        raise RecipeError(f"{key}: {source} is not a file of tensors: {reason[0]}") from error
    for leaf in tree_leaves(content):
        if isinstance(leaf, torch.Tensor) and (leaf.is_meta or leaf.is_nested):
            raise RecipeError(
                f"{key}: {source} has a tensor without values or a nested one; give the published "
                "file."
            )
    return content


def is_weights(content: Any) -> bool:
    """Return True for a dictionary of named tensors."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    )


def plain_name(name: str, prefixes: tuple[str, ...]) -> str:
    """Return the name of a tensor without the prefixes of wrappers."""
    while name.startswith(prefixes):
        name = name.split(".", 1)[1]
    return name


def strip_prefixes(key: str, source: str, weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    """Return the tensors under their names without the prefixes of wrappers.

    Raises:
        RecipeError: two tensors have one name then.
    """
    plain = {}
    for full, tensor in weights.items():
        name = plain_name(full, prefixes)
        if name in plain:
            raise RecipeError(f"{key}: {source} has two tensors of one name, {name}.")
        plain[name] = tensor.detach()  # a parameter would record what becomes of it
    return plain


def check_shapes(
    key: str,
    source: str,
    model: str,
    found: Weights,
    wanted: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Raise `RecipeError` for a missing, extra or misshapen tensor, with its name.

    A quantised or sparse tensor is refused as well, also one of 8 bits, whose scale is elsewhere.

    Args:
        model: name of the model in the error.
        optional: names that may be missing.
    """
    for name in sorted(wanted.keys() - found.keys() - set(optional)):
        raise RecipeError(f"{key}: {source} lacks {name}; give a complete {model}.")
    for name in sorted(found.keys() - wanted.keys()):
        raise RecipeError(
            f"{key}: {source} has {name}, which this {model} does not have; give another file."
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            raise RecipeError(
                f"{key}: {source} has {name} of shape {tuple(tensor.shape)}, but this size of "
                f"{model} has {tuple(wanted[name])}; give another file."
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise RecipeError(
                f"{key}: {source} has {name} as {tensor.layout} numbers of {tensor.dtype}; give a "
                "file with dense floating-point weights of 16 bits or more."
            )


def load_weights(key: str, source: str, config: PreTrainedConfig, cls: type, **options) -> Weights:
    """Return the weights that a model of class `cls` loads from the checkpoint.

    Weights that the checkpoint lacks are left out, because the model has random ones for them.

    Raises:
        RecipeError: it does not load, or a weight has another shape than the configuration gives.
    """
    model, info = load(
        cls,
        key,
        source,
        config=config,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # upstream's error names no weight
        **options,
    )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise RecipeError(
            f"{key}: {source} has {name} of shape {tuple(found)}, but its config.json gives "
            f"{tuple(wanted)}; correct one of them."
        )
    absent = info["missing_keys"]
    return {f"backbone.{k}": v for k, v in model.state_dict().items() if k not in absent}


def split_gguf(source: str) -> tuple[str, dict[str, str]]:
    """Split the path of a GGUF file into its folder or Hub id and the option `gguf_file`.

    Any other source is returned with no options.
    """
    if not source.endswith(".gguf"):
        return source, {}
    folder, file = os.path.split(source)
    return folder, {"gguf_file": file}
