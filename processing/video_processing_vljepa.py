"""Clips to pixels: sample frames, resize, crop and normalise, in plain torch.

The arithmetic is that of V-JEPA 2's stock processor, without torchvision: resize the shortest edge
with an antialiased bilinear filter on uint8, crop the centre, rescale and normalise in one step.
Squashing frames to a square would run too, but the X-Encoder was not trained on such frames.

Shapes: B clips, T frames, H and W of the source, h and w after the crop.
"""

import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import BaseVideoProcessor

from .media import MediaError, name_of
from .options import CHECKS, INTERPOLATION, VIDEOS, check_options
from .resampling import crop_of_resized, resized_size
from .video_io import Excerpt, read_clip, read_image, uniform_indices

logger = logging.get_logger(__name__)

Frames = list[Image.Image] | list[np.ndarray] | list[torch.Tensor]
Video = str | os.PathLike | bytes | Excerpt | Frames | np.ndarray | torch.Tensor
CLIPS = "a path, bytes, a uint8 array or tensor, or a list of frames"

# A frame whose resized long edge is more than this many short edges is resized only where it is
# cropped. All other frames go through torch's own kernel.
LONG_FRAME = 16
MAX_RESIZED_PIXELS = 2**25  # of one resized frame that is not cropped
_FIT = ("do_resize", "size", "resample", "do_center_crop", "crop_size")  # arguments of `fit`


def shortest_edge(crop: int) -> int:
    """Return the length of the shortest edge before a centre crop of `crop` pixels: 292 for 256."""
    return int(crop * 256 / 224)


class VLJEPAVideoProcessor(BaseVideoProcessor):
    """Video processor: clips to the `pixel_values_videos` of the X-Encoder.

    A *clip* is the path of a video file or of a folder of images, the bytes of a video file, an
    `Excerpt` of either file, a uint8 array `(T, H, W, 3)`, a uint8 tensor `(T, 3, H, W)`, or a list
    of frames of one size: PIL images, arrays `(H, W, 3)` or tensors `(3, H, W)`. The layouts are
    checked, never guessed. A call takes one clip, a list of clips, or an array or tensor with a
    leading batch axis. An image is a one-frame clip; give it with `do_sample_frames=False`, or it
    is repeated `num_frames` times.

    Defaults are the paper's 256 x 256 pixels and uniform sampling. The paper's frame count differs
    by stage (1, 8, 32); the default here is 8. A `crop_size` without a `size` sets the `size` too,
    as in V-JEPA 2: shortest edge = `int(crop_size * 256 / 224)`.

    Memory does not grow with the shape of a frame. Frames are resized one by one, and a frame whose
    long edge is more than 16 short edges is resized only where it is cropped. Without a crop, a
    frame that would be enlarged to more than 33.5 million pixels is refused.

    A server that decodes strangers' files should set the attributes `max_seconds` and `max_pixels`
    (of one frame). Files that exceed them raise a `MediaError`, as do files that take longer to
    decode than `max_decode_seconds`, by default five minutes. These limits belong to the process
    and are not saved.

    Args:
        num_frames (`int`, *optional*, defaults to 8): T, evenly spaced over the clip in time, first
            and last frame included; a shorter clip repeats frames.
        crop_size (`int` or `dict`, *optional*, defaults to 256): side of the centre crop.
        size (`dict`, *optional*, defaults to `{"shortest_edge": 292}`): frame size before the
            crop; `{"height": ..., "width": ...}` squashes, for towers trained that way. An `int`
            squashes to a square, as in transformers, with a warning.
        resample (`PILImageResampling`, *optional*, defaults to `BILINEAR`): or `BICUBIC`.
        kwargs: `do_resize`, `do_center_crop`, `do_rescale`, `rescale_factor`, `do_normalize`,
            `image_mean`, `image_std`, `do_sample_frames`.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_size = {"height": 256, "width": 256}
    size = {"shortest_edge": shortest_edge(256)}
    num_frames = 8
    do_sample_frames = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    model_input_names = ["pixel_values_videos"]

    def __init__(self, **kwargs: Unpack[VideosKwargs]) -> None:
        # Upstream takes any other name too: a loaded configuration has some.
        known = {name: kwargs[name] for name in VIDEOS - {"return_tensors"} if name in kwargs}
        check_options(type(self).__name__, known, VIDEOS)
        warn_of_squashing(kwargs.get("size"))
        if "crop_size" in kwargs and "size" not in kwargs:
            crop = get_size_dict(kwargs["crop_size"], param_name="crop_size")
            kwargs["size"] = {"shortest_edge": shortest_edge(max(crop["height"], crop["width"]))}
        super().__init__(**kwargs)
        self.max_seconds: float | None = None
        self.max_pixels: int | None = None
        self.max_decode_seconds: float | None = 300

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are saved: all but the limits."""
        limits = {"max_seconds", "max_pixels", "max_decode_seconds"}
        return {name: value for name, value in super().to_dict().items() if name not in limits}

    def preprocess(
        self,
        videos: Video | list[Video],
        *,
        num_frames: int | None = None,
        do_sample_frames: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Unpack[VideosKwargs],
    ) -> BatchFeature:
        """Sample, resize, crop, rescale and normalise; every step can be overridden per call.

        An option that is `None` has the processor's value.

        Two calls can share the work, with the same result: one that stops at uint8
        (`do_rescale=False, do_normalize=False`), for a cache, and one that finishes the cached
        clips (`do_sample_frames=False, do_resize=False, do_center_crop=False`).

        Returns: `pixel_values_videos`, a list of `(T, 3, h, w)` tensors, or with
            `return_tensors="pt"` one tensor of shape `(B, T, 3, h, w)`, with `"np"` one array;
            float32, or uint8 if neither rescaled nor normalised.
        Raises: `MediaError` for a file that cannot be read, `ValueError` for clips of unequal
            length or size or in another layout, and for an option with a wrong value, `TypeError`
            for an option that is not supported here.
        """
        settings = self.settings(kwargs)
        given = {"num_frames": num_frames, "do_sample_frames": do_sample_frames}
        given = check_options(type(self).__name__, given, VIDEOS)
        num_frames = CHECKS["num_frames"]("num_frames", given.get("num_frames", self.num_frames))
        do_sample_frames = given.get("do_sample_frames", self.do_sample_frames)
        if return_tensors is not None:
            return_tensors = CHECKS["return_tensors"]("return_tensors", return_tensors)
        fit = {name: settings.pop(name) for name in _FIT}
        clips, videos = [], as_batch(videos)
        for index, video in enumerate(videos):
            try:
                frames = self.load_frames(video, num_frames if do_sample_frames else None, fit)
            except MediaError:  # names the file
                raise
            except ValueError as error:
                if len(videos) == 1:
                    raise
                raise ValueError(f"videos[{index}]: {error}") from error
            clips.append(self.finish(frames, **settings))
        if return_tensors is None:
            return BatchFeature({"pixel_values_videos": clips})
        pixels = stack(clips)
        return BatchFeature(
            {"pixel_values_videos": pixels.numpy() if return_tensors == "np" else pixels}
        )

    # The base class does the next two for a batch. It copies every clip at each step, and its
    # checks take longer than the decoding of a small clip.

    def settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `fit` and `finish`: a call's, and the processor's for the others.

        Raises: `TypeError` for an option that is not supported here, `ValueError` for a value.
        """
        options = check_options(type(self).__name__, kwargs, VIDEOS)
        warn_of_squashing(options.get("size"))
        settings = {
            "do_resize": self.do_resize,
            "size": self.size,
            "default_to_square": self.default_to_square,
            "resample": self.resample,
            "do_center_crop": self.do_center_crop,
            "crop_size": self.crop_size,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }
        settings = self._standardize_kwargs(**settings | options)
        del settings["pad_size"]
        self._validate_preprocess_kwargs(**settings)
        return settings

    def load_frames(
        self, video: Video, num_frames: int | None, fit: dict[str, Any]
    ) -> torch.Tensor:
        """Read one clip, sample, resize and crop it; `num_frames=None` keeps every frame.

        Frames are resized one by one as they are decoded, so that one frame is in memory at its
        full size, and a frame that a short clip repeats is resized once.

        Returns: `torch.Tensor` of shape `(T, 3, h, w)`, uint8.
        """
        if isinstance(video, str | os.PathLike | bytes):
            video = Excerpt(video)
        if isinstance(video, Excerpt):
            return self.load_file(video, num_frames, fit)
        if isinstance(video, np.ndarray | torch.Tensor):
            check_pixels("clip", video)
        elif not isinstance(video, list | tuple):
            raise ValueError(f"a clip is a {type(video).__name__}: give {CLIPS}")
        indices = uniform_indices(len(video), len(video) if num_frames is None else num_frames)
        indices = indices.tolist()
        frames, sizes = {}, set()
        for index in sorted(set(indices)):
            frame = video[index : index + 1]
            if isinstance(frame, list | tuple):
                frame = self.load_frame(frame[0])
            # torch resizes uint8 on the CPU only.
            frame = channels_first(frame) if isinstance(frame, np.ndarray) else frame.cpu()
            sizes.add(f"{frame.shape[3]} x {frame.shape[2]}")
            frames[index] = self.fit(frame, **fit)
        if len(sizes) > 1:
            raise ValueError(
                f"the frames of a clip have {' and '.join(sorted(sizes)[:2])} pixels: give frames "
                "of one size"
            )
        return torch.cat([frames[index] for index in indices])

    def load_frame(
        self, frame: Image.Image | np.ndarray | torch.Tensor
    ) -> np.ndarray | torch.Tensor:
        """Return a frame of a list as an array `(1, H, W, 3)` or a tensor `(1, 3, H, W)`.

        It may be the path of an image, too.
        """
        if isinstance(frame, Image.Image | str | os.PathLike | bytes):
            return read_image(frame, max_pixels=self.max_pixels)
        if not isinstance(frame, np.ndarray | torch.Tensor):
            raise ValueError(
                f"a frame of a clip is a {type(frame).__name__}: give PIL images, uint8 arrays "
                "(H, W, 3) or uint8 tensors (3, H, W)"
            )
        check_pixels("frame", frame)
        return frame[None]

    def load_file(self, part: Excerpt, num_frames: int | None, fit: dict[str, Any]) -> torch.Tensor:
        """Return the frames of a file or folder, resized and cropped, `(T, 3, h, w)` uint8."""
        if not isinstance(part.video, str | os.PathLike | bytes):
            raise ValueError(
                f"an excerpt is of a {type(part.video).__name__}: give the path or bytes of a video"
            )
        name, sizes = name_of(part.video), set()

        def prepare(picture: np.ndarray) -> np.ndarray:
            sizes.add(picture.shape)
            try:
                frame = self.fit(channels_first(picture[None]), **fit)
            except ValueError as error:
                # The readers take any other ValueError for damage of the file.
                raise MediaError(f"{name}: {error}") from error
            return frame[0].permute(1, 2, 0).numpy()

        clip = read_clip(
            part.video,
            num_frames,
            start=part.start,
            end=part.end,
            max_seconds=self.max_seconds,
            max_pixels=self.max_pixels,
            max_decode_seconds=self.max_decode_seconds,
            prepare=prepare,
        )
        # `read_clip` sees the resized frames only, whose size is the same.
        if len(sizes) > 1:
            raise MediaError(
                f"{name}: the frame size changes within the video. Re-encode it to one size."
            )
        return torch.from_numpy(clip.frames).permute(0, 3, 1, 2)

    def fit(
        self,
        frame: torch.Tensor,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_center_crop: bool,
        crop_size: SizeDict,
    ) -> torch.Tensor:
        """Resize and crop one frame: (1, 3, H, W) uint8 -> (1, 3, h, w) uint8."""
        height, width = frame.shape[-2:]
        if not height * width:
            raise ValueError(f"a frame is {width} x {height} pixels: give at least 1 x 1")
        if do_resize:
            new = new_size(height, width, size)
            if do_center_crop and max(new) > LONG_FRAME * min(new):
                crop = (crop_size.height, crop_size.width)
                mode = INTERPOLATION[resample]
                return crop_of_resized(frame, new, crop_corner(*new, crop_size), crop, mode)
            if new != (height, width) and new[0] * new[1] > MAX_RESIZED_PIXELS:
                raise ValueError(
                    f"{width} x {height} pixels become {new[1]} x {new[0]}, more than "
                    f"{MAX_RESIZED_PIXELS}: cut the frame, reduce `size` or keep `do_center_crop` "
                    "on"
                )
            frame = self.resize(frame, size, resample)
        return self.center_crop(frame, crop_size) if do_center_crop else frame

    def finish(
        self,
        frames: torch.Tensor,
        *,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
    ) -> torch.Tensor:
        """Rescale and normalise, if these steps are on: uint8 -> uint8 or float32."""
        frames = frames.contiguous()  # channels first, because normalising goes by channel
        if do_rescale or do_normalize:
            frames = self.rescale_and_normalize(
                frames, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        return frames

    # BaseVideoProcessor needs torchvision for the next three.

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: PILImageResampling, **kwargs: object
    ) -> torch.Tensor:
        """Resize (..., 3, H, W) -> (..., 3, h, w), antialiased; round the long edge down."""
        height, width = image.shape[-2:]
        new = new_size(height, width, size)
        if new == (height, width):
            return image
        resized = F.interpolate(
            image.flatten(0, -4), size=new, mode=INTERPOLATION[resample], antialias=True
        )
        return resized.unflatten(0, image.shape[:-3])

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: object) -> torch.Tensor:
        """Crop (..., H, W) -> (..., h, w); an odd margin leaves its extra pixel right and below.

        The result is channels first in memory, because normalising goes channel by channel.
        """
        top, left = crop_corner(*image.shape[-2:], size)
        return image[..., top : top + size.height, left : left + size.width].contiguous()

    def normalize(
        self,
        image: torch.Tensor,
        mean: torch.Tensor | tuple[float, ...],
        std: torch.Tensor | tuple[float, ...],
        inplace: bool = False,
        **kwargs: object,
    ) -> torch.Tensor:
        """Normalise (..., 3, h, w) float32 per channel; `inplace` overwrites the image."""
        mean = torch.as_tensor(mean, device=image.device).view(-1, 1, 1)
        std = torch.as_tensor(std, device=image.device).view(-1, 1, 1)
        return (image.sub_(mean) if inplace else image - mean).div_(std)


def stack(clips: list[torch.Tensor]) -> torch.Tensor:
    """Return clips `(T, 3, h, w)` as a batch `(B, T, 3, h, w)`; raise ValueError if they differ."""
    if len(clips) == 1:
        return clips[0][None]  # `torch.stack` would copy the clip
    lengths = [len(clip) for clip in clips]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"clips of one batch need one length, got {lengths} frames: sample them "
            "(do_sample_frames=True) or process them one by one"
        )
    sizes = sorted({f"{clip.shape[3]} x {clip.shape[2]}" for clip in clips})
    if len(sizes) > 1:
        raise ValueError(
            f"clips of one batch need one size, got {' and '.join(sizes[:2])} pixels: crop them "
            "(do_center_crop=True) or process them one by one"
        )
    return torch.stack(clips)


def new_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Return height and width of a resized frame."""
    if size.shortest_edge:
        return resized_size(height, width, size.shortest_edge)
    return size.height, size.width


def crop_corner(height: int, width: int, crop: SizeDict) -> tuple[int, int]:
    """Return row and column where the centre crop of a frame begins."""
    top, left = (height - crop.height) // 2, (width - crop.width) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"a crop of {crop.height} x {crop.width} does not fit into frames of "
            f"{height} x {width}: enlarge `size` or keep `do_resize` on"
        )
    return top, left


def channels_first(frame: np.ndarray) -> torch.Tensor:
    """Return an array `(1, H, W, 3)` as a tensor `(1, 3, H, W)`, channels last in memory.

    This memory layout is faster to resize. torch recognises it only with the leading axis.
    """
    # Rotated pictures have negative strides, which torch does not take.
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(0, 3, 1, 2)


def check_pixels(kind: str, pixels: np.ndarray | torch.Tensor) -> None:
    """Raise `ValueError` unless the layout, the size and the dtype are those of a clip, frame or
    image."""
    is_tensor = isinstance(pixels, torch.Tensor)
    frames, ndim = ("T, ", 4) if kind == "clip" else ("", 3)
    a_kind = f"{'an' if kind == 'image' else 'a'} {kind}"
    if pixels.ndim != ndim or pixels.shape[-3 if is_tensor else -1] != 3:
        raise ValueError(
            f"{a_kind} is an array ({frames}H, W, 3) or a tensor ({frames}3, H, W), got "
            f"{type(pixels).__name__} of shape {tuple(pixels.shape)}"
        )
    if 0 in pixels.shape:
        raise ValueError(f"{a_kind} has no pixels, got shape {tuple(pixels.shape)}")
    if pixels.dtype != (torch.uint8 if is_tensor else np.uint8):
        raise ValueError(f"{a_kind} holds uint8 pixels from 0 to 255, got {pixels.dtype}")


def as_batch(videos: Video | list[Video]) -> list[Video]:
    """Return one clip or several as a list of clips. A list of frames is one clip."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, str | os.PathLike | bytes | Excerpt):
        return [videos]
    # A set has no order, and iterating over a dictionary would give its keys.
    if isinstance(videos, Mapping | Set) or not isinstance(videos, Iterable):
        raise ValueError(f"videos is a {type(videos).__name__}: give {CLIPS}, or a list of clips")
    videos = list(videos)
    if not videos:
        raise ValueError("no video given: the list is empty")
    return [videos] if is_frame(videos[0]) else videos


def is_frame(item: object) -> bool:
    """Return whether an item of a list is a frame of one clip, not a clip of a batch."""
    if isinstance(item, np.ndarray | torch.Tensor):
        return item.ndim == 3
    return isinstance(item, Image.Image)


def warn_of_squashing(size: object) -> None:
    if isinstance(size, int):
        logger.warning_once(
            f"size={size} squashes frames to a square, as in transformers. Give "
            f'size={{"shortest_edge": {size}}} to keep their aspect ratio.'
        )


__all__ = ["VLJEPAVideoProcessor"]
