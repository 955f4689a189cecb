"""The X-Encoder: equal to the stock encoders, frozen or trained, and checked inputs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, VJEPA2Model

from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.x_encoder import WITH_CLASS_TOKEN, check_config, patch_edge, pool_patches
from tests.tiny import RESNET, TOWER, tiny_batch, tiny_config, tiny_model

PIXELS = tiny_batch()["pixel_values_videos"]


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


def step(model: VLJEPAModel) -> Iterator[tuple[str, bool]]:
    """Run one optimizer step on all parameters; yield each X-Encoder parameter's name and whether
    it changed."""
    before = {name: p.detach().clone() for name, p in model.x_encoder.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(**tiny_batch(), return_loss=True).loss.backward()
    optimizer.step()
    for name, parameter in model.x_encoder.named_parameters():
        yield name, not torch.equal(parameter, before[name])


def test_x_encoder_equals_the_stock_encoder(model):
    stock = VJEPA2Model(tiny_config().vision_config).eval()
    loaded = stock.load_state_dict(model.x_encoder.backbone.state_dict(), strict=False)
    assert {key.split(".")[0] for key in loaded.missing_keys} == {"predictor"}
    assert loaded.unexpected_keys == []
    with torch.no_grad():
        expected = stock(PIXELS, skip_predictor=True).last_hidden_state
    visual_embeds = model.encode_video(PIXELS)
    assert visual_embeds.shape == (3, 2 * 2 * 2, 48)  # tubelets x rows x columns
    torch.testing.assert_close(visual_embeds, expected, rtol=1e-6, atol=1e-6)


def test_x_encoder_has_no_masked_token_predictor(model):
    """By default, V-JEPA 2 runs a predictor of 22M parameters, which costs a third of a forward
    pass and is not used here."""
    backbone = dict(model.x_encoder.backbone.named_children())
    assert list(backbone) == ["encoder"]
    everything = sum(p.numel() for p in VJEPA2Model(tiny_config().vision_config).parameters())
    kept = sum(p.numel() for p in model.x_encoder.parameters())
    assert kept == sum(p.numel() for p in backbone["encoder"].parameters()) < everything


def test_x_encoder_frozen_does_not_change():
    model = tiny_model()
    assert not any(p.requires_grad for p in model.x_encoder.parameters())
    model.train()
    assert model.training and model.predictor.training
    assert not any(module.training for module in model.x_encoder.modules())
    # Not even for pixels that require a gradient: the graph would fill the memory.
    visual_embeds = model.encode_video(PIXELS.clone().requires_grad_())
    assert not visual_embeds.requires_grad
    changed = dict(step(model))
    assert len(changed) > 20
    assert not any(changed.values())
    torch.testing.assert_close(model.encode_video(PIXELS), visual_embeds, rtol=1e-6, atol=1e-6)


def test_x_encoder_unfrozen_trains():
    model = tiny_model(freeze_vision=False)
    model.train()
    assert all(module.training for module in model.x_encoder.modules())
    assert model.encode_video(PIXELS).requires_grad
    with torch.no_grad():
        assert not model.encode_video(PIXELS).requires_grad
    assert [name for name, changed in step(model) if not changed] == []


def test_x_encoder_repeats_an_image_as_two_frames(model):
    image = PIXELS[:, :1]
    embeds = model.encode_video(image)
    assert embeds.shape == (3, 2 * 2, 48)
    twice = model.encode_video(image.repeat(1, 2, 1, 1, 1))
    torch.testing.assert_close(embeds, twice, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(embeds, model.encode_video(PIXELS[:, :2]), atol=1e-3)


def test_x_encoder_repeats_the_last_frame_of_an_odd_number(model):
    """V-JEPA 2 alone would drop the last frame without a warning."""
    embeds = model.encode_video(PIXELS[:, :3])
    assert embeds.shape == (3, 2 * 2 * 2, 48)
    filled = model.encode_video(PIXELS[:, [0, 1, 2, 2]])
    torch.testing.assert_close(embeds, filled, rtol=1e-6, atol=1e-6)
    dropped = model.x_encoder.backbone(PIXELS[:, :3], skip_predictor=True).last_hidden_state
    assert dropped.shape == (3, 2 * 2, 48)  # positive control


SIZES = {
    "layout": (PIXELS.transpose(1, 2), r"shape \(3, 3, 4, 32, 32\); expected \(batch, frames"),
    "channels last": (PIXELS.movedim(2, -1), r"shape \(3, 4, 32, 32, 3\)"),
    "an image": (PIXELS[:, 0], r"shape \(3, 3, 32, 32\)"),
    "no frame": (PIXELS[:, :0], r"shape \(3, 0, 3, 32, 32\)"),
}


@pytest.mark.parametrize(
    ("pixels", "message"),
    [*SIZES.values(), (PIXELS[..., :16, :16], "with 3 channels, height and width 32")],
    ids=[*SIZES, "size"],
)
def test_x_encoder_rejects_wrong_layouts_and_sizes(model, pixels, message):
    """V-JEPA 2 alone would accept them and compute wrong features."""
    with pytest.raises(ValueError, match=message):
        model.encode_video(pixels)


CONVNEXT = {"hidden_sizes": [8, 16, 48], "depths": [1, 1, 1], "num_stages": 3, "image_size": 32}
CONVOLUTIONAL = {
    "resnet": RESNET,
    "bit": RESNET | {"layer_type": "preactivation", "num_groups": 4},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
}
TOWERS = (
    "dinov2",
    "dinov3_vit",
    "clip_vision_model",
    "siglip_vision_model",
    "vit",
    "perception_encoder_vision",
    *CONVOLUTIONAL,
)


REGISTERS = dict.fromkeys(WITH_CLASS_TOKEN, 0) | {"dinov2_with_registers": 4}


def settings_of(model_type: str) -> dict:
    """Return a `vision_config` of 48 output channels and patches of 16 pixels."""
    return CONVOLUTIONAL.get(model_type, TOWER) | {"model_type": model_type}


def tower(model_type: str, **changes: object) -> VLJEPAModel:
    return tiny_model(vision_config=settings_of(model_type), **changes)


@pytest.mark.parametrize("model_type", TOWERS)
def test_image_tower_encodes_frame_by_frame_and_predictor_sees_their_order(model_type):
    model = tower(model_type)
    query = torch.tensor([[5, 6]]).expand(3, -1)
    with torch.no_grad():
        embeds = model.encode_video(PIXELS)
        frames = [model.encode_video(PIXELS[:, t : t + 1]) for t in range(4)]
        torch.testing.assert_close(embeds, torch.cat(frames, dim=1), rtol=0, atol=1e-6)
        order = [3, 1, 2, 0]
        shuffled = model.predict(PIXELS[:, order], query)
        assert (model.predict(PIXELS, query) - shuffled).norm(dim=1).min() > 2e-5
    assert len(frames[0][0]) >= 4  # every patch of a frame is a visual token


@pytest.mark.parametrize("model_type", TOWERS)
def test_image_tower_unfrozen_trains_every_parameter(model_type):
    """An unused pooling head would get no gradient, and data-parallel training would stop."""
    model = tower(model_type, freeze_vision=False).train()
    model(**tiny_batch(), return_loss=True).loss.backward()
    unread = [n for n, p in model.x_encoder.named_parameters() if p.grad is None]
    assert unread == (["backbone.embeddings.mask_token"] if model_type == "dinov3_vit" else [])


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "vit"])
def test_image_tower_with_a_position_table_rejects_other_sizes(model_type):
    model = tower(model_type)
    for pixels, message in (*SIZES.values(), (PIXELS[..., :16], "height and width 32")):
        with pytest.raises(ValueError, match=message):
            model.encode_video(pixels)


@pytest.mark.parametrize(
    "model_type", ["dinov2", "dinov3_vit", "perception_encoder_vision", *CONVOLUTIONAL]
)
def test_image_tower_with_other_positions_accepts_any_whole_patches(model_type):
    model = tower(model_type)
    wide = torch.randn(1, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    special = model.encode_video(PIXELS).shape[1] // 4 - 4  # class and register tokens
    assert model.encode_video(wide).shape == (1, 2 * (3 * 4 + special), 48)
    with pytest.raises(ValueError, match="height and width multiples of 16"):
        model.encode_video(wide[..., :40])


# -- convolutional towers ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONVOLUTIONAL)
def test_convolutional_tower_gives_the_last_feature_map_row_by_row(model_type):
    model = tower(model_type)
    stock = AutoModel.from_config(model.config.vision_config).eval()
    loaded = stock.load_state_dict(model.x_encoder.backbone.state_dict(), strict=False)
    assert {key.split(".")[0] for key in loaded.missing_keys} <= {"layernorm"}  # of the pooling
    assert loaded.unexpected_keys == []
    wide = torch.randn(2, 1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = stock(pixel_values=wide[:, 0]).last_hidden_state  # (2, 48, 2, 4)
        tokens = model.encode_video(wide)
    assert tokens.shape == (2, 2 * 4, 48)
    for row in range(2):
        for column in range(4):
            token = tokens[:, 4 * row + column]
            torch.testing.assert_close(token, maps[:, :, row, column], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "edge"),
    [
        ({"model_type": "resnet"}, 32),
        ({"model_type": "resnet", "downsample_in_first_stage": True}, 64),
        ({"model_type": "bit"}, 32),
        ({"model_type": "bit", "output_stride": 8}, 8),
        ({"model_type": "convnext"}, 32),
        ({"model_type": "convnextv2", "patch_size": 2}, 16),
    ],
    ids=str,
)
def test_patch_edge_is_the_stride_of_all_stages(changes, edge):
    config = AutoConfig.for_model(**changes, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    if config.model_type == "bit":
        config.num_groups = 2
    assert patch_edge(config) == edge
    with torch.no_grad():
        found = AutoModel.from_config(config)(torch.zeros(1, 3, 128, 128)).last_hidden_state
    assert found.shape[2:] == (128 // edge, 128 // edge)


def test_convolutional_tower_frozen_keeps_its_batch_statistics():
    """They are buffers, which no optimizer changes: a pass in training mode would."""
    frozen, trained = tower("resnet").train(), tower("resnet", freeze_vision=False).train()
    for model in (frozen, trained):
        before = {name: each.clone() for name, each in model.x_encoder.named_buffers()}
        model(**tiny_batch(), return_loss=True)
        after = dict(model.x_encoder.named_buffers())
        assert len(before) > 20
        equal = [torch.equal(after[name], before[name]) for name in before]
        assert all(equal) if model is frozen else not any(equal)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_convolutional_tower_does_not_fix_the_attention_of_the_other_parts(
    tmp_path, implementation
):
    model = tower("resnet")
    model.save_pretrained(tmp_path)
    loaded = VLJEPAModel.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for each in (loaded, model):
        assert each.predictor.backbone.config._attn_implementation == implementation
        torch.testing.assert_close(each.encode_video(PIXELS), tower("resnet").encode_video(PIXELS))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (RESNET | {"depths": [1, 1]}, "'resnet' with 3 hidden_sizes and 2 depths: give one"),
        (CONVNEXT | {"model_type": "convnext", "num_stages": 4}, "but num_stages is 4"),
        (CONVNEXT | {"model_type": "convnext", "patch_size": [4, 4]}, "give one number"),
        (
            CONVNEXT | {"model_type": "convnext", "image_size": 40},
            "give frames of a multiple of 16",
        ),
    ],
    ids=str,
)
def test_convolutional_tower_rejects_stages_and_sizes_that_do_not_match(vision, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(vision_config=vision)


# -- pooling -------------------------------------------------------------------------------


def pooled_in_a_loop(tokens: np.ndarray, height: int, width: int, size: int) -> np.ndarray:
    """Return the special tokens of frames `(F, P, D)`, and the mean of each window of patches."""
    frames = []
    for frame in tokens:
        special = len(frame) - height * width
        pooled = list(frame[:special])
        for top in range(0, height, size):
            for left in range(0, width, size):
                window = [
                    frame[special + row * width + column]
                    for row in range(top, min(top + size, height))
                    for column in range(left, min(left + size, width))
                ]
                pooled.append(np.mean(window, axis=0))
        frames.append(pooled)
    return np.array(frames)


@pytest.mark.parametrize("name", ["use_rope2d", "attn_pooler_heads", "interpolate_rope"])
def test_check_config_rejects_settings_of_other_encoders_in_an_image_tower(name):
    config = AutoConfig.for_model("clip_vision_model", **{name: 1})
    with pytest.raises(ValueError, match=f"vision_config is a 'clip_vision_model' .*'{name}'"):
        check_config(config)


@pytest.mark.parametrize(
    ("height", "width", "size", "special"),
    [(4, 4, 2, 0), (5, 3, 2, 1), (7, 7, 3, 5), (4, 6, 4, 0), (3, 3, 3, 1), (2, 4, 1, 1)],
)
def test_pool_patches_averages_the_windows_of_each_frame(height, width, size, special):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, special + height * width, 8, generator=generator, requires_grad=True)
    pooled = pool_patches(tokens, height, width, size)
    expected = pooled_in_a_loop(tokens.detach().numpy(), height, width, size)
    torch.testing.assert_close(pooled.detach().numpy(), expected, rtol=0, atol=1e-6)
    # Each patch gets the gradient of its window, divided by the patches of the window.
    weights = torch.randn(pooled.shape, generator=generator)
    (pooled * weights).sum().backward()
    share = tokens.grad[:, special:].sum(dim=1) + tokens.grad[:, :special].sum(dim=1)
    torch.testing.assert_close(share, weights.sum(dim=1), rtol=0, atol=1e-5)


def test_pool_patches_rejects_towers_that_merge_patches():
    with pytest.raises(ValueError, match="gives 49 tokens for 56 x 56 patches.*set it to 1"):
        pool_patches(torch.zeros(1, 49, 8), 56, 56, 2)


@pytest.mark.parametrize("model_type", ["vjepa2", *TOWERS])
def test_x_encoder_pools_the_patches_of_each_frame_or_tubelet(model_type):
    """Grids of 3 x 3 patches: windows at the edges are incomplete."""
    if model_type == "vjepa2":
        vision = tiny_config().vision_config.to_dict() | {"crop_size": 48}
    else:
        vision = settings_of(model_type) | {"image_size": 48}
    pixels = torch.randn(2, 4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    plain = tiny_model(vision_config=vision, freeze_vision=False)
    pooled = tiny_model(vision_config=vision, freeze_vision=False, visual_token_pooling=2)
    assert plain.state_dict().keys() == pooled.state_dict().keys()  # it adds no weight
    pooled.load_state_dict(plain.state_dict())
    frames = 2 if model_type == "vjepa2" else 4
    tokens = plain.encode_video(pixels).unflatten(1, (frames, -1)).flatten(0, 1)
    expected = pooled_in_a_loop(tokens.detach().numpy(), 3, 3, 2)
    found = pooled.encode_video(pixels)
    assert found.shape == (2, frames * expected.shape[1], 48)
    torch.testing.assert_close(
        found.detach().view(expected.shape), torch.from_numpy(expected), rtol=0, atol=1e-5
    )
    # The gradient of the encoder's weights passes the mean.
    found.sum(dim=(0, 1))[0].backward()
    assert any(p.grad is not None and p.grad.abs().sum() for p in pooled.x_encoder.parameters())


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("model_type", WITH_CLASS_TOKEN)
def test_x_encoder_appends_the_class_token_of_a_frame_to_its_patches(model_type, pooling):
    vision = settings_of(model_type) | {"image_size": 48}
    pixels = torch.randn(2, 4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    plain = tiny_model(vision_config=vision, visual_token_pooling=pooling)
    joined = tiny_model(
        vision_config=vision, visual_token_pooling=pooling, concatenate_class_token=True
    )
    joined.x_encoder.load_state_dict(plain.x_encoder.state_dict())
    patches = 9 if pooling == 1 else 4
    tokens = plain.encode_video(pixels).unflatten(1, (4, -1))  # (B, T, P, Dx)
    expected = torch.cat([tokens[:, :, -patches:], tokens[:, :, :1].expand(2, 4, patches, 48)], -1)
    found = joined.encode_video(pixels)
    torch.testing.assert_close(found, expected.flatten(1, 2), rtol=0, atol=1e-6)
    assert found.shape[2] == joined.x_encoder.output_size == 96
    # The registers of DINOv3 and of DINOv2 are between the two, and are left out.
    assert tokens.shape[2] - patches == 1 + vision.get("num_register_tokens", REGISTERS[model_type])
    query = torch.tensor([[5, 6]]).expand(2, -1)
    assert joined.predict(pixel_values_videos=pixels, input_ids=query).isfinite().all()


@pytest.mark.parametrize("model_type", ["vjepa2", "siglip_vision_model", "resnet"])
def test_x_encoder_rejects_a_class_token_of_a_tower_without_one(model_type):
    vision = settings_of(model_type) if model_type != "vjepa2" else {}
    with pytest.raises(ValueError, match="concatenate_class_token is true, but .* set it to false"):
        tiny_model(vision_config=vision, concatenate_class_token=True)


def test_x_encoder_pools_a_grid_that_is_not_square():
    model = tiny_model(vision_config={"model_type": "dinov2", **TOWER}, visual_token_pooling=2)
    wide = torch.randn(1, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    assert model.encode_video(wide).shape == (1, 2 * (2 * 2 + 1), 48)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_config_rejects_a_visual_token_pooling_that_is_no_whole_number(value):
    message = f"visual_token_pooling is {value!r}: give a whole number"
    with pytest.raises(ValueError, match=message):
        VLJEPAConfig(visual_token_pooling=value)


def test_x_encoder_rejects_a_pooling_larger_than_the_grid():
    assert tiny_model(visual_token_pooling=2).encode_video(PIXELS).shape == (3, 2, 48)
    with pytest.raises(ValueError, match="is 3, but a frame has 2 x 2 patches: give 1 to 2"):
        tiny_model(visual_token_pooling=3)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"model_type": "regnet"}, "a 'regnet', which has no hidden_size"),
        ({"model_type": "bert"}, "a 'bert', which has no image_size"),
        ({"model_type": "clip"}, "a 'clip', which has no hidden_size"),
        (
            {"model_type": "siglip2_vision_model"},
            "a 'siglip2_vision_model', which has no image_size",
        ),
        ({"img_temporal_dim_size": 1}, "with 'img_temporal_dim_size': that is V-JEPA 2.1"),
    ],
)
def test_x_encoder_rejects_encoders_without_usable_tokens(vision, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(vision_config=vision)
