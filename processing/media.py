"""Shared by all readers of clips: sources, clips, limits, and errors that name a file.

Shapes: T frames, H height, W width.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import fsspec
import numpy as np
from PIL import Image

MediaSource = str | os.PathLike | bytes  # a path or an address, or the content of a file

Prepare = Callable[[np.ndarray], np.ndarray]  # resizes a picture (H, W, 3) as soon as it is decoded

# Addresses that `datasets` hands on: files on the Hub, and members of archives on the disk or the
# Hub, such as "zip://cat/1.jpg::/data/cats.zip".
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
ARCHIVES = ("bz2", "gzip", "lz4", "tar", "xz", "zip", "zstd")
MAX_MEMBER_BYTES = 2**31  # of a file at an address, which is read into memory

MAX_FRAME_RATE = 240  # frames per second of a clip whose length is limited


class MediaError(ValueError):
    """A video or image that cannot be used. The message names the file and the cure."""


@dataclass(frozen=True)
class Clip:
    """Frames in the order they are shown, with their times.

    Attributes:
        frames (`np.ndarray` of shape `(T, H, W, 3)`, uint8): RGB.
        timestamps (`np.ndarray` of shape `(T,)`, float64): seconds since the beginning of the file
            as a player counts, also if the clip is a part of it; NaN for a folder of images.
    """

    frames: np.ndarray
    timestamps: np.ndarray


@dataclass(frozen=True)
class Limits:
    """Limits for reading the file `name`; `None` means unlimited. The clock starts on creation."""

    name: str
    max_seconds: float | None = None
    max_pixels: int | None = None
    max_decode_seconds: float | None = None
    # A lambda looks `time` up on every call, so that tests can replace the clock.
    started: float = field(default_factory=lambda: time.monotonic())

    def check_size(self, width: int, height: int) -> None:
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise MediaError(
                f"{self.name}: {width} x {height} pixels, but at most {self.max_pixels} are "
                "allowed. Make it smaller."
            )

    def check_time(self, frames: int, seconds: float) -> None:
        if self.max_seconds is None:
            return
        # Frames are counted too: times can be wrong, and a folder of images has none.
        if seconds > self.max_seconds or frames > self.max_seconds * MAX_FRAME_RATE:
            raise MediaError(
                f"{self.name}: longer than {self.max_seconds:g} seconds, or more than "
                f"{MAX_FRAME_RATE} frames per second. Cut it."
            )

    def check_clock(self) -> None:
        limit = self.max_decode_seconds
        if limit is not None and time.monotonic() - self.started > limit:
            raise MediaError(
                f"{self.name}: not decoded within {limit:g} seconds. It is damaged, or too long "
                "or too large for this limit: cut or re-encode it."
            )


def name_of(source: MediaSource) -> str:
    """Return a name for messages: the path, shortened if it is too long to be one, or the size."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    # A surrogate in a name cannot be written to a terminal, a log or an answer, and a message is
    # one line.
    name = os.fsdecode(source).encode(errors="backslashreplace").decode().replace("\n", "\\n")
    return name if len(name) < 1000 else f"{name[:50]}..."


def scheme_of(source: str) -> str:
    """Return the scheme of an address in lower case, the empty string for a path."""
    found = ADDRESS.match(source)
    return "" if found is None else found[1].lower()


def is_address(source: object) -> bool:
    """Return whether a source is a file in an archive or on the Hub."""
    return isinstance(source, str) and scheme_of(source) in (*ARCHIVES, "hf")


def is_remote(source: object) -> bool:
    """Return whether reading a source needs the network."""
    return is_address(source) and archive_of(source) is None


def archive_of(address: str) -> str | None:
    """Return the path of the archive that an address names, `None` if it is not on this disk."""
    last = address.split("::")[-1]
    return last.removeprefix("file://") if scheme_of(last) in ("", "file") else None


def read_address(address: str) -> bytes:
    """Return the content of a file in an archive or on the Hub.

    No other host is asked: a stranger would have chosen it.

    Raises: `MediaError` that names the address.
    """
    *members, last = address.split("::")
    archive = archive_of(address)
    if archive is None and scheme_of(last) != "hf" or not all(map(is_address, members)):
        raise MediaError(
            f"{name_of(address)}: not opened here. Download the archive, and give its path "
            "(zip://NAME::PATH)."
        )
    if archive is not None and not os.path.isfile(archive):  # nor a pipe, which may never end
        raise MediaError(f"{name_of(address)}: there is no file {archive}. Check the path.")
    try:
        with fsspec.open(address, "rb") as file:
            content = file.read(MAX_MEMBER_BYTES + 1)
    # fsspec's file systems raise many kinds: OSError, KeyError, zipfile.BadZipFile, ...
    except Exception as error:
        raise MediaError(
            f"{name_of(address)}: cannot be read ({str(error)[:200]}). Check the address."
        ) from error
    if len(content) > MAX_MEMBER_BYTES:
        raise MediaError(f"{name_of(address)}: larger than {MAX_MEMBER_BYTES} bytes. Unpack it.")
    return content


@contextmanager
def open_file(source: MediaSource) -> Iterator[io.BufferedIOBase]:
    """Yield the source as a file open for reading."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if is_address(source):
        yield io.BytesIO(read_address(source))
        return
    # Pipes and devices, which may never end, are not files here either. Path.is_file would raise
    # an OSError for a string that is too long to be a path.
    if not os.path.isfile(source):
        raise MediaError(
            f"{name_of(source)}: no such file. Check the path; URLs must be downloaded first."
        )
    with open(source, "rb") as file:
        yield file


def on_white(image: Image.Image) -> Image.Image:
    """Return an image with alpha on a white ground, in RGB.

    Most browsers and documents show such images on white. Without the ground, pixels that nobody
    sees would come to light, usually black ones.
    """
    if image.mode == "La":  # PIL converts it to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def stack(pictures: list[np.ndarray], seconds: np.ndarray, limits: Limits) -> Clip:
    """Return pictures `(H, W, 3)` and their times as a clip."""
    if len({picture.shape for picture in pictures}) > 1:
        raise MediaError(
            f"{limits.name}: the frame size changes within the video. Re-encode it to one size."
        )
    return Clip(np.stack(pictures), seconds)
