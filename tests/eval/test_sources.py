"""Rows of published data: the three kinds of sources, joins, archives, forms, and errors that name
the cause. Media are a few bytes each, since reading rows opens none."""

import json
import math
import os
from pathlib import Path

import datasets
import pytest

import eval.evaluate
import eval.tables
from eval.benchmarks import load_benchmarks
from eval.evaluate import main
from eval.sources import Source
from eval.tables import MissingDataError, SourceError
from eval.task import Paper
from eval.tasks import TASKS
from processing.columns import ColumnError
from processing.media import open_file
from processing.rows import RowFields
from tests.paper_files import write_csv, write_json, write_tar, write_zip
from tests.shade_model import write_media
from tests.tiny import tiny_model, tiny_processor


def source(folder: Path, row_fields: RowFields | None = None, **keys: object) -> Source:
    return Source.from_mapping("tiny", keys, folder, row_fields)


def touch(folder: Path, *names: str) -> None:
    """Write a file of each name, whose content is its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def content(row: dict) -> str:
    with open_file(row.get("video") or row["image"]) as file:
        return file.read().decode()


def short(rows: list[dict], *more: str) -> list[tuple]:
    """Return the content of each row's medium, its target and further fields."""
    return [(content(row), *(row.get(name) for name in ("target", *more))) for row in rows]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Write the captions of three videos as a CSV file, and two of the videos."""
    table = [("key", "video_id", "sentence"), ("ret0", "v1", "one"), ("ret1", "v2", "two")]
    write_csv(tmp_path / "captions.csv", *table, ("ret2", "v3", "three"))
    touch(tmp_path / "videos", "v1.mp4", "v2.webm")
    return tmp_path


CAPTIONS = {
    "annotations": "captions.csv",
    "media_folder": "videos",
    "columns": {"id": "key", "video": "{video_id}.*", "target": "sentence"},
}


# -- annotation files and a folder of media --------------------------------------------------


def test_source_of_annotations_reads_rows_and_names_a_missing_video(captions):
    rows, [bad] = source(captions, **CAPTIONS).read()
    assert short(rows, "id", "line") == [
        ("v1.mp4", "one", "ret0", 1),
        ("v2.webm", "two", "ret1", 2),
    ]
    assert str(bad) == f"captions.csv:3: video file is missing: {captions}/videos/v3.*"


def test_source_refuses_a_name_that_is_two_files(captions):
    touch(captions / "videos", "v1.mkv")
    _, bad = source(captions, **CAPTIONS).read()
    assert "videos/v1.* is not one file but 2" in str(bad[0])


def test_source_digest_depends_on_the_rows_and_not_on_the_folder(captions, tmp_path_factory):
    first = source(captions, **CAPTIONS)
    rows, _ = first.read()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    os.rename(captions, elsewhere)
    other = source(elsewhere, **CAPTIONS)
    assert other.digest(other.read()[0]) == first.digest(rows)
    assert first.digest(rows[:1]) != first.digest(rows)
    assert first.facts() == {"source": "captions.csv"}


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        (
            "a.json",
            json.dumps({"data": {"val": [{"v": "1.mp4", "t": "a"}]}}),
            {"records": "data.val"},
        ),
        ("a.jsonl", '{"v": "1.mp4", "t": "a"}\n\n', {}),
        ("a.tsv", "v\tt\n1.mp4\ta\n", {}),
        ("a.csv", "1.mp4,a\n", {"header": ["v", "t"]}),
        ("a.txt", "v,t\n1.mp4,a\n", {"form": "csv"}),
    ],
)
def test_source_reads_each_form_of_annotations(tmp_path, name, content, keys):
    (tmp_path / name).write_text(content)
    touch(tmp_path, "1.mp4")
    columns = {"video": "v", "target": "t"}
    rows, bad = source(tmp_path, annotations=name, columns=columns, **keys).read()
    assert short(rows) == [("1.mp4", "a")] and not bad


@pytest.mark.parametrize("cells", ['"a', '"a" b'])
def test_source_of_a_table_names_a_quote_that_is_not_closed(tmp_path, cells):
    (tmp_path / "a.csv").write_text(f"v,t\n1.mp4,{cells}\n2.mp4,b\n")
    with pytest.raises(ColumnError, match="a.csv: after line .* a quote that is not closed"):
        source(tmp_path, annotations="a.csv", columns={"video": "v", "target": "t"}).read()


def test_source_of_an_object_makes_a_row_of_each_segment(tmp_path):
    """COIN's layout: videos by their id, each with segments."""
    step = {"id": "7", "segment": [1.5, 3.0], "label": "cut the rope"}
    videos = {
        "-x": {"subset": "testing", "class": "MakeRJ45Cable", "annotation": [step, step]},
        "y": {"subset": "training", "class": "", "annotation": [step]},
    }
    write_json(tmp_path / "COIN.json", {"database": videos})
    touch(tmp_path, "-x.mp4")
    keys = {"annotations": "COIN.json", "records": "database"}
    where = {"where": {"value.subset": "testing"}}
    segments = {
        "start": "value.annotation[].segment[0]",
        "end": "value.annotation[].segment[1]",
        "target": "value.annotation[].label",
    }
    rows, bad = source(tmp_path, columns={"video": "{key}.mp4", **segments, **where}, **keys).read()
    assert short(rows, "start", "end") == 2 * [("-x.mp4", "cut the rope", 1.5, 3.0)] and not bad
    task = {"video": "{key}.mp4", "target": "value.class", "words": True, **where}
    rows, _ = source(tmp_path, columns=task, **keys).read()
    assert short(rows) == [("-x.mp4", "make RJ45 cable")]


def test_source_of_several_files_has_their_names(tmp_path):
    """SugarCrepe++'s layout: a file of texts for each part."""
    for name in ("swap_att", "replace_obj"):
        write_json(tmp_path / f"{name}.json", [{"caption": f"a {name}", "caption2": "b"}])
    kind = RowFields(
        media=False, required=("target", "positive"), roles={"positive": "text", "part": "text"}
    )
    columns = {"target": "caption", "positive": "caption2", "part": "file"}
    rows, bad = source(tmp_path, kind, annotations="*.json", columns=columns).read()
    assert [(row["target"], row["positive"], row["part"]) for row in rows] == [
        ("a replace_obj", "b", "replace_obj"),
        ("a swap_att", "b", "swap_att"),
    ]
    assert not bad and "image" not in rows[0]


def test_source_of_class_folders_names_a_class_without_a_file(tmp_path):
    tmp_path = tmp_path / "data [1]"  # not a pattern
    touch(tmp_path, "val/n01/a.JPEG", "val/n01/b.JPEG", "val/n02/c.JPEG")
    (tmp_path / "val/n03").mkdir()
    (tmp_path / "classes.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 shark\n")
    synsets = {"annotations": "classes.txt", "form": "keyed lines", "by": "folder", "id": "key"}
    rows, [bad] = source(
        tmp_path,
        files="val/*/*.JPEG",
        join={"synset": synsets},
        columns={"image": "path", "target": "synset.value", "id": "stem"},
    ).read()
    assert short(rows, "id") == [
        ("val/n01/a.JPEG", "tench, Tinca tinca", "a"),
        ("val/n01/b.JPEG", "tench, Tinca tinca", "b"),
        ("val/n02/c.JPEG", "goldfish", "c"),
    ]
    assert "n03" in bad.reason


def test_source_of_state_pairs_collects_candidates(tmp_path):
    """WorldPrediction's layout: states, and four candidate clips in one row."""
    clip = {"segment_uid": "s0", "video": "a.mp4", "segment_start_time": 1, "segment_end_time": 4}
    others = [clip | {"segment_uid": f"s{n}", "video": f"{n}.mp4"} for n in range(4)]
    item = {"states": clip, "candidates": others, "ground_truth": "s2"}
    write_json(tmp_path / "WM.json", {"COIN": {"0": item}, "IKEAASM": {"1": item}})
    touch(tmp_path, "a.mp4", "0.mp4", "1.mp4", "2.mp4", "3.mp4")
    roles = {"clips": "media list", "starts": "numbers", "names": "texts", "answer": "text"}
    made = source(
        tmp_path,
        RowFields(required=("clips", "answer"), roles={**roles, "part": "text"}),
        annotations="WM.json",
        form="groups",
        columns={
            "id": "{group} {key}",
            "video": "value.states.video",
            "start": "value.states.segment_start_time",
            "end": "value.states.segment_end_time",
            "clips": "value.candidates[].video",
            "starts": "value.candidates[].segment_start_time",
            "names": "value.candidates[].segment_uid",
            "answer": "value.ground_truth",
            "part": "group",
        },
    )
    rows, bad = made.read()
    assert not bad and [row["part"] for row in rows] == ["COIN", "IKEAASM"]
    assert rows[0]["clips"] == [str(tmp_path / f"{n}.mp4") for n in range(4)]
    assert (rows[0]["starts"], rows[0]["names"]) == ([1] * 4, ["s0", "s1", "s2", "s3"])
    assert (rows[0]["answer"], rows[0]["start"], rows[0]["end"]) == ("s2", 1.0, 4.0)
    (tmp_path / "3.mp4").unlink()
    with pytest.raises(SourceError, match="2 of 2 are unusable.*clips file is missing: .*/3.mp4"):
        made.read()


# -- forms of one data set -------------------------------------------------------------------

TASKS_PRIMARY = """23521
Make Jello Shots
https://www.wikihow.com/Make-Jello-Shots
2
pour water,stir mixture

16815
Change a Tire
https://www.wikihow.com/Change-a-Tire
1
jack up
"""


def write_crosstask(folder: Path) -> None:
    (folder / "tasks_primary.txt").write_text(TASKS_PRIMARY)
    videos = [
        ("23521", "a", "https://y/a"),
        ("16815", "b", "https://y/b"),
        ("99", "c", "https://y/c"),
    ]
    write_csv(folder / "videos_val.csv", *videos)
    write_csv(folder / "annotations/23521_a.csv", (2, 1.0, 2.5), (1, 3.0, 4.0))


CROSSTASK = {
    "annotations": ["tasks_primary.txt", "videos_val.csv", "annotations"],
    "form": "crosstask",
    "columns": {
        "video": "{video}.mp4",
        "start": "segments[].start",
        "end": "segments[].end",
        "target": "segments[].step",
    },
}


def test_source_of_crosstask_joins_steps_and_tasks(tmp_path):
    write_crosstask(tmp_path)
    touch(tmp_path, "a.mp4")
    rows, [bad] = source(tmp_path, **CROSSTASK).read()
    assert short(rows, "start", "end") == [
        ("a.mp4", "stir mixture", 1.0, 2.5),
        ("a.mp4", "pour water", 3.0, 4.0),
    ]
    assert bad.reason.endswith("annotations/16815_b.csv")


@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("annotations/23521_a.csv", "3,1,2\n", "step '3' is not from 1 to 2.*Make Jello Shots"),
        (
            "tasks_primary.txt",
            TASKS_PRIMARY.replace("\n2\n", "\n3\n"),
            "states 3 steps and lists 2",
        ),
        ("tasks_primary.txt", "23521\nMake\n", "block of '23521' has 2 lines"),
    ],
)
def test_source_of_crosstask_names_what_is_broken(tmp_path, file, text, error):
    write_crosstask(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ColumnError, match=error):
        source(tmp_path, **CROSSTASK).read()


def test_source_of_egoexo4d_keysteps_takes_the_ego_video(tmp_path):
    cameras = {
        "cam01": {"0": {"relative_path": "frame_aligned_videos/cam01.mp4"}},
        "aria02": {"rgb": {"relative_path": "frame_aligned_videos/aria02_214-1.mp4"}},
    }
    take = {"take_name": "t", "root_dir": "takes/t", "frame_aligned_videos": cameras}
    takes = [take | {"take_uid": "u1"}, take | {"take_uid": "u2", "root_dir": "takes/gone"}]
    write_json(tmp_path / "takes.json", takes)
    segment = {"start_time": 1.0, "end_time": 2.0, "step_name": "Cut onion"}
    annotations = {uid: {"segments": [segment]} for uid in ("u1", "u2", "u3")}
    write_json(tmp_path / "annotations/keystep_val.json", {"annotations": annotations})
    touch(tmp_path, "takes/t/frame_aligned_videos/downscaled/448/aria02_214-1.mp4")
    rows, bad = source(
        tmp_path,
        annotations=["annotations/keystep_val.json", "takes.json"],
        form="egoexo4d keysteps",
        columns={"id": "take_uid", "video": "video", "target": "segments[].step_name"},
    ).read()
    ego = "takes/t/frame_aligned_videos/downscaled/448/aria02_214-1.mp4"
    assert short(rows, "id") == [(ego, "Cut onion", "u1")]
    assert "takes/gone/frame_aligned_videos/aria02_214-1.mp4" in bad[0].reason
    assert "has no take 'u3'" in bad[1].reason


# -- rows of the Hub -------------------------------------------------------------------------


def write_hub_rows(folder: Path) -> None:
    """Write a copy of a repository: bytes of videos, one of them twice, and classes."""
    features = datasets.Features(
        {
            "video": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["push", "pull"]),
        }
    )
    videos = [{"bytes": each, "path": "0.mp4"} for each in (b"first", b"second", b"first")]
    table = datasets.Dataset.from_dict({"video": videos, "label": [0, 1, 1]}, features=features)
    (folder / "mteb/set").mkdir(parents=True)
    table.to_parquet(folder / "mteb/set/test.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_source_of_hub_rows_writes_media_once(tmp_path, streaming):
    write_hub_rows(tmp_path)
    columns = {"video": "video", "target": "label"}
    keys = {"dataset": "mteb/set", "revision": "13bb", "streaming": streaming, "columns": columns}
    made = source(tmp_path, **keys)
    rows, bad = made.read()
    assert short(rows) == [("first", "push"), ("second", "pull"), ("first", "pull")] and not bad
    assert rows[0]["video"] == rows[2]["video"] != rows[1]["video"]
    assert sum(path.is_file() for path in (tmp_path / ".media").rglob("*")) == 2
    assert made.facts()["source"] == "mteb/set test"
    assert made.facts()["source_revision"] == "a local copy"


def test_source_of_two_configs_joins_questions_and_images(tmp_path):
    """GQA's layout; a question without its image is left out and named."""
    root = tmp_path / "me/GQA"
    root.mkdir(parents=True)
    questions = {
        "id": ["q1", "q2", "q3"],
        "imageId": ["n1", "n2", "n9"],
        "question": ["a?", "b?", "c?"],
        "answer": ["x", "y", "z"],
    }
    images = {
        "id": ["n2", "n1"],
        "image": [{"bytes": b"two", "path": None}, {"bytes": b"one", "path": None}],
    }
    datasets.Dataset.from_dict(questions).to_parquet(root / "questions.parquet")
    datasets.Dataset.from_dict(images).to_parquet(root / "images.parquet")
    configs = [
        {"config_name": name, "data_files": [{"split": "testdev", "path": f"{name}.parquet"}]}
        for name in ("questions", "images")
    ]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    rows, [bad] = source(
        tmp_path,
        dataset="me/GQA",
        config="questions",
        split="testdev",
        join={"images": {"config": "images", "split": "testdev", "by": "imageId", "id": "id"}},
        columns={"image": "images.image", "query": "{question}", "target": "answer", "id": "id"},
    ).read()
    assert short(rows, "query", "id") == [("one", "x", "a?", "q1"), ("two", "y", "b?", "q2")]
    assert str(bad) == (
        "me/GQA questions testdev:3: me/GQA images testdev has no example whose id is 'n9'"
    )


def test_source_reads_nested_questions_and_several_mappings(tmp_path):
    """TallyQA's layout, and POPEv2's: one example makes two rows."""
    kind = RowFields(roles={"question_type": "text", "pair": "text"})
    qa = [{"q": "how many?", "a": 3, "simple": True}, {"q": "and now?", "a": 0, "simple": False}]
    write_json(tmp_path / "tally.json", [{"image": "1.jpg", "qa": qa}])
    touch(tmp_path, "1.jpg", "2.jpg")
    simple = {"column": "qa[].simple", "values": {True: "simple", False: "complex"}}
    columns = {
        "image": "image",
        "query": "{qa[].q}",
        "target": "qa[].a",
        "numbers": True,
        "question_type": simple,
    }
    rows, _ = source(tmp_path, kind, annotations="tally.json", columns=columns).read()
    assert short(rows, "query", "question_type") == [
        ("1.jpg", "3", "how many?", "simple"),
        ("1.jpg", "0", "and now?", "complex"),
    ]
    write_json(tmp_path / "pairs.json", [{"id": 5, "a": "1.jpg", "b": "2.jpg"}])
    both = [
        {
            "id": "{id}",
            "pair": "{id}",
            "image": name,
            "target": name,
            "question_type": {"text": name},
        }
        for name in ("a", "b")
    ]
    rows, bad = source(tmp_path, kind, annotations="pairs.json", columns=both).read()
    assert short(rows, "question_type", "pair") == [
        ("1.jpg", "1.jpg", "a", "5"),
        ("2.jpg", "2.jpg", "b", "5"),
    ]
    assert not bad


# -- archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["videos.zip", "videos.tar", "videos.tar.gz"])
def test_source_reads_media_of_an_archive(tmp_path, name):
    root = tmp_path / "me/set"
    members = {"videos/a.mp4": b"one", "videos/sub/b.mkv": b"two"}
    (write_zip if name.endswith(".zip") else write_tar)(root / name, members)
    write_json(root / "index.json", [{"v": "a.mp4"}, {"v": "sub/b.*"}, {"v": "c.mp4"}])
    keys = {"dataset": "me/set", "annotations": "index.json", "archives": name}
    rows, [bad] = source(tmp_path, columns={"video": "v", "target": "{v}"}, **keys).read()
    assert short(rows) == [("one", "a.mp4"), ("two", "sub/b.*")]
    assert str(bad) == f"me/set index.json:3: c.mp4 is missing in {name}"


def test_source_refuses_a_name_of_two_members_and_a_broken_archive(tmp_path):
    write_zip(tmp_path / "a.zip", {"x/1.mp4": b"one", "y/1.mp4": b"two"})
    write_json(tmp_path / "index.json", [{"v": "1.mp4"}])
    keys = {"annotations": "index.json", "columns": {"video": "v", "target": "{v}"}}
    with pytest.raises(SourceError, match="1.mp4 names 2 members of a.zip"):
        source(tmp_path, archives="a.zip", **keys).read()
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    with pytest.raises(SourceError, match="b.tar.gz is no zip or tar file, or damaged") as caught:
        source(tmp_path, archives="b.tar.gz", **keys).read()
    assert "\n" not in str(caught.value)


def test_source_of_webdataset_leaves_out_samples_without_the_caption(tmp_path):
    """PE-Video's layout: only the clips of its bench have a caption written by a person."""
    samples = {
        "00/a.MP4": b"one",
        "00/a.JSON": b'{"human_caption": "a cat"}',
        "00/b.mp4": b"two",
        "00/b.json": b'{"model_caption": "a dog"}',
        "00/c.mp4": b"three",
        "00/c.json": b'{"human_caption": null}',
        "00/d.mp4": b"four",
        "00/e.mp4": b"five",
        "00/e.json": b"{",
    }
    write_tar(tmp_path / "facebook/PE-Video/test/0.tar", samples)
    columns = {"video": "mp4", "target": "json.human_caption", "id": "__key__", "absent": [None]}
    rows, [bad] = source(
        tmp_path, dataset="facebook/PE-Video", shards="test/*.tar", columns=columns
    ).read()
    assert short(rows, "id") == [("one", "a cat", "00/a")]
    assert "00/e.json in 0.tar: Expecting property name" in bad.reason


COMMIT = 8 * "12ab3"
COLUMNS = {"video": "v", "target": "t"}


def test_source_downloads_the_files_it_names(tmp_path, monkeypatch):
    asked = []

    def download(name: str, **options: object) -> str:
        [pattern] = options["allow_patterns"]
        asked.append((name, options["repo_type"], options["revision"], pattern))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(eval.tables, "snapshot_download", download)
    write_zip(tmp_path / COMMIT / "video/video.zip", {"a.mp4": b"one"})
    write_json(tmp_path / COMMIT / "metadata.json", [{"v": "a.mp4", "t": "x"}])
    made = source(
        tmp_path / "data",
        dataset="omni/DREAM",
        revision="main",
        annotations="metadata.json",
        archives="video/*.zip",
        columns=COLUMNS,
    )
    made.check_files()
    assert not asked  # nothing is downloaded before the model is loaded
    assert short(made.read()[0]) == [("one", "x")]
    facts = made.facts()
    assert (facts["source_dataset"], facts["source_revision"]) == ("omni/DREAM", COMMIT)
    gone = source(tmp_path, dataset="omni/DREAM", annotations="a.json", columns=COLUMNS)
    with pytest.raises(MissingDataError, match="tiny: omni/DREAM has no file a.json"):
        gone.read()
    metadata, archive = sorted(set(asked[:-1]))
    assert metadata == ("omni/DREAM", "dataset", "main", "metadata.json")
    assert archive == ("omni/DREAM", "dataset", "main", "video/*.zip")


def test_source_of_the_hub_that_cannot_be_read_is_missing_data(tmp_path, monkeypatch):
    """So that an evaluation of all benchmarks can go on without it."""

    def download(name: str, **options: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(eval.tables, "snapshot_download", download)
    columns = {"video": "v", "target": "t"}
    with pytest.raises(MissingDataError, match="tiny: me/set: offline"):
        source(tmp_path, dataset="me/set", annotations="a.json", columns=columns).read()


# -- errors ----------------------------------------------------------------------------------


VIDEO = {"video": "{video_id}.*"}
ROW = {**VIDEO, "target": "sentence"}
AGAIN = {"annotations": "captions.csv", "by": "key", "id": "{key:.3}"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"columns": {"video": "video", "target": "sentence"}},
            "no column 'video', but 'key', 'video_id', 'sentence', 'file'. Did you mean 'video_id'",
        ),
        ({"columns": VIDEO}, "target is missing"),
        ({"columns": {**ROW, "id": "{video_id:.1}"}}, "ids that occur more than once: v. The pool"),
        (
            {"columns": {**ROW, "video": "{video_id}.avi"}},
            "no row can be measured: captions.csv: 3 of 3 are unusable. The first reason: .*v1.avi",
        ),
        (
            {"columns": {**ROW, "where": {"key": "x"}}},
            "`where` or `absent` leaves out all 3 examples. In the first .*, key is 'ret0', 'ret1'",
        ),
        ({"annotations": ["captions.csv", 5]}, "whose elements must be texts"),
        ({"columns": {**ROW, "fps": "x"}}, "unknown key 'fps'"),
        ({"colums": {}}, "source has no key 'colums', but"),
        ({"annotations": 5}, "annotations is 5, must be"),
        ({"form": "parquet"}, "form is 'parquet', must be one of"),
        ({"files": "*.mp4"}, "give one of dataset, .*, found annotations, files"),
        ({"annotations": None}, "give one of dataset, .*, found none"),
        ({"join": {"more": {"annotations": "captions.csv", "by": "key"}}}, "join more needs id"),
        ({"join": {"more": AGAIN | {"id": "key_"}}}, "join more: an example has no column 'key_'"),
        ({"join": {"more": AGAIN | {"by": "key_"}}}, "join more: an example has no column 'key_'"),
        ({"annotations": []}, "annotations is an empty list"),
        ({"columns": []}, "columns is an empty list"),
        ({"header": ["key", "key", "sentence"]}, "captions.csv: the column 'key' occurs twice"),
        (
            {"annotations": "videos", "form": "csv"},
            "videos is a folder, not a file",
        ),
        (
            {"annotations": None, "shards": "captions.csv"},
            "captions.csv is no tar file, or damaged",
        ),
        ({"join": {"more": AGAIN}}, "join more: ids that occur more than once: ret. The pool"),
    ],
)
def test_source_names_what_is_wrong(captions, change, error):
    with pytest.raises((SourceError, ColumnError), match=error):
        source(captions, **CAPTIONS | change).read()


def test_source_without_an_example_or_a_file_is_an_error(captions):
    (captions / "captions.csv").write_text("key,video_id,sentence\n")
    with pytest.raises(SourceError, match="captions.csv: there is no example"):
        source(captions, **CAPTIONS).read()
    (captions / "captions.csv").write_text("key,video_id,sentence\nret0,v1\n")
    with pytest.raises(ColumnError, match="line 2 has 2 cells, but there are 3 columns"):
        source(captions, **CAPTIONS).read()
    (captions / "captions.csv").unlink()
    with pytest.raises(FileNotFoundError, match="captions.csv does not exist"):
        source(captions, **CAPTIONS).check_files()


def test_source_names_a_wrong_column_of_targets_that_may_be_absent(tmp_path):
    write_json(tmp_path / "a.json", [{"v": "1.mp4", "human_caption": "a cat"}])
    columns = {"video": "v", "target": "human_captions", "absent": [None]}
    with pytest.raises(SourceError, match="no column 'human_captions', but 'v', 'human_caption'"):
        source(tmp_path, annotations="a.json", columns=columns).read()


def test_source_refuses_an_object_with_an_id_twice(tmp_path):
    (tmp_path / "COIN.json").write_text('{"database": {"x": {"t": "a"}, "x": {"t": "b"}}}')
    columns = {"video": "{key}.mp4", "target": "value.t"}
    made = source(tmp_path, annotations="COIN.json", records="database", columns=columns)
    with pytest.raises(ColumnError, match="COIN.json is not .*: the key 'x' occurs twice"):
        made.read()


def test_source_refuses_class_indices_of_a_table(tmp_path):
    write_csv(tmp_path / "a.csv", ("v", "label"), ("1.mp4", "3"))
    touch(tmp_path, "1.mp4")
    keys = {"annotations": "a.csv", "columns": {"video": "v", "target": "label"}}
    with pytest.raises(ColumnError, match="every target is a whole number, such as '3'"):
        source(tmp_path, **keys).read()


# -- entries ---------------------------------------------------------------------------------

ENTRY = """
msr_vtt:
  task: retrieval
  description: Captions.
  source:
    annotations: captions.csv
    media_folder: videos
    columns: {id: key, video: "{video_id}.*", target: sentence}
  prompt: detail
  paper: {name: MSR-VTT, metric: R@1, pool: 3, scores: {VL-JEPA: 40}, terms: Ask the authors.}
"""


def entries(folder: Path, text: str = ENTRY, name: str = "a.yaml") -> Path:
    (folder / "entries").mkdir(exist_ok=True)
    (folder / "entries" / name).write_text(text)
    return folder / "entries"


def test_benchmarks_of_a_folder_are_read_together(captions, capsys):
    folder = entries(captions)
    entries(
        captions, ENTRY.replace("msr_vtt:", "other:").replace("captions.csv", "gone.csv"), "b.yaml"
    )
    [benchmark] = load_benchmarks(folder, ["all"], captions)
    assert benchmark.name == "msr_vtt" and benchmark.prompt == "detail"
    assert len(benchmark.load()[0]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("left out, for its data are missing: other: ")
    assert line.endswith("gone.csv does not exist. Ask the authors.")
    with pytest.raises(FileNotFoundError, match="gone.csv does not exist. Ask the authors."):
        load_benchmarks(folder, ["other"], captions)
    entries(captions, name="c.yaml")
    with pytest.raises(ValueError, match="c.yaml: msr_vtt is in another file, too"):
        load_benchmarks(folder, ["all"], captions)


def test_evaluate_measures_what_can_be_read_of_all_benchmarks(captions, monkeypatch, capsys):
    """The pool of three clips has two, and another set is on the Hub only."""

    def download(name: str, **options: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(eval.tables, "snapshot_download", download)
    monkeypatch.setattr(eval.evaluate, "write_report", lambda *results: None)  # draws for a second
    for number, name in enumerate(("v1.mp4", "v2.webm")):
        write_media(captions / "videos" / name, number)
    tiny_model().save_pretrained(captions / "model")
    tiny_processor(num_frames=2).save_pretrained(captions / "model")
    other = ENTRY.replace("msr_vtt:", "other:").replace("source:", "source:\n    dataset: me/set")
    folder = entries(captions, ENTRY + other)
    options = ["--benchmarks", str(folder), "--data", str(captions)]
    main(["--model", str(captions / "model"), "--tasks", "all", *options])
    printed = capsys.readouterr().out
    assert "left out, for its data are missing: other: me/set: offline" in printed
    assert f"captions.csv:3: video file is missing: {captions}" not in printed  # no machine's path
    assert "captions.csv:3: video file is missing: videos/v3.*" in printed
    results = json.loads((captions / "model/eval/results.json").read_text())["benchmarks"]
    assert [each["title"] for each in results.values()] == ["MSR-VTT (2 of 3 clips)"]
    assert (results["msr_vtt"]["pool"], results["msr_vtt"]["pool_expected"]) == (2, 3)
    assert results["msr_vtt"]["protocol"]["source"] == "captions.csv"
    with pytest.raises(MissingDataError, match="other: me/set: offline"):
        main(["--model", str(captions / "model"), "--tasks", "other", *options])


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("prompt: detail", "prompt: details", "prompt is 'details', must be one of"),
        ("prompt: detail", "prompt: detail\n  query: what?", "either query or prompt"),
        ("prompt: detail", "rows: a.jsonl", "either rows or source"),
        ("pool: 3", "pool: many", "paper: pool is 'many', must be int | None"),
        ("pool: 3", "pools: 3", "paper has no pools, but"),
        ("pool: 3, ", "", "pool is missing, and `open` gives no reason"),
        ("metric: R@1, ", "", "paper needs metric"),
        ("{VL-JEPA: 40}", "{VL-JEPA: high}", "paper:  VL-JEPA is 'high', not a number"),
    ],
)  # fmt: skip
def test_benchmark_entry_names_a_wrong_key(captions, old, new, error):
    with pytest.raises(ValueError, match=error.replace("|", r"\|")):
        load_benchmarks(entries(captions, ENTRY.replace(old, new)), ["all"], captions)


def test_benchmark_of_streams_takes_no_source(captions):
    text = ENTRY.replace("task: retrieval", "task: streaming\n  validation_rows: captions.csv")
    with pytest.raises(ValueError, match="msr_vtt: streaming takes no source"):
        load_benchmarks(entries(captions, text), ["all"], captions)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"pool": 0}, "a: paper: pool is 0, must be 1 or more"),
        ({"pool": 1, "scores": {"model": math.nan}}, "a: paper:  model is nan, not a number"),
    ],
)
def test_paper_names_a_number_that_is_impossible(keys, error):
    with pytest.raises(ValueError, match=error):
        Paper.from_mapping("a", {"name": "a", "metric": "b", **keys})


def test_paper_allows_an_unknown_pool_with_a_reason():
    assert Paper(name="a", metric="b", open="No split is stated.").pool is None


@pytest.mark.parametrize("kind", TASKS.values(), ids=lambda kind: kind.name)
def test_kind_has_the_prompt_that_its_class_names(kind):
    """A class attribute without a type would not change the default of the dataclass."""
    [prompt] = [
        each for each in kind.benchmark.__dataclass_fields__.values() if each.name == "prompt"
    ]
    assert prompt.default == kind.benchmark.prompt
