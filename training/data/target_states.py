"""Outputs of a frozen Y-Encoder for every target text, computed once and stored.

    data.cache_dir/targets-…/       a Y-Encoder: its weights, settings and compute dtype
        ….safetensors               up to `TEXTS_PER_FILE` texts: `keys` and `states`

A text is known by the hash of its tokens, which the prompt and the tokenizer decide too. So a start
encodes the texts alone that no earlier start has encoded. A file is complete or missing: a killed
run loses at most the one that it was computing.

Shapes: U texts of a file, Dt width of the Y-Encoder's output.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.embedding import read_tokens
from modeling_vljepa.y_encoder import YEncoder
from processing import VLJEPAProcessor
from processing.output import complete_file, writing
from training.arguments import RecipeError

TEXTS_PER_FILE = 8192  # 12 MiB of EmbeddingGemma's states in bf16
TEXTS_PER_PASS = 256
SILENT_SECONDS = 5  # a shorter computation has no progress bar

Key = tuple[int, int]  # the hash of a text's tokens, as two int64


class TargetStates(Mapping[str, torch.Tensor]):
    """Output of the Y-Encoder `(Dt,)` by text, on the CPU.

    The states stay in their files, which are mapped into memory: processes share them, and they
    take no memory that the system cannot have back.

    Args:
        found: the tensor `(U, Dt)` and the row in it of each text.
    """

    def __init__(self, found: dict[str, tuple[torch.Tensor, int]]):
        self.found = found

    def __getitem__(self, text: str) -> torch.Tensor:
        states, row = self.found[text]
        return states[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def encoder_hash(encoder: YEncoder, dtype: torch.dtype) -> str:
    """Return a hash of all that decides an output of the Y-Encoder, except the tokens.

    Args:
        dtype: compute dtype.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = encoder.backbone.config.to_dict()
    # Where a configuration comes from, and its version, do not change an output.
    names = {"transformers_version", "dtype", *(name for name in config if name[:1] == "_")}
    settings = {name: config[name] for name in sorted(config.keys() - names)}
    layers = [str(layer) for layer in encoder.dense]
    facts = [settings, encoder.pooling, layers, str(dtype)]
    digest.update(json.dumps(facts, default=str).encode())
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_texts(
    model: VLJEPAModel, processor: VLJEPAProcessor, texts: list[str], dtype: torch.dtype
) -> torch.Tensor:
    """Return the Y-Encoder's output for texts of similar length, `(U, Dt)` in `dtype`, on the CPU.

    It computes in `dtype` as training does: under autocast.
    """
    batch = processor(targets=texts).to(model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        states = model.y_encoder(batch["target_input_ids"], batch["target_attention_mask"])
    return states.to("cpu", dtype)


# -- files ---------------------------------------------------------------------------------


def content_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("keys", "states"):
        digest.update(tensors[name].view(torch.uint8).numpy())
    return digest.hexdigest()


def write_file(folder: Path, keys: list[Key], states: torch.Tensor) -> Path:
    """Write the states `(U, Dt)` of texts to a file of their own, and return its path.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    tensors = {"keys": torch.tensor(keys), "states": states}
    name = hashlib.blake2b(tensors["keys"].numpy(), digest_size=16).hexdigest()
    path = folder / f"{name}.safetensors"
    with writing(f"data.cache_dir: {folder}", "The states of earlier texts are kept."):
        folder.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as written:
            written.write_bytes(save(tensors, {"hash": content_hash(tensors)}))
    return path


def read_file(path: Path) -> dict[Key, tuple[torch.Tensor, int]]:
    """Return the states `(U, Dt)` of a file and the row in it of each text, by key.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("keys", "states")}
            written = (file.metadata() or {}).get("hash")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if content_hash(tensors) != written:
        raise ValueError("its content is not what was written")
    keys = map(tuple, tensors["keys"].tolist())
    return {key: (tensors["states"], row) for row, key in enumerate(keys)}


def read_files(folder: Path) -> dict[Key, tuple[torch.Tensor, int]]:
    """Return the stored states by key. A damaged file is reported and removed."""
    stored = {}
    for path in sorted(folder.glob("[0-9a-f]*.safetensors")):  # not those of killed runs
        try:
            stored |= read_file(path)
        except ValueError as error:
            print(f"note: {path}: damaged ({error}); its texts are encoded again", flush=True)
            with writing(f"data.cache_dir: {path}"):
                path.unlink(missing_ok=True)  # another run may have removed it
    return stored


# -- all texts -----------------------------------------------------------------------------


def key_of(digest: bytes) -> Key:
    return tuple(int.from_bytes(half, "little", signed=True) for half in (digest[:8], digest[8:]))


def read_target_states(
    model: VLJEPAModel, processor: VLJEPAProcessor, texts: list[str], folder: Path, bf16: bool
) -> TargetStates:
    """Return the Y-Encoder's output for each distinct text; encode and store those that are new.

    Args:
        model: model on its device; its Y-Encoder is stored in bf16 if training stores it so.
        folder: the recipe's `data.cache_dir`.
        bf16: compute and store in bf16 instead of fp32.

    Raises:
        OutputError: the states cannot be written.
        RecipeError: the Y-Encoder is trained, so its outputs change.
    """
    if not model.config.freeze_text:
        raise RecipeError(
            "data.cache_targets: the Y-Encoder is trained here, so its outputs change. Set it to "
            "false, or model.config.freeze_text to true."
        )
    dtype = torch.bfloat16 if bf16 else torch.float32
    folder = folder / f"targets-{encoder_hash(model.y_encoder, dtype)}"
    distinct = sorted(set(texts))
    read = read_tokens(processor, distinct)
    key_of_text = {text: key_of(each) for text, (each, _) in zip(distinct, read, strict=True)}
    lengths = {key_of(each): length for each, length in read}  # in tokens
    text_of = {key: text for text, key in key_of_text.items()}
    stored = read_files(folder)
    # Texts of one length share a pass: little padding. The longest first: a lack of memory shows
    # at once.
    missing = sorted((key for key in lengths if key not in stored), key=lambda k: -lengths[k])
    with tqdm(
        total=len(missing), desc="Encoding targets", unit="text", delay=SILENT_SECONDS
    ) as progress:
        for start in range(0, len(missing), TEXTS_PER_FILE):
            keys, parts = missing[start : start + TEXTS_PER_FILE], []
            for first in range(0, len(keys), TEXTS_PER_PASS):
                of_pass = [text_of[key] for key in keys[first : first + TEXTS_PER_PASS]]
                parts.append(encode_texts(model, processor, of_pass, dtype))
                progress.update(len(of_pass))
            stored |= read_file(write_file(folder, keys, torch.cat(parts)))
    return TargetStates({text: stored[key] for text, key in key_of_text.items()})


__all__ = ["TargetStates", "encode_texts", "read_target_states"]
