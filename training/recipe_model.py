"""A model and its processor at the start of training: from a checkpoint, or new."""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from processing import VLJEPAProcessor, VLJEPAVideoProcessor

from .arguments import ModelArguments, ProcessorArguments, RecipeError

# Llama 3's own names, so that a trained-from-scratch predictor has the tokenizer of a real one.
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"


def load(auto: type, key: str, path: str, **options: Any) -> Any:
    """`auto.from_pretrained(path)`, with an error that names the recipe's key."""
    try:
        return auto.from_pretrained(path, **options)
    except OSError as error:
        raise RecipeError(f"{key}: {path} is no folder or Hub id that loads. {error}") from error


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE in the form of Llama 3's, learnt from the recipe's own texts.

    Byte-level: a word that the texts do not hold is spelt, never unknown.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        padding_side="right",
    )


def new_processor(
    model: ModelArguments, arguments: ProcessorArguments, texts: list[str]
) -> VLJEPAProcessor:
    """A processor for a new model; `texts` are what its tokenizers learn from."""
    tokenizer = train_tokenizer(texts, model.vocab_size)
    size = {} if arguments.image_size is None else {"crop_size": arguments.image_size}
    if arguments.shortest_edge is not None:
        size["size"] = {"shortest_edge": arguments.shortest_edge}
    return VLJEPAProcessor(
        VLJEPAVideoProcessor(num_frames=arguments.num_frames, **size),
        tokenizer,
        copy.deepcopy(tokenizer)
        if model.text_encoder is None
        else load(AutoTokenizer, "model.text_encoder", model.text_encoder),
    )


def check_config(config: dict) -> None:
    """Stop at a key that no configuration has: transformers would keep it and go on."""
    unknown = [key for key in config if key not in VLJEPAConfig.__dataclass_fields__]
    for box, spec in VLJEPAConfig.sub_configs_defaults.items():
        section = config.get(box, {})
        if not isinstance(section, dict):
            raise RecipeError(f"model.config.{box}: expected keys and values, found {section!r}.")
        model_type = section.get("model_type", spec.model_type)
        if model_type not in CONFIG_MAPPING:
            raise RecipeError(f"model.config.{box}.model_type: there is no {model_type!r}.")
        fields = CONFIG_MAPPING[model_type].__dataclass_fields__
        unknown += [f"{box}.{key}" for key in section if key not in {"model_type", *fields}]
    if unknown:
        raise RecipeError(f"model.config.{unknown[0]}: there is no such setting.")


def new_model(arguments: ModelArguments, processor: VLJEPAProcessor, seed: int) -> VLJEPAModel:
    """A new model: random, but for a pretrained Y-Encoder where the recipe names one."""
    check_config(arguments.config)
    config = dict(arguments.config)
    if arguments.text_encoder is not None:
        config["text_config"] = load(
            AutoConfig, "model.text_encoder", arguments.text_encoder, dtype=torch.float32
        )
    config = VLJEPAConfig(**config)
    config.vision_config.crop_size = processor.video_processor.crop_size["height"]
    config.predictor_config.vocab_size = len(processor.tokenizer)
    config.predictor_config.pad_token_id = processor.tokenizer.pad_token_id
    if arguments.text_encoder is None:
        config.text_config.vocab_size = len(processor.target_tokenizer)
        config.text_config.pad_token_id = processor.target_tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = VLJEPAModel(config)
    if arguments.text_encoder is not None:
        text = load(AutoModel, "model.text_encoder", arguments.text_encoder, dtype=torch.float32)
        missing, _ = model.y_encoder.backbone.load_state_dict(text.state_dict(), strict=False)
        if missing:  # what is left over, such as a pooler, is not read here
            raise RecipeError(f"model.text_encoder: {arguments.text_encoder} lacks {missing[0]}.")
    return model


def load_checkpoint(arguments: ModelArguments) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """The model and processor of `checkpoint`, its configuration changed as `config` says."""
    check_config(arguments.config)
    config = load(AutoConfig, "model.checkpoint", arguments.checkpoint)
    for name, value in arguments.config.items():
        if name in VLJEPAConfig.sub_configs_defaults:
            getattr(config, name).update(value)
        else:
            setattr(config, name, value)
    # Weights stored in bf16 would hardly move at this objective's learning rates.
    model = load(
        AutoModel, "model.checkpoint", arguments.checkpoint, config=config, dtype=torch.float32
    )
    return model, load(AutoProcessor, "model.checkpoint", arguments.checkpoint)


def parameter_table(model: VLJEPAModel) -> str:
    """Parameters in all and trainable, box by box, in millions."""
    lines = [f"{'box':<16}{'parameters':>14}{'trainable':>14}"]
    boxes = [(name, list(box.parameters())) for name, box in model.named_children()]
    for name, parameters in [*boxes, ("all", list(model.parameters()))]:
        total = sum(p.numel() for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{name:<16}{total / 1e6:>13.3f}M{trainable / 1e6:>13.3f}M")
    return "\n".join(lines)
