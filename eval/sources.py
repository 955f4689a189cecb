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

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.archives import ArchiveError, Members
from eval.tables import NAMED, Join, SourceError, Table, check_repeated
from processing.columns import ColumnError, Columns, ExampleError, value_of
from processing.examples import rows_of
from processing.media import is_address
from processing.output import complete_file, writing
from processing.rows import BadRow, RowError, RowFields

MEDIA_ROLES = ("media", "media list")
FIRST = 1000  # examples in which an error looks for the reason


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
        if not given:
            raise SourceError(f"{name}: columns is an empty list")
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
        progress = tqdm(self.examples(), f"{self.name}: rows", unit="row", delay=5)
        for examples, example in enumerate(progress, start=1):
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


__all__ = ["Source"]
