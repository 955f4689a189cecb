"""Tests of column mappings and public sets: rows, errors, groups, converted annotation files."""

import io
import json
import re
import tarfile
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from processing.columns import ColumnError, Columns, ExampleError
from processing.rows import read_rows
from tests.tiny import noise
from training.data.public_sets import (
    convert,
    load_columns,
    main,
    public_set,
    public_sets,
    read_examples,
    table,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
STORED = {"bytes": b"jpeg", "path": "1.jpg"}  # an undecoded column of `datasets`
SAY = "What is the action shown?"
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "On a mat."},
]
QA = [{"user": "How many?", "assistant": "3"}, {"user": "What color?", "assistant": "red"}]
VQA = {
    "question_type": "what",
    "multiple_choice_answer": "red",
    "answers": [
        {"answer": "red", "answer_confidence": "yes", "answer_id": 1},
        {"answer": "dark red", "answer_confidence": "maybe", "answer_id": 2},
        {"answer": "red", "answer_confidence": "yes", "answer_id": 3},
    ],
    "image_id": 9,
    "answer_type": "other",
    "question_id": 9000,
    "question": "What color is it?",
}
NODES = [
    {
        "node_id": "a",
        "parent_id": None,
        "level": 0,
        "start": 0.0,
        "end": 169.5,
        "plm_caption": "a bun is made",
        "plm_action": "make a bun",
        "llama3_caption": None,
        "gpt": {
            "summary": {"brief": "A bun.", "detailed": "A bun from a sock."},
            "action": {"brief": "N/A", "detailed": "Roll the sock.", "actor": "a woman"},
        },
    },
    {
        "node_id": "b",
        "parent_id": "a",
        "level": 1,
        "start": 0.0,
        "end": 2.5,
        "plm_caption": None,
        "plm_action": None,
        "llama3_caption": "a sock",
        "gpt": None,
    },
]
SHARD = {"__key__": "000000000", "__url__": "0.tar", "txt": "a cat", "json": {"url": "x"}}
TIMED = {"v_1": {"duration": 9.0, "timestamps": [[0, 2.5], [2, 9]], "sentences": [" He", " She"]}}

# For each set, an example or an annotation file, and its rows: media, query, target, and start and
# end if they are known.
CASES = {
    "datacomp": (SHARD | {"jpg": b"jpeg"}, [(b"jpeg", "", "a cat")]),
    "cc3m": (SHARD | {"jpg": STORED, "txt": b"a cat"}, [(b"jpeg", "", "a cat")]),
    "cc3m_recaptioned": (
        {"id": "1", "image": STORED, "conversations": TALK, "data_source": "cc3m"},
        [(b"jpeg", "What is it?", "A cat."), (b"jpeg", "Where?", "On a mat.")],
    ),
    "flickr30k": (
        {
            "image": STORED,
            "caption": ["One.", "Two."],
            "sentids": ["0", "1"],
            "split": "train",
            "img_id": "0",
            "filename": "1.jpg",
        },
        [(b"jpeg", "", "One."), (b"jpeg", "", "Two.")],
    ),
    "coco_captions": (
        {
            "images": [{"id": 139, "file_name": "000000000139.jpg"}],
            "annotations": [
                {"image_id": 139, "id": 37, "caption": "A room."},
                {"image_id": 139, "id": 38, "caption": "A clock."},
            ],
        },
        [("000000000139.jpg", "", "A room."), ("000000000139.jpg", "", "A clock.")],
    ),
    "action100m": (
        {"video_uid": "VGz", "metadata": {"title": "Bun"}, "nodes": NODES},
        [
            ("VGz.mp4", "", "Roll the sock.", 0.0, 169.5),
            ("VGz.mp4", "", "A bun.", 0.0, 169.5),
            ("VGz.mp4", "", "A bun from a sock.", 0.0, 169.5),
            ("VGz.mp4", "", "a bun is made", 0.0, 169.5),
        ],
    ),
    "webvid": (
        "videoid,contentUrl,duration,page_dir,name\n"
        "21,http://x/21.mp4,PT00H00M12S,0_9,A cat runs\n",
        [("0_9/21.mp4", "", "A cat runs")],
    ),
    "webvid_shards": (SHARD | {"mp4": b"mpeg"}, [(b"mpeg", "", "a cat")]),
    "msr_vtt": (
        {
            "videos": [{"video_id": "video0", "split": "train", "url": "y"}],
            "sentences": [
                {"caption": "a man runs", "video_id": "video0", "sen_id": 0},
                {"caption": "a man jogs", "video_id": "video0", "sen_id": 1},
            ],
        },
        [("video0.mp4", "", "a man runs"), ("video0.mp4", "", "a man jogs")],
    ),
    "activitynet_captions": (
        TIMED,
        [("v_1.mp4", "", "He", 0.0, 2.5), ("v_1.mp4", "", "She", 2.0, 9.0)],
    ),
    "howto100m": (
        {"iYK": {"start": [1.5, 4.0], "end": [4.0, 6.25], "text": ["take eggs", "and beat"]}},
        [("iYK.mp4", "", "take eggs", 1.5, 4.0), ("iYK.mp4", "", "and beat", 4.0, 6.25)],
    ),
    "egoexo4d": (
        {
            "take_cam_id_map": {},
            "annotations": {
                "uid": [
                    {
                        "descriptions": [
                            {"text": "C takes a pan.", "timestamp": 0.5, "subject": "C"},
                            {"text": "C cuts.", "timestamp": 7.0, "subject": "C"},
                        ]
                    },
                    {"descriptions": [{"text": "C stirs.", "timestamp": 9.0, "subject": "C"}]},
                ]
            },
        },
        [
            ("uid.mp4", "", "C takes a pan.", 0.0, 1.5),
            ("uid.mp4", "", "C cuts.", 6.0, 8.0),
            ("uid.mp4", "", "C stirs.", 8.0, 10.0),
        ],
    ),
    "epic_kitchens_100": (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
        "start_frame,stop_frame,narration,verb\n"
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,01:02:03.37,8,202,open door,open\n",
        [("P01/videos/P01_01.MP4", "", "open door", 0.14, 3723.37)],
    ),
    "kinetics": (
        'label,youtube_id,time_start,time_end,split,is_cc\n"air drumming",_db,40,50,val,0\n',
        [("_db_000040_000050.mp4", SAY, "air drumming")],
    ),
    "something_something_v2": (
        [
            {
                "id": "78687",
                "label": "holding potato next to bottle",
                "template": "Holding [something] next to [something]",
                "placeholders": ["potato", "bottle"],
            }
        ],
        [("78687.webm", SAY, "Holding something next to something")],
    ),
    "vqav2": (
        VQA | {"image": STORED},
        [(b"jpeg", "What color is it?", answer) for answer in ("red", "dark red", "red")],
    ),
    "vqav2_train": (
        VQA,
        [
            ("COCO_train2014_000000000009.jpg", "What color is it?", answer)
            for answer in ("red", "dark red", "red")
        ],
    ),
    "gqa": (
        {
            "05515938": {
                "question": "What is this bird called?",
                "imageId": "2405722",
                "answer": "parrot",
                "fullAnswer": "This is a parrot.",
            }
        },
        [("2405722.jpg", "What is this bird called?", "parrot")],
    ),
    "clevr": (
        {
            "info": {"split": "train"},
            "questions": [
                {
                    "split": "train",
                    "image_filename": "CLEVR_train_000000.png",
                    "image_index": 0,
                    "question": "Are there more cubes?",
                    "answer": "yes",
                    "program": [],
                }
            ],
        },
        [("train/CLEVR_train_000000.png", "Are there more cubes?", "yes")],
    ),
    "tallyqa": (
        [
            {
                "answer": 4,
                "data_source": "imported_genome",
                "image": "VG_100K_2/2410408.jpg",
                "image_id": 92410408,
                "issimple": False,
                "question": "How many headlights does the bus have?",
                "question_id": 30095774,
            }
        ],
        [("VG_100K_2/2410408.jpg", "How many headlights does the bus have?", "4")],
    ),
    "the_cauldron": (
        {"images": [STORED], "texts": [one | {"source": "TallyQA"} for one in QA]},
        [(b"jpeg", "How many?", "3"), (b"jpeg", "What color?", "red")],
    ),
    "finevision": (
        {"images": [STORED], "texts": QA, "source": "tallyqa"},
        [(b"jpeg", "How many?", "3"), (b"jpeg", "What color?", "red")],
    ),
    "plm_images": (
        {"image": "a/1.jpg", "conversations": TALK[:2]},
        [("a/1.jpg", "What is it?", "A cat.")],
    ),
    "plm_videos": (
        {"video": "a/1.mp4", "conversations": TALK[2:]},
        [("a/1.mp4", "Where?", "On a mat.")],
    ),
}


def short(row: dict) -> tuple:
    """Return a row in the form of `CASES`."""
    media = row["video"] if "video" in row else row["image"]
    return (media, row["query"], row["target"], *(row[at] for at in ("start", "end") if at in row))


def examples_of(name: str, content: object, folder: Path) -> list:
    """Return the one example, or those of an annotation file, which is written and read."""
    public = public_set(name)
    if not public.is_annotation_file:
        return [content]
    path = folder / "annotations"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return list(read_examples(path, public))


@pytest.mark.parametrize("name", public_sets())
def test_public_set_gives_its_rows(name, tmp_path):
    content, expected = CASES[name]
    columns = load_columns(name)
    rows = [row for one in examples_of(name, content, tmp_path) for row in columns.read(one)[0]]
    assert [short(row) for row in rows] == expected
    kind = "image" if columns.video is None else "video"
    assert all(kind in row and len({"image", "video"} & row.keys()) == 1 for row in rows)


def without(value: object, column: str) -> object:
    """Return a copy without the columns of that name, at any depth."""
    if isinstance(value, dict):
        return {key: without(one, column) for key, one in value.items() if key != column}
    return [without(one, column) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", public_sets())
def test_public_set_without_a_target_column_names_it(name, tmp_path):
    """A new version of the set may have renamed it."""
    columns = load_columns(name)
    for target in columns.target:
        column = target.split(".")[-1].split("[")[0]
        for example in examples_of(name, CASES[name][0], tmp_path):
            with pytest.raises(ColumnError) as error:
                columns.read(without(example, column))
            assert str(error.value).startswith(f"{name}: ")
            assert f"no column {column!r}, but " in str(error.value)


def test_columns_error_lists_the_found_columns_and_the_nearest():
    columns = Columns.from_mapping("mine", {"image": "image", "target": "texts[].captions"})
    with pytest.raises(ColumnError) as error:
        columns.read({"image": "1.jpg", "texts": [{"caption": "a cat", "lang": "en"}]})
    assert str(error.value) == (
        "mine: texts[] has no column 'captions', but 'caption', 'lang'. Did you mean 'caption'?"
    )


@pytest.mark.parametrize(
    ("mapping", "complaint"),
    [
        (
            {"image": "image", "targets": "caption"},
            "unknown key 'targets'. Did you mean 'target'?",
        ),
        ({"image": "image", "video": "video", "target": "caption"}, "give either image or video"),
        ({"target": "caption"}, "give either image or video"),
        ({"image": "image"}, "target is missing"),
        ({"image": "image", "target": "caption", "query": "{}"}, "'' is not a path"),
        ({"image": "image", "target": "caption", "query": "{question"}, "expected '}'"),
        ({"video": "video", "target": "text", "moment": "t"}, "give both moment and seconds"),
        (
            {"video": "v", "target": "text", "moment": "t", "seconds": 2, "start": "s"},
            "give either start and end, or moment",
        ),
        ({"image": 5, "target": "t"}, "image is 5; give a text"),
        ({"image": ["image"], "target": "t"}, r"image is \['image'\]; give a text"),
        ({"image": "i", "target": 5}, "target is 5; give a text or a list of texts"),
        ({"image": "i", "target": {"x": 1}}, "target is {'x': 1}; give a text or a list"),
        ({"image": "i", "target": "t", "absent": 3}, "absent is 3; give a text or a list of texts"),
        ({"image": "i", "target": "t", "remove": [3]}, r"remove is \[3\]; give a text or a list"),
        ({"image": "i", "target": "t", "query": 5}, "query is 5; give a text"),
        ({"image": "i", "target": "t", "query": None}, "query is None; give a text"),
        ({"image": "i", "target": "t", "negatives": ["t"]}, r"negatives is \['t'\]; give a text"),
        ({"image": "i", "target": "t", "where": "q"}, "where is 'q'; give a mapping of paths"),
        (
            {"image": "i", "target": "t", "where": {1: 2}},
            "where is {1: 2}; give a mapping of paths",
        ),
        ({"image": "i", "target": "t", "numbers": "yes"}, "numbers is 'yes'; give true or false"),
        (
            {"video": "v", "target": "t", "moment": "m", "seconds": "x"},
            "seconds is 'x'; give a number",
        ),
        (
            {"video": "v", "target": "t", "moment": "m", "seconds": -1},
            "seconds is -1; give a number",
        ),
        ({5: "v", "target": "t"}, "unknown key 5"),
        (["image"], r"\['image'\] is not a mapping"),
    ],
)
def test_columns_rejects_an_invalid_mapping(mapping, complaint):
    with pytest.raises(ColumnError, match=f"(?s)^mine: .*{complaint}"):
        Columns.from_mapping("mine", mapping)


def test_load_columns_names_an_unknown_set_and_the_nearest():
    with pytest.raises(ColumnError, match="no public set 'flickr30'. Did you mean 'flickr30k'?"):
        load_columns("flickr30")


NAMED = {
    "image": "1.png",
    "answer.text": "exact",
    "answer": {"text": "path", "more": {"deep.name": ["a", "b"]}},
    "a[0]": "name with brackets",
    "a": ["first", "second"],
    "tags[]": "no list",
    "Size [px]": "40",
    "dot.": "dot at the end",
    "[odd": "open bracket",
    "x{y}": "braces",
    "q: what?": "colon",
}


@pytest.mark.parametrize(
    ("target", "texts"),
    [
        ("answer.text", ["exact"]),  # the exact name wins over the path
        ("a[0]", ["name with brackets"]),
        ("a[1]", ["second"]),
        ("a[]", ["first", "second"]),
        ("answer.more.deep.name[1]", ["b"]),
        ("answer.more.deep.name[]", ["a", "b"]),
        ("tags[]", ["no list"]),
        ("Size [px]", ["40"]),
        ("dot.", ["dot at the end"]),
        ("[odd", ["open bracket"]),
        ("x{y}", ["braces"]),
        ("q: what?", ["colon"]),
        ("{answer.text}, {a[0]}, {a[1]}", ["exact, name with brackets, second"]),
        ("{q: what?} {Size [px]:04d}", ["colon 0040"]),
        ("{{{answer.text}}}", ["{exact}"]),
    ],
)
def test_columns_finds_names_that_hold_the_path_syntax(target, texts):
    columns = Columns.from_mapping("mine", {"image": "image", "target": target})
    rows, faults = columns.read(NAMED)
    assert ([row["target"] for row in rows], faults) == (texts, [])


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("answer[x]", r"'answer\[x\]': \[x\] is not one of \[\], \[0\]"),
        ("answer..text", "'.text' is not a path"),
        ("a[]b", r"'a\[\]b' is not a path"),
        ("dot.b", "no column 'dot', but .* Did you mean 'dot.'"),
        ("answer.txt.more", "answer has no column 'txt', but 'text', 'more'. Did you mean 'text'"),
    ],
)
def test_columns_names_a_path_that_fits_no_column(target, complaint):
    columns = Columns.from_mapping("mine", {"image": "image", "target": target})
    with pytest.raises(ColumnError, match=f"^mine: .*{complaint}"):
        columns.read(NAMED)


# -- groups ----------------------------------------------------------------------------------


def groups(columns: Columns, *examples: dict) -> list[str]:
    return [row["group_id"] for example in examples for row in columns.read(example)[0]]


def test_group_id_is_shared_by_captions_of_an_image_and_not_by_questions_about_it():
    captions = groups(load_columns("flickr30k"), CASES["flickr30k"][0])
    assert len(captions) == 2
    assert len(set(captions)) == 1
    answers = groups(load_columns("vqav2"), VQA | {"image": STORED})
    other = groups(load_columns("vqav2"), VQA | {"image": STORED, "question": "What is it?"})
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert set(answers).isdisjoint(other)
    assert len(set(groups(load_columns("the_cauldron"), CASES["the_cauldron"][0]))) == 2


def test_group_id_spans_examples_and_separates_clips_times_and_sets(tmp_path):
    coco = load_columns("coco_captions")
    same = groups(coco, *examples_of("coco_captions", CASES["coco_captions"][0], tmp_path))
    assert len(same) == 2
    assert len(set(same)) == 1
    # Two clips of one video, and two texts about the first of them.
    times = groups(load_columns("howto100m"), {"key": "v", "value": CASES["howto100m"][0]["iYK"]})
    assert len(set(times)) == 2
    assert len(set(groups(load_columns("action100m"), CASES["action100m"][0]))) == 1
    # The same key in two shards with different images, and the same bytes in two sets.
    datacomp = load_columns("datacomp")
    first, second = SHARD | {"jpg": b"one"}, SHARD | {"jpg": b"two"}
    assert len(set(groups(datacomp, first, second))) == 2
    assert groups(datacomp, first) != groups(load_columns("cc3m"), first)


# -- odd examples ----------------------------------------------------------------------------


def test_columns_where_selects_examples():
    flickr, example = load_columns("flickr30k"), CASES["flickr30k"][0]
    assert len(flickr.read(example)[0]) == 2
    assert flickr.read(example | {"split": "test"})[0] == []
    mapping = {"image": "image", "target": "caption[]", "where": {"split": ["train", "val"]}}
    mine = Columns.from_mapping("mine", mapping)
    counts = [len(mine.read(example | {"split": s})[0]) for s in ("train", "val", "test")]
    assert counts == [2, 2, 0]


def test_columns_nested_lists_keep_answers_with_their_question():
    mapping = {"image": "image", "query": "{qa[].q}", "target": "qa[].answers[]"}
    example = {
        "image": "1.jpg",
        "qa": [{"q": "a?", "answers": ["1", "2"]}, {"q": "b?", "answers": []}, {"q": "c?"}],
    }
    example["qa"][2]["answers"] = ["3"]
    rows = Columns.from_mapping("mine", mapping).read(example)[0]
    assert [short(row)[1:] for row in rows] == [("a?", "1"), ("a?", "2"), ("c?", "3")]


def test_columns_reads_negatives_and_columns_that_are_json_texts():
    mapping = {"video": "v", "target": "meta.answer", "negatives": "meta.wrong"}
    example = {"v": "1.mp4", "meta": json.dumps({"answer": "left", "wrong": ["right", "up"]})}
    (row,) = Columns.from_mapping("mine", mapping).read(example)[0]
    assert (row["target"], row["negatives"]) == ("left", ["right", "up"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": None}, "image is empty"),
        ({"image": {"bytes": None, "path": None}}, "image is empty"),
        ({"image": Image.new("RGB", (2, 2))}, "image is a Image, neither.*decode=False"),
        ({"texts": "a cat"}, "texts is a str, not a list"),
        ({"texts": ["a cat"]}, r"texts\[\] is a text but not JSON"),
        ({"texts": [{"user": "?", "assistant": b"\xff"}]}, "not UTF-8"),
        ({"texts": [{"user": "?", "assistant": 3}]}, "the number 3, not a text.*numbers: true"),
        ({"texts": [{"user": "?", "assistant": True}]}, "is a bool, not a text"),
        ({"texts": [{"user": None, "assistant": "!"}]}, "query .* is null"),
    ],
)
def test_columns_broken_example_raises_example_error(change, complaint):
    mapping = {"image": "image", "query": "{texts[].user}", "target": "texts[].assistant"}
    good = {"image": STORED, "texts": QA}
    columns = Columns.from_mapping("mine", mapping)
    assert len(columns.read(good)[0]) == 2
    with pytest.raises(ExampleError, match=f"(?s)^mine: .*{complaint}"):
        columns.read(good | change)


def test_columns_rejects_lists_of_unequal_lengths():
    example = {"key": "v", "value": {"start": [1, 2, 3], "end": [2, 3, 4], "text": ["a", "b"]}}
    with pytest.raises(ExampleError, match="value.start.* has 3 values and value.text.* has 2"):
        load_columns("howto100m").read(example)
    with pytest.raises(ExampleError, match="images has 2 elements, exactly one"):
        load_columns("the_cauldron").read({"images": [STORED, STORED], "texts": QA})


@pytest.mark.parametrize(
    ("value", "texts", "faults"),
    [
        (None, [], ["t is null"]),
        (float("nan"), [], ["t is null"]),  # a gap in a column of numbers
        ([], [], ["t is null"]),
        (["a", None, "b"], ["a", "b"], ["t is null"]),
        ("None", ["None"], []),
        ("N/A", [], []),  # `absent`
    ],
)
def test_columns_counts_a_null_and_keeps_a_text(value, texts, faults):
    mapping = {"image": "i", "target": "t", "absent": "N/A"}
    rows, found = Columns.from_mapping("mine", mapping).read({"i": "1.png", "t": value})
    assert [row["target"] for row in rows] == texts
    assert found == [f"mine: {fault}" for fault in faults]
    assert len({row["group_id"] for row in rows}) <= 1
    allowed = Columns.from_mapping("mine", mapping | {"absent": ["N/A", None]})
    assert allowed.read({"i": "1.png", "t": value}) == (rows, [])


@pytest.mark.parametrize("answers", [None, []])
def test_columns_counts_an_example_without_an_element(answers):
    mapping = {"image": "i", "query": "{qa[].q}", "target": "qa[].a", "where": {"split": "train"}}
    columns = Columns.from_mapping("mine", mapping)
    example = {"i": "1.png", "qa": answers, "split": "train"}
    assert columns.read(example) == ([], ["mine: qa[].a has no element"])
    # Excluded: neither a row nor a fault, though its image is null too.
    assert columns.read(example | {"i": None, "split": "test"}) == ([], [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3"), (np.float32(3), "3"), (np.int64(3), "3"), (Decimal("3.00"), "3")],
)
def test_columns_reads_a_whole_number_if_the_mapping_allows_it(value, text):
    """pandas makes floats of a column of whole numbers with a gap."""
    mapping = {"image": "{n:03d}.png", "query": "is it {n} ?", "target": "n"}
    ((row,), _) = Columns.from_mapping("mine", mapping | {"numbers": True}).read({"n": value})
    assert short(row) == ("003.png", "is it 3 ?", text)
    with pytest.raises(ExampleError, match="n is the number 3, not a text.*numbers: true"):
        Columns.from_mapping("mine", mapping).read({"n": value})
    for broken in (3.5, float("inf"), True):
        with pytest.raises(ExampleError, match="n is "):
            Columns.from_mapping("mine", mapping | {"numbers": True}).read({"n": broken})


def test_columns_reads_a_json_list_and_names_a_key_that_one_object_lacks():
    mapping = {"image": "i", "target": "meta.answers[]"}
    columns = Columns.from_mapping("mine", mapping)
    rows, _ = columns.read({"i": "1.png", "meta": '{"answers": ["a", "b"]}'})
    assert [row["target"] for row in rows] == ["a", "b"]
    rows, _ = columns.read({"i": "1.png", "meta": {"answers": '["a", "b"]'}})
    assert [row["target"] for row in rows] == ["a", "b"]
    with pytest.raises(ExampleError, match="meta has no column 'answers', but 'answer'. Did you"):
        columns.read({"i": "1.png", "meta": '{"answer": "a"}'})
    with pytest.raises(ExampleError, match="meta is a text but not JSON"):
        columns.read({"i": "1.png", "meta": "[" * 100_000})


@pytest.mark.parametrize(
    ("given", "wanted", "kept"),
    [
        ("1", 1, True),
        ("1.0", [2, 1], True),
        ("true", True, True),
        ("x", 1, False),
        ("1", "1", True),
    ],
)
def test_columns_where_compares_texts_of_a_table_with_numbers(given, wanted, kept):
    mapping = {"image": "i", "target": "t", "where": {"w": wanted}}
    rows, _ = Columns.from_mapping("mine", mapping).read({"i": "1.png", "t": "a", "w": given})
    assert len(rows) == kept


@pytest.mark.parametrize(
    ("given", "seconds"), [(2, 2.0), ("2.5", 2.5), ("01:02", 62.0), ("1:00:00.25", 3600.25)]
)
def test_columns_reads_times_as_seconds(given, seconds):
    columns = Columns.from_mapping("mine", {"video": "v", "target": "t", "start": "s"})
    (row,) = columns.read({"v": "1.mp4", "t": "x", "s": given})[0]
    assert row["start"] == seconds
    for unknown in (None, float("nan"), "NA", ""):
        assert "start" not in columns.read({"v": "1.mp4", "t": "x", "s": unknown})[0][0]
    with pytest.raises(ExampleError, match="not a time"):
        columns.read({"v": "1.mp4", "t": "x", "s": "soon"})


# -- examples read by `datasets` ----------------------------------------------------------------


def stored(images: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    return images.cast_column(column, datasets.Image(decode=False))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_reads_parquet_examples(streaming, tmp_path):
    """Arrow returns nested lists, null structs and undecoded images."""
    picture = Image.fromarray(noise(8, 8, 3))
    flickr = datasets.Dataset.from_list(
        [CASES["flickr30k"][0] | {"image": picture}], features=None
    ).cast_column("image", datasets.Image())
    flickr.to_parquet(tmp_path / "flickr.parquet")
    datasets.Dataset.from_list([CASES["action100m"][0]]).to_parquet(tmp_path / "action.parquet")

    def read(name: str) -> datasets.Dataset:
        path = str(tmp_path / f"{name}.parquet")
        options = {"split": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
        return datasets.load_dataset("parquet", data_files=path, **options)

    (example,) = stored(read("flickr"), "image")
    rows = load_columns("flickr30k").read(example)[0]
    assert [row["target"] for row in rows] == ["One.", "Two."]
    assert Image.open(io.BytesIO(rows[0]["image"])).size == (8, 8)
    (example,) = read("action")
    rows, faults = load_columns("action100m").read(example)
    assert [short(row) for row in rows] == CASES["action100m"][1]
    assert faults == []


def test_columns_reads_webdataset_examples(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(picture, "JPEG")
    members = {"jpg": picture.getvalue(), "txt": b"a cat", "json": b'{"url": "x"}'}
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"000000000.{suffix}")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    options = {"split": "train", "streaming": True, "cache_dir": str(tmp_path / "cache")}
    shards = datasets.load_dataset("webdataset", data_files=str(tmp_path / "0.tar"), **options)
    (example,) = stored(shards, "jpg")
    (row,) = load_columns("cc3m").read(example)[0]
    assert short(row) == (picture.getvalue(), "", "a cat")


# -- annotation files to JSONL ------------------------------------------------------------------


def test_public_sets_command_converts_annotations_to_readable_rows(tmp_path, capsys):
    content, _ = CASES["coco_captions"]
    broken = {"image_id": "x", "id": 1, "caption": "A dog."}
    empty = {"image_id": 139, "id": 2, "caption": None}
    content = content | {"annotations": [*content["annotations"], broken, empty]}
    annotations = tmp_path / "captions.json"
    annotations.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "train2017").mkdir()
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "train2017" / "000000000139.jpg")
    output = tmp_path / "rows" / "train.jsonl"
    media = str(tmp_path / "train2017")
    main(["coco_captions", str(annotations), "--media", media, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "2 rows from 4 examples; 2 of these gave no row; 2 of 4 rows are unusable" in printed
    assert "captions.json:4: coco_captions: caption is null" in printed
    assert "captions.json:3: coco_captions: image_id is 'x'" in printed
    rows, bad = read_rows(output)
    assert [row["target"] for row in rows] == ["A room.", "A clock."]
    assert rows[0]["group_id"] == rows[1]["group_id"]
    assert bad == []


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "coco_captions",
            '{"info": {}, "annotation": []}',
            "no 'annotations', but info, annotation",
        ),
        ("coco_captions", "{", "is not a JSON file"),
        (
            "kinetics",
            f'label,youtube_id,time_start,time_end\na,b,1,2\n"{"x" * 200_000}',
            "kinetics: .*: after line 2: field larger .*quote that",
        ),
        ("flickr30k", "{}", "flickr30k has no annotation file"),
    ],
    ids=["records", "json", "csv", "none"],
)
def test_convert_rejects_an_unreadable_annotation_file(name, content, complaint, tmp_path):
    annotations = tmp_path / "annotations"
    annotations.write_text(content, encoding="utf-8")
    with pytest.raises(ColumnError, match=complaint):
        convert(public_set(name), annotations, tmp_path, tmp_path / "rows.jsonl")


def test_docs_data_has_the_table_of_public_sets():
    assert table() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("public", public_sets().values(), ids=public_sets())
def test_public_set_states_its_content_and_a_page_with_its_columns(public):
    assert public.seen.startswith("https://")
    assert public.about


def test_docs_data_sources_have_columns():
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    recipes = [recipe for recipe in map(yaml.safe_load, blocks) if "data" in recipe]
    sources = [source for recipe in recipes for source in recipe["data"]["sources"]]
    hubs = {public.hub for public in public_sets().values()}
    named = [source for source in sources if "dataset" in source]
    assert len(named) == 5
    for source in named:
        assert source["dataset"] in hubs or load_columns(source["columns"]).target
