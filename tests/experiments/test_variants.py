"""Variants of a new model for ablations differ from it in one respect."""

import pytest
import torch

from experiments.variants import main
from modeling_vljepa import VLJEPAModel
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a standardisation."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(standardize_visual_tokens=True)
    model.predictor.visual_standardization.mean.normal_()
    model.predictor.visual_standardization.scale.uniform_(0.5, 2)
    model.save_pretrained(folder / "calibrated")
    tiny_processor().save_pretrained(folder / "calibrated")
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


def test_variants_scale_the_tokens_and_take_a_temperature_and_change_nothing_else(folder, tmp_path):
    model, variant = changed(folder, tmp_path, "--token-scale", "4", "--temperature", "0.2")
    old, new = model.state_dict(), variant.state_dict()
    scale = "predictor.visual_standardization.scale"
    differ = {name for name in old if not torch.equal(old[name], new[name])}
    assert differ == {scale, "logit_scale.weight"}
    torch.testing.assert_close(new[scale], 4 * old[scale])
    assert variant.logit_scale().item() == pytest.approx(5.0)


def test_variants_new_text_encoder_has_other_weights_and_changes_nothing_else(folder, tmp_path):
    model, other = changed(folder, tmp_path / "random", "--new-text-encoder", "3")
    _, again = changed(folder, tmp_path / "again", "--new-text-encoder", "3")
    for name, weight in model.state_dict().items():
        new = other.state_dict()[name]
        assert torch.equal(new, again.state_dict()[name])
        is_new = name.startswith("y_encoder.backbone.") and "norm" not in name
        assert torch.equal(new, weight) != is_new, name


@pytest.mark.parametrize("options", [["--fold"], ["--token-scale", "4"]])
def test_variants_refuse_a_model_without_a_standardisation(options, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_processor().save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "plain"), "--output", str(tmp_path / "new"), *options])
    assert "does not standardise its visual tokens" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
