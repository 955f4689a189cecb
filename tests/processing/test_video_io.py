"""Reading of clips and images.

Frame i of a grey clip has level 10 i, so that pixels identify the frames that were read. Pictures
are compared exactly: both readers use the same decoder and the same conversion, in integers.
"""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from processing import (
    Excerpt,
    VLJEPAVideoProcessor,
    containers,
    media,
    packets,
    sampling,
    video_io,
)
from processing.video_io import (
    MediaError,
    even_indices,
    read_clip,
    read_image,
    uniform_indices,
)
from tests.media import encode, moving, plainly
from tests.tiny import noise, write_clip


def grey_clip(
    path: Path, num_frames: int = 20, height: int = 48, width: int = 64, **options
) -> Path:
    levels = 10 * np.arange(num_frames, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))
    return write_clip(path, np.ascontiguousarray(frames), **options)


def shown(frames: np.ndarray) -> list[int]:
    """Return the indices of these frames of a grey clip."""
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
def test_uniform_indices_are_evenly_spaced(total, num_frames, expected):
    assert uniform_indices(total, num_frames).tolist() == expected


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0), (4, -1)])
def test_uniform_indices_reject_counts_below_one(total, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        uniform_indices(total, num_frames)


# -- sampling by time ----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [5, 24000 / 1001, 25, 30000 / 1001, 60, 240])
@pytest.mark.parametrize("stored", ["exactly", "in milliseconds"])
def test_even_indices_at_a_constant_rate_equal_uniform_indices(rate, stored):
    for total in [*range(1, 60), 150, 299, 300, 1799, 1800]:
        seconds = np.arange(total) / rate
        if stored == "in milliseconds":
            seconds = seconds.round(3)
        for num_frames in (1, 2, 3, 7, 8, 16, 32, 33):
            found = even_indices(seconds, num_frames)
            np.testing.assert_array_equal(found, uniform_indices(total, num_frames))


def test_even_indices_at_a_varying_rate_are_nearest_in_time():
    seconds = np.array([0, 0.1, 0.2, 0.3, 0.4, 2.0, 4.0, 6.0])
    assert even_indices(seconds, 4).tolist() == [0, 5, 6, 7]
    assert uniform_indices(8, 4).tolist() == [0, 2, 5, 7]  # positive control
    generator = np.random.default_rng(0)
    for total in (2, 3, 10, 57):
        seconds = generator.exponential(size=total).cumsum()
        seconds -= seconds[0]
        for num_frames in (1, 2, 5, 8, 100):
            found = even_indices(seconds, num_frames)
            instants = np.linspace(0, seconds[-1], num_frames)
            least = np.abs(seconds[None] - instants[:, None]).min(axis=1)
            assert (np.abs(seconds[found] - instants) <= least + sampling.ROUNDING).all()
            assert found[0] == 0 and (np.diff(found) >= 0).all()
            assert num_frames == 1 or found[-1] == total - 1


@pytest.mark.parametrize(
    "seconds", [[0, 1, np.nan, 3, 4], [np.nan] * 5, [0, 0, 0, 0, 0], [0, 2, 1, 3, 9]]
)
def test_even_indices_with_unusable_times_equal_uniform_indices(seconds):
    assert even_indices(np.array(seconds), 3).tolist() == [0, 2, 4]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_read_clip_samples_a_varying_rate_evenly_in_time(tmp_path, name):
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 2.0, 4.0, 6.0]
    if name == "clip.avi":  # has no times: a frame that is shown longer is stored several times
        times = [index / 10 for index in range(61)]
        levels = np.repeat(np.arange(8), [1, 1, 1, 1, 16, 20, 20, 1])
    else:
        levels = np.arange(8)
    frames = np.zeros((len(levels), 48, 64, 3), np.uint8) + 20 * levels[:, None, None, None]
    codec = "mpeg4" if name == "clip.avi" else "libx264"
    path = encode(tmp_path / name, frames.astype(np.uint8), codec, times=times)
    clip = read_clip(path, 4)
    assert [round(float(frame.mean()) / 20) for frame in clip.frames] == [0, 5, 6, 7]
    np.testing.assert_allclose(clip.timestamps, [0, 2, 4, 6], atol=2e-3)


# -- both readers --------------------------------------------------------------------------

# Options of the encoders; x264 chooses where key frames are, at most `g` frames apart.
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:scenecut=0"}
KINDS = {
    "b-frames.mp4": {"g": "12", "bf": "3"},
    "long.mp4": {"g": "300"},
    "open.mp4": {"g": "10", **OPEN_GOP},
    "open.mkv": {"g": "10", **OPEN_GOP},
    "no-b-frames.mp4": {"g": "12", "tune": "zerolatency"},
    "no-count.mkv": {"g": "12"},
    "hevc.mp4": {
        "codec": "libx265",
        "x265-params": "keyint=12:log-level=none:pools=none:frame-threads=1",
    },
    "mpeg4.mp4": {"codec": "mpeg4", "bf": "2", "g": "12"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "hidden.webm": {
        "codec": "libvpx-vp9",
        "g": "30",
        "cpu-used": "5",
        "auto-alt-ref": "1",
        "lag-in-frames": "16",
    },
    "av1.mp4": {"codec": "libsvtav1", "preset": "12", "g": "12", "svtav1-params": "lp=1"},
    "mjpeg.mp4": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
# Files whose packets do not determine the frames.
OTHERS = {
    "vp8.webm": {"codec": "libvpx", "g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "g": "12"},
    "stream.ts": {"g": "12"},
    "bare.h264": {"g": "12"},
    "interlaced.mp4": {"g": "12", "flags": "+ildct+ilme", "x264-params": "tff=1"},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """Folder with 60 moving frames in every kind of file."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, options in (KINDS | OTHERS).items():
        encode(folder / name, moving(60), **options)
    return folder


@pytest.fixture
def readers(monkeypatch) -> list[str]:
    """Readers that returned a clip, in order: "packets" or "linear"."""
    used = []
    by_packets, linearly = video_io.read_by_packets, video_io.read_linearly

    def count_packets(*args):
        clip = by_packets(*args)
        used.extend(["packets"] * (clip is not None))
        return clip

    def count_linear(*args):
        used.append("linear")
        return linearly(*args)

    monkeypatch.setattr(video_io, "read_by_packets", count_packets)
    monkeypatch.setattr(video_io, "read_linearly", count_linear)
    return used


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_read_clip_returns_the_frames_of_plain_decoding(kinds, readers, name):
    frames, times = plainly(kinds / name) if name != "bare.h264" else (None, None)
    if frames is None:  # it has no times
        whole = read_clip(kinds / name)
        frames, times = whole.frames, whole.timestamps
    order = np.sort(times)
    assert len(frames) == 60
    readers.clear()
    for num_frames in (1, 2, 3, 5, 8, 60, 100):
        clip = read_clip(kinds / name, num_frames)
        indices = uniform_indices(60, num_frames)
        np.testing.assert_array_equal(clip.frames, frames[indices])
        np.testing.assert_allclose(clip.timestamps, order[indices], atol=1e-9)
    assert set(readers) == {"packets" if name in KINDS else "linear"}


@pytest.mark.parametrize("name", [*KINDS, "mpeg4.avi"])
def test_read_by_packets_reads_packets_too_large_for_the_cache_again(
    kinds, readers, monkeypatch, name
):
    clips = [read_clip(kinds / name, 8), read_clip(kinds / name, 3, start=2.5, end=4.5)]
    monkeypatch.setattr(packets, "CACHE_BYTES", 0)
    again = [read_clip(kinds / name, 8), read_clip(kinds / name, 3, start=2.5, end=4.5)]
    for clip, other in zip(clips, again, strict=True):
        np.testing.assert_array_equal(clip.frames, other.frames)
        np.testing.assert_allclose(clip.timestamps, other.timestamps, atol=1e-9)
    assert set(readers) == {"packets" if name in KINDS else "linear"}


@pytest.mark.parametrize("name", [*KINDS, "mpeg4.avi"])
def test_read_clip_finds_every_single_frame_by_its_time(kinds, readers, name):
    frames, times = plainly(kinds / name)
    times = np.sort(times)
    for index in range(0, 60, 1 if name[:4] in ("open", "b-fr", "hevc") else 7):
        clip = read_clip(kinds / name, 1, start=times[index], end=times[index] + 0.05)
        np.testing.assert_array_equal(clip.frames, frames[[index]])
        np.testing.assert_allclose(clip.timestamps, times[[index]], atol=1e-9)
    assert set(readers) == {"packets" if name in KINDS else "linear"}


def test_read_by_packets_decodes_only_what_sampled_frames_need(kinds, monkeypatch):
    """Sample two frames; positive control: all of them."""
    decoded = []
    plain = packets.decode_run

    def counted(*args):
        for frame in plain(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(packets, "decode_run", counted)
    found = {}
    for name in ("mjpeg.mp4", "vp9.webm", "b-frames.mp4"):
        for num_frames in (2, 60):
            decoded.clear()
            read_clip(kinds / name, num_frames)
            found[name, num_frames] = len(decoded)
    assert found["mjpeg.mp4", 2] == 2
    assert found["vp9.webm", 2] == 13  # the first, and the last GOP of twelve
    assert found["b-frames.mp4", 2] < 10  # 11 with the frames that no other frame refers to
    assert all(found[name, 60] == 60 for name, _ in found)


def test_read_by_packets_applies_rotation(tmp_path, readers):
    rotated = write_clip(tmp_path / "phone.mp4", moving(20), rotation=90)
    upright = np.rot90(plainly(rotated)[0], axes=(1, 2))
    np.testing.assert_array_equal(read_clip(rotated, 3).frames, upright[[0, 10, 19]])
    assert readers == ["packets"]


def test_read_clip_does_not_count_frames_that_an_edit_list_hides(tmp_path):
    times = [index / 10 - 0.5 for index in range(20)]
    hidden = encode(tmp_path / "hidden.mp4", moving(20), times=times, bf="0", g="20")
    frames, times = plainly(hidden)
    assert len(frames) == 15
    np.testing.assert_array_equal(read_clip(hidden, 3).frames, frames[[0, 7, 14]])


@pytest.mark.parametrize("name", ["b-frames.mp4", "hevc.mp4", "av1.mp4", "mpeg4.mp4"])
def test_open_video_for_packets_needs_no_decoder(kinds, tmp_path, readers, name):
    """MP4 is opened without a decoder; a file without the `ftyp` box is opened with one."""
    hidden = tmp_path / name
    hidden.write_bytes((kinds / name).read_bytes().replace(b"ftyp", b"free", 1))
    opened = []
    for path in (kinds / name, hidden):
        with containers.open_video(path, media.Limits(name), for_packets=True) as stream:
            opened.append((stream.frames, stream.time_base, stream.guessed_rate))
            found = stream.container.format.name
            assert found == ("mp4" if path != hidden else "mov,mp4,m4a,3gp,3g2,mj2")
    assert opened[0] == opened[1] == (60, opened[0][1], 10)
    for num_frames, start in ((5, None), (3, 2.5), (1, 5.9)):
        clips = [read_clip(path, num_frames, start=start) for path in (kinds / name, hidden)]
        np.testing.assert_array_equal(clips[0].frames, clips[1].frames)
        np.testing.assert_allclose(clips[0].timestamps, clips[1].timestamps, atol=1e-9)
    assert set(readers) == {"packets"}
    readers.clear()
    # For MPEG-4, only the decoder knows the size.
    with pytest.raises(MediaError, match="64 x 48 pixels, but at most 3071 are allowed"):
        read_clip(kinds / name, 1, start=3.3, max_pixels=3071)
    assert readers == []  # refused before a clip was complete


def test_read_clip_reports_damage_only_in_a_part_that_it_decodes(kinds, tmp_path):
    whole = (kinds / "mpeg4.mp4").read_bytes()
    with av.open(kinds / "mpeg4.mp4") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    second = next(packet for packet in packets[1:] if packet.is_keyframe)
    content = bytearray(whole)
    content[second.pos : second.pos + second.size] = bytes(second.size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    for num_frames in (None, 60):
        with pytest.raises(MediaError, match="damaged.mp4: truncated or damaged after"):
            read_clip(path, num_frames)
    before = read_clip(path, 2, end=0.5)
    np.testing.assert_array_equal(before.frames, plainly(kinds / "mpeg4.mp4")[0][[0, 4]])


# -- parts of a video ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_read_clip_returns_the_frames_on_screen_in_a_part(tmp_path, name):
    path = grey_clip(tmp_path / name)  # two seconds; frame i appears at i / 10
    for start, end, expected in [
        (0.5, 1.0, [5, 6, 7, 8, 9]),
        (0.55, 1.04, [5, 6, 7, 8, 9, 10]),
        (None, 0.3, [0, 1, 2]),
        (1.8, None, [18, 19]),
        (0.62, 0.63, [6]),
        (1.95, 2.0, [19]),
        (1.7, 2.4, [17, 18, 19]),  # an annotation may end a little after the video
    ]:
        clip = read_clip(path, start=start, end=end)
        assert shown(clip.frames) == expected
        np.testing.assert_allclose(clip.timestamps, np.array(expected) / 10, atol=2e-3)
    part = read_clip(path, 3, start=0.5, end=1.0)
    assert shown(part.frames) == [5, 7, 9]
    tiles = [shown(read_clip(path, start=t / 4, end=(t + 1) / 4).frames) for t in range(8)]
    assert sorted({frame for tile in tiles for frame in tile}) == list(range(20))
    whole = [shown(read_clip(path, start=t / 5, end=(t + 1) / 5).frames) for t in range(10)]
    assert sum(whole, []) == list(range(20))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (2.0, None),
        (1.0, 1.0),
        (1.5, 0.5),
        (-0.1, 1.0),
        (0.0, 2.6),
        (5.0, 9.0),
        (float("nan"), 1.0),
        (0.0, float("nan")),
        (float("inf"), None),
        (0.0, float("-inf")),
    ],
)
def test_read_clip_names_a_part_that_the_video_does_not_have(tmp_path, name, start, end):
    path = grey_clip(tmp_path / name)
    with pytest.raises(MediaError, match="seconds, for it lasts 2.0") as caught:
        read_clip(path, 4, start=start, end=end)
    given = f"{start:g} to {2.0 if end is None else end:g} seconds"
    assert str(caught.value).startswith(f"{path}: has no part from {given}")


def test_read_packets_of_a_late_part_reads_only_nearby_packets(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", moving(200), g="10")
    taken = []
    plain = packets.read_packets
    monkeypatch.setattr(
        packets, "read_packets", lambda *args: taken.append(plain(*args)) or taken[-1]
    )
    clip = read_clip(path, 2, start=15.0, end=15.5)
    np.testing.assert_array_equal(clip.frames, plainly(path)[0][[150, 154]])
    assert len(taken[0].times) < 25
    read_clip(path, 2)
    assert len(taken[1].times) == 200  # positive control


def test_video_processor_takes_excerpts(tmp_path):
    path = grey_clip(tmp_path / "clip.mp4")
    processor = VLJEPAVideoProcessor(crop_size=32, num_frames=3)
    part = Excerpt(path, 0.5, 1.0)
    found = processor([part, Excerpt(path.read_bytes(), start=1.7)], return_tensors="pt")
    by_hand = [read_clip(path, 3, start=0.5, end=1.0), read_clip(path, 3, start=1.7)]
    expected = processor([clip.frames for clip in by_hand], return_tensors="pt")
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-6)
    alone = processor(part, return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(alone[0], found["pixel_values_videos"][0], rtol=0, atol=1e-6)


def test_read_clip_reads_a_folder_of_images_in_natural_order(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (20, 10), (10 * index,) * 3).save(folder / f"frame{index}.png")
    (folder / ".DS_Store").write_text("hidden files are no frames")
    whole = read_clip(folder)
    assert shown(whole.frames) == list(range(12))
    assert whole.frames.shape == (12, 10, 20, 3)
    assert np.isnan(whole.timestamps).all()
    assert shown(read_clip(str(folder), 4).frames) == [0, 4, 7, 11]
    processor = VLJEPAVideoProcessor(crop_size=32, num_frames=4)
    expected = processor(whole.frames, return_tensors="pt")["pixel_values_videos"]
    found = processor(folder, return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    with pytest.raises(MediaError, match="frames: a folder of images has no times"):
        read_clip(folder, 4, start=0.0, end=1.0)
    with pytest.raises(MediaError, match="longer than 0.04 seconds"):
        read_clip(folder, max_seconds=0.04)
    with pytest.raises(MediaError, match="frame0.png: 20 x 10 pixels, but at most 100"):
        read_clip(folder, 1, max_pixels=100)
    Image.new("RGB", (30, 10)).save(folder / "frame11.png")
    with pytest.raises(MediaError, match="frames: the frame size changes"):
        read_clip(folder, 4)
    (folder / "frame11.png").write_bytes(b"cut")
    with pytest.raises(MediaError, match="frame11.png: not an image"):
        read_clip(folder, 4)


# -- limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
@pytest.mark.parametrize("num_frames", [None, 4])
def test_max_seconds_limits_the_length_of_a_part(tmp_path, name, num_frames):
    path = grey_clip(tmp_path / name)
    with pytest.raises(MediaError, match="longer than 1 seconds"):
        read_clip(path, num_frames, max_seconds=1.0)
    part = read_clip(path, num_frames, start=0.5, end=1.0, max_seconds=1.0)
    assert part.timestamps[[0, -1]] == pytest.approx([0.5, 0.9], abs=2e-3)
    with pytest.raises(MediaError, match="longer than 0.2 seconds"):
        read_clip(path, num_frames, start=0.5, end=1.0, max_seconds=0.2)


class Clock:
    """Clock that advances by `step` seconds on every reading."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
@pytest.mark.parametrize("step", [0.3, 2.0])  # while it is decoded, and while it is opened
@pytest.mark.parametrize("num_frames", [None, 4])
def test_read_clip_gives_up_when_the_time_is_up(tmp_path, monkeypatch, name, step, num_frames):
    path = grey_clip(tmp_path / name)
    clock = Clock(step)
    monkeypatch.setattr(media, "time", clock)
    with pytest.raises(MediaError, match="not decoded within 5 seconds") as caught:
        read_clip(path, num_frames, max_decode_seconds=5)
    assert str(caught.value).startswith(f"{path}: ")
    assert clock.now < 5 + 2 * step + 1e-6  # not read again when the time is up
    monkeypatch.setattr(media, "time", Clock(1e-3))
    assert len(read_clip(path, num_frames, max_decode_seconds=5).frames) == (num_frames or 20)


def test_open_video_gives_up_when_opening_takes_too_long(tmp_path, monkeypatch):
    """The file that FFmpeg reads from raises, which ends FFmpeg's search for readable data."""
    path = grey_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr(media, "time", Clock(6.0))
    limits = media.Limits("clip.mp4", max_decode_seconds=5)
    with (
        pytest.raises(MediaError, match="clip.mp4: not decoded within 5 seconds"),
        containers.open_video(path, limits),
    ):
        pytest.fail("it was opened")


def test_video_processor_limits_decoding_time_and_does_not_save_the_limit(tmp_path, monkeypatch):
    path = grey_clip(tmp_path / "clip.mp4")
    processor = VLJEPAVideoProcessor(crop_size=32, num_frames=4)
    assert processor.max_decode_seconds == 300
    processor.max_decode_seconds = 1000  # more than a busy machine needs
    assert "max_decode_seconds" not in processor.to_dict()
    assert processor(path)["pixel_values_videos"][0].shape == (4, 3, 32, 32)
    monkeypatch.setattr(media, "time", Clock(500.0))
    with pytest.raises(MediaError, match="clip.mp4: not decoded within 1000 seconds"):
        processor(path)


def test_open_video_decodes_with_one_thread(tmp_path):
    path = grey_clip(tmp_path / "clip.mp4")
    with containers.open_video(path, media.Limits("clip")) as stream:
        assert stream.codec_context.thread_count == 1


# -- whole videos --------------------------------------------------------------------------


# mkv and the raw stream have no frame count in the header; the raw stream has no times.
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.h264"])
def test_read_clip_returns_sampled_frames_with_their_times(tmp_path, name):
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
    np.testing.assert_allclose(sample.timestamps, whole.timestamps[[0, 6, 13, 19]], atol=1e-9)


@pytest.mark.parametrize("claimed", [8, 50])
def test_read_clip_ignores_a_wrong_frame_count_in_the_header(tmp_path, claimed):
    path = grey_clip(tmp_path / "clip.avi")
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 40  # the stream header's frame count
    content[length : length + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(path) as container:
        assert container.streams.video[0].frames == claimed
    assert shown(read_clip(path, num_frames=4).frames) == [0, 6, 13, 19]


@pytest.mark.parametrize("num_frames", [1, 2, 8])
def test_read_clip_repeats_frames_of_a_clip_shorter_than_the_sample(tmp_path, num_frames):
    one = grey_clip(tmp_path / "one.mp4", num_frames=1)
    assert shown(read_clip(one, num_frames).frames) == [0] * num_frames
    three = grey_clip(tmp_path / "three.mkv", num_frames=3)
    expected = uniform_indices(3, num_frames).tolist()
    assert shown(read_clip(three, num_frames).frames) == expected


def test_read_clip_keeps_every_pixel_of_odd_sizes(tmp_path):
    ramp = np.zeros((4, 41, 63, 3), np.uint8)
    ramp[..., :] = 4 * np.arange(63, dtype=np.uint8)[None, None, :, None]
    frames = read_clip(write_clip(tmp_path / "ramp.mp4", ramp)).frames
    assert frames.shape == (4, 41, 63, 3)
    assert np.abs(frames.astype(int) - ramp).max() <= 2


def test_read_clip_applies_the_rotation_of_phones(tmp_path):
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    frames[:, :8] = 250  # bright on top, and on the right of the upright picture
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
    elif case == "cut":  # the index comes first; the end of the pictures is missing
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
    elif case == "mixed folder":
        path.mkdir()
        Image.new("RGB", (8, 8)).save(path / "1.png")
        (path / "notes.txt").write_text("not a frame")
    return path


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("absent", "no such file"),
        ("folder", "the folder holds no image"),
        ("mixed folder", "holds notes.txt, which is not an image"),
        ("text", "cannot be opened as a video"),
        ("empty", "cannot be opened as a video"),
        ("no index", "cannot be opened as a video"),
        ("terminal art", "no video stream"),
        ("sound", "no video stream"),
        ("cut", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("num_frames", [None, 4])
def test_read_clip_names_unreadable_videos(tmp_path, case, reason, num_frames):
    path = unreadable(tmp_path, case)
    with pytest.raises(MediaError, match=reason) as caught:
        read_clip(path, num_frames)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_image_returns_upright_rgb(tmp_path):
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
def test_read_image_names_unreadable_images(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with pytest.raises(MediaError, match="no such file"):
        read_image(path)
    path.write_text("not an image")
    with pytest.raises(MediaError, match="not an image"):
        read_image(path)
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MediaError, match="damaged image") as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_image_keeps_the_upper_bits_of_16_bit_images(tmp_path):
    levels = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        pixels = read_image(tmp_path / name)
        np.testing.assert_array_equal(pixels[0], np.repeat((levels >> 8)[..., None], 3, axis=2))


def test_read_image_rejects_images_of_floating_point_values(tmp_path):
    fractions = Image.fromarray(noise(8, 8).astype(np.float32))
    fractions.save(tmp_path / "fractions.tif")
    with pytest.raises(MediaError, match="fractions.tif: its pixels are fractions"):
        read_image(tmp_path / "fractions.tif")
