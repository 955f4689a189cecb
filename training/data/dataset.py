"""Training samples from rows and media files.

1. rows      sources -> rows, all in memory or read lazily (`sources.py`)
2. steps     rows -> this process's share of each global batch (`mixture.py`)
3. clips     media files -> sampled, resized uint8 frames: decoded once into an Arrow file, or when
             needed, in the workers of the DataLoader
4. samples   row + frames of its clip (`ContrastiveDataset`)
5. tensors   samples -> batch (`collator.py`)

This file does steps 3 and 4, and does not depend on where rows come from.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher

from processing.feature_store import FeatureStore
from processing.media import name_of
from processing.output import complete_file, writing
from processing.rows import (
    BadRow,
    bad_rows_report,
    clip_key,
    content_key,
    file_stamp,
    media_file,
    media_of,
    size_key,
)
from processing.video_io import MediaError, read_image
from processing.video_processing_vljepa import VLJEPAVideoProcessor
from training.arguments import DataArguments, RecipeError
from training.data.augmentation import augment
from training.data.lanes import DRAW, bad_row
from training.data.mixture import EPOCH_STRIDE, Bucket, Step
from training.data.sources import FALLBACK_ROWS, Source, StreamedSource


def read_frames(row: dict, video_processor: VLJEPAVideoProcessor) -> torch.Tensor:
    """Return the sampled, resized and cropped frames `(T, 3, h, w)` of a row's clip, uint8.

    Raises:
        MediaError: the clip cannot be read.
    """
    media = media_of(row)
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    if "video" in row:
        num_frames = video_processor.num_frames
        clip = video_processor([media], num_frames=num_frames, **options)
    else:
        clip = video_processor([read_image(media)], do_sample_frames=False, **options)
    return clip["pixel_values_videos"][0]


def media_row(row: dict) -> dict:
    """Return the columns that `read_frames` reads, the only ones that worker processes get."""
    return {name: row[name] for name in ("video", "image", "start", "end") if name in row}


COLUMNS = datasets.Features(
    index=datasets.Value("int64"),
    frames=datasets.Value("large_binary"),
    error=datasets.Value("string"),
    content=datasets.Value("string"),
)
FILE = "\0"  # in place of the name of the file in a stored error: the file may be moved


def decode(index: int, rows: list[dict], video_processor: VLJEPAVideoProcessor) -> dict:
    """Return one clip's frames as bytes, or the error that its file raised, and its content key."""
    torch.set_num_threads(1)  # every core has a process already
    row, frames, message = rows[index], b"", ""
    try:
        frames = read_frames(row, video_processor).numpy().tobytes()
    except MediaError as error:
        message = str(error).replace(name_of(media_file(row)), FILE)
    return {"frames": frames, "error": message, "content": content_key(row)}


def decode_clips(
    sources: list[Source], video_processor: VLJEPAVideoProcessor, arguments: DataArguments
) -> tuple[dict[str, int], datasets.Dataset]:
    """Decode every distinct clip once, in `num_workers` processes, with a progress bar.

    The result is an Arrow file, memory-mapped, which later runs find. Its name is a hash of the
    files' paths, sizes and times and of the processor's settings: a changed file or setting makes a
    new one. If all of these files have only been moved, renamed or copied since, `same_contents`
    finds it.

    Returns:
        The index of each clip by its `clip_key`, and the columns `frames` (bytes), `error` (""
        if the clip could be read) and `content`, its `content_key`.
    Raises:
        OutputError: the Arrow file cannot be written.
    """
    wanted = {clip_key(row): media_row(row) for source in sources for row in source.rows}
    settings = (video_processor.to_dict(), list(COLUMNS))
    identities = [(key, file_stamp(media_file(row))) for key, row in wanted.items()]
    fingerprint = Hasher.hash((identities, settings))
    clips = datasets.Dataset.from_dict({"index": range(len(wanted))})
    folder = Path(arguments.cache_dir)
    with writing(f"data.cache_dir: {arguments.cache_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / f"clips-{fingerprint}.json"
        sizes = Hasher.hash(([size_key(row) for row in wanted.values()], settings))
        arrow = same_contents(note, sizes, wanted) or fingerprint
        decoded = clips.map(
            decode,
            input_columns="index",
            fn_kwargs={"rows": list(wanted.values()), "video_processor": video_processor},
            num_proc=min(arguments.num_workers, len(clips)),
            new_fingerprint=arrow,
            cache_file_name=str(folder / f"clips-{arrow}.arrow"),
            features=COLUMNS,
            desc="Reading clips",
        )
        if not note.is_file():
            facts = {
                "arrow": arrow,
                "sizes": sizes,
                "contents": Hasher.hash(list(decoded["content"])),
            }
            with complete_file(note) as written:
                written.write_text(json.dumps(facts))
    return {key: index for index, key in enumerate(wanted)}, decoded


def same_contents(note: Path, sizes: str, wanted: dict[str, dict]) -> str | None:
    """Return the hash in the name of an Arrow file of clips with the contents of `wanted`.

    Args:
        note: file about these paths, sizes and times; an earlier run may have written it.
        sizes: hash of the clips' sizes. The contents are read only if the clips of a stored file
            have these sizes, so new clips are not read twice.
        wanted: a row of each clip.
    """
    if note.is_file():
        return json.loads(note.read_text())["arrow"]
    stored = [json.loads(path.read_text()) for path in sorted(note.parent.glob("clips-*.json"))]
    stored = [facts for facts in stored if facts["sizes"] == sizes]
    if not stored:
        return None
    contents = Hasher.hash([content_key(row) for row in wanted.values()])
    return next((each["arrow"] for each in stored if each["contents"] == contents), None)


def text_id(text: str) -> int:
    """Return a non-negative 63-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Batch:
    """Samples of a step, and the bad rows that were replaced among them."""

    samples: list[dict]
    bad: list[BadRow]
    source: int


@dataclass
class ReadClips:
    """Clips of a step that have been read, by their keys, and augmented views with their ids."""

    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    views: dict[str, tuple[torch.Tensor, tuple]] = field(default_factory=dict)


class ContrastiveDataset(torch.utils.data.Dataset):
    """Samples `{frames, clip_id, query, target, target_id, group_id, negatives}` of all sources.

    Samples with equal `clip_id` have equal frames; those of one step share one tensor.

    `dataset[row + epoch * EPOCH_STRIDE]` is the sample of a row in memory. The epoch matters in an
    augmented source only. `dataset.__getitems__(step)`, which a DataLoader calls, is a [`Batch`].

    `buckets` are the parts from which a batch may be drawn: rows of one source whose clips have
    one length, so that visual tokens need no padding and negatives come from one domain.

    Args:
        clips: the clips that `decode_clips` has decoded, with their indices.
        features: visual tokens of a frozen X-Encoder. With them, samples hold `visual_embeds`
            instead of `frames`.
    """

    def __init__(
        self,
        sources: list[Source | StreamedSource],
        video_processor: VLJEPAVideoProcessor,
        clips: tuple[dict[str, int], datasets.Dataset] | None = None,
        features: FeatureStore | None = None,
    ):
        self.sources, self.video_processor, self.features = sources, video_processor, features
        self.decoded, self.clips = clips or ({}, None)
        self.rows: list[dict] = []
        self.source_of: list[int] = []
        self.buckets: list[Bucket] = []
        for index, source in enumerate(sources):
            weight = source.arguments.weight
            if isinstance(source, StreamedSource):
                self.buckets.append(Bucket(weight, index, streamed=source))
                continue
            is_video = np.array(["video" in row for row in source.rows], dtype=bool)
            lengths = None
            if source.arguments.group_by_length:
                lengths = np.array([len(row["query"]) + len(row["target"]) for row in source.rows])
            clips, rows_per_clip = None, source.arguments.rows_per_clip
            if rows_per_clip > 1:
                keys = [clip_key(row) for row in source.rows]
                clips = np.unique(keys, return_inverse=True)[1]
            for kind in (is_video, ~is_video):
                if kind.any():
                    self.buckets.append(
                        Bucket(
                            weight * kind.mean(),
                            index,
                            rows=len(self.rows) + np.flatnonzero(kind),
                            lengths=None if lengths is None else lengths[kind],
                            clips=None if clips is None else clips[kind],
                            rows_per_clip=rows_per_clip,
                        )
                    )
            self.rows += source.rows
            self.source_of += [index] * len(source.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.sample_in_memory(number, ReadClips())

    def sample_in_memory(self, number: int, clips: ReadClips) -> dict:
        epoch, index = divmod(number, EPOCH_STRIDE)
        # A negative group is the row's own: `text_id` makes groups of 0 and above.
        group = -1 - index
        return self.sample(self.rows[index], self.source_of[index], (index, epoch), group, clips)

    def sample(
        self,
        row: dict,
        source: int,
        seed: tuple[int, ...],
        own_group: int,
        clips: ReadClips,
    ) -> dict:
        """Return the sample of a row.

        Args:
            seed: seed of the augmentation.
            own_group: group id for a row without one, or with `null` for one.
            clips: clips of the step that have been read; this row's is added.
        """
        group = row.get("group_id")
        name = "frames" if self.features is None else "visual_embeds"
        key = clip_key(row)
        if key not in clips.plain:
            # `(N, Dx)` or `(T, 3, h, w)`
            found = self.frames(row, key) if self.features is None else self.features[row]
            clips.plain[key] = found
        clip = clips.plain[key]
        arguments = self.sources[source].arguments
        changes = arguments.augmentation
        if changes is not None and arguments.rows_per_clip == 1:
            clip, key = augment(clip, seed, changes), (key, *seed)  # frames of this row alone
        elif changes is not None:
            if key not in clips.views:
                clips.views[key] = augment(clip, seed, changes), (key, *seed)
            clip, key = clips.views[key]
        return {
            name: clip,
            "clip_id": key,
            "query": row["query"],
            "target": row["target"],
            "target_id": text_id(row["target"]),
            "group_id": own_group if group is None else text_id(str(group)),
            "negatives": row.get("negatives", []),
        }

    def frames(self, row: dict, key: str) -> torch.Tensor:
        """Return the clip `(T, 3, h, w)` of a row, uint8, decoded before or now."""
        if key not in self.decoded:
            return read_frames(row, self.video_processor)
        stored = self.clips[self.decoded[key]]["frames"]
        crop = self.video_processor.crop_size
        frames = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        return frames.view(-1, 3, crop["height"], crop["width"])

    def __getitems__(self, step: Step) -> Batch:
        """Return the samples of a process's share of a step.

        A row whose media cannot be read is replaced: by the next readable row of its lane in this
        step, then by the lane's replacement, then by one of the source's fallback rows.

        Raises:
            RecipeError: none of these can be read.
        """
        samples, bad, clips = [], list(step.bad), ReadClips()
        for lane, rows, replacement in zip(step.lanes, step.rows, step.replacements, strict=True):
            read: list[dict | None] = []
            # Another lane may belong to another process, which draws views of its own.
            clips.views.clear()
            for index, row in enumerate(rows):
                try:
                    read.append(self.sample_of(step, lane, index, row, clips))
                except MediaError as error:
                    read.append(None)
                    bad.append(self.bad_row(step, row, error))
            for index, sample in enumerate(read):
                # Only from the same lane: another lane may belong to another process, and the
                # batch would then depend on the number of processes.
                after = (read[index:] + read[:index]) if sample is None else [sample]
                good = next((each for each in after if each is not None), None)
                samples.append(good or self.replacement(step, lane, replacement, bad, clips))
        return Batch(samples, bad, step.source)

    def sample_of(
        self, step: Step, lane: int, index: int, row: int | dict, clips: ReadClips
    ) -> dict:
        """Return the sample of a row of a step.

        Args:
            index: index of the row in its lane; it makes the group of a row without one unique.
        """
        if isinstance(row, int):
            return self.sample_in_memory(row, clips)
        own_group = -1 - lane - 2**20 * index
        return self.sample(row, step.source, (lane, *row[DRAW]), own_group, clips)

    def replacement(
        self,
        step: Step,
        lane: int,
        row: int | dict,
        bad: list[BadRow],
        clips: ReadClips,
    ) -> dict:
        """Return the sample of a lane's replacement, or of the first readable fallback row."""
        for each in chain([row], self.fallback_rows(step, lane, row)):
            try:
                # An index above those of the lane.
                return self.sample_of(step, lane, 2**20, each, clips)
            except MediaError as error:
                last = error
        few = "".join(f"\n  {each}" for each in [*bad[-20:], last])
        name = self.sources[step.source].arguments.name
        raise RecipeError(
            f"{name}: no row of a lane's part of a step is usable, and no fallback row is.{few}"
        ) from last

    def fallback_rows(self, step: Step, lane: int, row: int | dict) -> Iterator[int | dict]:
        """Yield other rows of the source for a lane whose rows in a step are all broken.

        They are drawn with the lane's replacement as the seed, so they do not depend on the number
        of processes, and a resumed run draws the same. Broken ones are not reported here, but when
        the mixture draws them.
        """
        if isinstance(row, dict):
            # A worker cannot read on in the lane: that belongs to the sampler, which has stored
            # its position already.
            rows, seed = self.sources[step.source].fallback_rows, (lane, *row[DRAW])
            order = np.random.default_rng(seed).permutation(len(rows))
            yield from ({**rows[index], DRAW: row[DRAW]} for index in order)
        else:
            rows = next(each.rows for each in self.buckets if self.is_in(row, each))
            yield from np.random.default_rng(row).choice(rows, FALLBACK_ROWS).tolist()

    def is_in(self, row: int, bucket: Bucket) -> bool:
        """Return whether a row in memory belongs to a bucket."""
        row %= EPOCH_STRIDE
        if bucket.rows is None or bucket.source != self.source_of[row]:
            return False
        return ("video" in self.rows[row]) == ("video" in self.rows[bucket.rows[0]])

    def bad_row(self, step: Step, row: int | dict, error: MediaError) -> BadRow:
        row = self.rows[row % EPOCH_STRIDE] if isinstance(row, int) else row
        return bad_row(row, self.sources[step.source].arguments.name, str(error))


def build_dataset(
    sources: list[Source | StreamedSource],
    video_processor: VLJEPAVideoProcessor,
    arguments: DataArguments,
    features: FeatureStore | None = None,
) -> ContrastiveDataset:
    """Build the dataset: decode the clips if `decode_once`, and take the bad rows out of sources.

    With features, nothing is decoded. A clip that they lack could not be read when they were
    computed, so its rows are bad.

    Raises:
        RecipeError: more than `max_bad_share` of a source's rows are bad, or all of them; the
            message names them.
    """
    in_memory = [source for source in sources if isinstance(source, Source)]
    for source in in_memory:  # rows that are bad by their text, before hours of reading clips
        set_aside(source, {}, arguments.max_bad_share)
    clips, errors = None, {}
    if features is not None:
        missing = [row for source in in_memory for row in features.missing(source.rows)]
        errors = {clip_key(row): f"no features of it in {features.folder}" for row in missing}
    elif in_memory and arguments.decode_once:
        clips = decode_clips(in_memory, video_processor, arguments)
        # A source's rows name their file as it is called now.
        names = {clip_key(row): name_of(media_file(row)) for each in in_memory for row in each.rows}
        errors = {
            key: error.replace(FILE, names[key])
            for key, error in zip(clips[0], clips[1]["error"], strict=True)
            if error
        }
    for source in in_memory:
        set_aside(source, errors, arguments.max_bad_share)
    dataset = ContrastiveDataset(sources, video_processor, clips, features)
    if features is not None:
        features.check(dataset.rows)
    return dataset


def set_aside(source: Source, errors: dict[str, str], max_share: float) -> None:
    """Move the rows of a source whose clip could not be read to its bad rows.

    Raises:
        RecipeError: more than `max_share` of the rows are bad, or all of them.
    """
    total = len(source.rows) + len(source.bad)
    name = source.arguments.name
    source.bad += [
        BadRow(name, row["line"], errors[clip_key(row)])
        for row in source.rows
        if clip_key(row) in errors
    ]
    source.rows = [row for row in source.rows if clip_key(row) not in errors]
    source.bad.sort(key=lambda row: row.line)
    try:
        source.report = bad_rows_report(source.bad, total, max_share)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error
    if not source.rows:
        raise RecipeError(f"{name}: no row is usable. {source.report}")
