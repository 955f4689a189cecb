"""Tiny random checkpoints in the file formats of public backbones."""

import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.tiny import BERT, RESNET, SUB_CONFIGS, TOWER, VJEPA21, tiny_tokenizer

LM = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CLIP_TEXT = {
    "vocab_size": 310,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


def config(model_type: str, **settings: object) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **settings)


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preprocessor: dict | None = None,
    **options: object,
) -> Path:
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if preprocessor is not None:
        name = "video_preprocessor_config.json" if "vjepa" in model.config.model_type else ""
        (folder / (name or "preprocessor_config.json")).write_text(json.dumps(preprocessor))
    return folder


# -- vision --------------------------------------------------------------------------------

VISION = {
    "vjepa2": (
        "vjepa2",
        {k: v for k, v in SUB_CONFIGS["vision_config"].items() if k != "model_type"},
    ),
    "vjepa2_1": ("vjepa2_1", {k: v for k, v in VJEPA21.items() if k != "model_type"}),
    "dinov2": ("dinov2", {**TOWER, "image_size": 64}),
    "dinov3_vit": ("dinov3_vit", {**TOWER, "num_register_tokens": 2}),
    "clip": ("clip", {"vision_config": TOWER, "text_config": CLIP_TEXT, "projection_dim": 24}),
    "siglip": (
        "siglip",
        {"vision_config": TOWER, "text_config": {**CLIP_TEXT, "projection_size": 32}},
    ),
    "resnet": ("resnet", {k: v for k, v in RESNET.items() if k != "model_type"}),
    "convnext": (
        "convnext",
        {"hidden_sizes": [8, 16, 48], "depths": [1, 1, 1], "num_stages": 3, "image_size": 32},
    ),
}
PREPROCESSOR = {
    "vjepa2": {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}},
    "vjepa2_1": {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}},
    "dinov2": {
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 36},
        "resample": 3,
    },
    "dinov3_vit": {"size": {"height": 32, "width": 32}},
    "clip": {"crop_size": 32, "size": 32, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26] * 3},
    "siglip": {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "resnet": {"size": 32, "crop_pct": 0.875},
    "convnext": {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "image_mean": [0.5] * 3},
}


def vision(folder: Path, kind: str = "vjepa2", dtype: torch.dtype = torch.float32) -> Path:
    """Write an image or video tower; `clip` and `siglip` include a text tower."""
    model_type, settings = VISION[kind]
    torch.manual_seed(1)
    model = AutoModel.from_config(config(model_type, **settings)).to(dtype)
    tokenizer = clip_tokenizer() if kind == "clip" else None
    return save(folder, model, tokenizer, preprocessor=PREPROCESSOR[kind])


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer like CLIP's: the end token has the highest id and is the padding, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    ends = [("<bos>", tokenizer.bos_token_id), ("<end>", tokenizer.eos_token_id)]
    template = TemplateProcessing(single="<bos> $A <end>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


# -- language models -----------------------------------------------------------------------


def language_model(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: object
) -> Path:
    """Write a causal language model: ten layers, several shards, head tied to the embeddings."""
    torch.manual_seed(2)
    tokenizer = tiny_tokenizer()
    settings = {**LM, "tie_word_embeddings": True, **settings}
    model = AutoModelForCausalLM.from_config(config(kind, **settings)).to(dtype)
    with torch.no_grad():  # otherwise all norms would have equal weights
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return save(folder, model, tokenizer, max_shard_size="40KB")


# -- text encoders -------------------------------------------------------------------------


def text_config(kind: str) -> PreTrainedConfig:
    if kind == "gemma":
        settings = dict(SUB_CONFIGS["text_config"])
        return config(settings.pop("model_type"), **settings, pad_token_id=0)
    if kind == "qwen3":
        return config("qwen3", **{**LM, "num_hidden_layers": 2})
    settings = dict(BERT)
    return config(settings.pop("model_type"), **settings)


def sentence_transformer(folder: Path, kind: str = "gemma") -> Path:
    """Write a folder like EmbeddingGemma, Qwen3-Embedding or MiniLM with sentence-transformers."""
    torch.manual_seed(3)
    base, own = folder / "base", text_config(kind)
    # Qwen3-Embedding pools the end token, so its tokenizer adds one.
    tokenizer = tiny_tokenizer(bos=kind != "qwen3", eos=kind != "gemma")
    save(base, AutoModel.from_config(own), tokenizer)
    width = own.hidden_size
    modules = [
        Transformer(str(base)),
        Pooling(width, pooling_mode="lasttoken" if kind == "qwen3" else "mean"),
    ]
    if kind == "gemma":
        modules += [
            Dense(width, 64, bias=False, activation_function=nn.Identity()),
            Dense(64, 24, bias=False, activation_function=nn.Identity()),
        ]
    prompts = {} if kind == "bert" else PROMPTS
    model = SentenceTransformer(modules=[*modules, Normalize()], prompts=prompts, device="cpu")
    model.save_pretrained(str(folder / "saved"))
    return folder / "saved"


def encoder_decoder(folder: Path, kind: str, encoder_alone: bool = False) -> Path:
    """Write a T5 or an M2M-100; `encoder_alone` writes the encoder only, like SONAR's port."""
    torch.manual_seed(4)
    settings = {"vocab_size": 300, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "t5":
        settings |= {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    else:
        for side in ("encoder", "decoder"):
            settings[f"{side}_layers"] = 2
            settings[f"{side}_ffn_dim"] = 64
            settings[f"{side}_attention_heads"] = 4
    model = AutoModel.from_config(config(kind, **settings))
    if encoder_alone:
        model = model.get_encoder()
    return save(folder, model, tiny_tokenizer(eos=True))


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)
