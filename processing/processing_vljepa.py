"""The processor: files, frames and strings to a batch of the model's inputs.

Queries and targets have different tokenizers, because the Predictor and the Y-Encoder have
different vocabularies; a Y-Decoder can have a third one.

Shapes: B samples, T frames, h and w pixels, Lq query tokens, Ly target tokens, C context tokens.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .frame_stream import StreamSource
from .media import MediaError, name_of
from .sampling import check_count
from .texts import check_text, check_texts
from .video_io import read_image
from .video_processing_vljepa import Video, VLJEPAVideoProcessor, as_batch, check_pixels
from .windows import WindowStream

IMAGES = "a path, bytes, a PIL image, or a uint8 array or tensor"
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor


class VLJEPAProcessor(ProcessorMixin):
    """A video processor and two or three tokenizers, saved and loaded together.

    The query tokenizer is saved in the root of the folder, the others in `target_tokenizer/` and
    `decoder_tokenizer/`.

    Args:
        video_processor ([`VLJEPAVideoProcessor`]): for videos and images.
        tokenizer ([`PreTrainedTokenizerBase`]): the Predictor's, for queries.
        target_tokenizer ([`PreTrainedTokenizerBase`]): the Y-Encoder's, for targets.
        max_query_length (`int`, *optional*, defaults to 512): longer queries are cut to this
            number of tokens, the paper's; to fewer if the tokenizer's own limit is lower.
        max_target_length (`int`, *optional*, defaults to 512): the same for targets.
        target_prompts (`dict[str, str]`, *optional*): prompts by name, from a sentence-transformers
            model. In its training such a model reads one of them before each text.
        target_prompt_name (`str`, *optional*): name of the prompt put before every target. Default:
            no prompt, because the paper mentions none.
        decoder_tokenizer ([`PreTrainedTokenizerBase`], *optional*): the Y-Decoder's, if it differs
            from the query tokenizer.

    Raises: `ValueError` for a tokenizer without a padding token, or an unknown prompt name.
    """

    def __init__(
        self,
        video_processor: VLJEPAVideoProcessor,
        tokenizer: PreTrainedTokenizerBase,
        target_tokenizer: PreTrainedTokenizerBase,
        max_query_length: int = 512,
        max_target_length: int = 512,
        target_prompts: dict[str, str] | None = None,
        target_prompt_name: str | None = None,
        decoder_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(video_processor, tokenizer, target_tokenizer)
        self.decoder_tokenizer = decoder_tokenizer
        for name, part in (("tokenizer", tokenizer), ("target_tokenizer", target_tokenizer)):
            if part.pad_token is None:
                raise ValueError(
                    f"{name} has no padding token: set one that no text uses, such as "
                    "'<|finetune_right_pad_id|>' for Llama 3 (not its end-of-text token)"
                )
        self.max_query_length = check_count("max_query_length", max_query_length)
        self.max_target_length = check_count("max_target_length", max_target_length)
        self.target_prompts = target_prompts or {}
        self.target_prompt_name = target_prompt_name
        self.prompt(target_prompt_name)

    # Callers check a text where it enters, under their own name for it. Shipped code reaches this
    # package through the processor only.
    check_text = staticmethod(check_text)

    def prompt(self, name: str | None) -> str:
        """Return the prompt of this name; the empty string for `None`."""
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.target_prompts:
            given = repr(name)[:50] if isinstance(name, str) else f"of type {type(name).__name__}"
            raise ValueError(
                f"there is no target prompt {given}, only {sorted(self.target_prompts)}"
            )
        return self.target_prompts[name]

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        videos: Video | list[Video] | None = None,
        text: str | Sequence[str] | None = None,
        targets: str | Sequence[str] | None = None,
        contexts: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        max_query_length: int | None = None,
        max_target_length: int | None = None,
        target_prompt_name: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make a batch from the parts that are given; a single item is a batch of one.

        Args:
            images (*optional*): paths, bytes of image files, PIL images, uint8 arrays
                `(H, W, 3)` or uint8 tensors `(3, H, W)`. An image is a one-frame clip.
            videos (*optional*): clips, see [`VLJEPAVideoProcessor`]. Give either images or videos,
                because all clips of a batch have the same number of frames.
            text (*optional*): queries; the empty string is a valid one.
            targets (*optional*): target texts.
            contexts (*optional*): texts that the Y-Decoder reads before an embedding, as
                `config.decoder_context` makes them.
            num_frames (`int`, *optional*): frames per video, instead of the video processor's.
            max_query_length, max_target_length (`int`, *optional*): instead of the processor's.
            target_prompt_name (`str`, *optional*): instead of the processor's.
            return_tensors (`str`, *optional*, defaults to `"pt"`): no other value is supported.

        Returns: the tensors of the given parts:

            - `pixel_values_videos`, float32 `(B, T, 3, h, w)`
            - `input_ids` and `attention_mask`, int64 `(B, Lq)`
            - `target_input_ids` and `target_attention_mask`, int64 `(B, Ly)`
            - `context_input_ids` and `context_attention_mask`, int64 `(B, C)`

            Texts are padded on the right to the longest of the batch, contexts on the left, because
            the embedding that follows a context must be next to its last token. Lq is 0 if every
            query is empty and the tokenizer adds no special token, C if every context is empty.
        Raises: `ValueError` that names the argument, if parts differ in length, for images together
            with videos, and for a part or text of another type; `MediaError` for a file that cannot
            be read.
        """
        if not isinstance(return_tensors, str) or return_tensors != "pt":
            given = return_tensors if isinstance(return_tensors, str) else type(return_tensors)
            raise ValueError(f"return_tensors must be 'pt', got {given!r:.50}")
        if images is not None and videos is not None:
            raise ValueError("give either images or videos: one batch has one number of frames")
        images = None if images is None else as_images(images)
        videos = None if videos is None else as_batch(videos)
        text = None if text is None else check_texts("text", text)
        targets = None if targets is None else check_texts("targets", targets)
        contexts = None if contexts is None else check_texts("contexts", contexts)
        check_lengths(images=images, videos=videos, text=text, targets=targets, contexts=contexts)

        query_length = self.max_query_length
        if max_query_length is not None:
            query_length = check_count("max_query_length", max_query_length)
        target_length = self.max_target_length
        if max_target_length is not None:
            target_length = check_count("max_target_length", max_target_length)
        if target_prompt_name is None:
            target_prompt_name = self.target_prompt_name
        batch = {}
        if images is not None:
            # One by one, so that one image is in memory at its full size.
            clips = [self.image_pixels(images, index) for index in range(len(images))]
            batch["pixel_values_videos"] = torch.stack(clips)
        if videos is not None:
            batch |= self.video_processor(videos, num_frames=num_frames, return_tensors="pt")
        if text is not None:
            batch |= tokenize(self.tokenizer, text, query_length)
        if targets is not None:
            prompt = self.prompt(target_prompt_name)
            texts = [prompt + target for target in targets]
            batch |= tokenize(self.target_tokenizer, texts, target_length, prefix="target_")
        if contexts is not None:
            batch |= tokenize(
                self.text_tokenizer,
                contexts,
                query_length,
                prefix="context_",
                padding_side="left",
                add_special_tokens=False,
            )
        return BatchFeature(batch)

    def image_pixels(self, images: list[ImageLike], index: int) -> torch.Tensor:
        """Return one image of a batch as the pixels of a one-frame clip, `(1, 3, h, w)`."""
        image = images[index]
        try:
            clip = image_clip(image, max_pixels=self.video_processor.max_pixels)
            batch = self.video_processor(clip, do_sample_frames=False)
        except MediaError:  # names the file
            raise
        except ValueError as error:
            if isinstance(image, str | os.PathLike | bytes):
                raise MediaError(f"{name_of(image)}: {error}") from error
            if len(images) == 1:
                raise
            raise ValueError(f"images[{index}]: {error}") from error
        return batch["pixel_values_videos"][0]

    def watch(
        self,
        source: StreamSource,
        *,
        window: int | None = None,
        stride: int | None = None,
        fps: float | None = None,
        live: bool | None = None,
        allow_urls: bool = False,
    ) -> WindowStream:
        """Return an iterator over the windows of a source, which can be endless.

        See [`WindowStream`].

        Args:
            source: path or content of a video file, the number of a camera, with `allow_urls` an
                http(s) or rtsp address, or an iterator of pairs: seconds, and a uint8 array
                `(H, W, 3)`.
            window, stride (`int`, *optional*): in frames; by default the video processor's
                `num_frames` and half of a window.
            fps (`float`, *optional*): frames taken per second; all by default.
            live (`bool`, *optional*): if the reader is slow, drop frames (`True`), or let the
                source wait (`False`). By default cameras and addresses are live.
            allow_urls (`bool`, *optional*, defaults to `False`): open addresses.
        """
        return WindowStream(
            source,
            self.video_processor,
            window=window,
            stride=stride,
            fps=fps,
            live=live,
            allow_urls=allow_urls,
        )

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The Y-Decoder's tokenizer."""
        return self.tokenizer if self.decoder_tokenizer is None else self.decoder_tokenizer

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Decode token ids that the Y-Decoder generated; the arguments are the tokenizer's."""
        return self.text_tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """Decode the token ids of one text, as `batch_decode` does for several."""
        return self.text_tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "pixel_values_videos",
            "input_ids",
            "attention_mask",
            "target_input_ids",
            "target_attention_mask",
        ]

    # ProcessorMixin has no optional parts: it would require a decoder tokenizer, and fail to save
    # `None`.

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "decoder_tokenizer"]

    def to_dict(self) -> dict:
        """Return the settings as JSON values: the decoder tokenizer is the name of its folder."""
        named = copy.copy(self)
        named.decoder_tokenizer = None if self.decoder_tokenizer is None else "decoder_tokenizer"
        return super(VLJEPAProcessor, named).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> list[str]:
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.decoder_tokenizer is not None:
            folder = os.path.join(save_directory, "decoder_tokenizer")
            saved += self.decoder_tokenizer.save_pretrained(folder)
        return saved

    # ProcessorMixin finds video processors through AutoVideoProcessor, which raises if torchvision
    # is not installed. The next two methods use the class itself.

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VLJEPAVideoProcessor):
            raise TypeError(
                f"video_processor must be a VLJEPAVideoProcessor, got {type(argument).__name__}"
            )
        return VLJEPAVideoProcessor

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict | None = None,
        **kwargs: object,
    ) -> list:
        path, subfolder = pretrained_model_name_or_path, kwargs.pop("subfolder", "")
        auto = {"trust_remote_code", "_from_auto"}
        plain = {name: value for name, value in kwargs.items() if name not in auto}

        def tokenizer(folder: str) -> PreTrainedTokenizerBase:
            # Upstream's loader falls back to the query tokenizer if a folder is missing.
            inside = os.path.join(subfolder, folder)
            return AutoTokenizer.from_pretrained(path, subfolder=inside, **kwargs)

        if processor_dict and (folder := processor_dict.get("decoder_tokenizer")):
            processor_dict["decoder_tokenizer"] = tokenizer(folder)
        return [
            VLJEPAVideoProcessor.from_pretrained(path, subfolder=subfolder, **plain),
            tokenizer(""),
            tokenizer("target_tokenizer"),
        ]


def as_images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Return one image or several as a list of images."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return [images]
    # A set has no order, and iterating over a dictionary would give its keys.
    if isinstance(images, Mapping | Set) or not isinstance(images, Iterable):
        raise ValueError(f"images is a {type(images).__name__}: give {IMAGES}, or a list of these")
    return list(images)


def check_lengths(**parts: Sequence | None) -> None:
    """Raise `ValueError` unless the given parts, at least one, have one length above 0."""
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        given = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ValueError(f"the parts of a batch need one length, got {given or 'no part'}")


def image_clip(image: ImageLike, *, max_pixels: int | None = None) -> np.ndarray | torch.Tensor:
    """Return an image as a one-frame clip: array `(1, H, W, 3)` or tensor `(1, 3, H, W)`."""
    if isinstance(image, np.ndarray | torch.Tensor):
        check_pixels("image", image)
        return image[None]
    if not isinstance(image, str | os.PathLike | bytes | Image.Image):
        raise ValueError(f"an image is a {type(image).__name__}: give {IMAGES}")
    return read_image(image, max_pixels=max_pixels)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    *,
    prefix: str = "",
    padding_side: str = "right",
    add_special_tokens: bool = True,
) -> dict[str, torch.Tensor]:
    """Return token ids and mask, both int64 `(B, L)`, padded to the longest text.

    Args:
        prefix: put before the names `input_ids` and `attention_mask`.
    """
    max_length = min(max_length, tokenizer.model_max_length, 2**31)  # tokenizers count in 64 bits
    own = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
    if max_length < max(own, 1):
        raise ValueError(
            f"max_{'target' if prefix == 'target_' else 'query'}_length is {max_length}, but the "
            f"tokenizer adds {own} tokens to every text: give at least {own}"
        )
    tokens = tokenizer(
        list(texts),
        padding=True,
        padding_side=padding_side,
        truncation=True,
        add_special_tokens=add_special_tokens,
        max_length=max_length,
        return_attention_mask=True,
    )
    # Not by the tokenizer's return_tensors, which makes float32 tensors if every text is empty.
    return {
        prefix + name: torch.tensor(tokens[name], dtype=torch.long)
        for name in ("input_ids", "attention_mask")
    }


__all__ = ["VLJEPAProcessor"]
