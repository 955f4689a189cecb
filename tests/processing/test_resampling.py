"""Frames of any shape: the crop of a long frame, and the size of every intermediate result."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from processing import (
    FrameStream,
    MediaError,
    VLJEPAVideoProcessor,
    processing_vljepa,
    video_processing_vljepa,
    windows,
)
from processing.resampling import crop_of_resized, resized_size
from tests.tiny import noise, run_elsewhere, tiny_processor, write_clip

RAW = {"do_rescale": False, "do_normalize": False}
ROOT = Path(__file__).parents[2]
# Width and height of images of up to 25 M pixels.
SHAPES = [(65_000, 1), (1, 65_000), (5000, 5000), (25_000_000, 1), (1, 25_000_000), (20_000, 1250)]


class LargestTensor(TorchDispatchMode):
    """Record the size in bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


# -- the crop ------------------------------------------------------------------------------

SIDES = [1, 2, 7, 33, 36, 90, 292, 600]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("short", "crop"), [(36, 32), (292, 256)])
def test_crop_of_resized_equals_resize_and_crop(short, crop, mode):
    """Compare to one grey level, over sizes from 1 x 1 to a long edge of 2000 pixels."""
    generator = np.random.default_rng(0)
    sizes = [(height, width) for height in SIDES for width in SIDES]
    sizes += [(55, 2000), (2000, 20)]
    compared = 0
    for height, width in sizes:
        new = resized_size(height, width, short)
        if max(new) > 20 * min(new) and short > 36:  # too slow to compare
            continue
        frame = torch.from_numpy(generator.integers(0, 256, (3, height, width), np.uint8))
        top, left = (new[0] - crop) // 2, (new[1] - crop) // 2
        whole = F.interpolate(frame[None], size=new, mode=mode, antialias=True)[0]
        expected = whole[:, top : top + crop, left : left + crop]
        found = crop_of_resized(frame, new, (top, left), (crop, crop), mode)
        assert found.dtype == torch.uint8
        torch.testing.assert_close(found, expected, rtol=0, atol=1, msg=f"{height} x {width}")
        compared += 1
    assert compared > 30
    moved = crop_of_resized(frame, new, (top + 1, left), (crop, crop), mode)
    assert (moved.float() - expected.float()).abs().max() > 1  # positive control


@pytest.mark.parametrize(("height", "width"), [(3, 100), (100, 3), (40, 700), (700, 40)])
def test_video_processor_crops_long_frames_as_it_crops_others(monkeypatch, height, width):
    small = VLJEPAVideoProcessor(crop_size=32, num_frames=2)
    clip = noise(2, height, width, 3)
    found = small(clip, **RAW)["pixel_values_videos"][0]
    monkeypatch.setattr(video_processing_vljepa, "LONG_FRAME", 10**9)
    expected = small(clip, **RAW)["pixel_values_videos"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1)


# -- intermediate results ------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("kind", ["image", "clip", "stream"])
def test_processor_makes_no_large_intermediate_result(width, height, kind):
    """The short edge of 65,000 x 1 pixels enlarged to 292 is 292 x 18,980,000: 16.6 GB."""
    processor = tiny_processor()
    processor.video_processor = VLJEPAVideoProcessor(num_frames=2)
    frame = np.full((height, width, 3), 77, np.uint8)
    with LargestTensor() as largest:
        if kind == "image":
            pixels = processor(images=frame)["pixel_values_videos"][0, 0]
        elif kind == "clip":
            pixels = processor(videos=frame[None])["pixel_values_videos"][0, 0]
        else:
            frames = FrameStream(iter([(0.0, frame)]))
            [window] = windows(frames, processor.video_processor, size=2, stride=1)
            pixels = window.frames[0]
    assert pixels.shape == (3, 256, 256)
    assert 256 * 256 * 3 < largest.bytes <= 25_000_000 * 3  # at most the source itself
    assert pixels.std(dim=(1, 2)).max() < 1e-3  # the source has one grey level


@pytest.mark.slow
def test_processor_of_long_images_grows_by_less_than_two_gibibytes(tmp_path):
    for width, height in SHAPES[:4]:
        image = Image.new("RGB", (width, height), (200, 100, 50))
        image.save(tmp_path / f"{width}x{height}.png", compress_level=1)
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.tiny import tiny_processor
from processing import VLJEPAVideoProcessor
processor = tiny_processor()
processor.video_processor = VLJEPAVideoProcessor()
processor.video_processor.max_pixels = 25_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(".").glob("*.png")):
    processor(images=path)
    if "25000000" not in path.name:  # FFmpeg does not read it
        processor(videos=path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(run_elsewhere(script, tmp_path)) < 2 * 2**20  # in KiB


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    """Paths of the same clip: a video, an animation and a folder of images."""
    frames = noise(5, 60, 90, 3)
    write_clip(tmp_path / "clip.mp4", frames)
    write_clip(tmp_path / "clip.mkv", frames)  # has no frame count: decoded twice
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:])
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "folder" / f"{index}.png")
    return {name: tmp_path / name for name in ("clip.mp4", "clip.mkv", "clip.gif", "folder")}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.gif", "folder"])
@pytest.mark.parametrize("num_frames", [3, 40])
def test_video_processor_stacks_resized_frames_only(monkeypatch, sources, name, num_frames):
    """A clip of 40 frames of 25 M pixels would take 3 GB before, and 6 GB while it is stacked."""
    small = VLJEPAVideoProcessor(crop_size=32, num_frames=num_frames)
    clips = []
    read_clip = video_processing_vljepa.read_clip

    def recorded(*args, **kwargs):
        clips.append(read_clip(*args, **kwargs))
        return clips[-1]

    monkeypatch.setattr(video_processing_vljepa, "read_clip", recorded)
    pixels = small(sources[name], return_tensors="pt", **RAW)["pixel_values_videos"][0]
    assert [clip.frames.shape for clip in clips] == [(num_frames, 32, 32, 3)]
    frames = read_clip(sources[name], num_frames).frames
    expected = small(frames, do_sample_frames=False, **RAW)["pixel_values_videos"][0]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1)


def test_processor_reads_images_of_a_batch_one_by_one(monkeypatch):
    arrays, alive = [], []
    image_clip = processing_vljepa.image_clip

    def recorded(image, **kwargs):
        gc.collect()
        alive.append(sum(array() is not None for array in arrays))
        clip = image_clip(image, **kwargs)
        arrays.append(weakref.ref(clip))
        return clip

    monkeypatch.setattr(processing_vljepa, "image_clip", recorded)
    images = [Image.fromarray(noise(40, 50, 3))] * 5
    assert tiny_processor()(images=images)["pixel_values_videos"].shape == (5, 1, 3, 32, 32)
    assert len(alive) == 5
    assert max(alive) <= 1  # the one before, which the next replaces


def test_processor_without_a_crop_names_the_file_that_would_become_too_large(tmp_path):
    processor = tiny_processor()
    processor.video_processor = VLJEPAVideoProcessor(do_center_crop=False, num_frames=2)
    path = tmp_path / "long.png"
    Image.new("RGB", (65_000, 1)).save(path)
    becomes = r"long.png: 65000 x 1 pixels become 18980000 x 292, more than"
    for given in ({"images": path}, {"videos": path}):
        with pytest.raises(MediaError, match=becomes):
            processor(**given)


def test_processor_rejects_a_frame_size_that_changes_within_a_clip(tmp_path):
    for name, height in (("0.png", 40), ("1.png", 48)):
        Image.fromarray(noise(height, 50, 3)).save(tmp_path / name)
    with pytest.raises(MediaError, match="the frame size changes"):
        tiny_processor()(videos=tmp_path)


def test_processor_refuses_an_opened_image_with_too_many_pixels(tmp_path):
    """`Image.open` reads the header only, so the pixels are not in memory yet."""
    processor = tiny_processor()
    processor.video_processor.max_pixels = 999
    Image.new("RGB", (100, 10)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        for given in ({"images": image}, {"videos": [image]}):
            with pytest.raises(MediaError, match="the image: 100 x 10 pixels, but at most 999"):
                processor(**given)
