"""The user's own data: a JSONL file, one sample per line.

    {"video": "clips/0001.mp4", "query": "What is poured?", "target": "milk"}
    {"image": "photos/7.jpg", "target": "a red bicycle against a wall"}

`video` or `image` is a path, relative to the JSONL file's folder. `query` may be left out, and so
may `negatives`, a list of texts that are wrong here though they come close. Other columns
(`group_id`, ...) are handed on as they are.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

_FIELDS = ("video", "image", "query", "target")


@dataclass(frozen=True)
class BadRow:
    """A line that is no sample. `str(bad_row)` reads "rows.jsonl:17: target is empty"."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_rows(path: str | os.PathLike) -> tuple[list[dict], list[BadRow]]:
    """Read a JSONL file, setting aside every line that could not be trained or evaluated on.

    Returns: the good rows and the bad ones. A good row holds `line` (its number in the file,
        from 1; it replaces a column of that name), `video` or `image` (absolute path of an
        existing file), `query` (default `""`), `target`, and the file's other columns.
    Raises: `FileNotFoundError` if there is no such file, `ValueError` if it holds no row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSONL file. Give the path of one.")
    rows, bad = [], []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                rows.append(_row(line, path.parent) | {"line": number})
            except _RowError as error:
                bad.append(BadRow(str(path), number, str(error)))
    if not rows and not bad:
        raise ValueError(f"{path}: the file holds no row. Write one JSON object per line.")
    return rows, bad


def bad_rows_report(bad: list[BadRow], total: int, max_share: float) -> str:
    """Say how many of `total` rows were set aside and why, the first 20 of them by name.

    Raises: `ValueError` with the same text when more than `max_share` (0 to 1) are bad.
    """
    report = f"{len(bad)} of {total} rows are unusable"
    report += "".join(f"\n  {row}" for row in bad[:20])
    if len(bad) > 20:
        report += f"\n  ... and {len(bad) - 20} more"
    if len(bad) > max_share * total:
        raise ValueError(f"{report}\nAt most {max_share:.1%} may be; correct the rows above.")
    return report


class _RowError(ValueError):
    """Why a line is no sample."""


def _row(line: bytes, folder: Path) -> dict:
    """Parse and check one line; `null` counts as a column left out."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _RowError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _RowError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise _RowError(f"not a JSON object but a {type(row).__name__}")

    row = {name: value for name, value in row.items() if name not in _FIELDS or value is not None}
    for name in _FIELDS:
        if name in row and not isinstance(row[name], str):
            raise _RowError(f"{name} is not a string but a {type(row[name]).__name__}")
    if ("video" in row) == ("image" in row):
        both = "both video and image are" if "video" in row else "neither video nor image is"
        raise _RowError(f"{both} given, exactly one is needed")
    row.setdefault("query", "")
    if not row.get("target", "").strip():
        raise _RowError("target is empty" if "target" in row else "target is missing")
    if row["query"].strip().casefold() == row["target"].strip().casefold():
        raise _RowError("query equals target: the answer would leak into the input")

    _check_negatives(row)

    media = "video" if "video" in row else "image"
    row[media] = os.path.abspath(folder / row[media])
    if not os.path.isfile(row[media]):
        raise _RowError(f"{media} file is missing: {row[media]}")
    return row


def _check_negatives(row: dict) -> None:
    """Leave `negatives` out where it is `null`, and refuse what is no list of wrong texts."""
    if row.get("negatives") is None:
        row.pop("negatives", None)
        return
    negatives = row["negatives"]
    if not isinstance(negatives, list) or not all(
        isinstance(text, str) and text.strip() for text in negatives
    ):
        raise _RowError("negatives is not a list of texts")
    if row["target"] in negatives:
        raise _RowError("negatives hold the target itself")


__all__ = ["BadRow", "bad_rows_report", "read_rows"]
