"""Public sets by name: the mappings of their columns, and annotation files converted to JSONL.

    python -m training.data.public_sets                      # the table in docs/data.md
    python -m training.data.public_sets coco_captions captions_train2017.json \\
        --media train2017 --output data/coco/train.jsonl

To add a set, write an entry in `public_sets.yaml`.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.yaml_text import parse_yaml
from processing.annotations import read_annotations
from processing.columns import ColumnError, Columns, ExampleError
from processing.rows import BadRow, bad_rows_report

ENTRIES = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """Entry of `public_sets.yaml`; the comment at the top of that file documents its keys."""

    name: str
    about: str
    seen: str
    columns: Columns
    hub: str | None = None
    records: str | None = None
    tabular: bool = False
    note: str = ""

    @property
    def is_annotation_file(self) -> bool:
        return self.tabular or self.records is not None


def read_entry(name: str, entry: Mapping[str, Any]) -> PublicSet:
    own = {item.name for item in fields(PublicSet)} - {"name", "columns"}
    mapping = {key: value for key, value in entry.items() if key not in own}
    facts = {key: value for key, value in entry.items() if key in own}
    return PublicSet(name=name, columns=Columns.from_mapping(name, mapping), **facts)


def public_sets() -> dict[str, PublicSet]:
    """Read every entry, by name."""
    entries = parse_yaml(ENTRIES.read_text(encoding="utf-8"))
    return {name: read_entry(name, entry) for name, entry in entries.items()}


def public_set(name: str) -> PublicSet:
    """Return the public set of this name.

    Raises:
        ColumnError: there is no such set; the message lists all names.
    """
    sets = public_sets()
    if name not in sets:
        near = difflib.get_close_matches(name, sets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ColumnError(
            f"there is no public set {name!r}.{hint} Choose one of {', '.join(sets)}, or write a "
            "mapping (processing/columns.py)."
        )
    return sets[name]


def load_columns(given: str | Mapping[str, Any]) -> Columns:
    """Return the mapping of a public set, or the one that a recipe contains."""
    if isinstance(given, str):
        return public_set(given).columns
    return Columns.from_mapping("columns", given)


def read_examples(path: Path, public: PublicSet) -> Iterator[Any]:
    """Yield the examples of an annotation file in its published form.

    Raises:
        ColumnError: the file is not JSON or CSV, or lacks the `records` of the entry.
    """
    form = "csv" if public.tabular else "json"
    try:
        # All objects of a published file have the same keys, so a missing one is an error of the
        # mapping, as in a table: `json.loads` and not the parser of objects with keys of their own.
        yield from read_annotations(path, form, records=public.records or "", parse=json.loads)
    except ColumnError as error:
        raise ColumnError(f"{public.name}: {error}") from error


def placed(row: dict, media: Path, folder: Path) -> dict:
    """Return the row with its media path relative to `folder` instead of `media`."""
    kind = "video" if "video" in row else "image"
    return row | {kind: os.path.relpath(media / row[kind], folder)}


def convert(public: PublicSet, annotations: Path, media: Path, output: Path) -> str:
    """Write the rows of an annotation file as JSONL, and return a report with the bad examples."""
    if not public.is_annotation_file:
        raise ColumnError(
            f"{public.name} has no annotation file. Let a recipe's source read it from "
            f"{public.hub or 'its shards'}."
        )
    bad, examples, empty, written = [], 0, 0, 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as lines:
        for example in tqdm(read_examples(annotations, public), desc=public.name):
            examples += 1
            try:
                rows, faults = public.columns.read(example)
            except ExampleError as error:
                rows, faults = [], [str(error)]
            bad += [BadRow(str(annotations), examples, fault) for fault in faults]
            empty += not rows
            written += len(rows)
            for row in rows:
                lines.write(json.dumps(placed(row, media, output.parent)) + "\n")
    report = f"{output}: {written} rows from {examples} examples; {empty} of these gave no row"
    return report + ("; " + bad_rows_report(bad, examples, max_share=1.0) if bad else "")


def table() -> str:
    """Return the table of all sets, in Markdown."""
    lines = ["| set | content | read from | notes |", "|---|---|---|---|"]
    for public in public_sets().values():
        sources = [f"`{public.hub}`"] if public.hub else []
        sources += ["its annotation file"] if public.is_annotation_file else []
        lines.append(
            f"| [`{public.name}`]({public.seen}) | {public.about} | "
            f"{', or '.join(sources) or 'files of your own'} | {public.note} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.data.public_sets", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "name", nargs="?", help="name of a set; without it, the table of all is printed"
    )
    parser.add_argument("annotations", nargs="?", type=Path, help="annotation file of the set")
    parser.add_argument("--media", type=Path, help="folder of the images or videos")
    parser.add_argument("--output", type=Path, help="JSONL file to write")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        print(table())
    elif None in (arguments.annotations, arguments.media, arguments.output):
        parser.error("give a set, its annotation file, --media and --output")
    else:
        public = public_set(arguments.name)
        print(convert(public, arguments.annotations, arguments.media, arguments.output))


if __name__ == "__main__":
    try:
        main()
    except (ColumnError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
