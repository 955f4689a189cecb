"""Configuration of a VL-JEPA model: its sub-networks and their shared embedding space."""

import math
import os
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .hub_files import AUTO_MAP, CUSTOM_PIPELINES, write_hub_files
from .perception_encoder import PerceptionEncoderVisionConfig
from .prompts import complete_prompts, complete_target_prompts
from .vjepa21 import VJEPA21Config

# Configurations that transformers does not know, by model type.
OWN_CONFIGS = {each.model_type: each for each in (VJEPA21Config, PerceptionEncoderVisionConfig)}
PREDICTOR_POOLINGS = ("mean", "query", "attention")


class VLJEPAConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VLJEPAModel`], and of the [`VLJEPAForConditionalGeneration`] that adds a
    Y-Decoder to it. The defaults are those of the paper (arXiv 2512.10942, sections 3.1 and 3.2).
    For choices that the paper does not state, the reasons are given below.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The X-Encoder. Default: V-JEPA 2 ViT-L at 256 pixels. A `model_type` of `"vjepa2_1"` is
            V-JEPA 2.1, `"perception_encoder_vision"` the image tower of Perception Encoder; both
            have configurations of their own ([`VJEPA21Config`],
            [`PerceptionEncoderVisionConfig`]).
        predictor_config (`dict` or `PreTrainedConfig`, *optional*):
            The Predictor. Default: eight layers of the shape of Llama-3.2-1B. Its attention is
            bidirectional, even if the dictionary sets `is_causal`: the Predictor reads and does
            not generate. `causal_predictor` changes that.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The Y-Encoder. Default: the shape of EmbeddingGemma-300M, bidirectional.
        decoder_config (`dict` or `PreTrainedConfig`, *optional*):
            The Y-Decoder, a causal language model. Default: no Y-Decoder; most tasks need no text.
        visual_token_pooling (`int`, *optional*, defaults to 1):
            Edge of the windows of patches whose mean is one visual token, in each frame or tubelet:
            with 2, the Predictor reads a quarter of the tokens. Class and register tokens of an
            image tower are not averaged. The paper pools none. It adds no weights.
        concatenate_class_token (`bool`, *optional*, defaults to `False`):
            Give no token to the class token of a frame, and append it to each of the frame's patch
            tokens, which are then twice as wide: the input of DINOv2's linear evaluation
            (arXiv 2304.07193). Register tokens are left out. For DINOv2, DINOv3, CLIP and ViT. The
            paper does not do so.
        standardize_visual_tokens (`bool`, *optional*, defaults to `False`):
            Shift and scale each dimension of the visual tokens before their projection, by two
            fixed vectors that are saved with the weights. `init_checkpoint --calibrate` measures
            them. The paper mentions none.
        causal_predictor (`bool`, *optional*, defaults to `False`):
            Keep the language model's causal mask in the Predictor (the paper's ablation 7d).
        predictor_pooling (`str`, *optional*, defaults to `"mean"`):
            Pooling of the Predictor's states: `"mean"` over all real positions, visual tokens and
            query (section 3.1: "non-[PAD]"); `"query"`, the mean over the query's tokens alone, or
            over the visual tokens if the query has none; or `"attention"`, a mean over all real
            positions with weights from a learnt vector.
        embedding_dim (`int`, *optional*, defaults to 1536):
            Width of the shared embedding space (section 3.1).
        text_pooling (`str`, *optional*, defaults to `"mean"`):
            Pooling of the Y-Encoder's states: `"mean"`, `"cls"` or `"lasttoken"`. The paper does
            not state it; EmbeddingGemma was trained with the mean.
        text_dense (`list[dict]`, *optional*):
            Dense layers between the pooling and the projection, each with `out_features`, `bias`
            and `activation`: EmbeddingGemma has two. They are part of the Y-Encoder.
        project_target (`bool`, *optional*, defaults to `True`):
            Give the target side its own projection (section 3.1). Without one, the shared space is
            the Y-Encoder's (the paper's 7c), and `embedding_dim` its width.
        target_adapter_size (`int`, *optional*):
            Hidden width of two layers between the Y-Encoder and that projection, whose output is
            added to their input: CLIP-Adapter (arXiv 2110.04544). A new one adds 0. For a frozen
            Y-Encoder, whose space it adapts; the paper has none.
        visual_dropout (`float`, *optional*, defaults to 0.0):
            Share of the values of the visual tokens that are set to 0 in training, before their
            projection. For small data; the paper has none.
        decoder_prefix_tokens (`int`, *optional*, defaults to 4):
            Number of tokens as which the Y-Decoder reads an embedding. The paper does not state
            it. Its product with the decoder's width should reach `embedding_dim`; otherwise the
            projection loses information.
        decoder_reads_query (`bool`, *optional*, defaults to `False`):
            The Y-Decoder reads the query before the embedding.
        decoder_reads_previous (`bool`, *optional*, defaults to `False`):
            The Y-Decoder also reads the text of the previous segment of a stream.
        backbones (`dict[str, str]`, *optional*):
            Origin of the initial weights of `"vision"`, `"predictor"`, `"text"` and `"decoder"`: a
            Hub id or the name of a folder. A part without an entry started from random weights.
        answers (`list[str]`, *optional*):
            Default candidate answers of the question answering pipeline.
        prompts (`dict[str, str]`, *optional*):
            The queries that the model was trained with, which pipelines, libraries,
            sentence-transformers and benchmarks use by default: `"caption"`, `"detail"`,
            `"question"` (a template that contains the question as `{}`), `"action"` and
            `"retrieval"` (default: the caption query). A dictionary with some of the names is
            completed: a new configuration with the defaults of `prompts.py`, an existing one with
            its current queries.
        target_prompts (`dict[str, str]`, *optional*):
            Templates of the target texts of labels, with the label as `{}`: `"action"` for videos,
            `"image"` for images. Completed like `prompts`.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            The X-Encoder gets no gradient and stays in evaluation mode. The paper's last
            pretraining stage sets this to `False`.
        freeze_text (`bool`, *optional*, defaults to `False`):
            The Y-Encoder's backbone gets no gradient; its head still trains (the paper's 7e).
        freeze_token_embedding (`bool`, *optional*, defaults to `True`):
            The Predictor's token table gets no gradient. The paper's 490M trainable parameters
            match this configuration only without that table.
        logit_scale_init_value (`float`, *optional*, defaults to ln(1/0.07)):
            Logarithm of the inverse temperature. The paper states none; this is CLIP's value.
        freeze_logit_scale (`bool`, *optional*, defaults to `False`):
            Keep the temperature fixed. The paper does not state whether it is learnt; CLIP learns
            it.
        logit_bias_init_value (`float`, *optional*):
            Initial value of the learnt bias of the sigmoid loss (SigLIP's is -10). Default: no
            bias; the paper's loss has none.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the new projections. Each sub-network has its own range.
    """

    model_type = "vljepa"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="vjepa2"),
        "predictor_config": SubConfigSpec(
            AutoConfig,
            model_type="llama",
            init_kwargs={
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 8,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
        "text_config": SubConfigSpec(
            AutoConfig,
            model_type="gemma3_text",
            init_kwargs={
                "vocab_size": 262144,
                "hidden_size": 768,
                "intermediate_size": 1152,
                "num_hidden_layers": 24,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "sliding_window": 512,
                "max_position_embeddings": 2048,
                "query_pre_attn_scalar": 256,
                "use_bidirectional_attention": True,
            },
        ),
        "decoder_config": SubConfigSpec(AutoConfig, model_type="llama", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    predictor_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    visual_token_pooling: int = 1
    concatenate_class_token: bool = False
    standardize_visual_tokens: bool = False
    causal_predictor: bool = False
    predictor_pooling: str = "mean"
    embedding_dim: int = 1536
    text_pooling: str = "mean"
    text_dense: list[dict] = field(default_factory=list)
    project_target: bool = True
    target_adapter_size: int | None = None
    visual_dropout: float = 0.0
    decoder_prefix_tokens: int = 4
    decoder_reads_query: bool = False
    decoder_reads_previous: bool = False
    backbones: dict[str, str] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    # `Any`: `__setattr__` checks these two, and its messages name the prompt.
    prompts: Any = field(default_factory=dict)
    target_prompts: Any = field(default_factory=dict)
    freeze_vision: bool = True
    freeze_text: bool = False
    freeze_token_embedding: bool = True
    logit_scale_init_value: float = math.log(1 / 0.07)
    freeze_logit_scale: bool = False
    logit_bias_init_value: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # transformers does not know these. They are not registered by name here, because code that
        # was loaded from the Hub and the installed package would then replace each other's class.
        vision = self.vision_config
        if isinstance(vision, dict) and vision.get("model_type") in OWN_CONFIGS:
            self.vision_config = OWN_CONFIGS[vision["model_type"]](**vision)
        super().__post_init__(**kwargs)
        # The one supported switch: it reaches the mask builder and every attention kernel. With
        # `is_causal` set on the attention modules alone, padded or eager batches stay causal.
        self.predictor_config.is_causal = self.causal_predictor

    def __setattr__(self, name: str, value: Any) -> None:
        """Complete `prompts` and `target_prompts`; raise ValueError for an invalid value of these,
        of `visual_token_pooling`, `predictor_pooling` or `target_adapter_size`."""
        if name == "prompts":
            value = complete_prompts(value, vars(self).get(name))
        elif name == "target_prompts":
            value = complete_target_prompts(value, vars(self).get(name))
        elif name == "visual_token_pooling" and (type(value) is not int or value < 1):
            raise ValueError(
                f"visual_token_pooling is {value!r}: give a whole number, 1 or more; 1 pools none."
            )
        elif name == "predictor_pooling" and value not in PREDICTOR_POOLINGS:
            raise ValueError(
                f"predictor_pooling is {value!r}: give {', '.join(PREDICTOR_POOLINGS[:-1])} or "
                f"{PREDICTOR_POOLINGS[-1]}."
            )
        elif name == "target_adapter_size" and (
            value is not None and (type(value) is not int or value < 1)
        ):
            raise ValueError(
                f"target_adapter_size is {value!r}: give a whole number, 1 or more, or None."
            )
        super().__setattr__(name, value)
        if name == "causal_predictor" and isinstance(self.predictor_config, PreTrainedConfig):
            self.predictor_config.is_causal = value  # a recipe's change of a loaded configuration

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the Predictor's configuration: `input_ids` are the Predictor's tokens."""
        return self.predictor_config

    def decoder_context(self, query: str = "", previous: str = "") -> str:
        """Return the text that the Y-Decoder reads before the embedding; empty if it reads none."""
        lines = [query] * self.decoder_reads_query + [previous] * self.decoder_reads_previous
        return "".join(f"{line}\n" for line in lines)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the configuration, and the code that it names: that of models and pipelines.

        Every way to save a model saves its configuration, so that every saved folder is complete.
        """
        # Assigned, they are checked: a name may have been changed in place.
        self.prompts, self.target_prompts = self.prompts, self.target_prompts
        # For all classes: transformers adds only the one that is saved.
        self.auto_map = dict(AUTO_MAP)
        if write_hub_files(save_directory, self.prompts, source=self.name_or_path):
            self.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VLJEPAConfig":
        """Raise ValueError for the configuration of another model.

        Upstream warns only, and loads random weights.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is a checkpoint of a {found!r} model, not of a VL-JEPA: load it with its "
                "own class, or build a VL-JEPA from it with `python -m training.init_checkpoint`."
            )
        return super().from_dict(config_dict, **kwargs)


__all__ = ["VLJEPAConfig"]
