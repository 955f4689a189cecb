"""The X-Encoder is V-JEPA 2's encoder, and frozen means frozen."""

from collections.abc import Iterator

import pytest
import torch
from transformers import VJEPA2Model

from modeling_vljepa import VLJEPAModel
from tests.tiny import tiny_batch, tiny_config, tiny_model

PIXELS = tiny_batch()["pixel_values_videos"]


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


def step(model: VLJEPAModel) -> Iterator[tuple[str, bool]]:
    """One optimizer step with everything in it; yields which parameters of the box changed."""
    before = {name: p.detach().clone() for name, p in model.x_encoder.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(**tiny_batch(), return_loss=True).loss.backward()
    optimizer.step()
    for name, parameter in model.x_encoder.named_parameters():
        yield name, not torch.equal(parameter, before[name])


def test_equals_the_stock_encoder_bitwise(model):
    stock = VJEPA2Model(tiny_config().vision_config).eval()
    loaded = stock.load_state_dict(model.x_encoder.backbone.state_dict(), strict=False)
    assert {key.split(".")[0] for key in loaded.missing_keys} == {"predictor"}
    assert loaded.unexpected_keys == []
    with torch.no_grad():
        expected = stock(PIXELS, skip_predictor=True).last_hidden_state
    visual_embeds = model.encode_video(PIXELS)
    assert visual_embeds.shape == (3, 2 * 2 * 2, 48)  # tubelets x rows x columns
    assert torch.equal(visual_embeds, expected)


def test_the_masked_token_predictor_is_gone(model):
    """V-JEPA 2 runs a predictor of 22M parameters unless told not to: a third of a forward pass
    that nothing reads."""
    backbone = dict(model.x_encoder.backbone.named_children())
    assert list(backbone) == ["encoder"]
    everything = sum(p.numel() for p in VJEPA2Model(tiny_config().vision_config).parameters())
    kept = sum(p.numel() for p in model.x_encoder.parameters())
    assert kept == sum(p.numel() for p in backbone["encoder"].parameters()) < everything


def test_a_frozen_encoder_stays_as_it_is():
    model = tiny_model()
    assert not any(p.requires_grad for p in model.x_encoder.parameters())
    model.train()
    assert model.training and model.predictor.training
    assert not any(module.training for module in model.x_encoder.modules())
    # Not even for pixels that ask for a gradient: its activations would fill the memory.
    visual_embeds = model.encode_video(PIXELS.clone().requires_grad_())
    assert not visual_embeds.requires_grad
    changed = dict(step(model))
    assert len(changed) > 20
    assert not any(changed.values())
    assert torch.equal(model.encode_video(PIXELS), visual_embeds)


def test_an_unfrozen_encoder_trains():
    model = tiny_model(freeze_vision=False)
    model.train()
    assert all(module.training for module in model.x_encoder.modules())
    assert model.encode_video(PIXELS).requires_grad
    with torch.no_grad():
        assert not model.encode_video(PIXELS).requires_grad
    assert [name for name, changed in step(model) if not changed] == []


def test_an_image_is_a_frame_shown_twice(model):
    image = PIXELS[:, :1]
    embeds = model.encode_video(image)
    assert embeds.shape == (3, 2 * 2, 48)
    assert torch.equal(embeds, model.encode_video(image.repeat(1, 2, 1, 1, 1)))
    assert not torch.allclose(embeds, model.encode_video(PIXELS[:, :2]), atol=1e-3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (PIXELS.transpose(1, 2), r"shape \(3, 3, 4, 32, 32\); expected \(batch, frames, channels"),
        (PIXELS.movedim(2, -1), r"shape \(3, 4, 32, 32, 3\)"),
        (PIXELS[:, 0], r"shape \(3, 3, 32, 32\)"),
        (PIXELS[..., :16, :16], r"channels, height, width = \(3, 32, 32\)"),
        (PIXELS[:, :3], "3 frames do not fill tubelets of 2"),
    ],
)
def test_what_v_jepa_2_would_take_in_silence_is_refused(model, pixels, message):
    with pytest.raises(ValueError, match=message):
        model.encode_video(pixels)


def test_another_architecture_is_refused():
    vision = {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="model_type is 'vit', but the X-Encoder is a V-JEPA 2"):
        tiny_model(vision_config=vision)
