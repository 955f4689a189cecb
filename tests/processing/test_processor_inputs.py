"""Inputs of the processor that are unusual or wrong: the right batch, or an error that names the
argument and the cure. A fuzz combines them."""

import random
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from processing import Excerpt, MediaError, VLJEPAProcessor, VLJEPAVideoProcessor
from processing.options import CHECKS
from tests.tiny import noise, tiny_processor, tiny_tokenizer, write_clip

ROOT = Path(__file__).parents[2]
FRAMES = noise(6, 40, 50, 3)


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


# -- clips and images ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arrays", "tuple", "tensors", "pictures", "iterator"])
def test_processor_takes_a_list_of_frames_as_one_clip(processor, kind):
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    frames = {
        "arrays": list(FRAMES),
        "tuple": tuple(FRAMES),
        "tensors": list(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)),
        "pictures": pictures,
        "iterator": iter(pictures),
    }[kind]
    expected = processor(videos=FRAMES)["pixel_values_videos"]
    found = processor(videos=frames)["pixel_values_videos"]
    assert found.shape == (1, 4, 3, 32, 32)
    # Each memory layout has its own kernel; a grey level is 1 / (255 * 0.225).
    torch.testing.assert_close(found, expected, rtol=0, atol=0.018)
    if kind != "iterator":
        two = processor(videos=[frames, frames])["pixel_values_videos"]
        torch.testing.assert_close(two, found.expand_as(two), rtol=0, atol=1e-6)


SET = {"a.mp4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"videos": {"array": FRAMES}}, "^videos is a dict: give a path, bytes, a uint8 array or"),
        ({"videos": np.uint8(3)}, "^videos is a uint8: give a path"),
        ({"videos": 3}, "^videos is a int: give a path"),
        ({"videos": SET}, "^videos is a set: give a path"),
        ({"videos": Image.fromarray(FRAMES[0])}, "^videos is a Image: give a path"),
        ({"videos": np.array(3, np.uint8)}, r"^a clip is an array .*shape \(\)"),
        ({"videos": torch.tensor(3)}, r"^a clip is an array .*shape \(\)"),
        ({"videos": [None]}, "^a clip is a NoneType: give a path"),
        ({"videos": ["a", None]}, "^a: no such file"),
        ({"videos": [FRAMES, {}]}, r"^videos\[1\]: a clip is a dict: give a path"),
        ({"videos": [FRAMES[0], None]}, "^a frame of a clip is a NoneType: give PIL images"),
        ({"videos": [FRAMES[0], FRAMES[0].tolist()]}, "^a frame of a clip is a list: give PIL"),
        ({"videos": [FRAMES[0], FRAMES[0, :9]]}, "^the frames of a clip have 50 x 40 and 50 x 9"),
        ({"videos": [FRAMES[0], FRAMES[0] / 255]}, "^a frame holds uint8 pixels .* got float64"),
        ({"videos": FRAMES[:, :0]}, r"^a clip has no pixels, got shape \(6, 0, 50, 3\)"),
        ({"videos": FRAMES[:, :, :0]}, r"^a clip has no pixels, got shape \(6, 40, 0, 3\)"),
        ({"videos": FRAMES[:0]}, r"^a clip has no pixels, got shape \(0, 40, 50, 3\)"),
        ({"videos": FRAMES.astype(object)}, "^a clip holds uint8 pixels .* got object"),
        ({"videos": Excerpt(3)}, "^an excerpt is of a int: give the path"),
        ({"videos": Excerpt("a", "0")}, "^a: start is '0'. Give a number of seconds"),
        ({"images": {"array": FRAMES}}, "^images is a dict: give a path, bytes, a PIL image, or"),
        ({"images": SET}, "^images is a set: give a path"),
        ({"images": 3.5}, "^images is a float: give a path"),
        ({"images": np.array(3, np.uint8)}, r"^an image is an array .*shape \(\)"),
        ({"images": FRAMES[0, :, :, 0]}, r"^an image is an array \(H, W, 3\) .*shape \(40, 50\)"),
        ({"images": FRAMES[0, :0]}, r"^an image has no pixels, got shape \(0, 50, 3\)"),
        ({"images": FRAMES[0] / 255}, "^an image holds uint8 pixels .* got float64"),
        ({"images": [FRAMES[0], None]}, r"^images\[1\]: an image is a NoneType: give a path"),
        ({"images": Image.new("RGB", (0, 4))}, "^the image: 0 x 4 pixels. Give at least 1 x 1"),
        ({"images": Image.new("F", (4, 4))}, "^the image: its pixels are fractions of unknown"),
    ],
)
def test_processor_names_an_unusable_medium(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor(**given)


def test_processor_escapes_half_a_character_in_the_name_of_a_file(processor):
    """Otherwise the message itself could not be printed, or sent as UTF-8."""
    for part in ("images", "videos"):
        with pytest.raises(MediaError, match="no such file") as found:
            processor(**{part: "cut \ud83d.mp4"})
        assert str(found.value).startswith("cut \\ud83d.mp4: ")
        str(found.value).encode()


# -- numbers and names ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_query_length", "max_target_length", "num_frames"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", float("nan"), [8]])
def test_processor_refuses_a_count_that_is_not_a_whole_number(processor, name, value):
    """Without a check, a `max_query_length` of 0 means 512, and `True` means 1."""
    message = rf"^{name} is .*: give a whole number of at least 1$"
    with pytest.raises(ValueError, match=message):
        processor(videos=FRAMES, text="a", targets="a", **{name: value})
    if name != "num_frames":
        tokenizers = tiny_tokenizer(), tiny_tokenizer()
        with pytest.raises(ValueError, match=message):
            VLJEPAProcessor(processor.video_processor, *tokenizers, **{name: value})


def test_processor_takes_counts_of_numpy(processor):
    batch = processor(
        videos=FRAMES, text="a b c d", num_frames=np.int64(2), max_query_length=np.int64(3)
    )
    assert batch["pixel_values_videos"].shape[1] == 2
    assert batch["input_ids"].shape == (1, 3)


def test_processor_refuses_more_frames_than_memory_may_hold(processor):
    with pytest.raises(ValueError, match="num_frames is 1000000000: give at most 10000"):
        processor(videos=FRAMES, num_frames=10**9)


def test_processor_refuses_a_length_without_room_for_the_tokens_of_a_tokenizer(processor):
    with pytest.raises(ValueError, match="max_target_length is 1, but the tokenizer adds 2 tokens"):
        processor(targets="a", max_target_length=1)
    assert processor(targets="a", max_target_length=2)["target_input_ids"].shape == (1, 2)


def test_processor_takes_a_length_beyond_that_of_tokenizers():
    endless = tiny_tokenizer(max_length=int(1e30))  # what transformers sets if it knows no limit
    processor = VLJEPAProcessor(VLJEPAVideoProcessor(), endless, endless)
    assert processor(text="a", max_query_length=10**30)["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("name", ["", "other", ["retrieval"], 3])
def test_processor_refuses_an_unknown_target_prompt_per_call(name):
    video_processor = VLJEPAVideoProcessor(crop_size=32)
    processor = VLJEPAProcessor(
        video_processor,
        tiny_tokenizer(),
        tiny_tokenizer(),
        target_prompts={"retrieval": "query: "},
        target_prompt_name="retrieval",
    )
    with pytest.raises(ValueError, match=r"there is no target prompt .*, only \['retrieval'\]"):
        processor(targets="a", target_prompt_name=name)


@pytest.mark.parametrize("value", ["tf", None, ["pt"], np.array(["pt", "pt"])])
def test_processor_refuses_other_kinds_of_tensors(processor, value):
    with pytest.raises(ValueError, match="return_tensors must be 'pt' or 'np', got"):
        processor(text="a", return_tensors=value)


def test_video_processor_warns_once_that_a_whole_number_as_size_squashes(caplog):
    """transformers makes a square of an `int`; its other processors keep the aspect ratio."""
    for _ in range(2):
        squashing = VLJEPAVideoProcessor(crop_size=32, size=37)
    VLJEPAVideoProcessor(crop_size=32, size={"height": 37, "width": 37})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("size=37 squashes frames to a square, as in transformers. Give ")
    assert (squashing.size["height"], squashing.size["width"]) == (37, 37)


# -- options -------------------------------------------------------------------------------


def test_processor_returns_arrays_equal_to_its_tensors(processor):
    parts = {"videos": FRAMES, "text": "what ?", "targets": "a", "contexts": "b"}
    tensors, arrays = processor(**parts), processor(**parts, return_tensors="np")
    assert arrays.keys() == tensors.keys()
    assert len(arrays) == 7
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray)
        torch.testing.assert_close(torch.from_numpy(array), tensors[name], rtol=0, atol=1e-6)
    mixed = processor(**parts, videos_kwargs={"return_tensors": "np"})
    assert isinstance(mixed["pixel_values_videos"], np.ndarray)
    assert isinstance(mixed["input_ids"], torch.Tensor)


@pytest.mark.parametrize("array", [False, True])
def test_video_processor_returns_arrays_on_request(processor, array):
    pixels = processor.video_processor([FRAMES, FRAMES], return_tensors="np" if array else "pt")
    assert isinstance(pixels["pixel_values_videos"], np.ndarray if array else torch.Tensor)
    assert pixels["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    assert str(pixels["pixel_values_videos"].dtype).removeprefix("torch.") == "float32"


IDS = [[1, 285], [1, 285, 290, 223]]  # of "what" and "what is "


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [[1, 285, 0, 0], IDS[1]]),
        ({"padding": "longest", "max_length": 3}, [[1, 285, 0], IDS[1][:3]]),
        ({"padding": "max_length", "max_length": 6}, [IDS[0] + [0] * 4, IDS[1] + [0] * 2]),
        ({"padding": "max_length", "max_query_length": 5}, [IDS[0] + [0] * 3, IDS[1] + [0]]),
        ({"pad_to_multiple_of": 3}, [IDS[0] + [0] * 4, IDS[1] + [0] * 2]),
        ({"pad_to_multiple_of": 3, "max_length": 5}, [[1, 285, 0], IDS[1][:3]]),
        ({"padding": False, "max_length": 2}, [IDS[0], IDS[1][:2]]),
        ({"add_special_tokens": False}, [[285, 0, 0], IDS[1][1:]]),
        ({"truncation": False, "max_length": 2}, [[1, 285, 0, 0], IDS[1]]),
        ({"truncation": None, "max_length": 2}, [IDS[0], IDS[1][:2]]),
    ],
)
@pytest.mark.parametrize("layout", ["flat", "text_kwargs", "common_kwargs"])
def test_processor_takes_options_of_queries(processor, options, ids, layout):
    own = {name: value for name, value in options.items() if name == "max_query_length"}
    options = {name: value for name, value in options.items() if name not in own}
    given = options if layout == "flat" else {layout: options}
    batch = processor(text=["what", "what is "], **given, **own)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].sum(1).tolist() == [sum(i > 0 for i in row) for row in ids]


def test_processor_takes_options_that_its_query_tokenizer_was_created_with(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding="max_length", max_length=7)
    created = VLJEPAProcessor(processor.video_processor, tokenizer, tiny_tokenizer())
    assert created(text="what")["input_ids"].shape == (1, 7)
    assert created(text="what", padding=True)["input_ids"].shape == (1, 2)
    assert created(text="what", max_length=9)["input_ids"].shape == (1, 9)
    created.max_query_length = 5  # the lower limit holds
    assert created(text="what is it")["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("part", ["images", "videos"])
@pytest.mark.parametrize("layout", ["flat", "nested", "common"])
def test_processor_takes_options_of_pixels(processor, part, layout):
    options = {"do_resize": False, "do_normalize": False, "rescale_factor": 0.5, "crop_size": 20}
    given = {"flat": options, "nested": {f"{part}_kwargs": options}}
    medium = {"images": FRAMES[0], "videos": FRAMES}[part]
    batch = processor(**{part: medium}, **given.get(layout, {"common_kwargs": options}))
    corner = torch.from_numpy(FRAMES[0, 10:30, 15:35]).permute(2, 0, 1) * 0.5
    torch.testing.assert_close(batch["pixel_values_videos"][0, 0], corner, rtol=0, atol=1e-6)


def test_processor_prefers_the_options_of_a_modality_to_common_ones(processor):
    common = {"num_frames": 2, "return_tensors": "np"}
    batch = processor(videos=FRAMES, common_kwargs=common, videos_kwargs={"num_frames": 3})
    assert isinstance(batch["pixel_values_videos"], np.ndarray)
    assert batch["pixel_values_videos"].shape[1] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padded": True}, "^VLJEPAProcessor does not support padded: leave it out$"),
        ({"stride": 2}, "^VLJEPAProcessor does not support stride: leave it out$"),
        ({"padding_side": "left"}, "does not support padding_side: leave it out$"),
        ({"audio": FRAMES}, "^VLJEPAProcessor does not support audio: leave it out$"),
        ({"return_offsets_mapping": True}, "does not support return_offsets_mapping: leave"),
        ({"images_kwargs": {"do_pad": True}}, "^images_kwargs does not support do_pad: leave"),
        ({"images_kwargs": {"num_frames": 2}}, "^images_kwargs does not support num_frames: leave"),
        ({"images_kwargs": {"pad_size": 2, "device": "cpu"}}, "support device, pad_size: leave"),
        ({"videos_kwargs": {"fps": 2}}, "^videos_kwargs does not support fps: leave it out$"),
        ({"text_kwargs": {"do_resize": True}}, "^text_kwargs does not support do_resize: leave"),
        ({"common_kwargs": {"text_pair": "a"}}, "^common_kwargs does not support text_pair: leave"),
    ],
)
def test_processor_names_an_option_that_it_does_not_have(processor, options, message):
    with pytest.raises(TypeError, match=message):
        processor(videos=FRAMES, text="a", **options)
    switched_off = {"audio": None, "return_token_type_ids": False, "videos_kwargs": {"fps": None}}
    assert processor(videos=FRAMES, text="a", **switched_off)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "left"}, "^padding is 'left': give True, False or 'max_length'$"),
        ({"padding": False, "text": ["a", "b c"]}, "^the texts of a batch have 2 and 3 tokens: "),
        ({"truncation": 3}, "^truncation is 3: give True or False$"),
        ({"max_length": 0}, "^max_length is 0: give a whole number of at least 1$"),
        ({"max_length": 9, "max_query_length": 9}, "^max_length is another name of max_query_l"),
        ({"pad_to_multiple_of": 10**9}, "^pad_to_multiple_of is 1000000000: give at most 1048576$"),
        ({"pad_to_multiple_of": 999}, "^pad_to_multiple_of is 999, more than the limit of a text"),
        ({"text_kwargs": 3}, "^text_kwargs is 3: give a dictionary of options$"),
        ({"text_kwargs": {"padding": True}, "padding": True}, "^padding is given twice, in text_k"),
        ({"do_resize": 1}, "^do_resize is 1: give True or False$"),
        ({"size": {"longest_edge": 9}}, "^size is .*: give a shortest_edge, or a height and a wid"),
        ({"size": 0}, "^size is 0: give a whole number of at least 1$"),
        ({"crop_size": {"shortest_edge": 9}}, "^crop_size is .*: give a height and a width$"),
        ({"crop_size": 10**5}, "^crop_size is 100000: give at most 33554432 pixels$"),
        ({"resample": 0}, r"^resample is 0: give BILINEAR \(2\) or BICUBIC \(3\)$"),
        ({"rescale_factor": float("nan")}, "^rescale_factor is nan: give a finite number$"),
        ({"image_mean": [0, 1]}, r"^image_mean is \[0, 1\]: give one number or three, for the ch"),
        ({"image_std": [1, 0, 1]}, "^image_std is .*: pixels are divided by it, so do not give 0$"),
        ({"do_center_crop": False, "videos": [FRAMES, FRAMES[:, :30]]}, "need one size, got 45 x"),
    ],
)
def test_processor_names_an_option_with_a_wrong_value(processor, options, message):
    texts = options.get("text", ["a"] * len(options.get("videos", ["a"])))
    with pytest.raises(ValueError, match=message):
        processor(**{"videos": [FRAMES] * len(texts), "text": texts} | options)
    if options.keys() < {"size", "resample", "do_resize", "crop_size", "rescale_factor"}:
        with pytest.raises(ValueError, match=message):
            VLJEPAVideoProcessor(**options)
        with pytest.raises(ValueError, match=message):
            processor.video_processor(FRAMES, **options)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ({"targets": "a"}, {"max_length": 3}),
        ({"images": FRAMES[0]}, {"num_frames": 2}),
        ({"text": "a"}, {"do_rescale": False}),
    ],
)
def test_processor_refuses_an_option_of_a_part_that_is_not_given(processor, part, options):
    with pytest.raises(ValueError, match="is an option of .*, but this call has none: leave it"):
        processor(**part, **options)
    nested = {"text_kwargs": {"max_length": 3}, "videos_kwargs": {"num_frames": 2}}
    assert processor(**part, **nested)  # settings for every call


# -- conversations -------------------------------------------------------------------------


def turn(*parts: object, role: str = "user") -> list[dict]:
    return [{"role": role, "content": list(parts)}]


VIDEO = {"type": "video", "video": FRAMES}
QUESTION = {"type": "text", "text": "what is {{ it }} ?"}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([VIDEO, QUESTION], {"videos": [FRAMES], "text": [QUESTION["text"]]}),
        ([QUESTION, VIDEO], {"videos": [FRAMES], "text": [QUESTION["text"]]}),
        ([VIDEO], {"videos": [FRAMES], "text": [""]}),
        ([QUESTION], {"text": [QUESTION["text"]]}),
        ([{"type": "image", "image": FRAMES[0]}, QUESTION], {"images": [FRAMES[0]], "text": "?"}),
        ([{"type": "image", "url": "image.png"}], {"images": ["image.png"], "text": [""]}),
        ([{"type": "image_url", "image_url": {"url": "image.png"}}], {"images": "image.png"}),
        ([{"type": "video", "path": "clip.mp4"}], {"videos": ["clip.mp4"], "text": [""]}),
    ],
)
def test_chat_template_gives_the_batch_of_a_question_and_its_medium(
    processor, folder, monkeypatch, parts, expected
):
    monkeypatch.chdir(folder)
    expected = expected | {"text": [part["text"] for part in parts if part is QUESTION] or [""]}
    options = {"return_tensors": "np", "processor_kwargs": {"padding": "max_length"}}
    for conversation in (turn(*parts), [turn(*parts)]):
        batch = processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            tools=None,
            **options,
        )
        reference = processor(**expected, padding="max_length", return_tensors="np")
        assert batch.keys() == reference.keys()
        for name, array in reference.items():
            np.testing.assert_allclose(batch[name], array, rtol=0, atol=1e-6)
    assert processor.apply_chat_template(turn(*parts)) == expected["text"][0]
    assert processor.apply_chat_template([turn(*parts)]) == expected["text"]
    ids = processor.apply_chat_template(turn(*parts), tokenize=True)
    assert ids.tolist() == processor(text=expected["text"])["input_ids"].tolist()


def test_chat_template_is_saved_and_loaded(processor, tmp_path):
    again = tiny_processor()
    again.tokenizer.chat_template = "{{ messages }}"  # a language model's own
    again.save_pretrained(tmp_path / "default")
    again.chat_template = "{{ messages[0]['content'][-1]['text'] }} Answer briefly."
    again.save_pretrained(tmp_path / "own")
    for name, expected in (("default", "why ?"), ("own", "why ? Answer briefly.")):
        loaded = VLJEPAProcessor.from_pretrained(tmp_path / name)
        assert (
            loaded.apply_chat_template(turn(VIDEO, {"type": "text", "text": "why ?"})) == expected
        )


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (
            [SYSTEM, *turn(QUESTION)],
            "conversation has the turns 'system', 'user': give one user tu",
        ),
        (turn(QUESTION) * 2, "conversation has the turns 'user', 'user': give one user turn, bec"),
        (turn(QUESTION, role="assistant"), "conversation has the turns 'assistant': give one user"),
        ([turn(QUESTION), turn(QUESTION) * 2], r"conversation\[1\] has the turns 'user', 'user': "),
        ([], "conversation is not a list of messages: give a list with one message"),
        ("what ?", "conversation is not a list of messages: give a list with one message"),
        (["what ?"], r"conversation\[0\] is not a message with a role: give a list"),
        ([turn(QUESTION), {}], r"conversation\[1\] is not a list of messages: give a list"),
        ([{"role": "user"}], r"conversation\[0\]\['content'\] is a NoneType: give a string or a"),
        (turn("what ?"), r"conversation\[0\]\['content'\]\[0\] has no type: give"),
        (turn({"type": "audio", "url": "a"}), "is of type 'audio': give text, image or video"),
        (turn({"type": "video", "video": "a", "fps": 2}), "has 'video', 'fps': give its type and"),
        (turn({"type": "image", "base64": "a"}), r"has 'base64': give its type and one of \['im"),
        (turn(QUESTION, QUESTION), "has 2 texts and 0 images and videos: give at most one of each"),
        (turn(VIDEO, VIDEO), "has 0 texts and 2 images and videos: give at most one of each"),
        (turn({"type": "text", "text": "\ud83d"}), "a text, holds half a character"),
        (turn({"type": "text"}), "has nothing: give its type and one of"),
        (turn({"type": "video"}), "a part of the conversation names no file: give it as url or p"),
        ([turn(VIDEO), turn(QUESTION)], "a batch of conversations needs media of one kind"),
    ],
)
def test_chat_template_refuses_other_conversations(processor, conversation, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def test_chat_template_takes_a_placeholder_for_a_medium_given_elsewhere(processor):
    question = processor.apply_chat_template(turn({"type": "video"}, QUESTION))
    assert question == QUESTION["text"]
    with pytest.raises(ValueError, match="a question has no tools: leave it out"):
        processor.apply_chat_template(turn(QUESTION), tools=[{"name": "a"}])


# -- fuzz ----------------------------------------------------------------------------------

DTYPES = (np.uint8, np.int8, np.int64, np.float32, np.float64, np.bool_, np.complex64, object)
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16")


def some_array(pick: random.Random) -> np.ndarray | torch.Tensor:
    """Return an array or tensor of any number of axes, any size from 0 and any dtype."""
    if pick.random() < 0.4:  # a valid layout
        shape = [pick.choice([1, 2, 5])] * pick.choice([0, 1]) + [pick.choice([0, 1, 9, 70]), 40, 3]
    else:
        shape = [pick.choice([0, 1, 2, 3, 9]) for _ in range(pick.randrange(7))]
    dtype = np.uint8 if pick.random() < 0.6 else pick.choice(DTYPES)
    array = np.full(shape, pick.choice([0, 1, 200]), np.uint8).astype(dtype)
    if array.dtype.kind == "f" and array.size:
        array.flat[0] = pick.choice([np.nan, np.inf, 0.5])
    if array.dtype == object or pick.random() < 0.6:
        return array[..., ::-1] if array.ndim and pick.random() < 0.2 else array
    tensor = torch.from_numpy(array)
    return tensor.movedim(-1, -3) if tensor.ndim > 2 and pick.random() < 0.7 else tensor


def some_text(pick: random.Random) -> str:
    parts = ["", "a", "what ?", "\ud83d", "\udc00", "\0", "\U0001f6b2", "\n", "<bos>", "é" * 40]
    return "".join(pick.choice(parts) for _ in range(pick.randrange(4)))


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError):  # a folder, or a name that cannot exist
        return b""


def some_path(pick: random.Random, folder: Path) -> object:
    names = ["clip.mp4", "image.png", "frames", "text.txt", "empty", "gone.mp4", "", "\0", "\ud83d"]
    path = folder / pick.choice(names)
    kinds: list[Callable[[], object]] = [
        lambda: path,
        lambda: str(path),
        lambda: PurePosixPath(path),
        lambda: (
            path.read_bytes() if path.name and "\0" not in path.name and path.is_file() else b""
        ),
        lambda: Excerpt(path, pick.choice([None, 0, 0.2, -1, float("nan"), "0"]), 0.5),
        lambda: f"https://127.0.0.1/{path.name}",
    ]
    return pick.choice(kinds)()


def some_picture(pick: random.Random) -> Image.Image:
    return Image.new(pick.choice(MODES), (pick.choice([0, 1, 30]), pick.choice([1, 40])))


def some_value(pick: random.Random, folder: Path, depth: int = 0) -> object:
    """Return any value, often a list of values of one kind or of several kinds."""
    kinds: list[Callable[[], object]] = [
        lambda: some_array(pick),
        lambda: some_text(pick),
        lambda: some_path(pick, folder),
        lambda: some_picture(pick),
        lambda: pick.choice(
            [None, True, 0, -1, 3, 1.5, float("nan"), 10**30, b"", b"x", np.uint8(3), np.str_("a")]
        ),
        lambda: pick.choice([{}, {"a": 1}, set(), {"a"}, object(), range(2), [], (), ..., str]),
    ]
    if depth < 2 and pick.random() < 0.4:
        one = pick.choice(kinds) if pick.random() < 0.7 else None
        count = pick.randrange(4)
        values = [
            one() if one is not None else some_value(pick, folder, depth + 1) for _ in range(count)
        ]
        return pick.choice([list, tuple, iter])(values)
    return pick.choice(kinds)()


def good_clip(pick: random.Random) -> object:
    clip = noise(pick.choice([1, 3]), pick.choice([1, 20, 40]), pick.choice([2, 30, 900]), 3)
    kinds = [clip, list(clip), torch.from_numpy(clip).permute(0, 3, 1, 2)]
    return pick.choice([*kinds, [Image.fromarray(frame) for frame in clip]])


def some_call(pick: random.Random, folder: Path) -> dict[str, object]:
    """Return arguments of the processor; half of the calls have one of any kind."""
    good: dict[str, Callable[[], object]] = {
        "videos": lambda: good_clip(pick),
        "images": lambda: Image.new(pick.choice(MODES[:5]), (pick.choice([1, 30]), 40)),
        "text": lambda: pick.choice(["", "what ?", ["a" * 900]]),
        "targets": lambda: ["a"],
        "contexts": lambda: "a \U0001f6b2",
        "num_frames": lambda: pick.choice([1, 2, 5]),
        "max_query_length": lambda: pick.choice([1, 2, 600]),
        "max_target_length": lambda: pick.choice([2, 10**30]),
        "return_tensors": lambda: pick.choice(["pt", "np"]),
    }
    names = {pick.choice(["images", "videos", "text"])}
    names |= {name for name in list(good)[2:] if pick.random() < 0.2}
    call = {name: good[name]() for name in sorted(names)}
    if pick.random() < 0.6:
        name = pick.choice([*names, "videos", "images", "target_prompt_name"])
        call[name] = some_value(pick, folder)
    if pick.random() < 0.4:
        name = pick.choice([*CHECKS, "stride", "do_pad"])
        value = some_option(pick) if pick.random() < 0.8 else some_value(pick, folder)
        modality = pick.choice(
            [None, "text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"]
        )
        call |= {name: value} if modality is None else {modality: {name: value}}
    return call


def some_option(pick: random.Random) -> object:
    sizes = [None, 0, 1, 20, -5, 2**40, True, np.int64(9)]
    edges = ["height", "width", "shortest_edge", "longest_edge"]
    kinds: list[Callable[[], object]] = [
        lambda: pick.choice([True, False, None]),
        lambda: pick.choice(sizes),
        lambda: pick.choice(["longest", "max_length", "do_not_pad", "longest_first", "np", ""]),
        lambda: pick.choice([0.5, -1.0, float("nan"), float("inf"), 0]),
        lambda: {edge: pick.choice(sizes) for edge in pick.sample(edges, pick.randrange(4))},
        lambda: [pick.choice([0, 0.5, 1, None, "a"]) for _ in range(pick.randrange(4))],
    ]
    return pick.choice(kinds)()


OURS = tuple(str(ROOT / folder) for folder in ("processing", "modeling_vljepa"))


def outcome(processor: VLJEPAProcessor, call: dict[str, object]) -> str:
    """Return "batch" or "error"; fail for an error that is not raised by this project's code."""
    shown = {name: repr(value)[:300] for name, value in call.items()}
    try:
        batch = processor(**call)
    except (ValueError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        message = str(error)
        assert place.startswith(OURS), f"{place}: {error!r} for {shown}"
        assert "\n" not in message, f"{error!r} for {shown}"
        assert 20 < len(message) < 600, f"{error!r} for {shown}"
        message.encode()  # can be printed, and sent as an answer
        return "error"
    except Exception as error:
        raise AssertionError(f"{error!r} for {shown}") from error
    assert batch
    for name, tensor in batch.items():
        assert isinstance(tensor, torch.Tensor | np.ndarray), name
        assert torch.as_tensor(tensor).isfinite().all(), name
    return "batch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", FRAMES)
    (folder / "frames").mkdir()
    for path in (folder / "image.png", folder / "frames" / "0.png"):
        Image.fromarray(FRAMES[0]).save(path)
    (folder / "text.txt").write_text("text")
    (folder / "empty").touch()
    return folder


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 150), pytest.param(150, 2400, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_processor_returns_a_batch_or_its_own_error(processor, folder, start, count):
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about odd pictures
        for seed in range(start, start + count):
            found.append(outcome(processor, some_call(random.Random(seed), folder)))
    # Positive control: the calls are neither all right nor all wrong.
    assert min(found.count("batch"), found.count("error")) > 0.1 * count


# -- labels of a language model ------------------------------------------------------------


def test_text_labels_end_every_text_and_pad_with_ignored_labels():
    processor = tiny_processor()
    tokens = processor.tokenizer(["red", "", "a cat sits"], add_special_tokens=False)["input_ids"]
    longest = len(tokens[2])
    for limit in (512, longest, 2, 1):
        processor.max_target_length = limit
        labels = processor.text_labels(["red", "", "a cat sits"])
        expected = [[*ids[: limit - 1], 2] for ids in tokens]
        width = max(map(len, expected))
        assert labels.tolist() == [ids + [-100] * (width - len(ids)) for ids in expected]


def test_text_labels_need_an_end_token():
    processor = tiny_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="^the query tokenizer has no eos_token"):
        processor.text_labels(["red"])
