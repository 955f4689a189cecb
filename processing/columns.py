"""Rows from data with other column names and nesting, by a mapping from row fields to columns.

    {"image": "image", "query": "{question}", "target": "answers[].answer"}

A path is column names joined by dots. After a name, `[]` selects every element of a list, `[0::2]`
a slice of it, `[0]` one element, and `[only]` the only element of a list that must not have more.
Each element becomes a row. Values from outside the list are repeated in all of its rows; parallel
lists must have equal lengths and are read together. A value with braces is a text that contains
paths: `{page}/{id}.mp4`, `{image_id:012d}.jpg`.

A column's name may hold dots, brackets, colons and braces itself, such as WebDataset's `left.jpg`
and the `answer.text` of a flattened table. The longest name that exists wins: `answer.text` is the
column of this name, or else the part `text` of the column `answer`.

No code here opens a file or depends on a particular data set.
"""

import datetime
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from .rows import LIST_KINDS, RowFields, media_name

# Columns of an image or a video that `datasets` has not decoded; one of them may be null.
_STORED = {"bytes", "path"}
_LISTS = (list, tuple, np.ndarray)
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FORMAT = re.compile(r"((?:[^\[:]|\[[^\]]*\]?)*)(?::(.*))?", re.DOTALL)
_SLICE = re.compile(r"(-?\d+)?(?::(-?\d+)?)?(?::(-?\d+)?)?")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)")
_NO_TIME = {"", "na", "n/a", "nan", "null", "none"}  # texts of tables for an unknown number

Index = tuple[int, ...]  # indices into the lists on the path to a value


class ColumnError(ValueError):
    """Mapping that does not fit its data; the message names the set, the column and those found."""


class ExampleError(ValueError):
    """Example that is broken, though its columns fit the mapping."""


class MissingKey(ExampleError):
    """JSON object that lacks a key of the mapping."""


class Record(dict):
    """JSON object, whose keys may differ from one example to the next."""


def read_json(text: str | bytes, record: Callable[[list[tuple[str, Any]]], Any] = Record) -> Any:
    """Return the value of a JSON text.

    Args:
        record: function from the keys and values of an object to its value.
    Raises:
        ValueError: it is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=record)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


# -- paths ---------------------------------------------------------------------------------


@cache
def _names(path: str) -> tuple[tuple[str, str], ...]:
    """Return the ways to divide a path into a column's name and the rest, longest names first."""
    marks = [mark.start() for mark in re.finditer(r"[.\[]", path)]
    return tuple((path[:end], path[end:]) for end in [len(path), *reversed(marks)] if end)


def _after(rest: str, path: str) -> str:
    """Return what follows a name or a bracket in a path, without the dot."""
    if not rest or rest[0] == "[":
        return rest
    if rest[0] != "." or len(rest) == 1:
        raise _no_path(path)
    return rest[1:]


def _no_path(path: str) -> ColumnError:
    return ColumnError(f"{path!r} is not a path; write one such as name.name[].name")


@cache
def _bracket(text: str, path: str) -> slice | int:
    """Return a slice of a list, or the index of one element, -1 for the only one."""
    match = _SLICE.fullmatch(text)
    if text == "only":
        return -1
    if text.isdecimal():
        return int(text)
    if match is None or text.startswith("-") and ":" not in text:
        raise ColumnError(f"{path!r}: [{text}] is not one of [], [0], [0::2] and [only]")
    return slice(*(part and int(part) for part in match.groups()))


@cache
def _depth(path: str) -> int:
    """Return the number of nested lists of which a path selects elements."""
    texts = _BRACKET.findall(path)
    return sum(_SLICE.fullmatch(text) is not None and not text.isdecimal() for text in texts)


def _walk(value: Any, path: str, where: str) -> Iterator[tuple[Index, Any]]:
    """Yield every value at the end of a path, with its index.

    A null before the end of the path gives the value `None`; in place of a list, it gives no value.
    """
    if not path:
        # A gap in a column of numbers is NaN in some files and null in others.
        is_nan = isinstance(value, float | np.floating) and math.isnan(value)
        yield (), None if is_nan else value
    elif value is None:
        if not _depth(path):
            yield (), None
    elif path[0] == "[" and not _has_name(value, path):
        match = _BRACKET.match(path)
        if match is None:
            raise _no_path(where + path)
        chosen, rest = _bracket(match[1], where + path), _after(path[match.end() :], where + path)
        values = _list(value, where)
        if isinstance(chosen, int):
            yield from _walk(_element(values, chosen, where), rest, where)
            return
        for first, element in enumerate(values[chosen]):
            for index, end in _walk(element, rest, f"{where}[]"):
                yield (first, *index), end
    else:
        columns = _object(value, where)
        name, rest = _column(columns, path, where)
        yield from _walk(columns[name], _after(rest, path), f"{where}.{name}" if where else name)


def _has_name(value: Any, path: str) -> bool:
    """Return whether a value has a column with whose name a path begins."""
    return isinstance(value, Mapping) and any(name in value for name, _ in _names(path))


def _column(columns: Mapping, path: str, where: str) -> tuple[str, str]:
    """Return the name of the column with which a path begins, and the rest of the path."""
    for name, rest in _names(path):
        if name in columns:
            return name, rest
    first = re.split(r"[.\[]", path, maxsplit=1)[0]
    if not first:
        raise _no_path(path)
    hint = _near(first, columns) or _near(path, columns)
    # All examples of a table have its columns, so one that lacks a column is an error of the
    # mapping. A JSON object has its own keys.
    kind = MissingKey if isinstance(columns, Record) else ColumnError
    raise kind(
        f"{where or 'an example'} has no column {first!r}, but "
        f"{', '.join(map(repr, columns)) or 'none'}.{hint}"
    )


def _object(value: Any, where: str) -> Mapping:
    """Return a value that has columns; a text in its place is read as JSON."""
    if isinstance(value, str | bytes):
        try:
            value = read_json(value)
        except ValueError as error:
            raise ExampleError(f"{where} is a text but not JSON") from error
    if not isinstance(value, Mapping):
        name = type(value).__name__
        raise ExampleError(f"{where or 'the example'} is a {name}, which has no columns")
    return value


def _list(value: Any, where: str) -> list | tuple | np.ndarray:
    """Return a list; a text in its place is read as JSON."""
    found = value
    if isinstance(value, str | bytes):
        with suppress(ValueError):
            found = read_json(value)
    if not isinstance(found, _LISTS):
        raise ExampleError(f"{where} is a {type(value).__name__}, not a list")
    return found


def _element(values: list | tuple | np.ndarray, index: int, where: str) -> Any:
    if index < 0 and len(values) != 1:
        raise ExampleError(f"{where} has {len(values)} elements, exactly one is expected")
    if index >= len(values):
        raise ExampleError(f"{where} has {len(values)} elements, none at [{index}]")
    return values[index]


def _near(name: str, names: Iterable) -> str:
    """Return a hint at the most similar name, or an empty text."""
    known = {str(other).casefold(): str(other) for other in names}
    near = difflib.get_close_matches(name.casefold(), known, n=1)
    return f" Did you mean {known[near[0]]!r}?" if near else ""


# -- values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """Values that one part of a mapping selects in an example.

    Attributes:
        text: the part of the mapping.
        depth: number of nested lists on its path.
        at: the values by their index.
    """

    text: str
    depth: int
    at: dict[Index, Any]


def _path_values(example: Mapping, path: str) -> _Values:
    at = dict(_walk(example, path, ""))
    # The path alone does not show the depth: a column's name may hold brackets.
    return _Values(path, len(next(iter(at))) if at else _depth(path), at)


@cache
def _pieces(text: str) -> tuple[tuple[str, str | None], ...]:
    """Split a text with braces into pieces of (text before the braces, text in braces)."""
    pieces, before, end = [], "", 0
    for match in _FIELD.finditer(text):
        before, end = before + text[end : match.start()], match.end()
        if match[0] in ("{{", "}}"):
            before += match[0][0]
        elif match[1] is None:
            raise ColumnError(
                f"{text!r}: expected '}}' after '{{'; write '{{{{' for a brace itself"
            )
        elif not match[1]:
            raise _no_path("")
        else:
            pieces.append((before, match[1]))
            before = ""
    return *pieces, (before + text[end:], None)


def _text_values(example: Mapping, text: str) -> _Values:
    """Fill in the paths of a text, once for each element; `None` if a path's value is null."""
    pieces = []  # (text before the path, path, format)
    for before, inside in _pieces(text):
        if inside is None or inside in example:  # `in`: a name may hold a colon
            pieces.append((before, inside, ""))
        else:
            path, spec = _FORMAT.fullmatch(inside).groups(default="")
            pieces.append((before, path, spec))
    parts = {path: _path_values(example, path) for _, path, _ in pieces if path is not None}
    depth = max((part.depth for part in parts.values()), default=0)
    return _Values(
        text, depth, {index: _filled(pieces, found) for index, found in _side_by_side(parts)}
    )


def _filled(pieces: list[tuple[str, str | None, str]], found: dict[str, Any]) -> str | None:
    if None in found.values():
        return None
    return "".join(
        before + ("" if path is None else _formatted(found[path], spec, path))
        for before, path, spec in pieces
    )


def _values(example: Mapping, text: str) -> _Values:
    is_text = "{" in text and text not in example
    return _text_values(example, text) if is_text else _path_values(example, text)


def value_of(example: Mapping, text: str) -> Any:
    """Return the one value of a path, or of a text with paths in braces.

    Raises:
        ColumnError: the path selects elements of a list.
        ExampleError: the example lacks it.
    """
    found = _values(example, text)
    if found.depth:
        raise ColumnError(f"{text!r} selects several values, and one is expected")
    return found.at[()]


def _formatted(value: Any, spec: str, path: str) -> str:
    """Return a path's value as it appears in a text."""
    try:
        if spec.endswith("d"):
            # CSV files give numbers as texts, so a format such as `06d` converts them first.
            number = int(value) if isinstance(value, str | bytes) else _whole(value)
            if number is not None:
                return format(number, spec)
        return format(_text(value, path, True), spec)
    except (TypeError, ValueError) as error:
        raise ExampleError(f"{path} is {value!r}: {error}") from error


def _side_by_side(parts: dict[str, _Values]) -> Iterator[tuple[Index, dict[str, Any]]]:
    """Yield the values of all parts that belong together, once for each element of the deepest
    lists."""
    depth = max((values.depth for values in parts.values()), default=0)
    deepest = [values for values in parts.values() if values.depth == depth]
    indices = deepest[0].at if deepest else {(): None}
    for other in deepest[1:]:
        if other.at.keys() != indices.keys():
            raise ExampleError(
                f"{deepest[0].text} has {len(indices)} values and {other.text} has "
                f"{len(other.at)}: they must have equally many"
            )
    for index in indices:
        together = {}
        for name, values in parts.items():
            # A value from outside the deepest lists belongs to all elements whose index begins with
            # its own: the question `qa[0].q` to both answers `qa[0].a[0]` and `qa[0].a[1]`.
            if index[: values.depth] not in values.at:
                raise ExampleError(f"{values.text} has fewer values than {deepest[0].text}")
            together[name] = values.at[index[: values.depth]]
        yield index, together


def _whole(value: Any) -> int | None:
    """Return a whole number as an integer, else `None`.

    A column of whole numbers with a gap is one of floats in pandas and in the files it writes.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    is_number = isinstance(value, float | np.floating | Decimal) and math.isfinite(value)
    return int(value) if is_number and value == int(value) else None


def _text(value: Any, where: str, numbers: bool) -> str:
    """Return a value as a text; a whole number only if `numbers` is true."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExampleError(f"{where} is not UTF-8") from error
    if (number := _whole(value)) is not None:
        if not numbers:
            raise ExampleError(
                f"{where} is the number {number}, not a text. If it is a class index, map the name "
                "of the class; if it is the answer itself, set `numbers: true` in the mapping"
            )
        return str(number)
    if not isinstance(value, str):
        cure = ""
        if isinstance(value, datetime.date):
            cure = (
                ". datasets reads JSON texts such as 2020-01-01 as times; name the file as `rows`"
            )
        raise ExampleError(f"{where} is a {type(value).__name__}, not a text{cure}")
    return value


def _seconds(value: Any, where: str) -> float:
    """Return seconds from a number or from `00:01:02.5`."""
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        hours, minutes, seconds = clock.groups(default="0")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ExampleError(f"{where} is {value!r}, not a time") from error


def _number(value: Any, where: str) -> int | float:
    """Return a number; CSV files give it as a text."""
    if (number := _whole(value)) is not None:
        return number
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ExampleError(f"{where} is {value!r}, not a number") from error


def _flag(value: Any, where: str) -> bool:
    """Return true or false from a boolean, 0 or 1, or a text such as "True" or "yes"."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(_whole(value)) if _whole(value) is not None else str(value).strip().casefold()
    if text not in known:
        raise ExampleError(f"{where} is {value!r}, neither true nor false")
    return known[text]


def _listed(parts: list[_Values], index: Index) -> list:
    """Return all values that belong to an element: those at its index, inside it or around it."""
    found = []
    for values in parts:
        for at, value in values.at.items():
            depth = min(len(at), len(index))
            if at[:depth] == index[:depth]:
                is_list = isinstance(value, _LISTS)
                found += list(value) if is_list else [value]
    return found


def class_words(text: str) -> str:
    """Return the name of a class as words: `PlantTree` and `plant_tree` are "plant tree".

    A word with several capitals, such as CD, keeps them.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    words = words.replace("_", " ").split()
    return " ".join(word if sum(map(str.isupper, word)) > 1 else word.casefold() for word in words)


def _is_unknown(value: Any) -> bool:
    """Return whether a time is missing: null, or a text such as "NA" in its place."""
    return value is None or isinstance(value, str) and value.strip().casefold() in _NO_TIME


def _equal(value: Any, wanted: Any) -> bool:
    """Return whether a value is the wanted one; CSV files give numbers and booleans as texts."""
    if not isinstance(value, str) or isinstance(wanted, str | None):
        return value == wanted
    if isinstance(wanted, bool):
        return value.strip().casefold() == str(wanted).casefold()
    try:
        return float(value) == wanted
    except ValueError:
        return False


def _media(value: Any, where: str) -> str | bytes:
    """Return the path or the content of a media file."""
    if isinstance(value, Mapping) and value.keys() >= _STORED:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None or isinstance(value, str | bytes) and not value:
        raise ExampleError(f"{where} is empty")
    if not isinstance(value, str | bytes):
        raise ExampleError(
            f"{where} is a {type(value).__name__}, neither a path nor bytes. Cast a column of "
            "`datasets` to its feature with `decode=False`"
        )
    return value


# -- the mapping -----------------------------------------------------------------------------


def _check_type(key: str, value: Any) -> None:
    """Check the type of one part of a mapping; `None` leaves out a part that is optional.

    Raises:
        ColumnError: the type is wrong.
    """
    if key in ("target", "absent", "remove"):
        kind = "a text or a list of texts" + (" and nulls" if key == "absent" else "")
        types = str | None if key == "absent" else str
        right = isinstance(value, str) or (
            isinstance(value, list | tuple) and all(isinstance(text, types) for text in value)
        )
    elif key == "seconds":
        kind = "a number of seconds above 0"
        right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    elif key == "where":
        kind = "a mapping of paths to values, such as {split: train}"
        right = isinstance(value, Mapping) and all(isinstance(path, str) for path in value)
    elif key == "replace":
        kind = "a mapping of texts to texts"
        right = isinstance(value, Mapping) and all(isinstance(text, str) and text for text in value)
        right = right and all(isinstance(text, str) for text in value.values())
    elif key in ("numbers", "words"):
        kind, right = "true or false", isinstance(value, bool)
    else:
        kind, right = "a text", isinstance(value, str)
    if not right and (
        value is not None or key in ("query", "where", "replace", "numbers", "words")
    ):
        raise ColumnError(f"{key} is {value!r}; give {kind}")


@dataclass(frozen=True)
class Role:
    """Part of a mapping that fills a further field of a row.

    Attributes:
        paths: paths to the values; several make one list.
        text: instead of a path, a constant, or a text with paths in braces.
        values: the field's value for each value at the path, such as `{true: simple}`.
    """

    paths: tuple[str, ...] = ()
    text: str | None = None
    values: Mapping[Any, Any] | None = None

    @classmethod
    def of(cls, key: str, kind: str, given: Any) -> "Role":
        """Build and check a role from a path, a list of paths, `{text: …}` or `{column: …,
        values: …}`.

        Raises:
            ColumnError: it has another form.
        """
        if isinstance(given, Mapping) and given.keys() == {"text"}:
            text = given["text"]
            if isinstance(text, str) and kind == "text":
                return cls(text=text)
        elif isinstance(given, Mapping) and given.keys() == {"column", "values"}:
            column, values = given["column"], given["values"]
            if kind not in LIST_KINDS and isinstance(column, str) and isinstance(values, Mapping):
                return cls(paths=(column,), values=values)
        else:
            paths = given if kind in LIST_KINDS and isinstance(given, list | tuple) else [given]
            if paths and all(isinstance(path, str) for path in paths):
                return cls(paths=tuple(paths))
        wanted = "a list of paths" if kind in LIST_KINDS else "{text: ...} for a text"
        raise ColumnError(
            f"{key} is {given!r}; give a path, {{column: ..., values: ...}} or {wanted}"
        )

    def read(self, example: Mapping) -> "_Values":
        """Return the values of a role whose kind is not a list."""
        if self.text is not None:
            return _text_values(example, self.text)
        found = _values(example, self.paths[0])
        if self.values is None:
            return found
        at = {index: self.mapped(value) for index, value in found.at.items()}
        return _Values(found.text, found.depth, at)

    def mapped(self, value: Any) -> Any:
        for key, mapped in self.values.items():
            if _equal(value, key):
                return mapped
        known = ", ".join(map(repr, self.values))
        raise ExampleError(f"{self.paths[0]} is {value!r}, and `values` has only {known}")

    def __str__(self) -> str:
        return self.text if self.text is not None else ", ".join(self.paths)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Mapping from the fields of a row to the columns of one data set's examples.

    Attributes:
        name: name of the set, for messages and group ids.
        image, video: path to the media, one of the two: a file's path, its bytes, or the undecoded
            value of `datasets`.
        query: a constant, or a text with paths in braces.
        target: paths, or texts with paths in braces; each makes rows of its own. A list of texts at
            the end of a path makes a row of each.
        start, end: paths to the clip's times, in seconds or as `00:01:02.5`.
        moment, seconds: instead of these, a path to a moment, and the length of a clip around it.
        negatives: path to a list of wrong texts.
        where: values by path; only examples with these values make rows. A list gives alternatives.
        absent: targets that mean a missing one, such as "N/A"; with a null in this list, nulls,
            empty lists and JSON objects without the key do too. By default they are faults.
        remove: texts that are cut out of queries and targets.
        replace: texts that are replaced there by others; `remove` comes first.
        numbers: accept a whole number as a target. By default it is an error, because it is usually
            a class index, and the name of the class is wanted.
        words: targets are names of classes such as `MakeTea` or `make_tea`, which become words.
        id: path to the example's own id, for messages and to find repeated examples.
        roles: further fields of a row, by name; `row_fields` has their kinds. If the kind is a
            list, all elements of the path make one list.
        row_fields: the fields of these rows; by default an image or a video, and a target.
    """

    name: str
    target: tuple[str, ...]
    image: str | None = None
    video: str | None = None
    query: str = ""
    start: str | None = None
    end: str | None = None
    moment: str | None = None
    seconds: float | None = None
    negatives: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str | None, ...] = ()
    remove: tuple[str, ...] = ()
    replace: dict[str, str] = field(default_factory=dict)
    numbers: bool = False
    words: bool = False
    id: str | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    row_fields: RowFields = field(default_factory=RowFields)

    @classmethod
    def from_mapping(
        cls, name: str, mapping: Mapping[str, Any], row_fields: RowFields | None = None
    ) -> "Columns":
        """Build the mapping from a recipe's, a public set's or a benchmark's keys, and check it.

        Args:
            row_fields: the fields of the rows; a field with a role is a key of the mapping.
        Raises:
            ColumnError: it is not a mapping, or a key is unknown, missing, of a wrong type or not
                a path.
        """
        row_fields = row_fields or RowFields()
        kinds = row_fields.roles
        known = {item.name for item in fields(cls)} - {"name", "roles", "row_fields"} | {*kinds}
        try:
            if not isinstance(mapping, Mapping):
                raise ColumnError(
                    f"{mapping!r} is not a mapping; write one such as {{image: jpg, target: txt}}"
                )
            roles = {}
            for key, value in mapping.items():
                if key not in known:
                    raise ColumnError(f"unknown key {key!r}.{_near(str(key), known)}")
                if key in kinds:
                    roles[key] = Role.of(key, kinds[key], value)
                else:
                    _check_type(key, value)
            own = {key: value for key, value in mapping.items() if key not in kinds}
            listed = {
                key: (value,) if isinstance(value, str) else tuple(value)
                for key in ("target", "absent", "remove")
                if (value := mapping.get(key)) is not None
            }
            parts = {"target": (), "roles": roles, "row_fields": row_fields, **own, **listed}
            return cls(name=name, **parts)
        except ColumnError as error:
            raise ColumnError(f"{name}: {error}") from error

    def __post_init__(self):
        if not self.row_fields.media and (self.image or self.video):
            raise ColumnError("these rows are texts: leave out image and video.")
        if self.row_fields.media and (self.image is None) == (self.video is None):
            raise ColumnError("give either image or video.")
        given = [*self.roles, *(["target"] if self.target else [])]
        for key in self.row_fields.required:
            if key not in given:
                raise ColumnError(f"{key} is missing.")
        if (self.moment is None) != (self.seconds is None):
            raise ColumnError("give both moment and seconds, or neither.")
        if self.moment is not None and (self.start is not None or self.end is not None):
            raise ColumnError("give either start and end, or moment and seconds.")
        # Paths are not checked before an example is seen: a name may hold any character.
        paths = [self.image, self.video, self.start, self.end, self.moment, self.negatives, self.id]
        roles = [text for each in self.roles.values() for text in (*each.paths, each.text or "")]
        for text in (self.query, *filter(None, paths), *self.target, *self.where, *roles):
            _pieces(text)

    def read(self, example: Mapping[str, Any]) -> tuple[list[dict], list[str]]:
        """Return the rows of one example, and why other targets of it make none.

        A row has `image` or `video`, `query`, `target`, `group_id` and, if they are mapped, `start`
        and `end` in seconds and `negatives`. Rows with the same clip and query share a `group_id`:
        their targets are interchangeable. A target that is `absent` or excluded by `where` makes no
        row; a null makes none either and is a fault, unless `absent` contains it.

        Raises:
            ColumnError: a column of the mapping is missing.
            ExampleError: this example is broken.
        """
        rows, faults = [], []
        try:
            where = {f"where {path}": _values(example, path) for path in self.where}
            outer = {name: part.at[()] for name, part in where.items() if not part.depth}
            if not self._wanted(outer):
                return [], []
            parts = self._parts(example) | where
            for target in self.target or [None]:
                self._read_target(example, target, parts, rows, faults)
        except (ColumnError, ExampleError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        return rows, [f"{self.name}: {fault}" for fault in faults]

    def _parts(self, example: Mapping[str, Any]) -> dict[str, _Values]:
        """Return the values of every part but the targets, the lists and `where`."""
        texts = {
            "start": self.start,
            "end": self.end,
            "moment": self.moment,
            "negatives": self.negatives,
            "id": self.id,
        }
        parts = {name: _values(example, text) for name, text in texts.items() if text is not None}
        parts["query"] = _text_values(example, self.query)
        parts |= {
            f"role {name}": role.read(example)
            for name, role in self.roles.items()
            if not self._is_list(name)
        }
        if self.row_fields.media:
            media = _values(example, self.image or self.video)
            clips = {index: _media(value, media.text) for index, value in media.at.items()}
            named = {index: (clip, media_name(clip)) for index, clip in clips.items()}
            parts["media"] = _Values(media.text, media.depth, named)
        return parts

    def _is_list(self, role: str) -> bool:
        return self.row_fields.roles[role] in LIST_KINDS

    def _read_target(
        self,
        example: Mapping[str, Any],
        target: str | None,
        parts: dict[str, _Values],
        rows: list[dict],
        faults: list[str],
    ) -> None:
        """Add the rows that one path of targets makes, and its faults.

        Args:
            target: `None` for rows without a target.
        """
        lists = {
            name: [_values(example, path) for path in role.paths]
            for name, role in self.roles.items()
            if self._is_list(name)
        }
        if target is not None:
            try:
                parts = parts | {"target": _values(example, target)}
            except MissingKey:
                if None in self.absent:
                    return
                raise
        elements = list(_side_by_side(parts))
        if not elements and None not in self.absent:
            faults.append(f"{target or 'the list'} has no element")
        for index, found in elements:
            if not self._wanted(found):
                continue
            found |= {f"role {name}": _listed(values, index) for name, values in lists.items()}
            if target is None:
                rows.append(self._row(found, None))
                continue
            value = found["target"]
            # As in a JSONL file, a list holds several right texts.
            for each in value if isinstance(value, _LISTS) and len(value) else [value]:
                text = self._target(each, target)
                if text in self.absent:
                    continue
                if text is None:
                    faults.append(f"{target} is null")
                else:
                    rows.append(self._row(found, text))

    def _wanted(self, found: dict[str, Any]) -> bool:
        """Return whether the conditions among these values hold."""
        return all(
            any(
                _equal(found[f"where {path}"], each)
                for each in (wanted if isinstance(wanted, list) else [wanted])
            )
            for path, wanted in self.where.items()
            if f"where {path}" in found
        )

    def _target(self, value: Any, where: str) -> str | None:
        if value is None or isinstance(value, _LISTS) and not len(value):
            return None
        text = self._clean(_text(value, where, self.numbers))
        return class_words(text) if self.words else text

    def _clean(self, text: str) -> str:
        for part in self.remove:
            text = text.replace(part, "")
        for part, other in self.replace.items():
            text = text.replace(part, other)
        return text.strip()

    def _row(self, found: dict[str, Any], target: str | None) -> dict:
        media, name = found.get("media", (None, ""))
        if found["query"] is None:
            raise ExampleError(f"the query {self.query} is null")
        query = self._clean(found["query"])
        span = self._span(found)
        group = [self.name, name, *map(str, span.values()), query]
        row = {"query": query} | ({} if target is None else {"target": target})
        if self.row_fields.media:
            row = {"image" if self.video is None else "video": media} | row
        if found.get("negatives") is not None:
            row["negatives"] = [
                _text(text, self.negatives, self.numbers)
                for text in _list(found["negatives"], self.negatives)
            ]
        if found.get("id") is not None:
            row["id"] = _text(found["id"], self.id, True)
        for name, role in self.roles.items():
            if (value := self._role(name, found[f"role {name}"], str(role))) is not None:
                row[name] = value
        if not self.row_fields.media:
            return row
        return row | span | {"group_id": " | ".join(group)}

    def _role(self, role: str, value: Any, where: str) -> Any:
        """Return the value of a further field, as its kind states; `None` if it is null."""
        kind = self.row_fields.roles[role]
        if kind not in LIST_KINDS:
            return None if value is None else self._of_kind(kind, value, where)
        if None in value:
            raise ExampleError(f"{where} has a null")
        return [self._of_kind(LIST_KINDS[kind], each, where) for each in value]

    def _of_kind(self, kind: str, value: Any, where: str) -> Any:
        if kind == "text":
            return self._clean(_text(value, where, True))
        if kind == "number":
            return _number(value, where)
        return _flag(value, where) if kind == "flag" else _media(value, where)

    def _span(self, found: dict[str, Any]) -> dict[str, float]:
        """Return `start` and `end`, if they are known."""
        if self.moment is not None:
            moment, half = _seconds(found["moment"], self.moment), self.seconds / 2
            return {"start": max(0.0, moment - half), "end": moment + half}
        return {
            name: _seconds(found[name], name)
            for name in ("start", "end")
            if not _is_unknown(found.get(name))
        }


__all__ = [
    "ColumnError",
    "Columns",
    "ExampleError",
    "Record",
    "class_words",
    "read_json",
    "value_of",
]
