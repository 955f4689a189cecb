"""Load a complete model for evaluation, or raise an error that names the missing part."""

import textwrap
from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from modeling_vljepa import VLJEPAConfig, VLJEPAForConditionalGeneration, VLJEPAModel
from processing import VLJEPAProcessor


def load_model(
    path: str, revision: str | None = None
) -> tuple[VLJEPAModel | VLJEPAForConditionalGeneration, VLJEPAProcessor]:
    """Load a model, with its decoder if it has one, and its processor.

    Args:
        revision: branch, tag or commit of a model on the Hub.

    Raises: `ValueError` for a folder or Hub id without a complete model.
    """
    try:
        config = VLJEPAConfig.from_pretrained(path, revision=revision)
        has_decoder = config.decoder_config is not None
        kind = VLJEPAForConditionalGeneration if has_decoder else VLJEPAModel
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
