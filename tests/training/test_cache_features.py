"""The command that writes a feature store: what it says before, and what a kill leaves of it."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from processing.feature_store import FeatureError
from tests.tiny import noise, tiny_recipe, tiny_rows, write_rows
from training import cache_features
from training.arguments import RecipeError
from training.cache_features import main
from training.data import feature_writer as feature_store
from training.data.feature_writer import clip_bytes, cut_into_shards

ROOT = Path(__file__).parents[2]
IMAGE, VIDEO = (4, 48), (8, 48)  # tokens and width of a tiny clip
SHARD_BYTES = 3 * clip_bytes(IMAGE, "bfloat16")  # three images, or one video


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, and seven images of which the first stands in two rows."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [json.loads(line) for line in tiny_rows(folder).read_text().splitlines()]
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


def cache(recipe: Path, folder: Path, *options: str) -> None:
    main([str(recipe), "--output", str(folder), *options])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A store that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        size = 3 * clip_bytes(IMAGE, "bfloat16")
        patch.setattr(cache_features, "cut_into_shards", partial(cut_into_shards, shard_bytes=size))
        cache(recipe, folder)
    return folder


# -- what is written -------------------------------------------------------------------------


def test_a_store_has_every_clip_once(whole):
    assert sorted(content(whole)) == [
        *(f"{number:05d}.safetensors" for number in range(5)),
        "index.json",
        "index.safetensors",
        "plan.json",
    ]
    index = json.loads((whole / "index.json").read_text())
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


def test_others_may_read_what_they_may_list(whole):
    """`safetensors` makes files for their owner alone."""
    modes = {path.stat().st_mode & 0o777 for path in whole.iterdir()}
    assert modes == {(whole / "plan.json").stat().st_mode & 0o777}
    assert modes != {0o600}


def test_int8_takes_half_the_space(recipe, whole, tmp_path, capsys):
    cache(recipe, tmp_path / "int8", "--dtype", "int8", "training.seed=0")
    index = json.loads((tmp_path / "int8" / "index.json").read_text())
    assert index["shards"] == 3  # six images, one image, two videos … in as many bytes
    sizes = [
        load_file(path)[name].nbytes
        for path in sorted((tmp_path / "int8").glob("0*"))
        for name in ("features", "scales")
    ]
    assert sum(sizes) == 7 * clip_bytes(IMAGE, "int8") + 2 * clip_bytes(VIDEO, "int8")
    error = index["relative_error"]
    assert f"relative error {error['mean']:.2e} on average" in capsys.readouterr().out
    half = json.loads((whole / "index.json").read_text())["relative_error"]
    assert half["mean"] < error["mean"] / 2


# -- what it says before it starts -----------------------------------------------------------


def test_size_and_time_are_said_before(recipe, tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(
        cache_features, "write_shards", lambda *_, **__: written.append(capsys.readouterr().out)
    )
    with pytest.raises(TypeError):  # nothing was written to go through
        cache(recipe, tmp_path / "store")
    (said,) = written
    assert "7 images of 4 tokens of 48: 384B and " in said
    assert "2 videos of 8 tokens of 48: 768B and " in said
    assert "4.22kB in bfloat16, with " in said
    assert "; about 0:00:0" in said


def test_what_does_not_fit_is_refused_with_numbers(recipe, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 7 * clip_bytes(IMAGE, "bfloat16") + 2 * clip_bytes(VIDEO, "bfloat16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(FeatureError, match="4.22kB are to be written and 4.22kB are free.*int8"):
        cache(recipe, tmp_path / "store")
    assert sorted(content(tmp_path / "store")) == ["plan.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    cache(recipe, tmp_path / "store")


def test_what_changes_or_is_not_known_is_refused(recipe, tmp_path):
    with pytest.raises(FeatureError, match="X-Encoder trains"):
        cache(recipe, tmp_path / "store", "model.config.freeze_vision=false")
    rows = recipe.parent / "rows.jsonl"
    with pytest.raises(FeatureError, match="augment: true"):
        cache(recipe, tmp_path / "store", f"data.sources=[{{rows: {rows}, augment: true}}]")
    with pytest.raises(FeatureError, match="rows.jsonl is streamed"):
        cache(recipe, tmp_path / "store", f"data.sources=[{{rows: {rows}, streaming: true}}]")
    assert not (tmp_path / "store").exists()


def test_too_many_broken_files_are_refused_and_few_are_named(tmp_path, capsys):
    rows = tiny_rows(tmp_path)
    (tmp_path / "wide.png").write_bytes(b"no picture")
    recipe = tiny_recipe(rows)
    with pytest.raises(RecipeError, match="1 of 4 rows are unusable"):
        cache(recipe, tmp_path / "store")
    cache(recipe, tmp_path / "store", "data.max_bad_share=0.25")
    out = capsys.readouterr().out
    assert "1 of 4 rows are unusable" in out and "wide.png" in out
    assert json.loads((tmp_path / "store" / "index.json").read_text())["clips"] == 3


def test_features_that_are_no_numbers_are_refused(recipe, tmp_path, monkeypatch):
    encode = feature_store.Encoder.__call__

    def broken(self, samples):
        tokens = encode(self, samples).clone()
        if len(tokens) == 1 and tokens.shape[1] == VIDEO[0]:
            tokens[0, 3, 5] = float("nan")
        return tokens

    monkeypatch.setattr(feature_store.Encoder, "__call__", broken)
    with pytest.raises(FeatureError, match=r"video .*wide\.mp4: .*NaN or infinite.*precision=fp32"):
        cache(recipe, tmp_path / "store")


# -- kills -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["00000.safetensors", "00003.safetensors", "index.safetensors"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    recipe, whole, tmp_path, monkeypatch, file
):
    """In the middle of a file; nothing that is there already is computed again."""
    save, encode, encoded = feature_store.save_file, feature_store.Encoder.__call__, []

    def count(self, samples):
        encoded.append(len(samples))
        return encode(self, samples)

    def killed(tensors, path):
        save(tensors, path)
        if path.name.endswith(file):
            os.truncate(path, 100)
            raise KeyboardInterrupt
        assert not (path.parent / file).exists()

    folder = tmp_path / "store"
    monkeypatch.setattr(feature_store.Encoder, "__call__", count)
    monkeypatch.setattr(feature_store, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cache(recipe, folder)
    assert f"incomplete-{file}" in content(folder)
    assert "index.json" not in content(folder)
    monkeypatch.setattr(feature_store, "save_file", save)
    encoded.clear()
    cache(recipe, folder)
    assert content(folder) == content(whole)
    trial = [1, 7, 1, 2]
    left = {"00000.safetensors": [3, 3, 1, 1, 1], "00003.safetensors": [1, 1]}
    assert encoded == trial + left.get(file, [])


def test_a_complete_store_is_left_as_it_is(recipe, whole, capsys, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr(cache_features, "try_out", None)
    cache(recipe, whole)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert "complete already" in capsys.readouterr().out


def test_another_plan_is_not_mixed_in(recipe, whole, tmp_path):
    for options, name in (
        (["--dtype", "int8"], "dtype is bfloat16 there and int8 here"),
        (["--batch-size", "2"], "batch_size is 32 there and 2 here"),
        (["training.precision=bf16"], "precision is fp32 there and bf16 here"),
        (["training.seed=5"], "the X-Encoder has other weights"),
        (["processor.num_frames=8"], "num_frames is 4 there and 8 here"),
    ):
        with pytest.raises(FeatureError, match=f"begun with other settings: .*{name}"):
            cache(recipe, whole, *options)
    rows = write_rows(
        recipe.parent / "fewer.jsonl", [{"image": "0.png", "target": "x", "query": "y"}]
    )
    with pytest.raises(FeatureError, match=r"media is 9 clips .* there and 1 clips .* here"):
        cache(recipe, whole, f"data.sources=[{{rows: {rows}}}]", "model.vocab_size=300")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FeatureError, match="other files"):
        cache(recipe, tmp_path)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_clips_that_were_not_decoded_before_are_decoded_by_workers(recipe, whole, tmp_path):
    cache(recipe, tmp_path / "store", "data.decode_once=false", "training.dataloader_num_workers=2")
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.slow
def test_two_processes_write_what_one_does(recipe, whole, tmp_path):
    script = f"""
from functools import partial
from training import cache_features
cut = cache_features.cut_into_shards
cache_features.cut_into_shards = partial(cut, shard_bytes={SHARD_BYTES})
cache_features.main([{str(recipe)!r}, "--output", {str(tmp_path / "store")!r}])
"""
    (tmp_path / "two.py").write_text(script)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(tmp_path / "two.py")),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "by 2 process(es)" in done.stdout
    assert content(tmp_path / "store") == content(whole)
