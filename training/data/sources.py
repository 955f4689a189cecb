"""The recipe's sources of rows: held in memory, or read as they are needed.

|                      | held                              | streamed                              |
|----------------------|-----------------------------------|---------------------------------------|
| order                | all rows, shuffled                | shards or chunks, and rows of a block |
| a row that is none   | named before training starts      | named when it is met, and counted     |
| memory               | all rows                          | `shuffle_rows` of them                |
"""

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from processing.rows import BadRow, RowError, bad_rows_report, read_rows, samples_of
from training.arguments import RecipeError, SourceArguments
from training.data.columns import ColumnError, Columns, ExampleError
from training.data.lanes import Blocks, DatasetBlocks, JSONLBlocks, Lane
from training.data.public_sets import load_columns, public_sets

SOME_ROWS = 20_000  # of a stream, for what wants an idea of its texts
RESERVE = 64  # rows to replace broken ones with: were nine of ten broken, 0.1 % had no good one


@dataclass
class Source:
    """Rows in memory, and what the recipe says about them."""

    arguments: SourceArguments
    rows: list[dict]
    bad: list[BadRow]
    report: str = ""

    def some_rows(self) -> list[dict]:
        """All of them."""
        return self.rows

    def __str__(self) -> str:
        return f"{self.arguments.name}: {len(self.rows)} rows, weight {self.arguments.weight:g}"


@dataclass
class StreamedSource:
    """Rows on disk or on the Hub. All are videos or all are images, as the first one is.

    Attributes:
        dataset: the examples; without it `arguments.rows` are JSONL files.
        reserve: its first rows, for where all that a lane has at hand are broken.
    """

    arguments: SourceArguments
    dataset: datasets.IterableDataset | None
    kind: str = field(init=False)
    reserve: list[dict] = field(init=False, repr=False)
    reader: "ExampleReader" = field(init=False)

    def __post_init__(self):
        if self.dataset is not None:  # once, and not for every lane
            self.reader = ExampleReader(self.arguments, self.dataset.features)
        first = self.some_rows(RESERVE)
        self.kind = "video" if "video" in first[0] else "image"
        self.reserve = [row for row in first if self.kind in row]

    def blocks(self, lane: int, lanes: int, seed: int) -> Blocks:
        rows = max(self.arguments.shuffle_rows // lanes, 1)
        if self.dataset is None:
            return JSONLBlocks(jsonl_files(self.arguments.rows), lane, lanes, rows, seed)
        return DatasetBlocks(
            self.dataset, self.arguments.name, self.reader, lane, lanes, rows, seed
        )

    def lane(self, lane: int, lanes: int, seed: int) -> Lane:
        """The rows of one lane of so many, in the order of training."""
        blocks = self.blocks(lane, lanes, seed)
        return Lane(blocks, self.kind, (seed, lane), self.arguments.query)

    def some_rows(self, limit: int = SOME_ROWS) -> list[dict]:
        """Rows from the beginning of the first epoch, none of them twice.

        Raises:
            RecipeError: there is none.
        """
        rows, bad = [], []
        for more, worse in self.blocks(lane=0, lanes=1, seed=0).first_epoch():
            rows += more
            bad += worse
            if len(rows) >= limit:
                break
        if not rows:
            raise no_row(self.arguments, bad)
        return with_query(rows[:limit], self.arguments)

    def __str__(self) -> str:
        return f"{self.arguments.name}: streamed {self.kind}s, weight {self.arguments.weight:g}"


class ExampleReader:
    """An example of a dataset to rows, as its columns are mapped. Numbers of classes become their
    names.

    Args:
        features: of the dataset, where they are known.
    """

    def __init__(self, arguments: SourceArguments, features: datasets.Features | None):
        self.columns = columns_of(arguments)
        self.folder = arguments.media_folder
        self.labels = {
            name: feature
            for name, feature in (features or {}).items()
            if isinstance(feature, datasets.ClassLabel)
        }

    def __call__(self, example: dict, where: tuple[str, int]) -> tuple[list[dict], list[BadRow]]:
        """The rows of an example, and what of it is none.

        Raises:
            RecipeError: a column of the mapping is not there.
        """
        names = {name: class_name(label, example[name]) for name, label in self.labels.items()}
        try:
            rows = self.columns.rows({**example, **names})
        except ColumnError as error:
            raise RecipeError(f"data.sources: {error}") from error
        except ExampleError as error:
            return [], [BadRow(*where, str(error))]
        samples, bad = [], []
        for row in rows:
            try:
                samples += samples_of(self.placed(row), where)
            except RowError as error:
                bad.append(BadRow(*where, str(error)))
        return samples, bad

    def placed(self, row: dict) -> dict:
        """A row whose medium lies in the recipe's folder."""
        media = "video" if "video" in row else "image"
        if self.folder is None or not isinstance(row[media], str):
            return row
        return {**row, media: os.path.join(self.folder, row[media])}


def class_name(label: datasets.ClassLabel, number: int | None) -> str | None:
    """Of an example without a class, whose number is null or -1 as in many a test split, `None`."""
    return None if number is None or number < 0 else label.int2str(number)


def with_query(rows: list[dict], arguments: SourceArguments) -> list[dict]:
    """Rows under the recipe's query, where it gives one."""
    if arguments.query is None:
        return rows
    return [{**row, "query": arguments.query} for row in rows]


def columns_of(arguments: SourceArguments) -> Columns:
    """The mapping that the recipe names or writes out, or that of the public set on the Hub."""
    try:
        if arguments.columns is not None:
            return load_columns(arguments.columns)
    except ColumnError as error:
        raise RecipeError(f"data.sources: {arguments.name}: {error}") from error
    for public in public_sets().values():
        if public.hub == arguments.dataset:
            return public.columns
    raise RecipeError(
        f"data.sources: {arguments.name}: columns is missing. Say where image or video, query and "
        "target stand (training/data/columns.py), or name a public set "
        "(training/data/public_sets.yaml)."
    )


def jsonl_files(pattern: str) -> list[Path]:
    """The file of this name, or all files that a pattern such as `data/*.jsonl` means."""
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(path) for path in found if os.path.isfile(path)]
    if not paths:
        raise RecipeError(f"data.sources: {pattern}: no such JSONL file. Give the path of one.")
    return paths


def load_dataset(arguments: SourceArguments) -> datasets.Dataset | datasets.IterableDataset:
    """What `datasets` makes of the recipe's keys, its media undecoded.

    Raises:
        RecipeError: there is no such dataset, split or file.
    """
    try:
        dataset = datasets.load_dataset(
            arguments.dataset,
            arguments.config,
            split=arguments.split,
            data_files=arguments.data_files,
            revision=arguments.revision,
            streaming=arguments.streaming,
        )
    # It raises what its builders, fsspec and the Hub do. What a builder raised is the cause.
    except Exception as error:
        cause = "" if error.__cause__ is None else f" ({error.__cause__!r})"
        raise RecipeError(f"data.sources: {arguments.name}: {error}{cause}") from error
    return dataset


def read_source(arguments: SourceArguments) -> Source | StreamedSource:
    """Read the rows of a source, or enough of a streamed one to know what it is."""
    if arguments.streaming:
        dataset = None if arguments.dataset is None else load_dataset(arguments).decode(False)
        return StreamedSource(arguments, dataset)
    if arguments.dataset is None:
        rows, bad = read_jsonl(jsonl_files(arguments.rows))
    else:
        rows, bad = read_examples(arguments)
    if not rows:
        raise no_row(arguments, bad)
    return Source(arguments, with_query(rows, arguments), bad)


def no_row(arguments: SourceArguments, bad: list[BadRow]) -> RecipeError:
    """Of a source whose rows are all bad, or that has none."""
    why = "It is empty, or all of its targets are null, `absent` or not those of `where`."
    if bad:
        why = bad_rows_report(bad, len(bad), max_share=1.0)
    return RecipeError(f"{arguments.name}: no row is usable. {why}")


def read_jsonl(paths: list[Path]) -> tuple[list[dict], list[BadRow]]:
    rows, bad = [], []
    for path in paths:
        try:
            more, worse = read_rows(path)
        except ValueError as error:
            raise RecipeError(f"data.sources: {error}") from error
        rows, bad = rows + more, bad + worse
    return rows, bad


def read_examples(arguments: SourceArguments) -> tuple[list[dict], list[BadRow]]:
    dataset = load_dataset(arguments)
    reader = ExampleReader(arguments, dataset.features)
    rows, bad = [], []
    for number, example in enumerate(dataset.to_iterable_dataset().decode(False), start=1):
        more, worse = reader(example, (arguments.name, number))
        rows += more
        bad += worse
    return rows, bad


def texts_of(sources: list[Source | StreamedSource], more: list[str] = ()) -> list[str]:
    """Queries and targets, also of `more` JSONL files: what a tokenizer learns from."""
    sources = [*sources, *(read_source(SourceArguments(rows=path)) for path in more)]
    return [
        row[name]
        for source in sources
        for row in source.some_rows()
        for name in ("query", "target")
    ]
