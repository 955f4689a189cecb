"""The user's own data: a JSONL file, one sample per line.

    {"video": "clips/0001.mp4", "query": "What is poured?", "target": "milk"}
    {"image": "photos/7.jpg", "target": "a red bicycle against a wall"}

| field        | holds                                                                          |
|--------------|--------------------------------------------------------------------------------|
| `video`      | a file, or a folder of images in the order of their names; relative to the     |
| or `image`   | JSONL file's folder                                                            |
| `query`      | what is asked; may be left out                                                 |
| `target`     | a text, or a list of texts of which any is right: as many samples, of one group |
| `start`, `end` | seconds of a video, where the sample is a part of it                         |
| `negatives`  | a list of texts that are wrong here though they come close; may be left out    |
| `group_id`   | equal for samples whose targets are interchangeable; may be left out           |
| `previous`   | the text of the segment before, for a decoder that reads it; may be left out   |

Other columns are handed on as they are. docs/data.md has the other ways to bring data.
"""

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .video_io import Excerpt

Media = str | bytes | Excerpt

_FIELDS = (
    "video",
    "image",
    "query",
    "target",
    "negatives",
    "start",
    "end",
    "group_id",
    "previous",
)


@dataclass(frozen=True)
class BadRow:
    """A line that is no sample. `str(bad_row)` reads "rows.jsonl:17: target is empty"."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_rows(path: str | os.PathLike) -> tuple[list[dict], list[BadRow]]:
    """Read a JSONL file, setting aside every line that could not be trained or evaluated on.

    Returns: the good rows and the bad ones. A good row holds `line` (its number in the file,
        from 1; it replaces a column of that name), `video` or `image` (absolute path of an
        existing file), `query` (default `""`), `target`, and the file's other columns.
    Raises: `FileNotFoundError` if there is no such file, `ValueError` if it holds no row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSONL file. Give the path of one.")
    rows, bad = [], []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                rows += parse_line(line, path.parent, where=(str(path), number))
            except RowError as error:
                bad.append(BadRow(str(path), number, str(error)))
    if not rows and not bad:
        raise ValueError(f"{path}: the file holds no row. Write one JSON object per line.")
    return rows, bad


def bad_rows_report(bad: list[BadRow], total: int, max_share: float) -> str:
    """Say how many of `total` rows were set aside and why, the first 20 of them by name.

    Raises: `ValueError` with the same text when more than `max_share` (0 to 1) are bad.
    """
    report = f"{len(bad)} of {total} rows are unusable"
    report += "".join(f"\n  {row}" for row in bad[:20])
    if len(bad) > 20:
        report += f"\n  ... and {len(bad) - 20} more"
    if len(bad) > max_share * total:
        raise ValueError(f"{report}\nAt most {max_share:.1%} may be; correct the rows above.")
    return report


# -- one identity of a clip ------------------------------------------------------------------


def media_of(row: dict) -> Media:
    """Return what to read for a row: a file or a folder of frames, the content of a file, or a
    part of a video. Rows about the same clip have equal media."""
    media = media_file(row)
    if "start" in row or "end" in row:
        return Excerpt(media, row.get("start"), row.get("end"))
    return media


def media_file(row: dict) -> str | bytes:
    """Return the file of a row's clip, its folder of frames, or its content as bytes."""
    return row["video"] if "video" in row else row["image"]


def media_name(media: str | bytes) -> str:
    """Return the path of a file; for the content of a file, a name made of its hash.

    Where sets bring contents, file names repeat (`000000000.jpg`), so a name would not be unique.
    """
    if isinstance(media, str):
        return media
    return f"content {hashlib.blake2b(media, digest_size=16).hexdigest()}"


def clip_key(row: dict) -> str:
    """Return the name of a row's clip: kind, file, and seconds where it is a part of a video.

    The kind is part of it because one GIF can be a video in one row and an image in another.
    """
    part = (row.get("start"), row.get("end"))
    excerpt = "" if part == (None, None) else f"#t={part[0]},{part[1]}"
    return f"{'video' if 'video' in row else 'image'} {media_name(media_file(row))}{excerpt}"


def key_number(key: str) -> int:
    """Return a signed 64-bit hash of a clip's key, equal on every machine.

    Among ten million clips the chance that two share a number is 3 in a million.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)


def file_stamp(media: str | bytes) -> list[int]:
    """Return two numbers that change when the media change: a file's size in bytes and
    modification time in nanoseconds; for a folder, a hash of its files' names, sizes and times,
    and the latest time; for bytes, their number and 0. `[-1, -1]` if missing: the reader raises
    later."""
    if isinstance(media, bytes):
        return [len(media), 0]
    try:
        if not os.path.isdir(media):
            found = os.stat(media)
            return [found.st_size, found.st_mtime_ns]
        files = [(path.name, path.stat()) for path in sorted(Path(media).iterdir())]
    except (OSError, ValueError):  # ValueError: a path that cannot exist, such as a null byte
        return [-1, -1]
    # Names are hashed too: frames that swap names keep their sizes and times.
    facts = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    return [key_number(repr(facts)), max((time for _, _, time in facts), default=0)]


# -- reading ---------------------------------------------------------------------------------


class RowError(ValueError):
    """Why a line or an example is no sample."""


def parse_line(line: bytes, folder: Path, where: tuple[str, int]) -> list[dict]:
    """The samples of one line of a JSONL file in `folder`.

    Args:
        where: the file's name and the line's number.
    Raises: `RowError`.
    """
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise RowError("not valid JSON (nested too deep)") from error
    except ValueError as error:
        raise RowError(f"not valid JSON ({error})") from error  # a number of too many digits
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but a {type(row).__name__}")
    return samples_of(row, where, folder)


def samples_of(row: dict, where: tuple[str, int], folder: Path | None = None) -> list[dict]:
    """A row with one or several targets to checked samples of one target each.

    Args:
        where: what the row comes from and its number there, the samples' `line`.
        folder: of its media files, which have to be there; `None` where media are no files.
    Raises: `RowError`.
    """
    row = {name: value for name, value in row.items() if name not in _FIELDS or value is not None}
    if ("video" in row) == ("image" in row):
        both = "both video and image are" if "video" in row else "neither video nor image is"
        raise RowError(f"{both} given, exactly one is needed")
    row.setdefault("query", "")
    if folder is not None:
        for name in ("video", "image"):
            _check_text(row, name)
    _check_text(row, "query")
    _check_text(row, "previous")
    _check_whole(str(row.get("group_id")), "group_id")
    _check_times(row)
    targets = row["target"] if isinstance(row.get("target"), list) else [row.get("target")]
    if not targets:
        raise RowError("target is empty")
    rows = [{**row, "target": target} for target in targets]
    for each in rows:
        _check_target(each)
        _check_negatives(each)
    if folder is not None:
        media = "video" if "video" in row else "image"
        path = os.path.abspath(folder / row[media])
        if not (os.path.isfile(path) or (media == "video" and os.path.isdir(path))):
            raise RowError(f"{media} file is missing: {path}")
        rows = [{**each, media: path} for each in rows]
    if len(rows) > 1:
        rows = [{"group_id": "{}:{}".format(*where), **each} for each in rows]
    return [{**each, "line": where[1]} for each in rows]


def _check_text(row: dict, name: str) -> None:
    if name in row and not isinstance(row[name], str):
        raise RowError(f"{name} is not a string but a {type(row[name]).__name__}")
    if name in row:
        _check_whole(row[name], name)


def _check_whole(text: str, name: str) -> None:
    """Refuse half of a character, as JSON has it of a text that was cut within an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RowError(f"{name} holds half a character, {half}: cut it between two") from error


def _check_target(row: dict) -> None:
    if row["target"] is None:
        raise RowError("target is missing")
    _check_text(row, "target")
    if not row["target"].strip():
        raise RowError("target is empty")
    if row["query"].strip().casefold() == row["target"].strip().casefold():
        raise RowError("query equals target: the answer would leak into the input")


def _check_times(row: dict) -> None:
    """`start` and `end` are seconds, in this order, and of a video."""
    given = [name for name in ("start", "end") if name in row]
    for name in given:
        value = row[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max  # a whole number may be larger; NaN is not less
        ):
            raise RowError(f"{name} is no number of seconds but {value!r:.40}")
    if given and "image" in row:
        raise RowError(f"{given[0]} is given, but an image has no times")
    if row.get("start", 0) < 0 or row.get("start", 0) >= row.get("end", math.inf):
        raise RowError(f"start {row.get('start', 0)} and end {row.get('end')} hold no time")


def _check_negatives(row: dict) -> None:
    """Refuse what is no list of wrong texts."""
    negatives = row.get("negatives", [])
    if not isinstance(negatives, list) or not all(
        isinstance(text, str) and text.strip() for text in negatives
    ):
        raise RowError("negatives is not a list of texts")
    if row["target"] in negatives:
        raise RowError("negatives hold the target itself")
    for text in negatives:
        _check_whole(text, "negatives")


__all__ = [
    "BadRow",
    "Media",
    "RowError",
    "bad_rows_report",
    "clip_key",
    "file_stamp",
    "key_number",
    "media_file",
    "media_name",
    "media_of",
    "parse_line",
    "read_rows",
    "samples_of",
]
