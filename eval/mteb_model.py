"""A VL-JEPA as a model of the mteb library: `mteb.evaluate(get_model(DIR), tasks)`.

Texts are embedded by the Y-Encoder. Images and videos are embedded by the X-Encoder and the
Predictor, which reads a query: the text given with the medium, or the model's prompt for the task.
Media are read as everywhere in this library: torchvision and torchcodec, which mteb's extras
install, are not needed.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Image, Video
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.embed import check_finite
from eval.embedding_store import weights_digest
from eval.models import check_vljepa, hub_commit, load_model
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.embedding import target_embeds
from processing import VLJEPAProcessor
from processing.rows import Media

MEDIA = {"video": Video(decode=False), "image": Image(decode=False)}
# The name in `config.prompts` of the query of media without a text, by mteb's types of tasks; tasks
# of other types ask the retrieval prompt.
PROMPTS = {"classification": "action", "clustering": "action"}


class VLJEPAEncoder(AbsEncoder):
    """A model as mteb's tasks call it.

    Args:
        model ([`VLJEPAModel`]): without its Y-Decoder.
        processor ([`VLJEPAProcessor`]): its processor.
        meta (`ModelMeta`): its name and revision, under which mteb stores results.
        prompts (`dict[str, str]`, *optional*): queries that replace the model's, by the name or the
            type of a task, with `-query` or `-document` for one side, as mteb's `model_prompts`.
        num_frames (`int`, *optional*): frames per video; the processor's by default.
    """

    def __init__(
        self,
        model: VLJEPAModel,
        processor: VLJEPAProcessor,
        meta: ModelMeta,
        *,
        prompts: dict[str, str] | None = None,
        num_frames: int | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        self.mteb_model_meta = meta
        self.model_prompts = prompts
        self.num_frames = num_frames

    def query(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """Return the query of media without a text of their own.

        The instructions of mteb's tasks are not used: the model was not trained with them.
        """
        name = self.get_prompt_name(task, prompt_type)
        if name is not None:
            return self.model_prompts[name]
        return self.model.config.prompts[PROMPTS.get(task.simplified_task_type, "retrieval")]

    @torch.inference_mode()
    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embed the inputs of a task: unit vectors `(N, D)`, on the CPU.

        Args:
            inputs: batches with `text`, or with `image` or `video`. The text of a medium is its
                query. Audio is ignored; mteb warns about it.

        Raises: `ValueError` for inputs without any of these, and for an embedding that is not
            finite; `MediaError` for a medium that cannot be read.
        """
        columns = inputs.dataset.features
        kind = next((kind for kind in MEDIA if kind in columns), None)
        if kind is None and "text" not in columns:
            raise ValueError(
                f"{task_metadata.name}: the inputs have {', '.join(columns)}; a VL-JEPA embeds "
                "text, image and video."
            )
        if kind is not None and isinstance(columns[kind], type(MEDIA[kind])):
            inputs = undecoded(inputs, kind)
        embeds = []
        for batch in tqdm(inputs, desc=task_metadata.name, disable=not show_progress_bar):
            if kind is None:
                found = target_embeds(self.model, self.processor, batch["text"])
                names = [f"the text {text!r:.80}" for text in batch["text"]]
            else:
                media = [medium_of(each) for each in batch[kind]]
                default = [self.query(task_metadata, prompt_type)] * len(media)
                found = self.embed_media(kind, media, batch.get("text", default))
                names = [f"{kind} {len(embeds) + index}" for index in range(len(media))]
            check_finite(names, found)
            embeds += found
        return torch.stack(embeds)

    # Not "predict": mteb takes a model with this method for a cross-encoder.
    def embed_media(self, kind: str, media: list[Media], queries: list[str]) -> torch.Tensor:
        """Predict the embedding of each image or video with its query: `(B, D)`, on the CPU."""
        options = {} if kind == "image" else {"num_frames": self.num_frames}
        batch = self.processor(**{f"{kind}s": media}, text=queries, **options)
        model = self.model
        return model.predict(**batch.to(model.device, model.dtype)).float().cpu()


def undecoded(inputs: DataLoader, kind: str) -> DataLoader:
    """Return the same batches with media as files or bytes: `datasets` decodes with torchcodec."""
    return DataLoader(
        inputs.dataset.cast_column(kind, MEDIA[kind]),
        batch_size=inputs.batch_size,
        collate_fn=inputs.collate_fn,
        num_workers=inputs.num_workers,
    )


def medium_of(given: Any) -> Any:
    """Return bytes or path of a medium that `datasets` does not decode; others as they are."""
    if isinstance(given, dict) and given.keys() == {"bytes", "path"}:
        return given["path"] if given["bytes"] is None else given["bytes"]
    return given


def get_model(
    model_name: str, revision: str | None = None, device: str | None = None, **options: Any
) -> VLJEPAEncoder:
    """Load a model for mteb, as `mteb.get_model` does for the models that mteb knows.

    Args:
        model_name (`str`): a folder or a Hub id.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.
        device (`str`, *optional*): default: the GPU if there is one.
        options: `prompts` and `num_frames` of [`VLJEPAEncoder`].

    Raises: `ValueError` for a folder or Hub id without a complete model, and for a model that
        predicts tokens.
    """
    whole, processor = load_model(model_name, revision)
    check_vljepa("model_name", model_name, whole.config, "mteb measures embeddings")
    model = whole.base_model  # without the Y-Decoder
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # mteb asks for "organization/model", and stores results under the name and the revision.
    folder = Path(model_name)
    name = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else model_name
    meta = ModelMeta.create_empty(
        {
            "name": name,
            "revision": hub_commit(model_name, revision) or weights_digest(model),
            "loader": get_model,
            "modalities": ["text", "image", "video"],
            "n_parameters": sum(weight.numel() for weight in model.parameters()),
            "embed_dim": model.config.embedding_dim,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers"],
            "use_instructions": True,
        }
    )
    return VLJEPAEncoder(model, processor, meta, **options)


__all__ = ["VLJEPAEncoder", "get_model"]
