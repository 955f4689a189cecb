"""Rows and media files to training samples.

1. rows      sources -> rows (`sources.py`), all of them or as they are needed
2. steps     which rows are the next global batch, and this process's share of it (`mixture.py`)
3. clips     each media file -> sampled, resized uint8 frames: once, kept in an Arrow file, or in
             the workers of the DataLoader, as they are needed
4. samples   row + its clip's frames (`ContrastiveDataset`)
5. tensors   `collator.py`

Nothing here knows where rows come from.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher

from processing.feature_store import FeatureStore
from processing.rows import BadRow, bad_rows_report, clip_key, file_stamp, media_file, media_of
from processing.video_io import MediaError, read_image
from processing.video_processing_vljepa import VLJEPAVideoProcessor
from training.arguments import DataArguments, RecipeError
from training.data.lanes import bad_row
from training.data.mixture import VISIT, Bucket, Step
from training.data.sources import RESERVE, Source, StreamedSource


def read_frames(row: dict, video_processor: VLJEPAVideoProcessor) -> torch.Tensor:
    """Sampled, resized and cropped frames `(T, 3, h, w)`, uint8.

    Raises:
        MediaError: it cannot be read.
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
    """Return the part of a row that `read_frames` reads; worker processes get no more."""
    return {name: row[name] for name in ("video", "image", "start", "end") if name in row}


def decode(number: int, rows: list[dict], video_processor: VLJEPAVideoProcessor) -> dict:
    """One clip to its frames as bytes, or to the reason why not."""
    torch.set_num_threads(1)  # one process per core already
    try:
        frames = read_frames(rows[number], video_processor)
    except MediaError as error:
        return {"frames": b"", "error": str(error)}
    return {"frames": frames.numpy().tobytes(), "error": ""}


def decode_clips(
    sources: list[Source], video_processor: VLJEPAVideoProcessor, arguments: DataArguments
) -> tuple[dict[str, int], datasets.Dataset]:
    """Decode every distinct clip once, with a progress bar and all cores.

    The result stays on disk, memory-mapped, under a name made from the files' identity and the
    processor's settings: a second run finds it, a changed file or setting makes a new one.

    Returns: the number of each clip, by its `clip_key`, and columns `frames` (bytes) and `error`
        ("" where it could be read).
    """
    wanted = {clip_key(row): media_row(row) for source in sources for row in source.rows}
    identities = [(key, file_stamp(media_file(row))) for key, row in wanted.items()]
    fingerprint = Hasher.hash((identities, video_processor.to_dict()))
    clips = datasets.Dataset.from_dict({"number": range(len(wanted))})
    Path(arguments.cache_dir).mkdir(parents=True, exist_ok=True)
    decoded = clips.map(
        decode,
        input_columns="number",
        fn_kwargs={"rows": list(wanted.values()), "video_processor": video_processor},
        num_proc=min(arguments.num_workers, len(clips)),
        new_fingerprint=fingerprint,
        cache_file_name=str(Path(arguments.cache_dir) / f"clips-{fingerprint}.arrow"),
        features=datasets.Features(
            number=datasets.Value("int64"),
            frames=datasets.Value("large_binary"),
            error=datasets.Value("string"),
        ),
        desc="Reading clips",
    )
    return {key: number for number, key in enumerate(wanted)}, decoded


def text_id(text: str) -> int:
    """A non-negative 63-bit number, equal for equal texts on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def vary(frames: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
    """Mirror frames `(T, 3, h, w)` half of the time and shift them by up to an eighth of their
    size, all of a clip alike; what comes into view repeats the edge."""
    generator = np.random.default_rng(seed)
    if generator.random() < 0.5:
        frames = frames.flip(-1)
    height, width = frames.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(frames.float(), (right, right, down, down), mode="replicate")
    top, left = generator.integers((2 * down + 1, 2 * right + 1)).tolist()
    return padded[..., top : top + height, left : left + width].to(frames.dtype)


@dataclass
class Batch:
    """Samples of a step, and the rows that could have been among them but for their faults."""

    samples: list[dict]
    bad: list[BadRow]
    source: int


class ContrastiveDataset(torch.utils.data.Dataset):
    """Samples `{frames, query, target, target_id, group_id, negatives}` of all sources.

    `dataset[row + visit * VISIT]` is a row that is held, at a later visit: the same, but in an
    augmented source. `dataset.__getitems__(step)`, which a DataLoader calls, is a [`Batch`].

    `buckets` are the parts from which a batch may be drawn: rows of one source whose clips have
    one length, so that visual tokens need no padding and negatives come from one domain.

    Args:
        clips: the number of each clip that was decoded before, and these clips.
        features: of a frozen X-Encoder; samples then hold `visual_embeds` instead of `frames`.
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
        for number, source in enumerate(sources):
            weight = source.arguments.weight
            if isinstance(source, StreamedSource):
                self.buckets.append(Bucket(weight, number, stream=source))
                continue
            is_video = np.array(["video" in row for row in source.rows], dtype=bool)
            lengths = None
            if source.arguments.group_by_length:
                lengths = np.array([len(row["query"]) + len(row["target"]) for row in source.rows])
            for kind in (is_video, ~is_video):
                if kind.any():
                    self.buckets.append(
                        Bucket(
                            weight * kind.mean(),
                            number,
                            rows=len(self.rows) + np.flatnonzero(kind),
                            lengths=None if lengths is None else lengths[kind],
                        )
                    )
            self.rows += source.rows
            self.source_of += [number] * len(source.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        visit, index = divmod(number, VISIT)
        # A row without a group, or with `null` for one, is alone in its own.
        return self.sample(self.rows[index], self.source_of[index], (index, visit), -1 - index)

    def sample(self, row: dict, source: int, seed: tuple[int, ...], alone: int) -> dict:
        """
        Args:
            seed: of how the frames vary.
            alone: id of the group of a row that has none.
        """
        group = row.get("group_id")
        if self.features is not None:
            clip = {"visual_embeds": self.features[row]}  # (N, Dx)
        elif self.sources[source].arguments.augment:
            clip = {"frames": vary(self.frames(row), seed)}
        else:
            clip = {"frames": self.frames(row)}
        return {
            **clip,
            "query": row["query"],
            "target": row["target"],
            "target_id": text_id(row["target"]),
            "group_id": alone if group is None else text_id(str(group)),
            "negatives": row.get("negatives", []),
        }

    def frames(self, row: dict) -> torch.Tensor:
        """The clip `(T, 3, h, w)` of a row, uint8."""
        key = clip_key(row)
        if key not in self.decoded:
            return read_frames(row, self.video_processor)
        stored = self.clips[self.decoded[key]]["frames"]
        crop = self.video_processor.crop_size
        frames = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
        return frames.view(-1, 3, crop["height"], crop["width"])

    def __getitems__(self, step: Step) -> Batch:
        """A process's share of a step. A row whose media cannot be read is replaced by the next
        one of its lane that can, or else by one of the source's reserve.

        Raises:
            RecipeError: no row of these can.
        """
        samples, bad = [], list(step.bad)
        for lane, rows, spare in zip(step.lanes, step.rows, step.spares, strict=True):
            read: list[dict | None] = []
            for place, row in enumerate(rows):
                try:
                    read.append(self.sample_of(step, lane, place, row))
                except MediaError as error:
                    read.append(None)
                    bad.append(self.bad_row(step, row, error))
            for place, sample in enumerate(read):
                after = (read[place:] + read[:place]) if sample is None else [sample]
                good = next((each for each in after if each is not None), None)
                samples.append(good or self.spare(step, lane, spare, bad))
        return Batch(samples, bad, step.source)

    def sample_of(self, step: Step, lane: int, place: int, row: int | dict) -> dict:
        if isinstance(row, int):
            return self[row]
        return self.sample(row, step.source, (lane, *row["visit"]), alone=-1 - lane - 2**20 * place)

    def spare(self, step: Step, lane: int, row: int | dict, bad: list[BadRow]) -> dict:
        for each in chain([row], self.reserve(step, lane, row)):
            try:
                return self.sample_of(step, lane, 2**20, each)
            except MediaError as error:
                last = error
        few = "".join(f"\n  {each}" for each in [*bad[-20:], last])
        name = self.sources[step.source].arguments.name
        raise RecipeError(
            f"{name}: no row of a lane's part of a step is usable, nor is another one.{few}"
        ) from last

    def reserve(self, step: Step, lane: int, row: int | dict) -> Iterator[int | dict]:
        """Rows of a source for a lane whose next ones are all broken. They depend on these alone,
        so they are the same on every process; they count as broken when it is their own turn."""
        if isinstance(row, dict):
            rows, seed = self.sources[step.source].reserve, (lane, *row["visit"])
            order = np.random.default_rng(seed).permutation(len(rows))
            yield from ({**rows[place], "visit": row["visit"]} for place in order)
        else:
            rows = next(each.rows for each in self.buckets if self.is_of(row, each))
            yield from np.random.default_rng(row).choice(rows, RESERVE).tolist()

    def is_of(self, row: int, bucket: Bucket) -> bool:
        """Whether a row that is held is from this bucket."""
        row %= VISIT
        if bucket.rows is None or bucket.source != self.source_of[row]:
            return False
        return ("video" in self.rows[row]) == ("video" in self.rows[bucket.rows[0]])

    def bad_row(self, step: Step, row: int | dict, error: MediaError) -> BadRow:
        row = self.rows[row % VISIT] if isinstance(row, int) else row
        return bad_row(row, self.sources[step.source].arguments.name, str(error))


def build_dataset(
    sources: list[Source | StreamedSource],
    video_processor: VLJEPAVideoProcessor,
    arguments: DataArguments,
    features: FeatureStore | None = None,
) -> ContrastiveDataset:
    """Decode what the recipe wants decoded, set bad rows aside, say how many, and refuse when they
    are too many. A clip that is not among the features could not be read when these were made.

    Raises:
        RecipeError: more than `max_bad_share` of a source's rows are bad, or all of them; the
            message names them.
    """
    held = [source for source in sources if isinstance(source, Source)]
    clips, errors = None, {}
    if features is not None:
        absent = [row for source in held for row in features.missing(source.rows)]
        errors = {clip_key(row): f"no features of it in {features.folder}" for row in absent}
    elif held and arguments.decode_once:
        clips = decode_clips(held, video_processor, arguments)
        errors = {
            key: error for key, error in zip(clips[0], clips[1]["error"], strict=True) if error
        }
    for source in held:
        set_aside(source, errors, arguments.max_bad_share)
    dataset = ContrastiveDataset(sources, video_processor, clips, features)
    if features is not None:
        features.check(dataset.rows)
    return dataset


def set_aside(source: Source, errors: dict[str, str], max_share: float) -> None:
    """Count the rows of a source whose clip could not be read among its bad ones."""
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
