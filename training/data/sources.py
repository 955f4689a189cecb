"""The recipe's sources of rows: in memory, or streamed, which means that rows are read lazily.

|          | in memory                       | streamed                                        |
|----------|---------------------------------|-------------------------------------------------|
| shuffled | all rows                        | shards or chunks of files, then rows of a block |
| bad row  | reported before training starts | reported and counted when it is read            |
| memory   | all rows                        | `shuffle_rows` rows                             |
"""

import glob
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets

from processing.columns import ColumnError, Columns
from processing.examples import DatasetArguments, DatasetError, ExampleReader, load_dataset
from processing.rows import BadRow, bad_rows_report, read_rows
from training.arguments import RecipeError, SourceArguments
from training.data.lanes import Blocks, DatasetBlocks, JSONLBlocks, Lane
from training.data.public_sets import load_columns, public_sets

FIRST_ROWS = 20_000  # rows of a streamed source from which a tokenizer or a page is made
FALLBACK_ROWS = 64  # if nine rows of ten are broken, 99.9 % of such samples have a readable one


@dataclass
class Source:
    """Source whose rows are in memory.

    Attributes:
        arguments: the recipe's keys of the source.
        bad: rows that cannot be used.
        report: text about the bad rows, once their number is checked.
    """

    arguments: SourceArguments
    rows: list[dict]
    bad: list[BadRow]
    report: str = ""

    def some_rows(self) -> list[dict]:
        """Return all rows; a streamed source returns its first ones."""
        return self.rows

    def __str__(self) -> str:
        return f"{self.arguments.name}: {len(self.rows)} rows, weight {self.arguments.weight:g}"


@dataclass
class StreamedSource:
    """Source whose rows are read lazily, from the disk or the Hub.

    Attributes:
        arguments: the recipe's keys of the source.
        dataset: the examples. Without it, `arguments.rows` are JSONL files.
        kind: "video" or "image", as the first row is; rows of the other kind are bad.
        fallback_rows: the first rows, which replace a lane's rows of a step if all are broken.
        reader: function from an example of the dataset to rows.
    """

    arguments: SourceArguments
    dataset: datasets.IterableDataset | None
    kind: str = field(init=False)
    fallback_rows: list[dict] = field(init=False, repr=False)
    reader: "RecipeReader" = field(init=False)

    def __post_init__(self):
        if self.dataset is not None:  # one reader for all lanes
            self.reader = RecipeReader(self.arguments, self.dataset)
        first = self.some_rows(FALLBACK_ROWS)
        if self.dataset is not None:
            check_numbers(self.dataset, self.reader, first)
        self.kind = "video" if "video" in first[0] else "image"
        self.fallback_rows = [row for row in first if self.kind in row]

    def blocks(self, lane: int, lanes: int, seed: int) -> Blocks:
        """Return the blocks of one of `lanes` lanes."""
        # A lane has one block in memory, so all lanes together have `shuffle_rows` rows.
        rows = max(self.arguments.shuffle_rows // lanes, 1)
        if self.dataset is None:
            return JSONLBlocks(jsonl_files(self.arguments.rows), lane, lanes, rows, seed)
        return DatasetBlocks(
            self.dataset, self.arguments.name, self.reader, lane, lanes, rows, seed
        )

    def lane(self, lane: int, lanes: int, seed: int) -> Lane:
        """Return one of `lanes` lanes, with its rows in the order of training."""
        blocks = self.blocks(lane, lanes, seed)
        return Lane(blocks, self.kind, (seed, lane), self.arguments.query)

    def some_rows(self, limit: int = FIRST_ROWS) -> list[dict]:
        """Return up to `limit` rows from the start of a shuffled epoch, each once.

        Raises:
            RecipeError: no row is usable.
        """
        rows, bad = [], []
        for block_rows, block_bad in self.blocks(lane=0, lanes=1, seed=0).first_epoch():
            rows += block_rows
            bad += block_bad
            if len(rows) >= limit:
                break
        if not rows:
            raise no_row(self.arguments, bad)
        return with_query(rows[:limit], self.arguments)

    def size(self) -> str:
        """Return the size of the files or the number of shards, on which positions depend."""
        if self.dataset is not None:
            return f"{self.dataset.num_shards} shards"
        return f"{sum(path.stat().st_size for path in jsonl_files(self.arguments.rows))} bytes"

    def __str__(self) -> str:
        return f"{self.arguments.name}: streamed {self.kind}s, weight {self.arguments.weight:g}"


class RecipeReader(ExampleReader):
    """Reader of the examples of a recipe's source."""

    def __init__(
        self, arguments: SourceArguments, dataset: datasets.Dataset | datasets.IterableDataset
    ):
        super().__init__(columns_of(arguments), dataset, arguments.media_folder)

    def __call__(self, example: dict, where: tuple[str, int]) -> tuple[list[dict], list[BadRow]]:
        """Return the rows and the bad rows of an example; see [`ExampleReader`].

        Raises:
            RecipeError: a column of the mapping is missing.
        """
        try:
            return super().__call__(example, where)
        except ColumnError as error:
            raise RecipeError(f"data.sources: {error}") from error


def dataset_of(arguments: SourceArguments) -> datasets.Dataset | datasets.IterableDataset:
    """Load a source's dataset; a streamed one leaves media as they are stored.

    Raises:
        RecipeError: the dataset, its split or a file is missing or broken.
    """
    given = {item.name: vars(arguments)[item.name] for item in fields(DatasetArguments)}
    try:
        return load_dataset(DatasetArguments(**given))
    except DatasetError as error:
        raise RecipeError(f"data.sources: {arguments.name}: {error}") from error


def with_query(rows: list[dict], arguments: SourceArguments) -> list[dict]:
    """Return the rows with the recipe's query, if it gives one."""
    if arguments.query is None:
        return rows
    return [{**row, "query": arguments.query} for row in rows]


def columns_of(arguments: SourceArguments) -> Columns:
    """Return the column mapping: the recipe's, or that of the public set with this Hub id."""
    try:
        if arguments.columns is not None:
            return load_columns(arguments.columns)
    except ColumnError as error:
        raise RecipeError(f"data.sources: {arguments.name}: {error}") from error
    for public in public_sets().values():
        if public.hub == arguments.dataset:
            return public.columns
    raise RecipeError(
        f"data.sources: {arguments.name}: columns is missing. Map image or video, query and target "
        "to columns of the dataset (processing/columns.py), or name a public set "
        "(training/data/public_sets.yaml)."
    )


def jsonl_files(pattern: str, key: str = "data.sources") -> list[Path]:
    """Return the file of this name, or all files that match a pattern such as `data/*.jsonl`.

    Args:
        key: the recipe's key that names them, for messages.
    """
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(path) for path in found if os.path.isfile(path)]
    if not paths:
        raise RecipeError(f"{key}: {pattern}: no such JSONL file. Give the path of one.")
    return paths


def read_source(arguments: SourceArguments, key: str = "data.sources") -> Source | StreamedSource:
    """Read all rows of a source, or the first ones if it is streamed.

    Args:
        key: the recipe's key that names the source, for messages.
    Raises:
        RecipeError: the source is missing, or none of its rows is usable.
    """
    if arguments.streaming:
        # Undecoded: `shuffle_rows` rows are in memory, and decoded media are many times larger.
        dataset = None if arguments.dataset is None else dataset_of(arguments)
        return StreamedSource(arguments, dataset)
    if arguments.dataset is None:
        rows, bad = read_jsonl(jsonl_files(arguments.rows, key), key)
    else:
        rows, bad = read_examples(arguments)
    if not rows:
        raise no_row(arguments, bad)
    return Source(arguments, with_query(rows, arguments), bad)


def no_row(arguments: SourceArguments, bad: list[BadRow]) -> RecipeError:
    """Return the error for a source that has bad rows only, or none."""
    why = "The source is empty, or every target is `absent` or excluded by `where`."
    if bad:
        why = bad_rows_report(bad, len(bad), max_share=1.0)
    return RecipeError(f"{arguments.name}: no row is usable. {why}")


def read_jsonl(paths: list[Path], key: str) -> tuple[list[dict], list[BadRow]]:
    rows, bad = [], []
    for path in paths:
        try:
            file_rows, file_bad = read_rows(path)
        except ValueError as error:
            raise RecipeError(f"{key}: {error}") from error
        rows += file_rows
        bad += file_bad
    return rows, bad


def read_examples(arguments: SourceArguments) -> tuple[list[dict], list[BadRow]]:
    dataset = dataset_of(arguments)
    reader = RecipeReader(arguments, dataset)
    rows, bad = [], []
    for number, example in enumerate(dataset.to_iterable_dataset().decode(False), start=1):
        example_rows, example_bad = reader(example, (arguments.name, number))
        rows += example_rows
        bad += example_bad
    check_numbers(dataset, reader, rows)
    return rows, bad


def check_numbers(
    dataset: datasets.Dataset | datasets.IterableDataset, reader: "RecipeReader", rows: list[dict]
) -> None:
    """Refuse targets of a CSV file that are all whole numbers, and usually class indices.

    In other files a column's type shows this for each row; all cells of a CSV file are texts.

    Raises:
        RecipeError: they are, and the mapping does not state `numbers: true`.
    """
    is_table = dataset.info.builder_name == "csv" and not reader.columns.numbers
    if is_table and rows and all(row["target"].isdecimal() for row in rows):
        raise RecipeError(
            f"data.sources: {reader.columns.name}: every target is a whole number, such as "
            f"{rows[0]['target']!r}. If it is a class index, map the name of the class; if it is "
            "the answer itself, set `numbers: true` in the mapping."
        )


def texts_of(sources: list[Source | StreamedSource], more: list[str] = ()) -> list[str]:
    """Return the queries and targets of all sources and of `more` JSONL files, from which a
    tokenizer is trained."""
    key = "model.tokenizer_rows"
    sources = [*sources, *(read_source(SourceArguments(rows=path), key) for path in more)]
    return [
        row[name]
        for source in sources
        for row in source.some_rows()
        for name in ("query", "target")
    ]
