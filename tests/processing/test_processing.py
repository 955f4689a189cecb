"""Pixels and tokens of the processors: closed forms, and invariances with positive controls."""

import os

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from processing import MediaError, VLJEPAProcessor, VLJEPAVideoProcessor, uniform_indices
from tests.tiny import noise, run_elsewhere, tiny_processor, tiny_tokenizer, write_clip

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, as published
STD = torch.tensor([0.229, 0.224, 0.225])
RAW = {"do_rescale": False, "do_normalize": False}


def levels(num_frames: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Return frames (T, H, W, 3); frame i has grey level i."""
    frames = np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(frames, (num_frames, height, width, 3)).copy()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare pixels to 1e-6, and token ids and masks exactly."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture
def small() -> VLJEPAVideoProcessor:
    return VLJEPAVideoProcessor(crop_size=32, num_frames=4)


@pytest.fixture
def processor() -> VLJEPAProcessor:
    return tiny_processor()


# -- pixels --------------------------------------------------------------------------------


def test_video_processor_sets_the_size_that_fits_the_crop(small):
    assert VLJEPAVideoProcessor().size["shortest_edge"] == 292
    assert VLJEPAVideoProcessor().crop_size == {"height": 256, "width": 256}
    assert VLJEPAVideoProcessor().num_frames == 8
    assert small.size["shortest_edge"] == 36
    assert VLJEPAVideoProcessor(crop_size=384).size["shortest_edge"] == 438
    own = VLJEPAVideoProcessor(crop_size=32, size={"shortest_edge": 40})
    assert own.size["shortest_edge"] == 40


@pytest.mark.parametrize(
    ("height", "width", "new"),
    [(240, 320, (292, 389)), (360, 202, (520, 292)), (41, 63, (292, 448)), (292, 292, (292, 292))],
)
def test_video_processor_resizes_the_shortest_edge_and_rounds_the_long_one_down(height, width, new):
    frames = VLJEPAVideoProcessor(do_center_crop=False, **RAW)(
        noise(2, height, width, 3), do_sample_frames=False
    )["pixel_values_videos"][0]
    assert frames.shape == (2, 3, *new)
    assert frames.dtype == torch.uint8


def test_video_processor_normalises_a_constant_clip_to_the_published_value(small):
    value = 137
    pixels = small(np.full((2, 41, 63, 3), value, np.uint8), return_tensors="pt")
    expected = ((value / 255 - MEAN) / STD).view(3, 1, 1).expand(1, 4, 3, 32, 32)
    torch.testing.assert_close(pixels["pixel_values_videos"], expected, rtol=0, atol=1e-6)


# The result of transformers 5.23's VJEPA2VideoProcessor for `counted`, with torchvision 0.28.0,
# which this project does not install: mean, standard deviation and five values of the flat result.
# All pixels were compared once: the largest difference was 0.0.
STOCK = {
    (240, 320): (0.226800, 0.748771, (0.896053, -1.193167, -0.862745, 0.747899, 2.047407)),
    (360, 202): (0.226672, 0.793228, (-0.268431, 0.228187, 0.065126, -0.022409, 0.827364)),
    (480, 480): (0.226598, 0.378752, (0.176813, 0.039815, 0.257703, 0.10014, 0.426492)),
}


def counted(height: int, width: int) -> torch.Tensor:
    """Return four frames `(4, 3, H, W)` of pseudo-random pixels: Knuth's multiplicative hash."""
    index = torch.arange(4 * 3 * height * width)
    return (index * 2654435761 % 2**32 // 2**24).to(torch.uint8).reshape(4, 3, height, width)


@pytest.mark.parametrize(("height", "width"), STOCK)
def test_video_processor_equals_the_stock_processor(height, width):
    processor = VLJEPAVideoProcessor()
    clip = counted(height, width)
    pixels = processor(clip, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    mean, deviation, values = STOCK[height, width]
    assert pixels.shape == (1, 4, 3, 256, 256)
    flat = pixels.flatten()
    assert flat.double().mean().item() == pytest.approx(mean, abs=1e-6)
    assert flat.double().std().item() == pytest.approx(deviation, abs=1e-6)
    found = flat[[0, 12345, 123456, 500000, -1]].tolist()
    assert found == pytest.approx(values, abs=1e-6)


def test_video_processor_crops_the_centre(small):
    ramp = np.zeros((1, 37, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(37)[:, None]  # red: row, green: column
    ramp[..., 1] = np.arange(60)
    crop = small(ramp, do_sample_frames=False, do_resize=False, **RAW)["pixel_values_videos"][0]
    assert crop.shape == (1, 3, 32, 32)
    assert crop[0, 0, :, 0].tolist() == list(range(2, 34))  # (37 - 32) // 2 = 2
    assert crop[0, 1, 0].tolist() == list(range(14, 46))


def test_video_processor_resizes_uint8_antialiased_in_every_memory_layout(small):
    clip = noise(3, 90, 120, 3)
    channels_first = torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous()
    expected = F.interpolate(channels_first, size=(36, 48), mode="bilinear", antialias=True)
    aliased = F.interpolate(channels_first.float(), size=(36, 48), mode="bilinear").round()
    options = {"do_sample_frames": False, "do_center_crop": False, **RAW}
    for frames in (clip, channels_first, [Image.fromarray(frame) for frame in clip]):
        result = small(frames, **options)["pixel_values_videos"][0]
        assert result.dtype == torch.uint8
        # Each memory layout has its own kernel, which may round to the next grey level.
        torch.testing.assert_close(result, expected, rtol=0, atol=1)
    assert (expected.float() - aliased).abs().mean() > 5  # positive control


def test_video_processor_samples_the_first_and_the_last_frame(small):
    def sampled(num_frames: int | None) -> list[int]:
        return small(levels(20), num_frames=num_frames, **RAW)["pixel_values_videos"][0][
            :, 0, 0, 0
        ].tolist()

    assert sampled(None) == [0, 6, 13, 19]
    assert sampled(3) == uniform_indices(20, 3).tolist()
    assert sampled(30)[::29] == [0, 19]


def test_video_processor_in_two_steps_equals_one_step(small):
    clips = [noise(9, 41, 63, 3), noise(5, 80, 50, 3)]
    whole = small(clips, return_tensors="pt")["pixel_values_videos"]
    cached = small(clips, return_tensors="pt", **RAW)["pixel_values_videos"]
    assert cached.dtype == torch.uint8
    rest = {"do_sample_frames": False, "do_resize": False, "do_center_crop": False}
    for second in (cached, list(cached)):
        finished = small(second, return_tensors="pt", **rest)["pixel_values_videos"]
        assert finished.dtype == torch.float32
        assert_near(finished, whole)
    assert whole.shape == (2, 4, 3, 32, 32)
    assert whole.is_contiguous()


def test_video_processor_treats_clips_of_a_batch_independently(small):
    clips = [noise(9, 41, 63, 3), noise(5, 80, 50, 3)]
    batch = small(clips, return_tensors="pt")["pixel_values_videos"]
    swapped = small(clips[::-1], return_tensors="pt")["pixel_values_videos"]
    assert_near(batch, swapped.flip(0))
    assert (batch - swapped).abs().max() > 0.1  # positive control


@pytest.mark.parametrize(
    "clip",
    [
        noise(4, 3, 40, 50),  # channels first is for tensors
        torch.from_numpy(noise(4, 40, 50, 3)),  # channels last is for arrays
        noise(40, 50, 3),
        noise(4, 40, 50, 1),
    ],
)
def test_video_processor_rejects_other_layouts(small, clip):
    with pytest.raises(ValueError, match="a clip is an array .* or a tensor"):
        small(clip)


def test_video_processor_rejects_unusable_clips_and_options(small, tmp_path):
    with pytest.raises(ValueError, match="uint8 pixels from 0 to 255, got torch.float32"):
        small(torch.rand(4, 3, 40, 50))
    with pytest.raises(ValueError, match=r"need one length, got \[3, 5\] frames"):
        small([noise(3, 9, 9, 3), noise(5, 9, 9, 3)], do_sample_frames=False, return_tensors="pt")
    with pytest.raises(ValueError, match="crop of 32 x 32 does not fit into frames of 20 x 60"):
        small(noise(4, 20, 60, 3), do_resize=False)
    with pytest.raises(ValueError, match="list is empty"):
        small([])
    with pytest.raises(TypeError, match="does not support fps"):
        small(noise(4, 40, 50, 3), fps=2)
    with pytest.raises(MediaError, match="gone.mp4: no such file"):
        small(str(tmp_path / "gone.mp4"))


def test_video_processor_of_a_path_equals_that_of_its_frames(small, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", levels(12, 48, 64) * 20)
    with av.open(path) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    expected = small(frames, return_tensors="pt")["pixel_values_videos"]
    for source in (path, str(path), [str(path)]):
        result = small(source, return_tensors="pt")["pixel_values_videos"]
        assert_near(result, expected)
    assert (expected[0, 0] - expected[0, 3]).abs().max() > 0.1  # positive control


# -- batches -------------------------------------------------------------------------------


def test_processor_makes_a_full_batch(processor):
    batch = processor(
        videos=[levels(9), levels(2)],
        text=["what is the dog doing ?", ""],
        targets=["red", "red green blue"],
    )
    assert list(batch) == [
        *processor.model_input_names,
        "target_input_ids",
        "target_attention_mask",
    ]
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    assert batch["pixel_values_videos"].dtype == torch.float32
    for name in list(batch)[1:]:
        assert batch[name].dtype == torch.int64
    # An empty query is only the beginning-of-text token; padding (0) is on the right.
    assert batch["input_ids"][1].tolist() == [1] + [0] * (batch["input_ids"].shape[1] - 1)
    assert batch["attention_mask"].sum(1).tolist() == [batch["input_ids"].shape[1], 1]
    decoded = processor.target_tokenizer.batch_decode(
        batch["target_input_ids"], skip_special_tokens=True
    )
    assert decoded == ["red", "red green blue"]
    assert processor.tokenizer.decode(batch["input_ids"][0][1:]) == "what is the dog doing ?"


def test_processor_makes_a_batch_of_one_from_a_single_item(processor, tmp_path):
    image = Image.fromarray(noise(40, 50, 3))
    image.save(tmp_path / "a.png")
    listed = processor(images=[image], text=["a"], targets=["b"])
    array = np.array(image)
    for single in (
        image,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        array,
        array[None],
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        batch = processor(images=single, text="a", targets="b")
        assert batch.keys() == listed.keys()
        for name in listed:
            assert_near(batch[name], listed[name])
    frames = [image, image.rotate(180)]
    clip = processor(videos=frames)["pixel_values_videos"]
    assert clip.shape == (1, 4, 3, 32, 32)


def test_processor_treats_an_image_as_a_one_frame_clip(processor):
    image = noise(40, 50, 3)
    still = processor(images=image)["pixel_values_videos"]
    video = processor(videos=np.stack([image] * 5))["pixel_values_videos"]
    assert still.shape == (1, 1, 3, 32, 32)
    assert_near(still.expand_as(video), video)


def test_processor_takes_num_frames_per_call(processor):
    assert processor(videos=levels(9), num_frames=2)["pixel_values_videos"].shape[1] == 2
    assert processor(videos=levels(9))["pixel_values_videos"].shape[1] == 4


def test_processor_returns_int64_tensors_for_texts_without_tokens(small):
    bare = VLJEPAProcessor(small, tiny_tokenizer(bos=False), tiny_tokenizer())
    for name in ("input_ids", "attention_mask"):
        assert bare(text=["", ""])[name].shape == (2, 0)
        assert bare(text=["", ""])[name].dtype == torch.int64


def test_processor_pads_on_the_right_and_changes_no_token(small):
    left = VLJEPAProcessor(small, tiny_tokenizer(padding_side="left"), tiny_tokenizer())
    alone = left(text="the cat")["input_ids"][0].tolist()
    padded = left(text=["the cat", "open the door and close the window"])
    ids, mask = padded["input_ids"][0].tolist(), padded["attention_mask"][0].tolist()
    assert len(ids) > len(alone)  # positive control: there is padding
    assert ids == alone + [0] * (len(ids) - len(alone))
    assert mask == [1] * len(alone) + [0] * (len(ids) - len(alone))


def test_processor_does_not_mask_an_end_token_that_is_also_the_padding_token(small):
    tokenizer = tiny_tokenizer(eos=True)
    tokenizer.pad_token = tokenizer.eos_token
    batch = VLJEPAProcessor(small, tokenizer, tiny_tokenizer())(text=["a<eos>b", "a<eos>b c d e"])
    masked_in = batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
    assert masked_in.count(2) == 2
    assert batch["attention_mask"][0].sum() < batch["attention_mask"][1].sum()


def test_processor_cuts_long_texts(small):
    long = "the cat sits " * 400
    both = VLJEPAProcessor(
        small, tiny_tokenizer(max_length=10**9), tiny_tokenizer(eos=True, max_length=77)
    )
    batch = both(text=long, targets=long)
    assert batch["input_ids"].shape == (1, 512)
    assert batch["target_input_ids"].shape == (1, 77)  # the tokenizer's own limit is lower
    assert batch["target_input_ids"][0, -1] == 2  # the end token survives the cut
    batch = both(text=long, targets=long, max_query_length=5, max_target_length=6)
    assert batch["input_ids"].shape == (1, 5)
    assert batch["target_input_ids"].shape == (1, 6)


def test_processor_rejects_unusable_batches(processor, small, tmp_path):
    with pytest.raises(ValueError, match="either images or videos"):
        processor(images=noise(40, 50, 3), videos=levels(3))
    with pytest.raises(ValueError, match="one length, got videos: 2, text: 1, targets: 3"):
        processor(videos=[levels(3)] * 2, text="a", targets=["a", "b", "c"])
    with pytest.raises(ValueError, match="got no part"):
        processor()
    with pytest.raises(ValueError, match="got text: 0"):
        processor(text=[])
    with pytest.raises(ValueError, match="must be 'pt' or 'np', got 'tf'"):
        processor(text="a", return_tensors="tf")
    with pytest.raises(MediaError, match="gone.png: no such file"):
        processor(images=tmp_path / "gone.png")
    with pytest.raises(TypeError, match="must be a VLJEPAVideoProcessor, got"):
        VLJEPAProcessor(tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer())
    unpadded = tiny_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="target_tokenizer has no padding token"):
        VLJEPAProcessor(small, tiny_tokenizer(), unpadded)


# -- saving --------------------------------------------------------------------------------


def saved(processor: VLJEPAProcessor, folder: os.PathLike) -> dict[str, torch.Tensor]:
    """Save the processor; return a batch to compare with."""
    processor.max_query_length = 6
    processor.tokenizer.chat_template = "{{ messages }}"  # query tokenizers have one
    processor.save_pretrained(folder)
    return dict(
        processor(
            videos=noise(6, 41, 63, 3),
            text="the red cat sits on the mat",
            targets="the red cat",
        )
    )


def test_processor_is_loaded_as_it_was_saved(processor, tmp_path):
    expected = saved(processor, tmp_path)
    again = VLJEPAProcessor.from_pretrained(tmp_path)
    batch = again(
        videos=noise(6, 41, 63, 3), text="the red cat sits on the mat", targets="the red cat"
    )
    assert batch.keys() == expected.keys()
    for name in expected:
        assert_near(batch[name], expected[name])
    assert batch["input_ids"].shape == (1, 6)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.target_tokenizer.get_vocab() == processor.target_tokenizer.get_vocab()
    assert again.tokenizer.get_vocab() != again.target_tokenizer.get_vocab()
    assert again.video_processor.to_dict() == processor.video_processor.to_dict()


def test_processor_does_not_replace_a_missing_target_tokenizer_by_the_other(processor, tmp_path):
    saved(processor, tmp_path)
    (tmp_path / "target_tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises((OSError, ValueError)):
        VLJEPAProcessor.from_pretrained(tmp_path)


@pytest.mark.slow
def test_processor_loads_as_remote_code_without_this_package(processor, tmp_path):
    """Load it in a process that cannot import `processing`."""
    expected = saved(processor, tmp_path / "model")
    torch.save(expected, tmp_path / "expected.pt")
    np.save(tmp_path / "clip.npy", noise(6, 41, 63, 3))
    script = f"""
import numpy, torch
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
expected = torch.load({str(tmp_path / "expected.pt")!r})
batch = processor(
    videos=numpy.load({str(tmp_path / "clip.npy")!r}),
    text="the red cat sits on the mat",
    targets="the red cat",
)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
for name in expected:
    torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=1e-6)
print("equal", len(expected))
"""
    assert run_elsewhere(script, tmp_path) == "equal 5"
