"""Tests of mixtures with streamed sources: their sequence, their rows, and bad rows."""

import gzip
import io
import json
import pickle
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from processing.rows import BadRow
from tests.tiny import tiny_processor, write_rows
from training.arguments import DataArguments, RecipeError, SourceArguments
from training.data.collator import ContrastiveCollator
from training.data.dataset import ContrastiveDataset, build_dataset
from training.data.lanes import JSONLBlocks
from training.data.mixture import EPOCH_STRIDE, MixtureSampler
from training.data.sources import read_source
from training.loop.trainer import collate

SHARDS = 4
WDS_COLUMNS = {"image": "jpg", "target": "txt"}


def picture(number: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images as JSONL files, WebDataset shards and parquet files."""
    folder = tmp_path_factory.mktemp("sources")
    rows = []
    for number in range(60):
        (folder / f"{number}.png").write_bytes(picture(number))
        rows.append({"image": f"{number}.png", "query": "what ?", "target": f"number {number}"})
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "part1.jsonl", rows[:25])
    write_rows(folder / "part2.jsonl", rows[25:])
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, 60, SHARDS):
                for kind, content in (
                    ("jpg", picture(number, "JPEG")),
                    ("txt", f"number {number}".encode()),
                ):
                    member = tarfile.TarInfo(f"{number:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        numbers = range(shard, 60, SHARDS)
        table = {
            "picture": [{"bytes": picture(number), "path": None} for number in numbers],
            "texts": [[f"number {number}", f"nr. {number}"] for number in numbers],
        }
        pq.write_table(pa.table(table), folder / f"{shard}.parquet")
    return folder


def in_memory(folder: Path, **changes) -> SourceArguments:
    return SourceArguments(rows=str(folder / "rows.jsonl"), **changes)


def streamed(folder: Path, **changes) -> SourceArguments:
    keys = {"rows": str(folder / "part*.jsonl"), "shuffle_rows": 16, **changes}
    return SourceArguments(streaming=True, **keys)


def webdataset(folder: Path, **changes) -> SourceArguments:
    keys = {"data_files": str(folder / "*.tar"), "columns": WDS_COLUMNS, "shuffle_rows": 16}
    return SourceArguments(dataset="webdataset", **{"streaming": True, **keys, **changes})


def parquet(folder: Path, streaming: bool = True, **changes) -> SourceArguments:
    columns = {"image": "picture", "target": "texts[]"}
    keys = {"data_files": str(folder / "*.parquet"), "columns": columns, "shuffle_rows": 16}
    return SourceArguments(dataset="parquet", streaming=streaming, **{**keys, **changes})


KINDS = {
    "in memory": [in_memory],
    "streamed": [streamed],
    "webdataset": [webdataset],
    "parquet": [parquet],
    "all of them": [in_memory, streamed, webdataset, parquet],
}


def build(folder: Path, kinds: list, decode_once: bool = False) -> ContrastiveDataset:
    arguments = [kind(folder) for kind in kinds]
    options = DataArguments(
        sources=arguments,
        decode_once=decode_once,
        cache_dir=str(folder / "cache"),
        num_workers=1,
        max_bad_share=0.5,
    )
    video_processor = tiny_processor().video_processor
    return build_dataset([read_source(each) for each in arguments], video_processor, options)


def sampler(dataset: ContrastiveDataset, steps: int = 12, **changes) -> MixtureSampler:
    options = {"batch_size": 8, "num_batches": steps, "seed": 1, "lanes": 4, **changes}
    return MixtureSampler(dataset.buckets, **options)


def text_of(dataset: ContrastiveDataset, row: int | dict) -> str:
    return (dataset.rows[row % EPOCH_STRIDE] if isinstance(row, int) else row)["target"]


def texts_of(dataset: ContrastiveDataset, *samplers: MixtureSampler) -> list[list[str]]:
    """Return the sorted texts of every global batch, of all processes together."""
    return [
        sorted(text_of(dataset, row) for step in steps for lane in step.rows for row in lane)
        for steps in zip(*samplers, strict=True)
        if steps[0] is not None
    ]


# -- the sequence --------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_mixture_has_the_same_batches_on_any_number_of_processes(folder, kinds):
    dataset = build(folder, kinds)
    one = texts_of(dataset, sampler(dataset))
    assert len(one) == 12 and {len(batch) for batch in one} == {8}
    for world_size in (2, 4):
        ranks = [sampler(dataset, rank=r, world_size=world_size) for r in range(world_size)]
        assert texts_of(dataset, *ranks) == one
    assert texts_of(dataset, sampler(dataset, seed=2)) != one  # positive control


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_mixture_resumes_with_the_same_batches(folder, kinds, parts):
    """The resumed run has another number of processes, and its positions were stored as JSON."""
    dataset = build(folder, kinds)
    whole = sampler(dataset, parts=parts)
    one = texts_of(dataset, whole)
    for done in (1, 5, 11):
        before = [sampler(dataset, rank=rank, world_size=2, parts=parts) for rank in (0, 1)]
        for each in before:
            list(each)  # a DataLoader asks for steps ahead of the one that trains
        stored = [json.loads(json.dumps(each.position(done))) for each in before]
        lanes = [
            {int(b): {int(n): at for n, at in found.items()} for b, found in each.items()}
            for each in stored
        ]
        positions = {bucket: lanes[0][bucket] | lanes[1][bucket] for bucket in lanes[0]}
        resumed = sampler(dataset, start=done, positions=positions, parts=parts)
        assert list(resumed)[: done * parts] == [None] * done * parts
        assert texts_of(dataset, resumed) == one[done * parts :]


def test_mixture_forget_drops_earlier_positions(folder):
    dataset = build(folder, [streamed])
    mixture = sampler(dataset)
    list(mixture)
    mixture.forget(7)
    assert sorted(mixture.positions) == list(range(7, 13))


@pytest.mark.parametrize("kinds", [KINDS["all of them"]])
def test_mixture_has_the_same_batches_with_any_number_of_workers(folder, kinds):
    dataset = build(folder, kinds)
    collator = partial(collate, ContrastiveCollator(tiny_processor()))
    runs = [
        list(
            DataLoader(
                dataset,
                batch_sampler=sampler(dataset, rank=1, world_size=2),
                collate_fn=collator,
                num_workers=workers,
                generator=torch.Generator(),
            )
        )
        for workers in (0, 1, 3)
    ]
    assert len(runs[0]) == 12
    for others in runs[1:]:
        for batch, other in zip(runs[0], others, strict=True):
            assert batch.keys() == other.keys()
            for name, value in batch.items():
                if name == "frames":  # resized in other processes: one grey level apart at most
                    found = other[name].int()
                    torch.testing.assert_close(found, value.int(), rtol=0, atol=1)
                elif isinstance(value, torch.Tensor):
                    assert torch.equal(value, other[name]), name
                else:
                    assert value == other[name], name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lanes": 4, "world_size": 3}, "4 lanes must divide the 8 rows of a batch, and 3 process"),
        ({"lanes": 3}, "3 lanes must divide the 8 rows"),
    ],
)
def test_mixture_rejects_lanes_that_do_not_divide(folder, changes, reason):
    with pytest.raises(RecipeError, match=f"data.lanes: {reason}"):
        sampler(build(folder, [streamed]), **changes)


# -- every row, once an epoch --------------------------------------------------------------


@pytest.mark.parametrize("kind", [streamed, webdataset, parquet])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_blocks_of_all_lanes_have_every_row_of_an_epoch(folder, kind, lanes):
    source = read_source(kind(folder))
    found = Counter()
    for number in range(lanes):
        blocks = source.blocks(number, lanes, seed=3)
        while blocks.epoch == 0:
            rows, bad = blocks.read()
            assert bad == []
            found.update(row["target"] for row in rows)
    texts = [f"number {number}" for number in range(60)]
    if kind is parquet:
        texts += [f"nr. {number}" for number in range(60)]
    if kind is streamed:  # its blocks reach into the next epoch
        assert set(found) == set(texts) and max(found.values()) - min(found.values()) <= 1
    else:
        assert found == Counter(texts)


def test_jsonl_blocks_read_each_line_in_the_chunk_in_which_it_begins(tmp_path):
    """Lines of different lengths and line ends, at the start and the end of files."""
    texts = [f"text {'x' * length}" for length in (0, 300, 1, 2, 80, 5, 40, 600, 3, 3, 3)]
    for number in range(len(texts)):
        (tmp_path / f"{number}.png").touch()
    lines = [
        json.dumps({"image": f"{number}.png", "target": text}).encode()
        for number, text in enumerate(texts)
    ]
    (tmp_path / "1.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(lines[:5])
    )  # no newline at the end
    (tmp_path / "2.jsonl").write_bytes(b"\n\n" + b"\n".join(lines[5:]) + b"\n \n")
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for size in (1, 2, 7, 50, 100, 450, 10_000):
        blocks = JSONLBlocks(paths, lane=0, lanes=1, rows=8, seed=0)
        blocks.size = size
        chunks = -(-sum(path.stat().st_size for path in paths) // size)
        found = [
            json.loads(line.removeprefix(b"\xef\xbb\xbf"))["target"]
            for chunk in range(chunks)
            for _, _, line in blocks.lines(chunk * size, (chunk + 1) * size)
            if line.strip()
        ]
        assert found == texts


@pytest.mark.parametrize("kind", [streamed, webdataset, parquet])
def test_streamed_source_some_rows_has_each_row_once(folder, kind):
    texts = Counter(f"number {number}" for number in range(60))
    if kind is parquet:
        texts += Counter(f"nr. {number}" for number in range(60))
    for shuffle_rows in (16, 10_000):
        source = read_source(kind(folder, shuffle_rows=shuffle_rows))
        assert Counter(row["target"] for row in source.some_rows()) == texts
        assert source.some_rows(5) == source.some_rows()[:5]


def test_streamed_source_skips_empty_files(folder, tmp_path):
    rows = [{"image": str(folder / f"{number}.png"), "target": str(number)} for number in range(6)]
    for number, part in enumerate(([], rows[:4], [], rows[4:], [])):
        write_rows(tmp_path / f"{number}.jsonl", part)
    source = read_source(SourceArguments(rows=str(tmp_path / "*.jsonl"), streaming=True))
    assert sorted(row["target"] for row in source.some_rows()) == list("012345")


@pytest.mark.parametrize("kind", [streamed, webdataset, parquet])
def test_lane_shuffles_each_epoch_in_another_order(folder, kind):
    source = read_source(kind(folder, shuffle_rows=10))
    lane = source.lane(0, 1, seed=0)
    rows = 120 if kind is parquet else 60
    first, second = ([row["target"] for row in lane.take(rows)] for _ in range(2))
    assert first != second
    assert sorted(set(first + second)) == sorted({row["target"] for row in source.some_rows()})


@pytest.mark.parametrize(("kind", "rows"), [(webdataset, 15), (parquet, 30)])
def test_lane_reads_its_own_shards_if_there_are_enough(folder, kind, rows):
    source = read_source(kind(folder))
    for lane in range(SHARDS):
        taken = source.lane(lane, SHARDS, seed=0).take(rows)
        numbers = {int(row["target"].split()[-1]) for row in taken}
        assert len(numbers) == 15 and len({number % SHARDS for number in numbers}) == 1


# -- rows of a dataset -----------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_maps_examples_and_groups_captions_of_an_image(folder, streaming):
    source = read_source(parquet(folder, streaming=streaming, query="describe"))
    rows = source.some_rows()
    assert len(rows) == 120 and {row["query"] for row in rows} == {"describe"}
    groups = Counter(row["group_id"] for row in rows)
    assert len(groups) == 60 and set(groups.values()) == {2}


def test_dataset_of_parquet_files_has_the_frames_of_the_image_files(folder):
    dataset = build(folder, [partial(parquet, streaming=False)], decode_once=True)
    plain = build(folder, [in_memory])
    texts = [row["target"] for row in dataset.rows]
    for number in (0, 1, 59):
        found = dataset[texts.index(f"number {number}")]["frames"].int()
        # Resized in other processes: one grey level apart at most.
        torch.testing.assert_close(found, plain[number]["frames"].int(), rtol=0, atol=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_maps_class_indices_to_names(tmp_path, streaming):
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    features = datasets.Features(file=datasets.Value("string"), label=label)
    table = {"file": ["0.png", "1.png", "2.png"], "label": [1, 0, 1]}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.to_parquet(tmp_path / "labels.parquet")
    source = read_source(
        SourceArguments(
            dataset="parquet",
            data_files=str(tmp_path / "labels.parquet"),
            columns={"image": "file", "target": "label"},
            media_folder="pictures",
            streaming=streaming,
        )
    )
    rows = source.some_rows()
    assert [row["target"] for row in rows] == ["a dog", "a cat", "a dog"]
    assert [row["image"] for row in rows] == [f"pictures/{number}.png" for number in range(3)]


def read(streaming: bool, **arguments) -> tuple[list[str], list[str]]:
    """Return the targets of a dataset and the reasons of its bad rows."""
    source = read_source(SourceArguments(streaming=streaming, **arguments))
    rows, bad = source.blocks(0, 1, seed=0).read() if streaming else (source.rows, source.bad)
    return [row["target"] for row in rows], [row.reason for row in bad]


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_maps_lists_of_class_indices_to_names(tmp_path, streaming):
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    features = datasets.Features(
        file=datasets.Value("string"),
        labels=datasets.List(label),
        boxes=datasets.List({"kinds": datasets.List(label), "x": datasets.Value("int64")}),
    )
    boxes = [[{"kinds": [1, 0], "x": 3}, {"kinds": [], "x": 4}], [{"kinds": [-1], "x": 5}]]
    table = {"file": ["0.png", "1.png"], "labels": [[0, 1], [1]], "boxes": boxes}
    path = str(tmp_path / "labels.parquet")
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    for target, texts in (
        ("labels[]", ["a cat", "a dog", "a dog"]),
        ("labels", ["a cat", "a dog", "a dog"]),  # a list of right texts, as in JSONL
        ("boxes[].kinds[]", ["a dog", "a cat"]),
    ):
        columns = {"image": "file", "target": target}
        found, bad = read(streaming, dataset="parquet", data_files=path, columns=columns)
        assert found == texts
        assert bad == (["columns: boxes[].kinds[] is null"] if "boxes" in target else [])


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_names_a_class_index_without_a_name(tmp_path, streaming):
    kinds = {"file": {"dtype": "string", "_type": "Value"}}
    kinds["label"] = {"names": ["a cat"], "_type": "ClassLabel"}
    table = pa.table({"file": ["0.png", "1.png"], "label": [0, 9]})
    header = {"huggingface": json.dumps({"info": {"features": kinds}})}
    path = str(tmp_path / "labels.parquet")
    pq.write_table(table.replace_schema_metadata(header), path)
    columns = {"image": "file", "target": "label"}
    found, bad = read(streaming, dataset="parquet", data_files=path, columns=columns)
    assert found == ["a cat"]
    assert bad == ["class 9 has no name: the classes are 0 to 0"]


MIXED = ["one", ["one", "two"], "3", "null", "007", ["3"], None, 'say "a"', []]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_read_source_gives_the_values_of_a_json_column_of_several_types(tmp_path, kind, streaming):
    """`datasets` stores such a column as JSON texts; `rows` reads the same file by itself."""
    examples = [{"image": "a.png", "target": target} for target in MIXED]
    file = write_rows(tmp_path / "mixed.jsonl", examples)
    (tmp_path / "a.png").write_bytes(picture(0))
    plain = [row["target"] for row in read_source(SourceArguments(rows=str(file))).rows]
    assert plain == ["one", "one", "two", "3", "null", "007", "3", 'say "a"']
    if kind == "array":
        file.write_text(json.dumps(examples))
    columns = {"image": "image", "target": "target"}
    found, bad = read(streaming, dataset="json", data_files=str(file), columns=columns)
    assert found == plain
    assert bad == ["columns: target is null"] * 2


TABLE = """file,answer,count,id,split
a.png,None,3,007,1
a.png,NA,,008,1
a.png,null,12,009,1
a.png,nan,1,010,1
a.png,,1,011,1
a.png,True,1,012,2
"""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["csv", "gz", "tsv"])
def test_read_source_keeps_every_text_of_a_csv_file(tmp_path, form, streaming):
    """pandas reads None, NA, null and nan as nulls, 007 as 7, and 3 above a gap as 3.0."""
    path = tmp_path / "train.csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    place = {"dataset": "csv", "data_files": str(path)}
    if form == "gz":
        place["data_files"] += ".gz"
        Path(place["data_files"]).write_bytes(gzip.compress(path.read_bytes()))
    elif form == "tsv":  # a folder, whose format `datasets` finds
        path.unlink()
        (tmp_path / "train.tsv").write_text(TABLE.replace(",", "\t"), encoding="utf-8")
        place = {"dataset": str(tmp_path)}
    columns = {"image": "{id}.png", "target": "answer"}
    found, bad = read(streaming, columns=columns | {"where": {"split": 1}}, **place)
    assert found == ["None", "NA", "null", "nan"]
    assert bad == ["columns: answer is null"]
    found, _ = read(streaming, columns=columns | {"target": "{id} {answer}"}, **place)
    assert found[0] == "007 None" and found[-1] == "012 True"
    with pytest.raises(
        RecipeError, match="every target is a whole number, such as '3'. If it is a"
    ):
        read(streaming, columns=columns | {"target": "count"}, **place)
    found, bad = read(streaming, columns=columns | {"target": "count", "numbers": True}, **place)
    assert found == ["3", "12", "1", "1", "1"]
    assert bad == ["columns: count is null"]


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_names_the_encoding_of_a_csv_file(tmp_path, streaming):
    (tmp_path / "a.csv").write_text(TABLE, encoding="utf-16")
    columns = {"image": "file", "target": "answer"}
    with pytest.raises(RecipeError, match="a.csv: 'utf-8' codec .* Save the file as UTF-8"):
        read(streaming, dataset="csv", data_files=str(tmp_path / "a.csv"), columns=columns)


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_counts_the_nulls_of_an_image_folder(tmp_path, streaming):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(0))
    (tmp_path / "metadata.csv").write_text("file_name,answer\na.png,None\nb.png,red\n")
    files = {"dataset": "imagefolder", "data_files": str(tmp_path / "*")}
    found, bad = read(streaming, **files, columns={"image": "image", "target": "answer"})
    assert found == ["red"]
    assert len(bad) == 1 and "answer is null; texts such as NA or None in a metadata.csv" in bad[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_finds_webdataset_members_with_dots(tmp_path, streaming):
    """The last of six examples has no caption."""
    members = {"left.jpg": picture(0, "JPEG"), "txt": b"None", "meta.json": b'{"q": "what ?"}'}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(6):
            for kind, content in members.items():
                if (number, kind) != (5, "txt"):
                    member = tarfile.TarInfo(f"{number:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    columns = {"image": "left.jpg", "target": "{meta.json.q} {txt}"}
    files = {"dataset": "webdataset", "data_files": str(tmp_path / "0.tar")}
    found, bad = read(streaming, **files, columns=columns)
    assert found == ["what ? None"] * 5
    assert bad == ["columns: {meta.json.q} {txt} is null"]


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_treats_a_missing_class_as_null(tmp_path, streaming):
    """Test splits have -1 as the class."""
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    features = datasets.Features(file=datasets.Value("string"), label=label)
    table = {"file": ["0.png", "1.png", "2.png", "3.png"], "label": [1, -1, None, 0]}

    def read_file(name: str, **columns: str | list) -> tuple[list[str], list[str]]:
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / name)
        return read(streaming, dataset="parquet", data_files=str(tmp_path / name), columns=columns)

    assert read_file("some.parquet", image="file", target="file") == (table["file"], [])
    texts, reasons = read_file("some.parquet", image="file", target="label")
    assert (texts, reasons) == (["a dog", "a cat"], ["columns: label is null"] * 2)
    labels = {"image": "file", "target": "label", "absent": [None]}
    assert read_file("some.parquet", **labels) == (["a dog", "a cat"], [])
    texts, reasons = read_file("some.parquet", image="file", target="file", query="is {label} ?")
    assert texts == ["0.png", "3.png"]
    assert len(reasons) == 2 and all("is null" in reason for reason in reasons)
    table["label"] = [-1] * 4
    with pytest.raises(RecipeError, match="no row is usable. 4 of 4 rows are unusable"):
        read_file("none.parquet", image="file", target="label")
    with pytest.raises(RecipeError, match="no row is usable. The source is empty, or every target"):
        read_file("none.parquet", **labels)


def test_read_source_keeps_the_good_rows_of_an_example_with_a_bad_one(tmp_path):
    table = {"file": ["0.png"], "texts": [["a cat", " ", "a pet"]]}
    pq.write_table(pa.table(table), tmp_path / "some.parquet")
    arguments = SourceArguments(
        dataset="parquet",
        data_files=str(tmp_path / "some.parquet"),
        columns={"image": "file", "target": "texts[]"},
    )
    source = read_source(arguments)
    assert [row["target"] for row in source.rows] == ["a cat", "a pet"]
    assert [row.reason for row in source.bad] == ["target is empty"]


def test_read_source_names_a_missing_column_mapping_or_set(folder):
    columns = {"image": "jpg", "target": "caption"}
    with pytest.raises(RecipeError, match="caption") as error:
        read_source(webdataset(folder, columns=columns))
    assert "txt" in str(error.value)  # what was found
    with pytest.raises(RecipeError, match="columns is missing"):
        read_source(webdataset(folder, columns=None))
    with pytest.raises(RecipeError, match="there is no public set 'cc4m'"):
        read_source(webdataset(folder, columns="cc4m"))


@pytest.mark.parametrize("streaming", [False, True])
def test_read_source_names_a_missing_parquet_file(tmp_path, streaming):
    with pytest.raises(RecipeError, match="data.sources: parquet .*none.parquet"):
        read_source(
            SourceArguments(
                dataset="parquet",
                data_files=str(tmp_path / "none.parquet"),
                columns=WDS_COLUMNS,
                streaming=streaming,
            )
        )


def test_read_source_names_a_missing_or_empty_streamed_jsonl_file(tmp_path):
    with pytest.raises(RecipeError, match="none.jsonl: no such JSONL file"):
        read_source(SourceArguments(rows=str(tmp_path / "none.jsonl"), streaming=True))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecipeError, match="empty.jsonl: the file holds no row"):
        read_source(SourceArguments(rows=str(tmp_path / "empty.jsonl"), streaming=True))


# -- bad rows ------------------------------------------------------------------------------


@pytest.fixture
def spoilt(folder, tmp_path) -> Path:
    """Twenty images, every fifth broken, and three bad lines."""
    lines = []
    for number in range(20):
        content = b"no picture" if number % 5 == 0 else picture(number)
        (tmp_path / f"{number}.png").write_bytes(content)
        row = {
            "image": f"{number}.png",
            "target": f"number {number}",
            "file": "a column of the user's own",
        }
        lines.append(json.dumps(row))
    lines[7:7] = ["{oops", '{"image": "0.png"}', '{"video": "1.mp4", "target": "a"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def batches(dataset: ContrastiveDataset, **changes) -> list[tuple[list[str], list[BadRow]]]:
    """Return the targets and the bad rows of every batch."""
    found = []
    for step in sampler(dataset, **changes):
        batch = dataset.__getitems__(step)
        found.append(([sample["target"] for sample in batch.samples], batch.bad))
    return found


@pytest.mark.parametrize("kind", [in_memory, streamed])
def test_dataset_replaces_and_names_broken_rows(spoilt, kind):
    """Replacements are rows of the same lane, so they are the same on any number of processes."""
    arguments = kind(spoilt, **({"rows": str(spoilt / "rows.jsonl")} if kind is streamed else {}))
    dataset = build(spoilt, [lambda folder: arguments])
    options = {"steps": 30, "lanes": 2}
    one = batches(dataset, **options)
    texts = {text for batch, _ in one for text in batch}
    assert {len(batch) for batch, _ in one} == {8}
    assert texts == {f"number {number}" for number in range(20) if number % 5}
    reasons = "\n".join(str(row) for _, bad in one for row in bad)
    for number in (0, 5, 10, 15):
        line = number + 1 if number < 7 else number + 4
        assert re.search(rf"rows.jsonl:{line}: .*/{number}.png: not an image", reasons)
    if kind is streamed:
        assert "rows.jsonl:8: not valid JSON" in reasons
        assert "rows.jsonl:9: target is missing" in reasons
    two = [batches(dataset, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for (batch, bad), (first, some), (second, others) in zip(one, *two, strict=True):
        assert batch == first + second and sorted(map(str, bad)) == sorted(map(str, some + others))


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_replaces_a_lane_whose_rows_are_all_broken(spoilt, streaming):
    """A lane has one row in each batch, and four rows of five are broken. The fallback rows are
    the same on any number of processes and workers, and in a resumed run."""
    good = {f"number {number}" for number in range(20) if number % 5 == 1}
    for number in range(20):
        if f"number {number}" not in good:
            (spoilt / f"{number}.png").write_bytes(b"no picture")
    write_rows(
        spoilt / "rows.jsonl",
        [{"image": f"{number}.png", "target": f"number {number}"} for number in range(20)],
    )
    rows = SourceArguments(rows=str(spoilt / "rows.jsonl"), streaming=streaming)
    dataset = build(spoilt, [lambda folder: rows])
    options = {"steps": 20, "lanes": 8}
    one = batches(dataset, **options)
    assert {len(batch) for batch, _ in one} == {8}
    assert {text for batch, _ in one for text in batch} == good
    assert sum(len(bad) for _, bad in one) == pytest.approx(0.8 * 160, abs=8)
    two = [batches(dataset, rank=rank, world_size=2, **options) for rank in (0, 1)]
    assert [batch for batch, _ in one] == [a + b for (a, _), (b, _) in zip(*two, strict=True)]

    loader = DataLoader(
        dataset, batch_sampler=sampler(dataset, **options), collate_fn=lambda x: x, num_workers=2
    )
    assert [[sample["target"] for sample in batch.samples] for batch in loader] == [
        batch for batch, _ in one
    ]
    whole = sampler(dataset, **options)
    list(whole)
    resumed = sampler(dataset, start=7, positions=whole.position(7), **options)
    rest = [dataset.__getitems__(step) for step in resumed if step is not None]
    assert [[each["target"] for each in batch.samples] for batch in rest] == [
        batch for batch, _ in one[7:]
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_stops_at_a_source_without_a_readable_row(spoilt, streaming):
    rows = write_rows(spoilt / "bad.jsonl", [{"image": "0.png", "target": "a"}] * 4)
    arguments = SourceArguments(rows=str(rows), streaming=streaming)
    dataset = build(spoilt, [lambda folder: arguments])
    with pytest.raises(RecipeError, match="bad.jsonl: no row of a lane's part(.|\n)*0.png: not an"):
        dataset.__getitems__(next(iter(sampler(dataset))))


def spoil(path: Path, kind: str) -> None:
    """Break the ninth of a shard's fifteen examples, or truncate the file there."""
    with tarfile.open(path) as tar:
        members = [(each, tar.extractfile(each).read()) for each in tar.getmembers()]
    broken = 17  # index of the ninth example's text
    extra = tarfile.TarInfo(f"{members[broken][0].name.split('.')[0]}.{kind}")
    content = {"json": b"{oops", "npy": b"1", "txt": b"\xff\xfe\xff"}.get(kind)
    with tarfile.open(path, "w") as tar:
        for index, (member, old) in enumerate(members):
            if index == broken and kind == "txt":
                old, member.size = content, len(content)
            tar.addfile(member, io.BytesIO(old))
            if index == broken and kind in ("json", "npy"):
                extra.size = len(content)
                tar.addfile(extra, io.BytesIO(content))
    if kind == "cut":
        with tarfile.open(path) as tar:
            end = tar.getmembers()[broken - 1].offset_data
        path.write_bytes(path.read_bytes()[: end + 600])


@pytest.fixture(params=["json", "npy", "txt", "cut"])
def spoilt_shards(folder, tmp_path, request) -> Path:
    for shard in range(SHARDS):
        (tmp_path / f"{shard}.tar").write_bytes((folder / f"{shard}.tar").read_bytes())
    spoil(tmp_path / "2.tar", request.param)
    return tmp_path


@pytest.mark.parametrize("lanes", [2, 8])
def test_dataset_blocks_end_a_shard_at_a_broken_member_and_name_it(spoilt_shards, lanes):
    """The examples before it and those of other shards are read."""
    source = read_source(webdataset(spoilt_shards))
    found, broken = Counter(), []
    for number in range(lanes):
        blocks = source.blocks(number, lanes, seed=3)
        while blocks.epoch == 0:
            rows, bad = blocks.read()
            broken += bad
            found.update(row["target"] for row in rows)
    lost = set(range(2 + 8 * SHARDS, 60, SHARDS))
    if lanes == 8:  # every lane reads all shards in turn, and takes each eighth example
        lost = set(range(2 + 2 * SHARDS, 60, SHARDS)) | set(range(3, 60, SHARDS))
    assert found == Counter(f"number {n}" for n in range(60) if n not in lost)
    assert len(broken) == (1 if lanes == 2 else 8)
    left = "the rest of shard 3 of 4" if lanes == 2 else "all that this lane had left of the epoch"
    assert all(f"cannot be read, and {left} is lost (" in row.reason for row in broken)
    if lanes == 2:
        assert broken[0].line == 9


def test_mixture_with_a_broken_shard_is_the_same_on_two_processes_and_resumed(spoilt_shards):
    dataset = build(spoilt_shards, [webdataset])
    whole = sampler(dataset)
    one = texts_of(dataset, whole)
    ranks = [sampler(dataset, rank=rank, world_size=2) for rank in (0, 1)]
    assert texts_of(dataset, *ranks) == one
    for done in (3, 8):
        resumed = sampler(dataset, start=done, positions=whole.position(done))
        assert texts_of(dataset, resumed) == one[done:]


def test_read_source_names_the_cause_of_a_broken_shard(spoilt_shards):
    with pytest.raises(RecipeError, match="generating the dataset.*(Error|NotSupported).*\\("):
        read_source(webdataset(spoilt_shards, streaming=False))


def test_lane_stops_after_an_epoch_without_a_usable_row(spoilt):
    write_rows(spoilt / "late.jsonl", [{"image": "1.png", "target": "a"}])
    source = read_source(SourceArguments(rows=str(spoilt / "late.jsonl"), streaming=True))
    write_rows(spoilt / "late.jsonl", [{"image": "gone.png", "target": "a"}])
    with pytest.raises(RecipeError, match="no row of an epoch is usable(.|\n)*gone.png"):
        source.lane(0, 1, seed=0).take(1)


def test_lane_of_images_rejects_videos(spoilt):
    (spoilt / "1.mp4").touch()
    source = read_source(streamed(spoilt, rows=str(spoilt / "rows.jsonl")))
    lane = source.lane(0, 1, seed=0)
    lane.take(40)
    assert "no image, as the others are" in "\n".join(map(str, lane.take_bad()))


def test_mixture_of_a_longer_run_keeps_the_rows_of_the_first(folder):
    """A run of 7 steps is continued to 12, then to 20: no row is drawn twice in an epoch."""
    dataset = build(folder, [in_memory, streamed])
    first = texts_of(dataset, sampler(dataset, steps=7))
    longer = texts_of(dataset, sampler(dataset, steps=12, planned=7))
    longest = texts_of(dataset, sampler(dataset, steps=20, planned=7))
    assert longer[:7] == first and longest[:12] == longer
    assert texts_of(dataset, sampler(dataset, steps=5, planned=7)) == first[:5]
    assert texts_of(dataset, sampler(dataset, steps=12)) != longer  # positive control


def test_step_is_small_when_it_is_sent_to_a_worker(folder):
    """It contains numbers and rows, and no media."""
    dataset = build(folder, [in_memory, streamed])
    assert max(len(pickle.dumps(step)) for step in sampler(dataset)) < 5000
