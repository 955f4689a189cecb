"""Media by their content, in archives and on the Hub, and images that are easily read wrongly."""

import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, PngImagePlugin

from processing import FrameStream, read_clip, read_image
from processing.images import media_kind
from processing.media import is_remote, open_file
from processing.rows import file_stamp, samples_of
from processing.video_io import MediaError
from tests.media import encode, moving

RGB = moving(1)[0]


# -- which kind ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("BMP", {}),
        ("JPEG2000", {}),
        ("PPM", {}),
        ("ICO", {}),
    ],
)
@pytest.mark.parametrize("name", ["noending", "a.jpg?width=80&v=1.2", "a.bin", "a.txt", "a.png"])
def test_media_kind_recognises_images_by_their_content(tmp_path, kind, options, name):
    path = tmp_path / name
    Image.fromarray(RGB).save(path, kind, **options)
    assert media_kind(path) == media_kind(path.read_bytes()) == "image"


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "ts", "flv"])
@pytest.mark.parametrize("name", ["noending", "clip.jpg", "clip.gif", "clip.mp4?token=a.jpg"])
def test_media_kind_recognises_videos_by_their_content(tmp_path, container, name):
    whole = encode(tmp_path / f"whole.{container}", moving(4))
    (tmp_path / name).write_bytes(whole.read_bytes())
    assert media_kind(tmp_path / name) == media_kind(whole.read_bytes()) == "video"


def test_media_kind_of_other_things(tmp_path):
    assert media_kind(tmp_path) == "video"  # a folder of frames
    assert media_kind(tmp_path / "gone.jpg") == "image"  # the reader names what is missing
    assert media_kind(tmp_path / "gone.mp4") == media_kind(tmp_path / "gone") == "video"
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "text.png").write_text("not an image")
    assert media_kind(tmp_path / "broken.png") == media_kind(tmp_path / "text.png") == "image"
    # A stream of JPEG pictures begins as one picture does.
    encode(tmp_path / "clip.mjpeg", moving(4), "mjpeg", pix_fmt="yuvj420p")
    assert media_kind(tmp_path / "clip.mjpeg") == "video"


def test_read_clip_of_a_folder_recognises_frames_by_their_content(tmp_path):
    for index in range(3):
        Image.fromarray(RGB).save(tmp_path / f"frame_{index}", "PNG")
    assert read_clip(tmp_path, 2).frames.shape == (2, *RGB.shape)
    (tmp_path / "notes").write_text("not an image")
    with pytest.raises(MediaError, match="holds notes, which is not an image"):
        read_clip(tmp_path, 2)


# -- images by bytes, and deep ones --------------------------------------------------------


@pytest.mark.parametrize("name", ["a.avif", "a.jp2", "a.ppm", "a.tga", "a.ico", "a.dds", "a.pcx"])
def test_read_image_of_bytes_equals_that_of_the_path(tmp_path, name):
    options = {"sizes": [(64, 48)]} if name == "a.ico" else {}
    Image.fromarray(RGB).save(tmp_path / name, **options)
    found = read_image((tmp_path / name).read_bytes())
    np.testing.assert_array_equal(found, read_image(tmp_path / name))
    assert found.shape == (1, 48, 64, 3)


def test_read_image_of_bytes_hands_nothing_to_another_program():
    with pytest.raises(MediaError, match="not an image that PIL can read"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + check


def deep_png(pixels: np.ndarray, *extra: bytes) -> bytes:
    """Make a PNG of 16-bit grey `(H, W)` or RGB `(H, W, 3)` pixels, with more chunks."""
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, bits: int, content: bytes, **tags: int) -> bytes:
    """Make an uncompressed grey TIFF with these tags."""
    height, width = pixels.shape
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: len(content)} | {int(tag[1:]): value for tag, value in tags.items()}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content
    return head + struct.pack("<H", len(entries)) + table + bytes(4)


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
TWELVE = ((LEVELS.astype(int) * 4095 + 127) // 255).astype(np.uint16)  # the same, in 12 bits
PAIRS = TWELVE.reshape(-1, 2).astype(int)
PACKED = np.stack([PAIRS[:, 0] >> 4, (PAIRS[:, 0] & 15) << 4 | PAIRS[:, 1] >> 8, PAIRS[:, 1] & 255])
DEEP = {
    "12 bits of a TIFF": tiff(TWELVE, 12, PACKED.T.astype(np.uint8).tobytes()),
    "MaxSampleValue": tiff(TWELVE, 16, TWELVE.astype("<u2").tobytes(), _281=4095),
    "sBIT": deep_png(TWELVE, chunk(b"sBIT", b"\x0c")),
    "sBIT of scaled pixels": deep_png(TWELVE << 4, chunk(b"sBIT", b"\x0c")),
    "PGM": b"P5 16 16 4095\n" + TWELVE.astype(">u2").tobytes(),
    "16 bits": deep_png(LEVELS.astype(np.uint16) * 257),
    "0 is white": tiff(
        LEVELS, 16, (65535 - LEVELS.astype(np.uint16) * 257).astype("<u2").tobytes(), _262=0
    ),
}


@pytest.mark.parametrize("kind", DEEP)
def test_read_image_scales_deep_pixels_from_their_stated_range(kind):
    found = read_image(DEEP[kind])[0].astype(int)
    assert np.abs(found - LEVELS[..., None]).max() <= 1


DARK = {
    "12 bits without a word": deep_png(TWELVE),
    "8 bits in 16": deep_png(LEVELS.astype(np.uint16)),
    "colours of 12 bits": deep_png(TWELVE[..., None].repeat(3, axis=2)),
    "12 bits in a TIFF of 16": tiff(TWELVE, 16, TWELVE.astype("<u2").tobytes()),
}


@pytest.mark.parametrize("kind", DARK)
def test_read_image_refuses_16_bit_pixels_that_would_be_black(kind):
    with pytest.raises(MediaError, match="16-bit pixels reach only .* nearly black"):
        read_image(DARK[kind])


def test_read_image_refuses_integers_of_unknown_range(tmp_path):
    whole = LEVELS.astype(np.int32)
    for source in (Image.fromarray(whole), tiff(LEVELS, 32, whole.astype("<u4").tobytes())):
        with pytest.raises(MediaError, match="its pixels are integers of unknown range"):
            read_image(source)
    black = Image.fromarray(np.zeros((4, 4), np.uint16))
    assert not read_image(black).any()  # black is no doubt


@pytest.mark.parametrize("place", ["text", "profile", "text at the end"])
def test_read_image_reads_a_png_with_megabytes_of_text_or_profile(tmp_path, place):
    path, large = tmp_path / "a.png", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)
    if place == "profile":
        Image.fromarray(RGB).save(path, icc_profile=large.encode())
    else:
        texts = PngImagePlugin.PngInfo()
        texts.add_text("about", large, zip=True)
        Image.fromarray(RGB).save(path, pnginfo=texts)
    if place == "text at the end":
        content = path.read_bytes()
        start = content.index(b"zTXt") - 4
        size = int.from_bytes(content[start : start + 4], "big") + 12
        text, rest = content[start : start + size], content[:start] + content[start + size :]
        end = rest.index(b"IEND") - 4
        path.write_bytes(rest[:end] + text + rest[end:])
    with pytest.raises(ValueError, match="MAX_TEXT"), Image.open(path) as image:  # PIL's limit
        image.load()
    np.testing.assert_array_equal(read_image(path)[0], RGB)
    np.testing.assert_array_equal(read_image(path.read_bytes())[0], RGB)
    assert media_kind(path) == "image"


# -- addresses -----------------------------------------------------------------------------


class Hub(MemoryFileSystem):
    """Stand-in for the Hub's file system."""

    protocol = "hf"
    store = {}
    pseudo_dirs = [""]


@pytest.fixture
def addresses(tmp_path, monkeypatch) -> dict[str, str]:
    """Return addresses of one image and one clip, in every place that `datasets` hands on."""
    clip = encode(tmp_path / "clip.mp4", moving(8))
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(clip, "clips/clip.mp4")
        archive.write(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    monkeypatch.setattr(Hub, "store", {})
    for name in ("a.png", "all.zip"):
        with fsspec.open(f"hf://datasets/user/name@1/{name}", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    return {
        "zip": f"zip://a.png::{tmp_path}/all.zip",
        "tar": f"tar://a.png::{tmp_path}/all.tar",
        "file": f"zip://a.png::file://{tmp_path}/all.zip",
        "hub": "hf://datasets/user/name@1/a.png",
        "zip on the hub": "zip://a.png::hf://datasets/user/name@1/all.zip",
        "clip": f"zip://clips/clip.mp4::{tmp_path}/all.zip",
    }


@pytest.mark.parametrize("place", ["zip", "tar", "file", "hub", "zip on the hub"])
def test_read_image_reads_addresses_of_datasets(addresses, place):
    np.testing.assert_array_equal(read_image(addresses[place])[0], RGB)
    assert media_kind(addresses[place]) == "image"
    assert is_remote(addresses[place]) == ("hub" in place)
    [row] = samples_of({"image": addresses[place], "target": "a"}, ("rows", 1), Path("/folder"))
    assert row["image"] == addresses[place]
    assert (file_stamp(row["image"]) == [0, 0]) == ("hub" in place)


def test_readers_read_a_clip_in_an_archive(addresses, tmp_path):
    expected = read_clip(tmp_path / "clip.mp4").frames
    np.testing.assert_array_equal(read_clip(addresses["clip"]).frames, expected)
    sampled = read_clip(addresses["clip"], 2, start=0.2, end=0.6).frames
    np.testing.assert_array_equal(
        sampled, read_clip(tmp_path / "clip.mp4", 2, start=0.2, end=0.6).frames
    )
    streamed = [frame.pixels for frame in FrameStream(addresses["clip"])]
    np.testing.assert_array_equal(streamed, expected)
    assert media_kind(addresses["clip"]) == "video"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zip://a.png::http://127.0.0.1/all.zip", "not opened here. Download the archive"),
        ("zip://a.png::ssh://host/all.zip", "not opened here"),
        ("http://127.0.0.1/a.png", "no such file. .* URLs must be downloaded first"),
        ("file:///dev/zero", "no such file"),
        ("zip://a.png::/dev/zero", "there is no file /dev/zero"),
        ("zip://a.png", "not opened here"),
        ("zip://gone.png::{folder}/all.zip", "cannot be read"),
        ("zip://a.png::{folder}/a.png", "cannot be read"),
        ("hf://datasets/user/gone/a.png", "cannot be read"),
    ],
)
def test_readers_open_no_other_address(addresses, tmp_path, address, message):
    for read in (read_image, read_clip):
        with pytest.raises(MediaError, match=message):
            read(address.format(folder=tmp_path))


def test_frame_stream_opens_a_file_on_the_hub_only_if_addresses_are_allowed(addresses):
    with pytest.raises(MediaError, match="Addresses are opened only with allow_urls=True"):
        FrameStream(addresses["hub"])
    [frame] = FrameStream(addresses["hub"], allow_urls=True)
    np.testing.assert_array_equal(frame.pixels, RGB)


def test_open_file_refuses_a_member_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("processing.media.MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    with (
        pytest.raises(MediaError, match="larger than 1000 bytes"),
        open_file(f"zip://a.png::{tmp_path}/a.zip"),
    ):
        pytest.fail("it was opened")
