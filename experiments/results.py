"""Results of a grid: one JSON line for each run, and the items that its scores are means over.

`results.jsonl` and the folder `items` are next to the grid. A line holds each item's score, so the
report pairs items without the models. Lines of the same items share a file of their clusters.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.items import Column

FILE, ITEMS = "results.jsonl", "items"
BENCHMARK = "benchmark "  # before a benchmark's name, in a line's "prepared"


def read_lines(folder: Path) -> dict[tuple[str, int], dict]:
    """Return the last line of each setting and seed.

    Raises:
        ValueError: a line is not JSON, such as one that was cut off.
    """
    path, lines = folder / FILE, {}
    if not path.is_file():
        return lines
    texts = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, text in enumerate(texts if texts != [""] else [], start=1):
        try:
            line = json.loads(text)
            if "error" not in line and not line.keys() >= {"settings", "prepared", "items"}:
                raise KeyError(text)
            lines[line["setting"], line["seed"]] = line
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {number} is not a result; delete it.") from error
    return lines


def append_line(folder: Path, line: dict) -> None:
    """Append a line to the results, below one that was cut off."""
    path = folder / FILE
    content = path.read_bytes() if path.is_file() else b""
    is_cut = content != b"" and not content.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_cut + json.dumps(line, ensure_ascii=False) + "\n")


def digest(content: bytes) -> str:
    """Return a hash of settings, data or results, as 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def pack(folder: Path, column: Column) -> dict[str, Any]:
    """Return an evaluation's scores for a line, and store the clusters and types of their items.

    Scores of 0 and 1 become a string of digits, others a list.
    """
    names = sorted(column.values)
    values = [round(column.values[name], 4) for name in names]
    numbers: dict[int, int] = {}
    clusters = [column.clusters[name] for name in names]
    facts = {"clusters": [numbers.setdefault(each, len(numbers)) for each in clusters]}
    if column.types:
        facts["types"] = [column.types[name] for name in names]
    text = json.dumps(facts) + "\n"
    items = digest(json.dumps(names).encode())
    path = folder / ITEMS / f"{items}.json"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        # The same items with other clusters or types, such as corrected ones
        items = digest((json.dumps(names) + text).encode())
        path = folder / ITEMS / f"{items}.json"
    if not path.is_file():  # written once: a kill never damages what other lines read
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if set(values) <= {0, 1}:
        values = "".join(str(int(value)) for value in values)
    return {"items": items, "values": values}


def pack_all(folder: Path, columns: dict[tuple[str, str], Column], scores: set[str]) -> dict:
    """Return the packed items of every score of a line, by its name.

    That of a question type, such as "vqa where", refers to the benchmark's first metric.

    Args:
        scores: names of the line's scores.
    """
    items = {}
    for (benchmark, metric), column in columns.items():
        name = f"{benchmark} {metric}"
        if name not in scores:
            continue
        items[name] = pack(folder, column)
        for kind in sorted(set(column.types.values())):
            part = f"{benchmark} {kind}"
            if part in scores and part not in items:
                items[part] = {"items": items[name]["items"], "of": name, "type": kind}
    return items


def unpack(folder: Path, line: dict, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values and numbers of the clusters of a score's items, each `(n,)`."""
    packed = line["items"][score]
    path = folder / ITEMS / f"{packed['items']}.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    whole = line["items"][packed.get("of", score)]["values"]
    values = np.array([float(value) for value in whole])
    clusters = np.array(facts["clusters"], dtype=np.int64)
    if "type" in packed:
        part = np.array(facts["types"]) == packed["type"]
        values, clusters = values[part], clusters[part]
    return values, clusters


__all__ = ["BENCHMARK", "FILE", "append_line", "digest", "pack_all", "read_lines", "unpack"]
