"""Further fields of rows that a mapping of columns fills: their kinds, lists, constants and values;
ids, and names of classes as words."""

import pytest

from processing.columns import ColumnError, Columns, ExampleError, Record, class_words, value_of
from processing.rows import RowFields

EXAMPLE = {
    "image": "1.jpg",
    "qa": [
        {"id": 7, "q": "how many?", "a": "two", "simple": "True", "choices": ["two", "six"]},
        {"id": 8, "q": "which?", "a": "red", "simple": "False", "choices": ["red"]},
    ],
    "captions": ["a", "b"],
    "caption": "c",
    "seconds": "2.5",
    "split": "test",
}
BASE = {"image": "image", "query": "{qa[].q}", "target": "qa[].a"}


def read(kind: str, given: object, example: dict = EXAMPLE) -> list:
    """Return the value of a role in each row."""
    fields = RowFields(roles={"role": kind})
    rows, faults = Columns.from_mapping("set", {**BASE, "role": given}, fields).read(example)
    assert not faults
    return [row.get("role") for row in rows]


@pytest.mark.parametrize(
    ("kind", "given", "values"),
    [
        ("text", "qa[].id", ["7", "8"]),
        ("text", "split", ["test", "test"]),
        ("text", {"text": "normal"}, ["normal", "normal"]),
        ("text", {"text": "{split} {qa[].id}"}, ["test 7", "test 8"]),
        (
            "text",
            {"column": "qa[].simple", "values": {True: "simple", False: "complex"}},
            ["simple", "complex"],
        ),
        ("texts", "qa[].choices", [["two", "six"], ["red"]]),
        ("texts", "captions", [["a", "b"], ["a", "b"]]),
        ("texts", ["caption", "captions"], [["c", "a", "b"], ["c", "a", "b"]]),
        ("texts", "qa[0].choices", [["two", "six"], ["two", "six"]]),
        ("number", "seconds", [2.5, 2.5]),
        ("numbers", "qa[].id", [[7], [8]]),
        ("flag", "qa[].simple", [True, False]),
        ("media", "caption", ["c", "c"]),
        ("media list", "captions", [["a", "b"], ["a", "b"]]),
    ],
)
def test_columns_role_gives_values_of_its_kind(kind, given, values):
    assert read(kind, given) == values


def test_columns_role_of_a_row_without_lists_collects_all_elements():
    fields = RowFields(required=("clips",), roles={"clips": "media list"})
    columns = Columns.from_mapping("set", {"video": "v", "clips": "c[].video"}, fields)
    rows, _ = columns.read({"v": "0.mp4", "c": [{"video": "1.mp4"}, {"video": "2.mp4"}]})
    assert [(row["video"], row["clips"]) for row in rows] == [("0.mp4", ["1.mp4", "2.mp4"])]
    assert "target" not in rows[0]


def test_columns_role_that_is_null_is_left_out():
    assert read("text", "split", EXAMPLE | {"split": None}) == [None, None]


@pytest.mark.parametrize(
    ("kind", "given", "error"),
    [
        ("text", "qa[].choices", "qa\\[\\].choices is a list, not a text"),
        ("number", "split", "split is 'test', not a number"),
        ("flag", "split", "split is 'test', neither true nor false"),
        ("text", {"column": "split", "values": {"train": "x"}}, "'test', and .* only 'train'"),
        ("texts", "nulls", "nulls has a null"),
    ],
)
def test_columns_role_names_a_value_of_another_kind(kind, given, error):
    with pytest.raises(ExampleError, match=error):
        read(kind, given, EXAMPLE | {"nulls": [None]})


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("text", 5),
        ("text", ["split", "caption"]),
        ("texts", []),
        ("number", {"text": "5"}),
        ("texts", {"column": "split", "values": {"test": "x"}}),
        ("text", {"column": "split"}),
    ],
)
def test_columns_role_refuses_another_form(kind, given):
    with pytest.raises(ColumnError, match="set: role is .*; give a path"):
        read(kind, given)


@pytest.mark.parametrize(
    ("mapping", "fields", "error"),
    [
        ({"image": "i"}, RowFields(required=("pair",), roles={"pair": "text"}), "pair is missing"),
        ({"image": "i", "target": "t"}, RowFields(media=False), "leave out image and video"),
        ({"image": "i", "target": "t", "pair": "p"}, RowFields(), "unknown key 'pair'"),
        ({"image": "i", "target": "t", "replace": {"": "x"}}, RowFields(), "replace is"),
    ],
)
def test_columns_checks_the_fields_of_rows(mapping, fields, error):
    with pytest.raises(ColumnError, match=error):
        Columns.from_mapping("set", mapping, fields)


def test_columns_replaces_after_it_removes_and_gives_ids():
    changes = {"remove": ["[", "]"], "replace": {":": " "}, "id": "{qa[].id:03d}"}
    columns = Columns.from_mapping("set", BASE | changes)
    example = {"image": "1.jpg", "qa": [{"id": 7, "q": "what?", "a": "[board]:chopping"}]}
    [row] = columns.read(example)[0]
    assert (row["target"], row["id"]) == ("board chopping", "007")


def test_columns_absent_null_leaves_out_an_object_without_the_key():
    mapping = {"image": "image", "target": "json.human"}
    example = {"image": "1.jpg", "json": Record(model="a")}
    assert Columns.from_mapping("set", mapping | {"absent": [None]}).read(example) == ([], [])
    with pytest.raises(ExampleError, match="json has no column 'human', but 'model'"):
        Columns.from_mapping("set", mapping).read(example)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MakeTea", "make tea"),
        ("ReplaceCDDriveWithSSD", "replace CD drive with SSD"),
        ("MakeRJ45Cable", "make RJ45 cable"),
        ("air_drumming", "air drumming"),
        ("already words", "already words"),
    ],
)
def test_class_words_splits_names_of_classes(name, words):
    assert class_words(name) == words


def test_value_of_refuses_a_path_to_several_values():
    assert value_of(EXAMPLE, "{split}-{qa[0].id}") == "test-7"
    with pytest.raises(ColumnError, match="selects several values"):
        value_of(EXAMPLE, "qa[].id")
