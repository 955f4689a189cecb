"""Benchmark files such as `benchmarks.yaml`: read, checked, and matched to a model."""

import math
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from eval.sources import Source
from eval.task import Benchmark, Paper
from eval.tasks import TASKS
from eval.yaml_text import parse_yaml
from modeling_vljepa.prompts import PROMPTS

PROMPT_NAMES = (*PROMPTS, "retrieval")


DATA = Path("data")  # folder of the users' data, unless they name another


def load_benchmarks(path: Path, names: list[str], data: Path = DATA) -> list[Benchmark]:
    """Read the named benchmarks of a YAML file, in the order of the names; `["all"]` reads all.

    With `["all"]`, benchmarks of published data that are not in the folder are left out, and named.

    Args:
        path: a file, or a folder whose `*.yaml` are read together.
        data: the folder of the data that sources name.

    Raises: `ValueError` for a file that holds no benchmarks, for unknown names, tasks and keys, and
        for values of a wrong type; `FileNotFoundError` for missing files.
    """
    entries = read_entries(path)
    if names != ["all"]:
        if unknown := [name for name in names if name not in entries]:
            known = ", ".join(map(str, entries))
            raise ValueError(f"{path} has no {', '.join(unknown)}. It has: {known}")
        return [_benchmark(name, entries[name], data) for name in dict.fromkeys(names)]
    found = []
    for name, entry in entries.items():
        try:
            found.append(_benchmark(name, entry, data))
        except FileNotFoundError as error:
            if not _is_published(entry):
                raise
            print(f"left out, for its data are missing: {error}")
    if not found:
        raise FileNotFoundError(f"{path}: {data} has the data of none of its benchmarks")
    return found


def read_entries(path: Path) -> dict[str, Any]:
    """Return the entries of a file, or of all files of a folder, by name."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: the folder has no *.yaml")
    entries: dict[str, Any] = {}
    for file in files:
        try:
            found = parse_yaml(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a YAML file: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}: benchmarks are entries `name: {{task: …}}`, found {found!r}")
        if twice := entries.keys() & found.keys():
            raise ValueError(f"{file}: {', '.join(sorted(twice))} is in another file, too")
        entries |= found
    return entries


def measurable(
    benchmarks: list[Benchmark],
    names: list[str],
    has_decoder: bool,
    *,
    has_tokens: bool = False,
    has_embeddings: bool = True,
) -> list[Benchmark]:
    """Return the benchmarks that a model can be measured on; print which of `all` are left out.

    Args:
        has_decoder: the model has a Y-Decoder.
        has_tokens, has_embeddings: the model predicts tokens; the model predicts embeddings.

    Raises: `ValueError` if the model cannot be measured on a benchmark asked for by name.
    """
    cures = {
        "embeddings": "embeddings, and this model predicts tokens alone. Leave it out.",
        "Y-Decoder": "a Y-Decoder, which a hybrid cannot have. Leave this benchmark out."
        if has_tokens
        else "a Y-Decoder, and this model has none. Train one with "
        "`python -m training.train_decoder`.",
    }
    needy: dict[str, list[str]] = {}  # names of benchmarks, by the model's missing part
    for benchmark in benchmarks:
        kind = TASKS[benchmark.task]
        if has_tokens and kind.by_tokens:
            continue
        if not has_embeddings:
            needy.setdefault("embeddings", []).append(benchmark.name)
        elif kind.needs_decoder and not has_decoder:
            needy.setdefault("Y-Decoder", []).append(benchmark.name)
    for part, lacking in needy.items():
        if names != ["all"]:
            raise ValueError(f"{lacking[0]} needs {cures[part]}")
        print(f"left out, for this model has no {part}: {', '.join(lacking)}")
    left_out = {name for lacking in needy.values() for name in lacking}
    return [each for each in benchmarks if each.name not in left_out]


def _is_published(entry: dict) -> bool:
    """Return whether an entry is about published data, which the user has to get."""
    return "source" in entry or "paper" in entry


def _benchmark(name: str, entry: object, data: Path) -> Benchmark:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: a benchmark has keys and values, found {entry!r}")
    task = entry.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{name}: task is {task!r}, must be one of {', '.join(TASKS)}")
    kind = TASKS[task].benchmark
    keys = {key.name: key for key in fields(kind) if key.name != "name"}
    required = {key.name for key in keys.values() if key.default is MISSING}
    if "source" in entry:
        if "rows" in entry:
            raise ValueError(f"{name}: give either rows or source")
        required.remove("rows")
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"{name}: a {task} benchmark needs {', '.join(missing)}")
    if unknown := sorted(map(str, entry.keys() - keys.keys())):
        raise ValueError(f"{name}: a {task} benchmark takes no {', '.join(unknown)}")
    if (prompt := entry.get("prompt")) is not None:
        if prompt not in PROMPT_NAMES:
            raise ValueError(f"{name}: prompt is {prompt!r}, must be one of {PROMPT_NAMES}")
        if "query" in entry:
            raise ValueError(f"{name}: give either query or prompt")
    # The files of published data are in one folder, wherever the command runs.
    folder = data if _is_published(entry) else Path()
    try:
        values = {
            key: _value(kind, name, keys[key], value, folder, data) for key, value in entry.items()
        }
    except FileNotFoundError as error:
        terms = entry["paper"].get("terms") if isinstance(entry.get("paper"), dict) else None
        hint = "" if terms is None else f". {terms}"
        raise FileNotFoundError(f"{str(error).removesuffix('.')}{hint}") from error
    return kind(name, **{"rows": None, **values})


def _value(
    kind: type[Benchmark], name: str, key: Field, value: Any, folder: Path, data: Path
) -> Any:
    """Return the value of a key; a path becomes a `Path`, a mapping a `Source` or a `Paper`.

    Args:
        folder: folder to which a path is relative.
        data: folder of the data that sources name.

    Raises: `ValueError` for a wrong type; `FileNotFoundError` for a missing file.
    """
    if key.type == Source | None:
        row_fields = kind.row_fields()
        if key.name != "source":  # texts such as the answers of a training split
            row_fields = replace(row_fields, media=False)
        source = Source.from_mapping(name, value, data, row_fields)
        source.check_files()
        return source
    if key.type == Paper | None:
        return Paper.from_mapping(name, value)
    is_path = key.type in (Path, Path | None)
    wanted = str if is_path else key.type
    if not isinstance(value, wanted):
        words = wanted.__name__ if isinstance(wanted, type) else wanted  # int, or int | None
        raise ValueError(f"{name}: {key.name} is {value!r}, must be {words}")
    # All numbers of an entry, such as those of frames and beams, are above 0; `True` is none.
    is_number = isinstance(value, int | float) and wanted is not bool
    if is_number and (isinstance(value, bool) or not 0 < value < math.inf):
        raise ValueError(f"{name}: {key.name} is {value!r}, must be a number above 0")
    if not is_path:
        return value
    if not (folder / value).is_file():
        root = "the working directory" if folder == Path() else str(folder)
        raise FileNotFoundError(
            f"{name}: {key.name} is {value}, which does not exist. Paths are relative to {root}."
        )
    return folder / value


__all__ = ["DATA", "load_benchmarks", "measurable", "read_entries"]
