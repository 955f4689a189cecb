"""The user's own data: a JSONL file with one sample per line.

    {"video": "clips/0001.mp4", "query": "What is poured?", "target": "milk"}
    {"image": "photos/7.jpg", "target": "a red bicycle against a wall"}

| field        | holds                                                                          |
|--------------|--------------------------------------------------------------------------------|
| `video`      | a file, or a folder of images in the order of their names; relative to the     |
| or `image`   | JSONL file's folder. A member of an archive is `zip://NAME::/PATH.zip`         |
| `query`      | the question; optional                                                         |
| `target`     | a text, or a list of correct texts: one sample for each, in one group          |
| `start`, `end` | seconds of the video, if the sample is a part of it                          |
| `negatives`  | a list of wrong texts that are similar to the target; optional                 |
| `group_id`   | equal for samples whose targets are interchangeable; optional                  |
| `previous`   | the text of the segment before, for a decoder that reads it; optional          |

The file is UTF-8; it can be compressed with gzip, bzip2 or xz. Other columns are passed on
unchanged. docs/data.md describes the other ways to bring data.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .media import archive_of, is_address, read_address
from .texts import check_text
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


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number; an int too large for a float is not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_media(value: object) -> bool:
    return isinstance(value, str | bytes) and bool(value)


# Kinds of a row's further fields: words for messages, and whether one value is of the kind.
ROLE_KINDS = {
    "text": ("a text", _is_text),
    "texts": ("a list of texts", _is_text),
    "number": ("a number", _is_number),
    "numbers": ("a list of numbers", _is_number),
    "flag": ("true or false", _is_flag),
    "media": ("a file", _is_media),
    "media list": ("a list of files", _is_media),
}
LIST_KINDS = {
    "texts": "text",
    "numbers": "number",
    "media list": "media",
}  # to the kind of an element

# By the first bytes of a file: its name may say nothing.
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = BYTE_ORDER_MARK + b" \t\r\n"  # the bytes of a line without a row


@dataclass(frozen=True)
class RowFields:
    """The fields that rows of one kind have, next to `query`.

    Attributes:
        media: a row is about an image or a video. Without it, it is about texts only.
        required: fields that each row must have.
        roles: kinds of further fields by their name: "text", "texts" (a list), "number", "numbers",
            "flag" (true or false), "media" (a file, as in `video`) or "media list". Fields of no
            known kind are passed on unchanged.
    """

    media: bool = True
    required: tuple[str, ...] = ("target",)
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if unknown := set(self.roles.values()) - ROLE_KINDS.keys():
            raise ValueError(f"roles: {unknown} is not among {', '.join(ROLE_KINDS)}")


@dataclass(frozen=True)
class BadRow:
    """Unusable line; `str(bad_row)` is, for example, "rows.jsonl:17: target is empty"."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_rows(
    path: str | os.PathLike, row_fields: RowFields | None = None
) -> tuple[list[dict], list[BadRow]]:
    """Read a JSONL file; set unusable lines aside.

    Args:
        row_fields: the fields of these rows; by default an image or a video, and a target.

    Returns: the good rows and the bad ones. A good row has `line` (its line number in the file,
        from 1; it replaces a column of that name), `video` or `image` (absolute path of an
        existing file), `query` (default `""`), `target`, and the file's other columns.
    Raises: `FileNotFoundError` if there is no such file, `ValueError` if it has no row or is not
        a JSONL file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSONL file. Give the path of one.")
    rows, bad = [], []
    try:
        with open_rows(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip(BLANK):
                    continue
                try:
                    rows += parse_line(line, path.parent, (str(path), number), row_fields)
                except RowError as error:
                    bad.append(BadRow(str(path), number, str(error)))
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Compress it again.") from error
    if not rows and not bad:
        raise ValueError(f"{path}: the file holds no row. Write one JSON object per line.")
    return rows, bad


def open_rows(path: Path, *, in_chunks: bool = False) -> io.BufferedIOBase:
    """Open a JSONL file for reading, unpacked.

    Args:
        in_chunks: it will be read from any position, as streamed sources do.

    Raises: `ValueError` for a file of another kind, and for a compressed one that is read in
        chunks.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    unpack = next((found for mark, found in COMPRESSED.items() if start.startswith(mark)), None)
    if unpack is not None and in_chunks:
        raise ValueError(
            f"{path}: compressed, so it cannot be read in chunks. Unpack it, or leave out "
            "`streaming: true`."
        )
    file = open(path, "rb") if unpack is None else unpack(path, "rb")  # noqa: SIM115
    try:
        check_lines(path, file.peek(4096)[:4096])
    except BaseException:
        file.close()
        raise
    return file


def check_lines(path: Path, start: bytes) -> None:
    """Raise `ValueError` if a file that starts with these bytes does not hold rows line by line."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start[:4]:
        raise ValueError(
            f"{path}: not UTF-8 but UTF-16 or UTF-32. Convert it: iconv -f UTF-16 -t UTF-8 IN > OUT"
        )
    if start.startswith((b"\x28\xb5\x2f\xfd", b"PK\3\4")):
        raise ValueError(
            f"{path}: packed with Zstandard or ZIP. Unpack it, or pack it with gzip, bzip2 or xz."
        )
    text = start.removeprefix(BYTE_ORDER_MARK).lstrip()
    if re.match(rb"\[\s*(\{|$)", text):
        raise ValueError(f"{path}: a JSON array. Write one object per line: jq -c '.[]' IN > OUT")
    if re.match(rb"\{[ \t]*\r?\n", text):
        raise ValueError(
            f"{path}: an object over several lines. Write one object per line: jq -c . IN > OUT"
        )


def bad_rows_report(bad: list[BadRow], total: int, max_share: float) -> str:
    """Return a text that counts the unusable rows and names the first 20 with their reasons.

    Args:
        total: all rows, good and bad.
        max_share: largest share of bad rows that is accepted, from 0 to 1.

    Raises: `ValueError` with the same text if the share is larger.
    """
    report = f"{len(bad)} of {total} rows are unusable"
    report += "".join(f"\n  {row}" for row in bad[:20])
    if len(bad) > 20:
        report += f"\n  ... and {len(bad) - 20} more"
    if len(bad) > max_share * total:
        raise ValueError(
            f"{report}\nAt most {100 * max_share:.3g}% may be unusable (data.max_bad_share), and "
            f"{100 * len(bad) / total:.3g}% are; correct the rows above or raise the limit."
        )
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

    Data sets that contain the images themselves repeat file names (`000000000.jpg`), so such a name
    would not be unique.
    """
    if isinstance(media, str):
        return media
    return f"content {hashlib.blake2b(media, digest_size=16).hexdigest()}"


def clip_key(row: dict) -> str:
    """Return the name of a row's clip: kind, file, and seconds where it is a part of a video.

    The kind is part of it because one GIF can be a video in one row and an image in another.
    """
    return _key(row, media_name(media_file(row)))


def content_key(row: dict) -> str:
    """Return the name of a row's clip with its content in place of its path.

    It is the same after the file was moved, renamed or copied. The whole file is read, once in this
    process as long as its size and time stay the same. Empty if it cannot be read.
    """
    name = _content_name(media_file(row))
    return _key(row, name) if name else ""


def size_key(row: dict) -> str:
    """Return the name of a row's clip with its size in place of its path.

    Clips with different size keys have different contents; nothing is read to find out.
    """
    return _key(row, f"size {_size(media_file(row))}")


def _key(row: dict, name: str) -> str:
    part = (row.get("start"), row.get("end"))
    excerpt = "" if part == (None, None) else f"#t={part[0]},{part[1]}"
    return f"{'video' if 'video' in row else 'image'} {name}{excerpt}"


def _content_name(media: str | bytes) -> str:
    """Return a name made of a hash of the content; of a file on the Hub, its address, which states
    a revision. Empty if it cannot be read."""
    if isinstance(media, bytes) or (is_address(media) and archive_of(media) is None):
        return media_name(media)
    return _read_content_name(media, *file_stamp(media))


@lru_cache(2**20)
def _read_content_name(media: str, *stamp: int) -> str:
    """Return the name for `_content_name`; the stamp makes a changed file another argument."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        if is_address(media):
            digest.update(read_address(media))
        elif os.path.isfile(media):  # not a pipe, which may never end
            _hash_file(media, digest)
        else:  # the order of frames is that of their names
            for path in sorted(Path(media).iterdir()):
                digest.update(f"{path.name} {_size(str(path))} ".encode(errors="surrogateescape"))
                if path.is_file():
                    _hash_file(path, digest)
    except (OSError, ValueError):  # ValueError: an address, or a path that cannot exist
        return ""
    return f"content {digest.hexdigest()}"


def _hash_file(path: str | Path, digest: "hashlib.blake2b") -> None:
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)


def _size(media: str | bytes) -> int:
    """Return the bytes of a file, of a member's archive or of a content; for a folder, a hash of
    its files' names and sizes; 0 for a file on the Hub, -1 for a missing one."""
    if isinstance(media, bytes):
        return len(media)
    if is_address(media):
        media = archive_of(media)
        if media is None:
            return 0
    try:
        if not os.path.isdir(media):
            return os.stat(media).st_size
        files = [(path.name, path.stat().st_size) for path in sorted(Path(media).iterdir())]
    except (OSError, ValueError):
        return -1
    return key_number(repr(files))


def key_number(key: str) -> int:
    """Return a signed 64-bit hash of a clip's key, equal on every machine.

    Among ten million clips the chance that two share a number is 3 in a million.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)


def file_stamp(media: str | bytes) -> list[int]:
    """Return two numbers that change when the media change: a file's size in bytes and
    modification time in nanoseconds; for a folder, a hash of its files' names, sizes and times,
    and the latest time; for bytes, their number and 0; for a member of an archive, those of the
    archive; for a file on the Hub, whose address states a revision, zeros. `[-1, -1]` if missing:
    the reader raises later."""
    if isinstance(media, bytes):
        return [len(media), 0]
    if is_address(media):
        media = archive_of(media)
        if media is None:
            return [0, 0]
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
    """Reason why a line or an example is not a valid sample."""


def parse_object(line: bytes) -> dict:
    """Return the JSON object of one line of a JSONL file.

    Raises: `RowError`.
    """
    try:
        row = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise RowError("not valid JSON (nested too deep)") from error
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RowError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but a {type(row).__name__}")
    return row


def parse_line(
    line: bytes, folder: Path, where: tuple[str, int], row_fields: RowFields | None = None
) -> list[dict]:
    """Return the samples of one line of a JSONL file in `folder`.

    Args:
        where: the file's name and the line's number.
    Raises: `RowError`.
    """
    return samples_of(parse_object(line), where, folder, row_fields)


def samples_of(
    row: dict,
    where: tuple[str, int],
    folder: Path | None = None,
    row_fields: RowFields | None = None,
) -> list[dict]:
    """Check a row with one or several targets; return one sample for each target.

    Args:
        where: the row's file or data set, and its number there, the samples' `line`.
        folder: the folder of the row's media files, which must exist; `None` if media are bytes.
        row_fields: the fields of the row; by default an image or a video, and a target.
    Raises: `RowError`.
    """
    expected = row_fields or RowFields()
    known = {*_FIELDS, *expected.roles}
    row = {name: value for name, value in row.items() if name not in known or value is not None}
    if expected.media and ("video" in row) == ("image" in row):
        both = "both video and image are" if "video" in row else "neither video nor image is"
        raise RowError(f"{both} given: give exactly one")
    for name in expected.required:
        if name not in row and name != "target":  # a missing target is checked below
            raise RowError(f"{name} is missing")
    row.setdefault("query", "")
    paths = () if folder is None or not expected.media else ("video", "image")
    for name in (*paths, "query", "previous"):
        if name in row:
            _check_text(name, row[name])
    _check_text("group_id", str(row.get("group_id")))
    _check_times(row)
    row |= _checked_roles(row, expected, folder)
    if "target" in row or "target" in expected.required:
        targets = row["target"] if isinstance(row.get("target"), list) else [row.get("target")]
        if not targets:
            raise RowError("target is empty")
        rows = [{**row, "target": target} for target in targets]
        for each in rows:
            _check_target(each)
            _check_negatives(each)
    else:
        rows = [row]
    if folder is not None and expected.media:
        media = "video" if "video" in row else "image"
        path = existing(row[media], folder, media)
        rows = [{**each, media: path} for each in rows]
    if len(rows) > 1:
        rows = [{"group_id": "{}:{}".format(*where), **each} for each in rows]
    return [{**each, "line": where[1]} for each in rows]


def existing(path: str, folder: Path, name: str) -> str:
    """Return the absolute path of a file, or of a folder of frames; an address unchanged.

    Args:
        name: the field that names it, for messages.
    Raises: `RowError` if it is missing.
    """
    if not is_address(path):
        path = os.path.abspath(folder / path)
    if not (is_file(path) or (name != "image" and os.path.isdir(path))):
        raise RowError(f"{name} file is missing: {path}")
    return path


def _checked_roles(row: dict, expected: RowFields, folder: Path | None) -> dict:
    """Return the fields of a row that have a role, with absolute paths.

    Raises: `RowError` for a value of another kind, and for a missing file.
    """
    checked = {}
    for name, kind in expected.roles.items():
        if name not in row:
            continue
        value = row[name]
        words, is_right = ROLE_KINDS[kind]
        values = value if kind in LIST_KINDS else [value]
        if not isinstance(values, list) or not all(map(is_right, values)):
            raise RowError(f"{name} is not {words} but {value!r:.80}")
        if kind in LIST_KINDS and not values:
            raise RowError(f"{name} is empty")
        if kind in ("text", "texts"):
            for text in values:
                _check_text(name, text)
        if kind in ("media", "media list") and folder is not None:
            paths = [
                media if isinstance(media, bytes) else existing(media, folder, name)
                for media in values
            ]
            value = paths if kind in LIST_KINDS else paths[0]
        checked[name] = value
    return checked


def is_file(path: str) -> bool:
    """Return whether a file, or the archive of a member, exists. A file on the Hub counts."""
    archive = archive_of(path) if is_address(path) else path
    return archive is None or os.path.isfile(archive)


def _check_text(name: str, text: object) -> None:
    try:
        check_text(name, text)
    except ValueError as error:
        raise RowError(str(error)) from error


def _check_target(row: dict) -> None:
    if row["target"] is None:
        raise RowError("target is missing")
    _check_text("target", row["target"])
    if not row["target"].strip():
        raise RowError("target is empty")
    if row["query"].strip().casefold() == row["target"].strip().casefold():
        raise RowError("query equals target: the answer would leak into the input")


def _check_times(row: dict) -> None:
    """Refuse `start` and `end` that are not seconds of a video, in this order."""
    given = [name for name in ("start", "end") if name in row]
    for name in given:
        if not _is_number(row[name]):
            raise RowError(f"{name} is not a number of seconds but {row[name]!r:.40}")
    if given and "image" in row:
        raise RowError(f"{given[0]} is given, but an image has no times")
    if row.get("start", 0) < 0 or row.get("start", 0) >= row.get("end", math.inf):
        raise RowError(
            f"start is {row.get('start', 0)} and end is {row.get('end')}: give 0 <= start < end"
        )


def _check_negatives(row: dict) -> None:
    """Refuse negatives that are not a list of wrong texts."""
    negatives = row.get("negatives", [])
    if not isinstance(negatives, list) or not all(
        isinstance(text, str) and text.strip() for text in negatives
    ):
        raise RowError("negatives is not a list of texts")
    if row["target"] in negatives:
        raise RowError("negatives hold the target itself")
    for text in negatives:
        _check_text("negatives", text)


__all__ = [
    "BLANK",
    "BadRow",
    "Media",
    "RowError",
    "RowFields",
    "bad_rows_report",
    "clip_key",
    "content_key",
    "file_stamp",
    "key_number",
    "media_file",
    "media_name",
    "media_of",
    "parse_line",
    "parse_object",
    "read_rows",
    "samples_of",
    "size_key",
]
