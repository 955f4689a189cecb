"""Perception Encoder: equal to an independent reference, each of its parts proved."""

import copy
from functools import cache

import pytest
import torch

from modeling_vljepa import (
    PerceptionEncoderVisionConfig,
    PerceptionEncoderVisionModel,
    VLJEPAModel,
)
from modeling_vljepa.attention import SDPA_OR_PLAIN
from tests.model.perception_reference import (
    POOLING_PARTS,
    TEXT_PARTS,
    VISION_PARTS,
    Weights,
    encode_images,
    encode_texts,
    pool_images,
    random_text,
    random_vision,
)
from tests.tiny import PERCEPTION, PERCEPTION_TEXT, tiny_batch, tiny_model

WIDTH, DEPTH, HEADS, MLP, SIDE, PATCH = 64, 2, 2, 160, 3, 14
SETTINGS = {
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "output_dim": 24,
}
PIXELS = tiny_batch()["pixel_values_videos"]

# Our names of parts of published names, in the order in which they are replaced.
NAMES = {
    "conv1.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding",
    "ln_pre": "pre_layernorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "layers",
    "attn_pool.attn": "pooler.attention",
    "attn_pool": "pooler",
    ".attn.": ".self_attn.",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "ls_1.gamma": "layer_scale1",
    "ls_2.gamma": "layer_scale2",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


def to_ours(weights: Weights) -> Weights:
    """Return published weights under our names."""
    ours = {}
    for name, tensor in weights.items():
        if name in ("proj", "text_projection"):  # matrices that are multiplied from the right
            ours["pooler.projection.weight" if name == "proj" else name] = tensor.T
            continue
        for theirs, our in NAMES.items():
            name = name.replace(theirs, our)
        if "in_proj" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                ours[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            ours[name] = tensor
    return ours


# The published kinds: with and without a class token, a final norm, scales and pooling.
KINDS = {
    "core": ({}, {}),
    "core G": ({"use_cls_token": False}, {"class_token": False}),
    "lang": (
        {"use_ln_post": False, "ls_init_value": 0.1, "pool_type": "none", "output_dim": None},
        {"scales": True, "final_norm": False, "pooled": None},
    ),
    "spatial": (
        {"use_ln_post": False, "pool_type": "none", "output_dim": None},
        {"final_norm": False, "pooled": None},
    ),
}


@cache
def weights_of(kind: str) -> Weights:
    return random_vision(WIDTH, DEPTH, MLP, patch=PATCH, side=SIDE, **KINDS[kind][1])


def loaded(kind: str = "core", **changes: object) -> PerceptionEncoderVisionModel:
    """Return an encoder with the reference's weights."""
    config = PerceptionEncoderVisionConfig(**{**SETTINGS, **KINDS[kind][0], **changes})
    model = PerceptionEncoderVisionModel(config).eval()
    model.load_state_dict(to_ours(weights_of(kind)))
    return model


built = cache(loaded)  # for tests that only read it


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# The grid of the table of positions, grids that are larger and smaller, and of one row or column.
SIZES = {
    "own": (2, 3, 42, 42),
    "wide": (1, 3, 28, 70),
    "large": (2, 3, 84, 56),
    "row": (1, 3, 14, 42),
    "column": (1, 3, 56, 14),
    "patch": (1, 3, 14, 14),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_perception_encoder_equals_the_reference(kind, shape):
    found = built(kind)(images(*shape))
    expected = encode_images(weights_of(kind), images(*shape), HEADS)
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0, atol=1e-5)
    if "proj" in weights_of(kind):
        feature = pool_images(weights_of(kind), expected)
        torch.testing.assert_close(found.pooler_output, feature, rtol=0, atol=1e-5)
    else:
        assert found.pooler_output is None


@torch.no_grad()
@pytest.mark.parametrize("part", VISION_PARTS)
def test_perception_encoder_has_each_part(part):
    """The reference without one of them computes other features."""
    kind = "lang" if part == "scales" else "core"
    pixels = images(*SIZES["wide"])
    found = built(kind)(pixels).last_hidden_state
    without = encode_images(weights_of(kind), pixels, HEADS, frozenset({part}))
    assert (found - without).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("part", [*POOLING_PARTS, "heads"])
def test_perception_encoder_pooling_has_each_part(part):
    pixels = images(*SIZES["own"])
    states = encode_images(weights_of("core"), pixels, HEADS)
    heads = HEADS if part == "heads" else 8
    without = pool_images(weights_of("core"), states, frozenset({part}), heads)
    assert (built("core")(pixels).pooler_output - without).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4, 16])
def test_perception_encoder_rotates_heads_of_any_size(heads):
    found = loaded(num_attention_heads=heads)(images(*SIZES["wide"])).last_hidden_state
    expected = encode_images(weights_of("core"), images(*SIZES["wide"]), heads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", SDPA_OR_PLAIN])
def test_perception_encoder_kernels_equal_eager(kernel):
    model, pixels = loaded(), images(*SIZES["own"])
    model.set_attn_implementation(kernel)
    found = model(pixels)
    model.set_attn_implementation("eager")
    outputs = model(pixels, output_attentions=True, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name], outputs[name], rtol=0, atol=1e-5)
    assert len(outputs.hidden_states) == DEPTH + 1
    assert [tuple(each.shape) for each in outputs.attentions] == [(2, HEADS, 10, 10)] * DEPTH
    sums = outputs.attentions[0].sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def gradients(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs = model(pixels)
    read = outputs.last_hidden_state if outputs.pooler_output is None else outputs.pooler_output
    read.square().sum(dim=-1).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["core", "lang"])
def test_perception_encoder_gradient_checkpointing_gives_equal_gradients(kind):
    model = loaded(kind).train()
    expected = gradients(model, images(*SIZES["wide"]))
    # No parameter is without a gradient: data-parallel training would stop.
    assert expected.keys() == dict(model.named_parameters()).keys()
    model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.layers)
    found = gradients(model, images(*SIZES["wide"]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_perception_encoder_initialises_its_weights():
    torch.manual_seed(0)
    settings = {"hidden_size": 256, "attn_pooler_heads": 4, "ls_init_value": 0.1}
    model = PerceptionEncoderVisionModel(PerceptionEncoderVisionConfig(**SETTINGS | settings))
    embeddings, layer = model.embeddings, model.layers[1]
    expected = {
        1 / 16: [embeddings.class_embedding, embeddings.position_embedding],
        0.02: [
            embeddings.patch_embedding.weight,
            layer.mlp.fc1.weight,
            layer.self_attn.q_proj.weight,
        ],
        1.0: [model.pooler.probe],
    }
    for std, weights in expected.items():
        for weight in weights:
            assert weight.std().item() == pytest.approx(std, rel=0.2)
    assert (layer.layer_scale1 == 0.1).all() and (layer.layer_scale2 == 0.1).all()
    assert not layer.self_attn.out_proj.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "64 for 3 heads: the size of a head must be a multiple of 4"),
        ({"num_attention_heads": 32}, "must be a multiple of 4"),
        ({"image_size": 13}, "image_size is 13 and patch_size 14: an image must have"),
        ({"pool_type": "avg"}, "pool_type is 'avg': give 'attn' or 'none'"),
        ({"pool_type": "none"}, "output_dim is 24 with a pool_type of 'none'"),
        ({"attn_pooler_heads": 5}, "64 for 5 attn_pooler_heads"),
        ({"attn_pooler_heads": 0}, "attn_pooler_heads is 0: give 1 or more"),
        ({"num_attention_heads": -2}, "num_attention_heads is -2: give 1 or more"),
        ({"output_dim": 0}, "output_dim is 0: give 1 or more"),
    ],
)
def test_perception_encoder_rejects_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        PerceptionEncoderVisionModel(PerceptionEncoderVisionConfig(**SETTINGS | changes))


@pytest.mark.parametrize("shape", [(1, 2, 3, 42, 42), (3, 42, 42)])
def test_perception_encoder_rejects_pixels_with_other_axes_than_images_have(shape):
    with pytest.raises(ValueError, match="pixel_values has shape .* expected .images, channels"):
        built()(torch.zeros(shape))


# -- as X-Encoder and Y-Encoder ------------------------------------------------------------

TEXT = random_text(32, 2, context=32, vocabulary=300, output=20)
DENSE = {"out_features": 20, "bias": False, "activation": "linear"}
END = 299  # the end token has the highest id


def both_towers(**changes: object) -> VLJEPAModel:
    """Return a VL-JEPA with the image and the text tower, both with the reference's weights."""
    model = tiny_model(
        **{
            "vision_config": PERCEPTION | SETTINGS,
            "text_config": PERCEPTION_TEXT,
            "text_pooling": "lasttoken",
            "text_dense": [DENSE],
        }
        | changes
    )
    vision = to_ours(weights_of("core"))
    vision = {name: t for name, t in vision.items() if not name.startswith("pooler.")}
    model.x_encoder.backbone.load_state_dict(vision)
    text = to_ours(TEXT)
    model.y_encoder.dense[0].linear.weight.data = text.pop("text_projection")
    names = {"token_embedding.weight": "embeddings.token_embedding.weight"}
    names["embeddings.position_embedding"] = "embeddings.position_embedding.weight"
    text = {names.get(name, name): tensor for name, tensor in text.items()}
    text = {n.replace("layers.", "encoder.layers.", 1): tensor for n, tensor in text.items()}
    model.y_encoder.backbone.load_state_dict(text)
    return model


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return both_towers()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 4, 3, 42, 42), (1, 3, 3, 28, 70), (2, 1, 3, 56, 42)])
def test_x_encoder_perception_encoder_reads_frames_without_the_class_token(model, shape):
    video = images(*shape)
    frames = [encode_images(weights_of("core"), frame, HEADS)[:, 1:] for frame in video.unbind(1)]
    found = model.encode_video(video)
    assert found.shape == (shape[0], shape[1] * (shape[3] // 14) * (shape[4] // 14), WIDTH)
    torch.testing.assert_close(found, torch.cat(frames, dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_x_encoder_perception_encoder_without_a_class_token_keeps_every_token():
    model = tiny_model(vision_config=PERCEPTION | {"use_cls_token": False})
    expected = model.x_encoder.backbone(PIXELS[:, 0]).last_hidden_state
    torch.testing.assert_close(model.encode_video(PIXELS[:, :1]), expected, rtol=0, atol=1e-6)
    assert expected.shape == (3, 2 * 2, 48)


def test_vljepa_with_both_towers_of_perception_encoder_trains_every_parameter():
    """An unused pooling or projection would get no gradient, and data-parallel training would
    stop."""
    model = tiny_model(
        vision_config=PERCEPTION,
        text_config=PERCEPTION_TEXT,
        text_pooling="lasttoken",
        text_dense=[DENSE],
        freeze_vision=False,
    ).train()
    assert model.x_encoder.backbone.config._attn_implementation == SDPA_OR_PLAIN
    assert not [name for name, _ in model.x_encoder.named_parameters() if "pooler" in name]
    model(**tiny_batch(), return_loss=True).loss.backward()
    for encoder in (model.x_encoder, model.y_encoder):
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("name", "value"), [("use_rope2d", False), ("n_registers", 1)])
def test_x_encoder_perception_encoder_rejects_settings_that_it_would_ignore(name, value):
    message = f"a 'perception_encoder_vision' whose '{name}' is {value}, which this encoder"
    with pytest.raises(ValueError, match=message):
        tiny_model(vision_config=PERCEPTION | {name: value})


def texts(*lengths: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `(B, total)` of texts that end with the end token, padded with 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, END, (len(lengths), total), generator=generator)
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return ids * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager", SDPA_OR_PLAIN])
@pytest.mark.parametrize("lengths", [(8,), (9, 4, 2), (32, 1)], ids=str)
def test_y_encoder_perception_encoder_text_equals_the_reference(model, lengths, kernel):
    ids, mask = texts(*lengths, total=max(lengths))
    encoder = model.y_encoder
    encoder.backbone.set_attn_implementation(kernel)
    expected = encode_texts(TEXT, ids, 4)
    torch.testing.assert_close(encoder(ids, mask), expected, rtol=0, atol=1e-5)
    padded = torch.nn.functional.pad(ids, (0, 32 - ids.shape[1]))  # as the published tokenizer
    torch.testing.assert_close(encode_texts(TEXT, padded, 4), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("part", TEXT_PARTS)
def test_y_encoder_perception_encoder_text_has_each_part(model, part):
    ids, mask = texts(9, 4, total=9)
    without = encode_texts(TEXT, ids, 4, frozenset({part}))
    assert (model.y_encoder(ids, mask) - without).abs().max() > 1e-2


def test_y_encoder_perception_encoder_text_rejects_texts_beyond_its_positions(model):
    ids, mask = texts(33, total=33)
    with pytest.raises(ValueError, match="position table of this clip_text_model ends at 32"):
        model.y_encoder(ids, mask)


# -- saved and compiled; tests/training/test_export.py exports it ------------------------------


def test_vljepa_with_perception_encoder_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text().count('"perception_encoder_vision"') == 1
    same = VLJEPAModel.from_pretrained(tmp_path).eval()
    video = images(1, 2, 3, 42, 28)
    ids, mask = texts(5, 3, total=5)
    with torch.no_grad():
        for found, expected in (
            (same.predict(video), model.predict(video)),
            (same.encode_target(ids, mask), model.encode_target(ids, mask)),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_perception_encoder_compiles_without_graph_breaks(model):
    x_encoder = copy.deepcopy(model.x_encoder)
    compiled = torch.compile(x_encoder, fullgraph=True, backend="eager")
    for shape in ((2, 2, 3, 42, 42), (1, 1, 3, 28, 56)):
        expected = model.encode_video(images(*shape))
        torch.testing.assert_close(compiled(images(*shape)), expected, rtol=0, atol=1e-5)
