"""Calibration fits the visual tokens to both sides, and folds into the projection's weights."""

import copy

import pytest
import torch
from transformers import AutoModel

from modeling_vljepa import VLJEPAModel
from tests import sources
from tests.tiny import tiny_model, tiny_processor, tiny_recipe, tiny_rows, write_rows
from training.arguments import RecipeError
from training.init_checkpoint import main
from training.model.calibration import Moments, calibrate, chosen_rows, joints, measure, spread
from training.train import main as train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def built(rows, tmp_path_factory):
    """The folder of a calibrated model, and what the command printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    parts = {
        "vision": sources.vision(folder / "vision"),
        "predictor": sources.language_model(folder / "predictor"),
        "text": sources.sentence_transformer(folder / "text"),
    }
    arguments = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    main([*arguments, "--output", str(folder / "out"), "--calibrate", str(rows)])
    return folder / "out"


def standardized(seed: int = 0) -> VLJEPAModel:
    return tiny_model(seed, standardize_visual_tokens=True).eval()


def test_moments_are_those_of_all_vectors_together():
    vectors = torch.randn(7, 5, 3, dtype=torch.float64) * 4 + 10
    moments = Moments()
    for part in vectors.split([1, 2, 4]):
        moments.add(part)
    flat = vectors.flatten(0, 1)
    torch.testing.assert_close(moments.mean(), flat.mean(0))
    torch.testing.assert_close(moments.variance(), flat.var(0, correction=0))


def test_spread_is_the_share_of_energy_that_is_not_common():
    assert spread(torch.ones(4, 3)) == pytest.approx(0)
    assert spread(torch.eye(4)) == pytest.approx(1 - 1 / 4)
    assert spread(torch.tensor([[1.0], [-1.0]])) == pytest.approx(1)


def test_calibrate_standardises_tokens_and_matches_the_token_table(rows):
    model, processor = standardized(), tiny_processor()
    table = model.get_input_embeddings().weight.data
    table.mul_(3).add_(0.5)
    weight = model.predictor.visual_projection.weight.clone()
    measured = measure(model, processor, chosen_rows(str(rows), 256, seed=0))
    calibrate(model, measured)
    assert measured.clips == 4 and not measured.broken
    predictor, tokens = model.predictor, measured.batch["visual_embeds"]
    standard = predictor.visual_standardization
    torch.testing.assert_close(
        standard.mean.double(), measured.moments.mean(), rtol=1e-5, atol=1e-6
    )
    deviations = standard.scale.double() * measured.moments.variance().sqrt()
    torch.testing.assert_close(deviations, deviations[:1].expand(48), rtol=1e-4, atol=0)
    assert torch.equal(predictor.visual_projection.weight, weight)
    projected = predictor.visual_projection(standard(tokens)).flatten(0, 1)
    variance = projected.var(0, correction=0).mean()
    torch.testing.assert_close(variance, table.var(0, correction=0).mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(predictor.visual_projection.bias, table.mean(0))


def test_calibrate_leaves_a_constant_dimension_finite(rows):
    model, processor = standardized(), tiny_processor()
    encode = model.encode_video

    def constant(pixels):
        tokens = encode(pixels).clone()
        tokens[..., 0] = 5.0
        return tokens

    model.encode_video = constant
    measured = measure(model, processor, chosen_rows(str(rows), 256, seed=0))
    calibrate(model, measured)
    assert model.predictor.visual_standardization.scale.isfinite().all()
    assert all(
        number == number for pair in joints(model, measured.batch).values() for number in pair
    )


def test_fold_standardization_changes_no_embedding():
    model = standardized()
    standard = model.predictor.visual_standardization
    standard.mean.copy_(torch.randn(48) * 2)
    standard.scale.copy_(torch.rand(48) * 4 + 0.1)
    inputs = {
        "visual_embeds": torch.randn(2, 6, 48) * 3,
        "input_ids": torch.tensor([[3, 4], [5, 6]]),
    }
    plain = copy.deepcopy(model)
    plain.fold_standardization()
    assert not plain.config.standardize_visual_tokens and model.config.standardize_visual_tokens
    assert not any("standardization" in name for name in plain.state_dict())
    with torch.inference_mode():
        before, after = model.predict(**inputs), plain.predict(**inputs)
        standard.scale.mul_(2)
        other = model.predict(**inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert (other - before).abs().max() > 1e-3  # positive control


def test_init_checkpoint_stores_the_calibration_and_training_keeps_it(built, rows, tmp_path):
    model = AutoModel.from_pretrained(built)
    standard = model.predictor.visual_standardization
    assert model.config.standardize_visual_tokens and (standard.scale != 1).all()
    recipe = tiny_recipe(rows, max_steps=2, learning_rate=0.01)
    given = [f"model.checkpoint={built}", "model.config={}", f"training.output_dir={tmp_path}/run"]
    trained = train([str(recipe), *given]).model
    assert torch.equal(trained.predictor.visual_standardization.scale, standard.scale)
    weight = "predictor.visual_projection.weight"
    assert not torch.equal(trained.get_parameter(weight), model.get_parameter(weight))
    again = AutoModel.from_pretrained(tmp_path / "run")
    assert torch.equal(again.predictor.visual_standardization.mean, standard.mean)


def test_checkpoint_without_the_vectors_is_not_standardised_by_a_setting(rows, tmp_path):
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_processor().save_pretrained(tmp_path / "plain")
    recipe = tiny_recipe(rows, max_steps=1)
    given = [
        f"model.checkpoint={tmp_path / 'plain'}",
        "model.config={standardize_visual_tokens: true}",
    ]
    with pytest.raises(RecipeError, match="visual_standardization"):
        train([str(recipe), *given])


def test_calibration_names_a_missing_file_and_leaves_out_broken_clips(rows, tmp_path):
    with pytest.raises(RecipeError, match="--calibrate: .*none.jsonl: no such"):
        chosen_rows(str(tmp_path / "none.jsonl"), 4, seed=0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"image": "broken.png", "query": "", "target": "a cat"}],
    )
    with pytest.raises(RecipeError, match="--calibrate: 0 clips can be read, and 2 are needed"):
        measure(standardized(), tiny_processor(), chosen_rows(str(path), 4, seed=0))
