"""V-JEPA 2.1's encoder: equal to an independent reference, each difference to V-JEPA 2 proved."""

import copy

import pytest
import torch

from modeling_vljepa import VJEPA21Config, VJEPA21Model, VLJEPAModel
from modeling_vljepa.attention import SDPA_OR_PLAIN
from modeling_vljepa.x_encoder import check_config
from tests.model.vjepa21_reference import DIFFERENCES, encode, random_weights
from tests.tiny import VJEPA21, tiny_batch, tiny_config, tiny_model
from training.model.vjepa21_files import to_ours

WIDTH, DEPTH, HEADS = 128, 12, 2  # heads of 64, as published: 60 channels are rotated
SETTINGS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "mlp_ratio": 2,
}
WEIGHTS = random_weights(WIDTH, DEPTH, 2 * WIDTH)
PIXELS = tiny_batch()["pixel_values_videos"]


def loaded(weights: dict[str, torch.Tensor] = WEIGHTS, **changes: object) -> VJEPA21Model:
    """Return an encoder with the reference's weights."""
    model = VJEPA21Model(VJEPA21Config(**{**SETTINGS, **changes})).eval()
    model.load_state_dict(to_ours(weights))
    return model


@pytest.fixture(scope="module")
def model() -> VJEPA21Model:
    return loaded()


def clip(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Two grids, two lengths, images, and grids of one row or one column.
CLIPS = {
    "video": (2, 4, 3, 48, 64),
    "longer": (1, 6, 3, 32, 32),
    "image": (2, 1, 3, 48, 64),
    "small image": (1, 1, 3, 32, 32),
    "row": (1, 2, 3, 16, 64),
    "column": (1, 1, 3, 48, 16),
    "patch": (1, 2, 3, 16, 16),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", CLIPS.values(), ids=CLIPS)
def test_vjepa21_equals_the_reference(model, shape):
    found = model(clip(*shape)).last_hidden_state
    expected = encode(WEIGHTS, clip(*shape), HEADS)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["video", "image"])
def test_vjepa21_hierarchical_output_equals_the_reference(name):
    found = loaded(hierarchical_output=True)(clip(*CLIPS[name])).last_hidden_state
    assert found.shape[-1] == 4 * WIDTH
    expected = encode(WEIGHTS, clip(*CLIPS[name]), HEADS, hierarchical=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "difference"),
    [("video", difference) for difference in DIFFERENCES if difference != "stem"]
    + [("image", difference) for difference in DIFFERENCES],
)
def test_vjepa21_has_each_difference_to_vjepa2(model, name, difference):
    """The reference without one of them computes other features."""
    found = model(clip(*CLIPS[name])).last_hidden_state
    without = encode(WEIGHTS, clip(*CLIPS[name]), HEADS, without=frozenset({difference}))
    assert (found - without).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "value", "difference"),
    [("interpolate_rope", False, "scaling"), ("modality_embedding", False, "modality")],
)
def test_vjepa21_settings_switch_a_difference_off(setting, value, difference):
    unused = "_mod_embed" if difference == "modality" else "nothing"
    weights = {name: tensor for name, tensor in WEIGHTS.items() if unused not in name}
    found = loaded(weights, **{setting: value})(clip(*CLIPS["video"])).last_hidden_state
    expected = encode(WEIGHTS, clip(*CLIPS["video"]), HEADS, without=frozenset({difference}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vjepa21_without_an_image_stem_repeats_the_frame(model):
    """The option of the VL-JEPA paper: a frame is a video of two equal frames."""
    weights = {k: v for k, v in WEIGHTS.items() if "_img" not in k and "img_" not in k}
    repeating = loaded(weights, img_temporal_dim_size=None)
    image = clip(*CLIPS["image"])
    found = repeating(image).last_hidden_state
    twice = model(image.repeat(1, 2, 1, 1, 1)).last_hidden_state
    torch.testing.assert_close(found, twice, rtol=0, atol=1e-5)
    assert (found - model(image).last_hidden_state).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4, 32])
def test_vjepa21_rotates_heads_of_any_even_size(heads):
    weights = random_weights(64, 2, 128, norms=1)
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
    found = loaded(weights, **config)(clip(1, 2, 3, 32, 48)).last_hidden_state
    expected = encode(weights, clip(1, 2, 3, 32, 48), heads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", SDPA_OR_PLAIN])
def test_vjepa21_kernels_equal_eager(kernel):
    model = loaded()
    model.set_attn_implementation(kernel)
    found = model(clip(*CLIPS["video"])).last_hidden_state
    model.set_attn_implementation("eager")
    outputs = model(clip(*CLIPS["video"]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found, outputs.last_hidden_state, rtol=0, atol=1e-5)
    assert len(outputs.hidden_states) == DEPTH + 1 and len(outputs.attentions) == DEPTH
    sums = outputs.attentions[0].sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def gradients(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixels).last_hidden_state.square().sum(dim=-1).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frames", [1, 4])
def test_vjepa21_gradient_checkpointing_gives_equal_gradients(frames):
    model = VJEPA21Model(VJEPA21Config(**{**VJEPA21, "hierarchical_output": True})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    expected = gradients(model, PIXELS[:, :frames])
    # No parameter is without a gradient: data-parallel training would stop.
    assert expected.keys() == dict(model.named_parameters()).keys()
    model.activation_checkpointing_enable()
    found = gradients(model, PIXELS[:, :frames])
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    unread = "patch_embeddings" if frames == 1 else "patch_embeddings_img"
    assert not expected[f"encoder.embeddings.{unread}.proj.weight"].any()


def test_vjepa21_initialises_its_weights():
    torch.manual_seed(0)
    encoder = VJEPA21Model(VJEPA21Config(**{**SETTINGS, "num_hidden_layers": 2})).encoder
    layer, embeddings = encoder.layer[1], encoder.embeddings
    for weight in (
        layer.attention.query.weight,
        layer.mlp.fc2.weight,
        embeddings.patch_embeddings_img.proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.attention.proj.bias.any()
    for vector in (embeddings.img_mod_embed, embeddings.video_mod_embed):
        assert vector.std().item() == pytest.approx(1e-6, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hierarchical_layers": [5, 2, 11]}, r"is \[5, 2, 11\], but the model has 12 layers"),
        ({"hierarchical_layers": [2, 5]}, "end with the last layer"),
        ({"hierarchical_layers": [-1, 11]}, "in ascending order"),
        ({"num_attention_heads": 3}, "128 for 3 heads: the size of a head must be an even"),
        ({"num_attention_heads": 128}, "must be an even whole number"),
        ({"img_temporal_dim_size": 2}, "img_temporal_dim_size is 2: give 1, or null"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: give 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: give 1 or more"),
        ({"pretrained_crop_size": 8}, "pretrained_crop_size is 8 and patch_size 16: the pretr"),
    ],
)
def test_vjepa21_rejects_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        VJEPA21Model(VJEPA21Config(**{**SETTINGS, **changes}))


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 32, 32)])
def test_vjepa21_rejects_pixels_without_an_axis_of_frames(model, shape):
    with pytest.raises(ValueError, match="pixel_values_videos has shape .* expected .batch, fr"):
        model(torch.zeros(shape))


# -- as X-Encoder --------------------------------------------------------------------------


def vljepa(**changes: object) -> VLJEPAModel:
    model = tiny_model(vision_config=VJEPA21 | changes)
    with torch.no_grad():
        for parameter in model.x_encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def test_x_encoder_vjepa21_encodes_images_with_their_own_stem():
    model = vljepa()
    embeds = model.encode_video(PIXELS[:, :1])
    assert embeds.shape == (3, 2 * 2, 48)
    expected = model.x_encoder.backbone(PIXELS[:, :1]).last_hidden_state
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    twice = model.encode_video(PIXELS[:, :1].repeat(1, 2, 1, 1, 1))
    assert (embeds - twice).abs().max() > 1e-2
    repeating = vljepa(img_temporal_dim_size=None)
    repeating.load_state_dict(model.state_dict(), strict=False)
    found = repeating.encode_video(PIXELS[:, :1])
    torch.testing.assert_close(found, twice, rtol=0, atol=1e-6)


def test_x_encoder_vjepa21_repeats_the_last_frame_of_an_odd_number():
    model = vljepa()
    filled = model.encode_video(PIXELS[:, [0, 1, 2, 2]])
    torch.testing.assert_close(model.encode_video(PIXELS[:, :3]), filled, rtol=0, atol=1e-6)


def test_x_encoder_vjepa21_reads_any_grid_and_pools_it():
    model = tiny_model(vision_config=VJEPA21, visual_token_pooling=2)
    wide = clip(1, 3, 3, 48, 80)
    assert model.encode_video(wide).shape == (1, 2 * 2 * 3, 48)
    with pytest.raises(ValueError, match="height and width multiples of 16"):
        model.encode_video(wide[..., :40])


@pytest.mark.slow
@torch.no_grad()
def test_x_encoder_vjepa21_compiles_without_graph_breaks():
    model = vljepa()
    compiled = torch.compile(model.x_encoder, fullgraph=True, backend="eager")
    for pixels in (PIXELS, PIXELS[:, :1], clip(1, 3, 3, 48, 64)):
        expected = model.encode_video(pixels)
        torch.testing.assert_close(compiled(pixels), expected, rtol=0, atol=1e-5)


def test_x_encoder_vjepa21_has_no_norms_of_levels_that_it_does_not_read():
    assert [n for n, _ in vljepa().x_encoder.named_parameters() if "norms_block.0" in n] == []
    model = vljepa(hierarchical_output=True)
    assert model.encode_video(PIXELS).shape == (3, 2 * 2 * 2, 96)
    assert model.predictor.visual_projection.in_features == 96


@pytest.mark.parametrize("frames", [1, 4])
def test_x_encoder_vjepa21_unfrozen_trains_every_parameter(frames):
    model = tiny_model(vision_config=VJEPA21, freeze_vision=False).train()
    assert model.x_encoder.backbone.config._attn_implementation == SDPA_OR_PLAIN
    batch = tiny_batch()
    batch["pixel_values_videos"] = batch["pixel_values_videos"][:, :frames]
    model(**batch, return_loss=True).loss.backward()
    assert [n for n, p in model.x_encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["use_rope_interleave", "return_all_tokens"])
def test_x_encoder_rejects_vjepa2_with_a_setting_of_vjepa21(name):
    with pytest.raises(ValueError, match=f"a 'vjepa2' with '{name}': that is V-JEPA 2.1"):
        tiny_model(vision_config={"model_type": "vjepa2", name: True})


@pytest.mark.parametrize("model_type", ["vjepa2", "vjepa2_1"])
@pytest.mark.parametrize("name", ["use_SiLU", "n_registers"])
def test_x_encoder_rejects_settings_that_it_would_ignore(model_type, name):
    with pytest.raises(ValueError, match=f"a '{model_type}' whose '{name}' is 1, which this"):
        tiny_model(vision_config={"model_type": model_type, name: 1})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("vjepa2", "use_rope"),
        ("vjepa2_1", "use_rope"),
        ("vjepa2_1", "use_rope_interleave"),
        ("perception_encoder_vision", "use_rope2d"),
        ("perception_encoder_vision", "use_abs_posemb"),
        ("perception_encoder_vision", "use_ln_pre"),
    ],
)
def test_x_encoder_rejects_only_a_false_value_of_what_it_always_does(model_type, name):
    config = tiny_config(vision_config={"model_type": model_type, name: True}).vision_config
    check_config(config)
    config.update({name: False})
    with pytest.raises(ValueError, match=f"a '{model_type}' whose '{name}' is False, which this"):
        check_config(config)


def test_x_encoder_accepts_settings_of_no_effect():
    """Old configurations of V-JEPA 2 have these; newer ones have settings of 2.1 that are off."""
    settings = copy.deepcopy(tiny_model().config.vision_config.to_dict())
    extra = {"image_size": 32, "wide_SiLU": True, "use_SiLU": False, "use_rope_interleave": False}
    tiny_model(vision_config=settings | extra)
