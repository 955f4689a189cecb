"""Embeddings on disk are computed once, continue after a kill, and are not read if damaged."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import models
from eval.embed import embed_texts, predict_rows, work
from eval.embedding_store import EmbeddingStore, facts_of, weights_digest
from eval.evaluate import main
from eval.items import FILE, PREDICTIONS
from eval.team import Team
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor, read_rows
from processing.output import OutputError, incomplete_files
from tests.tiny import HANG_SECONDS, tiny_model, tiny_processor, tiny_rows, write_rows

ROOT = Path(__file__).parents[2]
TEXTS = ["a cat", "red", "he rides a bike", "the door opens"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images and two videos, and the model and the benchmarks of the command."""
    folder = tmp_path_factory.mktemp("data")
    tiny_rows(folder)
    tiny_model().save_pretrained(folder / "model")
    tiny_processor(num_frames=2).save_pretrained(folder / "model")
    recipes = [{"training": {"output_dir": "runs/pretrain", "seed": 7}}]
    recipes += [{"training": {"output_dir": "runs/sft"}}]
    (folder / "model" / "recipes.yaml").write_text(json.dumps(recipes))
    rows = [{**row, "query": ""} for row in read_rows(folder / "rows.jsonl")[0]]
    write_rows(folder / "labels.jsonl", rows)
    entry = {"rows": "labels.jsonl", "description": "Labels.", "query": "what is it ?"}
    benchmarks = {
        "labels": {"task": "classification", **entry},
        "clips": {"task": "retrieval", **entry},
    }
    (folder / "benchmarks.yaml").write_text(json.dumps(benchmarks))
    return folder


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


@pytest.fixture
def rows(data) -> list[dict]:
    return read_rows(data / "rows.jsonl")[0]


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The sizes of the batches that the X-Encoder and, negative, the Y-Encoder encode."""
    sizes: list[int] = []
    clips, texts = VLJEPAModel.encode_video, VLJEPAModel.encode_target

    def encode_video(self, pixels):
        sizes.append(len(pixels))
        return clips(self, pixels)

    def encode_target(self, target_input_ids, **others):
        sizes.append(-len(target_input_ids))
        return texts(self, target_input_ids, **others)

    monkeypatch.setattr(VLJEPAModel, "encode_video", encode_video)
    monkeypatch.setattr(VLJEPAModel, "encode_target", encode_target)
    return sizes


def opened(folder: Path, model: VLJEPAModel, processor: VLJEPAProcessor) -> EmbeddingStore:
    return EmbeddingStore.open(folder, facts_of(model, processor, weights_digest(model)))


# -- computed once -------------------------------------------------------------------------


def test_predict_rows_and_embed_texts_with_a_store_embed_nothing_twice(
    tmp_path, model, processor, rows, encoded
):
    plain = predict_rows(model, processor, rows)
    texts = embed_texts(model, processor, TEXTS)
    for _ in range(2):  # an empty store, and the complete one read from the disk
        encoded.clear()
        store = opened(tmp_path, model, processor)
        found = predict_rows(model, processor, rows, store=store)
        torch.testing.assert_close(found.embeds, plain.embeds, atol=1e-6, rtol=0)
        stored = embed_texts(model, processor, [*TEXTS, "red"], store=store)
        torch.testing.assert_close(stored, texts[[0, 1, 2, 3, 1]], atol=1e-6, rtol=0)
    assert encoded == []
    # Several queries about a clip share one pass of the X-Encoder.
    asked = [row | {"query": query} for row in rows for query in ("who ?", "where ?", "who ?")]
    predict_rows(model, processor, asked, store=store)
    assert encoded == [2, 2]  # images, videos


def test_predict_rows_embeds_copies_of_a_file_once(tmp_path, model, processor, rows, encoded):
    clip = next(row for row in rows if "video" in row)
    copy = {**clip, "video": shutil.copy(clip["video"], tmp_path / "copy.mp4")}
    broken = [{**clip, "video": str(tmp_path / f"{name}.mp4")} for name in "ab"]
    for row in broken:
        Path(row["video"]).write_bytes(b"no video")
    store = opened(tmp_path / "store", model, processor)
    found = predict_rows(model, processor, [clip, copy, *broken], store=store)
    assert encoded == [1]
    assert found.rows == [clip, copy]
    assert torch.equal(found.embeds[0], found.embeds[1])
    assert [*found.broken] == [row["video"] for row in broken]


def test_embedding_store_keys_hold_the_content_and_what_is_done_with_it(
    tmp_path, model, processor, rows, encoded
):
    """A moved file is found; another query, number of frames, content or model is not."""
    store = opened(tmp_path / "store", model, processor)
    image, video = rows[0], rows[2]
    predict_rows(model, processor, [image, video], store=store)

    def computed(row: dict, **options: object) -> int:
        encoded.clear()
        predict_rows(model, processor, [row], store=store, **options)
        return sum(encoded)

    moved = str(tmp_path / "moved.mp4")
    shutil.copy(video["video"], moved)
    assert computed(video | {"video": moved}) == 0
    assert computed(image, num_frames=4) == 0  # an image has one frame
    assert computed(video, num_frames=4) == 1
    assert computed(video | {"query": "who ?"}) == 1
    assert computed(video | {"end": 0.3}) == 1
    assert computed(video, states="both") == computed(video, states="final") == 1
    assert computed(video, ablation="grey") == 1
    assert computed(video, states="both") == computed(video, ablation="grey") == 0
    with open(moved, "ab") as file:
        file.write(b"\0")
    assert computed(video | {"video": moved}) == 1
    other = opened(tmp_path / "store", tiny_model(seed=1), processor)
    assert not other.embeds and other.writer.folder != store.writer.folder
    other = opened(tmp_path / "store", tiny_model().to(torch.bfloat16), processor)
    assert not other.embeds


# -- kills ---------------------------------------------------------------------------------


def test_predict_rows_continues_after_a_kill(
    tmp_path, model, processor, rows, encoded, monkeypatch
):
    """The third batch of the first run fails; the second run computes that and what follows."""
    expected = predict_rows(model, processor, rows, batch_size=1)
    encode = VLJEPAModel.encode_video

    def killed(self, pixels):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(self, pixels)

    encoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(VLJEPAModel, "encode_video", killed)
        with pytest.raises(KeyboardInterrupt):
            store = opened(tmp_path, model, processor)
            predict_rows(model, processor, rows, batch_size=1, store=store)
    # A kill while a part is written leaves files of other names: ours, and safetensors' own.
    folder = store.writer.folder
    old = [folder / "incomplete-host-1-a.safetensors", folder / ".tmpAbC123"]
    new = [folder / "incomplete-host-2-a.safetensors", folder / ".tmpAbC124"]
    for path in old + new:
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (0, 0))
    encoded.clear()
    store = opened(tmp_path, model, processor)
    found = predict_rows(model, processor, rows, batch_size=1, store=store)
    assert encoded == [1, 1]
    assert found.rows == expected.rows and found.queries == expected.queries
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    # The new files may belong to a run that writes them now.
    assert incomplete_files(folder) == sorted(new)


# -- damage --------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one number: the file can still be read."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


def replace_by_foreign(path: Path) -> None:
    """Write a part of another model's facts, with a correct hash of its content."""
    save_file(load_file(path), path, metadata={"facts": "0" * 32, "checksum": "0" * 32})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "damaged ("),
        (flip, "damaged (its content has changed since it was written)"),
        (replace_by_foreign, "of another model, other settings or other versions"),
    ],
    ids=["cut", "flip", "foreign"],
)
def test_embedding_store_names_a_bad_part_and_makes_it_again(
    tmp_path, model, processor, rows, encoded, capsys, damage, reason
):
    store = opened(tmp_path, model, processor)
    expected = predict_rows(model, processor, rows, store=store)  # a part of images, one of videos
    part = min(store.writer.folder.glob("*.safetensors"))
    damage(part)
    encoded.clear()
    store = opened(tmp_path, model, processor)
    assert f"{part}: " in (printed := capsys.readouterr().out)
    assert reason in printed
    found = predict_rows(model, processor, rows, store=store)
    assert encoded == [2]
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    opened(tmp_path, model, processor)
    assert capsys.readouterr().out == ""


def test_embedding_store_names_embeddings_of_other_models_and_refuses_other_folders(
    tmp_path, model, processor, capsys
):
    store = opened(tmp_path / "store", model, processor)
    (tmp_path / "store" / ("0" * 32)).mkdir()  # of a run that was killed before its facts
    opened(tmp_path / "store", tiny_model(seed=1), processor)
    printed = capsys.readouterr().out
    assert f"{store.writer.folder}: not read: hash of the weights is " in printed
    for name in ("photo.jpg", "other/photo.jpg"):
        folder = tmp_path / name.replace("/", " ")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
        with pytest.raises(OutputError, match=f"{folder} has other files .{name.split('/')[0]}"):
            opened(folder, model, processor)
        assert (folder / name).is_file()


def broken_model() -> VLJEPAModel:
    """Return a model whose heads give NaN."""
    model = tiny_model()
    for head in (model.predictor_head, model.y_head):
        next(head.parameters()).data.fill_(torch.nan)
    return model


@pytest.mark.parametrize("kind", ["clip", "text"])
def test_embeddings_that_are_not_finite_name_the_clip_or_text(tmp_path, processor, rows, kind):
    model = broken_model()
    store = opened(tmp_path, model, processor)
    with pytest.raises(ValueError, match=r"(wide.png|the text 'a cat'): its embedding holds NaN"):
        if kind == "clip":
            predict_rows(model, processor, rows, store=store)
        else:
            embed_texts(model, processor, TEXTS, store=store)
    assert not list(store.writer.folder.glob("*.safetensors"))


# -- processes -----------------------------------------------------------------------------


def pair(model: VLJEPAModel, processor: VLJEPAProcessor) -> Team:
    """Return a team of two, whose second process has this model and works in this process."""
    sent: list[bytes] = []

    class Pair(Team):
        def share(self, jobs: list) -> object:
            sent.append(pickle.dumps(jobs[1]))
            return jobs[0]

        def collect(self, result: object) -> list:
            second = work(model, processor, pickle.loads(sent.pop()))
            return [result, pickle.loads(pickle.dumps(second))]

    return Pair(size=2)


def test_two_processes_embed_what_one_does(tmp_path, model, processor, rows, encoded):
    broken = rows[0] | {"image": str(tmp_path / "broken.png")}
    Path(broken["image"]).write_bytes(b"no picture")
    rows = [rows[0], broken, *rows[1:]]
    expected = predict_rows(model, processor, rows)
    facts = facts_of(model, processor, weights_digest(model))
    store = EmbeddingStore.open(tmp_path / "store", facts, pair(model, processor))
    encoded.clear()
    found = predict_rows(model, processor, rows, store=store)
    assert sorted(encoded) == [1, 1, 2]  # an image and a video; an image that is read, one not
    assert (found.rows, found.broken) == (expected.rows, expected.broken)
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    texts = ["one", "two", "three"]  # not in the memory of this model, which other tests share
    stored = embed_texts(model, processor, texts, store=store)
    assert sorted(encoded[3:]) == [-2, -1]
    expected = embed_texts(tiny_model(), processor, texts)
    torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)
    encoded.clear()  # both processes have stored their shares
    store = EmbeddingStore.open(tmp_path / "store", facts)
    predict_rows(model, processor, rows, store=store)
    embed_texts(tiny_model(), processor, texts, store=store)
    assert encoded == []


def test_an_error_of_a_second_process_is_raised_in_the_first(tmp_path, model, processor, rows):
    facts = facts_of(model, processor, weights_digest(model))
    store = EmbeddingStore.open(tmp_path / "store", facts, pair(broken_model(), processor))
    with pytest.raises(ValueError, match="tall.jpg: its embedding holds NaN or infinity"):
        predict_rows(model, processor, rows, store=store)


# -- the command ---------------------------------------------------------------------------

COMMAND = ["--model", "model", "--tasks", "all", "--benchmarks", "benchmarks.yaml"]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_evaluate_embeds_each_clip_once_for_all_benchmarks_and_runs(data, monkeypatch, encoded):
    monkeypatch.chdir(data)
    main([*COMMAND, "--output", "first", "--predictions"])
    assert [size for size in encoded if size > 0] == [2, 2]  # images and videos, two benchmarks
    results = (data / "first" / "results.json").read_bytes()
    predictions = lines_of(data / "first" / PREDICTIONS)
    encoded.clear()
    main([*COMMAND, "--output", "first"])
    assert encoded == []
    assert (data / "first" / "results.json").read_bytes() == results

    content = results_of(data / "first")
    assert content["revision"] is None and len(content["weights"]) == 32
    assert content["training_seeds"] == {"pretrain": 7, "sft": None}
    assert {"python", "torch", "transformers"} <= content["versions"].keys()
    assert not (data / "first" / PREDICTIONS).exists()  # that of the first run
    items = lines_of(data / "first" / FILE)
    assert [each["item"] for each in predictions] == [each["item"] for each in items]
    (label, *_) = predictions
    assert label["clips"] == [{"image": "wide.png", "line": 1}]
    assert label["texts"] == ["a cat"] and label["prediction"] in TEXTS
    assert label["scores"] == items[0]["scores"]


def test_results_state_the_commit_of_a_model_of_the_hub(monkeypatch):
    commit = "0123456789" * 4
    asked = {}

    def cached(name, file, revision):
        asked[name] = revision
        return f"hub/models--me--tiny/snapshots/{commit}/{file}"

    monkeypatch.setattr(models, "cached_file", cached)
    assert models.hub_commit("me/tiny", "v1") == commit
    assert asked == {"me/tiny": "v1"}


def near(found: object, expected: object) -> bool:
    """Compare results: floats to 1e-5, everything else exactly."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    return (
        found == pytest.approx(expected, abs=1e-5)
        if isinstance(expected, float)
        else (found == expected)
    )


@pytest.mark.slow
def test_evaluate_with_two_processes_gives_the_results_of_one(data, monkeypatch):
    monkeypatch.chdir(data)
    main([*COMMAND, "--output", "one"])
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "eval.evaluate", *COMMAND, "--output", "two"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert near(results_of(data / "two"), results_of(data / "one"))
    assert near(lines_of(data / "two" / FILE), lines_of(data / "one" / FILE))
    # Both processes stored parts: one benchmark's images, one's videos, and their texts.
    assert len(list((data / "two" / "embeddings").glob("*/*.safetensors"))) == 2 * 3
    assert done.stdout.count("labels: Labels.") == done.stderr.count("media:   0%") == 1
