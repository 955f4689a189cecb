"""A model and its processor at the start of training: from a checkpoint, or new; and what of it
trains."""

import copy

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

from modeling_vljepa import (
    VLJEPAConfig,
    VLJEPAModel,
)
from processing import VLJEPAProcessor, VLJEPAVideoProcessor
from training.arguments import (
    ModelArguments,
    ProcessorArguments,
    Recipe,
    RecipeError,
    check_value,
)
from training.data.sources import Source, StreamedSource, texts_of
from training.model.backbones import TextBackbone, read_text
from training.model.checkpoint_files import load

# Llama 3's own names, so that a trained-from-scratch predictor has the tokenizer of a real one.
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
# What a setting that is changed beside a checkpoint adds to its weights, new.
ADDED = {"logit_bias_init_value": "logit_bias", "project_target": "y_head."}


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
    tokenizer: PreTrainedTokenizerBase, arguments: ProcessorArguments, text: TextBackbone | None
) -> VLJEPAProcessor:
    """A processor for a new model; without a pretrained Y-Encoder, both texts go through copies
    of one tokenizer."""
    size = {} if arguments.image_size is None else {"crop_size": arguments.image_size}
    if arguments.shortest_edge is not None:
        size["size"] = {"shortest_edge": arguments.shortest_edge}
    video_processor = VLJEPAVideoProcessor(num_frames=arguments.num_frames, **size)
    if text is None:
        return VLJEPAProcessor(video_processor, tokenizer, copy.deepcopy(tokenizer))
    return VLJEPAProcessor(
        video_processor,
        tokenizer,
        text.tokenizer,
        target_prompts=text.prompts,
        target_prompt_name=text.prompt_name,
    )


def check_config(config: dict) -> dict:
    """The settings, if every key is one of the configuration and every value of its type:
    transformers would keep others and go on."""
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
    hints = VLJEPAConfig.__annotations__
    return config | {
        key: check_value(f"model.config.{key}", config[key], hints[key])
        for key in config.keys() & hints.keys()
    }


def new_config(
    arguments: ModelArguments, processor: VLJEPAProcessor, text: TextBackbone | None
) -> VLJEPAConfig:
    """The recipe's configuration, with what follows from the processor and the Y-Encoder."""
    settings = check_config(arguments.config)
    if text is not None:
        text.config.dtype = torch.float32
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
    vision.update({"crop_size" if vision.model_type == "vjepa2" else "image_size": side})
    config.predictor_config.vocab_size = len(processor.tokenizer)
    config.predictor_config.pad_token_id = processor.tokenizer.pad_token_id
    if text is None:
        config.text_config.vocab_size = len(processor.target_tokenizer)
        config.text_config.pad_token_id = processor.target_tokenizer.pad_token_id
    return config


def start_model(
    recipe: Recipe, sources: list[Source | StreamedSource]
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """The model and processor with which a training starts: new, or those of a checkpoint."""
    if recipe.model.checkpoint is not None:
        return load_checkpoint(recipe.model, recipe.processor)
    texts = texts_of(sources, recipe.model.tokenizer_rows)
    return new_model(recipe.model, recipe.processor, texts, recipe.training.seed)


def new_model(
    arguments: ModelArguments, processing: ProcessorArguments, texts: list[str], seed: int
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """A new model: random, but for a pretrained Y-Encoder where the recipe names one.

    `texts` are what the query tokenizer learns from.
    """
    source = arguments.text_encoder
    text = None if source is None else read_text("model.text_encoder", source)
    processor = new_processor(train_tokenizer(texts, arguments.vocab_size), processing, text)
    config = new_config(arguments, processor, text)
    torch.manual_seed(seed)
    try:
        model = VLJEPAModel(config)
    except (RuntimeError, ValueError) as error:  # sizes that are none, or do not fit together
        raise RecipeError(f"model.config: {error}") from error
    if text is not None:
        missing, _ = model.y_encoder.load_state_dict(text.weights, strict=False)
        if missing:  # what is left over, such as a pooler, is not read here
            raise RecipeError(f"model.text_encoder: {source} lacks {missing[0]}.")
    return model, processor


def load_checkpoint(
    arguments: ModelArguments, processing: ProcessorArguments
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """The model and processor of `checkpoint`, changed as the recipe says."""
    changes = check_config(arguments.config)
    config = load(AutoConfig, "model.checkpoint", arguments.checkpoint)
    new = []
    for name, value in changes.items():
        if name in VLJEPAConfig.sub_configs_defaults:
            change_box(config, name, value)
        else:
            if name in ADDED and vars(config)[name] != value:
                new.append(ADDED[name])
            setattr(config, name, value)
    changed = f" with another {', '.join(changes)}" if changes else ""
    model = load(
        AutoModel,
        f"model.checkpoint{changed}",
        arguments.checkpoint,
        new=tuple(new),
        config=config,
        dtype=torch.float32,  # weights in bf16 would hardly move at this objective's rates
    )
    return model, load_processor(arguments, processing)


def change_box(config: VLJEPAConfig, name: str, changes: dict) -> None:
    """Change settings of a sub-network of a checkpoint."""
    try:
        getattr(config, name).update(changes)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(f"model.config.{name}: {error}") from error


def load_processor(arguments: ModelArguments, processing: ProcessorArguments) -> VLJEPAProcessor:
    """The processor of `checkpoint`, changed as the recipe says."""
    processor = load(AutoProcessor, "model.checkpoint", arguments.checkpoint)
    video = processor.video_processor
    video.num_frames = processing.num_frames
    if processing.image_size is not None:
        video.crop_size = {"height": processing.image_size, "width": processing.image_size}
    if processing.shortest_edge is not None:
        video.size = {"shortest_edge": processing.shortest_edge}
    return processor
