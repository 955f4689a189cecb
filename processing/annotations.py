"""Annotation files in their published forms: JSON, JSON Lines, CSV and TSV, as examples."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .columns import ColumnError, Record, read_json

FORMS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv"}  # by the file's suffix


def read_annotations(
    path: Path,
    form: str,
    *,
    records: str = "",
    header: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Iterator[Any]:
    """Yield the examples of an annotation file.

    Args:
        form: one of the values of `FORMS`.
        records: path of the examples in a JSON file, such as `data.val`; "" for the top level. If
            they are an object, its members become examples `{key, value}`.
        header: the columns of a CSV or TSV file whose first line has no names.
        parse: function that reads the text of a JSON file; by default one that refuses objects
            with a key twice, of which `json` would leave out the first.

    Raises:
        ColumnError: the file is not of this form, or lacks the `records`.
    """
    if form in ("csv", "tsv"):
        yield from _table(path, "\t" if form == "tsv" else ",", header)
    elif form == "jsonl":
        yield from _lines(path)
    else:
        try:
            content = (parse or unique_json)(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ColumnError(f"{path} is not a JSON file: {error}") from error
        yield from _records(path, content, records)


def unique_json(text: str) -> Any:
    """Return the value of a JSON text, with objects as [`Record`].

    Raises:
        ValueError: it is not JSON, is nested too deep, or an object has a key twice.
    """

    def record(pairs: list[tuple[str, Any]]) -> Record:
        found = Record(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} occurs twice in one object")
        return found

    return read_json(text, record)


def _table(path: Path, delimiter: str, header: Sequence[str] | None) -> Iterator[dict[str, str]]:
    """Yield the rows of a table; every cell is a text."""
    with open(path, newline="", encoding="utf-8-sig") as lines:
        # Strict: otherwise a quote that is not closed makes all lines after it one cell.
        table = csv.DictReader(lines, fieldnames=header, delimiter=delimiter, strict=True)
        try:
            names = list(table.fieldnames or [])
            if len({*names}) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ColumnError(f"{path}: the column {twice!r} occurs twice")
            for row in table:
                # csv puts what exceeds the columns under None, and None into cells that lack.
                if None in row or None in row.values():
                    cells = [cell for cell in row.values() if isinstance(cell, str)]
                    count = len(cells) + len(row.get(None, []))
                    raise ColumnError(
                        f"{path}: line {table.line_num} has {count} cells, but there are "
                        f"{len(table.fieldnames)} columns: {', '.join(table.fieldnames)}"
                    )
                yield row
        except csv.Error as error:
            raise ColumnError(
                f"{path}: after line {table.line_num}: {error}. Look for a quote that is not "
                "closed, or not doubled in a quoted cell."
            ) from error
        except UnicodeDecodeError as error:
            raise ColumnError(f"{path}: {error}. Save it as UTF-8.") from error


def _lines(path: Path) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield read_json(line)
            except ValueError as error:
                raise ColumnError(f"{path}: line {number} is not JSON: {error}") from error


def _records(path: Path, content: Any, records: str) -> Iterator[Any]:
    for key in filter(None, records.split(".")):
        if not isinstance(content, dict) or key not in content:
            found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise ColumnError(f"{path} has no {records!r}, but {found}.")
        content = content[key]
    if isinstance(content, dict):
        content = [{"key": key, "value": value} for key, value in content.items()]
    if not isinstance(content, list):
        raise ColumnError(f"{path} holds neither a list nor an object of examples.")
    yield from content


__all__ = ["FORMS", "read_annotations", "unique_json"]
