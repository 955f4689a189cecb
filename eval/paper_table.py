"""Print the table of the paper's benchmarks in docs/evaluation.md: `python -m eval.paper_table`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.benchmarks import read_entries

FOLDER = Path(__file__).with_name("paper")
# Keys of an entry, and of its sources, whose values are files in the user's folder of data
FILES = {"rows", "validation_rows", "train_rows", "candidates_file"}
FILES |= {"annotations", "media_folder", "archives", "files", "shards"}


def files_of(entry: dict[str, Any]) -> Iterator[str]:
    """Yield the files and folders that an entry reads, those of its other sources too."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from files_of(value)
        elif key in FILES:
            yield from [value] if isinstance(value, str) else value


def place_of(entry: dict[str, Any]) -> str:
    """Return the Hub's repository that an entry reads, or its files in the folder of data."""
    if repository := entry.get("source", {}).get("dataset"):
        return f"[{repository}](https://huggingface.co/datasets/{repository})"
    return ", ".join(f"`{path}`" for path in dict.fromkeys(files_of(entry)))


def table() -> str:
    """Return the table of all entries, in Markdown."""
    lines = [
        "| entry | name in the paper | pool | score | data | where from, terms |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in read_entries(FOLDER).items():
        paper = entry["paper"]
        pool = "not stated" if paper.get("pool") is None else f"{paper['pool']:,}"
        cells = f"`{name}`", paper["name"], pool, paper["metric"], place_of(entry)
        lines.append(f"| {' | '.join((*cells, paper['terms']))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
