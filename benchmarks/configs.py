"""The model sizes at which benchmarks run on a machine without accelerators."""

import copy

from modeling_vljepa import VLJEPAConfig

MID = {
    "vision_config": {
        "model_type": "vjepa2",
        "crop_size": 256,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "pred_hidden_size": 32,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 2,
    },
    "predictor_config": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "use_bidirectional_attention": True,
    },
}

# The demonstration's widths, with a Y-Encoder that trains; frames of 64 pixels.
SMALL = {
    "embedding_dim": 384,
    "vision_config": {
        "model_type": "vjepa2",
        "crop_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pred_hidden_size": 32,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 2,
    },
    "predictor_config": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "use_bidirectional_attention": True,
    },
}


def mid_config() -> VLJEPAConfig:
    """Return V-JEPA 2 (12 layers of 384), Llama (8 of 512), Gemma (12 of 256), 1,536 dimensions."""
    return VLJEPAConfig(**copy.deepcopy(MID))


def small_config(side: int = 64) -> VLJEPAConfig:
    """Return V-JEPA 2 (2 layers of 128), Llama (3 of 128), Gemma (4 of 128), 384 dimensions."""
    config = VLJEPAConfig(**copy.deepcopy(SMALL))
    config.vision_config.crop_size = side
    return config
