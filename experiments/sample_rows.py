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
from processing.output import OutputError, check_output_folder, writing

MEDIA = ("image", "video")


def sample(path: Path, count: int, folder: Path) -> list[dict]:
    """Return at most `count` evenly spaced rows of a file, with media paths relative to `folder`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    count = min(count, len(lines))
    rows = [json.loads(lines[index * len(lines) // count]) for index in range(count)]
    for row in rows:
        for name in MEDIA:
            if isinstance(row.get(name), str):
                row[name] = os.path.relpath(path.parent / row[name], folder)
    return rows


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
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        counts = {}
        for path in args.rows:
            name = f"{path.parent.name}_{path.name}"
            rows = sample(path, args.count, args.output)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (args.output / name).write_text(text, encoding="utf-8")
            counts[name] = len(rows)
        (args.output / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OutputError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
