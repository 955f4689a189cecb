"""The writing of a feature store; `processing/feature_store.py` says what one is, and reads it.

1. plan     every distinct clip, images before videos, in the order of the rows; cut into shards
2. shards   encoded batch by batch; written under another name and renamed when whole
3. index    when every shard is there

No batch reaches over two shards, so a shard depends on the plan alone: not on the number of
processes, and not on whether a run was killed before it.

Shapes: B batch, T frames, h and w pixels, n clips of a shard, N visual tokens, Dx visual width.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAVideoProcessor
from processing.feature_store import (
    FACTS,
    PLACES,
    FeatureError,
    differences,
    from_int8,
    read_facts,
    shard_path,
    to_int8,
)
from processing.rows import clip_key, file_stamp, key_number, media_file
from training.data.collator import to_pixel_values
from training.data.dataset import ContrastiveDataset
from training.data.sources import Source, StreamedSource

PLAN = "plan.json"
SHARD_BYTES = 256 * 2**20


def check_recipe(model: VLJEPAModel, sources: list[Source | StreamedSource]) -> None:
    """
    Raises:
        FeatureError: the X-Encoder trains, or a source is augmented: features would be others at
            every step, or at every visit.
    """
    if not model.config.freeze_vision:
        raise FeatureError(
            "The X-Encoder trains, so its features change with every step. Train without a feature "
            "store, or set model.config.freeze_vision to true."
        )
    for source in sources:
        if source.arguments.augment:
            raise FeatureError(
                f"data.sources: {source.arguments.name} has augment: true, so its frames differ at "
                "every visit, and features are computed once. Set augment to false, or train "
                "without a feature store."
            )


class Samples(torch.utils.data.Dataset):
    """Samples of a dataset one by one, where a DataLoader would ask it for a training step's."""

    def __init__(self, dataset: ContrastiveDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]


class Encoder:
    """The frozen X-Encoder as training runs it: samples to visual tokens.

    Args:
        model: on its device; its X-Encoder is in bf16 where training stores it so.
        video_processor: rescales and normalises frames as in training.
        bf16: compute in bf16.
    """

    def __init__(self, model: VLJEPAModel, video_processor: VLJEPAVideoProcessor, bf16: bool):
        self.model, self.video_processor, self.bf16 = model.eval(), video_processor, bf16
        self.device = next(model.x_encoder.parameters()).device

    @torch.inference_mode()
    def __call__(self, samples: list[dict]) -> torch.Tensor:
        """Samples with frames `(T, 3, h, w)` to visual tokens `(B, N, Dx)`, on the CPU."""
        frames = torch.stack([sample["frames"] for sample in samples])  # (B, T, 3, h, w)
        pixels = to_pixel_values(frames.to(self.device), self.video_processor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.encode_video(pixels).cpu()


# -- the plan --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Clips of one length.

    Attributes:
        number: of the shard.
        indices: a row of the dataset for each clip.
    """

    number: int
    indices: list[int]

    def batches(self, size: int) -> list[list[int]]:
        return [self.indices[start : start + size] for start in range(0, len(self.indices), size)]


def distinct_clips(rows: list[dict]) -> dict[str, list[int]]:
    """The first row of every distinct clip, by kind."""
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(clip_key(row), index)
    return {
        kind: indices
        for kind in ("image", "video")
        if (indices := [index for index in first.values() if kind in rows[index]])
    }


def clip_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Of a clip `(N, Dx)` on the disk: its tokens, and in int8 a scale for each."""
    tokens, width = shape
    return 2 * tokens * width if dtype == "bfloat16" else tokens * (width + 4)


def cut_into_shards(
    clips: dict[str, list[int]],
    shapes: dict[str, tuple[int, int]],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> list[Shard]:
    """Clips and the shape of one, by kind, to shards of at most so many bytes."""
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
    """What two runs must have in common for both to write the same store.

    Args:
        dtype: of what is written.
        bf16: compute in bf16.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in (rows[index] for indices in clips.values() for index in indices):
        digest.update(f"{clip_key(row)} {file_stamp(media_file(row))} ".encode())
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
    """Write a file under another name, have it on the disk, and rename it: whole or not there."""
    written = path.with_name(f"incomplete-{path.name}")
    if isinstance(content, str):
        written.write_text(content)
    else:
        save_file(content, written)
        shutil.copymode(path.with_name(PLAN), written)  # or it would be its owner's alone
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    written.rename(path)


def begin(folder: Path, plan: dict) -> None:
    """Write the plan into an empty folder, or find the same one there and go on.

    Raises:
        FeatureError: the folder has another plan, or other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("incomplete-*"):  # of a run that was killed
        path.unlink()
    if not (folder / PLAN).is_file():
        if any(folder.iterdir()):
            raise FeatureError(f"{folder}: there are other files in it. Give an empty folder.")
        put(folder / PLAN, json.dumps(plan, indent=2))
    if found := differences(read_facts(folder / PLAN), plan):
        raise FeatureError(
            f"{folder}: begun for something else: {'; '.join(found)}. Delete the folder, or give "
            "another one."
        )


def missing_shards(folder: Path, shards: list[Shard]) -> list[Shard]:
    return [shard for shard in shards if not shard_path(folder, shard.number).is_file()]


# -- shards and index ------------------------------------------------------------------------


def as_written(tokens: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Tokens `(B, N, Dx)` as they are written, with the error that this makes: the norm of the
    difference over the norm, for each clip."""
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
    """Encode and write these shards; yield the number of clips of every batch.

    Args:
        num_workers: processes that read samples ahead.
    Raises:
        FeatureError: features that are no numbers.
    """
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
                        f"{clip_key(dataset.rows[index])}: the X-Encoder's output has values that "
                        "are no numbers. Try training.precision=fp32."
                    )
            parts.append(as_written(tokens, dtype))
            yield len(indices)
        rows = [dataset.rows[index] for index in shard.indices]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors["keys"] = torch.tensor([key_number(clip_key(row)) for row in rows])  # (n,)
        tensors["stamps"] = torch.tensor([file_stamp(media_file(row)) for row in rows])  # (n, 2)
        put(shard_path(folder, shard.number), tensors)


def write_index(folder: Path, plan: dict, shards: list[Shard]) -> dict:
    """Collect what the shards hold; returns the facts of the store.

    Raises:
        FeatureError: two clips share a number.
    """
    keys, clips, errors = [], [], []
    for shard in shards:
        with safe_open(shard_path(folder, shard.number), "pt") as file:
            stamps = file.get_tensor("stamps")  # (n, 2)
            places = torch.tensor([[shard.number, place] for place in range(len(stamps))])
            clips.append(torch.cat([places, stamps], dim=1))  # (n, 4)
            keys.append(file.get_tensor("keys").clone())
            errors.append(file.get_tensor("errors").clone())
    keys, order = torch.cat(keys).sort()
    if (keys.diff() == 0).any():
        raise FeatureError(f"{folder}: two clips have one number; rename one of the files.")
    put(folder / PLACES, {"keys": keys, "clips": torch.cat(clips)[order]})
    errors = torch.cat(errors)
    facts = {
        **plan,
        "clips": len(keys),
        "shards": len(shards),
        "bytes": sum(shard_path(folder, shard.number).stat().st_size for shard in shards),
        "relative_error": {"mean": errors.mean().item(), "max": errors.max().item()},
    }
    put(folder / FACTS, json.dumps(facts, indent=2))
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
    "write_index",
    "write_shards",
]
