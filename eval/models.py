"""Load a complete model for evaluation, or raise an error that names the missing part."""

import textwrap
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from modeling_vljepa import (
    VLJEPAConfig,
    VLJEPAForConditionalGeneration,
    VLJEPAModel,
    VLJEPATokenConfig,
    VLJEPATokenModel,
)
from processing import VLJEPAProcessor

Model = VLJEPAModel | VLJEPAForConditionalGeneration | VLJEPATokenModel


class TokenModelError(ValueError):
    """A model that predicts tokens, given where a VL-JEPA is needed; the message names both."""


def load_model(path: str, revision: str | None = None) -> tuple[Model, VLJEPAProcessor]:
    """Load a model, with its decoder if it has one, and its processor.

    Args:
        revision: branch, tag or commit of a model on the Hub.

    Raises: `ValueError` for a folder or Hub id without a complete model.
    """
    try:
        kind = model_class(path, revision)
        model, info = kind.from_pretrained(path, revision=revision, output_loading_info=True)
        processor = VLJEPAProcessor.from_pretrained(path, revision=revision)
    except Exception as error:  # damaged JSON, shapes and weights each raise another type
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--model: {path} is not a folder or Hub id of a readable VL-JEPA with its processor "
            f"({textwrap.shorten(first, 240, placeholder=' …')}). Check the path or the id."
        ) from error
    if info["missing_keys"]:  # transformers only warns, and initialises them at random
        raise ValueError(
            f"--model: {path} lacks {min(info['missing_keys'])}, which would be random. Give a "
            "checkpoint with all weights of its configuration."
        )
    return model, processor


def hub_commit(path: str, revision: str | None = None) -> str | None:
    """Return the commit of a model that was loaded from the Hub; None for a folder.

    The name of the cached file holds it: the configuration does not.
    """
    if Path(path).is_dir():
        return None
    return extract_commit_hash(cached_file(path, CONFIG_NAME, revision=revision), None)


def model_class(path: str, revision: str | None) -> type[Model]:
    """Return the class of a folder or Hub id: a VL-JEPA, one with a decoder, or a token model.

    Raises: `ValueError` for the configuration of another model.
    """
    settings, _ = VLJEPAConfig.get_config_dict(path, revision=revision)
    if settings.get("model_type") == VLJEPATokenConfig.model_type:
        return VLJEPATokenModel
    config = VLJEPAConfig.from_pretrained(path, revision=revision)
    has_decoder = config.decoder_config is not None
    return VLJEPAForConditionalGeneration if has_decoder else VLJEPAModel


def check_vljepa(
    key: str, path: str, config: PreTrainedConfig, purpose: str, *, takes_hybrids: bool = False
) -> None:
    """Raise [`TokenModelError`] for a model that predicts tokens.

    Args:
        key: the option or setting that named the model.
        purpose: the use of the model, such as "mteb measures embeddings".
        takes_hybrids: accept a model that predicts embeddings, too.
    """
    if not isinstance(config, VLJEPATokenConfig) or (takes_hybrids and config.predicts_embeddings):
        return
    raise TokenModelError(
        f"{key}: {path} predicts tokens, and {purpose}; give a model of training.train."
    )


def abilities(model: Model) -> dict[str, bool]:
    """Return the kinds of a model's outputs, as arguments of `measurable`."""
    has_tokens = isinstance(model, VLJEPATokenModel)
    has_embeddings = not has_tokens or model.config.predicts_embeddings
    return {"has_tokens": has_tokens, "has_embeddings": has_embeddings}
