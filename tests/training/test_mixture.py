"""Sources that are read as they are needed: nothing is lost, and the sequence is the recipe's."""

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
from training.data.mixture import MixtureSampler
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
    """Sixty images, as JSONL, as WebDataset shards and as parquet files."""
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
        some = range(shard, 60, SHARDS)
        table = {
            "picture": [{"bytes": picture(number), "path": None} for number in some],
            "texts": [[f"number {number}", f"nr. {number}"] for number in some],
        }
        pq.write_table(pa.table(table), folder / f"{shard}.parquet")
    return folder


def held(folder: Path, **changes) -> SourceArguments:
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
    "held": [held],
    "streamed": [streamed],
    "webdataset": [webdataset],
    "parquet": [parquet],
    "all of them": [held, streamed, webdataset, parquet],
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
    return (dataset.rows[row % 2**40] if isinstance(row, int) else row)["target"]


def sets_of(dataset: ContrastiveDataset, *samplers: MixtureSampler) -> list[list[str]]:
    """The texts of every global batch, of all processes together."""
    return [
        sorted(text_of(dataset, row) for step in steps for lane in step.rows for row in lane)
        for steps in zip(*samplers, strict=True)
        if steps[0] is not None
    ]


# -- the sequence --------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_processes_share_the_batches_of_one(folder, kinds):
    dataset = build(folder, kinds)
    one = sets_of(dataset, sampler(dataset))
    assert len(one) == 12 and {len(batch) for batch in one} == {8}
    for world_size in (2, 4):
        ranks = [sampler(dataset, rank=r, world_size=world_size) for r in range(world_size)]
        assert sets_of(dataset, *ranks) == one
    assert sets_of(dataset, sampler(dataset, seed=2)) != one  # positive control


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_resumed_run_goes_on_with_the_same_batches(folder, kinds, parts):
    """Also on another number of processes, and after its places went through JSON."""
    dataset = build(folder, kinds)
    whole = sampler(dataset, parts=parts)
    one = sets_of(dataset, whole)
    for done in (1, 5, 11):
        before = [sampler(dataset, rank=rank, world_size=2, parts=parts) for rank in (0, 1)]
        for each in before:
            list(each)  # the DataLoader has asked for more than was trained on
        places = [json.loads(json.dumps(each.position(done))) for each in before]
        lanes = [
            {int(b): {int(n): at for n, at in found.items()} for b, found in place.items()}
            for place in places
        ]
        positions = {bucket: lanes[0][bucket] | lanes[1][bucket] for bucket in lanes[0]}
        resumed = sampler(dataset, start=done, positions=positions, parts=parts)
        assert list(resumed)[: done * parts] == [None] * done * parts
        assert sets_of(dataset, resumed) == one[done * parts :]


def test_positions_of_the_past_are_forgotten(folder):
    dataset = build(folder, [streamed])
    mixture = sampler(dataset)
    list(mixture)
    mixture.forget(7)
    assert sorted(mixture.positions) == list(range(7, 13))


@pytest.mark.parametrize("kinds", [KINDS["all of them"]])
def test_workers_change_nothing(folder, kinds):
    """Batches bit for bit, with and without processes of their own to make them."""
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
                same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
                assert same(value, other[name]), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lanes": 4, "world_size": 3}, "4 lanes must divide the 8 rows of a batch, and 3 process"),
        ({"lanes": 3}, "3 lanes must divide the 8 rows"),
    ],
)
def test_lanes_that_do_not_divide_are_refused(folder, changes, reason):
    with pytest.raises(RecipeError, match=f"data.lanes: {reason}"):
        sampler(build(folder, [streamed]), **changes)


# -- every row, once an epoch --------------------------------------------------------------


@pytest.mark.parametrize("kind", [streamed, webdataset, parquet])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_an_epoch_of_all_lanes_has_every_row(folder, kind, lanes):
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
    if kind is streamed:  # whose blocks go on from one epoch into the next
        assert set(found) == set(texts) and max(found.values()) - min(found.values()) <= 1
    else:
        assert found == Counter(texts)


def test_lines_belong_to_the_chunk_in_which_they_begin(tmp_path):
    """Whatever their lengths, line ends and places in the files."""
    texts = [f"text {'x' * length}" for length in (0, 300, 1, 2, 80, 5, 40, 600, 3, 3, 3)]
    for number in range(len(texts)):
        (tmp_path / f"{number}.png").touch()
    lines = [
        json.dumps({"image": f"{number}.png", "target": text}).encode()
        for number, text in enumerate(texts)
    ]
    (tmp_path / "1.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines[:5]))  # no end of line
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
def test_some_rows_of_a_stream_are_each_there_once(folder, kind):
    texts = Counter(f"number {number}" for number in range(60))
    if kind is parquet:
        texts += Counter(f"nr. {number}" for number in range(60))
    for shuffle_rows in (16, 10_000):
        source = read_source(kind(folder, shuffle_rows=shuffle_rows))
        assert Counter(row["target"] for row in source.first_rows()) == texts
        assert source.first_rows(5) == source.first_rows()[:5]


def test_empty_files_among_others_of_a_stream(folder, tmp_path):
    rows = [{"image": str(folder / f"{number}.png"), "target": str(number)} for number in range(6)]
    for number, some in enumerate(([], rows[:4], [], rows[4:], [])):
        write_rows(tmp_path / f"{number}.jsonl", some)
    source = read_source(SourceArguments(rows=str(tmp_path / "*.jsonl"), streaming=True))
    assert sorted(row["target"] for row in source.first_rows()) == list("012345")


def test_epochs_differ_in_their_order(folder):
    for kind in (streamed, webdataset, parquet):
        source = read_source(kind(folder, shuffle_rows=10))
        lane = source.lane(0, 1, seed=0)
        rows = 120 if kind is parquet else 60
        first, second = ([row["target"] for row in lane.take(rows)] for _ in range(2))
        assert first != second
        assert sorted(set(first + second)) == sorted({row["target"] for row in source.first_rows()})


def test_a_lane_reads_shards_of_its_own_where_there_are_enough(folder):
    for kind, rows in ((webdataset, 15), (parquet, 30)):
        source = read_source(kind(folder))
        for number in range(SHARDS):
            lane = source.lane(number, SHARDS, seed=0)
            numbers = {int(row["target"].split()[-1]) for row in lane.take(rows)}
            assert len(numbers) == 15 and len({number % SHARDS for number in numbers}) == 1


# -- what rows are -------------------------------------------------------------------------


def test_examples_become_rows_as_their_columns_say(folder):
    """Held or streamed; two captions of an image are of one group."""
    for streaming in (False, True):
        source = read_source(parquet(folder, streaming=streaming, query="describe"))
        rows = source.first_rows()
        assert len(rows) == 120 and {row["query"] for row in rows} == {"describe"}
        groups = Counter(row["group_id"] for row in rows)
        assert len(groups) == 60 and set(groups.values()) == {2}
    dataset = build(folder, [partial(parquet, streaming=False)], decode_once=True)
    plain = build(folder, [held])
    texts = [row["target"] for row in dataset.rows]
    for number in (0, 1, 59):
        sample = dataset[texts.index(f"number {number}")]
        assert torch.equal(sample["frames"], plain[number]["frames"])


def test_classes_are_called_by_their_names(tmp_path):
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    features = datasets.Features(file=datasets.Value("string"), label=label)
    table = {"file": ["0.png", "1.png", "2.png"], "label": [1, 0, 1]}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.to_parquet(tmp_path / "labels.parquet")
    for streaming in (False, True):
        source = read_source(
            SourceArguments(
                dataset="parquet",
                data_files=str(tmp_path / "labels.parquet"),
                columns={"image": "file", "target": "label"},
                media_folder="pictures",
                streaming=streaming,
            )
        )
        rows = source.first_rows()
        assert [row["target"] for row in rows] == ["a dog", "a cat", "a dog"]
        assert [row["image"] for row in rows] == [f"pictures/{number}.png" for number in range(3)]


def test_examples_without_a_class(tmp_path):
    """Test splits have -1 for it. Where it is the target there is no row, as of any null."""
    label = datasets.ClassLabel(names=["a cat", "a dog"])
    features = datasets.Features(file=datasets.Value("string"), label=label)
    table = {"file": ["0.png", "1.png", "2.png", "3.png"], "label": [1, -1, None, 0]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "labels.parquet")
    keys = {"dataset": "parquet", "data_files": str(tmp_path / "labels.parquet")}

    def read(streaming: bool, **columns: str) -> tuple[list[str], list[str]]:
        source = read_source(SourceArguments(**keys, streaming=streaming, columns=columns))
        if streaming:
            rows, bad = source.blocks(0, 1, seed=0).read()
        else:
            rows, bad = source.rows, source.bad
        return [row["target"] for row in rows], [row.reason for row in bad]

    for streaming in (False, True):
        assert read(streaming, image="file", target="file") == (table["file"], [])
        assert read(streaming, image="file", target="label") == (["a dog", "a cat"], [])
        texts, reasons = read(streaming, image="file", target="file", query="is it {label} ?")
        assert texts == ["0.png", "3.png"]
        assert len(reasons) == 2 and all("is null" in reason for reason in reasons)
    table["label"] = [-1] * 4
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "labels.parquet")
    for streaming in (False, True):
        with pytest.raises(
            RecipeError, match="no row is usable. The source is empty, or every target"
        ):
            read(streaming, image="file", target="label")


def test_a_bad_row_of_an_example_is_not_all_of_it(tmp_path):
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


def test_a_wrong_column_is_named(folder):
    columns = {"image": "jpg", "target": "caption"}
    with pytest.raises(RecipeError, match="caption") as error:
        read_source(webdataset(folder, columns=columns))
    assert "txt" in str(error.value)  # what was found
    with pytest.raises(RecipeError, match="columns is missing"):
        read_source(webdataset(folder, columns=None))
    with pytest.raises(RecipeError, match="there is no public set 'cc4m'"):
        read_source(webdataset(folder, columns="cc4m"))


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    for streaming in (False, True):
        with pytest.raises(RecipeError, match="data.sources: parquet .*none.parquet"):
            read_source(
                SourceArguments(
                    dataset="parquet",
                    data_files=str(tmp_path / "none.parquet"),
                    columns=WDS_COLUMNS,
                    streaming=streaming,
                )
            )
    with pytest.raises(RecipeError, match="none.jsonl: no such JSONL file"):
        read_source(SourceArguments(rows=str(tmp_path / "none.jsonl"), streaming=True))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecipeError, match="empty.jsonl: the file holds no row"):
        read_source(SourceArguments(rows=str(tmp_path / "empty.jsonl"), streaming=True))


# -- rows that are none --------------------------------------------------------------------


@pytest.fixture
def spoilt(folder, tmp_path) -> Path:
    """Twenty images, of which every fifth is broken, and lines that are no rows."""
    lines = []
    for number in range(20):
        content = b"no picture" if number % 5 == 0 else picture(number)
        (tmp_path / f"{number}.png").write_bytes(content)
        row = {
            "image": f"{number}.png",
            "target": f"number {number}",
            "file": "a column of one's own",
        }
        lines.append(json.dumps(row))
    lines[7:7] = ["{oops", '{"image": "0.png"}', '{"video": "1.mp4", "target": "a"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def batches(dataset: ContrastiveDataset, **changes) -> list[tuple[list[str], list[BadRow]]]:
    found = []
    for step in sampler(dataset, **changes):
        batch = dataset.__getitems__(step)
        found.append(([sample["target"] for sample in batch.samples], batch.bad))
    return found


@pytest.mark.parametrize("kind", [held, streamed])
def test_broken_rows_are_replaced_and_named(spoilt, kind):
    """By rows of their own lane, so that every number of processes trains on the same."""
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
def test_broken_rows_one_after_the_other_are_replaced_too(spoilt, streaming):
    """A lane has one row of each batch, and four of five are broken. What replaces them is the same
    for every number of processes and workers, and after the run was resumed."""
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
def test_a_source_without_a_good_row_stops(spoilt, streaming):
    rows = write_rows(spoilt / "bad.jsonl", [{"image": "0.png", "target": "a"}] * 4)
    arguments = SourceArguments(rows=str(rows), streaming=streaming)
    dataset = build(spoilt, [lambda folder: arguments])
    with pytest.raises(RecipeError, match="bad.jsonl: no row of a lane's part(.|\n)*0.png: not an"):
        dataset.__getitems__(next(iter(sampler(dataset))))


def spoil(path: Path, kind: str) -> None:
    """Break the ninth of a shard's fifteen examples, or cut the file off there."""
    with tarfile.open(path) as tar:
        members = [(each, tar.extractfile(each).read()) for each in tar.getmembers()]
    place, extra = 17, tarfile.TarInfo(f"{members[17][0].name.split('.')[0]}.{kind}")
    content = {"json": b"{oops", "npy": b"1", "txt": b"\xff\xfe\xff"}.get(kind)
    with tarfile.open(path, "w") as tar:
        for number, (member, old) in enumerate(members):
            if number == place and kind == "txt":
                old, member.size = content, len(content)
            tar.addfile(member, io.BytesIO(old))
            if number == place and kind in ("json", "npy"):
                extra.size = len(content)
                tar.addfile(extra, io.BytesIO(content))
    if kind == "cut":
        with tarfile.open(path) as tar:
            end = tar.getmembers()[place - 1].offset_data
        path.write_bytes(path.read_bytes()[: end + 600])


@pytest.fixture(params=["json", "npy", "txt", "cut"])
def spoilt_shards(folder, tmp_path, request) -> Path:
    for shard in range(SHARDS):
        (tmp_path / f"{shard}.tar").write_bytes((folder / f"{shard}.tar").read_bytes())
    spoil(tmp_path / "2.tar", request.param)
    return tmp_path


@pytest.mark.parametrize("lanes", [2, 8])
def test_a_shard_ends_where_it_breaks(spoilt_shards, lanes):
    """What it holds before is read, what other shards hold as well, and the place is named."""
    source = read_source(webdataset(spoilt_shards))
    found, broken = Counter(), []
    for number in range(lanes):
        blocks = source.blocks(number, lanes, seed=3)
        while blocks.epoch == 0:
            rows, bad = blocks.read()
            broken += bad
            found.update(row["target"] for row in rows)
    lost = set(range(2 + 8 * SHARDS, 60, SHARDS))
    if lanes == 8:  # each reads of all shards, one after the other, from eight examples at a time
        lost = set(range(2 + 2 * SHARDS, 60, SHARDS)) | set(range(3, 60, SHARDS))
    assert found == Counter(f"number {n}" for n in range(60) if n not in lost)
    assert len(broken) == (1 if lanes == 2 else 8)
    left = "the rest of shard 3 of 4" if lanes == 2 else "all that this lane had left of the epoch"
    assert all(f"cannot be read, and {left} is lost (" in row.reason for row in broken)
    if lanes == 2:
        assert broken[0].line == 9


def test_broken_shards_leave_the_sequence_as_it_is(spoilt_shards):
    """On every number of processes, and in a run that is resumed."""
    dataset = build(spoilt_shards, [webdataset])
    whole = sampler(dataset)
    one = sets_of(dataset, whole)
    ranks = [sampler(dataset, rank=rank, world_size=2) for rank in (0, 1)]
    assert sets_of(dataset, *ranks) == one
    for done in (3, 8):
        resumed = sampler(dataset, start=done, positions=whole.position(done))
        assert sets_of(dataset, resumed) == one[done:]


def test_a_held_dataset_with_a_broken_member_says_what_broke(spoilt_shards):
    with pytest.raises(RecipeError, match="generating the dataset.*(Error|NotSupported).*\\("):
        read_source(webdataset(spoilt_shards, streaming=False))


def test_an_epoch_without_a_good_row_stops(spoilt):
    (spoilt / "late.jsonl").write_text('{"image": "1.png", "target": "a"}\n')
    source = read_source(SourceArguments(rows=str(spoilt / "late.jsonl"), streaming=True))
    (spoilt / "late.jsonl").write_text('{"image": "gone.png", "target": "a"}\n')
    with pytest.raises(RecipeError, match="no row of an epoch is usable(.|\n)*gone.png"):
        source.lane(0, 1, seed=0).take(1)


def test_a_stream_of_images_has_no_videos(spoilt):
    (spoilt / "1.mp4").touch()
    source = read_source(streamed(spoilt, rows=str(spoilt / "rows.jsonl")))
    lane = source.lane(0, 1, seed=0)
    lane.take(40)
    assert "no image, as the others are" in "\n".join(map(str, lane.take_bad()))


def test_a_step_is_small_to_hand_over(folder):
    """Numbers and rows only: a worker gets its own dataset."""
    dataset = build(folder, [held, streamed])
    assert max(len(pickle.dumps(step)) for step in sampler(dataset)) < 5000
