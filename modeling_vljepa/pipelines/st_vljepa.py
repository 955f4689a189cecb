"""VL-JEPA as a sentence-transformers module: `SentenceTransformer(repo, trust_remote_code=True)`.

Texts are embedded by the Y-Encoder. Images and videos are embedded by the X-Encoder and the
Predictor, which reads a query: the text given with the medium, or the `prompt` of `encode`, or the
model's retrieval prompt. All embeddings are in the shared space. Only sentence-transformers loads
this file; the model's `modules.json` names it.
"""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

VISUAL = ("image", "video")
ST_SETTINGS = "config_sentence_transformers.json"


def apply_prompt(prompt: str, text: str) -> str:
    """Return the prompt with the text in the position of `{}`, or before the text."""
    return prompt.replace("{}", text) if "{}" in prompt else prompt + text


class VLJEPAModule(InputModule):
    """The one module of a SentenceTransformer that is a VL-JEPA.

    Args:
        model ([`VLJEPAModel`] or [`VLJEPAForConditionalGeneration`]): the model; its Y-Decoder is
            not used, and saved with it.
        processor ([`VLJEPAProcessor`]): its processor.
        query (`str`, *optional*): the query of an image or video that has no text of its own; the
            model's retrieval prompt by default.
    """

    config_keys = ["query"]
    config_file_name = "sentence_transformer_vljepa.json"
    save_in_root = True

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, query: str | None = None):
        super().__init__()
        self.model = model
        self.processor = processor
        self.query = query

    @property
    def tokenizer(self):
        """Tokenizer of the Y-Encoder: sentence-transformers expects the one for plain texts."""
        return self.processor.target_tokenizer

    @property
    def modalities(self) -> list[str | tuple[str, ...]]:
        # "message" allows several kinds in one batch.
        return ["text", *VISUAL, ("image", "text"), ("text", "video"), "message"]

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_dim

    def preprocess(
        self, inputs: list[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Preprocess texts, images, videos and `{"image" | "video": ..., "text": query}`.

        Args:
            prompt (`str`, *optional*): the query of the media, and a prefix of the texts. A prompt
                with `{}` contains a text: one of the texts, or the text of a medium. An empty one
                means none, as sentence-transformers passes it then.

        Returns: `input_ids` and `attention_mask` of the texts, from the Y-Encoder's tokenizer;
            `pixel_values_videos` of the media; `query_ids` and `query_mask`, from the Predictor's
            tokenizer; `order` `(B,)`: the index in `inputs` of each text, then of each medium.
        """
        # sentence-transformers' trainer takes each name that ends in `_input_ids` for a column of
        # its own: `query_input_ids` would be one.
        kinds = [infer_modality(given, self.modalities) for given in inputs]
        texts = [index for index, kind in enumerate(kinds) if kind == "text"]
        media = [index for index, kind in enumerate(kinds) if kind != "text"]
        batch = {"order": torch.tensor(texts + media)}
        if texts:
            targets = [inputs[index] for index in texts]
            given = [each["text"] if isinstance(each, dict) else each for each in targets]
            tokens = self.processor(targets=[apply_prompt(prompt or "", text) for text in given])
            batch["input_ids"] = tokens["target_input_ids"]
            batch["attention_mask"] = tokens["target_attention_mask"]
        if media:
            parts = [self.as_parts(inputs[i], kinds[i]) for i in media]
            queries = [self.query_of(part, prompt) for part in parts]
            batch |= self.preprocess_media(parts, queries)
        return batch

    def query_of(self, part: dict[str, Any], prompt: str | None) -> str:
        """Return the query of one medium.

        Raises: `ValueError` for a prompt and a text that exclude each other, and for a template
            without a text.
        """
        text = part.get("text")
        if prompt and "{}" in prompt:
            if text is None:
                raise ValueError(
                    f"prompt {prompt!r} is a template: give the text of the medium, as in "
                    '{"image": ..., "text": ...}.'
                )
            return apply_prompt(prompt, text)
        if prompt and text is not None:
            raise ValueError(
                f"prompt is {prompt!r}, but the medium has a query, its text {text!r}: leave one "
                "of them out."
            )
        if prompt or text is not None:
            return prompt or text
        return self.model.config.prompts["retrieval"] if self.query is None else self.query

    def as_parts(self, given: Any, kind: str | tuple[str, ...]) -> dict[str, Any]:
        """Return one input as `{"image" or "video": ..., "text": ...}`."""
        if isinstance(given, dict) and "array" not in given:  # not a decoded video
            return given
        return {kind: given}

    def preprocess_media(
        self, parts: list[dict[str, Any]], queries: list[str]
    ) -> dict[str, torch.Tensor]:
        """Return the clips and their queries as one batch.

        All clips need the same number of frames, so an image in a batch with videos is repeated.
        """
        frames = self.processor.video_processor.num_frames
        only_images = all("image" in part for part in parts)
        clips = []
        for part in parts:
            if "image" in part:
                clip = self.processor(images=[part["image"]])["pixel_values_videos"]
                clips.append(clip if only_images else clip.expand(-1, frames, -1, -1, -1))
            else:
                video = part["video"]
                video = video["array"] if isinstance(video, dict) else video
                clips.append(self.processor(videos=[video])["pixel_values_videos"])
        tokens = self.processor(text=queries)
        return {
            "pixel_values_videos": torch.cat(clips),
            "query_ids": tokens["input_ids"],
            "query_mask": tokens["attention_mask"],
        }

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Add `sentence_embedding` `(B, D)`: unit vectors in the order of the inputs."""
        embeds, model = [], self.model.base_model  # without a Y-Decoder
        if "input_ids" in features:
            texts = features["input_ids"], features["attention_mask"]
            # Not through the pipelines' cache of texts: callers of `encode` keep its result, and a
            # corpus would push out the candidates.
            embeds.append(model.encode_target(*texts))
        if "pixel_values_videos" in features:
            queries = features["query_ids"], features["query_mask"]
            embeds.append(model.predict(features["pixel_values_videos"], *queries))
        order = features["order"].to(embeds[0].device).argsort()  # inverse of a permutation
        features["sentence_embedding"] = torch.cat(embeds)[order]  # (B, D)
        # Not in training, where a GPU would wait for the answer, and the loss shows it.
        if not torch.is_grad_enabled() and not features["sentence_embedding"].isfinite().all():
            raise ValueError(
                "an embedding of this model is not finite: its weights hold NaN, or they overflow "
                "in this dtype. Load it in float32 or bfloat16, or replace the checkpoint."
            )
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the model with its Y-Decoder, its code, the processor and the query."""
        settings = Path(output_path) / ST_SETTINGS
        # sentence-transformers wrote it just before, with the prompts of its user; the model
        # writes its own.
        given = settings.read_bytes() if settings.is_file() else None
        self.model.save_pretrained(output_path)
        if given is not None:
            settings.write_bytes(given)
        self.processor.save_pretrained(output_path)
        if self.query is not None:
            self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "VLJEPAModule":
        """Load the model, with its Y-Decoder if it has one, and the processor.

        An adapter's folder gives the base model with the adapter, without a Y-Decoder.
        """
        where = {"token": token, "revision": revision, "local_files_only": local_files_only}
        hub = where | {"cache_dir": cache_folder}  # transformers' name of the folder
        where |= {"cache_folder": cache_folder}
        settings = cls.load_config(model_name_or_path, subfolder, **where)
        trust = {"trust_remote_code": trust_remote_code}
        auto = AutoModel
        if cls.load_file_path(model_name_or_path, "adapter_config.json", **where) is None:
            config = AutoConfig.from_pretrained(model_name_or_path, **hub, **trust)
            if config.decoder_config is not None:
                auto = AutoModelForImageTextToText
        model, report = auto.from_pretrained(
            model_name_or_path, **hub, **trust, **(model_kwargs or {}), output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would leave them random
            raise ValueError(
                f"{model_name_or_path}: {len(missing)} weights are missing, such as {missing[0]}. "
                "Load a whole checkpoint."
            )
        if auto is AutoModelForImageTextToText:
            model.y_decoder.requires_grad_(False)  # no loss of embeddings reaches it
        processor = AutoProcessor.from_pretrained(model_name_or_path, **hub, **trust)
        return cls(model, processor, **settings)


__all__ = ["VLJEPAModule"]
