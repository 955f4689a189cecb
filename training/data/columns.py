"""Rows from data with other column names and nesting, by a mapping from row fields to columns.

    {"image": "image", "query": "{question}", "target": "answers[].answer"}

A path is column names joined by dots. After a name, `[]` selects every element of a list, `[0::2]`
a slice of it, `[0]` one element, and `[only]` the only element of a list that must not have more.
Each element becomes a row. Values from outside the list are repeated in all of its rows; parallel
lists must have equal lengths and are read together. A value with braces is a text that contains
paths: `{page}/{id}.mp4`, `{image_id:012d}.jpg`.

No code here opens a file or depends on a particular data set.
"""

import difflib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

from processing.rows import media_name

# Columns of an image or a video that `datasets` has not decoded; one of them may be null.
_STORED = {"bytes", "path"}
_SEGMENT = re.compile(r"([^\[\]{}]+)((?:\[[^\[\]]*\])*)")
_SLICE = re.compile(r"(-?\d+)?(?::(-?\d+)?)?(?::(-?\d+)?)?")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)")

Index = tuple[int, ...]  # indices into the lists on the path to a value


class ColumnError(ValueError):
    """Mapping that does not fit its data; the message names the set, the column and those found."""


class ExampleError(ValueError):
    """Example that is broken, though its columns fit the mapping."""


# -- paths ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """Step of a path: into a column, to the elements of a slice, or to one element."""

    column: str | None = None
    every: slice | None = None
    element: int | None = None  # -1: the only one


@cache
def _steps(path: str) -> tuple[_Step, ...]:
    steps = []
    for segment in path.split("."):
        match = _SEGMENT.fullmatch(segment)
        if match is None:
            raise ColumnError(f"{path!r} is not a path; write one such as name.name[].name")
        steps.append(_Step(column=match[1]))
        steps += [_bracket(text, path) for text in re.findall(r"\[([^\]]*)\]", match[2])]
    return tuple(steps)


def _bracket(text: str, path: str) -> _Step:
    match = _SLICE.fullmatch(text)
    if text == "only":
        return _Step(element=-1)
    if text.isdecimal():
        return _Step(element=int(text))
    if match is None or text.startswith("-") and ":" not in text:
        raise ColumnError(f"{path!r}: [{text}] is not one of [], [0], [0::2] and [only]")
    return _Step(every=slice(*(part and int(part) for part in match.groups())))


def _walk(value: Any, steps: tuple[_Step, ...], where: str) -> Iterator[tuple[Index, Any]]:
    """Yield every value at the end of a path, with its index.

    A null before the end of the path gives the value `None`; in place of a list, it gives no value.
    """
    if not steps:
        yield (), value
    elif value is None:
        if all(step.every is None for step in steps):
            yield (), None
    elif steps[0].column is not None:
        name = steps[0].column
        columns = _object(value, where)
        if name not in columns:
            raise ColumnError(
                f"{where or 'an example'} has no column {name!r}, but "
                f"{', '.join(map(repr, columns)) or 'none'}.{_near(name, columns)}"
            )
        yield from _walk(columns[name], steps[1:], f"{where}.{name}" if where else name)
    elif steps[0].every is not None:
        for first, element in enumerate(_list(value, where)[steps[0].every]):
            for index, end in _walk(element, steps[1:], f"{where}[]"):
                yield (first, *index), end
    else:
        yield from _walk(_element(_list(value, where), steps[0].element, where), steps[1:], where)


def _object(value: Any, where: str) -> Mapping:
    """Return a value that has columns; a text in its place is read as JSON."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ExampleError(f"{where} is a text but not JSON") from error
    if not isinstance(value, Mapping):
        name = type(value).__name__
        raise ExampleError(f"{where or 'the example'} is a {name}, which has no columns")
    return value


def _list(value: Any, where: str) -> list | tuple | np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        raise ExampleError(f"{where} is a {type(value).__name__}, not a list")
    return value


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
    steps = _steps(path)
    depth = sum(step.every is not None for step in steps)
    return _Values(path, depth, dict(_walk(example, steps, "")))


@cache
def _pieces(text: str) -> tuple[tuple[str, str | None, str], ...]:
    """Split a text with braces into pieces of (text before the path, path, format)."""
    try:
        pieces = [(before, path, spec) for before, path, spec, _ in string.Formatter().parse(text)]
    except ValueError as error:
        raise ColumnError(f"{text!r}: {error}") from error
    for _, path, _ in pieces:
        if path is not None:
            _steps(path)
    return tuple(pieces)


def _text_values(example: Mapping, text: str) -> _Values:
    """Fill in the paths of a text, once for each element; `None` if a path's value is null."""
    pieces = _pieces(text)
    parts = {path: _path_values(example, path) for _, path, _ in pieces if path is not None}
    depth = max((part.depth for part in parts.values()), default=0)
    return _Values(
        text, depth, {index: _filled(pieces, found) for index, found in _side_by_side(parts)}
    )


def _filled(pieces: tuple[tuple[str, str | None, str], ...], found: dict[str, Any]) -> str | None:
    if None in found.values():
        return None
    return "".join(
        before + ("" if path is None else _formatted(found[path], spec, path))
        for before, path, spec in pieces
    )


def _values(example: Mapping, text: str) -> _Values:
    return _text_values(example, text) if "{" in text else _path_values(example, text)


def _formatted(value: Any, spec: str, path: str) -> str:
    """Return a path's value as it appears in a text."""
    # CSV files give numbers as texts, so a format such as `06d` converts them first.
    try:
        return format(int(value) if spec.endswith("d") else _text(value, path, True), spec)
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


def _text(value: Any, where: str, numbers: bool) -> str:
    """Return a value as a text; an integer only if `numbers` is true."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExampleError(f"{where} is not UTF-8") from error
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not numbers:
            raise ExampleError(
                f"{where} is the number {value}, not a text. If it is a class index, map the name "
                "of the class; if it is the answer itself, set `numbers: true` in the mapping"
            )
        return str(value)
    if not isinstance(value, str):
        raise ExampleError(f"{where} is a {type(value).__name__}, not a text")
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
        kind = "a text or a list of texts"
        right = isinstance(value, str) or (
            isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        )
    elif key == "seconds":
        kind = "a number of seconds above 0"
        right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    elif key == "where":
        kind = "a mapping of paths to values, such as {split: train}"
        right = isinstance(value, Mapping) and all(isinstance(path, str) for path in value)
    elif key == "numbers":
        kind, right = "true or false", isinstance(value, bool)
    else:
        kind, right = "a text", isinstance(value, str)
    if not right and (value is not None or key in ("query", "where", "numbers")):
        raise ColumnError(f"{key} is {value!r}; give {kind}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Mapping from the fields of a row to the columns of one data set's examples.

    Attributes:
        name: name of the set, for messages and group ids.
        image, video: path to the media, one of the two: a file's path, its bytes, or the undecoded
            value of `datasets`.
        query: a constant, or a text with paths in braces.
        target: paths, or texts with paths in braces; each makes rows of its own.
        start, end: paths to the clip's times, in seconds or as `00:01:02.5`.
        moment, seconds: instead of these, a path to a moment, and the length of a clip around it.
        negatives: path to a list of wrong texts.
        where: values by path; only examples with these values make rows. A list gives alternatives.
        absent: targets that mean a missing one, such as "N/A".
        remove: texts that are cut out of queries and targets.
        numbers: accept an integer as a target. By default it is an error, because it is usually a
            class index, and the name of the class is wanted.
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
    absent: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    numbers: bool = False

    @classmethod
    def from_mapping(cls, name: str, mapping: Mapping[str, Any]) -> "Columns":
        """Build the mapping from a recipe's or a public set's keys, and check it.

        Raises:
            ColumnError: it is not a mapping, or a key is unknown, missing, of a wrong type or not
                a path.
        """
        known = {item.name for item in fields(cls)} - {"name"}
        try:
            if not isinstance(mapping, Mapping):
                raise ColumnError(
                    f"{mapping!r} is not a mapping; write one such as {{image: jpg, target: txt}}"
                )
            for key, value in mapping.items():
                if key not in known:
                    raise ColumnError(f"unknown key {key!r}.{_near(str(key), known)}")
                _check_type(key, value)
            listed = {
                key: (value,) if isinstance(value, str) else tuple(value)
                for key in ("target", "absent", "remove")
                if (value := mapping.get(key)) is not None
            }
            return cls(name=name, **{"target": (), **mapping, **listed})
        except ColumnError as error:
            raise ColumnError(f"{name}: {error}") from error

    def __post_init__(self):
        if (self.image is None) == (self.video is None):
            raise ColumnError("give either image or video.")
        if not self.target:
            raise ColumnError("target is missing.")
        if (self.moment is None) != (self.seconds is None):
            raise ColumnError("give both moment and seconds, or neither.")
        if self.moment is not None and (self.start is not None or self.end is not None):
            raise ColumnError("give either start and end, or moment and seconds.")
        # Parsed now, though only examples need them: a wrong path is an error of the recipe.
        paths = [self.image or self.video, self.start, self.end, self.moment, self.negatives]
        for text in (*filter(None, paths), *self.target, *self.where):
            _pieces(text) if "{" in text else _steps(text)
        _pieces(self.query)

    def rows(self, example: Mapping[str, Any]) -> list[dict]:
        """Return the rows of one example.

        A row has `image` or `video`, `query`, `target`, `group_id` and, if they are mapped, `start`
        and `end` in seconds and `negatives`. Rows with the same clip and query share a `group_id`:
        their targets are interchangeable. A target that is null or `absent` makes no row.

        Raises:
            ColumnError: a column of the mapping is missing.
            ExampleError: this example is broken.
        """
        try:
            parts = self._parts(example)
            return [row for target in self.target for row in self._rows(example, target, parts)]
        except (ColumnError, ExampleError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _parts(self, example: Mapping[str, Any]) -> dict[str, _Values]:
        """Return the values of every part but the targets."""
        texts = {
            "start": self.start,
            "end": self.end,
            "moment": self.moment,
            "negatives": self.negatives,
            **{f"where {path}": path for path in self.where},
        }
        parts = {name: _values(example, text) for name, text in texts.items() if text is not None}
        media = _values(example, self.image or self.video)
        clips = {index: _media(value, media.text) for index, value in media.at.items()}
        named = {index: (clip, media_name(clip)) for index, clip in clips.items()}
        return parts | {
            "media": _Values(media.text, media.depth, named),
            "query": _text_values(example, self.query),
        }

    def _rows(
        self, example: Mapping[str, Any], target: str, parts: dict[str, _Values]
    ) -> Iterator[dict]:
        for _, found in _side_by_side(parts | {"target": _values(example, target)}):
            if self._wanted(found) and (text := self._target(found["target"], target)) is not None:
                yield self._row(found, text)

    def _wanted(self, found: dict[str, Any]) -> bool:
        return all(
            found[f"where {path}"] in (values if isinstance(values, list) else [values])
            for path, values in self.where.items()
        )

    def _target(self, value: Any, where: str) -> str | None:
        text = None if value is None else self._clean(_text(value, where, self.numbers))
        return None if text in self.absent else text

    def _clean(self, text: str) -> str:
        for part in self.remove:
            text = text.replace(part, "")
        return text.strip()

    def _row(self, found: dict[str, Any], target: str) -> dict:
        media, name = found["media"]
        if found["query"] is None:
            raise ExampleError(f"the query {self.query} is null")
        query = self._clean(found["query"])
        span = self._span(found)
        group = [self.name, name, *map(str, span.values()), query]
        row = {"image" if self.video is None else "video": media, "query": query, "target": target}
        if found.get("negatives") is not None:
            row["negatives"] = [
                _text(text, self.negatives, self.numbers)
                for text in _list(found["negatives"], self.negatives)
            ]
        return row | span | {"group_id": " | ".join(group)}

    def _span(self, found: dict[str, Any]) -> dict[str, float]:
        """Return `start` and `end`, if they are known."""
        if self.moment is not None:
            moment, half = _seconds(found["moment"], self.moment), self.seconds / 2
            return {"start": max(0.0, moment - half), "end": moment + half}
        return {
            name: _seconds(found[name], name)
            for name in ("start", "end")
            if found.get(name) is not None
        }


__all__ = ["ColumnError", "Columns", "ExampleError"]
