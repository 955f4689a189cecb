"""Tables of examples as data sets publish them, and joins of two tables by an id."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from eval.archives import ArchiveError, samples_of_shard
from eval.forms import FORMS, read_form
from processing.annotations import FORMS as SUFFIXES
from processing.columns import ColumnError, ExampleError, value_of
from processing.examples import DatasetArguments, DatasetError, decoder, load_with_commit

NAMED = 20  # things that one message names


class SourceError(ValueError):
    """Data that are missing, or no benchmark can be made of; the message names the entry."""


class MissingDataError(SourceError):
    """Data set of the Hub that cannot be read there."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Examples as they are published; eval/sources.py describes the keys.

    Attributes:
        name: the entry's name, for messages.
        folder: the user's folder of data.
    """

    name: str
    folder: Path
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    data_files: str | list | None = None
    streaming: bool = False
    annotations: str | list | None = None
    form: str | None = None
    records: str = ""
    header: list | None = None
    files: str | None = None
    shards: str | list | None = None

    def __post_init__(self):
        given = [key for key in ("annotations", "files", "shards") if vars(self)[key] is not None]
        if len(given) > 1 or not given and self.dataset is None:
            raise SourceError(
                f"{self.name}: give one of dataset, annotations, files and shards, found "
                f"{', '.join(given) or 'none'}"
            )
        for key in ("annotations", "shards"):
            if vars(self)[key] == []:
                raise SourceError(f"{self.name}: {key} is an empty list")
        if self.form is not None and self.form not in FORMS:
            raise SourceError(f"{self.name}: form is {self.form!r}, must be one of: {FORMS}")

    @property
    def is_rows_of_hub(self) -> bool:
        return self.annotations is None and self.files is None and self.shards is None

    @cached_property
    def local(self) -> Path | None:
        """Folder of the files: the user's, or a copy of the repository in it; `None` if the
        repository is read from the Hub."""
        if self.dataset is None:
            return self.folder
        copy = self.folder / self.dataset
        return copy if copy.exists() else None

    def paths(self, patterns: str | list) -> list[Path]:
        """Return the files that match, pattern by pattern; those of the Hub are downloaded.

        Raises: `FileNotFoundError` for a pattern without a file.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        root, found = self.root_of(patterns), []
        for pattern in patterns:
            # A name may hold brackets, which glob would read as a pattern.
            path = root / pattern
            matching = [path] if path.exists() else _matching(root, pattern)
            if not matching and self.local is None:
                raise MissingDataError(f"{self.name}: {self.dataset} has no file {pattern}")
            if not matching:
                raise FileNotFoundError(f"{self.name}: {path} does not exist")
            found += matching
        return found

    def root_of(self, patterns: list[str]) -> Path:
        """Return the folder of files; those of the Hub that match are downloaded."""
        if self.local is not None:
            return self.local
        try:
            root = Path(
                snapshot_download(
                    self.dataset,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=patterns,
                )
            )
            self.commits.add(root.name)  # the client names the folder by its commit
            return root
        except Exception as error:  # the client raises many kinds
            raise MissingDataError(f"{self.name}: {self.dataset}: {error}") from error

    @cached_property
    def commits(self) -> set[str]:
        """Commits of the repository on the Hub from which files were read."""
        return set()

    def check_files(self) -> None:
        """Raise `FileNotFoundError` if files are missing in the user's folder; read nothing."""
        if self.local is not None:
            for patterns in (self.annotations, self.files, self.shards):
                if patterns is not None:
                    self.paths(patterns)

    def examples(self) -> Iterator[Mapping | ExampleError]:
        """Yield the examples, and an error in place of a broken one.

        Raises:
            ColumnError: a file is not of the form.
            SourceError, FileNotFoundError: the data are missing.
        """
        if self.annotations is not None:
            yield from self._annotated()
        elif self.files is not None:
            yield from self._files()
        elif self.shards is not None:
            for path in self.paths(self.shards):
                yield from self._samples(path)
        else:
            yield from self._rows_of_hub()

    def _annotated(self) -> Iterator:
        paths = self.paths(self.annotations)
        return read_form(self.form_of_annotations, paths, self.records, self.header)

    @cached_property
    def form_of_annotations(self) -> str:
        """The form of the annotation files: given, or that of the suffix."""
        first = self.annotations if isinstance(self.annotations, str) else self.annotations[0]
        form = self.form or SUFFIXES.get(Path(first).suffix.lower())
        if form is None:
            raise SourceError(
                f"{self.name}: {first}: its suffix names no form; give `form`, one of "
                f"{', '.join(FORMS)}"
            )
        return form

    def _samples(self, path: Path) -> Iterator[Mapping | ExampleError]:
        try:
            yield from samples_of_shard(path)
        except ArchiveError as error:
            raise SourceError(f"{self.name}: {error}") from error

    def _files(self) -> Iterator[dict | ExampleError]:
        root = self.root_of([self.files])
        paths = self.paths(self.files)
        folders = {*_matching(root, os.path.dirname(self.files))}
        for folder in sorted(folders - {path.parent for path in paths}):
            yield ExampleError(f"no file of {folder.name}, a folder without one")
        for path in paths:
            yield {
                "path": str(path.relative_to(root)),
                "folder": path.parent.name,
                "name": path.name,
                "stem": path.stem,
            }

    def _rows_of_hub(self) -> Iterator[Mapping | ExampleError]:
        arguments = {item.name: vars(self)[item.name] for item in fields(DatasetArguments)}
        if self.local is not None:
            arguments |= {"dataset": str(self.local), "revision": None}
        try:
            dataset, commit = load_with_commit(DatasetArguments(**arguments))
        except DatasetError as error:
            kind = MissingDataError if self.local is None else SourceError
            raise kind(f"{self.name}: {self.dataset}: {error}") from error
        if commit is not None:
            self.commits.add(commit)
        plain = decoder(dataset)
        if not self.streaming:
            dataset = dataset.to_iterable_dataset()
        for example in dataset.decode(False):
            try:
                yield plain(example)
            except ExampleError as error:
                yield error

    def label(self) -> str:
        """Return the files or the rows, for messages."""
        files = self.annotations or self.files or self.shards
        parts = [self.dataset, self.config, self.split if self.is_rows_of_hub else None]
        if files is not None:
            parts.append(files if isinstance(files, str) else ", ".join(files))
        return " ".join(filter(None, parts))

    def facts(self) -> dict[str, str]:
        """Return the facts about the data, for the protocol."""
        found = {"source": self.label()}
        if self.dataset is not None:
            found["source_dataset"] = self.dataset
            if self.config is not None:
                found["source_config"] = self.config
            if self.is_rows_of_hub:
                found["source_split"] = self.split
            # The entry's revision would be a claim about a copy that nobody has checked.
            given = "a local copy" if self.local is not None else self.revision or "the newest"
            found["source_revision"] = ", ".join(sorted(self.commits)) or given
        return found


@dataclass(frozen=True, kw_only=True)
class Join(Table):
    """A table whose examples are added to those of a source, under the name of the join.

    Attributes:
        by: path in the source's example to the id.
        id: path in the table's example to its id.
    """

    by: str
    id: str

    @cached_property
    def by_id(self) -> dict[str, Mapping]:
        """The examples by their id.

        Raises:
            ColumnError: the column `id` is missing.
            SourceError: two examples have the same id.
        """
        found, repeated = {}, Counter()
        for example in self.examples():
            if isinstance(example, ExampleError):
                continue
            try:
                key = as_id(value_of(example, self.id))
            except (ColumnError, ExampleError) as error:
                raise ColumnError(f"{self.name}: {error}") from error
            repeated[key] += key in found
            found[key] = example
        check_repeated(self.name, repeated)
        return found

    def match(self, example: Mapping) -> Mapping:
        """Return the example that belongs to one of the source.

        Raises:
            ExampleError: no example has this id.
        """
        try:
            key = as_id(value_of(example, self.by))
        except (ColumnError, ExampleError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        if key not in self.by_id:
            raise ExampleError(f"{self.label()} has no example whose {self.id} is {key!r}")
        return self.by_id[key]


def _matching(root: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder that match a pattern, sorted."""
    return [root / name for name in sorted(glob.glob(pattern, root_dir=root))]


def as_id(value: Any) -> str:
    """Return an id as a text: it may be a number in one file and a text in the other."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def check_repeated(name: str, repeated: Mapping[str, int]) -> None:
    """Raise `SourceError` if an id occurs again."""
    again = [key for key, count in repeated.items() if count]
    if again:
        more = f" and {len(again) - NAMED} more" if len(again) > NAMED else ""
        raise SourceError(
            f"{name}: ids that occur more than once: {', '.join(again[:NAMED])}{more}. The pool "
            "would hold an item twice: correct the file, or map another `id`."
        )


__all__ = ["Join", "MissingDataError", "SourceError", "Table", "check_repeated"]
