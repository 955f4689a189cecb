"""Facts about a training for the model card: its runs, and the data with their licences."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eval.results import portable

RUNS = "training_runs.json"


def read_runs(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the runs that made a checkpoint, as `training.loop.run_facts` wrote them.

    The list is empty for a checkpoint without this file, such as one that was not trained.
    """
    path = Path(folder, RUNS)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def duration(seconds: float) -> str:
    """Return a time in the largest fitting unit, such as "2.5 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def cell(value: object) -> str:
    """Return a value as the text of a Markdown table's cell."""
    return str(value).replace("|", "\\|")


@dataclass(frozen=True)
class TrainingData:
    """One data set that a model was trained on.

    Attributes:
        source (`str`): the rows, or the arguments of `datasets.load_dataset`.
        hub_id (`str`, *optional*): its Hub id; None for files.
        licence (`str`, *optional*): the licence that a recipe states.
    """

    source: tuple[str, ...]
    hub_id: str | None
    licence: str | None

    @property
    def name(self) -> str:
        """The source, without the folders of absolute paths: they exist on one machine only."""
        return " ".join(portable(Path(part)) for part in self.source)


def hub_id(dataset: str) -> str | None:
    """Return the argument of `datasets.load_dataset` if it is a Hub id, else None.

    A format such as `parquet` has no slash. `datasets` prefers a folder to a Hub id of its name.
    """
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return dataset if "/" in dataset and not Path(dataset).exists() else None


def training_data(recipes: list[dict[str, Any]]) -> list[TrainingData]:
    """Return the distinct sources of the recipes, in order.

    The licence of a source that one recipe states holds for the same source in the others.
    """
    licences: dict[tuple[str, ...], str | None] = {}
    hub_ids = {}
    for source in (each for recipe in recipes for each in recipe["data"]["sources"]):
        if "rows" in source:
            key = (source["rows"],)
        else:
            files = source.get("data_files") or []
            files = [files] if isinstance(files, str) else files
            key = tuple(filter(None, [source["dataset"], source.get("config"), *files]))
            hub_ids[key] = hub_id(source["dataset"])
        licences[key] = licences.get(key) or source.get("licence")
    return [TrainingData(key, hub_ids.get(key), each) for key, each in licences.items()]


def data_table(data: list[TrainingData]) -> str:
    """Return a Markdown table of the training data and their licences."""
    rows = ["| data | licence |", "|---|---|"]
    for each in data:
        name = cell(f"`{each.name}`")
        if each.hub_id is not None:
            name = f"[{name}](https://huggingface.co/datasets/{each.hub_id})"
        rows.append(f"| {name} | {cell(each.licence or 'unknown')} |")
    return "\n".join(rows)


def run_table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the runs: steps, wall time and hardware."""
    rows = [
        "| stage | steps | time | processes | device of a process | compute |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        steps, time = f"{run['first_step']} to {run['last_step']}", duration(run["seconds"])
        cells = (run["stage"], steps, time, run["processes"], run["device"], run["precision"])
        rows.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(rows)


__all__ = [
    "RUNS",
    "TrainingData",
    "data_table",
    "duration",
    "hub_id",
    "read_runs",
    "run_table",
    "training_data",
]
