"""Tests of `training.cache_features`: the store, the estimate before it, and killed runs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_vljepa import StreamEncoder
from processing.feature_store import FeatureError
from processing.output import OutputError
from processing.stream_store import StreamStore
from tests.full_disk import message_on_a_full_disk
from tests.tiny import noise, tiny_recipe, tiny_rows, write_rows
from training import cache_features
from training.arguments import RecipeError, read_recipe
from training.cache_features import main, read_as_training
from training.data import feature_writer
from training.data.feature_writer import (
    begin,
    clip_bytes,
    cut_into_shards,
    distinct_clips,
    make_plan,
    missing_shards,
    only_writer,
    put,
    write_index,
    write_shards,
)

ROOT = Path(__file__).parents[2]
IMAGE, VIDEO = (4, 48), (8, 48)  # tokens and width of a tiny clip
SHARD_BYTES = 3 * clip_bytes(IMAGE, "bfloat16")  # three images, or one video


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, and seven images, the first of them in two rows."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [json.loads(line) for line in read(tiny_rows(folder)).splitlines()]
    for number, pixels in enumerate(noise(5, 40, 40, 3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "query": "what ?", "target": f"number {number}"})
    rows.append(rows[0] | {"target": "a dog"})
    return tiny_recipe(write_rows(folder / "rows.jsonl", rows))


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cut = partial(cut_into_shards, shard_bytes=SHARD_BYTES)
        patch.setattr(cache_features, "cut_into_shards", cut)
        yield


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def cache(recipe: Path, folder: Path, *options: str) -> None:
    main([str(recipe), "--output", str(folder), *options])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A store whose writing was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    cache(recipe, folder)
    return folder


# -- the store -------------------------------------------------------------------------------


def test_cache_features_writes_every_distinct_clip_once(whole):
    assert sorted(content(whole)) == [
        *(f"{number:05d}.safetensors" for number in range(5)),
        "index.json",
        "index.safetensors",
        "plan.json",
    ]
    index = json.loads(read(whole / "index.json"))
    assert (index["clips"], index["shards"], index["dtype"]) == (9, 5, "bfloat16")
    assert index["bytes"] == sum(path.stat().st_size for path in whole.glob("0*"))
    shapes = [load_file(path)["features"].shape for path in sorted(whole.glob("0*"))]
    assert [tuple(shape) for shape in shapes] == [
        (3, *IMAGE),
        (3, *IMAGE),
        (1, *IMAGE),
        (1, *VIDEO),
        (1, *VIDEO),
    ]


def test_cache_features_gives_all_files_the_same_permissions(whole):
    modes = {path.stat().st_mode & 0o777 for path in whole.iterdir()}
    assert modes == {(whole / "plan.json").stat().st_mode & 0o777}


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_put_writes_tensors_that_other_users_can_read(tmp_path, usual_umask):
    """`safetensors` alone would give the owner alone the right to read them."""
    put(tmp_path / "plan.json", "{}")
    put(tmp_path / "0.safetensors", {"features": torch.zeros(2)})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_cache_features_int8_halves_the_size(recipe, whole, tmp_path, capsys):
    cache(recipe, tmp_path / "int8", "--dtype", "int8", "training.seed=0")
    index = json.loads(read(tmp_path / "int8" / "index.json"))
    assert index["shards"] == 3  # six images; one image; two videos: twice the clips per shard
    sizes = [
        load_file(path)[name].nbytes
        for path in sorted((tmp_path / "int8").glob("0*"))
        for name in ("features", "scales")
    ]
    assert sum(sizes) == 7 * clip_bytes(IMAGE, "int8") + 2 * clip_bytes(VIDEO, "int8")
    error = index["relative_error"]
    assert f"relative error {error['mean']:.2e} on average" in capsys.readouterr().out
    bfloat16 = json.loads(read(whole / "index.json"))["relative_error"]
    assert bfloat16["mean"] < error["mean"] / 2


# -- before anything is written ----------------------------------------------------------------


class WritingStarts(Exception):
    """Raised in place of the first write."""


def test_cache_features_prints_size_and_time_before_writing(recipe, tmp_path, capsys, monkeypatch):
    def write_shards(*_, **__):
        raise WritingStarts

    monkeypatch.setattr(cache_features, "write_shards", write_shards)
    with pytest.raises(WritingStarts):
        cache(recipe, tmp_path / "store")
    printed = capsys.readouterr().out
    assert "7 images of 4 tokens of 48: 384B and " in printed
    assert "2 videos of 8 tokens of 48: 768B and " in printed
    assert "4.22kB in bfloat16, with " in printed
    assert re.search(r"; about \d+:\d\d:\d\d by 1 process", printed)


def test_cache_features_rejects_a_store_larger_than_the_free_space(recipe, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 7 * clip_bytes(IMAGE, "bfloat16") + 2 * clip_bytes(VIDEO, "bfloat16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(FeatureError, match="4.22kB are to be written and 4.22kB are free.*int8"):
        cache(recipe, tmp_path / "store")
    assert sorted(content(tmp_path / "store")) == ["lock", "plan.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    cache(recipe, tmp_path / "store")


def test_cache_features_rejects_trained_encoders_augmentation_and_streaming(recipe, tmp_path):
    with pytest.raises(FeatureError, match="X-Encoder trains"):
        cache(recipe, tmp_path / "store", "model.config.freeze_vision=false")
    rows = recipe.parent / "rows.jsonl"
    with pytest.raises(FeatureError, match="is augmented"):
        cache(recipe, tmp_path / "store", f"data.sources=[{{rows: {rows}, augment: true}}]")
    with pytest.raises(FeatureError, match="rows.jsonl is streamed"):
        cache(recipe, tmp_path / "store", f"data.sources=[{{rows: {rows}, streaming: true}}]")
    assert not (tmp_path / "store").exists()


def test_cache_features_rejects_or_prints_broken_files(tmp_path, capsys):
    rows = tiny_rows(tmp_path)
    (tmp_path / "wide.png").write_bytes(b"no picture")
    recipe = tiny_recipe(rows)
    with pytest.raises(RecipeError, match="1 of 4 rows are unusable"):
        cache(recipe, tmp_path / "store")
    cache(recipe, tmp_path / "store", "data.max_bad_share=0.25")
    out = capsys.readouterr().out
    assert "1 of 4 rows are unusable" in out and "wide.png" in out
    assert json.loads(read(tmp_path / "store" / "index.json"))["clips"] == 3


def test_cache_features_rejects_features_that_are_not_finite(recipe, tmp_path, monkeypatch):
    encode = feature_writer.Encoder.__call__

    def broken(self, samples):
        tokens = encode(self, samples).clone()
        if len(tokens) == 1 and tokens.shape[1] == VIDEO[0]:
            tokens[0, 3, 5] = float("nan")
        return tokens

    monkeypatch.setattr(feature_writer.Encoder, "__call__", broken)
    with pytest.raises(FeatureError, match=r"video .*wide\.mp4: .*NaN or infinite.*precision=fp32"):
        cache(recipe, tmp_path / "store")


@pytest.mark.parametrize("size", ["0", "-1", "1.5"])
def test_cache_features_rejects_a_batch_size_below_one(recipe, tmp_path, capsys, size):
    with pytest.raises(SystemExit):
        cache(recipe, tmp_path / "store", f"--batch-size={size}")
    assert f"argument --batch-size: it is {size}; give 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


# -- killed runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["00000.safetensors", "00003.safetensors", "index.safetensors"])
def test_cache_features_killed_within_a_file_continues_to_the_same_store(
    recipe, whole, tmp_path, monkeypatch, file
):
    """Shards that are complete are not computed again."""
    save, encode, encoded = feature_writer.save_file, feature_writer.Encoder.__call__, []

    def count(self, samples):
        encoded.append(len(samples))
        return encode(self, samples)

    def killed(tensors, path):
        save(tensors, path)
        if path.name.endswith(f"-{file}"):
            os.truncate(path, 100)
            raise KeyboardInterrupt
        assert not (path.parent / file).exists()

    folder = tmp_path / "store"
    monkeypatch.setattr(feature_writer.Encoder, "__call__", count)
    monkeypatch.setattr(feature_writer, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cache(recipe, folder)
    assert any(re.fullmatch(rf"incomplete-.+-\d+-{file}", name) for name in content(folder))
    assert "index.json" not in content(folder)
    (folder / ".tmpAbC123").touch()  # what a kill inside safetensors' `save_file` leaves
    monkeypatch.setattr(feature_writer, "save_file", save)
    encoded.clear()
    cache(recipe, folder)
    # Bit for bit: the same process computes the same batches again.
    assert content(folder) == content(whole)
    trial = [1, 7, 1, 2]
    left = {"00000.safetensors": [3, 3, 1, 1, 1], "00003.safetensors": [1, 1]}
    assert encoded == trial + left.get(file, [])


class Clips:
    """Images of one row each; the sample of a row is its index."""

    def __init__(self, folder: Path, count: int = 12):
        self.rows = [{"image": str(folder / f"{index}.png")} for index in range(count)]
        for row in self.rows:
            Path(row["image"]).touch()

    def __getitem__(self, index: int) -> int:
        return index


def encode_indices(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples).float()[:, None, None].expand(-1, *IMAGE) + 1


def write_store(
    folder: Path, clips: Clips, encoder: Callable[[list[int]], torch.Tensor] = encode_indices
) -> None:
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    distinct = distinct_clips(clips.rows)
    plan = make_plan(clips.rows, distinct, {}, "bfloat16", 2, bf16=False)
    with only_writer(folder):
        begin(folder, plan)
        if (folder / "index.json").exists():
            return
        shards = cut_into_shards(distinct, {"image": IMAGE}, "bfloat16", SHARD_BYTES)
        missing = missing_shards(folder, shards)
        list(write_shards(folder, missing, clips, encoder, dtype="bfloat16", batch_size=2))
        write_index(folder, plan, shards)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_cache_features_rejects_a_second_run_while_one_is_writing(tmp_path, one_thread):
    """The first run completes undisturbed; once it is killed, another run continues its store."""
    clips, fork = Clips(tmp_path), get_context("fork")
    write_store(tmp_path / "expected", clips)
    for killed in (True, False):
        folder, reached, go_on = tmp_path / f"killed {killed}", fork.Event(), fork.Event()

        def wait(samples, reached=reached, go_on=go_on):
            if samples[0] == 8:
                reached.set()
                go_on.wait(600)  # only against a hang
            return encode_indices(samples)

        first = fork.Process(target=write_store, args=(folder, clips, wait))
        first.start()
        assert reached.wait(600)
        # Such a file would be an incomplete shard of the first run.
        (folder / "incomplete-here-1-00002.safetensors").touch()
        with pytest.raises(FeatureError, match=f"{folder}: another run is writing.*Wait until"):
            write_store(folder, clips)
        assert (folder / "incomplete-here-1-00002.safetensors").exists()
        first.kill() if killed else go_on.set()
        first.join()
        assert first.exitcode == (-signal.SIGKILL if killed else 0)
        if killed:
            write_store(folder, clips)
            assert content(folder) == content(tmp_path / "expected")
        else:
            assert content(folder).keys() - content(tmp_path / "expected").keys() == {
                "incomplete-here-1-00002.safetensors"
            }


def test_cache_features_killed_twenty_times_continues_to_the_same_store(tmp_path, one_thread):
    """Two runs start each time and are killed, wherever they are."""
    clips, fork, moments = Clips(tmp_path), get_context("fork"), random.Random(0)
    write_store(tmp_path / "expected", clips)

    def slow(samples):
        time.sleep(0.001)
        return encode_indices(samples)

    for _ in range(20):
        runs = [
            fork.Process(target=write_store, args=(tmp_path / "store", clips, slow))
            for _ in range(2)
        ]
        for run in runs:
            run.start()
        time.sleep(moments.uniform(0, 0.05))
        for run in runs:
            run.kill()
            run.join()
        for shard in (tmp_path / "store").glob("0*.safetensors"):
            assert shard.read_bytes() == (tmp_path / "expected" / shard.name).read_bytes()
    write_store(tmp_path / "store", clips)
    (tmp_path / "store" / "lock").unlink(missing_ok=True)  # of a run killed after its last write
    assert content(tmp_path / "store") == content(tmp_path / "expected")


def outcome(folder: Path, clips: Clips, results) -> None:
    try:
        write_store(folder, clips)
        results.put("")
    except (FeatureError, OutputError) as error:
        results.put(str(error))


@pytest.mark.slow
def test_cache_features_of_two_runs_is_written_by_one_in_ten_rounds(tmp_path, one_thread):
    """One run writes; the other is refused, or finds the complete store."""
    clips, fork = Clips(tmp_path), get_context("fork")
    write_store(tmp_path / "expected", clips)
    for number in range(10):
        folder, results = tmp_path / f"store{number}", fork.SimpleQueue()
        runs = [fork.Process(target=outcome, args=(folder, clips, results)) for _ in range(2)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        first, second = sorted(results.get() for _ in runs)
        assert first == "" and (second == "" or "another run is writing" in second)
        # The refused run may have made the lock's file again.
        assert content(folder).items() - {("lock", b"")} == content(tmp_path / "expected").items()


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        pytest.param(100, 0, id="within the plan"),
        pytest.param(500, 0, id="within a shard"),
        pytest.param(-1, 20, id="within the index"),
    ],
)
def test_cache_features_reports_a_full_disk_and_continues(tmp_path, one_thread, size, kept):
    clips, folder = Clips(tmp_path, 60), tmp_path / "store"
    write_store(tmp_path / "expected", clips)
    if size < 0:  # one byte less than the index, which is larger than a shard
        size += (tmp_path / "expected" / "index.safetensors").stat().st_size
    errors = (FeatureError, OutputError)
    message = message_on_a_full_disk(lambda: write_store(folder, clips), size, errors)
    assert message.startswith(f"{folder}: it cannot be written (") and "\n" not in message
    assert message.endswith("Its complete shards are kept; the same command continues.")
    assert len(list(folder.glob("0*"))) == kept
    write_store(folder, clips)
    assert content(folder) == content(tmp_path / "expected")


def test_cache_features_leaves_a_complete_store_unchanged(recipe, whole, capsys, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr(cache_features, "try_out", None)
    cache(recipe, whole)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--dtype", "int8"], "dtype is bfloat16 there and int8 here"),
        (["--batch-size", "2"], "batch_size is 32 there and 2 here"),
        (["training.precision=bf16"], "precision is fp32 there and bf16 here"),
        (["training.seed=5"], "the X-Encoder has other weights"),
        (["processor.num_frames=8"], "num_frames is 4 there and 8 here"),
    ],
)
def test_cache_features_rejects_a_store_of_other_settings(recipe, whole, options, difference):
    with pytest.raises(FeatureError, match=f"begun with other settings: .*{difference}"):
        cache(recipe, whole, *options)


def test_cache_features_rejects_a_store_of_other_clips(recipe, whole, tmp_path):
    row = {"image": str(recipe.parent / "0.png"), "target": "x", "query": "y"}
    sources = json.dumps([{"rows": str(write_rows(tmp_path / "fewer.jsonl", [row]))}])
    with pytest.raises(FeatureError, match=r"media is 9 clips .* there and 1 clips .* here"):
        cache(recipe, whole, f"data.sources={sources}", "model.vocab_size=300")


def test_cache_features_adds_the_windows_of_streams(recipe, tmp_path, capsys, monkeypatch):
    for name in ("wide.mp4", "tall.mkv"):
        row = {"video": str(recipe.parent / name), "events": [{"time": 0, "text": "a cat"}]}
        write_rows(tmp_path / f"{name}.jsonl", [row])
    clips = {"task": "retrieval", "description": "Clips.", "rows": f"{tmp_path}/wide.mp4.jsonl"}
    streams = clips | {"task": "streaming", "stride": 2, "num_frames": 2}
    streams["validation_rows"] = f"{tmp_path}/tall.mkv.jsonl"
    file = tmp_path / "benchmarks.yaml"
    file.write_text(json.dumps({"streams": streams, "clips": clips}))
    folder, options = tmp_path / "store", ["--dtype", "int8", "--benchmarks", str(file)]
    cache(recipe, folder, *options, "--streams", "streams")
    assert "wide.mp4: 3 windows of 2 frames" in capsys.readouterr().out
    before = content(folder)
    facts = [json.loads(before[name]) for name in before if re.fullmatch("stream-.*json", name)]
    assert sorted((len(each["times"]), each["dtype"]) for each in facts) == [
        (3, "int8"),
        (5, "int8"),
    ]
    monkeypatch.setattr(StreamEncoder, "encode", None)  # a call would raise a TypeError
    cache(recipe, folder, *options, "--streams", "streams")
    assert content(folder) == before
    model, processor, _ = read_as_training(read_recipe(str(recipe), []))
    store = StreamStore.open(folder, model, processor.video_processor, num_frames=2)
    video = str(recipe.parent / "tall.mkv")
    read_back = list(store.stream(video, stride=2, fps=None).batches(3))
    assert [len(times) for times, _ in read_back] == [3, 2]
    with processor.watch(video, window=2, stride=2) as windows:
        pixels = torch.stack([window.pixel_values for window in windows])
    live = model.encode_video(pixels)
    error = (torch.cat([tokens for _, tokens in read_back]).float() - live).norm() / live.norm()
    assert 1e-4 < error < 0.02
    with pytest.raises(FeatureError, match="--streams: clips has no streams"):
        cache(recipe, folder, *options, "--streams", "clips")
    with pytest.raises(SystemExit):
        cache(recipe, folder, "--streams", "streams")
    assert "give both or neither" in capsys.readouterr().err


def test_cache_features_rejects_a_folder_with_other_files(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FeatureError, match="other files"):
        cache(recipe, tmp_path)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def assert_same_features(folder: Path, other: Path) -> None:
    """Compare two stores whose frames were resized by different processes."""
    assert [path.name for path in sorted(folder.iterdir())] == [
        path.name for path in sorted(other.iterdir())
    ]
    assert read(folder / "plan.json") == read(other / "plan.json")
    for path in sorted(folder.glob("*.safetensors")):
        found, expected = load_file(path), load_file(other / path.name)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name in ("features", "errors"):
                # One grey level of a pixel, and one unit of bfloat16's eight bits.
                atol = 2**-7 * tensor.float().abs().max().item()
                torch.testing.assert_close(
                    found[name].float(), tensor.float(), rtol=2**-7, atol=atol
                )
            else:
                assert torch.equal(found[name], tensor), name


def test_cache_features_decodes_in_workers_without_decode_once(recipe, whole, tmp_path):
    cache(recipe, tmp_path / "store", "data.decode_once=false", "training.dataloader_num_workers=2")
    assert_same_features(tmp_path / "store", whole)


@pytest.mark.slow
def test_cache_features_on_two_processes_writes_the_store_of_one(recipe, whole, tmp_path):
    script = f"""
from functools import partial
from training import cache_features
cut = cache_features.cut_into_shards
cache_features.cut_into_shards = partial(cut, shard_bytes={SHARD_BYTES})
cache_features.main([{str(recipe)!r}, "--output", {str(tmp_path / "store")!r}])
"""
    (tmp_path / "two.py").write_text(script, encoding="utf-8")
    # As many threads as here: matrix products may round otherwise with another number.
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(tmp_path / "two.py")),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,  # only against a hang
    )
    assert done.returncode == 0, done.stderr
    assert "by 2 process(es)" in done.stdout
    assert content(tmp_path / "store") == content(whole)
