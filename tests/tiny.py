"""Tiny models, tokenizers, rows and media, in place of downloaded ones."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_vljepa import (
    VLJEPAConfig,
    VLJEPAForConditionalGeneration,
    VLJEPAModel,
    VLJEPATokenConfig,
    VLJEPATokenModel,
)
from processing import VLJEPAProcessor, VLJEPAVideoProcessor

HANG_SECONDS = 1800  # ends a process that hangs; a busy machine needs much less

SUB_CONFIGS = {
    "vision_config": {
        "model_type": "vjepa2",
        "crop_size": 32,
        "patch_size": 16,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pred_hidden_size": 12,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
    "predictor_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": True,
    },
}
BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# An image tower; tests add the `model_type` of a transformer with patches.
RESNET = {  # reads a frame of 32 pixels as 2 x 2 visual tokens
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 48],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}

# V-JEPA 2.1 with two levels.
VJEPA21 = {
    "model_type": "vjepa2_1",
    "crop_size": 32,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hierarchical_layers": [0, 1],
}

# Perception Encoder: its image tower, and its text tower as transformers' CLIP.
PERCEPTION = {
    "model_type": "perception_encoder_vision",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "output_dim": 24,
}
PERCEPTION_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_act": "gelu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# A Y-Decoder whose tokens are those of `tiny_tokenizer()`.
DECODER = {
    **SUB_CONFIGS["predictor_config"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TEXTS = (
    "a man rides a bike",
    "the cat sits on the mat",
    "what is the dog doing ?",
    "open the door and close the window",
)


def tiny_tokenizer(
    texts: tuple[str, ...] = TEXTS,
    *,
    vocab_size: int = 300,
    bos: bool = True,
    eos: bool = False,
    max_length: int = 512,
    padding_side: str = "right",
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`; it can encode any string.

    The ids of `<pad>`, `<bos>`, `<eos>` are 0, 1, 2. `bos` and `eos` add these tokens to every
    text. `vocab_size` is an upper bound of at least 259.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = " ".join(["<bos>"] * bos + ["$A"] + ["<eos>"] * eos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
        padding_side=padding_side,
    )


def tiny_settings(**changes: object) -> dict:
    """Return the arguments of `VLJEPAConfig`, as in a recipe.

    A dictionary for a sub-network changes the tiny one, or replaces it if it has a `model_type`.
    """
    settings = {"embedding_dim": 24, **SUB_CONFIGS, **changes}
    for name, tiny in SUB_CONFIGS.items():
        if "model_type" not in settings[name]:
            settings[name] = tiny | settings[name]
    return settings


def tiny_config(**changes: object) -> VLJEPAConfig:
    """Return a configuration with three sub-networks of two layers; `changes` as in
    `tiny_settings`."""
    return VLJEPAConfig(**tiny_settings(**changes))


def tiny_model(seed: int = 0, **changes: object) -> VLJEPAModel:
    """Build a random `tiny_config` model in evaluation mode, as `from_pretrained` returns one."""
    torch.manual_seed(seed)
    return VLJEPAModel(tiny_config(**changes)).eval()


def tiny_writer(seed: int = 0, **changes: object) -> VLJEPAForConditionalGeneration:
    """Build a random `tiny_config` model with a random `DECODER`, in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(**{"decoder_config": DECODER, **changes})
    return VLJEPAForConditionalGeneration(config).eval()


def tiny_token_model(seed: int = 0, **changes: object) -> VLJEPATokenModel:
    """Build a random token-prediction model of four layers, in evaluation mode."""
    torch.manual_seed(seed)
    settings = tiny_settings(predictor_config=DECODER | {"num_hidden_layers": 4})
    return VLJEPATokenModel(VLJEPATokenConfig(**settings, **changes)).eval()


def tiny_processor(num_frames: int = 4) -> VLJEPAProcessor:
    """Return a processor with crops of 32 pixels and two tokenizers that encode every text
    differently."""
    return VLJEPAProcessor(
        VLJEPAVideoProcessor(crop_size=32, num_frames=num_frames),
        tiny_tokenizer(),
        tiny_tokenizer(("red green blue",), vocab_size=264, eos=True),
    )


def tiny_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return three samples for a `tiny_model`: clips of four frames, padded queries and targets."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values_videos": torch.randn(3, 4, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 300, (3, 5), generator=generator),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        "target_input_ids": torch.randint(3, 300, (3, 12), generator=generator),
        "target_attention_mask": (torch.arange(12) < torch.tensor([[12], [3], [7]])).long(),
    }


def noise(*shape: int) -> np.ndarray:
    """Return random uint8 pixels, equal on every call."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_clip(path: Path, frames: np.ndarray, rotation: int = 0, **options: str) -> Path:
    """Write (T, H, W, 3) uint8 at 10 frames per second, H.264, 4:4:4 so that odd sizes fit."""
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "1"}  # nearly lossless; B-frames reorder the packets
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@cache
def tiny_clips() -> dict[str, bytes]:
    """Encode the clips of `tiny_rows`, once for all tests of a process."""
    with TemporaryDirectory() as folder:
        wide = write_clip(Path(folder, "wide.mp4"), noise(6, 48, 64, 3))
        tall = write_clip(Path(folder, "tall.mkv"), 255 - noise(9, 64, 40, 3))
        return {clip.name: clip.read_bytes() for clip in (wide, tall)}


def tiny_rows(folder: Path) -> Path:
    """Write two images and two clips of different sizes, and a JSONL file with a row for each."""
    Image.fromarray(noise(40, 60, 3)).save(folder / "wide.png")
    Image.fromarray(255 - noise(70, 50, 3)).save(folder / "tall.jpg")
    for name, content in tiny_clips().items():
        (folder / name).write_bytes(content)
    rows = [
        {"image": "wide.png", "query": "what is it ?", "target": "a cat"},
        {"image": "tall.jpg", "query": "what color is it ?", "target": "red"},
        {"video": "wide.mp4", "query": "what does the man do ?", "target": "he rides a bike"},
        {"video": "tall.mkv", "query": "", "target": "the door opens"},
    ]
    return write_rows(folder / "rows.jsonl", rows)


def two_folders_of_equal_names(parent: Path) -> list[Path]:
    """Write two folders whose files have equal names, sizes and times, and other pixels."""
    rows = []
    for name, color in (("a", 10), ("b", 200)):
        (parent / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (color,) * 3).save(parent / name / "clip.bmp")
        os.utime(parent / name / "clip.bmp", ns=(10**18, 10**18))
        row = {"image": "clip.bmp", "target": f"folder {name}"}
        rows.append(write_rows(parent / name / "rows.jsonl", [row]))
    return rows


def tiny_recipe(rows: Path, **training: object) -> Path:
    """Write a recipe for a `tiny_config` model next to its `rows`: fp32, on the CPU."""
    recipe = {
        "model": {"vocab_size": 300, "config": tiny_settings()},
        "processor": {"image_size": 32, "num_frames": 4},
        "data": {
            "sources": [{"rows": str(rows)}],
            "cache_dir": str(rows.parent / "cache"),
            "num_workers": 1,
        },
        "training": {
            "output_dir": str(rows.parent / "out"),
            "max_steps": 4,
            "global_batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "save_total_limit": None,
            "report_to": "none",
            "device_tflops": 1.0,  # measuring it would take two seconds
            **training,
        },
    }
    path = rows.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_elsewhere(script: str, folder: Path) -> str:
    """Run Python in `folder`, offline and without this repository; return the printed text."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
