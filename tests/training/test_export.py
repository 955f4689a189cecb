"""Exported towers equal the model, also for other batch sizes and lengths than the example's."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch

from modeling_vljepa.x_encoder import VIDEO
from tests.docs import fenced
from tests.tiny import (
    BERT,
    PERCEPTION,
    PERCEPTION_TEXT,
    VJEPA21,
    noise,
    run_elsewhere,
    tiny_batch,
    tiny_model,
    tiny_processor,
    write_clip,
)
from training.arguments import RecipeError
from training.export import check_lengths, export, main

pytestmark = pytest.mark.slow  # tracing a model takes seconds

BATCH = tiny_batch()


def save(folder: Path, **changes: object) -> torch.nn.Module:
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return model


# The window of the example's Gemma is shorter than most texts, that of the wide one longer than the
# text that is traced. Each could become a program for such lengths only.
MODELS = {
    "gemma": {},
    "gemma_wide_perception": {
        "text_config": {"sliding_window": 512},
        "vision_config": PERCEPTION,
        "predictor_pooling": "attention",
    },
    # 3 x 3 patches: windows at the edges are incomplete.
    "bert_pooled_vjepa21": {
        "text_config": BERT,
        "vision_config": VJEPA21 | {"crop_size": 48},
        "visual_token_pooling": 2,
        "predictor_pooling": "query",
    },
}


def as_onnx(path: Path) -> Callable[..., torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        arrays = (tensor.numpy() for tensor in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_exported_programs_equal_the_model_at_every_length(changes, tmp_path):
    model = tiny_model(**changes)
    vision = model.config.vision_config
    side = vision.crop_size if vision.model_type in VIDEO else vision.image_size
    programs = export(model, 4, side)
    runs = {name: [program.module()] for name, program in programs.items()}
    for name, program in programs.items():
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / name)
        runs[name].append(as_onnx(tmp_path / name))
    generator = torch.Generator().manual_seed(0)
    for rows, length, padding in ((3, 5, 2), (1, 1, 0), (2, 0, 0), (1, 400, 0), (2, 400, 390)):
        ids = torch.randint(3, 300, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - padding :] = 0
        pixels = torch.randn(rows, 4, 3, side, side, generator=generator)
        cases = {"predict": (pixels, ids, mask)}
        if length:
            cases["encode_target"] = ids, mask
        for name, inputs in cases.items():
            with torch.no_grad():
                expected = getattr(model, name)(*inputs)
                for run in runs[name]:
                    torch.testing.assert_close(run(*inputs), expected, rtol=0, atol=1e-5)

    weights = {
        name: {key.split(".")[1] for key in program.state_dict}
        for name, program in programs.items()
    }
    assert weights["predict"] == {"x_encoder", "predictor", "predictor_head"}
    assert weights["encode_target"] == {"y_encoder", "y_head"}

    longest = {"predict": 9, "encode_target": 400}
    check_lengths(model, programs, 4, side, longest)
    with pytest.raises(RecipeError, match="--model: predict of 1 rows of 0 tokens is .* away from"):
        check_lengths(tiny_model(1, **changes), programs, 4, side, longest)


def test_exported_programs_of_images_and_of_a_perception_encoders_texts_equal_the_model():
    """One frame takes V-JEPA 2.1's stem of images, and the text tower is causal."""
    model = tiny_model(vision_config=VJEPA21, text_config=PERCEPTION_TEXT, text_pooling="lasttoken")
    programs = export(model, 1, 32)
    generator = torch.Generator().manual_seed(0)
    for rows, length, padding in ((3, 5, 2), (1, 32, 0)):
        ids = torch.randint(3, 300, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - padding :] = 0
        pixels = torch.randn(rows, 1, 3, 32, 32, generator=generator)
        for name, inputs in {"predict": (pixels, ids, mask), "encode_target": (ids, mask)}.items():
            with torch.no_grad():
                expected = getattr(model, name)(*inputs)
                found = programs[name].module()(*inputs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_export_writes_programs_of_torch(tmp_path):
    model = save(tmp_path / "model", text_config=BERT)
    out = tmp_path / "out"
    paths = main(["--model", str(tmp_path / "model"), "--output", str(out)])
    assert paths == [out / "predict.pt2", out / "encode_target.pt2"]
    target = BATCH["target_input_ids"], BATCH["target_attention_mask"]
    with torch.no_grad():
        found = torch.export.load(paths[1]).module()(*target)
        torch.testing.assert_close(found, model.encode_target(*target), rtol=0, atol=1e-5)
    # Weights in fp32, and a program: the X-Encoder and the Predictor are not in it.
    stored = 4 * sum(weight.numel() for weight in model.y_encoder.parameters())
    assert stored < paths[1].stat().st_size < 1.2 * stored + 700_000


def test_exported_folder_answers_by_itself(tmp_path):
    """The example of the README runs in a process that has neither this package nor the model."""
    model = save(tmp_path / "model")
    main(
        ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "exported")]
        + ["--format", "onnx"]
    )
    clip = write_clip(tmp_path / "clip.mp4", noise(6, 40, 50, 3))
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    blocks = [block for language, block in fenced("README.md") if "InferenceSession" in block]
    assert len(blocks) == 1
    assert blocks[0].count("\n") <= 14
    clips = "data/demo/babyai/clips/test_*.mp4"
    assert clips in blocks[0]
    printed = run_elsewhere(blocks[0].replace(clips, str(clip)), tmp_path)
    processor = tiny_processor()
    asked = processor(videos=clip, text="How many balls are there?")
    answers = ["zero", "one", "two", "three", "four"]
    with torch.no_grad():
        scores = model.predict(**asked) @ model.encode_target(**processor(targets=answers)).T
    assert printed == answers[scores.argmax()]


def test_export_names_a_missing_model(tmp_path):
    with pytest.raises(RecipeError, match="--model: cannot load .*nowhere as a folder or Hub id"):
        main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
