"""Images and folders of images to uint8 RGB arrays, by PIL.

Shapes: T frames, H height, W width.
"""

import os
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .media import Clip, Limits, MediaError, MediaSource, Prepare, name_of, open_file, stack
from .sampling import uniform_indices

# The formats that PIL may try for bytes, which can come from a stranger. Among the others is
# PostScript, which PIL gives to another program to run.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_image(source: MediaSource | Image.Image, *, max_pixels: int | None = None) -> np.ndarray:
    """Read an image as a one-frame clip: upright (EXIF orientation applied), RGB.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): path of an image file, its
            content, or the image.
        max_pixels (`int`, *optional*): refuse an image with more pixels before it is decoded.

    Returns: `np.ndarray` of shape `(1, H, W, 3)`, uint8: the upper 8 bits of 16, and the first
        picture of an animation.
    Raises: `MediaError` naming the file.
    """
    is_open = isinstance(source, Image.Image)
    name = "the image" if is_open else name_of(source)
    formats = IMAGE_FORMATS if isinstance(source, bytes) else None
    try:
        if is_open:
            # `Image.open` has read only the header: the pixels may still be in the file.
            Limits(name, max_pixels=max_pixels).check_size(*source.size)
            return pixels_of(source, name)
        with open_file(source) as file, Image.open(file, formats=formats) as image:
            Limits(name, max_pixels=max_pixels).check_size(*image.size)
            return pixels_of(image, name)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image that PIL can read. Check the file type.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: too large ({error}). Make it smaller.") from error
    # PIL's readers raise many kinds: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise MediaError(f"{name}: damaged image ({error}). Fetch or export it again.") from error


def pixels_of(image: Image.Image, name: str) -> np.ndarray:
    """Return an image upright and in RGB, `(1, H, W, 3)` uint8."""
    if 0 in image.size:
        raise MediaError(f"{name}: {image.width} x {image.height} pixels. Give at least 1 x 1.")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise MediaError(f"{name}: its pixels are fractions of unknown range. Save it as PNG.")
    if upright.mode == "I" or upright.mode.startswith("I;"):
        # PIL's own conversion would clip 16-bit values at 255, which makes nearly all white.
        upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
    return np.array(upright.convert("RGB"))[None]


def natural(name: str) -> list[str | int]:
    """Return a sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def read_folder(
    folder: str | os.PathLike,
    num_frames: int | None,
    limits: Limits,
    prepare: Prepare | None = None,
) -> Clip:
    """Read a folder that holds only images, as a clip without times."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    for name in names:
        if not name.lower().endswith(IMAGE_SUFFIXES):
            raise MediaError(
                f"{limits.name}: holds {name}, which is not an image. Keep only the clip's frames "
                f"in the folder ({', '.join(IMAGE_SUFFIXES)})."
            )
    if not names:
        raise MediaError(f"{limits.name}: the folder holds no image. Put the clip's frames in it.")
    limits.check_time(len(names), 0.0)
    names.sort(key=natural)
    indices = uniform_indices(len(names), len(names) if num_frames is None else num_frames)
    pictures = {}  # by index: a short clip repeats frames, but each is decoded once
    for index in sorted(set(indices.tolist())):
        limits.check_clock()
        path = os.path.join(folder, names[index])
        [picture] = read_image(path, max_pixels=limits.max_pixels)
        pictures[index] = picture if prepare is None else prepare(picture)
    return stack(
        [pictures[index] for index in indices.tolist()], np.full(len(indices), np.nan), limits
    )
