"""Visual tokens of the frozen X-Encoder, read from disk instead of computed.

    store/
      index.json          facts: the model and settings used, the number of clips, the error
      index.safetensors   for each clip: its key (sorted), shard, index there, file size and time;
                          and again by its content
      00000.safetensors   a shard: the visual tokens of clips of one length, stacked
      …

`python -m training.cache_features RECIPE --output DIR` writes a store. It is an error to read a
store that was made with other weights, other preprocessing or another number of frames, or from
files that have changed since.

A clip is found by its path, if the file has the size and time that it had. Otherwise the file is
read, and the clip is found by its content: files may be moved, renamed and copied.

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

from .rows import clip_key, content_key, file_stamp, key_number, media_file
from .video_processing_vljepa import VLJEPAVideoProcessor

FACTS, CLIP_INDEX = "index.json", "index.safetensors"
MISSING, CHANGED = -1, -2  # in place of a clip's shard, see `FeatureStore.look_up`
# Settings of a video processor that do not change pixels. The number of frames does; it is a fact
# of its own, because the caller can override it.
NO_PIXELS = {"auto_map", "num_frames", "processor_class", "return_metadata", "video_processor_type"}


class FeatureError(ValueError):
    """Features that cannot be used; the message names the difference and the cure."""


# -- identity of features --------------------------------------------------------------------


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of the X-Encoder's weights.

    The weights are hashed as bf16, so that fp32 and bf16 checkpoints of a model have one hash.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.x_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        # As int16, because NumPy has no bfloat16.
        digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def vision_settings(config: PreTrainedConfig) -> dict:
    """Return the settings that a kind of encoder declares itself, without those of every config.

    V-JEPA 2's own predictor (`pred_…`) is never run, so its settings are left out.
    """
    own = type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    settings = {name: value for name, value in config.to_dict().items() if name in own}
    return {
        "model_type": config.model_type,
        **{name: value for name, value in settings.items() if not name.startswith("pred_")},
    }


def made_with(model: PreTrainedModel, processor: VLJEPAVideoProcessor, num_frames: int) -> dict:
    """Return the facts, other than the media, that features depend on."""
    pixels = {name: value for name, value in processor.to_dict().items() if name not in NO_PIXELS}
    facts = {
        "weights": weights_digest(model),
        "vision_config": vision_settings(model.config.vision_config),
        "visual_token_pooling": model.config.visual_token_pooling,
        "video_processor": pixels,
        "num_frames": num_frames,
    }
    if model.config.concatenate_class_token:  # older stores have no such fact
        facts["concatenate_class_token"] = True
    # As JSON returns them, to be equal to stored ones: it turns tuples into lists.
    return json.loads(json.dumps(facts))


def read_facts(path: Path) -> dict:
    """Read a JSON file of facts.

    Raises:
        FeatureError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatureError(f"{path}: damaged ({error}). {cure(path.parent)}") from error


def differences(there: dict, here: dict, where: str = "") -> list[str]:
    """Return the differences between two dictionaries of facts, one sentence each."""
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
    """Round tokens `(…, N, Dx)` to int8, with a scale for each, `(…, N)` fp32.

    The largest magnitude of each token becomes 127.
    """
    tokens = tokens.float()
    # The clamp avoids 0 / 0 for a token of zeros.
    scales = tokens.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (tokens / scales[..., None]).round().to(torch.int8), scales


def from_int8(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values of int8 tokens `(…, N, Dx)` and their scales `(…, N)`."""
    return tokens.float() * scales[..., None]


# -- the store -------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def search(stored: torch.Tensor, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an index into the sorted numbers `stored` for each key, and whether it is there.

    An empty key is nowhere.
    """
    numbers = torch.tensor([key_number(key) for key in keys], dtype=torch.int64)
    # A key above all stored ones is inserted after the last: clamp it to a valid index.
    at = torch.searchsorted(stored, numbers).clamp(max=len(stored) - 1)
    return at, (stored[at] == numbers) & torch.tensor([key != "" for key in keys], dtype=torch.bool)


@dataclass(frozen=True)
class FeatureStore:
    """Visual tokens by row: `store[row]`.

    An object has only a path and facts. Every read maps a file, copies one clip and closes the
    file. So memory use does not grow, any number of shards can be read, and a store can be sent to
    worker processes, forked or not.

    Attributes:
        folder: folder of the store.
        facts: content of its `index.json`.
        dtype: dtype of the tokens that `store[row]` returns.
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
        """Open the store in `folder`, if its features are those that this model would compute.

        Args:
            num_frames: frames per video. Default: the video processor's.
            dtype: dtype of the returned tokens: the one in which the Predictor computes.
        Raises:
            FeatureError: there is no complete store, or its features differ.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise FeatureError(f"{folder}: there is no complete feature store. {cure(folder)}")
        facts = read_facts(folder / FACTS)
        wanted = made_with(model, video_processor, num_frames or video_processor.num_frames)
        if found := differences(facts["made_with"], wanted):
            raise FeatureError(
                f"{folder}: its features are not those of this model and processor: "
                f"{'; '.join(found)}. {cure(folder)}"
            )
        return cls(folder, facts, dtype)

    def __len__(self) -> int:
        return self.facts["clips"]

    def precision(self) -> dict:
        """Return the dtype in which features are stored, and the relative error that it causes."""
        return {"dtype": self.facts["dtype"], "relative_error": self.facts["relative_error"]}

    def __getitem__(self, row: dict) -> torch.Tensor:
        """Return the visual tokens `(N, Dx)` of a row's clip.

        Raises:
            FeatureError: the clip is not in the store, or its file has changed or is missing.
        """
        ((shard, index),) = self.look_up([row]).tolist()
        if shard < 0:
            self.check([row])  # raises, and names the reason
        with safe_open(shard_path(self.folder, shard), "pt") as file:
            tokens = file.get_slice("features")[index]
            if self.facts["dtype"] == "int8":
                tokens = from_int8(tokens, file.get_slice("scales")[index])
            # A copy, because the slice is a view of the whole shard: a worker process would send
            # all of it.
            return tokens.to(self.dtype, copy=True)

    def look_up(self, rows: list[dict]) -> torch.Tensor:
        """Return, for each row, its clip's shard and its index there, `(rows, 2)`.

        The shard is `MISSING` for a clip that is not in the store, and `CHANGED` if the store has
        another content of this file, or if the file is missing.
        """
        if not rows:  # a second evaluation reads all embeddings from its store
            return torch.empty(0, 2, dtype=torch.long)
        stamps = torch.tensor([file_stamp(media_file(row)) for row in rows])  # (rows, 2)
        with safe_open(self.folder / CLIP_INDEX, "pt") as index:
            # All are memory-mapped, so a search reads only a few pages.
            keys, clips = index.get_tensor("keys"), index.get_tensor("clips")
            at, known = search(keys, [clip_key(row) for row in rows])
            same = known & (clips[at, 2:] == stamps).all(dim=1)
            absent = torch.full((len(rows),), MISSING).masked_fill(known, CHANGED)
            found = clips[at, :2].where(same[:, None], absent[:, None])
            if not same.all():  # the usual case ends here: nothing is read
                moved = (~same).nonzero()[:, 0].tolist()
                contents = [content_key(rows[each]) for each in moved]
                at, known = search(index.get_tensor("contents"), contents)
                places = index.get_tensor("content_clips")[at]
                found[moved] = places.where(known[:, None], found[moved])
            return found

    def check_frames(self, num_frames: int) -> None:
        """Check that the features were computed from this number of frames per video.

        Raises:
            FeatureError: they were not.
        """
        if num_frames != self.facts["made_with"]["num_frames"]:
            raise FeatureError(
                f"{self.folder}: made with {self.facts['made_with']['num_frames']} frames per "
                f"video, but {num_frames} are requested. {cure(self.folder)}"
            )

    def missing(self, rows: list[dict]) -> list[dict]:
        """Return the rows whose clip is not in the store."""
        shards = self.look_up(rows)[:, 0].tolist()
        return [row for row, shard in zip(rows, shards, strict=True) if shard == MISSING]

    def check(self, rows: list[dict]) -> None:
        """Check that the clips of these rows are in the store and their files unchanged.

        Raises:
            FeatureError: some are not, or have changed or are missing; it counts them and names
                the first five.
        """
        clips = {clip_key(row): row for row in rows}
        shards = self.look_up([*clips.values()])[:, 0].tolist()
        for code, problem in ((MISSING, "not in it"), (CHANGED, "changed or missing")):
            keys = [key for key, shard in zip(clips, shards, strict=True) if shard == code]
            if keys:
                raise FeatureError(
                    f"{self.folder}: {len(keys)} of {len(clips)} clips are {problem}: "
                    f"{', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. {cure(self.folder)}"
                )


def cure(folder: Path) -> str:
    """Return the last sentence of an error: how to make a valid store."""
    return (
        "Delete the folder or choose another one, and make the store with: python -m "
        f"training.cache_features RECIPE --output {folder}"
    )


__all__ = ["FeatureError", "FeatureStore"]
