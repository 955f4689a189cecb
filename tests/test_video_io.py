"""Decoding: frame i of every test clip has grey level 10 i, so pixels tell which were read."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from processing.video_io import MediaError, read_clip, read_image, uniform_indices
from tests.tiny import write_clip


def grey_clip(
    path: Path, num_frames: int = 20, height: int = 48, width: int = 64, **options
) -> Path:
    levels = 10 * np.arange(num_frames, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))
    return write_clip(path, np.ascontiguousarray(frames), **options)


def shown(frames: np.ndarray) -> list[int]:
    """Which frames of a grey clip these are."""
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (20, 4, [0, 6, 13, 19]),
        (20, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 0, 1, 1, 1, 1, 2, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_uniform_indices(total, num_frames, expected):
    assert uniform_indices(total, num_frames).tolist() == expected


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0), (4, -1)])
def test_uniform_indices_refuses_nothing(total, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        uniform_indices(total, num_frames)


# mkv and the bare stream have no frame count in the header; the bare stream has no times.
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.h264"])
def test_sampled_frames_and_their_times(tmp_path, name):
    path = grey_clip(tmp_path / name)
    with av.open(path) as container:
        assert container.streams.video[0].frames == (20 if name[-3:] in ("mp4", "avi") else 0)

    whole = read_clip(path)
    assert whole.frames.shape == (20, 48, 64, 3)
    assert whole.frames.dtype == np.uint8
    assert shown(whole.frames) == list(range(20))
    np.testing.assert_allclose(whole.timestamps, np.arange(20) / 10, atol=2e-3)

    sample = read_clip(str(path), num_frames=4)
    assert shown(sample.frames) == [0, 6, 13, 19]
    np.testing.assert_array_equal(sample.frames, whole.frames[[0, 6, 13, 19]])
    np.testing.assert_array_equal(sample.timestamps, whole.timestamps[[0, 6, 13, 19]])


@pytest.mark.parametrize("claimed", [8, 50])
def test_a_wrong_header_count_is_not_believed(tmp_path, claimed):
    path = grey_clip(tmp_path / "clip.avi")
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 40  # the stream header's frame count
    content[length : length + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(path) as container:
        assert container.streams.video[0].frames == claimed
    assert shown(read_clip(path, num_frames=4).frames) == [0, 6, 13, 19]


@pytest.mark.parametrize("num_frames", [1, 2, 8])
def test_clips_shorter_than_the_sample_repeat_frames(tmp_path, num_frames):
    one = grey_clip(tmp_path / "one.mp4", num_frames=1)
    assert shown(read_clip(one, num_frames).frames) == [0] * num_frames
    three = grey_clip(tmp_path / "three.mkv", num_frames=3)
    expected = uniform_indices(3, num_frames).tolist()
    assert shown(read_clip(three, num_frames).frames) == expected


def test_odd_sizes_keep_every_pixel(tmp_path):
    ramp = np.zeros((4, 41, 63, 3), np.uint8)
    ramp[..., :] = 4 * np.arange(63, dtype=np.uint8)[None, None, :, None]
    frames = read_clip(write_clip(tmp_path / "ramp.mp4", ramp)).frames
    assert frames.shape == (4, 41, 63, 3)
    assert np.abs(frames.astype(int) - ramp).max() <= 2


def test_rotation_stored_by_phones_is_applied(tmp_path):
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    frames[:, :8] = 250  # bright on top, so right of the upright picture
    path = write_clip(tmp_path / "phone.mp4", frames, rotation=-90)
    upright = read_clip(path).frames
    assert upright.shape == (2, 64, 48, 3)
    assert upright[:, :, -8:].mean() > 240
    assert upright[:, :, :8].mean() < 10


def unreadable(folder: Path, case: str) -> Path:
    path = folder / f"{case}.mp4"
    if case == "text":
        path.write_text("not a video\n" * 100)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "terminal art":
        path = folder / "notes.txt"
        path.write_text("FFmpeg would play this\n" * 100)
    elif case == "no index":  # the mp4 index comes last
        path.write_bytes(grey_clip(folder / "whole.mp4").read_bytes()[:600])
    elif case == "cut":  # the index comes first, the pictures are cut off
        whole = grey_clip(folder / "whole.mp4", movflags="faststart").read_bytes()
        path.write_bytes(whole[:-400])
    elif case == "sound":
        with av.open(path, "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    elif case == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("absent", "no such file"),
        ("folder", "no such file"),
        ("text", "cannot be opened as a video"),
        ("empty", "cannot be opened as a video"),
        ("no index", "cannot be opened as a video"),
        ("terminal art", "no video stream"),
        ("sound", "no video stream"),
        ("cut", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("num_frames", [None, 4])
def test_unreadable_videos_are_named(tmp_path, case, reason, num_frames):
    path = unreadable(tmp_path, case)
    with pytest.raises(MediaError, match=reason) as caught:
        read_clip(path, num_frames)
    assert str(caught.value).startswith(f"{path}: ")


def test_images_are_upright_rgb(tmp_path):
    picture = Image.new("L", (30, 20), 200)
    picture.paste(50, (0, 0, 30, 10))  # dark on top
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)

    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (1, 30, 20, 3)
    assert (pixels[:, :, 10:] == 50).all()
    assert (pixels[:, :, :10] == 200).all()
    np.testing.assert_array_equal(read_image(Image.open(tmp_path / "a.png")), pixels)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_unreadable_images_are_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with pytest.raises(MediaError, match="no such file"):
        read_image(path)
    path.write_text("not an image")
    with pytest.raises(MediaError, match="not an image"):
        read_image(path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MediaError, match="damaged image") as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
