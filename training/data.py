"""Rows and media files to training samples.

1. rows      JSONL files -> checked rows (`processing/rows.py`)
2. clips     each distinct media file -> sampled, resized uint8 frames, once, in an Arrow file
3. samples   row + its clip's frames (`ContrastiveDataset`)
4. batches   one source and one clip length per global batch (`MixtureSampler`)
5. tensors   `collator.py`

Nothing here knows where rows come from.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from torch.utils.data import Sampler

from processing.rows import BadRow, bad_rows_report, read_rows
from processing.video_io import MediaError, read_image
from processing.video_processing_vljepa import VLJEPAVideoProcessor

from .arguments import DataArguments, RecipeError, SourceArguments

VISIT = 2**40  # more than there are rows


@dataclass
class Source:
    """The rows of one file and what the recipe says about them."""

    arguments: SourceArguments
    rows: list[dict]
    bad: list[BadRow]
    report: str = ""


def read_source(arguments: SourceArguments) -> Source:
    """Read a source's rows, with the recipe's query in place of their own where it gives one."""
    try:
        rows, bad = read_rows(arguments.rows)
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"data.sources: {error}") from error
    if not rows:
        report = bad_rows_report(bad, len(bad), max_share=1.0)
        raise RecipeError(f"{arguments.rows}: no row is usable. {report}")
    if arguments.query is not None:
        rows = [{**row, "query": arguments.query} for row in rows]
    return Source(arguments, rows, bad)


def texts_of(sources: list[Source]) -> list[str]:
    """Every query and target: what a tokenizer learns from."""
    return [row[name] for source in sources for row in source.rows for name in ("query", "target")]


def media_of(row: dict) -> str:
    return row["video"] if "video" in row else row["image"]


def decode(example: dict, video_processor: VLJEPAVideoProcessor, num_frames: int) -> dict:
    """One media file to uint8 frames `(T, 3, h, w)` as bytes, or to the reason why not."""
    torch.set_num_threads(1)  # one process per core already
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    try:
        if example["is_video"]:
            clip = video_processor([example["path"]], num_frames=num_frames, **options)
        else:
            image = read_image(example["path"])
            clip = video_processor([image], do_sample_frames=False, **options)
    except MediaError as error:
        return {"frames": b"", "error": str(error)}
    return {"frames": clip["pixel_values_videos"][0].numpy().tobytes(), "error": ""}


def decode_clips(
    sources: list[Source], video_processor: VLJEPAVideoProcessor, arguments: DataArguments
) -> datasets.Dataset:
    """Decode every distinct media file once, with a progress bar and all cores.

    The result stays on disk, memory-mapped, under a name made from the files' identity and the
    processor's settings: a second run finds it, a changed file or setting makes a new one.

    Returns: columns `path`, `frames` (bytes) and `error` ("" where it could be read).
    """
    media = {media_of(row): "video" in row for source in sources for row in source.rows}
    stats = [os.stat(path) for path in media]
    fingerprint = Hasher.hash(
        (
            [
                (path, stat.st_size, stat.st_mtime_ns)
                for path, stat in zip(media, stats, strict=True)
            ],
            video_processor.to_dict(),
        )
    )
    clips = datasets.Dataset.from_dict({"path": list(media), "is_video": list(media.values())})
    Path(arguments.cache_dir).mkdir(parents=True, exist_ok=True)
    return clips.map(
        decode,
        fn_kwargs={"video_processor": video_processor, "num_frames": video_processor.num_frames},
        num_proc=min(arguments.num_workers, len(clips)),
        new_fingerprint=fingerprint,
        cache_file_name=str(Path(arguments.cache_dir) / f"clips-{fingerprint}.arrow"),
        features=datasets.Features(
            path=datasets.Value("string"),
            is_video=datasets.Value("bool"),
            frames=datasets.Value("large_binary"),
            error=datasets.Value("string"),
        ),
        desc="Reading clips",
    )


def text_id(text: str) -> int:
    """A non-negative 63-bit number, equal for equal texts on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def vary(frames: torch.Tensor, seed: tuple[int, int]) -> torch.Tensor:
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


class ContrastiveDataset(torch.utils.data.Dataset):
    """Samples `{frames, query, target, target_id, group_id, negatives}` of all sources, end to end.

    `dataset[row + visit * VISIT]` is a row at a later visit: the same, but in an augmented source.

    `buckets` are the parts from which a batch may be drawn: rows of one source whose clips have
    one length, so that visual tokens need no padding and negatives come from one domain.
    """

    def __init__(self, sources: list[Source], clips: datasets.Dataset, crop: tuple[int, int]):
        self.clips = clips
        self.crop = crop
        self.clip_of = {path: index for index, path in enumerate(clips["path"])}
        self.rows = [row for source in sources for row in source.rows]
        self.augmented = np.array([s.arguments.augment for s in sources for _ in s.rows])
        self.buckets: list[tuple[float, np.ndarray]] = []
        start = 0
        for source in sources:
            is_video = np.array(["video" in row for row in source.rows], dtype=bool)
            for kind in (is_video, ~is_video):
                if kind.any():
                    share = source.arguments.weight * kind.mean()
                    self.buckets.append((share, start + np.flatnonzero(kind)))
            start += len(source.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        visit, index = divmod(number, VISIT)
        row = self.rows[index]
        group = row.get("group_id")
        stored = self.clips[self.clip_of[media_of(row)]]["frames"]
        frames = torch.frombuffer(bytearray(stored), dtype=torch.uint8).view(-1, 3, *self.crop)
        return {
            "frames": vary(frames, (index, visit)) if self.augmented[index] else frames,
            "query": row["query"],
            "target": row["target"],
            "target_id": text_id(row["target"]),
            # A row without a group, or with `null` for one, is alone in its own.
            "group_id": -1 - index if group is None else text_id(str(group)),
            "negatives": row.get("negatives", []),
        }


class MixtureSampler(Sampler[int]):
    """Numbers of `num_batches` global batches, each from one bucket, chosen by weight.

    Every bucket is walked through in a random order, again and again in a new one, so that a
    small source is repeated, never skipped. A number is row + visit * VISIT. The sequence depends
    on the seed alone: not on the number of processes, and a resumed run finds the same one.
    """

    def __init__(
        self,
        buckets: list[tuple[float, np.ndarray]],
        batch_size: int,
        num_batches: int,
        seed: int,
    ):
        self.buckets = buckets
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed

    def __len__(self) -> int:
        return self.batch_size * self.num_batches

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng(self.seed)
        weights = np.array([weight for weight, _ in self.buckets])
        left = [np.empty(0, dtype=np.int64) for _ in self.buckets]
        visits = [0] * len(self.buckets)
        for choice in generator.choice(
            len(self.buckets), size=self.num_batches, p=weights / weights.sum()
        ):
            while len(left[choice]) < self.batch_size:
                again = generator.permutation(self.buckets[choice][1])
                left[choice] = np.concatenate([left[choice], again + visits[choice] * VISIT])
                visits[choice] += 1
            yield from left[choice][: self.batch_size].tolist()
            left[choice] = left[choice][self.batch_size :]


def build_dataset(
    sources: list[Source], video_processor: VLJEPAVideoProcessor, arguments: DataArguments
) -> ContrastiveDataset:
    """Decode, set bad rows aside, say how many, and refuse when they are too many.

    Raises:
        RecipeError: more than `max_bad_share` of a source's rows are bad, or all of them; the
            message names them.
    """
    clips = decode_clips(sources, video_processor, arguments)
    errors = {
        path: error for path, error in zip(clips["path"], clips["error"], strict=True) if error
    }
    for source in sources:
        total = len(source.rows) + len(source.bad)
        source.bad += [
            BadRow(source.arguments.rows, row["line"], errors[media_of(row)])
            for row in source.rows
            if media_of(row) in errors
        ]
        source.rows = [row for row in source.rows if media_of(row) not in errors]
        source.bad.sort(key=lambda row: row.line)
        try:
            source.report = bad_rows_report(source.bad, total, arguments.max_bad_share)
        except ValueError as error:
            raise RecipeError(f"{source.arguments.rows}: {error}") from error
        if not source.rows:
            raise RecipeError(f"{source.arguments.rows}: no row is usable. {source.report}")
    crop = video_processor.crop_size
    return ContrastiveDataset(sources, clips, (crop["height"], crop["width"]))
