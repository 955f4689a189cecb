"""Write evenly spaced rows of files: `python -m experiments.sample_rows FILE ... --output DIR`.

A token model scores each candidate of each question, which takes minutes for all rows of a test
set. The rows of a file are ordered by clip, so evenly spaced ones cover all clips.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from eval.evaluate import at_least_one
from processing.media import scheme_of
from processing.output import OutputError, check_output_folder, writing
from processing.rows import BLANK, RowError, parse_object

MEDIA = ("image", "video")


def sample(path: Path, count: int, folder: Path) -> list[dict]:
    """Return at most `count` evenly spaced rows of a file, with media paths relative to `folder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line among them is not a JSON object.
    """
    # Not `str.splitlines`: a JSON text may hold U+2028 and other characters that end a line there.
    lines = path.read_bytes().split(b"\n")
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip(BLANK)]
    count = min(count, len(numbers))
    chosen = [numbers[index * len(numbers) // count] for index in range(count)]
    rows = [parse(lines[number - 1], f"{path}:{number}") for number in chosen]
    for row in rows:
        for name in MEDIA:
            if isinstance(row.get(name), str) and not scheme_of(row[name]):
                row[name] = os.path.relpath(path.parent / row[name], folder)
    return rows


def parse(line: bytes, where: str) -> dict:
    """Return the row of a line.

    Args:
        where: the file and the line's number.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        return parse_object(line)
    except RowError as error:
        raise ValueError(f"{where}: {error}; correct or remove the line.") from error


def output_names(paths: list[Path]) -> dict[str, Path]:
    """Return the files by the names of their samples.

    Raises:
        ValueError: two files have one name.
    """
    names = {}
    for path in paths:
        name = f"{path.parent.name}_{path.name}"
        if name in names:
            raise ValueError(
                f"{names[name]} and {path}: the sample of each would be {name}; give them one at a "
                "time, with different folders for --output."
            )
        names[name] = path
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sample_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="+", type=Path, help="JSONL files")
    parser.add_argument("--count", type=at_least_one, default=1500, help="rows of each file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    check_output_folder("--output", args.output)
    names = output_names(args.rows)
    samples = {name: sample(path, args.count, args.output) for name, path in names.items()}
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        for name, rows in samples.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (args.output / name).write_text(text, encoding="utf-8")
        counts = {name: len(rows) for name, rows in samples.items()}
        (args.output / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OutputError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
