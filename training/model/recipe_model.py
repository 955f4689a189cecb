"""A recipe's model and processor at the start of training: new, or from a checkpoint."""

import copy
import typing

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.x_encoder import VIDEO
from processing import VLJEPAProcessor, VLJEPAVideoProcessor
from training.arguments import (
    PROMPT_SETTINGS,
    ModelArguments,
    ProcessorArguments,
    Recipe,
    RecipeError,
    check_value,
)
from training.data.sources import Source, StreamedSource, texts_of
from training.model.backbones import TextBackbone, read_text, set_special_tokens
from training.model.checkpoint_files import load

# Llama 3's names: a new predictor gets a tokenizer in the form of a pretrained one's.
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
# Settings that, changed with a checkpoint, add weights that it does not have; their prefixes.
ADDED = {
    "logit_bias_init_value": "logit_bias",
    "predictor_pooling": "predictor_head.attention.",
    "project_target": "y_head.projection.",
    "target_adapter_size": "y_head.adapter.",
}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer in the form of Llama 3's on the recipe's own texts.

    Byte-level: a word that the texts do not contain is split into bytes, never unknown.
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
    tokenizer: PreTrainedTokenizerBase, arguments: ProcessorArguments, text: TextBackbone | None
) -> VLJEPAProcessor:
    """Build the processor of a new model.

    Args:
        tokenizer: the query tokenizer.
        text: pretrained Y-Encoder, whose tokenizer is used for targets; without one, targets use a
            copy of the query tokenizer.
    """
    options = {} if arguments.num_frames is None else {"num_frames": arguments.num_frames}
    if arguments.image_size is not None:
        options["crop_size"] = arguments.image_size
    if arguments.shortest_edge is not None:
        options["size"] = {"shortest_edge": arguments.shortest_edge}
    video_processor = VLJEPAVideoProcessor(**options)
    if text is None:
        return VLJEPAProcessor(video_processor, tokenizer, copy.deepcopy(tokenizer))
    return VLJEPAProcessor(
        video_processor,
        tokenizer,
        text.tokenizer,
        target_prompts=text.prompts,
        target_prompt_name=text.prompt_name,
    )


def check_config(config: dict, checkpoint: VLJEPAConfig | None = None) -> dict:
    """Return `model.config` if all keys are known and all values have the right type.

    transformers itself accepts an unknown key and ignores it.

    Args:
        checkpoint: the configuration that is changed. Its sub-networks have other settings than
            those of a new model.

    Raises:
        RecipeError: an unknown key or model type, or a value of another type.
    """
    unknown = [key for key in config if key not in VLJEPAConfig.__dataclass_fields__]
    for name, spec in VLJEPAConfig.sub_configs_defaults.items():
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise RecipeError(f"model.config.{name}: expected keys and values, found {section!r}.")
        changed = None if checkpoint is None else vars(checkpoint)[name]
        default = spec.model_type if changed is None else changed.model_type
        model_type = section.get("model_type", default)
        if model_type not in CONFIG_MAPPING:
            raise RecipeError(
                f"model.config.{name}.model_type: transformers has no {model_type!r}; correct it."
            )
        fields = CONFIG_MAPPING[model_type].__dataclass_fields__
        unknown += [f"{name}.{key}" for key in section if key not in {"model_type", *fields}]
    if unknown:
        raise RecipeError(f"model.config.{unknown[0]}: no such setting; correct or remove it.")
    # Fields that every configuration inherits are checked too; transformers does not.
    # Its module imports torch for type checkers only, so the name is given here.
    hints = typing.get_type_hints(VLJEPAConfig, localns={"torch": torch})
    return config | {
        key: check_value(f"model.config.{key}", config[key], hints[key])
        for key in config.keys() & hints.keys()
    }


def new_config(
    arguments: ModelArguments, processor: VLJEPAProcessor, text: TextBackbone | None
) -> VLJEPAConfig:
    """Return the recipe's configuration, completed from the processor and the Y-Encoder."""
    settings = check_config(arguments.config)
    settings |= {name: vars(arguments)[name] for name in PROMPT_SETTINGS}
    if text is not None:
        text.config.dtype = torch.float32  # its weights may be bf16; training needs fp32
        pretrained = {
            "text_config": text.config,
            "text_pooling": text.pooling,
            "text_dense": text.dense,
        }
        settings = {"backbones": {"text": text.name}, **settings, **pretrained}
    try:
        config = VLJEPAConfig(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(f"model.config: {error}") from error
    vision, side = config.vision_config, processor.video_processor.crop_size["height"]
    vision.update({"crop_size" if vision.model_type in VIDEO else "image_size": side})
    config.predictor_config.vocab_size = len(processor.tokenizer)
    set_special_tokens(config.predictor_config, processor.tokenizer)
    if text is None:
        config.text_config.vocab_size = len(processor.target_tokenizer)
        config.text_config.pad_token_id = processor.target_tokenizer.pad_token_id
    return config


def start_model(
    recipe: Recipe, sources: list[Source | StreamedSource]
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Return the model and processor that training starts with: new, or from a checkpoint."""
    if recipe.model.checkpoint is not None:
        return load_checkpoint(recipe.model, recipe.processor)
    texts = texts_of(sources, recipe.model.tokenizer_rows)
    return new_model(recipe.model, recipe.processor, texts, recipe.training.seed)


def new_model(
    arguments: ModelArguments, processing: ProcessorArguments, texts: list[str], seed: int
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Build a random model, with a pretrained Y-Encoder if the recipe names one.

    Args:
        texts: training data of the query tokenizer.

    Raises:
        RecipeError: the configuration is invalid, or the Y-Encoder lacks a weight.
    """
    source = arguments.text_encoder
    text = None if source is None else read_text("model.text_encoder", source)
    processor = new_processor(train_tokenizer(texts, arguments.vocab_size), processing, text)
    config = new_config(arguments, processor, text)
    torch.manual_seed(seed)
    try:
        model = VLJEPAModel(config)
    except (RuntimeError, ValueError) as error:  # negative sizes, or sizes that do not match
        raise RecipeError(f"model.config: {error}") from error
    if text is not None:
        missing, _ = model.y_encoder.load_state_dict(text.weights, strict=False)
        if missing:  # unused weights, such as a pooler's, are ignored
            raise RecipeError(
                f"model.text_encoder: {source} lacks {missing[0]}; give a complete checkpoint."
            )
    return model, processor


def load_checkpoint(
    arguments: ModelArguments, processing: ProcessorArguments
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Load the model and processor of `checkpoint`, with the recipe's changes.

    Raises:
        RecipeError: they do not load, or the checkpoint's weights do not fit the changes.
    """
    config = load(AutoConfig, "model.checkpoint", arguments.checkpoint)
    changes = check_config(arguments.config, config)
    new = []
    for name, value in changes.items():
        if name in VLJEPAConfig.sub_configs_defaults:
            change_sub_config(config, name, value)
        else:
            if name in ADDED and vars(config)[name] != value:
                new.append(ADDED[name])
            try:
                setattr(config, name, value)
            except ValueError as error:
                raise RecipeError(f"model.config: {error}") from error
    for name in PROMPT_SETTINGS:  # the configuration keeps those that are not given
        setattr(config, name, vars(arguments)[name])
    changed = f" with changed {', '.join(changes)}" if changes else ""
    model = load(
        AutoModel,
        f"model.checkpoint{changed}",
        arguments.checkpoint,
        new=tuple(new),
        config=config,
        dtype=torch.float32,  # weights in bf16 would hardly move at this objective's rates
    )
    return model, load_processor(arguments, processing)


def change_sub_config(config: VLJEPAConfig, name: str, changes: dict) -> None:
    """Change settings of an encoder or the predictor of a checkpoint.

    Raises:
        RecipeError: a value of another type.
    """
    try:
        getattr(config, name).update(changes)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(f"model.config.{name}: {error}") from error


def load_processor(arguments: ModelArguments, processing: ProcessorArguments) -> VLJEPAProcessor:
    """Load the processor of `checkpoint`, with the recipe's changes."""
    processor = load(AutoProcessor, "model.checkpoint", arguments.checkpoint)
    video = processor.video_processor
    if processing.num_frames is not None:
        video.num_frames = processing.num_frames
    if processing.image_size is not None:
        video.crop_size = {"height": processing.image_size, "width": processing.image_size}
        if not video.size.shortest_edge:  # squashed frames, of which nothing is cut off
            video.size = video.crop_size
    if processing.shortest_edge is not None:
        video.size = {"shortest_edge": processing.shortest_edge}
    return processor
