"""A model to measure or to watch with: whole, or an error that says what it lacks."""

import textwrap

from modeling_vljepa import VLJEPAConfig, VLJEPAForConditionalGeneration, VLJEPAModel
from processing import VLJEPAProcessor


def load_model(path: str) -> tuple[VLJEPAModel | VLJEPAForConditionalGeneration, VLJEPAProcessor]:
    """The model, with its decoder if it has one, and its processor.

    Raises: `ValueError` where there is none, or not a whole one.
    """
    try:
        config = VLJEPAConfig.from_pretrained(path)
        has_decoder = config.decoder_config is not None
        kind = VLJEPAForConditionalGeneration if has_decoder else VLJEPAModel
        model, info = kind.from_pretrained(path, output_loading_info=True)
        processor = VLJEPAProcessor.from_pretrained(path)
    except Exception as error:  # damaged JSON, shapes and weights have a kind of error each
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--model: {path} is no folder or Hub id of a VL-JEPA with its processor, all of it "
            f"readable ({textwrap.shorten(first, 240, placeholder=' …')})."
        ) from error
    if info["missing_keys"]:  # transformers makes them up and warns
        raise ValueError(
            f"--model: {path} lacks {min(info['missing_keys'])}, and random weights say nothing. "
            "Give a checkpoint that has all that its configuration asks for."
        )
    return model, processor
