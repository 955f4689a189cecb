"""What the frozen X-Encoder makes of clips, read from disk instead of computed.

    store/
      index.json          what the features were made with, how many there are, and their error
      index.safetensors   which clip lies where: sorted keys; shard, place, the file's size and time
      00000.safetensors   a shard: the visual tokens of clips of one length, stacked
      …

`python -m training.cache_features RECIPE --output DIR` writes a store. One that was made with other
weights, another preprocessing or number of frames, or from files that have changed since, is never
read: each is an error.

Shapes: n clips of a shard, N visual tokens, Dx visual width.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .rows import clip_key, file_stamp, key_number, media_file
from .video_processing_vljepa import VLJEPAVideoProcessor

FACTS, PLACES = "index.json", "index.safetensors"
# Settings of a video processor that say nothing about pixels; the number of frames is kept apart.
NO_PIXELS = {"auto_map", "num_frames", "processor_class", "return_metadata", "video_processor_type"}


class FeatureError(ValueError):
    """Features that cannot be used; the message says what differs and how to make them anew."""


# -- what identifies features ----------------------------------------------------------------


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of the X-Encoder's weights as bf16, so that a model has the same one whether it is
    stored in fp32 or in bf16, before training and after it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.x_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def vision_settings(config: PreTrainedConfig) -> dict:
    """What a kind of encoder declares itself, without V-JEPA 2's own predictor."""
    own = type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    settings = {name: value for name, value in config.to_dict().items() if name in own}
    return {
        "model_type": config.model_type,
        **{name: value for name, value in settings.items() if not name.startswith("pred_")},
    }


def made_with(model: PreTrainedModel, processor: VLJEPAVideoProcessor, num_frames: int) -> dict:
    """All that features depend on beside the media, as JSON would give it back."""
    pixels = {name: value for name, value in processor.to_dict().items() if name not in NO_PIXELS}
    facts = {
        "weights": weights_digest(model),
        "vision_config": vision_settings(model.config.vision_config),
        "video_processor": pixels,
        "num_frames": num_frames,
    }
    return json.loads(json.dumps(facts))


def read_facts(path: Path) -> dict:
    """
    Raises:
        FeatureError: it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FeatureError(f"{path}: damaged ({error}). {cure(path.parent)}") from error


def differences(there: dict, here: dict, where: str = "") -> list[str]:
    """What two dictionaries of facts do not have in common, one sentence each."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{where}{name}.")
        elif name == "weights":
            found.append("the X-Encoder has other weights")
        else:
            found.append(f"{where}{name} is {one} there and {other} here")
    return found


# -- int8 ------------------------------------------------------------------------------------


def to_int8(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(…, N, Dx)` to int8 and a scale for each, `(…, N)` fp32: its largest value is 127."""
    tokens = tokens.float()
    scales = tokens.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (tokens / scales[..., None]).round().to(torch.int8), scales


def from_int8(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return tokens.float() * scales[..., None]


# -- the store -------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


@dataclass(frozen=True)
class FeatureStore:
    """Visual tokens by row: `store[row]`.

    It holds names and facts alone. Every read maps a file, copies one clip out of it and lets it
    go again: so memory stays flat, shards may be any number, and a store goes into worker
    processes, forked or not.

    Attributes:
        folder: of the store.
        facts: the content of its `index.json`.
        dtype: of what is read.
    """

    folder: Path
    facts: dict
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: PreTrainedModel,
        video_processor: VLJEPAVideoProcessor,
        *,
        num_frames: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "FeatureStore":
        """The store in `folder`, if its features are what this model would compute.

        Args:
            num_frames: of a video. Default: the video processor's own.
            dtype: of what is read; that in which the Predictor computes.
        Raises:
            FeatureError: there is no complete store, or it was made with something else.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise FeatureError(f"{folder}: there is no complete feature store. {cure(folder)}")
        facts = read_facts(folder / FACTS)
        wanted = made_with(model, video_processor, num_frames or video_processor.num_frames)
        if found := differences(facts["made_with"], wanted):
            raise FeatureError(
                f"{folder}: made for something else: {'; '.join(found)}. {cure(folder)}"
            )
        return cls(folder, facts, dtype)

    def __len__(self) -> int:
        return self.facts["clips"]

    def precision(self) -> dict:
        """How the features are stored, and what error that made."""
        return {"dtype": self.facts["dtype"], "relative_error": self.facts["relative_error"]}

    def __getitem__(self, row: dict) -> torch.Tensor:
        """The visual tokens `(N, Dx)` of a row's clip.

        Raises:
            FeatureError: the clip is not in the store, or its file has changed or gone.
        """
        ((shard, place, *then),) = self.look_up([row]).tolist()
        if shard < 0 or file_stamp(media_file(row)) != then:
            self.check([row])
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            tokens = file.get_slice("features")[place]
            if self.facts["dtype"] == "int8":
                tokens = from_int8(tokens, file.get_slice("scales")[place])
            # A copy: what was read is a view of the whole file, and would travel with all of it.
            return tokens.to(self.dtype, copy=True)

    def look_up(self, rows: list[dict]) -> torch.Tensor:
        """Shard, place in it, and the file's size and time, `(rows, 4)`; -1 for what is not in the
        store."""
        numbers = torch.tensor([key_number(clip_key(row)) for row in rows])
        with safe_open(self.folder / PLACES, "pt") as index:
            # Both are mapped: a search reads a few pages of them.
            keys, clips = index.get_tensor("keys"), index.get_tensor("clips")
            found = torch.searchsorted(keys, numbers).clamp(max=len(keys) - 1)
            return clips[found].where((keys[found] == numbers)[:, None], -1)

    def check_frames(self, num_frames: int) -> None:
        """
        Raises:
            FeatureError: videos are to be seen in another number of frames.
        """
        if num_frames != self.facts["made_with"]["num_frames"]:
            raise FeatureError(
                f"{self.folder}: made of {self.facts['made_with']['num_frames']} frames of a video "
                f"where {num_frames} are asked for. {cure(self.folder)}"
            )

    def missing(self, rows: list[dict]) -> list[dict]:
        """The rows whose clip is not in the store."""
        shards = self.look_up(rows)[:, 0].tolist()
        return [row for row, shard in zip(rows, shards, strict=True) if shard < 0]

    def check(self, rows: list[dict]) -> None:
        """
        Raises:
            FeatureError: clips of these rows are not in the store, or their files have changed or
                gone; it names the first of them and says how many.
        """
        clips = {clip_key(row): row for row in rows}
        problems = {"not in it": [], "changed or gone since": []}
        for (key, row), (shard, _, *then) in zip(
            clips.items(), self.look_up([*clips.values()]).tolist(), strict=True
        ):
            if shard < 0:
                problems["not in it"].append(key)
            elif file_stamp(media_file(row)) != then:
                problems["changed or gone since"].append(key)
        for problem, keys in problems.items():
            if keys:
                raise FeatureError(
                    f"{self.folder}: {len(keys)} of {len(clips)} clips are {problem}: "
                    f"{', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. {cure(self.folder)}"
                )


def cure(folder: Path) -> str:
    return (
        "Delete the folder, or take another one, and make it with: python -m "
        f"training.cache_features RECIPE --output {folder}"
    )


__all__ = ["FeatureError", "FeatureStore"]
