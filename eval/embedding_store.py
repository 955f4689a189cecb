"""Embeddings on disk: an evaluation that was killed continues, and a second one embeds nothing.

    embeddings/
      1f0c…/                    embeddings of one model, with its settings and these versions
        facts.json              what they depend on, other than the clip and the text
        83ab….safetensors       a part: the keys and embeddings of some clips or texts
        …

A part is complete or missing, and is never changed. It holds the hash of the facts and of its own
content, so one that was damaged or copied from another folder is not read. A key is a hash of a
clip's content, its number of frames and the tokens of a query, or of the tokens of a text. So files
may be moved and renamed, and benchmarks that ask the same about the same clips share embeddings.

Shapes: n embeddings of a part, D embedding size.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval.team import Team
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import NO_PIXELS, differences
from processing.output import OutputError, complete_file, incomplete_files, writing

FACTS = "facts.json"
FORMAT = 1  # of the keys and parts
OURS = re.compile(r"[0-9a-f]{32}|\..*")  # a folder of some facts, or a hidden file of the system
OLD = 3600  # seconds; a part is written in much less
KEY_BYTES = 16
# Packages whose versions can change an embedding
PACKAGES = ("av", "numpy", "pillow", "tokenizers", "torch", "transformers")
# Settings of a configuration that change no embedding of given tokens
NO_EMBEDDING = {
    *("_name_or_path", "transformers_version", "architectures", "backbones", "answers", "prompts"),
    *("target_prompts", "decoder_config", "decoder_prefix_tokens", "decoder_reads_query"),
    *("decoder_reads_previous", "freeze_vision", "freeze_text", "freeze_token_embedding"),
    *("freeze_logit_scale", "logit_scale_init_value", "logit_bias_init_value", "id2label"),
    *("label2id", "initializer_range"),
}
NOTHING_LOST = "Complete parts are kept; the same command continues."


# -- identity ------------------------------------------------------------------------------


def weights_digest(model: VLJEPAModel) -> str:
    """Return a hash of names, dtypes, shapes and numbers of the model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # As bytes, because NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def embedding_settings(config: dict) -> dict:
    """Return a configuration, at every level without the settings that change no embedding."""
    return {
        name: embedding_settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in NO_EMBEDDING
    }


def facts_of(model: VLJEPAModel, processor: VLJEPAProcessor, weights: str) -> dict:
    """Return the facts, other than clips and texts, that embeddings depend on.

    Args:
        weights: the model's `weights_digest`.
    """
    video = processor.video_processor.to_dict()
    facts = {
        "format": FORMAT,
        "hash of the weights": weights,
        "config": embedding_settings(model.config.to_dict()),
        "video_processor": {name: video[name] for name in video if name not in NO_PIXELS},
        "device": model.device.type,
        "versions": {name: version(name) for name in PACKAGES},
    }
    # As JSON returns them, to be equal to stored ones: it turns tuples into lists.
    return json.loads(json.dumps(facts, default=str))


def key_of(*parts: str | int | bytes) -> bytes:
    """Return the key of an embedding: a hash of everything that is not in the facts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=KEY_BYTES).digest()


# -- parts ---------------------------------------------------------------------------------


class BadPart(ValueError):
    """A part that cannot be used; the message is the reason."""


def checksum(keys: torch.Tensor, embeds: torch.Tensor) -> str:
    """Return a hash of keys `(n, KEY_BYTES)`, uint8, and embeddings `(n, D)`, float32."""
    digest = hashlib.blake2b(keys.numpy(), digest_size=16)
    digest.update(embeds.numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class PartWriter:
    """Writer of parts, which can be sent to another process.

    Attributes:
        folder (`Path`): the folder of the facts.
        facts (`str`): hash of the facts.
    """

    folder: Path
    facts: str

    def write(self, embeds: dict[bytes, torch.Tensor]) -> None:
        """Write a part with the embeddings `(D,)` of some keys; an empty key is left out.

        Raises: `OutputError` if the disk is full, or the folder cannot be written to.
        """
        known = [key for key in embeds if key]
        if not known:
            return
        keys = torch.from_numpy(np.stack([np.frombuffer(key, np.uint8) for key in known]))
        values = torch.stack([embeds[key] for key in known])
        content = {"keys": keys, "embeds": values}
        facts = {"facts": self.facts, "checksum": checksum(keys, values)}
        # Named by its keys: processes that write other embeddings use other names.
        name = hashlib.blake2b(keys.numpy(), digest_size=16).hexdigest()
        with (
            writing(self.folder, NOTHING_LOST),
            complete_file(self.folder / f"{name}.safetensors") as path,
        ):
            save_file(content, path, metadata=facts)

    def read(self, path: Path) -> dict[bytes, torch.Tensor]:
        """Return the embeddings of a part.

        Raises: `BadPart` for a damaged part, or one of other facts.
        """
        try:
            with safe_open(path, "pt") as file:
                stated = file.metadata() or {}
                keys, embeds = file.get_tensor("keys"), file.get_tensor("embeds")
        except (OSError, SafetensorError) as error:
            raise BadPart(f"damaged ({error})") from error
        if stated.get("facts") != self.facts:
            raise BadPart("of another model, other settings or other versions")
        if stated.get("checksum") != checksum(keys, embeds):
            raise BadPart("damaged (its content has changed since it was written)")
        names = [key.tobytes() for key in keys.numpy()]
        return dict(zip(names, embeds.clone(), strict=True))


# -- the store -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingStore:
    """Embeddings of one model, and the processes that compute missing ones.

    Attributes:
        writer ([`PartWriter`])
        team ([`Team`])
        embeds (`dict[bytes, torch.Tensor]`): embeddings `(D,)`, float32, by key.
    """

    writer: PartWriter
    team: Team = field(default_factory=Team)
    embeds: dict[bytes, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, facts: dict, team: Team | None = None) -> "EmbeddingStore":
        """Read the embeddings of these facts, or begin a folder for them.

        A part that cannot be used is named, removed and made again. The embeddings of other models
        and settings stay where they are, and are not read.

        Raises: `OutputError` for a folder with other files, or one that cannot be written to.
        """
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
        digest = digest.hexdigest()
        own = folder / digest
        check_folder(folder)
        if not own.is_dir():
            report_others(folder, facts)
        with writing(folder, NOTHING_LOST):
            own.mkdir(parents=True, exist_ok=True)
            for path in incomplete_files(own):
                # Left by a killed run; a newer one may be written by another run at this moment.
                if path.stat().st_mtime < time.time() - OLD:
                    path.unlink(missing_ok=True)
            if not (own / FACTS).is_file():
                with complete_file(own / FACTS) as path:
                    path.write_text(json.dumps(facts, indent=2))
        store = cls(PartWriter(own, digest), team or Team())
        store.read_parts()
        return store

    def read_parts(self) -> None:
        """Read every part; name and remove those that cannot be used."""
        bad = {}
        # Not `incomplete-…`, which another run may be writing
        for path in sorted(self.writer.folder.glob("[0-9a-f]*.safetensors")):
            try:
                self.embeds.update(self.writer.read(path))
            except BadPart as error:
                bad[path] = str(error)
        for path, reason in bad.items():
            print(f"{path}: {reason}; its embeddings are made again")
            with writing(path):
                path.unlink(missing_ok=True)

    def add(self, embeds: dict[bytes, torch.Tensor]) -> None:
        """Add embeddings that a process has written."""
        self.embeds.update({key: embed for key, embed in embeds.items() if key})


def check_folder(folder: Path) -> None:
    """Raise `OutputError` if a folder holds anything but embeddings."""
    if not folder.is_dir():
        return
    others = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)]
    if others:
        raise OutputError(
            f"--embeddings: {folder} has other files ({min(others)}). Give an empty or new folder."
        )


def report_others(folder: Path, facts: dict) -> None:
    """Print why the newest three of the embeddings that a folder has already are not read."""
    others = sorted(folder.glob(f"*/{FACTS}"), key=lambda path: path.stat().st_mtime)
    for path in others[-3:]:
        try:
            found = differences(json.loads(path.read_text(encoding="utf-8")), facts)
        except (AttributeError, ValueError) as error:  # not JSON, or not of an object
            found = [f"{FACTS} is damaged ({error})"]
        print(f"{path.parent}: not read: {shortened(found)}. Delete it if you do not need it.")


def shortened(sentences: Sequence[str]) -> str:
    """Return the first three sentences, and the number of the others."""
    others = f"; and {len(sentences) - 3} more" if len(sentences) > 3 else ""
    return "; ".join(sentences[:3]) + others


__all__ = ["EmbeddingStore", "PartWriter", "facts_of", "key_of", "weights_digest"]
