"""Writer of a feature store; `processing/feature_store.py` documents the format and reads it.

1. plan     every distinct clip, images before videos, in the order of the rows; cut into shards
2. shards   encoded batch by batch; written under another name and renamed when complete
3. index    written when all shards exist

A batch never spans two shards. So a shard depends on the plan alone, and not on the number of
processes or on whether an earlier run was killed.

Shapes: B batch, T frames, h and w pixels, n clips of a shard, N visual tokens, Dx visual width.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAVideoProcessor
from processing.feature_store import (
    CLIP_INDEX,
    FACTS,
    FeatureError,
    differences,
    from_int8,
    read_facts,
    shard_path,
    to_int8,
)
from processing.output import complete_file, incomplete_files, writing
from processing.rows import clip_key, content_key, file_stamp, key_number, media_file, size_key
from training.data.collator import to_pixel_values
from training.data.dataset import ContrastiveDataset
from training.data.sources import Source, StreamedSource

PLAN, LOCK = "plan.json", "lock"
SHARD_BYTES = 256 * 2**20


def check_recipe(model: VLJEPAModel, sources: list[Source | StreamedSource]) -> None:
    """Check that a clip has the same features at every step.

    Raises:
        FeatureError: the X-Encoder trains, or a source is augmented.
    """
    if not model.config.freeze_vision:
        raise FeatureError(
            "The X-Encoder trains, so its features change with every step. Train without a feature "
            "store, or set model.config.freeze_vision to true."
        )
    for source in sources:
        if source.arguments.augment:
            raise FeatureError(
                f"data.sources: {source.arguments.name} is augmented, so its frames differ in "
                "every epoch, but features are computed once. Set augment to false, or train "
                "without a feature store."
            )


class Samples(torch.utils.data.Dataset):
    """Single samples of a dataset.

    A DataLoader calls `__getitems__` if there is one, and `ContrastiveDataset`'s takes a training
    step instead of indices.
    """

    def __init__(self, dataset: ContrastiveDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]


class Encoder:
    """Frozen X-Encoder, run as in training: samples to visual tokens.

    Args:
        model: model on its device; its X-Encoder is stored in bf16 if training stores it so.
        video_processor: processor that rescales and normalises frames as in training.
        bf16: compute in bf16.
    """

    def __init__(self, model: VLJEPAModel, video_processor: VLJEPAVideoProcessor, bf16: bool):
        self.model, self.video_processor, self.bf16 = model.eval(), video_processor, bf16
        self.device = next(model.x_encoder.parameters()).device

    @torch.inference_mode()
    def __call__(self, samples: list[dict]) -> torch.Tensor:
        """Return the visual tokens `(B, N, Dx)` of samples with frames `(T, 3, h, w)`, on the
        CPU."""
        frames = torch.stack([sample["frames"] for sample in samples])  # (B, T, 3, h, w)
        pixels = to_pixel_values(frames.to(self.device), self.video_processor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.encode_video(pixels).cpu()


# -- the plan --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Clips of one kind, which are stored in one file.

    Attributes:
        number: number of the shard, which its file name holds.
        indices: index of one row of the dataset for each clip.
    """

    number: int
    indices: list[int]

    def batches(self, size: int) -> list[list[int]]:
        return [self.indices[start : start + size] for start in range(0, len(self.indices), size)]


def distinct_clips(rows: list[dict]) -> dict[str, list[int]]:
    """Return the index of the first row of every distinct clip, by kind."""
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(clip_key(row), index)
    return {
        kind: indices
        for kind in ("image", "video")
        if (indices := [index for index in first.values() if kind in rows[index]])
    }


def clip_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the bytes of a clip `(N, Dx)` on the disk; in int8, each token has an fp32 scale."""
    tokens, width = shape
    return 2 * tokens * width if dtype == "bfloat16" else tokens * (width + 4)


def cut_into_shards(
    clips: dict[str, list[int]],
    shapes: dict[str, tuple[int, int]],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> list[Shard]:
    """Cut the clips of each kind into shards of up to `shard_bytes`, with at least one clip each.

    Args:
        clips: indices of the rows of the distinct clips, by kind.
        shapes: shape `(N, Dx)` of a clip, by kind.
    """
    shards = []
    for kind, indices in clips.items():
        size = max(1, shard_bytes // clip_bytes(shapes[kind], dtype))
        for start in range(0, len(indices), size):
            shards.append(Shard(len(shards), indices[start : start + size]))
    return shards


def make_plan(
    rows: list[dict],
    clips: dict[str, list[int]],
    facts: dict,
    dtype: str,
    batch_size: int,
    bf16: bool,
) -> dict:
    """Return the facts that two runs must share to write the same store.

    Args:
        dtype: dtype in which features are stored.
        bf16: compute in bf16.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in (rows[index] for indices in clips.values() for index in indices):
        # Without paths and times: a store continues after its clips were moved or copied.
        digest.update(f"{size_key(row)} ".encode())
    count = sum(len(indices) for indices in clips.values())
    return {
        "made_with": facts,
        "dtype": dtype,
        "batch_size": batch_size,
        "precision": "bf16" if bf16 else "fp32",
        "media": f"{count} clips ({digest.hexdigest()})",
    }


# -- the folder ------------------------------------------------------------------------------


def put(path: Path, content: dict[str, torch.Tensor] | str) -> None:
    """Write a file so that it is complete or missing, even if the machine stops.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    with (
        writing(path.parent, "Its complete shards are kept; the same command continues."),
        complete_file(path) as written,
    ):
        if isinstance(content, str):
            written.write_text(content)
        else:
            save_file(content, written)
            # `save_file` lets the owner alone read a file; the plan has the user's usual
            # permissions.
            shutil.copymode(path.with_name(PLAN), written)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it so that no other run writes to it.

    The system releases the lock when this process ends, also if it is killed. A complete store is
    not locked, because nothing is written to it: it may be read-only.

    Raises:
        FeatureError: another run is writing to the folder, or the folder has other files.
    """
    if (folder / FACTS).is_file():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    others = {*folder.iterdir()} - {folder / LOCK, *incomplete_files(folder)}
    if others and not (folder / PLAN).is_file():
        raise FeatureError(f"{folder}: the folder has other files. Give an empty folder.")
    with open(folder / LOCK, "w") as file:
        try:
            # `lockf` instead of `flock`: worker processes would inherit the latter's lock, and
            # hold it after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FeatureError(
                f"{folder}: another run is writing to this folder. Wait until it ends, or give "
                "another folder."
            ) from error
        for path in incomplete_files(folder):  # left by a killed run
            path.unlink()
        yield


def begin(folder: Path, plan: dict) -> None:
    """Write the plan into a new folder, or check that the folder has the same plan.

    Raises:
        FeatureError: the folder has another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).is_file():
        put(folder / PLAN, json.dumps(plan, indent=2))
    if found := differences(read_facts(folder / PLAN), plan):
        raise FeatureError(
            f"{folder}: begun with other settings: {'; '.join(found)}. Delete the folder, or give "
            "another one."
        )


def missing_shards(folder: Path, shards: list[Shard]) -> list[Shard]:
    return [shard for shard in shards if not shard_path(folder, shard.number).is_file()]


# -- shards and index ------------------------------------------------------------------------


def as_written(tokens: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors to store for tokens `(B, N, Dx)`, and the relative error of each clip.

    The error is the norm of the rounding difference over the norm of the tokens.
    """
    if dtype == "bfloat16":
        written = {"features": tokens.to(torch.bfloat16)}
        read = written["features"].float()
    else:
        features, scales = to_int8(tokens)  # (B, N, Dx), (B, N)
        written = {"features": features, "scales": scales}
        read = from_int8(features, scales)
    exact = tokens.float()
    errors = (read - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return {**written, "errors": errors}  # errors: (B,)


def write_shards(
    folder: Path,
    shards: list[Shard],
    dataset: ContrastiveDataset,
    encoder: Encoder,
    *,
    dtype: str,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[int]:
    """Encode and write shards; yield the number of clips of every batch.

    Args:
        dtype: dtype in which features are stored.
        num_workers: number of processes that read samples ahead.
    Raises:
        FeatureError: a feature is NaN or infinite.
    """
    # One DataLoader over all shards: its workers start once, and read ahead across their ends.
    batches = iter(
        DataLoader(
            Samples(dataset),
            batch_sampler=[batch for shard in shards for batch in shard.batches(batch_size)],
            collate_fn=list,
            num_workers=num_workers,
        )
    )
    for shard in shards:
        parts = []
        for indices in shard.batches(batch_size):
            tokens = encoder(next(batches))  # (B, N, Dx)
            for index, finite in zip(indices, tokens.isfinite().flatten(1).all(1), strict=True):
                if not finite:
                    raise FeatureError(
                        f"{clip_key(dataset.rows[index])}: the X-Encoder's output is NaN or "
                        "infinite. Try training.precision=fp32."
                    )
            parts.append(as_written(tokens, dtype))
            yield len(indices)
        rows = [dataset.rows[index] for index in shard.indices]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors["keys"] = torch.tensor([key_number(clip_key(row)) for row in rows])  # (n,)
        tensors["contents"] = torch.tensor([key_number(content_key(row)) for row in rows])  # (n,)
        tensors["stamps"] = torch.tensor([file_stamp(media_file(row)) for row in rows])  # (n, 2)
        put(shard_path(folder, shard.number), tensors)


def write_index(folder: Path, plan: dict, shards: list[Shard]) -> dict:
    """Write the index of all shards, and return the facts of the store.

    The facts are written last: a store without them is incomplete.

    Raises:
        FeatureError: two clips have the same hash.
    """
    keys, contents, clips, errors = [], [], [], []
    for shard in shards:
        with safe_open(shard_path(folder, shard.number), "pt") as file:
            stamps = file.get_tensor("stamps")  # (n, 2)
            places = torch.tensor([[shard.number, index] for index in range(len(stamps))])
            clips.append(torch.cat([places, stamps], dim=1))  # (n, 4)
            # Cloned: a view would keep the whole shard mapped.
            keys.append(file.get_tensor("keys").clone())
            contents.append(file.get_tensor("contents").clone())
            errors.append(file.get_tensor("errors").clone())
    keys, order = torch.cat(keys).sort()
    if (keys.diff() == 0).any():
        raise FeatureError(f"{folder}: two clips have the same hash. Rename one of the files.")
    clips = torch.cat(clips)
    # Stable: files of equal content have equal features, and one order for any run.
    contents, content_order = torch.cat(contents).sort(stable=True)
    index = {"keys": keys, "clips": clips[order]}
    index |= {"contents": contents, "content_clips": clips[content_order, :2]}
    put(folder / CLIP_INDEX, index)
    errors = torch.cat(errors)
    facts = {
        **plan,
        "clips": len(keys),
        "shards": len(shards),
        "bytes": sum(shard_path(folder, shard.number).stat().st_size for shard in shards),
        "relative_error": {"mean": errors.mean().item(), "max": errors.max().item()},
    }
    put(folder / FACTS, json.dumps(facts, indent=2))
    # A run that waited for the lock finds the facts, and writes nothing.
    (folder / LOCK).unlink(missing_ok=True)
    return facts


__all__ = [
    "Encoder",
    "as_written",
    "begin",
    "check_recipe",
    "cut_into_shards",
    "distinct_clips",
    "make_plan",
    "missing_shards",
    "only_writer",
    "write_index",
    "write_shards",
]
