"""Feature stores: features from disk equal those that the model computes, or they are refused."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from eval.embed import predict_rows
from eval.evaluate import main as evaluate
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing import feature_store as reading
from processing.feature_store import (
    FeatureError,
    FeatureStore,
    from_int8,
    made_with,
    to_int8,
)
from processing.rows import clip_key, content_key, file_stamp, read_rows
from tests.tiny import (
    TOWER,
    tiny_model,
    tiny_processor,
    tiny_recipe,
    tiny_rows,
    two_folders_of_equal_names,
    write_rows,
)
from training import train
from training.arguments import DataArguments, RecipeError, SourceArguments
from training.cache_features import main as cache_features
from training.data.collator import to_pixel_values
from training.data.dataset import ContrastiveDataset, build_dataset
from training.data.feature_writer import (
    Encoder,
    as_written,
    begin,
    check_recipe,
    clip_bytes,
    cut_into_shards,
    distinct_clips,
    make_plan,
    write_index,
    write_shards,
)
from training.data.sources import read_source
from training.loop import run as training_run
from training.loop.trainer import VLJEPATrainer

SHAPES = {"image": (4, 48), "video": (8, 48)}


def read_dataset(rows: Path, processor: VLJEPAProcessor) -> ContrastiveDataset:
    arguments = DataArguments(
        sources=[SourceArguments(rows=str(rows))],
        cache_dir=str(rows.parent / "cache"),
        num_workers=1,
    )
    sources = [read_source(source) for source in arguments.sources]
    return build_dataset(sources, processor.video_processor, arguments)


def write_store(
    folder: Path,
    dataset: ContrastiveDataset,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    dtype: str = "bfloat16",
    bf16: bool = False,
) -> None:
    """Write a store as `training.cache_features` does, with two clips in a shard."""
    video = processor.video_processor
    clips = distinct_clips(dataset.rows)
    facts = reading.made_with(model, video, video.num_frames)
    plan = make_plan(dataset.rows, clips, facts, dtype, batch_size=2, bf16=False)
    begin(folder, plan)
    shards = cut_into_shards(clips, SHAPES, dtype, shard_bytes=2000)
    encoder = Encoder(model, processor.video_processor, bf16)
    list(write_shards(folder, shards, dataset, encoder, dtype=dtype, batch_size=2))
    write_index(folder, plan, shards)


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, processor) -> ContrastiveDataset:
    """Two images and two videos; the first of each is in two rows. No test may change the files."""
    rows = tiny_rows(tmp_path_factory.mktemp("media"))
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join([*lines, lines[0], lines[2]]), encoding="utf-8")
    return read_dataset(rows, processor)


@pytest.fixture(scope="module")
def store(tmp_path_factory, dataset, model, processor) -> FeatureStore:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, dataset, model, processor)
    return FeatureStore.open(folder, model, processor.video_processor)


def computed(dataset: ContrastiveDataset, model: VLJEPAModel, processor, index: int):
    """Return the visual tokens `(N, Dx)` of a row, computed as in a training step."""
    frames = dataset[index]["frames"][None]  # (1, T, 3, h, w)
    pixels = to_pixel_values(frames, processor.video_processor)
    with torch.inference_mode():
        return model.encode_video(pixels)[0]


# -- reading ---------------------------------------------------------------------------------


def test_feature_store_returns_the_tokens_of_each_rows_clip(store, dataset, model, processor):
    assert len(store) == 4
    others = (1, 0, 3, 2, 1, 3)  # rows of the other clip of the same kind
    for index, (row, other) in enumerate(zip(dataset.rows, others, strict=True)):
        expected = computed(dataset, model, processor, index)
        # bfloat16 stores eight significant bits.
        torch.testing.assert_close(store[row].float(), expected, rtol=2**-8, atol=1e-5)
        found = store[dataset.rows[other]].float()
        assert (found - expected).abs().max() > 0.1  # positive control


def test_feature_store_in_int8_has_the_error_of_its_index(tmp_path, dataset, model, processor):
    write_store(tmp_path / "int8", dataset, model, processor, dtype="int8")
    store = FeatureStore.open(
        tmp_path / "int8", model, processor.video_processor, dtype=torch.float32
    )
    errors = []
    for index in range(4):
        exact = computed(dataset, model, processor, index)
        errors.append(((store[dataset.rows[index]] - exact).norm() / exact.norm()).item())
    stated = store.precision()["relative_error"]
    assert stated["mean"] == pytest.approx(sum(errors) / 4, rel=1e-4)
    assert stated["max"] == pytest.approx(max(errors), rel=1e-4)
    assert 1e-3 < stated["max"] < 1e-2


def test_to_int8_rounds_to_half_a_step_of_each_tokens_largest_value():
    tokens = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] *= 1000  # the other tokens have their own scales
    tokens[1, 1] = 0
    back = from_int8(*to_int8(tokens))
    step = tokens.abs().amax(dim=-1, keepdim=True) / 127
    assert ((back - tokens).abs() <= step * 0.5001).all()
    assert (back - tokens).abs().max() > 0.4 * step.max()
    assert torch.equal(back[1, 1], tokens[1, 1])


@pytest.mark.parametrize("peak", [3.0, 20.0])
def test_int8_error_follows_from_the_largest_value_and_the_mean_square(peak):
    """The formula of docs/features.md."""
    tokens = torch.randn(2, 50, 4096, generator=torch.Generator().manual_seed(0)).clamp(-2.9, 2.9)
    tokens /= tokens.pow(2).mean(dim=-1, keepdim=True).sqrt()
    tokens[..., 0] = peak
    errors = as_written(tokens, "int8")["errors"]
    assert errors.tolist() == pytest.approx([peak / 127 / 12**0.5] * 2, rel=0.06)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_clip_bytes_equal_the_sizes_in_the_documents(tokens):
    path = Path(__file__).parents[2] / "docs" / "features.md"
    sizes = [f"{clip_bytes((tokens, 1024), d) / 1e6:.2f} MB" for d in ("bfloat16", "int8")]
    line = rf"\| {tokens} +\| {sizes[0]} +\| {sizes[1]} "
    assert re.search(line, path.read_text(encoding="utf-8"))


def test_feature_store_returns_a_copy_of_one_clip(store, dataset):
    """A view would send the whole shard to another process."""
    tokens = store[dataset.rows[2]]
    assert tokens.untyped_storage().nbytes() == tokens.nbytes == 8 * 48 * 2
    assert len(pickle.dumps(store)) < 4000  # without the index


class Features(torch.utils.data.Dataset):
    """Dataset of the stored tokens of rows."""

    def __init__(self, store: FeatureStore, rows: list[dict]):
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store[self.rows[index]]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_feature_store_reads_the_same_in_worker_processes(store, dataset, context):
    rows = dataset.rows[2:4]
    store[rows[0]]  # a process that has read already can fork, too
    loader = DataLoader(Features(store, rows), num_workers=2, multiprocessing_context=context)
    for row, (tokens,) in zip(rows, loader, strict=True):
        assert torch.equal(tokens, store[row])


def test_clip_key_distinguishes_parts_kinds_and_contents():
    row = {"video": "a.mp4", "query": "", "target": "x"}
    keys = {
        clip_key(row),
        clip_key(row | {"start": 1.0}),
        clip_key(row | {"start": 1.0, "end": 2.0}),
        clip_key({"image": "a.mp4"}),
    }
    assert len(keys) == 4
    contents = [clip_key({"image": content}) for content in (b"one", b"two", b"one")]
    assert contents[0] == contents[2] != contents[1]
    assert clip_key(row) == clip_key(row | {"query": "what ?", "target": "y"})


def test_content_key_distinguishes_parts_kinds_and_contents_but_not_places(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).mkdir()
        for frame in ("0.bmp", "1.bmp"):
            (tmp_path / name / frame).write_bytes(content)
    one, same, other = (str(tmp_path / name / "0.bmp") for name in "abc")
    row = {"video": one, "query": "", "target": "x"}
    keys = {
        content_key(each)
        for each in (row, row | {"start": 1.0}, {"image": one}, {"video": other}, {"image": other})
    }
    assert len(keys) == 5
    assert content_key({"video": same}) == content_key(row)
    assert content_key({"image": one}) == content_key({"image": b"one"})
    folders = [content_key({"video": str(tmp_path / name)}) for name in "abc"]
    assert folders[0] == folders[1] != folders[2]
    (tmp_path / "b" / "1.bmp").rename(tmp_path / "b" / "2.bmp")  # the names are the order
    assert content_key({"video": str(tmp_path / "b")}) != folders[0]
    assert content_key({"image": str(tmp_path / "gone")}) == ""


# -- refusals --------------------------------------------------------------------------------


def test_weights_digest_is_the_same_in_fp32_and_bf16(model, tmp_path):
    digest = reading.weights_digest(model)
    model.save_pretrained(tmp_path / "fp32")
    assert reading.weights_digest(VLJEPAModel.from_pretrained(tmp_path / "fp32")) == digest
    half = VLJEPAModel.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bf16")
    again = VLJEPAModel.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert reading.weights_digest(half) == reading.weights_digest(again) == digest


def test_feature_store_rejects_a_model_with_one_other_weight(store, processor):
    other = tiny_model()
    with torch.no_grad():
        other.predictor.visual_projection.weight.add_(1)  # not part of the X-Encoder
    FeatureStore.open(store.folder, other, processor.video_processor)
    with torch.no_grad():
        next(other.x_encoder.parameters()).view(-1)[7].mul_(1.01)
    with pytest.raises(FeatureError, match="other weights.*training.cache_features RECIPE"):
        FeatureStore.open(store.folder, other, processor.video_processor)


def test_feature_store_names_other_preprocessing_and_length(store, model):
    other = tiny_processor().video_processor
    other.size = {"shortest_edge": 40}
    other.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(FeatureError) as error:
        FeatureStore.open(store.folder, model, other)
    assert "video_processor.size.shortest_edge is 36 there and 40 here" in str(error.value)
    assert "video_processor.image_mean is" in str(error.value)
    assert "num_frames" not in str(error.value)
    with pytest.raises(FeatureError, match="num_frames is 4 there and 8 here"):
        FeatureStore.open(store.folder, model, tiny_processor(num_frames=8).video_processor)
    with pytest.raises(FeatureError, match="num_frames is 4 there and 2 here"):
        FeatureStore.open(store.folder, model, tiny_processor().video_processor, num_frames=2)


def test_feature_store_names_another_vision_config(store, processor):
    """The number of heads changes no weight's shape."""
    other = tiny_model(vision_config={"num_attention_heads": 2})
    assert reading.weights_digest(other) == store.facts["made_with"]["weights"]
    with pytest.raises(FeatureError, match="vision_config.num_attention_heads is 4 there and 2"):
        FeatureStore.open(store.folder, other, processor.video_processor)
    # V-JEPA 2's own predictor is never run, so its settings may differ.
    same = tiny_model(vision_config={"pred_num_hidden_layers": 2})
    same.load_state_dict(tiny_model().state_dict())
    FeatureStore.open(store.folder, same, processor.video_processor)


def test_feature_store_has_pooled_tokens_and_rejects_another_pooling(
    store, dataset, processor, tmp_path
):
    pooled = tiny_model(visual_token_pooling=2)
    with pytest.raises(FeatureError, match="visual_token_pooling is 1 there and 2 here"):
        FeatureStore.open(store.folder, pooled, processor.video_processor)
    row = dataset.rows[2]
    means = store[row].float().unflatten(0, (2, 4)).mean(dim=1)  # 2 tubelets of 2 x 2 patches
    expected = computed(dataset, pooled, processor, 2)
    torch.testing.assert_close(expected, means, rtol=2**-7, atol=1e-2)


def test_feature_store_facts_tell_tokens_with_the_class_token_apart(processor):
    vision = {"model_type": "dinov2", **TOWER}
    joined = tiny_model(vision_config=vision, concatenate_class_token=True)
    plain = tiny_model(vision_config=vision)
    plain.x_encoder.load_state_dict(joined.x_encoder.state_dict())
    facts = [made_with(model, processor.video_processor, 2) for model in (plain, joined)]
    assert facts[1] == facts[0] | {"concatenate_class_token": True}


def test_feature_store_accepts_a_saved_and_loaded_model(store, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VLJEPAProcessor.from_pretrained(tmp_path)
    FeatureStore.open(store.folder, VLJEPAModel.from_pretrained(tmp_path), loaded.video_processor)


def test_check_recipe_rejects_a_trained_encoder_and_augmented_sources(model, tmp_path):
    rows = str(tiny_rows(tmp_path))
    sources = [read_source(SourceArguments(rows=rows))]
    check_recipe(model, sources)
    with pytest.raises(FeatureError, match="X-Encoder trains"):
        check_recipe(tiny_model(freeze_vision=False), sources)
    with pytest.raises(FeatureError, match=f"{re.escape(rows)} is augmented"):
        check_recipe(model, [read_source(SourceArguments(rows=rows, augment=True))])


def test_feature_store_accepts_a_model_whose_encoder_was_trained(store, processor):
    """In evaluation its weights do not change."""
    FeatureStore.open(store.folder, tiny_model(freeze_vision=False), processor.video_processor)


def test_feature_store_rejects_a_store_without_index(store, model, processor, tmp_path):
    shutil.copytree(store.folder, tmp_path / "half")
    (tmp_path / "half" / "index.json").unlink()
    with pytest.raises(FeatureError, match="no complete feature store.*cache_features"):
        FeatureStore.open(tmp_path / "half", model, processor.video_processor)


def test_feature_store_names_a_damaged_index(store, model, processor, tmp_path):
    shutil.copytree(store.folder, tmp_path / "cut")
    for name in ("index.json", "plan.json"):
        (tmp_path / "cut" / name).write_text("{")
    with pytest.raises(FeatureError, match="cut/index.json: damaged .*Delete the folder"):
        FeatureStore.open(tmp_path / "cut", model, processor.video_processor)
    with pytest.raises(FeatureError, match="cut/plan.json: damaged .*Delete the folder"):
        begin(tmp_path / "cut", {})


def test_feature_store_counts_and_names_missing_clips(store, dataset, tmp_path):
    store.check(dataset.rows)
    assert store.missing(dataset.rows) == []
    strange = [{"image": str(tmp_path / f"{number}.png")} for number in range(7)]
    with pytest.raises(FeatureError) as error:
        store.check([*dataset.rows, *strange, *strange])
    assert "7 of 11 clips are not in it" in str(error.value)
    assert f"image {tmp_path / '4.png'}, …" in str(error.value)
    assert str(tmp_path / "5.png") not in str(error.value)
    assert store.missing([dataset.rows[0], *strange]) == strange
    with pytest.raises(FeatureError, match=r"1 of 1 clips are not in it: image .*3\.png"):
        store[strange[3]]
    # A file read as an image is another clip than the same file read as a video.
    assert store.missing([{"video": dataset.rows[0]["image"]}])


def test_feature_store_check_of_no_rows_raises_nothing(store):
    """An evaluation that finds all embeddings in its own store asks for no clip."""
    store.check([])
    assert store.missing([]) == []


def change(path: Path) -> bytes:
    """Change a file's content but not its size; return what it was."""
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def test_feature_store_rejects_changed_and_missing_files(tmp_path, model, processor):
    """They are found when a run starts, and when the row is read."""
    dataset = read_dataset(tiny_rows(tmp_path), processor)  # not the shared one: files change
    write_store(tmp_path / "store", dataset, model, processor)
    store = FeatureStore.open(tmp_path / "store", model, processor.video_processor)
    row = dataset.rows[0]
    path = Path(row["image"])
    before = change(path)
    for read in (lambda: store.check(dataset.rows), lambda: store[row]):
        with pytest.raises(FeatureError, match=r"clips are changed or missing: image .*wide"):
            read()
    path.write_bytes(before)  # the content counts: its time is another now
    store.check(dataset.rows)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FeatureError, match="1 of 4 clips are changed or missing"):
        store.check(dataset.rows)
    path.with_name("elsewhere").rename(path)
    assert len(store[row]) == 4


def test_feature_store_finds_files_that_were_moved_renamed_or_copied(tmp_path, model, processor):
    (tmp_path / "old").mkdir()
    rows = tiny_rows(tmp_path / "old")
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"video": "wide.mp4", "start": 0.1, "end": 0.4, "target": "a part"}\n')
    dataset = read_dataset(rows, processor)
    write_store(tmp_path / "store", dataset, model, processor)
    store = FeatureStore.open(tmp_path / "store", model, processor.video_processor)
    first = [store[row] for row in dataset.rows]
    shutil.move(tmp_path / "old", tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "wide.png").rename(tmp_path / "copy" / "renamed.png")
    text = (tmp_path / "copy" / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "copy" / "rows.jsonl").write_text(text.replace("wide.png", "renamed.png"))
    for folder in ("new", "copy"):
        there, _ = read_rows(tmp_path / folder / "rows.jsonl")
        store.check(there)
        assert store.missing(there) == []
        for row, tokens in zip(there, first, strict=True):
            assert torch.equal(store[row], tokens)
    with pytest.raises(FeatureError, match="5 of 5 clips are changed or missing"):
        store.check(dataset.rows)
    # Positive control: the part is not the whole.
    assert not torch.equal(first[4], first[2])
    change(tmp_path / "copy" / "wide.mp4")
    with pytest.raises(FeatureError, match=r"2 of 5 clips are not in it: video .*copy/wide\.mp4"):
        store.check(there)


def test_feature_store_never_mixes_up_folders_of_equal_names_sizes_and_times(
    tmp_path, model, processor
):
    rows = two_folders_of_equal_names(tmp_path / "one")
    both = [read_rows(each)[0][0] for each in rows]
    write_rows(tmp_path / "rows.jsonl", both)
    dataset = read_dataset(tmp_path / "rows.jsonl", processor)
    write_store(tmp_path / "store", dataset, model, processor)
    store = FeatureStore.open(tmp_path / "store", model, processor.video_processor)
    first = [store[row] for row in both]
    assert (first[0] - first[1]).abs().max() > 0.1
    shutil.move(tmp_path / "one", tmp_path / "two")
    for rows, tokens in zip(("a", "b"), first, strict=True):
        (row,), _ = read_rows(tmp_path / "two" / rows / "rows.jsonl")
        assert torch.equal(store[row], tokens)
    # A store of one folder has nothing for the other.
    dataset.rows, _ = read_rows(tmp_path / "two" / "a" / "rows.jsonl")
    write_store(tmp_path / "other", dataset, model, processor)
    other = FeatureStore.open(tmp_path / "other", model, processor.video_processor)
    assert torch.equal(other[dataset.rows[0]], first[0])
    with pytest.raises(FeatureError, match="1 of 1 clips are not in it"):
        other[read_rows(tmp_path / "two" / "b" / "rows.jsonl")[0][0]]


def test_file_stamp_changes_if_frames_swap_names(tmp_path):
    for number, colour in enumerate((10, 90, 170, 250)):
        Image.new("RGB", (40, 40), (colour,) * 3).save(tmp_path / f"{number}.bmp")
        os.utime(tmp_path / f"{number}.bmp", ns=(number, number))
    before = file_stamp(str(tmp_path))
    assert file_stamp(str(tmp_path)) == before
    for one, other in (("0.bmp", "x.bmp"), ("3.bmp", "0.bmp"), ("x.bmp", "3.bmp")):
        (tmp_path / one).rename(tmp_path / other)
    assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1
    assert file_stamp(str(tmp_path)) != before
    # Existing stores contain these values.
    found = (tmp_path / "0.bmp").stat()
    assert file_stamp(str(tmp_path / "0.bmp")) == [found.st_size, found.st_mtime_ns]
    assert file_stamp(str(tmp_path / "gone")) == [-1, -1]


# -- training --------------------------------------------------------------------------------


class Exchanged(FeatureStore):
    """Feature store that returns the features of the other image or the other video."""

    def __getitem__(self, row: dict) -> torch.Tensor:
        other = {"wide.png": "tall.jpg", "wide.mp4": "tall.mkv"}
        other |= {name: key for key, name in other.items()}
        kind = "video" if "video" in row else "image"
        path = Path(row[kind])
        return super().__getitem__({kind: str(path.with_name(other[path.name]))})


def refuse(*arguments: object) -> None:
    raise AssertionError("the X-Encoder was run")


def run(recipe: Path, *overrides: str) -> VLJEPATrainer:
    return train.main([str(recipe), *overrides])


def losses(trainer: VLJEPATrainer) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    # In fp32 the stored tokens are rounded to bf16, the live ones are not. In bf16 the Predictor's
    # first product rounds both; they differ where the X-Encoder computed another batch and a value
    # was rounded to the other side.
    [("fp32", 1e-2), ("bf16", 2e-2)],
)
def test_training_from_a_feature_store_has_the_losses_of_live_training(
    tmp_path, precision, tolerance
):
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=20, learning_rate=1e-4, precision=precision)
    live = losses(run(recipe))
    cache_features([str(recipe), "--output", str(tmp_path / "store")])
    from_store = f"data.features={tmp_path / 'store'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLJEPAModel, "encode_video", refuse)
        stored = losses(run(recipe, from_store))
        # Positive control: the features of the other clip of the same kind.
        patch.setattr(training_run, "FeatureStore", Exchanged)
        exchanged = losses(run(recipe, from_store))
    assert len(live) == 20
    assert (live - stored).abs().max() <= tolerance
    assert (live - exchanged).abs().median() > 0.2


def test_gradcache_from_a_feature_store_has_the_losses_of_whole_batches(tmp_path):
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=3, precision="fp32")
    cache_features([str(recipe), "--output", str(tmp_path / "store")])
    from_store = f"data.features={tmp_path / 'store'}"
    whole = losses(run(recipe, from_store))
    parts = losses(run(recipe, from_store, "training.gradient_cache_rows=1"))
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)


def test_training_names_what_a_feature_store_lacks(tmp_path):
    rows = tiny_rows(tmp_path)
    recipe = tiny_recipe(rows, max_steps=1)
    cache_features([str(recipe), "--output", str(tmp_path / "store")])
    from_store = f"data.features={tmp_path / 'store'}"
    with pytest.raises(FeatureError, match="not those of this model and processor: num_frames"):
        run(recipe, from_store, "processor.num_frames=2")
    with pytest.raises(FeatureError, match="The X-Encoder trains"):
        run(recipe, from_store, "model.config.freeze_vision=false")
    shutil.copy(tmp_path / "wide.png", tmp_path / "new.png")
    change(tmp_path / "new.png")
    with open(rows, "a") as file:
        file.write('{"image": "new.png", "target": "x"}\n')
    with pytest.raises(RecipeError, match=r"(?s)1 of 5 rows.*rows.jsonl:5: no features of it"):
        run(recipe, from_store)
    change(tmp_path / "wide.png")
    with pytest.raises(FeatureError, match="changed or missing"):
        run(recipe, from_store, "data.max_bad_share=0.5")


# -- evaluation ------------------------------------------------------------------------------


def test_predict_rows_from_a_feature_store_equals_live_ones(store, dataset, model, processor):
    rows = dataset.rows
    live = predict_rows(model, processor, rows, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLJEPAModel, "encode_video", refuse)
        stored = predict_rows(model, processor, rows, batch_size=2, features=store)
    assert stored.rows == live.rows
    torch.testing.assert_close(stored.embeds, live.embeds, atol=5e-3, rtol=0)
    # Positive control: the next row's clip and question.
    assert (stored.embeds.roll(1, 0) - live.embeds).abs().max() > 0.05


def test_predict_rows_reads_states_from_the_files_not_from_a_feature_store(
    store, dataset, model, processor
):
    videos = [row for row in dataset.rows if "video" in row]
    states = {"states": "both", "num_frames": 2}  # the store has 4 frames of each video
    from_files = predict_rows(model, processor, videos, **states).embeds
    found = predict_rows(model, processor, videos, features=store, **states).embeds
    torch.testing.assert_close(found, from_files, atol=1e-6, rtol=0)
    # Positive control: the whole clips.
    assert (found - predict_rows(model, processor, videos).embeds).abs().max() > 1e-3


def test_predict_rows_names_what_a_feature_store_lacks(store, dataset, model, processor, tmp_path):
    with pytest.raises(FeatureError, match="made with 4 frames per video, but 8 are requested"):
        predict_rows(model, processor, dataset.rows, num_frames=8, features=store)
    with pytest.raises(ValueError, match="grey"):
        predict_rows(model, processor, dataset.rows, ablation="grey", features=store)
    strange = {"image": str(tmp_path / "strange.png"), "query": "", "target": "x"}
    with pytest.raises(FeatureError, match=r"1 of 5 clips are not in it: image .*strange\.png"):
        predict_rows(model, processor, [*dataset.rows, strange], features=store)


def test_evaluate_reads_a_feature_store_and_reports_its_error(
    store, dataset, model, processor, tmp_path, capsys
):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    columns = ("image", "video", "target")
    rows = [{name: row[name] for name in columns if name in row} for row in dataset.rows]
    benchmark = {
        "task": "classification",
        "rows": str(write_rows(tmp_path / "labels.jsonl", rows)),
        "query": "what is it ?",
        "description": "clips",
    }
    (tmp_path / "benchmarks.yaml").write_text(yaml.safe_dump({"labels": benchmark}))
    options = ["--model", str(tmp_path / "model"), "--tasks", "labels"]
    options += ["--benchmarks", str(tmp_path / "benchmarks.yaml"), "--features", str(store.folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLJEPAModel, "encode_video", refuse)
        evaluate([*options])
    results = json.loads((tmp_path / "model" / "eval" / "results.json").read_text(encoding="utf-8"))
    assert results["features"] == store.precision()
    assert results["benchmarks"]["labels"]["protocol"]["rows"] == 6
    with pytest.raises(SystemExit):
        evaluate([*options, "--ablation", "grey"])
    assert "--features has none" in capsys.readouterr().err
