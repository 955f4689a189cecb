"""Benchmarks' data as they are published: rows of the Hub, archives with an index, and annotation
files with a folder of videos.

    source:
      annotations: msrvtt/MSRVTT_JSFUSION_test.csv
      media_folder: msrvtt/videos
      columns: {id: key, video: "{video_id}.mp4", target: sentence}

A source's examples come from one of these keys:

| key           | examples                                                                         |
|---------------|----------------------------------------------------------------------------------|
| `dataset`     | rows of a data set on the Hub, with `config`, `split`, `data_files`, `streaming` |
| `annotations` | those of annotation files; `form`, `records` and `header` describe them          |
| `files`       | the media files that match a pattern, such as `val/*/*.mp4`                      |
| `shards`      | samples of WebDataset archives: files with one name and several suffixes         |

With `dataset`, the files of the other keys are in the repository of the Hub with this id, at
`revision`, or in a folder of this name in the user's folder. Without it, they are in the user's
folder. Media are bytes in the rows, members of `archives` (zip or tar), or files in `media_folder`;
a name that ends in `.*` has any suffix. Bytes are
written once to `.media` in the user's folder. `columns` maps the examples to rows
(processing/columns.py); a list of mappings makes rows of each. `join` adds to an example the one of
another table with the same id.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from eval.archives import ArchiveError, Members, samples_of_shard
from eval.forms import FORMS, read_form
from processing.annotations import FORMS as SUFFIXES
from processing.columns import ColumnError, Columns, ExampleError, value_of
from processing.examples import DatasetArguments, DatasetError, decoder, load_with_commit, rows_of
from processing.media import is_address
from processing.output import complete_file, writing
from processing.rows import BadRow, RowError, RowFields

MEDIA_ROLES = ("media", "media list")
FIRST = 1000  # examples in which an error looks for the reason
NAMED = 20  # things that one message names


class SourceError(ValueError):
    """Data that are missing, or no benchmark can be made of; the message names the entry."""


class MissingDataError(SourceError):
    """Data set of the Hub that cannot be read there."""


# -- tables: examples as they are published --------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """Examples as they are published; the docstring of this module describes the keys.

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
            matching = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
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
        folders = {*map(Path, glob.glob(str(root / os.path.dirname(self.files))))}
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


# -- sources: rows of a benchmark --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source(Table):
    """Rows of a benchmark from a [`Table`]; the docstring of this module describes the keys.

    Attributes:
        columns: mappings from examples to rows.
        row_fields: the fields of these rows.
        archives: files with the media.
        media_folder: folder of the media, relative to the user's folder.
        joins: tables by the name under which their examples are added.
    """

    columns: tuple[Columns, ...]
    row_fields: RowFields = field(default_factory=RowFields)
    archives: str | list | None = None
    media_folder: str | None = None
    joins: dict[str, Join] = field(default_factory=dict)

    @classmethod
    def from_mapping(
        cls, name: str, mapping: Any, folder: Path, row_fields: RowFields | None = None
    ) -> "Source":
        """Build the source of an entry.

        Args:
            name: the entry's name.
            folder: the user's folder of data.
            row_fields: the fields of the rows of this kind.

        Raises:
            SourceError, ColumnError: a key is unknown, missing or of a wrong type.
        """
        row_fields = row_fields or RowFields()
        keys = _checked_keys(f"{name}: source", cls, mapping, {"columns", "join"})
        if "columns" not in keys:
            raise SourceError(f"{name}: source has no columns, which map examples to rows")
        given = keys.pop("columns")
        given = given if isinstance(given, list) else [given]
        columns = tuple(Columns.from_mapping(name, each, row_fields) for each in given)
        joined = keys.pop("join", {})
        if not isinstance(joined, dict):
            raise SourceError(f"{name}: join is {joined!r}; give tables by name")
        # A second table is often another part of the same repository.
        shared = {key: keys[key] for key in ("dataset", "revision") if key in keys}
        joins = {
            key: Join(
                name=f"{name}: join {key}",
                folder=folder,
                **shared | _checked_keys(f"{name}: join {key}", Join, table, set()),
            )
            for key, table in joined.items()
        }
        return cls(
            name=name, folder=folder, columns=columns, row_fields=row_fields, joins=joins, **keys
        )

    @property
    def cache(self) -> Path:
        """Folder of unpacked media: in the user's folder, so that they are found again."""
        return self.folder / ".media"

    def check_files(self) -> None:
        super().check_files()
        for join in self.joins.values():
            join.check_files()
        if self.archives is not None and self.local is not None:
            self.paths(self.archives)
        if self.media_folder is not None and not (self.folder / self.media_folder).is_dir():
            raise FileNotFoundError(
                f"{self.name}: {self.folder / self.media_folder} is no folder; it holds the media"
            )

    @cached_property
    def members(self) -> Members | None:
        if self.archives is None:
            return None
        try:
            return Members(self.paths(self.archives), self.cache)
        except ArchiveError as error:
            raise SourceError(f"{self.name}: {error}") from error

    @cached_property
    def media_root(self) -> Path:
        if self.media_folder is not None:
            return (self.folder / self.media_folder).absolute()
        root = self.root_of([self.files]) if self.files is not None else self.local or self.folder
        return root.absolute()

    @cached_property
    def listings(self) -> dict[Path, dict[str, list[str]]]:
        """The files of folders by their names without suffix, as they are asked for."""
        return {}

    def read(self) -> tuple[list[dict], list[BadRow]]:
        """Read all rows, and those that cannot be used: a medium is missing, or a value is broken.

        Raises:
            SourceError: no row is usable, or an id occurs twice.
            ColumnError: a column of the mapping is missing.
            FileNotFoundError: a file is missing.
        """
        rows, bad, examples = [], [], 0
        first_line, repeated = {}, Counter()
        for examples, example in enumerate(self.examples(), start=1):
            where = (self.label(), examples)
            try:
                if isinstance(example, ExampleError):
                    raise example
                example = self._joined(example)
            except ExampleError as error:
                bad.append(BadRow(*where, str(error)))
                continue
            for columns in self.columns:
                found, faults = rows_of(
                    columns, example, where, self._placed, folder=self.media_root
                )
                rows += found
                bad += faults
                for row in found:
                    if "id" in row:
                        again = first_line.setdefault(row["id"], examples) != examples
                        repeated[row["id"]] += again
        check_repeated(self.name, repeated)
        if not rows:
            raise self._no_row(examples, bad)
        self._check_numbers(rows)
        return rows, bad

    def _check_numbers(self, rows: list[dict]) -> None:
        """Refuse targets of a table that are all whole numbers, which usually are class indices.

        Raises:
            ColumnError: they are, and the mapping does not state `numbers: true`.
        """
        is_table = self.annotations is not None and self.form_of_annotations in ("csv", "tsv")
        if is_table and not any(columns.numbers for columns in self.columns):
            texts = [row.get("target", "") for row in rows]
            if all(text.isdecimal() for text in texts):
                raise ColumnError(
                    f"{self.name}: every target is a whole number, such as {texts[0]!r}. If it is "
                    "a class index, map the name of the class; if it is the answer itself, set "
                    "`numbers: true` in the mapping."
                )

    def _joined(self, example: Mapping) -> Mapping:
        """Return an example with those of the joins.

        Raises:
            ExampleError: a join has no example with this id.
        """
        for name, join in self.joins.items():
            # The type is kept: a JSON object may lack a column that other examples have.
            example = type(example)({**example, name: join.match(example)})
        return example

    def _no_row(self, examples: int, bad: list[BadRow]) -> SourceError:
        if bad:
            reason = f"{len(bad)} of {examples} are unusable. The first reason: {bad[0]}"
        elif examples:
            reason = f"`where` or `absent` leaves out all {examples} examples{self._left_out()}"
        else:
            reason = "there is no example"
        return SourceError(f"{self.name}: no row can be measured: {self.label()}: {reason}")

    def _left_out(self) -> str:
        """Return the values that `where` finds, or the reason why a target is absent."""
        columns, values = self.columns[0], {}
        for example in islice(self.examples(), FIRST):
            if isinstance(example, ExampleError):
                continue
            try:
                example = self._joined(example)
                replace(columns, where={}, absent=()).read(example)
            except (ColumnError, ExampleError) as error:
                return f". The first reason: {error}"
            for path in columns.where:
                with suppress(ColumnError, ExampleError):
                    values.setdefault(path, {})[repr(value_of(example, path))] = None
        found = [f"{path} is {', '.join([*values[path]][:NAMED])}" for path in values]
        return f". In the first examples, {'; '.join(found)}" if found else ""

    def _placed(self, row: dict) -> dict:
        """Return the row with the paths or addresses of its media.

        Raises: `RowError` for a medium that is missing.
        """
        kinds = {"video": "media", "image": "media", **self.row_fields.roles}
        placed = {}
        for name, value in row.items():
            if kinds.get(name) == "media":
                placed[name] = self._medium(value, name)
            elif kinds.get(name) == "media list":
                placed[name] = [self._medium(each, name) for each in value]
        return row | placed

    def _medium(self, media: str | bytes, name: str) -> str:
        if isinstance(media, bytes):
            return stored(media, self.cache)
        if is_address(media):
            return media
        if self.members is not None:
            return self.members.address(media)
        return self._with_suffix(self.media_root / media, name) if media.endswith(".*") else media

    def _with_suffix(self, path: Path, name: str) -> str:
        """Return the path of the file whose suffix is not given, unless the name has it after all.

        Raises: `RowError` if no file has this name, or several have it.
        """
        whole = path.with_name(path.name.removesuffix(".*"))
        if whole.suffix and whole.is_file():
            return str(whole)
        if path.parent not in self.listings:
            # Listed once: a pattern for every row would list the whole folder for each.
            listing = self.listings[path.parent] = {}
            for each in os.scandir(path.parent) if path.parent.is_dir() else ():
                listing.setdefault(os.path.splitext(each.name)[0], []).append(each.path)
        found = self.listings[path.parent].get(path.name.removesuffix(".*"), [])
        if not found:
            raise RowError(f"{name} file is missing: {path}")
        if len(found) > 1:
            raise RowError(f"{name} {path} is not one file but {len(found)}")
        return found[0]

    def facts(self) -> dict[str, str]:
        found = super().facts()
        if self.joins:
            found["source_joins"] = ", ".join(join.label() for join in self.joins.values())
        return found

    def digest(self, rows: list[dict]) -> str:
        """Return a hash of rows, equal on every machine: the first 12 hexadecimal digits.

        Of media it has the file's name only: folders and archives may be anywhere.
        """
        roles = self.row_fields.roles
        media = {"video", "image", *(name for name in roles if roles[name] in MEDIA_ROLES)}

        def named(name: str, value: Any) -> Any:
            if name not in media:
                return value
            values = value if isinstance(value, list) else [value]
            return [str(each).split("::")[0].rpartition("/")[2] for each in values]

        # The group contains the path of the media.
        plain = [{key: named(key, row[key]) for key in row if key != "group_id"} for row in rows]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _checked_keys(name: str, kind: type[Table], mapping: Any, more: set[str]) -> dict[str, Any]:
    """Return the keys of a table.

    Raises: `SourceError` for an unknown key or a value of a wrong type.
    """
    own = {"name", "folder", "columns", "row_fields", "joins"}
    known = {item.name: item.type for item in fields(kind) if item.name not in own}
    if not isinstance(mapping, dict):
        raise SourceError(f"{name} is {mapping!r}; give keys and values")
    for key, value in mapping.items():
        if key not in known.keys() | more:
            raise SourceError(f"{name} has no key {key!r}, but {', '.join([*known, *more])}")
        if key in known and not isinstance(value, known[key]):
            raise SourceError(f"{name}: {key} is {value!r}, must be {known[key]}")
        if isinstance(value, list) and not all(isinstance(each, str | dict) for each in value):
            raise SourceError(f"{name}: {key} is {value!r}, whose elements must be texts")
    if kind is Join and (missing := {"by", "id"} - mapping.keys()):
        raise SourceError(f"{name} needs {', '.join(sorted(missing))}")
    return dict(mapping)


def stored(content: bytes, cache: Path) -> str:
    """Return the path of a file with this content, which is written on the first call.

    The media of a whole benchmark would not fit into memory. The name is a hash of the content, so
    that a file occurs once however many rows are about it.
    """
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    path = cache / name[:2] / name
    if not path.is_file():
        with writing(cache):
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as incomplete:
                incomplete.write_bytes(content)
    return str(path.absolute())


__all__ = ["MissingDataError", "Source", "SourceError", "Table"]
