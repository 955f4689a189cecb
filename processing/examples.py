"""Examples of `datasets` as rows: loaded from the Hub or from files, read by a mapping of columns.

Media stay as they are stored. Class indices become the names of their classes.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_datasets_available

from .columns import Columns, ExampleError, read_json
from .media import is_address
from .rows import BadRow, RowError, samples_of

if is_datasets_available():
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

# `datasets` reads the metadata.csv of these with pandas' list of nulls, which no option changes.
FOLDERS = ("imagefolder", "videofolder")


class DatasetError(ValueError):
    """Dataset that is missing or broken; the message names the file and the cause."""


@dataclass(frozen=True, kw_only=True)
class DatasetArguments:
    """Arguments of `datasets.load_dataset`, of which `dataset` is the first."""

    dataset: str
    config: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    revision: str | None = None
    streaming: bool = False


def load_dataset(
    arguments: DatasetArguments,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load a dataset; a streamed one leaves media as they are stored.

    Raises:
        DatasetError: the dataset, its split or a file is missing or broken.
    """
    return load_with_commit(arguments)[0]


def load_with_commit(
    arguments: DatasetArguments,
) -> "tuple[datasets.Dataset | datasets.IterableDataset, str | None]":
    """Return the dataset of `load_dataset`, and its commit; `None` if it is not on the Hub."""
    try:
        builder = dataset_builder(arguments)
        commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
        if arguments.streaming:
            dataset = with_features(builder.as_streaming_dataset(split=arguments.split))
            return dataset.decode(False), commit
        builder.download_and_prepare()
        return builder.as_dataset(split=arguments.split), commit
    # Builders, fsspec and the Hub raise errors of any type. `datasets` wraps a builder's own error,
    # which names the broken file, as the cause.
    except Exception as error:
        cause = "" if error.__cause__ is None else f" ({error.__cause__!r})"
        if isinstance(error.__cause__ or error, UnicodeError):
            cause += ". Save the file as UTF-8."
        raise DatasetError(f"{error}{cause}") from error


def dataset_builder(arguments: DatasetArguments) -> "datasets.DatasetBuilder":
    """Return the builder of a dataset; one of CSV files reads every cell as a text.

    Without these options pandas reads the answers "None" and "NA" as nulls, the id 007 as 7, and a
    column of whole numbers with a gap as floats.
    """
    if Path(arguments.dataset, "state.json").is_file():
        raise ValueError(
            "this folder is one of save_to_disk; name its files: dataset: arrow, data_files: "
            f"{arguments.dataset}/*.arrow"
        )
    given = {"data_files": arguments.data_files, "revision": arguments.revision}
    builder = datasets.load_dataset_builder(arguments.dataset, arguments.config, **given)
    if not isinstance(builder.config, CsvConfig):
        return builder
    given |= {"keep_default_na": False, "na_values": [""]}
    if builder.info.features is None:  # otherwise the types are the dataset's own
        builder = datasets.load_dataset_builder(arguments.dataset, arguments.config, **given)
        head = builder.as_streaming_dataset(split=arguments.split)
        texts = {name: datasets.Value("string") for name in next(iter(head), {})}
        given["features"] = datasets.Features(texts)
    return datasets.load_dataset_builder(arguments.dataset, arguments.config, **given)


def with_features(dataset: "datasets.IterableDataset") -> "datasets.IterableDataset":
    """Return a streamed dataset with the features of its first example, if it states none.

    Some files show their types only when they are read, such as a JSON array.
    """
    if dataset.features is not None:
        return dataset
    for table in dataset.with_format("arrow").iter(batch_size=1):
        return dataset.cast(datasets.Features.from_arrow_schema(table.schema))
    return dataset.cast(datasets.Features())


class ExampleReader:
    """Reader of a dataset's examples as rows, by the mapping of its columns.

    A class index becomes the name of its class, and JSON texts that `datasets` makes of a column of
    several types become their values.

    Args:
        dataset: the dataset, with its features.
        media_folder: folder of media that the dataset names by relative paths.
    """

    def __init__(
        self,
        columns: Columns,
        dataset: "datasets.Dataset | datasets.IterableDataset",
        media_folder: str | None = None,
    ):
        self.columns, self.folder = columns, media_folder
        self.decoded = decoder(dataset)
        self.hint = ""
        if dataset.info.builder_name in FOLDERS:
            self.hint = "; texts such as NA or None in a metadata.csv are nulls: use metadata.jsonl"

    def __call__(self, example: dict, where: tuple[str, int]) -> tuple[list[dict], list[BadRow]]:
        """Return the rows and the bad rows of an example.

        Args:
            where: name of the dataset and number of the example, for messages.
        Raises:
            ColumnError: a column of the mapping is missing.
        """
        try:
            plain = self.decoded(example)
        except ExampleError as error:
            return [], [BadRow(*where, str(error))]
        return rows_of(self.columns, plain, where, self.in_folder, hint=self.hint)

    def in_folder(self, row: dict) -> dict:
        """Return the row with its media path joined to the `media_folder`."""
        media = "video" if "video" in row else "image"
        if self.folder is None or not isinstance(row[media], str) or is_address(row[media]):
            return row
        return {**row, media: os.path.join(self.folder, row[media])}


def rows_of(
    columns: Columns,
    example: Mapping[str, Any],
    where: tuple[str, int],
    placed: Callable[[dict], dict],
    *,
    folder: Path | None = None,
    hint: str = "",
) -> tuple[list[dict], list[BadRow]]:
    """Return the rows and the bad rows of an example.

    Args:
        where: name of the source and number of the example, for messages.
        placed: function from a row to the row with the place of its media.
        folder: folder of the media files, which must exist; `None` if they are not checked.
        hint: end of a message about the example's faults.
    Raises:
        ColumnError: a column of the mapping is missing.
    """
    try:
        rows, faults = columns.read(example)
    except ExampleError as error:
        return [], [BadRow(*where, str(error))]
    samples, bad = [], [BadRow(*where, fault + hint) for fault in faults]
    for row in rows:
        try:
            samples += samples_of(placed(row), where, folder, columns.row_fields)
        except RowError as error:
            bad.append(BadRow(*where, str(error)))
    return samples, bad


def decoder(
    dataset: "datasets.Dataset | datasets.IterableDataset",
) -> Callable[[dict], dict]:
    """Return the function that replaces the codes in an example by class names and JSON values."""
    coded = {name: kind for name, kind in dataset.features.items() if is_coded(kind)}

    def plain(example: dict) -> dict:
        return {**example, **{name: decoded(kind, example[name]) for name, kind in coded.items()}}

    return plain


def parts_of(feature: Any) -> list:
    """Return the features within a feature of `datasets`: of a struct's fields or a list's
    elements."""
    if isinstance(feature, dict):
        return list(feature.values())
    if isinstance(feature, list | tuple):
        return list(feature)
    return [feature.feature] if isinstance(feature, datasets.List | datasets.LargeList) else []


def is_coded(feature: Any) -> bool:
    """Return whether a feature stores codes, at any depth: class indices or JSON texts."""
    coded = isinstance(feature, datasets.ClassLabel | datasets.Json)
    return coded or any(map(is_coded, parts_of(feature)))


def decoded(feature: Any, value: Any) -> Any:
    """Return a stored value with class names and JSON values instead of their codes.

    `IterableDataset.decode(False)` leaves media as they are stored, which is wanted, and JSON texts
    too, which is not: of `"one"` and `["one", "two"]` in one column it would give the source.

    Raises:
        ExampleError: a class index has no name.
    """
    if value is None or not is_coded(feature):
        return value
    if isinstance(feature, datasets.ClassLabel):
        return class_name(feature, value)
    if isinstance(feature, datasets.Json):
        return json_value(value)
    if isinstance(feature, dict):
        return {name: decoded(part, value[name]) for name, part in feature.items()}
    (part,) = parts_of(feature)
    return [decoded(part, element) for element in value]


def json_value(text: str) -> Any:
    """Return the value of a cell of a JSON column.

    `datasets` stores the text "3" as the number 3 is stored, and the text "null" as `null`; only a
    list, an object and a text that is not JSON itself are stored without doubt. Everything else is
    returned as the text.
    """
    try:
        value = read_json(text)
    except ValueError:  # the reader of `datasets` accepts more, such as 007
        return text
    return value if isinstance(value, dict | list | str) else text


def class_name(label: "datasets.ClassLabel", index: int) -> str | None:
    """Return the class name, or `None` if unlabelled (-1, as in many test splits).

    Raises:
        ExampleError: there is no such class.
    """
    if index < 0:
        return None
    if index >= label.num_classes:
        raise ExampleError(
            f"class {index} has no name: the classes are 0 to {label.num_classes - 1}"
        )
    return label.int2str(index)


__all__ = [
    "DatasetArguments",
    "DatasetError",
    "ExampleReader",
    "decoder",
    "load_dataset",
    "load_with_commit",
    "rows_of",
]
