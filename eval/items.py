"""The rows, clips and texts that scores are means over, with the scores of each.

An evaluation writes them to `items.jsonl`; `eval.compare` pairs those of two evaluations. There an
item is named by a hash, so the file is equal on every machine and contains no text of the data.
`predictions.jsonl` has the same items in the same order, with their clips and texts to read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from processing.rows import clip_key, content_key, media_file, media_name

FILE, PREDICTIONS = "items.jsonl", "predictions.jsonl"


@dataclass(frozen=True)
class Items:
    """The n items of some metrics, such as the questions of a VQA benchmark.

    Attributes:
        clips (`list[list[dict]]` of length n): rows of the clips that the item is about.
        texts (`list[list[str]]` of length n): texts that the item is about, such as question and
            answer. A prompt that the model brings is left out, because two models with different
            prompts answer the same item.
        clusters (`np.ndarray` of shape `(n,)`): number of each item's cluster.
        scores (`dict[str, torch.Tensor]`): value of each item `(n,)`, by metric.
        predictions (`list[str]` or `list[int]` of length n): the model's texts, or ranks; empty if
            an item has several.
        types (`list[str]` of length n, *optional*): question types.
    """

    clips: list[list[dict]]
    texts: list[list[str]]
    clusters: np.ndarray
    scores: dict[str, torch.Tensor | np.ndarray]
    predictions: list[str] | list[int]
    types: list[str] | None = None

    def names(self) -> list[str]:
        """Return a name of each item that is the same on every machine and in every order of rows.

        It is a hash of the clips' contents and of the texts. Every file is read once for it.
        Items with equal clips and texts are counted: the second one's name ends in "#2".
        """
        rows = {clip_key(row): row for clips in self.clips for row in clips}
        contents = {key: content_key(row) for key, row in tqdm(rows.items(), "item names", delay=5)}
        names, seen = [], Counter()
        for clips, texts in zip(self.clips, self.texts, strict=True):
            known = [sorted(contents[clip_key(row)] for row in clips), texts]
            name = hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return names

    def as_json(self) -> Iterator[dict]:
        """Yield one JSON object for each item."""
        scores = {
            metric: [_short(value) for value in np.asarray(values, dtype=np.float64).tolist()]
            for metric, values in self.scores.items()
        }
        for index, name in enumerate(self.names()):
            item = {"item": name, "cluster": int(self.clusters[index])}
            if self.types is not None:
                item["type"] = self.types[index]
            if self.predictions:
                item["prediction"] = self.predictions[index]
            yield item | {"scores": {metric: found[index] for metric, found in scores.items()}}

    def readable(self) -> Iterator[dict]:
        """Yield each item as `as_json` does, with its clips and texts."""
        for item, clips, texts in zip(self.as_json(), self.clips, self.texts, strict=True):
            head = {"item": item.pop("item"), "clips": [_clip(row) for row in clips]}
            yield head | {"texts": texts} | item


def _clip(row: dict) -> dict:
    """Return the file of a row's clip, relative to the working directory if it is inside, and its
    line and seconds."""
    kind = "video" if "video" in row else "image"
    name = media_name(media_file(row))
    if Path(name).is_absolute() and Path(name).is_relative_to(Path.cwd()):
        name = str(Path(name).relative_to(Path.cwd()))
    known = {part: row[part] for part in ("line", "start", "end") if part in row}
    return {kind: name} | known


def _short(value: float) -> int | float:
    """Return a whole number without its decimals: most scores are 0 or 1."""
    return int(value) if value.is_integer() else round(value, 8)


def write_items(path: Path, benchmark: str, items: list[Items], *, append: bool) -> None:
    """Write the items of a benchmark, one JSON object per line."""
    with open(path, "a" if append else "w", encoding="utf-8") as file:
        for part in items:
            for item in part.as_json():
                line = json.dumps({"benchmark": benchmark, **item}, ensure_ascii=False)
                file.write(line + "\n")


def write_predictions(path: Path, benchmark: str, items: list[Items], *, append: bool) -> None:
    """Write the items of a benchmark with their clips and texts, one JSON object per line."""
    with open(path, "a" if append else "w", encoding="utf-8") as file:
        for part in items:
            for item in part.readable():
                line = json.dumps({"benchmark": benchmark, **item}, ensure_ascii=False)
                file.write(line + "\n")


@dataclass
class Column:
    """One metric's scores of one evaluation.

    Attributes:
        values (`dict[str, float]`): score by item.
        clusters (`dict[str, int]`): cluster by item.
        types (`dict[str, str]`): question type by item; empty for metrics without types.
    """

    values: dict[str, float]
    clusters: dict[str, int]
    types: dict[str, str]


def read_items(path: Path) -> dict[tuple[str, str], Column]:
    """Read the file of `write_items`: a column for each benchmark and metric.

    Raises: `ValueError` that names the line which is not an item.
    """
    columns: dict[tuple[str, str], Column] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
                name, cluster, kind = found["item"], found["cluster"], found.get("type")
                for metric, value in found["scores"].items():
                    column = columns.setdefault((found["benchmark"], metric), Column({}, {}, {}))
                    column.values[name] = float(value)
                    column.clusters[name] = cluster
                    if kind is not None:
                        column.types[name] = kind
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}:{number}: not an item ({error!r}). Run eval.evaluate again."
                ) from error
    return columns


__all__ = [
    "FILE",
    "PREDICTIONS",
    "Column",
    "Items",
    "read_items",
    "write_items",
    "write_predictions",
]
