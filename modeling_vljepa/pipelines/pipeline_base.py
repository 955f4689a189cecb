"""Base of all pipelines: a model, a processor, and the files that are saved with them."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Pipeline
from transformers.dynamic_module_utils import get_relative_import_files

# `config.custom_pipelines` of a published model. Every class is given as a name in the one module
# that imports all others: transformers downloads this module and its imports, so the files of all
# pipelines are there, whichever pipeline is loaded.
CUSTOM_PIPELINES = {
    "visual-question-answering": {
        "impl": "pipeline_vljepa.VLJEPAVisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText", "AutoModel"],  # with a Y-Decoder, or without
    },
    "video-text-retrieval": {
        "impl": "pipeline_vljepa.VLJEPARetrievalPipeline",
        "pt": ["AutoModel"],
    },
    "zero-shot-video-classification": {
        "impl": "pipeline_vljepa.VLJEPAZeroShotClassificationPipeline",
        "pt": ["AutoModel"],
    },
    # transformers' own pipelines of the next two names do not fit: they look for an image processor
    # and for the target tokenizer in the root, or for a model that is a language model.
    "zero-shot-image-classification": {
        "impl": "pipeline_vljepa.VLJEPAZeroShotImageClassificationPipeline",
        "pt": ["AutoModel"],
    },
    "image-text-to-text": {
        "impl": "pipeline_vljepa.VLJEPAImageTextToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
    },
    "streaming-caption": {
        "impl": "pipeline_vljepa.VLJEPAStreamingCaptionPipeline",
        "pt": ["AutoModelForImageTextToText", "AutoModel"],  # with a Y-Decoder, or without
    },
}
ENTRY = "pipeline_vljepa.py"


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

        transformers' own method does not save the processor.
        """
        self.model.config.custom_pipelines = CUSTOM_PIPELINES
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        entry = Path(__file__).with_name(ENTRY)
        for path in (entry, *get_relative_import_files(entry)):
            shutil.copy(path, save_directory)


__all__ = ["CUSTOM_PIPELINES", "PipelineBase", "given"]
