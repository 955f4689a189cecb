"""Exported towers equal the model, also for other batch sizes and lengths than the example's."""

from pathlib import Path

import pytest
import torch

from tests.tiny import BERT, tiny_batch, tiny_model, tiny_processor
from training.arguments import RecipeError
from training.export import main

pytestmark = pytest.mark.slow  # tracing a model takes seconds

BATCH = tiny_batch()


def save(folder: Path, **changes: object) -> torch.nn.Module:
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return model


def run(path: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    arrays = (tensor.numpy() for tensor in inputs)
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("text_config", [{}, BERT], ids=["gemma", "bert"])
def test_exported_towers_equal_the_model(text_config, kind, tmp_path):
    model = save(tmp_path / "model", text_config=text_config)
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    predict, encode_target = main([*arguments, "--format", kind])
    for rows, length in ((3, 5), (2, 4), (1, 3)):
        part = {name: tensor[:rows] for name, tensor in BATCH.items()}
        query = (
            part["pixel_values_videos"],
            part["input_ids"][:, :length],
            part["attention_mask"][:, :length],
        )
        target = part["target_input_ids"], part["target_attention_mask"]
        with torch.no_grad():
            expected = model.predict(*query), model.encode_target(*target)
        for path, inputs, reference in zip(
            (predict, encode_target), (query, target), expected, strict=True
        ):
            torch.testing.assert_close(run(path, inputs), reference, rtol=0, atol=1e-5)


def test_export_names_a_missing_model(tmp_path):
    with pytest.raises(RecipeError, match="--model: cannot load .*nowhere as a folder or Hub id"):
        main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
