"""Variants of a new model for ablations differ from it in one respect."""

import pytest
import torch

from experiments.variants import main
from modeling_vljepa import VLJEPAModel
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a standardisation, and one with another projection."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("calibrated", "other")):
        model = tiny_model(seed, standardize_visual_tokens=name == "calibrated")
        if name == "calibrated":
            model.predictor.visual_standardization.mean.normal_()
            model.predictor.visual_standardization.scale.uniform_(0.5, 2)
        model.save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    return folder


def changed(folder, output, *options: str) -> tuple[VLJEPAModel, VLJEPAModel]:
    """Return the calibrated model and its variant."""
    main([str(folder / "calibrated"), "--output", str(output), *options])
    paths = (folder / "calibrated", output)
    return tuple(VLJEPAModel.from_pretrained(path).eval() for path in paths)


def test_variants_fold_computes_the_same_without_the_standardisation(folder, tmp_path):
    model, folded = changed(folder, tmp_path, "--fold")
    assert not folded.config.standardize_visual_tokens
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "visual_embeds": torch.randn(1, 4, 48)}
    torch.testing.assert_close(folded.predict(**inputs), model.predict(**inputs))


def test_variants_take_another_projection_and_temperature_and_nothing_else(folder, tmp_path):
    options = ("--projection-of", str(folder / "other"), "--temperature", "0.2")
    model, variant = changed(folder, tmp_path, *options)
    other = VLJEPAModel.from_pretrained(folder / "other").state_dict()
    old, new = model.state_dict(), variant.state_dict()
    projection = {"predictor.visual_projection.weight", "predictor.visual_projection.bias"}
    differ = {name for name in old if not torch.equal(old[name], new[name])}
    assert differ <= projection | {"logit_scale.weight"}
    assert all(torch.equal(new[name], other[name]) for name in projection)
    assert variant.logit_scale().item() == pytest.approx(5.0)


def test_variants_new_text_encoder_has_other_weights_and_changes_nothing_else(folder, tmp_path):
    model, other = changed(folder, tmp_path / "random", "--new-text-encoder", "3")
    _, again = changed(folder, tmp_path / "again", "--new-text-encoder", "3")
    for name, weight in model.state_dict().items():
        new = other.state_dict()[name]
        assert torch.equal(new, again.state_dict()[name])
        is_new = name.startswith("y_encoder.backbone.") and "norm" not in name
        assert torch.equal(new, weight) != is_new, name
