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
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from .chat import CHAT_TEMPLATE, read_conversations
from .frame_stream import StreamSource
from .images import media_kind
from .media import MediaError, is_remote, name_of
from .options import (
    MODALITIES,
    TEXT,
    VLJEPACallKwargs,
    VLJEPAProcessorKwargs,
    check_call,
    check_options,
)
from .sampling import check_count
from .texts import check_text, check_texts, tokenize
from .video_io import read_image
from .video_processing_vljepa import Video, VLJEPAVideoProcessor, as_batch, check_pixels, stack
from .windows import WindowStream

IMAGES = "a path, bytes, a PIL image, or a uint8 array or tensor"
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor
# Settings of the processor that a call may replace.
SETTINGS = ("max_query_length", "max_target_length", "target_prompt_name")
# Arguments of upstream's `apply_chat_template` for other conversations than a question.
NO_CHAT = {
    "continue_final_message",
    "documents",
    "load_audio_from_video",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tools",
}


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
        chat_template (`str`, *optional*): Jinja template of `apply_chat_template`. The default
            gives the question alone, because the Predictor reads no other text.

    Raises: `ValueError` for a tokenizer without a padding token, or an unknown prompt name.
    """

    valid_processor_kwargs = VLJEPAProcessorKwargs

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
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            video_processor,
            tokenizer,
            target_tokenizer,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
        )
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
    media_kind = staticmethod(media_kind)
    is_remote = staticmethod(is_remote)

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
        **kwargs: Unpack[VLJEPACallKwargs],
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
            max_query_length, max_target_length (`int`, *optional*): instead of the processor's.
            target_prompt_name (`str`, *optional*): instead of the processor's.
            kwargs: options of [`VLJEPATextKwargs`] for the queries, of [`VLJEPAImagesKwargs`] for
                images, of [`VLJEPAVideosKwargs`] for videos. As in transformers, each is given on
                its own, as in `num_frames=4`, in the dictionary of its modality, `text_kwargs`,
                `images_kwargs` or `videos_kwargs`, or in `common_kwargs`. `None` means the
                default. `return_tensors` is `"pt"` or `"np"`; targets and contexts have that of
                the queries.

        Returns: the tensors or arrays of the given parts:

            - `pixel_values_videos`, float32 `(B, T, 3, h, w)`
            - `input_ids` and `attention_mask`, int64 `(B, Lq)`
            - `target_input_ids` and `target_attention_mask`, int64 `(B, Ly)`
            - `context_input_ids` and `context_attention_mask`, int64 `(B, C)`

            Texts are padded on the right to the longest of the batch, contexts on the left, because
            the embedding that follows a context must be next to its last token. Lq is 0 if every
            query is empty and the tokenizer adds no special token, C if every context is empty.
        Raises: `ValueError` that names the argument, if parts differ in length, for images together
            with videos, and for a part, text or option of another type or value; `TypeError` for an
            option that this processor does not have; `MediaError` for a file that cannot be read.
        """
        if images is not None and videos is not None:
            raise ValueError("give either images or videos: one batch has one number of frames")
        images = None if images is None else as_images(images)
        videos = None if videos is None else as_batch(videos)
        text = None if text is None else check_texts("text", text)
        targets = None if targets is None else check_texts("targets", targets)
        contexts = None if contexts is None else check_texts("contexts", contexts)
        check_lengths(images=images, videos=videos, text=text, targets=targets, contexts=contexts)
        replaced = {name: kwargs.pop(name, None) for name in SETTINGS}
        parts = {"text": text, "images": images, "videos": videos}
        options = self.options(kwargs, {name for name, part in parts.items() if part is not None})
        query_length = self.query_length(options["text"], replaced["max_query_length"])
        target_length = replaced["max_target_length"]
        if target_length is None:
            target_length = self.max_target_length
        target_length = check_count("max_target_length", target_length)
        prompt_name = replaced["target_prompt_name"]
        prompt = self.prompt(self.target_prompt_name if prompt_name is None else prompt_name)

        text_tensors = options["text"].pop("return_tensors", "pt")
        pixels, tokens = {}, {}
        if images is not None:
            # One by one, so that one image is in memory at its full size.
            clips = [self.image_pixels(images, i, options["images"]) for i in range(len(images))]
            pixels["pixel_values_videos"] = stack(clips)
        if videos is not None:
            pixels |= self.video_processor(videos, **options["videos"] | {"return_tensors": "pt"})
        if text is not None:
            tokens |= tokenize(self.tokenizer, text, query_length, **options["text"])
        if targets is not None:
            texts = [prompt + target for target in targets]
            tokens |= tokenize(self.target_tokenizer, texts, target_length, prefix="target_")
        if contexts is not None:
            tokens |= tokenize(
                self.text_tokenizer,
                contexts,
                query_length,
                prefix="context_",
                padding_side="left",
                add_special_tokens=False,
            )
        media = "videos" if images is None else "images"
        if options[media].get("return_tensors") == "np":
            pixels = {name: tensor.numpy() for name, tensor in pixels.items()}
        if text_tensors == "np":
            tokens = {name: tensor.numpy() for name, tensor in tokens.items()}
        return BatchFeature(pixels | tokens)

    def options(self, kwargs: dict, parts: set[str]) -> dict[str, dict[str, object]]:
        """Return the checked options of a call by modality: "text", "images" and "videos".

        Args:
            parts: the modalities that the call gives.
        """
        checked = check_call(type(self).__name__, kwargs, parts)
        merged = self._merge_kwargs(self.valid_processor_kwargs, **checked)
        return {modality: merged[f"{modality}_kwargs"] for modality in MODALITIES}

    def query_length(self, options: dict[str, object], max_query_length: int | None) -> int:
        """Return the limit of queries in tokens, and complete the options of `tokenize`.

        Options that the query tokenizer was created with are defaults, as in transformers. Its
        padding side is not one of them, because queries are padded on the right.
        """
        name, given = "max_length", options.pop("max_length", None)
        if max_query_length is not None:
            if given is not None:
                raise ValueError("max_length is another name of max_query_length: give one of them")
            name, given = "max_query_length", max_query_length
        created = {
            option: self.tokenizer.init_kwargs.get(option) for option in TEXT - {"return_tensors"}
        }
        created = check_options("the query tokenizer", created, TEXT)
        limit = min(self.max_query_length, created.pop("max_length", self.max_query_length))
        for option, value in created.items():
            options.setdefault(option, value)
        return check_count(name, limit if given is None else given)

    def image_pixels(
        self, images: list[ImageLike], index: int, options: dict[str, object]
    ) -> torch.Tensor:
        """Return one image of a batch as the pixels of a one-frame clip, `(1, 3, h, w)`.

        `options` are those of [`VLJEPAImagesKwargs`].
        """
        image = images[index]
        try:
            clip = image_clip(image, max_pixels=self.video_processor.max_pixels)
            batch = self.video_processor(
                clip, **options | {"do_sample_frames": False, "return_tensors": None}
            )
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

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict | None = None,
        **kwargs: object,
    ) -> str | list[str] | torch.Tensor | np.ndarray | BatchFeature:
        """Return the question of a user turn, or the batch of the question and its medium.

        Args:
            conversation: one user turn, or a list of them: `[{"role": "user", "content": [{"type":
                "video", "video": "a.mp4"}, {"type": "text", "text": "what happens?"}]}]`. A medium
                is of type `video` or `image`; the key of its value is the type, `url` or `path`,
                and the value anything that `__call__` takes. A turn without a text asks for a
                caption.
            chat_template (*optional*): Jinja template, or the name of one of several, instead of
                the processor's.
            tokenize: return tokens, not text.
            return_dict: with `tokenize`, return what `__call__` returns for text and media;
                otherwise, return the tokens `input_ids` alone.
            add_generation_prompt: given to the template. The default template ignores it: no text
                follows the question.
            return_tensors (*optional*): as in `__call__`; transformers' "auto" is the default.
            processor_kwargs, kwargs: options of `__call__`.

        Raises: `ValueError` for a system or assistant turn, and for several turns, texts or media:
            the Predictor reads one question.
        """
        for name in sorted(NO_CHAT & kwargs.keys()):
            if kwargs.pop(name):
                raise ValueError(f"a question has no {name}: leave it out")
        turns, is_batched = read_conversations(conversation)
        texts, _ = render_jinja_template(
            conversations=[turn.messages() for turn in turns],
            chat_template=self._resolve_chat_template(chat_template),
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        if not tokenize:
            return texts if is_batched else texts[0]
        options = {**(processor_kwargs or {}), **kwargs}
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        kinds = {turn.part for turn in turns}
        if len(kinds) > 1:
            raise ValueError("a batch of conversations needs media of one kind: images or videos")
        media = {kind: [turn.medium for turn in turns] for kind in kinds if kind is not None}
        if any(medium is None for listed in media.values() for medium in listed):
            raise ValueError("a part of the conversation names no file: give it as url or path")
        batch = self(text=texts, **media, **options)
        return batch if return_dict else batch["input_ids"]

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The Y-Decoder's tokenizer."""
        return self.tokenizer if self.decoder_tokenizer is None else self.decoder_tokenizer

    def text_labels(self, texts: Sequence[str]) -> torch.Tensor:
        """Return texts as labels of a language model `(B, L)`: tokens of `text_tokenizer` and an
        end token, padded with -100.

        Raises: `ValueError` for a tokenizer without an end token.
        """
        tokenizer = self.text_tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the query tokenizer has no eos_token, so a language model could not end a text: "
                "set one"
            )
        tokens = tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=True,
            # One token less: the next line adds the end token, which truncation would cut off.
            max_length=min(self.max_target_length, tokenizer.model_max_length) - 1,
        )["input_ids"]
        ended = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokens]
        return pad_sequence(ended, batch_first=True, padding_value=-100)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Decode token ids that the Y-Decoder generated; the arguments are the tokenizer's."""
        return self.text_tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """Decode the token ids of one text, as `batch_decode` does for several."""
        return self.text_tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs of a prediction; targets and contexts add theirs."""
        return ["pixel_values_videos", "input_ids", "attention_mask"]

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
        # Upstream writes the names of the code files into the configuration through the processor,
        # and removes them from the tokenizers only: the processor would differ from a loaded one.
        vars(self).pop("auto_map", None)
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


__all__ = ["VLJEPAProcessor"]
