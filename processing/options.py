"""Options of a processor call, by the names that transformers' processors have for them.

An option is given on its own (`padding=True`), by modality (`text_kwargs={"padding": True}`), or in
`common_kwargs`. Upstream ignores an option that it does not know, and checks the values of a
tokenizer's only in the tokenizer. Here every name and value is checked before any file is read.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from numbers import Integral, Real
from typing import TypedDict

import numpy as np
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import PaddingStrategy, TensorType

from .sampling import check_count

MAX_FRAMES = 10_000  # sampled from one clip
MAX_TOKENS = 2**20  # of one padded query
MAX_CROP_PIXELS = 2**25  # of one cropped frame
INTERPOLATION = {
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}


class VLJEPATextKwargs(TypedDict, total=False):
    """Options of the queries, `text`.

    Attributes:
        add_special_tokens (`bool`, *optional*, defaults to `True`): the query tokenizer's own.
        padding (`bool` or `str`, *optional*, defaults to `True`): `True` or "longest" pads to the
            longest query of the batch, "max_length" to `max_length`; `False` or "do_not_pad" needs
            queries of one length.
        truncation (`bool` or `str`, *optional*, defaults to `True`): `False` leaves long queries as
            they are.
        max_length (`int`, *optional*): another name of `max_query_length`.
        pad_to_multiple_of (`int`, *optional*): pad to a multiple of this number of tokens.
        return_tensors (`str`, *optional*, defaults to `"pt"`): or `"np"`.
    """

    add_special_tokens: bool
    padding: bool | str | PaddingStrategy
    truncation: bool | str
    max_length: int
    pad_to_multiple_of: int
    return_tensors: str | TensorType


class VLJEPAImagesKwargs(TypedDict, total=False):
    """Options of the images: the steps of [`VLJEPAVideoProcessor`] after sampling.

    Attributes:
        return_tensors (`str`, *optional*, defaults to `"pt"`): or `"np"`.
    """

    do_resize: bool
    size: int | list[int] | tuple[int, ...] | dict[str, int]
    default_to_square: bool
    resample: PILImageResampling | int
    do_center_crop: bool
    crop_size: int | list[int] | tuple[int, ...] | dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    return_tensors: str | TensorType


class VLJEPAVideosKwargs(VLJEPAImagesKwargs, total=False):
    """Options of the videos: those of the images, and two for sampling.

    Attributes:
        num_frames (`int`, *optional*): frames per clip, instead of the video processor's.
        do_sample_frames (`bool`, *optional*): `False` takes every frame.
    """

    num_frames: int
    do_sample_frames: bool


class VLJEPAProcessorKwargs(ProcessingKwargs, total=False):
    """Options of [`VLJEPAProcessor`] by modality; each may also be given on its own."""

    text_kwargs: VLJEPATextKwargs
    images_kwargs: VLJEPAImagesKwargs
    videos_kwargs: VLJEPAVideosKwargs


class VLJEPACallKwargs(VLJEPAProcessorKwargs, total=False):
    """Options of a call: also the settings of the processor that a call may replace.

    A class of its own: transformers reserves the names of `valid_processor_kwargs` for options that
    are not settings.
    """

    max_query_length: int
    max_target_length: int
    target_prompt_name: str


TEXT, IMAGES, VIDEOS = (
    frozenset(kind.__annotations__)
    for kind in (VLJEPATextKwargs, VLJEPAImagesKwargs, VLJEPAVideosKwargs)
)
MODALITIES = {"text": TEXT, "images": IMAGES, "videos": VIDEOS}


def shown(value: object) -> str:
    """Return a value as an error shows it."""
    short = value is None or isinstance(value, Real | str | list | tuple | Mapping | SizeDict)
    return " ".join(ascii(value).split())[:50] if short else f"a {type(value).__name__}"


def check_switch(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {shown(value)}: give True or False")
    return bool(value)


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{name} is {shown(value)}: give a finite number")
    return float(value)


def check_channels(name: str, value: object) -> float | tuple[float, ...]:
    """Return a mean or a standard deviation: one number, or three."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) not in (1, 3):
        raise ValueError(f"{name} is {shown(value)}: give one number or three, for the channels")
    checked = tuple(check_number(name, each) for each in values)
    if name == "image_std" and 0 in checked:
        raise ValueError(f"{name} is {shown(value)}: pixels are divided by it, so do not give 0")
    return checked[0] if len(checked) == 1 else checked


def check_size(name: str, value: object) -> int | dict[str, int]:
    """Return a size of frames, or of their crop, in pixels."""
    edges = "height", "width"
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(edges, value, strict=True))
    if isinstance(value, SizeDict | Mapping):
        size = {edge: pixels for edge, pixels in dict(value).items() if pixels is not None}
        kinds = [set(edges)] if name == "crop_size" else [set(edges), {"shortest_edge"}]
        if set(size) not in kinds:
            other = "" if name == "crop_size" else "a shortest_edge, or "
            raise ValueError(f"{name} is {shown(size)}: give {other}a height and a width")
    else:
        size = dict.fromkeys(edges, value)
    size = {edge: int(check_count(name, pixels)) for edge, pixels in size.items()}
    if name == "crop_size" and size["height"] * size["width"] > MAX_CROP_PIXELS:
        raise ValueError(f"{name} is {shown(value)}: give at most {MAX_CROP_PIXELS} pixels")
    return int(value) if isinstance(value, Integral) else size


def check_resample(name: str, value: object) -> PILImageResampling:
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in INTERPOLATION:
        raise ValueError(f"{name} is {shown(value)}: give BILINEAR (2) or BICUBIC (3)")
    return PILImageResampling(value)


def check_padding(name: str, value: object) -> str:
    kinds = {True: "longest", False: "do_not_pad"}
    kind = kinds.get(value) if isinstance(value, bool) else value
    if not isinstance(kind, str) or kind not in list(PaddingStrategy):
        raise ValueError(f"{name} is {shown(value)}: give True, False or 'max_length'")
    return PaddingStrategy(kind).value


def check_truncation(name: str, value: object) -> bool:
    # A query is one text, so these strategies for pairs are all one.
    kinds = {"longest_first": True, "only_first": True, "do_not_truncate": False}
    kind = (
        value if isinstance(value, bool) else kinds.get(value) if isinstance(value, str) else None
    )
    if kind is None:
        raise ValueError(f"{name} is {shown(value)}: give True or False")
    return kind


def check_tensors(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in ("pt", "np"):
        raise ValueError(f"{name} must be 'pt' or 'np', got {shown(value)}")
    return TensorType(value).value


def check_token_count(name: str, value: object) -> int:
    if check_count(name, value) > MAX_TOKENS:
        raise ValueError(f"{name} is {shown(value)}: give at most {MAX_TOKENS}")
    return int(value)


def check_frames(name: str, value: object) -> int:
    if check_count(name, value) > MAX_FRAMES:
        raise ValueError(f"{name} is {shown(value)}: give at most {MAX_FRAMES}")
    return int(value)


CHECKS: dict[str, Callable[[str, object], object]] = {
    "add_special_tokens": check_switch,
    "padding": check_padding,
    "truncation": check_truncation,
    "max_length": check_count,
    "pad_to_multiple_of": check_token_count,
    "do_resize": check_switch,
    "size": check_size,
    "default_to_square": check_switch,
    "resample": check_resample,
    "do_center_crop": check_switch,
    "crop_size": check_size,
    "do_rescale": check_switch,
    "rescale_factor": check_number,
    "do_normalize": check_switch,
    "image_mean": check_channels,
    "image_std": check_channels,
    "num_frames": check_frames,
    "do_sample_frames": check_switch,
    "return_tensors": check_tensors,
}


def check_options(
    owner: str, options: Mapping[str, object], known: frozenset[str]
) -> dict[str, object]:
    """Return options with checked values; those that are `None` are left out.

    `return_tensors` may not be `None`, for which transformers returns lists of unequal lengths.

    Args:
        owner: what the error calls the class or argument that takes the options.
        known: names of the options that the owner has.

    Raises: `TypeError` that names the options which the owner does not have, `ValueError` that
        names the first option with a wrong value.
    """
    given = {
        name: value
        for name, value in options.items()
        if value is not None or name == "return_tensors"
    }
    if unknown := sorted(str(name)[:40] for name in given if name not in known):
        raise TypeError(f"{owner} does not support {', '.join(unknown)}: leave it out")
    return {name: CHECKS[name](name, value) for name, value in given.items()}


def check_call(owner: str, options: Mapping[str, object], parts: set[str]) -> dict[str, object]:
    """Return the options of a call in the layout of upstream's `_merge_kwargs`, checked.

    Args:
        owner: as in `check_options`.
        parts: the modalities that the call gives, of "text", "images" and "videos".

    Raises: as `check_options`; `ValueError` too for an option that is given twice, and for one of a
        modality that the call does not give, which would change nothing.
    """
    every = frozenset().union(*MODALITIES.values())
    checked, own = {}, {}
    for name, value in options.items():
        modality = name.removesuffix("_kwargs")
        if name == "common_kwargs" or (modality in MODALITIES and modality != name):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{name} is {shown(value)}: give a dictionary of options")
            known = MODALITIES.get(modality, every)
            checked[name] = check_options(name, value or {}, known)
        # Some callers of every processor switch off what this one does not have.
        elif name in every or value is not False:
            own[name] = value
    own = check_options(owner, own, every)
    for name in own:
        twice = [key for key, value in checked.items() if key != "common_kwargs" and name in value]
        if twice:
            raise ValueError(f"{name} is given twice, in {twice[0]} and on its own: give it once")
        homes = [modality for modality, known in MODALITIES.items() if name in known]
        if name != "return_tensors" and parts.isdisjoint(homes):
            raise ValueError(
                f"{name} is an option of {' and '.join(homes)}, but this call has none: leave it "
                "out"
            )
    # Upstream copies `common_kwargs` into every modality, also into those without such an option.
    common = checked.pop("common_kwargs", {})
    for modality, known in MODALITIES.items():
        mine = {name: common[name] for name in common if name in known and name not in own}
        checked[f"{modality}_kwargs"] = mine | checked.get(f"{modality}_kwargs", {})
    return checked | own


__all__ = [
    "INTERPOLATION",
    "MODALITIES",
    "TEXT",
    "CHECKS",
    "VIDEOS",
    "VLJEPACallKwargs",
    "VLJEPAProcessorKwargs",
    "check_call",
    "check_options",
    "check_token_count",
]
