"""Tests of the mixture of sources, the dataset with its cache and bad rows, and the collator."""

import json
import re
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from processing import VLJEPAProcessor
from tests.tiny import (
    noise,
    tiny_processor,
    tiny_rows,
    tiny_tokenizer,
    two_folders_of_equal_names,
    write_clip,
    write_rows,
)
from training.arguments import AugmentArguments, DataArguments, RecipeError, SourceArguments
from training.data import dataset as data
from training.data.augmentation import augment
from training.data.collator import ContrastiveCollator, to_pixel_values
from training.data.dataset import ContrastiveDataset, build_dataset
from training.data.mixture import EPOCH_STRIDE, Bucket, MixtureSampler, Step
from training.data.sources import read_source, texts_of
from training.loop.run import small_source

BUCKETS = [
    Bucket(3.0, rows=np.arange(0, 50)),
    Bucket(1.0, rows=np.arange(100, 107)),
    Bucket(2.0, rows=np.arange(200, 230)),
]


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_rows(tmp_path)
    return tmp_path


def build(
    processor: VLJEPAProcessor, *sources: Path | SourceArguments, max_bad_share: float = 0.0
) -> ContrastiveDataset:
    arguments = [
        source if isinstance(source, SourceArguments) else SourceArguments(rows=str(source))
        for source in sources
    ]
    cache = Path(arguments[0].rows).parent / "cache"
    options = DataArguments(
        sources=arguments, max_bad_share=max_bad_share, cache_dir=str(cache), num_workers=1
    )
    return build_dataset(
        [read_source(source) for source in arguments], processor.video_processor, options
    )


def assert_same_frames(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare uint8 frames that two processes resized: they may round to neighbouring levels."""
    torch.testing.assert_close(found.int(), expected.int(), rtol=0, atol=1)


# -- the mixture ---------------------------------------------------------------------------


def numbers_of(sampler: MixtureSampler) -> list[list[int]]:
    """Return the numbers of every batch, lane after lane: `row + epoch * EPOCH_STRIDE`."""
    return [[number for lane in step.rows for number in lane] for step in sampler]


def batches(size: int = 8, number: int = 600, seed: int = 0) -> list[list[int]]:
    sampler = MixtureSampler(BUCKETS, size, number, seed)
    return [[number % EPOCH_STRIDE for number in batch] for batch in numbers_of(sampler)]


def bucket_of(index: int) -> int:
    return index // 100


def test_mixture_sequence_depends_on_the_seed_alone():
    sampler = MixtureSampler(BUCKETS, 8, 20, seed=1)
    first = numbers_of(sampler)
    assert first == numbers_of(sampler) == numbers_of(MixtureSampler(BUCKETS, 8, 20, seed=1))
    assert len(sampler) == len(first) == 20 and {len(batch) for batch in first} == {8}
    assert first != numbers_of(MixtureSampler(BUCKETS, 8, 20, seed=2))


def test_mixture_draws_each_batch_from_one_bucket_by_weight():
    counts = Counter()
    for batch in batches():
        assert len({bucket_of(index) for index in batch}) == 1
        counts[bucket_of(batch[0])] += 1
    # 600 draws: three standard deviations are 0.06.
    for number, bucket in enumerate(BUCKETS):
        assert counts[number] / 600 == pytest.approx(bucket.weight / 6, abs=0.06)


def test_mixture_repeats_small_buckets_and_skips_no_row():
    for number, bucket in enumerate(BUCKETS):
        rows = bucket.rows
        drawn = [i for batch in batches() for i in batch if bucket_of(i) == number]
        times, rest = divmod(len(drawn), len(rows))
        assert times >= 10
        for epoch in range(times):
            assert sorted(drawn[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows.tolist()
        assert len(set(drawn[times * len(rows) :])) == rest
        assert drawn[: len(rows)] != drawn[len(rows) : 2 * len(rows)]  # another order


def test_mixture_numbers_differ_between_epochs():
    numbers = sum(numbers_of(MixtureSampler(BUCKETS, 8, 600, seed=0)), [])
    assert len(set(numbers)) == len(numbers) == 4800
    seen = Counter(number % EPOCH_STRIDE for number in numbers)
    for row, times in seen.items():
        assert sorted(n // EPOCH_STRIDE for n in numbers if n % EPOCH_STRIDE == row) == list(
            range(times)
        )


def test_mixture_groups_rows_by_length_and_skips_no_row():
    lengths = np.random.default_rng(0).integers(1, 100, size=1000)
    rows = np.arange(1000)

    def rows_and_range(bucket: Bucket) -> tuple[list[int], float]:
        """Return the drawn rows, and the mean range of the lengths within a batch."""
        drawn = numbers_of(MixtureSampler([bucket], 10, 100, seed=0))
        ranges = [np.ptp(lengths[np.array(batch) % EPOCH_STRIDE]) for batch in drawn]
        return sorted(number for batch in drawn for number in batch), float(np.mean(ranges))

    plain, wide = rows_and_range(Bucket(1.0, rows=rows))
    grouped, narrow = rows_and_range(Bucket(1.0, rows=rows, lengths=lengths))
    assert plain == grouped == rows.tolist()
    assert narrow < 5 < 70 < wide
    order = numbers_of(MixtureSampler([Bucket(1.0, rows=rows, lengths=lengths)], 10, 100, seed=0))
    means = [lengths[batch].mean() for batch in order]
    assert abs(np.corrcoef(means, range(100))[0, 1]) < 0.2  # not from short to long


@pytest.mark.parametrize("size", [2, 4])
def test_mixture_draws_rows_of_a_clip_together_and_skips_no_row(size):
    clips = np.random.default_rng(0).integers(0, 200, size=1000)
    bucket = Bucket(1.0, rows=np.arange(1000), clips=clips, rows_per_clip=size)
    drawn = numbers_of(MixtureSampler([bucket], 40, 25, seed=0))
    assert sorted(sum(drawn, [])) == list(range(1000))
    order = clips[sum(drawn, [])]
    runs = Counter(len(list(run)) for _, run in groupby(order))
    # Groups of one clip rarely follow each other, and the last of a clip may be smaller.
    groups = sum(-(-count // size) for count in Counter(clips.tolist()).values())
    assert groups - 15 <= sum(runs.values()) <= groups
    assert runs[size] > 0.6 * 1000 / size
    distinct = np.mean([len(set(clips[batch])) for batch in drawn])
    single = numbers_of(MixtureSampler([Bucket(1.0, rows=np.arange(1000))], 40, 25, seed=0))
    assert distinct < 0.75 * np.mean([len(set(clips[batch])) for batch in single])
    # Where a clip comes in an epoch does not depend on its number.
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15


def test_dataset_groups_the_rows_of_a_clip_in_its_buckets(folder, processor):
    names = [{"video": name} for name in ("wide.mp4", "tall.mkv")] + [{"image": "wide.png"}]
    rows = [{**name, "query": query, "target": "x"} for query in "abc" for name in names]
    path = write_rows(folder / "grouped.jsonl", rows)
    dataset = build(processor, SourceArguments(rows=str(path), rows_per_clip=3))
    videos, images = dataset.buckets
    assert videos.rows.tolist() == [0, 1, 3, 4, 6, 7]
    assert videos.clips[0] == videos.clips[2] == videos.clips[4] != videos.clips[1]
    assert len(set(images.clips)) == 1 and videos.rows_per_clip == 3
    (step, *_) = MixtureSampler(dataset.buckets[:1], 3, 2, seed=0)
    batch = ContrastiveCollator(processor)(dataset.__getitems__(step).samples)
    assert batch["visual_index"].tolist() == [0, 0, 0] and len(batch["frames"]) == 1


# test_mixture.py has the tests of streamed sources in a mixture.


# -- samples -------------------------------------------------------------------------------


def test_dataset_samples_have_the_frames_of_the_processor(folder, processor):
    """Images and clips of different sizes are in one dataset."""
    dataset = build(processor, folder / "rows.jsonl")
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    for sample, row in zip(dataset, rows, strict=True):
        assert (sample["query"], sample["target"]) == (row["query"], row["target"])
        if "image" in row:
            clip = np.array(Image.open(folder / row["image"]))[None]
            expected = processor.video_processor(clip, do_sample_frames=False, **raw)
        else:
            expected = processor.video_processor(folder / row["video"], **raw)
        assert_same_frames(sample["frames"], expected["pixel_values_videos"][0])
    assert [len(sample["frames"]) for sample in dataset] == [1, 1, 4, 4]
    assert [bucket.rows.tolist() for bucket in dataset.buckets] == [[2, 3], [0, 1]]


def test_dataset_augments_a_row_differently_in_every_epoch(folder, processor):
    rows = folder / "rows.jsonl"
    plain = build(processor, rows)
    augmented = build(processor, SourceArguments(rows=str(rows), augment=True))
    for row in range(len(plain)):
        clips = [augmented[row + epoch * EPOCH_STRIDE]["frames"] for epoch in range(6)]
        assert all(clip.shape == plain[row]["frames"].shape for clip in clips)
        assert len({clip.numpy().tobytes() for clip in clips}) >= 5
        again = augmented[row + 3 * EPOCH_STRIDE]["frames"]
        assert torch.equal(clips[3], again)
        assert torch.equal(plain[row]["frames"], plain[row + EPOCH_STRIDE]["frames"])


MIRROR_AND_SHIFT = AugmentArguments(mirror=True, shift=0.125)


def test_augment_mirrors_and_shifts_all_frames_alike_and_repeats_the_edge():
    assert SourceArguments(rows="x", augment=True).augmentation == MIRROR_AND_SHIFT
    frame = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    clip = torch.cat([frame, 255 - frame]).expand(2, 3, 16, 16)
    columns, rows, mirrored = set(), set(), set()
    for epoch in range(200):
        first, second = augmented = augment(clip, (0, epoch), MIRROR_AND_SHIFT)
        assert torch.equal(first, 255 - second) and torch.equal(first[0], first[1])
        middle = augmented[0, 0, 8]  # each row of the pattern rises by one from left to right
        is_mirrored = bool(middle[8] > middle[9])
        centre = int(first[0, 8, 7 if is_mirrored else 8])
        mirrored.add(is_mirrored)
        rows.add(centre // 16 - 8)
        columns.add(centre % 16 - 8)
    assert mirrored == {False, True}
    assert rows == columns == {-2, -1, 0, 1, 2}
    tops = [augment(clip, (0, epoch), MIRROR_AND_SHIFT)[0, 0] for epoch in range(200)]
    repeated = [bool(top[0].eq(top[1]).all() and top[1].eq(top[2]).all()) for top in tops]
    assert 20 < sum(repeated) < 70  # one clip in five is shifted down by two


def square(height: int, width: int, side: int) -> torch.Tensor:
    """Return two frames, black with a white square of `side` pixels in the middle."""
    clip = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    clip[..., top : top + side, left : left + side] = 255
    return clip


def views(clip: torch.Tensor, **settings: object) -> list[torch.Tensor]:
    return [augment(clip, (0, epoch), AugmentArguments(**settings)) for epoch in range(100)]


@pytest.mark.parametrize("shape", [(64, 64), (48, 96)], ids=str)
def test_augment_scales_within_its_limits_and_keeps_the_shape_of_things(shape):
    """The area of a square of 16 pixels changes by the square of the factor, also in frames that
    are not square themselves."""
    found = views(square(*shape, 16), scale=[0.5, 1.5])
    sides = [(view[0, 0] / 255).sum().sqrt().item() / 16 for view in found]
    assert 0.45 < min(sides) < 0.6 and 1.4 < max(sides) < 1.55
    for view in found:
        assert torch.equal(view[0], view[1])  # all frames alike
        covered = view[0, 0] > 127
        assert abs(int(covered.any(dim=0).sum()) - int(covered.any(dim=1).sum())) <= 1


@pytest.mark.parametrize("shape", [(64, 64), (48, 96)], ids=str)
def test_augment_rotates_within_its_limits_and_does_not_shear(shape):
    clip = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    middle = shape[0] // 2
    clip[..., middle - 2 : middle + 2, shape[1] // 2 - 16 : shape[1] // 2 + 16] = 255  # a bar
    angles = []
    for view in views(clip, rotation=30):
        points = (view[0, 0] > 127).nonzero().double()
        values, vectors = torch.linalg.eigh(points.T.cov())
        angles.append(torch.atan(vectors[0, 1] / vectors[1, 1]).rad2deg().item())
        assert values[1].sqrt() == pytest.approx(32 / 12**0.5, rel=0.05)  # the length of the bar
    assert -31 < min(angles) < -25 and 25 < max(angles) < 31
    assert abs(np.mean(angles)) < 5


def test_augment_shifts_scaled_frames_by_a_share_of_their_size():
    columns = [
        (view[0, 0] > 127).nonzero()[:, 1].double().mean().item() - 31.5
        for view in views(square(64, 64, 16), scale=[0.999, 1], shift=0.25)
    ]
    assert -16.5 < min(columns) < -14 and 14 < max(columns) < 16.5


def test_augment_changes_colours_within_limits_and_nothing_else():
    clip = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    clip[:, 0, 4:8] = 150
    means = torch.stack([view.float().mean(dim=(0, 2, 3)) for view in views(clip, colour=0.2)])
    plain = clip.float().mean(dim=(0, 2, 3))
    ratios = means / plain
    assert ratios.min() > 0.8 * 0.9 * 0.98 and ratios.max() < 1.2 * 1.1 * 1.02
    assert ratios.std() > 0.05 and (ratios.max(dim=1)[0] - ratios.min(dim=1)[0]).max() > 0.05
    for view in views(clip, colour=0.2):
        assert torch.equal(view[0], view[1])
        assert view[0, 0].unique().numel() == 2  # equal pixels stay equal: nothing has moved
    assert all(torch.equal(view, clip) for view in views(clip))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"scale": [1.2, 0.8]}, r"augment.scale: it is \[1.2, 0.8\]; give the least"),
        ({"scale": [0.8]}, r"augment.scale: it is \[0.8\]"),
        ({"scale": ["a", 1]}, "augment.scale"),
        ({"rotation": 200}, "augment.rotation: it is 200.0; give 180 or less"),
        ({"shift": -0.1}, "augment.shift: it is -0.1; give 0 or more"),
        ({"colour": 2}, "augment.colour: it is 2.0; give 1 or less"),
        ({"color": 0.2}, "augment.color: no such key. Did you mean 'colour'?"),
    ],
    ids=str,
)
def test_source_rejects_changes_that_cannot_be_made(augment, message):
    with pytest.raises(RecipeError, match=message):
        SourceArguments(rows="x", augment=augment)


def test_dataset_buckets_divide_the_weight_of_their_source(folder, processor):
    """A source keeps its weight, whatever its number of rows and their kinds."""
    one = write_rows(folder / "one.jsonl", [{"image": "wide.png", "target": "x"}] * 3)
    three = [{"image": "wide.png", "target": "x"}] * 3 + [{"video": "wide.mp4", "target": "y"}]
    both = write_rows(folder / "both.jsonl", three)
    dataset = build(
        processor,
        SourceArguments(rows=str(one), weight=1.0, query="what ?"),
        SourceArguments(rows=str(both), weight=2.0),
    )
    shares = [(bucket.weight, bucket.rows.tolist()) for bucket in dataset.buckets]
    assert shares == [(1.0, [0, 1, 2]), (0.5, [6]), (1.5, [3, 4, 5])]
    assert [sample["query"] for sample in dataset] == ["what ?"] * 3 + [""] * 4


def test_dataset_groups_captions_of_a_clip_and_not_questions_about_it(folder, processor):
    """Two captions of a clip are interchangeable. Two questions have different answers, which the
    model has to learn."""
    clip = {"video": "wide.mp4"}
    rows = write_rows(
        folder / "groups.jsonl",
        [
            {**clip, "query": "describe", "target": "it opens", "group_id": "wide"},
            {**clip, "query": "describe", "target": "a door opens", "group_id": "wide"},
            {**clip, "query": "describe", "target": "it shuts", "group_id": 7},
            {**clip, "query": "describe", "target": "a door shuts", "group_id": "7"},
            {**clip, "query": "how many ?", "target": "two"},
            {**clip, "query": "what color ?", "target": "red"},
            {**clip, "query": "is it red ?", "target": "yes", "group_id": None},
            {**clip, "query": "is it open ?", "target": "yes", "group_id": None},
        ],
    )
    samples = list(build(processor, rows))
    groups = [sample["group_id"] for sample in samples]
    assert groups[0] == groups[1] and groups[2] == groups[3]
    assert len(set(groups)) == 6
    assert all(group >= 0 for group in groups[:4]) and all(group < 0 for group in groups[4:])
    targets = [sample["target_id"] for sample in samples]
    assert targets[6] == targets[7] and len(set(targets)) == 7
    assert min(targets) >= 0 and max(targets) < 2**63
    # A fixed value: processes and machines exchange these numbers.
    assert data.text_id("yes") == 7554999679630196041


# -- the cache -----------------------------------------------------------------------------


def test_dataset_decodes_a_file_again_only_if_it_or_a_setting_changes(
    folder, processor, monkeypatch
):
    rows = folder / "rows.jsonl"
    first = build(processor, rows)

    def names() -> set[str]:
        return {path.name for path in (folder / "cache").glob("*.arrow")}

    files = names()
    assert len(files) == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", None)  # a call would raise a TypeError
        again = build(processor, rows)
        assert names() == files
        for sample, other in zip(first, again, strict=True):
            assert torch.equal(sample["frames"], other["frames"])
        with pytest.raises(TypeError):  # positive control: another setting decodes again
            build(tiny_processor(num_frames=2), rows)

    write_clip(folder / "wide.mp4", 255 - noise(6, 48, 64, 3))
    changed = build(processor, rows)
    assert len(names() - files) == 1
    assert not torch.equal(changed[2]["frames"], first[2]["frames"])
    for index in (0, 1, 3):
        assert torch.equal(changed[index]["frames"], first[index]["frames"])


def test_dataset_decodes_nothing_again_after_its_folder_was_moved_or_copied(
    tmp_path, processor, monkeypatch
):
    (tmp_path / "old").mkdir()
    rows = tiny_rows(tmp_path / "old")
    (tmp_path / "old" / "torn.png").write_bytes(b"no picture")
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"image": "torn.png", "target": "x"}\n')
    first = [each["frames"] for each in build(processor, rows, max_bad_share=0.5)]
    monkeypatch.setattr(data, "decode", None)  # a call would raise a TypeError
    moved = tmp_path / "new" / "name"
    shutil.move(tmp_path / "old", moved)
    copied = tmp_path / "copy"
    shutil.copytree(moved, copied, copy_function=shutil.copyfile)  # with the times of now
    for folder in (moved, copied):
        for _ in range(2):
            dataset = build(processor, folder / "rows.jsonl", max_bad_share=0.5)
            for sample, frames in zip(dataset, first, strict=True):
                assert torch.equal(sample["frames"], frames)
            (bad,) = dataset.sources[0].bad
            assert f"{folder / 'torn.png'}: " in str(bad)
    # Positive control: one file has another content of the same size.
    torn = bytearray((moved / "wide.mp4").read_bytes())
    torn[len(torn) // 2] ^= 1
    (moved / "wide.mp4").write_bytes(torn)
    with pytest.raises(TypeError):
        build(processor, moved / "rows.jsonl", max_bad_share=0.5)


def test_dataset_never_mixes_up_folders_of_equal_names_sizes_and_times(tmp_path, processor):
    def colors(dataset: ContrastiveDataset) -> list[int]:
        return [round(each["frames"].float().mean().item()) for each in dataset]

    one, other = two_folders_of_equal_names(tmp_path / "one")
    cache = tmp_path / "cache"

    def read(*rows: Path) -> list[int]:
        arguments = DataArguments(
            sources=[SourceArguments(rows=str(each)) for each in rows],
            cache_dir=str(cache),
            num_workers=1,
        )
        sources = [read_source(each) for each in arguments.sources]
        return colors(build_dataset(sources, processor.video_processor, arguments))

    assert read(one, other) == [10, 200]
    assert [read(one), read(other)] == [[10], [200]]
    shutil.move(tmp_path / "one", tmp_path / "two")
    one, other = (tmp_path / "two" / name / "rows.jsonl" for name in "ab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "decode", None)
        assert [read(one, other), read(other), read(one)] == [[10, 200], [200], [10]]


def test_dataset_decodes_a_file_of_many_rows_once(folder, processor):
    rows = [{"image": "wide.png", "query": q, "target": t} for q in "abc" for t in ("red", "big")]
    first = write_rows(folder / "first.jsonl", rows)
    second = write_rows(folder / "second.jsonl", rows)
    dataset = build(processor, first, second)
    assert len(dataset) == 12
    assert len(dataset.clips) == 1


def test_dataset_decodes_a_file_as_an_image_and_as_a_video(folder, processor):
    pictures = [Image.fromarray(noise(40, 60, 3) + step) for step in range(5)]
    pictures[0].save(folder / "wide.gif", save_all=True, append_images=pictures[1:])
    image, video = ({kind: "wide.gif", "target": kind} for kind in ("image", "video"))
    both = write_rows(folder / "both.jsonl", [image, video])
    assert [len(sample["frames"]) for sample in build(processor, both)] == [1, 4]
    for row, frames in ((image, 1), (video, 4)):
        (sample,) = build(processor, write_rows(folder / "one.jsonl", [row]))
        assert len(sample["frames"]) == frames


# -- bad rows ------------------------------------------------------------------------------


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """Four good rows, and a bad row of each kind."""
    (folder / "torn.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:700])
    (folder / "torn.png").write_bytes(b"no picture")
    with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
        for row in (
            {"video": "torn.mp4", "query": "what ?", "target": "a"},
            {"video": "gone.mp4", "query": "what ?", "target": "a"},
            {"image": "wide.png", "query": "what ?", "target": " "},
            {"image": "wide.png", "query": "A cat", "target": "a cat"},
            {"image": "torn.png", "query": "what ?", "target": "a"},
        ):
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def test_dataset_rejects_and_names_bad_rows(spoilt, processor):
    """If they were skipped silently, training would use another set than the recipe's. A target
    that equals its query would leak the answer."""
    with pytest.raises(RecipeError) as error:
        build(processor, spoilt, max_bad_share=0.5)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("5 of 9 rows are unusable")
    reasons = ["torn.mp4: ", "is missing: ", "target is empty", "query equals", "not an image"]
    for number, (line, reason) in enumerate(zip(lines[1:6], reasons, strict=True), start=5):
        assert f"rows.jsonl:{number}: " in line and reason in line


def test_dataset_rejects_rows_of_bad_text_before_it_reads_clips(spoilt, processor, monkeypatch):
    monkeypatch.setattr(data, "decode_clips", None)  # a call would be a TypeError
    with pytest.raises(RecipeError, match="3 of 9 rows are unusable") as error:
        build(processor, spoilt, max_bad_share=0.2)
    cure = "At most 20% may be unusable (data.max_bad_share), and 33.3% are; correct the rows above"
    assert cure in str(error.value)


def test_dataset_drops_bad_rows_up_to_max_bad_share(spoilt, processor):
    dataset = build(processor, spoilt, max_bad_share=0.6)
    assert [sample["target"] for sample in dataset] == [
        "a cat",
        "red",
        "he rides a bike",
        "the door opens",
    ]


def test_dataset_reports_missing_files_of_a_parquet_source(folder, processor):
    """Its paths are not checked when its rows are read. One missing file is a frame of a folder."""
    (folder / "frames").mkdir()
    Image.fromarray(noise(40, 40, 3)).save(folder / "frames" / "0.png")
    (folder / "frames" / "1.png").symlink_to(folder / "gone.png")
    files = ["wide.mp4", "absent.mp4", "tall.mkv", "frames", "null\0byte.mp4"]
    table = {"file": files, "text": list("abcde")}
    datasets.Dataset.from_dict(table).to_parquet(folder / "files.parquet")
    source = SourceArguments(
        dataset="parquet",
        data_files=str(folder / "files.parquet"),
        media_folder=str(folder),
        columns={"video": "file", "target": "text"},
    )
    options = {"cache_dir": str(folder / "cache"), "num_workers": 1}

    def built(max_bad_share: float) -> ContrastiveDataset:
        arguments = DataArguments(sources=[source], max_bad_share=max_bad_share, **options)
        return build_dataset([read_source(source)], processor.video_processor, arguments)

    assert [sample["target"] for sample in built(0.6)] == ["a", "c"]
    with pytest.raises(RecipeError, match="3 of 5 rows are unusable") as error:
        built(0.5)
    for row in ("2: .*absent.mp4: no such file", "4: .*1.png: no such file", "5: .*byte.mp4: no"):
        assert re.search(row, str(error.value))
    write_clip(folder / "absent.mp4", noise(6, 48, 64, 3))  # now it exists
    assert [sample["target"] for sample in built(0.6)] == ["a", "b", "c"]


@pytest.mark.parametrize("media", ["gone.png", "torn.png"])
def test_dataset_rejects_a_source_of_bad_rows_only(spoilt, processor, media):
    rows = write_rows(spoilt.parent / "bad.jsonl", [{"image": media, "target": "a"}])
    with pytest.raises(RecipeError, match="bad.jsonl: no row is usable. 1 of 1 rows are") as error:
        build(processor, spoilt, rows, max_bad_share=1.0)
    assert "bad.jsonl:1: " in str(error.value) and media in str(error.value)


def test_read_source_names_a_missing_jsonl_file(tmp_path):
    with pytest.raises(RecipeError, match="^data.sources: .*gone.jsonl: no such JSONL file"):
        read_source(SourceArguments(rows=str(tmp_path / "gone.jsonl")))


def test_texts_of_names_the_key_of_missing_tokenizer_rows(tmp_path):
    with pytest.raises(RecipeError, match="^model.tokenizer_rows: .*gone.jsonl: no such JSONL"):
        texts_of([], [str(tmp_path / "gone.jsonl")])


def test_small_source_counts_rows_that_repeat_within_a_batch(spoilt):
    source = read_source(SourceArguments(rows=str(spoilt)))
    assert [len(small_source(source, size)) for size in (1, 2, 100)] == [0, 0, 2]
    images = sum("image" in row for row in source.rows)
    note = f"note: {images} image rows are fewer than a batch of 100 (training.global_batch_size)"
    assert small_source(source, 100)[0].startswith(note)


# -- the collator --------------------------------------------------------------------------


def sample(
    query: str, target: str, frames: torch.Tensor | None = None, negatives: tuple[str, ...] = ()
) -> dict:
    if frames is None:
        frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    ids = {"clip_id": id(frames), "target_id": data.text_id(target), "group_id": -1}
    texts = {"query": query, "target": target, "negatives": [*negatives]}
    return {"frames": frames, **texts, **ids}


def test_collator_adds_hard_negatives_to_the_distinct_texts(processor):
    """A text that is a target and a negative is encoded once."""
    samples = [
        sample("a", "red", negatives=("blue", "green", "grey")),
        sample("b", "blue"),
        sample("c", "red", negatives=("pink",)),
    ]
    batch = ContrastiveCollator(processor, hard_negatives=2)(samples)
    texts = ["red", "blue", "green", "pink"]
    expected = processor(targets=texts)["target_input_ids"]
    assert torch.equal(batch["target_input_ids"], expected)
    assert batch["target_index"].tolist() == [0, 1, 0]
    ids = {text: data.text_id(text) for text in texts}
    assert batch["negative_ids"].tolist() == [
        [ids["blue"], ids["green"]],
        [-1, -1],
        [ids["pink"], -1],
    ]
    assert batch["negative_index"][0].tolist() == [1, 2]
    assert batch["negative_index"][2, 0] == 3
    assert "negative_ids" not in ContrastiveCollator(processor)(samples)


def test_to_pixel_values_equals_the_processor_on_a_batch_and_on_a_part_of_it(folder, processor):
    dataset = build(processor, folder / "rows.jsonl")
    video = processor.video_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (video.image_mean, video.image_std))
    collate = ContrastiveCollator(processor)
    clips = collate([dataset[2], dataset[3]])["frames"]
    videos = [folder / "wide.mp4", folder / "tall.mkv"]
    images = collate([dataset[1], dataset[0]])["frames"]
    paths = [folder / "tall.jpg", folder / "wide.png"]
    for frames, given in ((clips, {"videos": videos}), (images, {"images": paths})):
        expected = processor(**given)["pixel_values_videos"]
        assert frames.dtype == torch.uint8
        pixels = to_pixel_values(frames, video)
        # One grey level, 1/255, divided by a standard deviation above 0.22.
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0.02)
        torch.testing.assert_close(pixels, (frames / 255 - mean) / std, rtol=0, atol=1e-6)
        part = to_pixel_values(frames[1:], video)
        torch.testing.assert_close(part, pixels[1:], rtol=0, atol=1e-6)


def test_collator_stacks_each_distinct_clip_once(processor):
    clips = torch.arange(3, dtype=torch.uint8)[:, None, None, None, None].expand(3, 1, 3, 32, 32)
    first, second, third = clips
    samples = [
        sample(query, query, clip)
        for query, clip in (("a", first), ("b", second), ("c", first), ("d", third), ("e", second))
    ]
    batch = ContrastiveCollator(processor)(samples)
    assert torch.equal(batch["frames"], clips)
    assert batch["visual_index"].tolist() == [0, 1, 0, 2, 1]
    assert len(batch["input_ids"]) == len(batch["target_index"]) == 5
    distinct = ContrastiveCollator(processor)([samples[1], samples[0]])
    assert "visual_index" not in distinct
    assert torch.equal(distinct["frames"], torch.stack([second, first]))


def test_dataset_reads_a_clip_of_many_rows_of_a_step_once(folder, processor, monkeypatch):
    """Rows of one clip share its frames, unless an augmented source moves them; other seconds of a
    video are another clip."""
    part = {"start": 0.0, "end": 0.3}
    rows = [
        {"video": "wide.mp4", "query": "a", "target": "b"},
        {"video": "tall.mkv", "query": "b", "target": "c"},
        {"video": "wide.mp4", "query": "c", "target": "d"},
        {"video": "wide.mp4", "query": "d", "target": "e", **part},
    ]
    path = write_rows(folder / "shared.jsonl", rows)
    read, read_frames = [], data.read_frames
    monkeypatch.setattr(
        data, "read_frames", lambda row, video: read.append(row) or read_frames(row, video)
    )
    for augmented, index, clips in ((False, [0, 1, 0, 2], 3), (True, None, 4)):
        source = SourceArguments(rows=str(path), augment=augmented)
        options = DataArguments(sources=[source], decode_once=False)
        dataset = build_dataset([read_source(source)], processor.video_processor, options)
        read.clear()
        samples = dataset.__getitems__(Step(0, [0, 1], [[0, 1], [2, 3]], [0, 1])).samples
        assert [row["query"] for row in read] == ["a", "b", "d"]
        alone = [dataset[row]["frames"] for row in range(4)]
        batch = ContrastiveCollator(processor)(samples)
        assert len(batch["frames"]) == clips
        assert (batch["visual_index"].tolist() if index else batch.get("visual_index")) == index
        frames = batch["frames"] if index is None else batch["frames"][batch["visual_index"]]
        assert torch.equal(frames, torch.stack(alone))


def test_rows_per_clip_shares_one_augmented_view_within_a_lane(folder, processor):
    """The view is that of the clip's first row in the lane; a lane of another process has its
    own, so the batch does not depend on the number of processes."""
    rows = [{"video": "wide.mp4", "query": "", "target": word} for word in "abcd"]
    path = write_rows(folder / "views.jsonl", rows)
    source = SourceArguments(rows=str(path), augment=True, rows_per_clip=2)
    dataset = build(processor, source)
    lanes = [[0, 1], [2, 3]]
    together = dataset.__getitems__(Step(0, [0, 1], lanes, [0, 1])).samples
    views = [dataset[row]["frames"] for row in range(4)]
    assert not torch.equal(views[0], views[1])  # positive control
    for sample, row in zip(together, (0, 0, 2, 2), strict=True):
        assert torch.equal(sample["frames"], views[row])
    batch = ContrastiveCollator(processor)(together)
    assert batch["visual_index"].tolist() == [0, 0, 1, 1]
    (alone,) = (dataset.__getitems__(Step(0, [1], [lane], [1])).samples for lane in lanes[1:])
    assert torch.equal(alone[1]["frames"], views[2])


def test_collator_tokenizes_each_distinct_target_once(processor):
    batch = ContrastiveCollator(processor)(
        [sample("a", "red"), sample("b", "red green"), sample("c", "red"), sample("d", "red")]
    )
    expected = processor(targets=["red", "red green"])
    assert torch.equal(batch["target_input_ids"], expected["target_input_ids"])
    assert torch.equal(batch["target_attention_mask"], expected["target_attention_mask"])
    assert batch["target_index"].tolist() == [0, 1, 0, 0]
    red, red_green = data.text_id("red"), data.text_id("red green")
    assert batch["target_ids"].tolist() == [red, red_green, red, red]
    assert batch["group_ids"].tolist() == [-1] * 4


def test_collator_leaves_out_masks_of_ones_only(processor):
    collate = ContrastiveCollator(processor)
    masks = {"attention_mask", "target_attention_mask"}
    assert masks & set(collate([sample("cat", "red"), sample("cat", "blue")])) == set()
    mixed = collate([sample("cat", "red"), sample("a zebra", "red green blue")])
    assert masks & set(mixed) == masks
    expected = processor(text=["cat", "a zebra"])["attention_mask"]
    assert torch.equal(mixed["attention_mask"], expected)


def test_collator_accepts_queries_without_tokens(processor):
    bare = VLJEPAProcessor(processor.video_processor, tiny_tokenizer(bos=False), tiny_tokenizer())
    batch = ContrastiveCollator(bare)([sample("", "red"), sample("", "blue")])
    assert batch["input_ids"].shape == (2, 0)
    assert "attention_mask" not in batch
