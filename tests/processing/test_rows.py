"""Rows of JSONL files: those that are accepted, and the line and reason of those that are not."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from processing.rows import BadRow, RowFields, bad_rows_report, open_rows, read_rows
from processing.texts import check_text
from tests.tiny import tiny_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "b.png").touch()
    return tmp_path


def write(folder: Path, *lines: dict | str | bytes) -> Path:
    path = folder / "rows.jsonl"
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    encoded = [line.encode() if isinstance(line, str) else line for line in encoded]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_read_rows_returns_good_rows(folder):
    path = write(
        folder,
        b"\xef\xbb\xbf" + b'{"video": "clips/a.mp4", "query": "What?", "target": "caf\xc3\xa9"}',
        "",
        {"image": "b.png", "video": None, "query": None, "target": " t ", "group_id": [3]},
        "  \r",
        {"image": str(folder / "b.png"), "target": "x", "line": 99, "previous": None},
        {"image": "b.png", "target": "\U0001f6b2", "group_id": "\U0001f6b2", "previous": "y"},
    )
    rows, bad = read_rows(path)
    assert bad == []
    video, image = str(folder / "clips" / "a.mp4"), str(folder / "b.png")
    assert rows == [
        {"line": 1, "video": video, "query": "What?", "target": "café"},
        {"line": 3, "image": image, "query": "", "target": " t ", "group_id": [3]},
        {"line": 5, "image": image, "query": "", "target": "x"},
        {
            "line": 6,
            "image": image,
            "query": "",
            "target": "\U0001f6b2",
            "group_id": "\U0001f6b2",
            "previous": "y",
        },
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not valid JSON"),
        (b'{"image": "b.png", "target": "\xff"}', "not UTF-8"),
        ("[1, 2]", "not a JSON object but a list"),
        ({"target": "x"}, "neither video nor image is given"),
        ({"image": "b.png", "video": "clips/a.mp4", "target": "x"}, "both video and image"),
        ({"video": 3, "target": "x"}, "video is not a string but a int"),
        ({"image": ["b.png"], "target": "x"}, "image is not a string but a list"),
        ({"image": "b.png", "query": 1, "target": "x"}, "query is not a string but a int"),
        ({"image": "b.png", "target": {}}, "target is not a string but a dict"),
        ({"image": "gone.png", "target": "x"}, "image file is missing: "),
        ({"image": "clips", "target": "x"}, "image file is missing: "),
        ({"video": "a.mp4", "target": "x"}, "video file is missing: "),
        ({"video": "clips/a.mp4", "target": "x", "end": "2"}, "end is not a number of seconds but"),
        (
            {"video": "clips/a.mp4", "target": "x", "start": True},
            "start is not a number of seconds",
        ),
        (
            b'{"video": "clips/a.mp4", "target": "x", "start": NaN}',
            "start is not a number of seconds",
        ),
        (
            {"video": "clips/a.mp4", "target": "x", "start": 3, "end": 3},
            "start is 3 and end is 3: give 0 <=",
        ),
        ({"video": "clips/a.mp4", "target": "x", "start": -1}, "start is -1 and end is None: give"),
        ({"image": "b.png", "target": "x", "end": 2}, "end is given, but an image has no times"),
        ({"image": "b.png", "target": []}, "target is empty"),
        ({"image": "b.png", "target": ["x", 3]}, "target is not a string but a int"),
        ("[" * 100000, "not valid JSON"),
        (b'{"image": "b.png", "target": "x", "n": %s}' % (b"1" * 5000), "not valid JSON (Exceeds"),
        (
            b'{"video": "clips/a.mp4", "target": "x", "start": %s}' % (b"1" * 400),
            "start is not a number of seconds but 111",
        ),
        # json.dumps writes half a surrogate pair, left by a careless cut, as an escape.
        ({"image": "b.png", "target": "cut \ud83d"}, "target holds half a character, '\\ud83d': "),
        ({"image": "b.png", "target": "x", "query": "\udc00"}, "query holds half a character"),
        ({"image": "\udc00.png", "target": "x"}, "image holds half a character"),
        ({"image": "b.png", "target": "x", "negatives": ["\udc00"]}, "negatives holds half"),
        ({"image": "b.png", "target": "x", "group_id": "\udc00"}, "group_id holds half"),
        ({"image": "b.png", "target": "x", "previous": 3}, "previous is not a string but a int"),
        ({"image": "b.png"}, "target is missing"),
        ({"image": "b.png", "target": None}, "target is missing"),
        ({"image": "b.png", "target": " \n"}, "target is empty"),
        ({"image": "b.png", "target": "x", "negatives": "y"}, "negatives is not a list of texts"),
        ({"image": "b.png", "target": "x", "negatives": ["y", " "]}, "negatives is not a list"),
        ({"image": "b.png", "target": "x", "negatives": ["x"]}, "negatives hold the target"),
        # A query that contains the answer teaches the model to copy text and ignore the pixels.
        ({"image": "b.png", "query": " A Cat", "target": "a cat "}, "query equals target"),
    ],
)
def test_read_rows_names_line_and_reason_of_a_bad_row(folder, line, reason):
    good = {"image": "b.png", "query": "a dog?", "target": "a cat"}
    path = write(folder, good, line, good)
    rows, bad = read_rows(path)
    assert [row["line"] for row in rows] == [1, 3]
    assert [row.line for row in bad] == [2]
    assert str(bad[0]).startswith(f"{path}:2: {reason}")


def test_read_rows_makes_one_sample_per_target_in_one_group(folder):
    """All targets of a row are correct, so none may be a negative of another."""
    path = write(
        folder,
        {"image": "b.png", "target": ["x", "y"]},
        {"image": "b.png", "target": ["x", "z"], "group_id": 5},
        {"video": "clips", "target": ["x"], "start": 0.5, "end": 2},
    )
    rows, bad = read_rows(path)
    assert bad == []
    texts = [(row["target"], row.get("group_id"), row["line"]) for row in rows]
    first = f"{path}:1"
    expected = [("x", first, 1), ("y", first, 1), ("x", 5, 2), ("z", 5, 2), ("x", None, 3)]
    assert texts == expected
    assert (rows[4]["start"], rows[4]["end"]) == (0.5, 2)


def test_read_rows_rejects_files_without_rows(folder):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such JSONL file"):
        read_rows(folder / "none.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl: the file holds no row"):
        read_rows(write(folder, "", "  "))


def test_bad_rows_report_names_rows_and_enforces_the_limit():
    bad = [BadRow("rows.jsonl", line, "target is empty") for line in range(1, 26)]
    report = bad_rows_report(bad, total=100, max_share=0.25)
    assert report.startswith("25 of 100 rows are unusable\n  rows.jsonl:1: target is empty\n")
    assert "rows.jsonl:20:" in report
    assert "rows.jsonl:21:" not in report
    assert report.endswith("... and 5 more")
    cure = r"At most 24% may be unusable \(data.max_bad_share\), and 25% are"
    with pytest.raises(ValueError, match=f"25 of 100 rows(.|\n)*{cure}"):
        bad_rows_report(bad, total=100, max_share=0.24)
    assert bad_rows_report([], total=3, max_share=0.0) == "0 of 3 rows are unusable"


# -- one check of texts --------------------------------------------------------------------

HALF = json.loads(r'"cut \ud83d"')  # valid JSON


@pytest.mark.parametrize("name", ["text", "targets", "contexts"])
def test_processor_names_a_text_with_half_a_character(name):
    """Tokenizers raise a TypeError that names no text."""
    processor = tiny_processor()
    message = r"holds half a character, '\\ud83d': cut texts between characters"
    with pytest.raises(ValueError, match=rf"^{name} {message}"):
        processor(**{name: HALF})
    with pytest.raises(ValueError, match=rf"^{name}\[1\] {message}"):
        processor(**{name: ["whole", HALF]})
    assert len(processor(**{name: ["whole", "\U0001f6b2"]})) == 2  # positive control


@pytest.mark.parametrize("name", ["text", "targets", "contexts"])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([["a", "b"]], r"\[0\] is not a string but a list: give a string"),
        ([("a", "b")], r"\[0\] is not a string but a tuple"),  # a tokenizer encodes a pair
        (["a", None], r"\[1\] is not a string but a NoneType"),
        (["a", 1], r"\[1\] is not a string but a int"),
        (["a", b"b"], r"\[1\] is not a string but a bytes"),
        (float("nan"), " is a float: give a string or a list of strings"),
        (b"a", " is a bytes: give"),
        ({"a": "b"}, " is a dict: give"),
        ({"a", "b"}, " is a set: give"),
        (np.array("a"), " is a single ndarray: give a string"),
    ],
)
def test_processor_names_a_text_of_another_type(name, texts, message):
    with pytest.raises(ValueError, match=f"^{name}{message}"):
        tiny_processor()(**{name: texts})


def test_processor_takes_texts_of_every_iterable_with_an_order():
    expected = tiny_processor()(text=["a", "b"])["input_ids"].tolist()
    for texts in (("a", "b"), np.array(["a", "b"]), (each for each in "ab")):
        assert tiny_processor()(text=texts)["input_ids"].tolist() == expected


def test_check_text_is_the_same_for_rows_and_the_processor(folder):
    with pytest.raises(ValueError, match="query holds half a character") as found:
        check_text("query", HALF)
    path = write(folder, {"image": "b.png", "target": "x", "query": HALF})
    assert str(read_rows(path)[1][0]) == f"{path}:1: {found.value}"
    assert tiny_processor().check_text("question", "a ?") == "a ?"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_read_rows_reads_compressed_files_by_their_content(folder, kind):
    plain = write(folder, {"image": "b.png", "target": "a"}, {"image": "b.png", "target": "b"})
    expected = read_rows(plain)
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](
        plain.read_bytes()
    )
    for name in (f"rows.jsonl.{kind}", "rows"):
        (folder / name).write_bytes(packed)
        assert read_rows(folder / name) == expected
    (folder / "rows").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match="rows: damaged or truncated"):
        read_rows(folder / "rows")
    with pytest.raises(ValueError, match="compressed, so it cannot be read in chunks"):
        open_rows(folder / f"rows.jsonl.{kind}", in_chunks=True)


ROW = '{"image": "b.png", "target": "a"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{ROW}]".encode(), "a JSON array. Write one object per line: jq -c '.\\[\\]'"),
        (f"\n [\n  {ROW},\n  {ROW}\n]\n".encode(), "a JSON array"),
        (b"\xef\xbb\xbf[\n" + ROW.encode() + b"]", "a JSON array"),
        (ROW.encode("utf-16"), "not UTF-8 but UTF-16"),
        (ROW.encode("utf-16-le"), "not UTF-8 but UTF-16"),
        (ROW.encode("utf-32"), "not UTF-8 but UTF-16 or UTF-32"),
        (json.dumps(json.loads(ROW), indent=2).encode(), "an object over several lines"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "packed with Zstandard or ZIP"),
        (b"PK\3\4" + b"rows.jsonl", "packed with Zstandard or ZIP"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_read_rows_names_a_file_of_another_kind_with_the_cure(folder, content, message, packed):
    path = folder / "rows.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"rows.jsonl: {message}"):
        read_rows(path)


def test_read_rows_takes_members_of_archives(folder):
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("b.png", b"")
    member = f"zip://b.png::{folder}/all.zip"
    gone = f"zip://b.png::{folder}/gone.zip"
    rows, bad = read_rows(
        write(folder, {"image": member, "target": "a"}, {"image": gone, "target": "b"})
    )
    assert rows == [{"line": 1, "image": member, "query": "", "target": "a"}]
    assert [str(each) for each in bad] == [f"{folder}/rows.jsonl:2: image file is missing: {gone}"]


ROLES = {
    "kind": "text",
    "names": "texts",
    "seconds": "number",
    "starts": "numbers",
    "is_simple": "flag",
    "other": "media",
    "clips": "media list",
}


def test_read_rows_checks_further_fields_by_their_roles(folder):
    row = {"image": "b.png", "target": "x"}
    good = {
        **{"kind": "a", "names": ["b"], "seconds": 2, "starts": [0.5], "is_simple": False},
        **{"other": "clips", "clips": ["clips/a.mp4", "b.png"]},
    }
    wrong = {
        **{"kind": " ", "names": "b", "seconds": True, "starts": [], "is_simple": 1},
        **{"other": "gone.png", "clips": ["clips/a.mp4", 3]},
    }
    lines = [row | good, *(row | {name: value} for name, value in wrong.items())]
    path = write(folder, *lines, row | {"kind": None, "unknown": 3})
    rows, bad = read_rows(path, RowFields(roles=ROLES))
    clips = [str(folder / "clips" / "a.mp4"), str(folder / "b.png")]
    assert {name: rows[0][name] for name in good} == {
        **good,
        "other": str(folder / "clips"),
        "clips": clips,
    }
    assert "kind" not in rows[1] and rows[1]["unknown"] == 3  # null is a missing field
    assert [each.reason for each in bad] == [
        "kind is not a text but ' '",
        "names is not a list of texts but 'b'",
        "seconds is not a number but True",
        "starts is empty",
        "is_simple is not true or false but 1",
        f"other file is missing: {folder}/gone.png",
        "clips is not a list of files but ['clips/a.mp4', 3]",
    ]


def test_read_rows_of_texts_need_no_clip_and_name_a_missing_field(folder):
    fields = RowFields(media=False, required=("positive",), roles={"positive": "text"})
    path = write(folder, {"positive": "a cat", "filename": "1.jpg"}, {"target": "a dog"})
    rows, bad = read_rows(path, fields)
    assert rows == [{"line": 1, "query": "", "positive": "a cat", "filename": "1.jpg"}]
    assert [each.reason for each in bad] == ["positive is missing"]


def test_row_fields_refuse_an_unknown_kind():
    with pytest.raises(ValueError, match="'word'.* is not among text, texts, number"):
        RowFields(roles={"part": "word"})
