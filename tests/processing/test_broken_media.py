"""Two hundred broken or odd files: reading returns a clip of the right shape or raises a MediaError
that names the file, and nothing else. Odd but valid files are read correctly."""

import os
import socket
import struct
import zlib
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from processing.video_io import Clip, MediaError, read_clip, read_image
from tests.media import encode, moving, plainly
from tests.tiny import noise, write_clip

# Ends a test that hangs. The slowest takes ten seconds; a busy machine needs longer.
pytestmark = pytest.mark.timeout(600)

BASES = {
    "last.mp4": {"g": "8"},  # the index is at the end of the file, or at its beginning
    "first.mp4": {"g": "8", "container": {"movflags": "faststart"}},
    "pieces.mp4": {"g": "8", "container": {"movflags": "frag_keyframe+empty_moov"}},
    "whole.mkv": {"g": "8"},
    "whole.webm": {"codec": "libvpx-vp9", "g": "8", "deadline": "realtime", "cpu-used": "8"},
    "whole.avi": {"codec": "mpeg4", "g": "8", "bf": "2"},
    "whole.ts": {"g": "8"},
    "whole.h264": {"g": "8"},
    "whole.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, bytes]:
    """Contents of valid files, by name."""
    folder = tmp_path_factory.mktemp("bases")
    frames = moving(24)
    return {
        name: encode(folder / name, frames, **options).read_bytes()
        for name, options in BASES.items()
    }


def outcome(path: Path | str, num_frames: int | None, read=read_clip) -> str:
    """Return "clip" or "error"; fail for any other result."""
    try:
        clip = read(path, num_frames)
    except MediaError as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error)) > len(f"{path}: ") + 20
        return "error"
    assert isinstance(clip, Clip)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.ndim == 4 and clip.frames.shape[-1] == 3 and clip.frames.size > 0
    assert num_frames is None or len(clip.frames) == num_frames
    assert clip.timestamps.shape == clip.frames.shape[:1]
    return "clip"


def both(path: Path | str) -> str:
    """Return the outcome of reading a sample, and check that reading all frames has the same."""
    sampled, whole = outcome(path, 4), outcome(path, None)
    assert sampled == whole
    return sampled


# -- truncated files and flipped bits ------------------------------------------------------

CUTS = [(name, share) for name in BASES for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)]


@pytest.mark.parametrize(("name", "share"), CUTS)
def test_read_clip_of_truncated_files(bases, tmp_path, name, share):
    content = bases[name]
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    found = both(path)
    if name == "last.mp4" or share <= 0.001:
        assert found == "error"
    if name == "first.mp4":  # the index shows that data is missing
        assert found == "error"
    if name == "whole.mkv" and share >= 0.3:  # Matroska does not show it
        assert found == "clip"


def flip(content: bytes, seed: int, upto: int | None = None) -> bytes:
    """Flip 1, 4 or 16 bits."""
    generator = np.random.default_rng(seed)
    changed = bytearray(content)
    for _ in range((1, 4, 16)[seed % 3]):
        index = int(generator.integers(min(len(content), upto or len(content))))
        changed[index] ^= 1 << int(generator.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("seed", range(6))
def test_read_clip_of_files_with_flipped_bits(bases, tmp_path, name, seed):
    path = tmp_path / name
    path.write_bytes(flip(bases[name], seed, upto=600 if seed % 2 else None))
    outcome(path, 4)
    outcome(path, None)


@pytest.mark.parametrize("name", BASES)
def test_read_clip_of_unchanged_files(bases, tmp_path, name):
    """Positive control of the two tests above."""
    path = tmp_path / name
    path.write_bytes(bases[name])
    assert both(path) == "clip"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # from PIL, about odd headers
@pytest.mark.parametrize("name", BASES)
def test_read_clip_of_many_more_flipped_and_truncated_files(bases, tmp_path, name):
    path = tmp_path / name
    for seed in range(300):
        content = flip(bases[name], seed, upto=(None, 600, 2000)[seed // 3 % 3])
        if seed % 5 == 0:
            content = content[: np.random.default_rng(seed).integers(1, len(content))]
        path.write_bytes(content)
        outcome(path, 4)
        outcome(path, None)
        outcome(path, 2, partial(read_clip, start=0.5, end=1.5))
        outcome(path, None, lambda file, _: read_as_image(file))


# -- other content than the name suggests --------------------------------------------------


def read_as_image(path: Path | str, _: None = None) -> Clip:
    frames = read_image(path)
    return Clip(frames, np.zeros(len(frames)))


IMPOSTORS = {
    "nothing": b"",
    "a byte": b"\0",
    "zeros": bytes(5000),
    "text": b"not a video\n" * 200,
    "zip": b"PK\3\4" + noise(2000).tobytes(),
    "pdf": b"%PDF-1.7\n" + noise(2000).tobytes(),
    "script": b"#!/bin/sh\nrm -rf x\n" * 50,
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "noise": noise(5000).tobytes(),
    "empty mp4": b"\0\0\0\x14ftypisom\0\0\2\0isom" + b"\0\0\0\x08mdat",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.parametrize("ending", ["mp4", "png"])
def test_readers_reject_files_of_another_kind(tmp_path, kind, ending):
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(IMPOSTORS[kind])
    assert both(path) == "error"
    # PIL recognises PostScript, and gives it to another program if one is installed.
    found = outcome(path, None, read_as_image)
    assert found == "error" or kind == "postscript"


@pytest.mark.parametrize("ending", ["png", "jpg", "txt", "mkv", "avi", "", "MP4"])
def test_read_clip_recognises_a_video_by_its_content(bases, tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(bases["last.mp4"])
    assert both(path) == "clip"
    assert outcome(path, None, read_as_image) == "error"


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "tiff"])
def test_read_clip_reads_an_image_as_a_short_video(tmp_path, kind):
    path = tmp_path / "image.mp4"
    Image.fromarray(noise(20, 30, 3)).save(path, kind)
    assert both(path) == "clip"
    assert read_clip(path, 4).frames.shape == (4, 20, 30, 3)
    assert outcome(path, None, read_as_image) == "clip"


LISTS = {
    "list.ffconcat": "ffconcat version 1.0\nfile {name}\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n",
    "list.m3u": "#EXTM3U\n{path}\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>'
    "<AdaptationSet><Representation><BaseURL>{path}</BaseURL></Representation>"
    "</AdaptationSet></Period></MPD>",
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_read_clip_opens_no_other_file_for_a_playlist(bases, tmp_path, name):
    target = tmp_path / "target.mp4"
    target.write_bytes(bases["first.mp4"])
    path = tmp_path / name
    path.write_text(LISTS[name].format(name=target.name, path=target), encoding="utf-8")
    assert both(path) == "error"
    assert both(target) == "clip"


# -- paths that are not regular files ------------------------------------------------------


def no_file(folder: Path, kind: str) -> Path | str:
    """Make a path of this kind."""
    path = folder / "clip.mp4"
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "gone.mp4")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(folder)  # a relative name, because those of sockets must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder of folders":
        (path / "frames").mkdir(parents=True)
    elif kind == "folder of videos":
        path.mkdir()
        (path / "a.mp4").write_bytes(b"")
    else:
        return {"zero byte": "a\0b.mp4", "address": "http://127.0.0.1/a.mp4", "empty": ""}[kind]
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "loop",
        "dangling",
        "pipe",
        "socket",
        "device",
        "empty folder",
        "folder of folders",
        "folder of videos",
        "zero byte",
        "address",
        "empty",
    ],
)
def test_readers_reject_paths_that_are_not_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # restored at the end, for the socket
    path = no_file(tmp_path, kind)
    assert both(path) == "error"
    assert outcome(path, None, read_as_image) == "error"


# -- wrong headers -------------------------------------------------------------------------


def ten_hours(name: str, content: bytes) -> bytes:
    """Change the duration in the header to ten hours, at the same frame rate."""
    changed = bytearray(content)
    if name.endswith(".mp4"):
        for box in (b"mvhd", b"mdhd"):
            start = content.index(box) + 4 + 12  # version and flags, two dates
            scale = int.from_bytes(content[start : start + 4], "big")
            changed[start + 4 : start + 8] = (36_000 * scale).to_bytes(4, "big")
    elif name.endswith(".avi"):
        for start in (content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32):
            changed[start : start + 4] = (360_000).to_bytes(4, "little")
    else:
        start = content.index(b"\x44\x89\x88") + 3  # Duration, eight bytes
        changed[start : start + 8] = struct.pack(">d", 36_000_000.0)
    return bytes(changed)


@pytest.mark.parametrize("name", ["last.mp4", "first.mp4", "whole.mkv", "whole.webm", "whole.avi"])
def test_read_clip_ignores_a_wrong_duration_in_the_header(bases, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ten_hours(name, bases[name]))
    if not name.endswith(".mp4"):  # for MP4, FFmpeg itself trusts only the index
        with av.open(path) as container:
            assert container.duration / 1e6 == pytest.approx(36_000, rel=1e-3)
    frames, _ = plainly(path)
    assert len(frames) == 24
    clip = read_clip(path, 4, max_seconds=10)
    np.testing.assert_array_equal(clip.frames, frames[[0, 8, 15, 23]])


TIMES = {
    "a gap of hours": [0, 0.1, 0.2, 20_000, 20_000.1],
    "a slow start": [0, 5, 5.1, 5.2, 5.3],
    "from far on": [90_000, 90_000.1, 90_000.2],
    "before zero": [-3, -2, -1, 0, 1],
    "too close": [0, 0.004, 0.008, 0.012, 1],
    "one": [7],
}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("kind", TIMES)
def test_read_clip_samples_odd_times_evenly(tmp_path, name, kind):
    times = TIMES[kind]
    path = encode(tmp_path / name, moving(len(times)), times=times, bf="0")
    frames, seconds = plainly(path)
    clip = read_clip(path, 4)
    instants = np.linspace(seconds[0], seconds[-1], 4)
    nearest = np.abs(seconds[None] - instants[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(clip.frames, frames[nearest])
    np.testing.assert_allclose(clip.timestamps, seconds[nearest], atol=1e-6)
    if kind == "a gap of hours":
        with pytest.raises(MediaError, match="longer than 600 seconds"):
            read_clip(path, 4, max_seconds=600)


@pytest.mark.parametrize(
    ("name", "codec"), [("sound.mp4", "aac"), ("sound.mkv", "aac"), ("sound.wav", "pcm_s16le")]
)
def test_read_clip_rejects_files_with_only_sound(tmp_path, name, codec):
    with av.open(tmp_path / name, "w") as container:
        stream = container.add_stream(codec, rate=16000)
        layout = "fltp" if codec == "aac" else "s16"
        kind = np.float32 if codec == "aac" else np.int16
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), kind), layout, "mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert both(tmp_path / name) == "error"


@pytest.mark.parametrize("name", ["none.mp4", "none.mkv", "none.avi"])
def test_read_clip_rejects_files_without_frames(tmp_path, name):
    encode(tmp_path / name, np.zeros((0, 48, 64, 3), np.uint8))
    assert both(tmp_path / name) == "error"


@pytest.mark.parametrize("kind", ["h264", "ts", "mjpeg"])
def test_read_clip_rejects_a_change_of_size(tmp_path, kind):
    codec = "mjpeg" if kind == "mjpeg" else "libx264"
    pix_fmt = "yuvj420p" if kind == "mjpeg" else "yuv420p"
    parts = [
        encode(tmp_path / f"{height}.{kind}", moving(8, height, 64), codec, pix_fmt=pix_fmt)
        for height in (32, 64)
    ]
    path = tmp_path / f"both.{kind}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert both(path) == "error"
    with pytest.raises(MediaError, match="the frame size changes"):
        read_clip(path, 4)
    assert both(parts[0]) == "clip"


# -- odd but valid -------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "pix_fmt"), [("mpeg4", "yuv420p"), ("png", "rgb24")])
@pytest.mark.parametrize("width", range(1, 18))
def test_read_clip_of_odd_sizes(tmp_path, width, codec, pix_fmt):
    """Encode grey columns with half the colour resolution (rounded up), and without loss."""
    columns = np.linspace(40, 200, width).astype(np.uint8)
    frames = np.broadcast_to(columns[None, None, :, None], (3, 18 - width, width, 3))
    frames = np.ascontiguousarray(frames)
    path = encode(tmp_path / "clip.mov", frames, codec, pix_fmt=pix_fmt)
    clip = read_clip(path, 3)
    np.testing.assert_array_equal(clip.frames, plainly(path)[0])
    assert clip.frames.shape == frames.shape
    assert np.abs(clip.frames.astype(int) - frames).max() <= (0 if codec == "png" else 60)
    assert np.abs(clip.frames.astype(int) - frames).mean() <= (0 if codec == "png" else 8)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270, -90])
def test_read_clip_applies_rotation(tmp_path, degrees, name):
    """Rotation is counterclockwise, as phones store it."""
    frames = moving(6)
    path = write_clip(tmp_path / name, frames, rotation=degrees)
    upright = np.rot90(plainly(path)[0], degrees // 90, axes=(1, 2))
    for num_frames in (None, 6):
        np.testing.assert_array_equal(read_clip(path, num_frames).frames, upright)
    expected = np.rot90(frames, degrees // 90, axes=(1, 2)).astype(int)
    assert np.abs(upright - expected).mean() < 2


# -- images --------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """Make a PNG whose header states this size, and that contains almost no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "tiff", "gif"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.98])
def test_readers_of_truncated_images(tmp_path, kind, share):
    whole, path = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    Image.fromarray(noise(40, 30, 3)).save(whole)
    assert outcome(whole, None, read_as_image) == "clip"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    assert outcome(path, None, read_as_image) == "error"
    outcome(path, 4)


@pytest.mark.parametrize("side", [30_000, 100_000, 2**31 - 1])
def test_readers_reject_an_image_that_unpacks_to_gigabytes(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side))
    with pytest.raises(MediaError, match="bomb.png: (too large|damaged)"):
        read_image(path)
    with pytest.raises(MediaError, match="bomb.png: "):
        read_clip(path, 4, max_pixels=25_000_000)
    with pytest.raises(MediaError, match="bomb.png: "):
        read_image(path, max_pixels=25_000_000)


def test_read_image_of_every_colour_mode(tmp_path):
    pixels = noise(24, 16, 3) // 64 * 85  # 64 colours, so that a palette loses none
    image = Image.fromarray(pixels)
    image.save(tmp_path / "plain.png")
    image.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=0).save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (16, 24))])
    for name in ("plain.png", "palette.png", "alpha.png", "moving.gif"):
        found = read_image(tmp_path / name)
        assert found.shape == (1, 24, 16, 3)
        assert np.abs(found[0].astype(int) - pixels).max() <= 8, name

    grey = Image.fromarray(pixels[..., 0])
    grey.save(tmp_path / "grey.png")
    Image.fromarray(pixels[..., 0] > 99).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png")[0, ..., 2], pixels[..., 0])
    expected = np.where(pixels[..., 0] > 99, 255, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[0, ..., 1], expected)

    inks = Image.new("CMYK", (16, 24), (255, 0, 0, 0))  # cyan
    inks.save(tmp_path / "inks.jpg", quality=100)
    found = read_image(tmp_path / "inks.jpg")[0].reshape(-1, 3).mean(axis=0)
    assert found == pytest.approx([0, 255, 255], abs=8)

    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "pixel.png")
    assert read_image(tmp_path / "pixel.png").tolist() == [[[[9, 8, 7]]]]
    assert read_clip(tmp_path / "pixel.png", 2).frames.shape == (2, 1, 1, 3)
