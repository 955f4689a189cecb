"""Stored outputs of a frozen Y-Encoder: equal to computed ones, by content, complete or missing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.output import OutputError
from tests.full_disk import message_on_a_full_disk
from tests.tiny import tiny_model, tiny_processor, tiny_tokenizer
from training.data import target_states
from training.data.target_states import read_target_states
from training.model.adapters import store_frozen_in_bf16

TEXTS = ["a cat", "red", "the door opens", "he rides a bike", "a cat", "a man and his two dogs"]
DISTINCT = 5


@pytest.fixture(scope="module")
def frozen() -> VLJEPAModel:
    return tiny_model(freeze_text=True)


@pytest.fixture(scope="module")
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Numbers of texts of the passes of the Y-Encoder."""
    passes, encode = [], target_states.encode_texts

    def counted(model, processor, texts, dtype):
        passes.append(len(texts))
        return encode(model, processor, texts, dtype)

    monkeypatch.setattr(target_states, "encode_texts", counted)
    return passes


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("[0-9a-f]*.safetensors"))


@pytest.mark.parametrize("bf16", [False, True])
def test_target_states_are_those_of_the_y_encoder(tmp_path, processor, bf16):
    """In bf16, rounding to 8 bits moves a state by 1/256 of its size, and layers add to that."""
    model = tiny_model(freeze_text=True)
    if bf16:
        store_frozen_in_bf16(model)
    read_target_states(model, processor, TEXTS, tmp_path, bf16)
    states = read_target_states(model, processor, TEXTS, tmp_path, bf16)
    assert [*states] == sorted(set(TEXTS)) and len(states) == DISTINCT
    assert {state.dtype for state in states.values()} == {torch.bfloat16 if bf16 else torch.float32}
    for text in TEXTS:
        batch = processor(targets=[text])
        with torch.no_grad(), torch.autocast("cpu", enabled=bf16):
            expected = model.y_encoder(**{name[7:]: value for name, value in batch.items()})[0]
        tolerance = 0.02 if bf16 else 1e-5
        assert (states[text].float() - expected).norm() <= tolerance * expected.norm()
    assert (states["red"].float() - states["a cat"].float()).norm() > 0.05 * states["red"].norm()


def test_target_states_encode_only_texts_that_are_not_stored(tmp_path, frozen, processor, encoded):
    read_target_states(frozen, processor, TEXTS, tmp_path, False)
    assert sum(encoded) == DISTINCT
    encoded.clear()
    read_target_states(frozen, processor, TEXTS[::-1], tmp_path, False)
    assert encoded == [] and len(files(tmp_path)) == 1
    states = read_target_states(frozen, processor, [*TEXTS, "green"], tmp_path, False)
    assert encoded == [1] and len(states) == DISTINCT + 1


def other_weights(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    next(model.y_encoder.parameters()).data[5, 3] += 1e-6


def other_pooling(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    model.y_encoder.pooling = "cls"


def other_window(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    model.y_encoder.backbone.config.sliding_window = 3


def other_prompt(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    processor.target_prompts, processor.target_prompt_name = {"text": "text: "}, "text"


def other_limit(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    processor.max_target_length = 3


def other_tokenizer(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    processor.target_tokenizer = tiny_tokenizer()


@pytest.mark.parametrize(
    "change, count",
    [
        (other_weights, DISTINCT),
        (other_pooling, DISTINCT),
        (other_window, DISTINCT),
        (other_prompt, DISTINCT),
        (other_limit, 4),  # two texts have the same first tokens
        (other_tokenizer, DISTINCT),
    ],
)
def test_target_states_are_encoded_again_if_anything_that_decides_them_changes(
    tmp_path, encoded, change: Callable, count: int
):
    model, processor = tiny_model(freeze_text=True), tiny_processor()
    read_target_states(model, processor, TEXTS, tmp_path, False)
    encoded.clear()
    change(model, processor)
    read_target_states(model, processor, TEXTS, tmp_path, False)
    assert sum(encoded) == count


def test_target_states_of_other_precision_and_of_other_paths_are_known(
    tmp_path, frozen, processor, encoded
):
    read_target_states(frozen, processor, TEXTS, tmp_path, False)
    read_target_states(frozen, processor, TEXTS, tmp_path, True)
    assert encoded == [DISTINCT, DISTINCT]
    moved = tiny_model(freeze_text=True)
    moved.y_encoder.backbone.config._name_or_path = "elsewhere"
    read_target_states(moved, processor, TEXTS, tmp_path, False)
    assert encoded == [DISTINCT, DISTINCT]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    save_file({"keys": torch.zeros(5, 2, dtype=torch.long), "states": torch.zeros(5, 32)}, path)


def rename(path: Path) -> None:
    save_file({"other": torch.zeros(5)}, path)


@pytest.mark.parametrize("damage", [cut, empty, flip, replace, rename])
def test_target_states_of_a_damaged_file_are_encoded_again(
    tmp_path, frozen, processor, encoded, capsys, damage
):
    expected = dict(read_target_states(frozen, processor, TEXTS, tmp_path, False))
    expected = {text: state.clone() for text, state in expected.items()}
    (path,) = files(tmp_path)
    damage(path)
    encoded.clear()
    capsys.readouterr()
    states = read_target_states(frozen, processor, TEXTS, tmp_path, False)
    assert sum(encoded) == DISTINCT
    assert f"note: {path}: damaged (" in capsys.readouterr().out
    for text, state in expected.items():
        torch.testing.assert_close(states[text], state, rtol=0, atol=1e-5)
    read_target_states(frozen, processor, TEXTS, tmp_path, False)
    assert sum(encoded) == DISTINCT and capsys.readouterr().out == ""


def test_target_states_of_complete_files_outlast_a_killed_run(
    tmp_path, frozen, processor, encoded, monkeypatch
):
    """The run is killed before its second file gets its name."""
    monkeypatch.setattr(target_states, "TEXTS_PER_FILE", 2)
    move = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if files(tmp_path):
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        read_target_states(frozen, processor, TEXTS, tmp_path, False)
    assert len(files(tmp_path)) == 1 and len([*tmp_path.rglob("incomplete-*")]) == 1
    encoded.clear()
    states = read_target_states(frozen, processor, TEXTS, tmp_path, False)
    assert encoded == [2, 1] and len(states) == DISTINCT


def test_target_states_on_a_full_disk_name_the_folder_and_the_cure(tmp_path, frozen, processor):
    message = message_on_a_full_disk(
        lambda: read_target_states(frozen, processor, TEXTS, tmp_path, False), 300, OutputError
    )
    assert message.startswith(f"data.cache_dir: {tmp_path}/targets-")
    assert message.endswith("The states of earlier texts are kept.")


def test_target_states_share_a_pass_with_texts_of_their_length(
    tmp_path, frozen, processor, monkeypatch
):
    lengths, forward = [], frozen.y_encoder.forward

    def recorded(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths.append(mask.sum(dim=1).tolist())
        return forward(ids, mask)

    monkeypatch.setattr(frozen.y_encoder, "forward", recorded)
    monkeypatch.setattr(target_states, "TEXTS_PER_PASS", 2)
    read_target_states(frozen, processor, TEXTS, tmp_path, False)
    flat = [length for each in lengths for length in each]
    assert [len(each) for each in lengths] == [2, 2, 1]
    assert flat == sorted(flat, reverse=True)
