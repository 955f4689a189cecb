"""Base of all pipelines: a model and a processor, which are saved together."""

import os
from typing import Any

from transformers import Pipeline


def given(**parameters: Any) -> dict[str, Any]:
    """Return the parameters that are not `None`."""
    return {name: value for name, value in parameters.items() if value is not None}


class PipelineBase(Pipeline):
    """Pipeline of a `VLJEPAModel`, with or without a Y-Decoder, and a `VLJEPAProcessor`."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    @property
    def has_decoder(self) -> bool:
        return "y_decoder" in dict(self.model.named_children())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model, the processor and the code of all pipelines.

        transformers' own method does not save the processor, and names one pipeline only.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["PipelineBase", "given"]
