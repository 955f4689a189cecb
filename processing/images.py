"""Images and folders of images to uint8 RGB arrays, by PIL.

Shapes: T frames, H height, W width.
"""

import io
import mimetypes
import os
import re
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.utils import is_av_available

from .containers import open_video
from .media import (
    Clip,
    Limits,
    MediaError,
    MediaSource,
    Prepare,
    is_address,
    name_of,
    on_white,
    open_file,
    stack,
)
from .sampling import uniform_indices

# The formats that PIL may try for bytes, which can come from a stranger. Among the others is
# PostScript, which PIL gives to another program to run. TGA is last: it has no signature, so its
# reader takes much for an image.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM",
    "PSD", "QOI", "SGI", "TIFF", "WEBP", "XBM", "XPM", "TGA",
)  # fmt: skip
# Formats by extension that `mimetypes` does not know; `.ts` is MPEG-TS there, too.
IMAGE_SUFFIXES = (".dds", ".icns", ".j2k", ".pcx", ".psd", ".qoi", ".tga")
VIDEO_SUFFIXES = (".m2ts", ".mjpeg", ".mjpg", ".mts", ".mxf", ".ts", ".y4m")
DARK = 2**12  # 16-bit pixels that are all below this have 12 bits or fewer, as from a sensor
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def media_kind(source: MediaSource) -> str:
    """Return "image" or "video" for a file whose kind nobody states.

    The content decides, unless the file is named as a video: an address or a file can have any
    ending or none. Animated images are images, as they are by their names. A folder is a video.
    """
    name = "" if isinstance(source, bytes) else os.fsdecode(source).lower()
    name = name.split("::")[0]  # a member of an archive
    if name.endswith(VIDEO_SUFFIXES) or guessed_type(name) == "video":
        return "video"
    if not isinstance(source, bytes) and os.path.isdir(source):
        return "video"
    try:
        with open_file(source) as file, Image.open(file, formats=IMAGE_FORMATS[:-1]):
            return "image"
    except (UnidentifiedImageError, MediaError):
        pass  # neither an image nor a file that is missing is known by its content
    except Exception:  # PIL recognised the format; `read_image` reports the damage
        return "image"
    if not name.endswith(IMAGE_SUFFIXES) and guessed_type(name) != "image":
        return "video"
    # Many a GIF or WebP of the web is an MP4.
    return "video" if is_av_available() and is_video(source) else "image"


def is_video(source: MediaSource) -> bool:
    """Return whether FFmpeg finds a video in a file; nothing is decoded."""
    limits = Limits(name_of(source), max_decode_seconds=10)
    try:
        # Without its name, which FFmpeg would believe.
        with open_video(source, limits, is_named=False) as stream:
            return not stream.container.format.name.endswith("_pipe")
    except MediaError:
        return False


def guessed_type(name: str) -> str:
    """Return the kind of medium that a file's extension suggests, such as "image"."""
    return (mimetypes.guess_type(name)[0] or "").partition("/")[0]


def read_image(source: MediaSource | Image.Image, *, max_pixels: int | None = None) -> np.ndarray:
    """Read an image as a one-frame clip: upright (EXIF orientation applied), RGB, on white.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): path of an image file, its
            content, or the image.
        max_pixels (`int`, *optional*): refuse an image with more pixels before it is decoded.

    Returns: `np.ndarray` of shape `(1, H, W, 3)`, uint8: the upper 8 bits of 16, and the first
        picture of an animation. Transparent pixels are composited on white.
    Raises: `MediaError` naming the file.
    """
    is_open = isinstance(source, Image.Image)
    name = "the image" if is_open else name_of(source)
    try:
        if is_open:
            # `Image.open` has read only the header: the pixels may still be in the file.
            Limits(name, max_pixels=max_pixels).check_size(*source.size)
            return pixels_of(source, name, None)
        with open_file(source) as file:
            formats = IMAGE_FORMATS if isinstance(source, bytes) else None
            try:
                return read_file(file, name, formats, max_pixels)
            except ValueError as error:
                # PIL refuses texts and colour profiles above 1 MB, against small files that unpack
                # to gigabytes. They are not needed, so they are left out packed.
                if "MAX_TEXT_" not in str(error):
                    raise
                return read_file(without_texts(file), name, formats, max_pixels)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image that PIL can read. Check the file type.") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: too large ({error}). Make it smaller.") from error
    # PIL's readers raise many kinds: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise MediaError(f"{name}: damaged image ({error}). Fetch or export it again.") from error


def open_image(file: io.BufferedIOBase, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Return an opened image whose pixels are not read yet, also with a text that PIL refuses."""
    try:
        return Image.open(file, formats=formats)
    except ValueError as error:
        if "MAX_TEXT_" not in str(error):
            raise
        return Image.open(without_texts(file), formats=formats)


def read_file(
    file: io.BufferedIOBase, name: str, formats: tuple[str, ...] | None, max_pixels: int | None
) -> np.ndarray:
    """Read an open image file, `(1, H, W, 3)` uint8."""
    bits = significant_bits(file)
    with Image.open(file, formats=formats) as image:
        Limits(name, max_pixels=max_pixels).check_size(*image.size)
        return pixels_of(image, name, bits)


def pixels_of(image: Image.Image, name: str, bits: int | None) -> np.ndarray:
    """Return an image upright, in RGB and on white, `(1, H, W, 3)` uint8.

    Args:
        bits: significant bits of a pixel, if a PNG states them.
    """
    if 0 in image.size:
        raise MediaError(f"{name}: {image.width} x {image.height} pixels. Give at least 1 x 1.")
    if image.mode == "F":
        raise MediaError(f"{name}: its pixels are fractions of unknown range. Save it as PNG.")
    if image.mode == "I" or image.mode.startswith("I;"):
        image = eight_bits(image, name, bits)
    # PIL keeps the upper 8 bits of colours with 16, while a transparent colour keeps its 16.
    is_deep = isinstance(image, ImageFile.ImageFile) and ";16" in str(image.tile)
    image.load()  # the orientation may be stored after the pixels
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    # Both functions copy all pixels, even if nothing changes. Below, a deep image is changed.
    upright = image if is_upright and not is_deep else ImageOps.exif_transpose(image)
    if is_deep and "transparency" in upright.info:
        colour = upright.info["transparency"]
        upright.info["transparency"] = tuple(value >> 8 for value in colour)
    if upright.has_transparency_data:
        upright = on_white(upright)
    pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))[None]
    if is_deep and 0 < pixels.max() < DARK >> 8:
        raise too_dark(name, 256 * int(pixels.max()))
    return pixels


def eight_bits(image: Image.Image, name: str, bits: int | None) -> Image.Image:
    """Scale grey pixels of more than 8 bits from their range to 0..255.

    PIL's own conversion would clip at 255, which makes nearly all white.
    """
    values = np.asarray(image)
    largest = stated_largest(image, bits, values.max())
    if largest is None and image.mode == "I" and image.format != "PNG":
        raise MediaError(
            f"{name}: its pixels are integers of unknown range. Scale them to 8 or 16 bits."
        )
    if largest is None and 0 < values.max() < DARK:
        raise too_dark(name, values.max())
    if largest in (None, 2**16 - 1):
        scaled = (values >> 8).clip(0, 255).astype(np.uint8)
    else:
        scaled = (values * np.float32(255 / largest) + 0.5).clip(0, 255).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # 0 is white; PIL ignores it here
        scaled = 255 - scaled
    if (transparent := image.info.get("transparency")) is not None:
        scaled[values == transparent] = 255
    grey = Image.fromarray(scaled)
    grey.info["exif"] = image.getexif().tobytes()  # orientation
    return grey


def stated_largest(image: Image.Image, bits: int | None, found: int) -> int | None:
    """Return the largest grey value that a file states, beyond the bits of its pixels.

    Args:
        bits: significant bits, if a PNG states them.
        found: the largest value in the image.
    """
    if image.format == "PPM":
        return 2**16 - 1  # PIL has scaled the stated range to it
    if image.format == "TIFF":
        tags = image.tag_v2
        depth, stated = tags.get(258, (1,))[0], tags.get(281)  # BitsPerSample, MaxSampleValue
        if stated is not None:
            return int(np.max(stated)) or None
        return 2**depth - 1 if depth < 16 else None
    # The PNG standard wants pixels scaled to 16 bits also if fewer are significant.
    return None if bits is None else 2**16 - 1 if found >= 2**bits else 2**bits - 1


def too_dark(name: str, largest: int) -> MediaError:
    return MediaError(
        f"{name}: its 16-bit pixels reach only {largest}, nearly black, as if they had 12 bits. "
        "Scale them to 65535, or state their range (TIFF: BitsPerSample or MaxSampleValue)."
    )


def png_chunks(file: io.BufferedIOBase) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset and size of each chunk of a PNG, with its length and checksum."""
    offset = len(PNG_SIGNATURE)
    while file.seek(offset) and len(head := file.read(8)) == 8:
        size = int.from_bytes(head[:4], "big") + 12
        yield head[4:], offset, size
        offset += size


def significant_bits(file: io.BufferedIOBase) -> int | None:
    """Return the significant bits of a grey PNG's pixels (its sBIT chunk); `None` if not stated."""
    bits = None
    if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE:
        for name, offset, size in png_chunks(file):
            if name == b"sBIT" and size == 13:
                file.seek(offset + 8)
                bits = file.read(1)[0]
            if name in (b"sBIT", b"PLTE", b"IDAT"):  # the standard's order
                break
    file.seek(0)
    return bits if bits is not None and 1 <= bits <= 16 else None


def without_texts(file: io.BufferedIOBase) -> io.BytesIO:
    """Return a PNG without its texts and its colour profile, none of them unpacked."""
    unwanted = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
    kept = [(offset, size) for name, offset, size in png_chunks(file) if name not in unwanted]
    file.seek(0)
    content = file.read()
    return io.BytesIO(PNG_SIGNATURE + b"".join(content[at : at + size] for at, size in kept))


def animation_in(source: MediaSource) -> bool:
    """Return whether a file is an animation that PIL decodes and FFmpeg does not.

    FFmpeg decodes no animated WebP, and alpha of AVIF as a stream of its own.
    """
    if not (isinstance(source, bytes) or is_address(source) or os.path.isfile(source)):
        return False
    with open_file(source) as file:
        start = file.read(32)
        if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X":
            return bool(start[20] & 2)  # the flag of an animation
        if start[4:12] not in (b"ftypavif", b"ftypavis"):
            return False
        file.seek(0)
        try:
            with Image.open(file, formats=("AVIF",)) as image:
                return image.mode == "RGBA"
        except Exception:  # damaged, or a PIL without AVIF
            return False


def animation_frames(
    source: MediaSource, limits: Limits
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Yield the frames of an animation: start and end in seconds, and a picture `(H, W, 3)`.

    Raises: `MediaError` for a damaged file, after its last good frame.
    """
    count = 0
    try:
        with open_file(source) as file, Image.open(file, formats=("AVIF", "WEBP")) as image:
            limits.check_size(*image.size)
            for count in range(image.n_frames):
                limits.check_clock()
                image.seek(count)
                [picture] = pixels_of(image, limits.name, None)
                start = image.info["timestamp"] / 1000  # milliseconds; PIL sets it on loading
                yield start, start + image.info["duration"] / 1000, picture
    except MediaError:
        raise
    except Exception as error:  # PIL's readers raise many kinds
        raise MediaError(
            f"{limits.name}: truncated or damaged after {count} frames ({error}). Fetch or export "
            "it again."
        ) from error


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
        # Only unknown names are looked at: a clip can have thousands of frames.
        if guessed_type(name) != "image" and media_kind(os.path.join(folder, name)) != "image":
            raise MediaError(
                f"{limits.name}: holds {name}, which is not an image. Keep only the clip's frames "
                "in the folder."
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
