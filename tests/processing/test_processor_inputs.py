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

from processing import Excerpt, MediaError, VLJEPAProcessor, VLJEPAVideoProcessor
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


@pytest.mark.parametrize("value", ["np", None, ["pt"], np.array(["pt", "pt"])])
def test_processor_refuses_other_kinds_of_tensors(processor, value):
    with pytest.raises(ValueError, match="return_tensors must be 'pt'"):
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
        "return_tensors": lambda: "pt",
    }
    names = {pick.choice(["images", "videos", "text"])}
    names |= {name for name in list(good)[2:] if pick.random() < 0.2}
    call = {name: good[name]() for name in sorted(names)}
    if pick.random() < 0.6:
        name = pick.choice([*names, "videos", "images", "target_prompt_name"])
        call[name] = some_value(pick, folder)
    return call


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
        assert isinstance(tensor, torch.Tensor), name
        assert tensor.isfinite().all(), name
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
