"""From published files to models that train, and that load in a process without this package."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from modeling_vljepa import VLJEPAModel
from tests import sources
from tests.model.perception_reference import encode_images
from tests.model.vjepa21_reference import encode
from tests.tiny import run_elsewhere, tiny_recipe, tiny_rows
from tests.training import test_perception_files as perception
from tests.training import test_vjepa21_files as vjepa21
from tests.training.test_perception_files import tiny_sizes  # noqa: F401 (a fixture)
from tests.training.test_vjepa21_files import tiny_size  # noqa: F401 (a fixture)
from training.init_checkpoint import main
from training.train import main as train

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from transformers import AutoModel, AutoProcessor
for folder in {folders!r}:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs, expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        found = [model.predict(inputs["video"]), model.predict(inputs["image"])]
        found.append(model.encode_target(**processor(targets=inputs["texts"])))
    assert max((a - b).abs().max() for a, b in zip(found, expected)) < 1e-5
    assert type(model.x_encoder.backbone).__module__.startswith("transformers_modules")
    print(type(model.x_encoder.backbone).__name__, processor.video_processor.crop_size["height"])
"""


def train_and_save(
    folder: Path, predictor: Path, parts: list[str], size: int | None
) -> VLJEPAModel:
    """Build a model from its parts, train it for two steps, and save it with its processor.

    Args:
        size: edge of the frames in training; default: the checkpoint's.
    """
    built = folder / "built"
    main([*parts, "--predictor", str(predictor), "--layers", "2", "--output", str(built)])
    recipe = tiny_recipe(tiny_rows(folder), max_steps=2)
    changes = [f"model.checkpoint={built}", "model.config={}"]
    trainer = train([str(recipe), *changes, f"processor.image_size={size or 'null'}"])
    assert trainer.state.global_step == 2
    trainer.model.eval().save_pretrained(folder / "saved")
    AutoProcessor.from_pretrained(built).save_pretrained(folder / "saved")
    return trainer.model


@torch.no_grad()
def store_expected(saved: Path, pixels: torch.Tensor) -> str:
    """Store inputs and their embeddings with the saved model."""
    model, processor = AutoModel.from_pretrained(saved).eval(), AutoProcessor.from_pretrained(saved)
    inputs = {"video": pixels, "image": pixels[:, :1], "texts": ["a cat", "the dog sits"]}
    expected = [model.predict(inputs["video"]), model.predict(inputs["image"])]
    expected.append(model.encode_target(**processor(targets=inputs["texts"])))
    torch.save((inputs, expected), saved / "expected.pt")
    return str(saved)


def test_published_files_become_models_that_train_and_load_without_this_package(tmp_path):
    predictor = sources.language_model(tmp_path / "predictor")
    text = sources.sentence_transformer(tmp_path / "text")
    sources.clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    file = vjepa21.published(tmp_path / "tiny.pt", vjepa21.WEIGHTS)
    parts = ["--vision", str(file), "--text", str(text)]
    model = train_and_save(tmp_path / "a", predictor, parts, 32)
    with torch.no_grad():
        embeds = model.encode_video(vjepa21.PIXELS)
    expected = encode(vjepa21.WEIGHTS, vjepa21.PIXELS, vjepa21.HEADS)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)

    file = perception.write(tmp_path / "core.pt", perception.both())
    parts = ["--vision", file, "--text", file, "--text-tokenizer", str(tmp_path / "tokenizer")]
    model = train_and_save(tmp_path / "b", predictor, parts, None)
    clips = perception.IMAGES.unflatten(0, (1, 2))
    with torch.no_grad():
        embeds = model.encode_video(clips)
    tokens = encode_images(perception.VISION, perception.IMAGES, perception.HEADS)
    expected = tokens[:, 1:].flatten(0, 1).unsqueeze(0)  # without the class token of each frame
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)

    folders = [
        store_expected(tmp_path / "a" / "saved", vjepa21.PIXELS),
        store_expected(tmp_path / "b" / "saved", clips),
    ]
    printed = run_elsewhere(SCRIPT.format(folders=folders), tmp_path)
    assert printed.splitlines() == ["VJEPA21Model 384", "PerceptionEncoderVisionModel 42"]
