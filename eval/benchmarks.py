"""Benchmark files such as `benchmarks.yaml`: read, checked, and matched to a model."""

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from eval.task import Benchmark
from eval.tasks import TASKS


def load_benchmarks(path: Path, names: list[str]) -> list[Benchmark]:
    """Read the named benchmarks of a YAML file, in the order of the names; `["all"]` reads all.

    Raises: `ValueError` for a file that holds no benchmarks, for unknown names, tasks and keys, and
        for values of a wrong type; `FileNotFoundError` for missing files.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: benchmarks are entries `name: {{task: …}}`, found {entries!r}")
    names = list(entries) if names == ["all"] else names
    if unknown := [name for name in names if name not in entries]:
        known = ", ".join(map(str, entries))
        raise ValueError(f"{path} has no {', '.join(unknown)}. It has: {known}")
    return [_benchmark(name, entries[name]) for name in names]


def measurable(benchmarks: list[Benchmark], names: list[str], has_decoder: bool) -> list[Benchmark]:
    """Return the benchmarks that a model can be measured on; print which of `all` are left out.

    Raises: `ValueError` if the model has no Y-Decoder and a benchmark asked for by name needs one.
    """
    needy = [each.name for each in benchmarks if TASKS[each.task].needs_decoder]
    if has_decoder or not needy:
        return benchmarks
    if names != ["all"]:
        raise ValueError(
            f"{needy[0]} needs a Y-Decoder, and this model has none. Train one with "
            "`python -m training.train_decoder`."
        )
    print(f"left out, for this model has no Y-Decoder: {', '.join(needy)}")
    return [each for each in benchmarks if each.name not in needy]


def _benchmark(name: str, entry: object) -> Benchmark:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: a benchmark has keys and values, found {entry!r}")
    task = entry.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{name}: task is {task!r}, must be one of {', '.join(TASKS)}")
    keys = {key.name: key for key in fields(TASKS[task].benchmark) if key.name != "name"}
    required = {key.name for key in keys.values() if key.default is MISSING}
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"{name}: a {task} benchmark needs {', '.join(missing)}")
    if unknown := sorted(map(str, entry.keys() - keys.keys())):
        raise ValueError(f"{name}: a {task} benchmark takes no {', '.join(unknown)}")
    values = {key: _value(name, keys[key], value) for key, value in entry.items()}
    return TASKS[task].benchmark(name, **values)


def _value(name: str, key: Field, value: Any) -> Any:
    """Return the value of a key; a path becomes a `Path`.

    Raises: `ValueError` for a wrong type; `FileNotFoundError` for a missing file.
    """
    is_path = key.type in (Path, Path | None)
    wanted = str if is_path else key.type
    if not isinstance(value, wanted):
        words = wanted.__name__ if isinstance(wanted, type) else wanted  # int, or int | None
        raise ValueError(f"{name}: {key.name} is {value!r}, must be {words}")
    if not is_path:
        return value
    if not Path(value).is_file():
        raise FileNotFoundError(
            f"{name}: {key.name} is {value}, which does not exist. Paths are relative to the "
            "working directory."
        )
    return Path(value)


__all__ = ["load_benchmarks", "measurable"]
