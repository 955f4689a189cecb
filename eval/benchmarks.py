"""What `benchmarks.yaml` may say, and the rows it points to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from processing.rows import BadRow, read_rows

_REQUIRED = {"task", "rows", "description"}
# What each task needs beside these, and what it may have.
_OF_TASK = {
    "retrieval": set(),
    "classification": set(),
    "vqa": {"train_rows"},
    "captioning": {"train_rows"},
    "streaming": {"validation_rows"},
}
_OPTIONAL = {
    "retrieval": {"query", "num_frames"},
    "classification": {"query", "num_frames", "candidates"},
    "vqa": {"num_frames"},
    "captioning": {"query", "num_frames", "num_beams"},
    "streaming": {"query", "num_frames", "fps", "stride"},
}
TASKS = tuple(_OF_TASK)


@dataclass(frozen=True)
class Benchmark:
    """One entry of the file.

    Attributes:
        name (`str`): its key.
        task (`str`): one of `TASKS`.
        rows (`Path`): JSONL file, as [`read_rows`] reads it, or for streaming
            [`eval.annotated_streams.read_streams`].
        description (`str`): what it measures, in a sentence.
        train_rows (`Path`, *optional*, VQA and captioning only): source of the candidates and the
            baselines.
        validation_rows (`Path`, *optional*, streaming only): streams to choose thresholds on.
        query (`str`, *optional*): asked instead of the rows' own. VQA asks the rows' questions.
        num_frames (`int`, *optional*): frames per video, or per window of a stream, instead of
            the processor's.
        candidates (`list[str]`, *optional*, classification only): the labels to choose from,
            instead of the distinct targets of the rows.
        num_beams (`int`, *optional*, captioning only, defaults to 1): of the beam search.
        fps (`float`, *optional*, streaming only): frames kept of each second; all by default.
        stride (`int`, *optional*, streaming only, defaults to 1): frames from one window's
            beginning to the next one's.
    """

    name: str
    task: str
    rows: Path
    description: str
    train_rows: Path | None = None
    query: str | None = None
    num_frames: int | None = None
    candidates: list[str] | None = None
    validation_rows: Path | None = None
    num_beams: int = 1
    fps: float | None = None
    stride: int = 1

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """The good rows, with the query they are asked here, and the bad ones.

        Raises: `ValueError` when no row is good, or when those of retrieval ask different queries:
            a file has one embedding there.
        """
        rows, bad = usable_rows(self.rows)
        if self.query is not None:
            rows = [row | {"query": self.query} for row in rows]
        if self.task == "retrieval" and len({row["query"] for row in rows}) > 1:
            raise ValueError(f"{self.name}: retrieval asks one query; give it as `query`")
        return rows, bad


def usable_rows(path: Path) -> tuple[list[dict], list[BadRow]]:
    """[`read_rows`], but a file without a single good row is an error."""
    rows, bad = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no usable row. The first reason: {bad[0]}")
    return rows, bad


def load_benchmarks(path: Path, names: list[str]) -> list[Benchmark]:
    """The named benchmarks of a YAML file in the order asked for; `["all"]` gives every one.

    Raises: `ValueError` for a file that is no YAML of this kind, unknown names, tasks and keys;
        `FileNotFoundError` for missing files.
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


def sha256(path: Path) -> str:
    """The first 12 hexadecimal digits: enough to see that two runs read the same rows."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _benchmark(name: str, entry: object) -> Benchmark:
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: a benchmark has keys and values, found {entry!r}")
    entry = dict(entry)
    task = entry.get("task")
    if task not in TASKS:
        raise ValueError(f"{name}: task is {task!r}, must be one of {', '.join(TASKS)}")
    required = _REQUIRED | _OF_TASK[task]
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"{name}: a {task} benchmark needs {', '.join(missing)}")
    if unknown := sorted(entry.keys() - required - _OPTIONAL[task]):
        raise ValueError(f"{name}: a {task} benchmark takes no {', '.join(unknown)}")
    for key in ("rows", "train_rows", "validation_rows"):
        if key in entry:
            entry[key] = Path(entry[key])
            if not entry[key].is_file():
                raise FileNotFoundError(
                    f"{name}: {key} is {entry[key]}, which does not exist. Paths are relative to "
                    "the working directory."
                )
    return Benchmark(name, **entry)


__all__ = ["Benchmark", "load_benchmarks", "sha256", "usable_rows"]
