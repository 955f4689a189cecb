"""Frames and times as a player shows them: which stream, when, in which shape, on which ground."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from processing import FrameStream, VLJEPAVideoProcessor, containers, read_clip, read_image
from processing.video_io import MediaError
from tests.media import write_tracks

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour: tuple[int, ...], count: int = 1) -> np.ndarray:
    return np.full((count, 48, 64, len(colour)), colour, np.uint8)


def three_ways(path: Path) -> dict[str, np.ndarray]:
    """Return the frames of a file read by each reader, `(T, H, W, 3)`."""
    return {
        "sampled": read_clip(path, 3).frames,
        "whole": read_clip(path).frames,
        "part": read_clip(path, 2, start=0.2, end=0.5).frames,
        "streamed": np.stack([frame.pixels for frame in FrameStream(path)]),
    }


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return np.abs(pixels.reshape(-1, 3).mean(axis=0) - colour).max() < 12


# -- which stream --------------------------------------------------------------------------

READERS = [read_clip, lambda path: list(FrameStream(path))]
DEFAULT, NONE, COVER = Disposition.default, Disposition(0), Disposition.attached_pic


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "fragments.mp4", "clip.mov", "clip.avi"])
@pytest.mark.parametrize(
    ("still", "film"), [(NONE, NONE), (DEFAULT, DEFAULT), (DEFAULT, NONE), (COVER, DEFAULT)]
)
def test_video_stream_is_the_film_not_the_still_before_it(tmp_path, name, still, film):
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "fragments.mp4" else {}
    picture = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "frames": plain(BLUE)}
    path = write_tracks(
        tmp_path / name,
        {**picture, "disposition": still},
        {"frames": plain(RED, 6), "disposition": film},
        **options,
    )
    for way, frames in three_ways(path).items():
        assert is_colour(frames, RED), way


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
@pytest.mark.parametrize("default", [0, 1])
def test_video_stream_is_the_default_of_two_films(tmp_path, name, default):
    films = [{"frames": plain(colour, 6), "disposition": NONE} for colour in (BLUE, RED)]
    films[default]["disposition"] = DEFAULT
    path = write_tracks(tmp_path / name, *films)
    for way, frames in three_ways(path).items():
        assert is_colour(frames, (BLUE, RED)[default]), way


def test_video_stream_is_the_first_of_equals_unless_it_is_much_shorter(tmp_path):
    films = [{"frames": plain(*film), "disposition": DEFAULT} for film in ((BLUE, 6), (RED, 8))]
    assert is_colour(read_clip(write_tracks(tmp_path / "a.mp4", *films), 2).frames, BLUE)
    films[1]["frames"] = plain(RED, 20)
    assert is_colour(read_clip(write_tracks(tmp_path / "b.mp4", *films), 2).frames, RED)


@pytest.mark.parametrize(
    "read", [lambda path: read_clip(path, 2), lambda path: [*FrameStream(path)]]
)
def test_video_stream_is_never_a_cover(tmp_path, read):
    path = tmp_path / "song.m4a"
    with av.open(path, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=16000, layout="mono")
        cover = output.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = COVER
        output.mux(cover.encode(av.VideoFrame.from_ndarray(plain(BLUE)[0], format="rgb24")))
        output.mux(cover.encode())
        output.mux(sound.encode(silence(0)))
        output.mux(sound.encode())
    with pytest.raises(MediaError, match="song.m4a: has no video stream that FFmpeg can dec"):
        read(path)


@pytest.mark.parametrize("kind", ["webp", "avif", "png", "gif"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_read_clip_gives_every_frame_of_an_animated_image(tmp_path, kind, has_alpha):
    levels = (0, 100, 200)
    images = [Image.new("RGBA", (64, 48), (level, level, level, 255)) for level in levels]
    if has_alpha:
        for image in images:
            image.paste((90, 0, 0, 0), (0, 0, 64, 24))
    else:
        images = [image.convert("RGB") for image in images]
    path = tmp_path / f"clip.{kind}"
    options = {"quality": 100} if kind == "avif" else {"lossless": True}
    options |= {"disposal": 2} if kind == "gif" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=200, **options)
    for way, frames in three_ways(path).items():
        shown = [200, 200] if way == "part" else levels  # at 0.2 s the second frame appears
        if way == "part":
            shown = [100, 200]
        assert frames[:, 40, 32, 0] == pytest.approx(shown, abs=2), way
        top = 255 if has_alpha else shown
        assert np.abs(frames[:, 5, 32] - np.broadcast_to(top, (len(frames),))[:, None]).max() <= 2
    np.testing.assert_allclose(read_clip(path).timestamps, [0, 0.2, 0.4], atol=1e-3)


@pytest.mark.parametrize("read", READERS)
def test_readers_name_a_truncated_animation(tmp_path, read):
    path = tmp_path / "clip.webp"
    images = [Image.fromarray(plain((level, 0, 0))[0]) for level in (0, 100, 200)]
    images[0].save(path, save_all=True, append_images=images[1:], lossless=True)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(MediaError, match="clip.webp: truncated or damaged after 0 frames"):
        read(path)


# -- when ----------------------------------------------------------------------------------


def silence(index: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.rate, frame.pts, frame.time_base = 16000, 1024 * index, Fraction(1, 16000)
    return frame


def with_sound(path: Path, late: float, sound_late: float = 0.0, **options: str) -> Path:
    """Write 4 s of silence, and from `late` on 2 s of pictures, black and then white."""
    with av.open(path, "w", options=options) as output:
        video = output.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound = output.add_stream("aac", rate=16000)
        for index in range(63):
            output.mux(sound.encode(silence(index + round(sound_late * 15.625))))
        output.mux(sound.encode())
        for index in range(20):
            colour = (255,) * 3 if index >= 10 else (0,) * 3
            frame = av.VideoFrame.from_ndarray(plain(colour)[0], format="rgb24")
            frame.pts, frame.time_base = round(1000 * (late + index / 10)), Fraction(1, 1000)
            output.mux(video.encode(frame))
        output.mux(video.encode())
    return path


GAPS = ["clip.mkv", "clip.mp4", "clip.mov", "clip.ts", "clip.flv"]


@pytest.mark.parametrize("name", GAPS)
def test_times_begin_with_the_file_if_its_picture_begins_after_its_sound(tmp_path, name):
    path = with_sound(tmp_path / name, late=2)
    # MPEG-TS and FLV shift the picture by the padding of the sound, 64 ms, as a player does.
    near = {"abs": 0.07}
    stream = FrameStream(path)
    frames = [(frame.time, frame.pixels.mean() > 127) for frame in stream]
    assert frames[0][0] == pytest.approx(2, **near)
    assert next(time for time, is_white in frames if is_white) == pytest.approx(3, **near)
    assert stream.report.ended == "the source has ended"
    assert read_clip(path).timestamps[[0, -1]] == pytest.approx([2, 3.9], **near)
    assert read_clip(path, 3).timestamps[[0, -1]] == pytest.approx([2, 3.9], **near)
    for start, end, is_white in ((2.2, 2.6, False), (3.2, 3.6, True), (0.5, 2.6, False)):
        found = read_clip(path, 2, start=start, end=end)
        assert (found.frames.mean() > 127) == is_white
        assert found.timestamps[0] == pytest.approx(max(start, 2), abs=0.11)
    with pytest.raises(MediaError, match="shows nothing from 0.5 to 1 seconds, for its picture be"):
        read_clip(path, 2, start=0.5, end=1)
    with pytest.raises(MediaError, match="has no part from 5 to 6 seconds, for it lasts [34]"):
        read_clip(path, 2, start=5, end=6)


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.ts"])
@pytest.mark.parametrize("sound_late", [0.0, 1.0])
def test_times_begin_with_the_picture_if_the_sound_does_not_begin_before(
    tmp_path, name, sound_late
):
    """Padding of the sound, here 64 ms, is no gap."""
    path = with_sound(tmp_path / name, late=0, sound_late=sound_late)
    np.testing.assert_allclose(read_clip(path).timestamps, np.arange(20) / 10, atol=2e-3)
    assert [frame.time for frame in FrameStream(path)][:2] == pytest.approx([0, 0.1], abs=2e-3)


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.ts"])
def test_frame_stream_does_not_miss_a_picture_after_the_end_of_the_picture(tmp_path, name):
    stream = FrameStream(with_sound(tmp_path / name, late=0))  # the sound lasts 4 s
    assert len(list(stream)) == 20
    assert stream.report.ended == "the source has ended"


# -- in which shape ------------------------------------------------------------------------


def disc(height: int, width: int) -> np.ndarray:
    """Return a frame `(1, H, W, 3)` that a disc fills, squeezed as the frame is."""
    y, x = np.mgrid[:height, :width]
    inside = ((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2 < 0.4**2
    return np.where(inside, 255, 0).astype(np.uint8)[None, ..., None].repeat(3, axis=3)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.h264", "no pasp.mp4"])
@pytest.mark.parametrize(
    ("stored", "aspect", "shown"),
    [
        ((144, 180), Fraction(4, 5), (180, 180)),
        ((180, 144), Fraction(5, 4), (180, 180)),
        ((180, 180), Fraction(321, 320), (180, 180)),  # rounding, not an aspect
    ],
)
def test_pictures_have_square_pixels(tmp_path, name, stored, aspect, shown):
    frames = disc(*stored).repeat(6, axis=0)
    context = {"sample_aspect_ratio": aspect}
    path = write_tracks(tmp_path / name, {"frames": frames, "context": context})
    if name == "no pasp.mp4":  # only the codec's data have the aspect
        content = path.read_bytes()
        assert b"pasp" in content
        path.write_bytes(content.replace(b"pasp", b"free"))
    # A raw stream has no times, so it has no parts.
    ways = {"whole": read_clip(path).frames, "sampled": read_clip(path, 2).frames}
    ways["streamed"] = np.stack([frame.pixels for frame in FrameStream(path)])
    for way, found in ways.items():
        assert found.shape[1:3] == shown, way
        bright = found[0].mean(axis=2) > 127
        assert abs(int(bright.any(axis=0).sum()) - int(bright.any(axis=1).sum())) <= 3, way


@pytest.mark.parametrize("aspect", [Fraction(30000, 1), Fraction(1, 30000), Fraction(900, 1)])
def test_pictures_of_an_extreme_aspect_are_bounded(tmp_path, aspect):
    frames = disc(48, 64).repeat(6, axis=0)
    path = write_tracks(
        tmp_path / "a.mkv", {"frames": frames, "context": {"sample_aspect_ratio": aspect}}
    )
    stream = FrameStream(path, max_pixels=5000)
    for found in (read_clip(path, 2, max_pixels=5000).frames, [next(iter(stream)).pixels]):
        assert found[0].shape[0] * found[0].shape[1] <= 5000
    assert containers.display_size(64, 48, aspect, room=2**25)[0] <= 2**25 / 48
    assert VLJEPAVideoProcessor(num_frames=2)(path, return_tensors="pt")[
        "pixel_values_videos"
    ].shape == (1, 2, 3, 256, 256)


def quadrants() -> np.ndarray:
    """Return red, green / blue, white, so that each rotation and mirroring differs."""
    frame = plain((255, 255, 255), 6)
    frame[:, :24, :32], frame[:, :24, 32:], frame[:, 24:, :32] = RED, (0, 255, 0), BLUE
    return frame


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ({"degrees": 0, "hflip": True}, lambda p: p[:, ::-1]),
        ({"degrees": 0, "vflip": True}, lambda p: p[::-1]),
        ({"degrees": 180}, lambda p: p[::-1, ::-1]),
        # Counterclockwise, and mirrored after it. Verified with the program ffmpeg.
        ({"degrees": 90}, lambda p: np.rot90(p)),
        ({"degrees": 90, "hflip": True}, lambda p: np.rot90(p)[:, ::-1]),
        ({"degrees": -90, "vflip": True}, lambda p: np.rot90(p, -1)[::-1]),
    ],
)
def test_pictures_are_rotated_and_mirrored(tmp_path, name, rotation, expected):
    track = {"frames": quadrants(), "pix_fmt": "yuv444p", "options": {"crf": "1"}}
    path = write_tracks(tmp_path / name, {**track, "rotation": rotation})
    wanted = expected(quadrants()[0]).astype(int)
    for way, found in three_ways(path).items():
        assert found.shape[1:] == wanted.shape, way
        assert np.abs(found[0] - wanted).mean() < 4, way


def test_pictures_are_stretched_before_they_are_rotated(tmp_path):
    track = {"frames": disc(144, 180).repeat(6, axis=0), "rotation": {"degrees": 90}}
    track["context"] = {"sample_aspect_ratio": Fraction(2, 1)}
    path = write_tracks(tmp_path / "clip.mp4", track)
    for way, found in three_ways(path).items():
        assert found.shape[1:3] == (360, 144), way


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_named_once(tmp_path, monkeypatch, transfer, kind):
    monkeypatch.setattr(containers, "NAMED_HDR", set())
    said = []
    monkeypatch.setattr(containers.logger, "warning", said.append)
    context = {"color_trc": transfer}
    path = write_tracks(tmp_path / "hdr.mp4", {"frames": plain(RED, 6), "context": context})
    three_ways(path)
    [line] = said
    assert f"hdr.mp4: an HDR video ({kind})" in line


# -- on which ground -----------------------------------------------------------------------

GREEN = (10, 200, 10)


def translucent() -> np.ndarray:
    """Return a frame `(H, W, 4)`: hidden noise, opaque green, half-transparent black."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., :3] = np.random.default_rng(0).integers(0, 256, (48, 64, 3))
    pixels[16:32] = (*GREEN, 255)
    pixels[32:] = (0, 0, 0, 128)
    return pixels


def check_ground(picture: np.ndarray, tolerance: int, middle: tuple[int, ...] = GREEN) -> None:
    """Assert that `translucent` is on white. Edges are left out: codecs smear them."""
    picture = picture.astype(int)
    assert np.abs(picture[:14] - 255).max() <= tolerance
    assert np.abs(picture[18:30] - middle).max() <= tolerance
    assert np.abs(picture[34:] - 127).max() <= tolerance


ALPHA = {
    "vp9.webm": ("libvpx-vp9", "yuva420p", {}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    "prores.mov": ("prores_ks", "yuva444p10le", {}),
    "qtrle.mov": ("qtrle", "argb", {}),
    "png.mov": ("png", "rgba", {}),
    "ffv1.mkv": ("ffv1", "yuva420p", {}),
}


@pytest.mark.parametrize("name", ALPHA)
def test_pictures_of_videos_with_alpha_are_on_white(tmp_path, name):
    codec, pix_fmt, options = ALPHA[name]
    frames = translucent()[None].repeat(6, axis=0)
    track = {"frames": frames, "codec": codec, "pix_fmt": pix_fmt, "options": options}
    path = write_tracks(tmp_path / name, track)
    for found in three_ways(path).values():
        check_ground(found[-1], tolerance=12)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.avif", "a.tiff", "a.jp2", "a.tga", "a.ico"])
def test_read_image_with_alpha_is_on_white(tmp_path, name):
    options = {"a.webp": {"lossless": True}, "a.avif": {"quality": 100}}.get(name, {})
    options |= {"sizes": [(64, 48)]} if name == "a.ico" else {}
    Image.fromarray(translucent()).save(tmp_path / name, **options)
    by_path, by_bytes = read_image(tmp_path / name), read_image((tmp_path / name).read_bytes())
    np.testing.assert_array_equal(by_path, by_bytes)
    check_ground(by_path[0], tolerance=8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "La", "RGBa"])
def test_read_image_of_every_mode_with_alpha_is_on_white(tmp_path, mode):
    image = Image.fromarray(translucent())
    if mode in ("P", "PA"):
        image = image.quantize(32)
    image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    middle = (image.convert("LA") if mode == "La" else image).convert("RGBA").getpixel((5, 20))[:3]
    assert np.abs(np.subtract(middle, GREEN)).max() <= 2 or mode in ("LA", "La")
    check_ground(read_image(image)[0], tolerance=8, middle=middle)


@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
def test_read_image_shows_white_for_a_transparent_colour(tmp_path, kind):
    pixels = np.full((48, 64), 7, np.uint8)
    pixels[20:] = 200
    picture = {
        "RGB": Image.merge("RGB", [Image.fromarray(pixels)] * 3),
        "L": Image.fromarray(pixels),
        "I;16": Image.fromarray(pixels.astype(np.uint16) * 257),
    }[kind]
    colour = {"RGB": (7, 7, 7), "L": 7, "I;16": 7 * 257}[kind]
    picture.save(tmp_path / "a.png", transparency=colour)
    expected = np.where(pixels == 7, 255, pixels)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], expected)
    found = read_clip(tmp_path / "a.png", 1).frames[0].astype(int)
    assert np.abs(found - expected).max() <= 1  # FFmpeg rounds 16 bits


def test_a_gif_has_the_same_ground_as_a_video_and_as_an_image(tmp_path):
    image = Image.fromarray(translucent())
    image.putalpha(image.getchannel("A").point(lambda level: 255 if level else 0))
    image.save(tmp_path / "a.gif")
    found = read_image(tmp_path / "a.gif")[0]
    assert (found[:14] == 255).all()
    np.testing.assert_array_equal(read_clip(tmp_path / "a.gif", 1).frames[0], found)
    [frame] = FrameStream(tmp_path / "a.gif")
    np.testing.assert_array_equal(frame.pixels, found)


def test_raw_pixels_in_avi_have_no_alpha(tmp_path):
    """Screen recorders leave the fourth byte 0."""
    pixels = translucent()
    pixels[..., 3] = 0
    track = {"frames": pixels[None], "codec": "rawvideo", "pix_fmt": "bgra"}
    found = read_clip(write_tracks(tmp_path / "a.avi", track), 1).frames[0]
    np.testing.assert_array_equal(found, pixels[..., :3])
