"""The joint model: saving and loading, embedding, gradients and the loss."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.losses import info_nce
from tests.tiny import BERT, run_elsewhere, tiny_batch, tiny_model

BATCH = tiny_batch()


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: VLJEPAModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def query(batch: dict[str, torch.Tensor] = BATCH) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("pixel_values_videos", "input_ids", "attention_mask")}


# -- saving and loading --------------------------------------------------------------------


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two computations of one tensor: to rounding, not to the last bit.

    Weights from a file are not aligned in memory, and a matrix product of one row may round
    differently for them.
    """
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_model_loaded_equals_saved(model, folder, tmp_path):
    """The weights bit by bit, the outputs to rounding."""
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is VLJEPAModel and not loaded.training
    assert isinstance(AutoConfig.from_pretrained(folder), VLJEPAConfig)
    loaded.save_pretrained(tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    # Gemma halves its window when it is made, and must not do so again at every loading.
    assert model.config.text_config.sliding_window == 5
    assert AutoConfig.from_pretrained(tmp_path).text_config.sliding_window == 5
    with torch.no_grad():
        expected, result = (some(**BATCH, return_loss=True) for some in (model, loaded))
    for name in expected:
        assert_near(result[name], expected[name])
    assert len(expected) == 5


@pytest.mark.slow
def test_saved_model_loads_without_this_package(model, folder, tmp_path):
    """The process loads the model as remote code; it cannot import `modeling_vljepa`."""
    with torch.no_grad():
        torch.save((BATCH, dict(model(**BATCH, return_loss=True))), tmp_path / "expected.pt")
    script = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    outputs = model(**batch, return_loss=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert not model.x_encoder.backbone.encoder.layernorm.weight.requires_grad
for name in expected:
    torch.testing.assert_close(outputs[name], expected[name], rtol=1e-6, atol=1e-6)
print("equal", len(expected))
"""
    assert run_elsewhere(script, tmp_path) == "equal 5"


def test_saved_folder_holds_the_code_of_models_and_pipelines(folder):
    package = Path(__file__).parents[2] / "modeling_vljepa"
    # The token baseline is another model: its folders have its code, these do not.
    shipped = {path.name for path in package.rglob("[!_]*.py")} - {"token_model.py"}
    assert {path.name for path in folder.glob("*.py")} == shipped
    assert {"modeling_vljepa.py", "pipeline_vljepa.py", "st_vljepa.py"} < shipped


def test_temperature_starts_at_clips_value_and_is_bounded(model, folder, tmp_path):
    torch.testing.assert_close(model.logit_scale(), torch.tensor([1 / 0.07]))
    weights = load_file(folder / "model.safetensors")
    del weights["logit_scale.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = VLJEPAModel.from_pretrained(tmp_path, config=copy.deepcopy(model.config))
    torch.testing.assert_close(loaded.logit_scale(), torch.tensor([1 / 0.07]))
    loaded.logit_scale.weight.data.fill_(10.0)
    assert loaded.logit_scale().item() == 100  # at most


BOUND = math.log(100)


@pytest.mark.parametrize(
    ("logarithm", "scale"),
    [(0.0, 1.0), (BOUND - 1, 100 / math.e), (BOUND, 100.0), (4.7, 100.0), (1e4, 100.0)]
    + [(-BOUND, 0.01), (-50.0, 0.01), (-1e4, 0.01)],
)
def test_temperature_is_bounded_and_its_gradient_passes_the_bound(logarithm, scale):
    """A clip of the value alone has no gradient beyond it; exp(1e4) would be infinite."""
    temperature = tiny_model().logit_scale
    temperature.weight.data.fill_(logarithm)
    value = temperature()
    assert value.item() == pytest.approx(scale, rel=1e-6)
    (3 * value).backward()
    assert temperature.weight.grad.item() == pytest.approx(3 * scale, rel=1e-6)


def test_temperature_comes_back_from_beyond_its_bound():
    """The untrained model's pairs want a scale near 1; everything else is fixed."""
    model = tiny_model().train()
    weight = model.logit_scale.weight
    weight.data.fill_(4.7)
    optimizer, losses = torch.optim.Adam([weight], lr=0.1), []
    with torch.no_grad():
        outputs = model(**BATCH)
    for _ in range(40):
        optimizer.zero_grad()
        scale = model.logit_scale()
        losses.append(info_nce(outputs.predicted_embeds, outputs.target_embeds, scale).loss)
        losses[-1].backward()
        optimizer.step()
    assert weight.item() < 3
    assert losses[-1] < losses[0] / 2


def test_new_projections_have_the_configured_standard_deviation():
    model = tiny_model(initializer_range=0.5, logit_scale_init_value=math.log(3))
    for layer in (
        model.predictor.visual_projection,
        model.predictor_head.projection,
        model.y_head.projection,
    ):
        assert layer.weight.std().item() == pytest.approx(0.5, rel=0.1)
        assert (layer.bias == 0).all()
    assert model.predictor.backbone.layers[0].mlp.up_proj.weight.std().item() < 0.03  # own range
    assert model.logit_scale().item() == pytest.approx(3)


FLAGS = {
    "freeze_vision": "x_encoder.",
    "freeze_text": "y_encoder.",
    "freeze_token_embedding": "predictor.backbone.embed_tokens.",
    "freeze_logit_scale": "logit_scale.",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_loaded_model_is_frozen_as_configured(flag, tmp_path):
    """Loading replaces the parameters, and the new ones have `requires_grad=True`."""
    model = tiny_model(**{name: name == flag for name in FLAGS})
    model.save_pretrained(tmp_path)
    loaded, info = VLJEPAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    for some in (model, loaded, AutoModel.from_pretrained(tmp_path)):
        frozen = {name for name, p in some.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in some.named_parameters() if n.startswith(FLAGS[flag])}
        assert frozen
    thawed = VLJEPAModel.from_pretrained(tmp_path, **{flag: False})
    assert all(p.requires_grad for p in thawed.parameters())
    assert not (thawed.x_encoder.frozen or thawed.y_encoder.frozen)


# -- embedding -----------------------------------------------------------------------------


def test_predict_from_visual_embeds_equals_from_pixels(model):
    with torch.no_grad():
        expected = model.predict(**query())
        texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        visual_embeds = model.encode_video(BATCH["pixel_values_videos"])
        assert_near(model.predict(visual_embeds=visual_embeds, **texts), expected)
        outputs = model(visual_embeds=visual_embeds, **texts)
    assert_near(outputs.predicted_embeds, expected)
    assert outputs.target_embeds is None and outputs.loss is None
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


def test_predict_with_visual_index_encodes_a_shared_video_once(model):
    pixels, index = BATCH["pixel_values_videos"][:2], torch.tensor([1, 0, 1])
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    seen = []
    hook = model.x_encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.no_grad():
        for queries in (texts, {}):
            expected = model.predict(pixels[index], **queries)
            assert_near(model.predict(pixels, visual_index=index, **queries), expected)
            outputs = model(pixel_values_videos=pixels, visual_index=index, **queries)
            assert_near(outputs.predicted_embeds, expected)
            again = {"visual_embeds": outputs.visual_embeds, "visual_index": index}
            assert_near(model.predict(**again, **queries), expected)
            assert not torch.allclose(model.predict(pixels[1 - index], **queries), expected)
    hook.remove()
    assert seen == [3, 2, 2, 3] * 2


def test_model_gradient_with_visual_index_equals_that_of_repeated_videos():
    index = torch.tensor([1, 0, 1])
    shared, repeated = (tiny_model(freeze_vision=False) for _ in range(2))
    batch = {**BATCH, "pixel_values_videos": BATCH["pixel_values_videos"][:2]}
    shared(**batch, visual_index=index, return_loss=True).loss.backward()
    batch["pixel_values_videos"] = batch["pixel_values_videos"][index]
    repeated(**batch, return_loss=True).loss.backward()
    for (name, one), two in zip(shared.named_parameters(), repeated.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert shared.x_encoder.backbone.encoder.layer[0].mlp.fc1.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "2 videos and 3 queries: give one query for each video, one video.*visual_index"),
        ({"visual_index": torch.tensor([0, 1])}, r"visual_index has shape \(2,\) for 3 queries"),
        ({"visual_index": torch.zeros(3, 1).long()}, r"visual_index has shape \(3, 1\) for 3"),
    ],
)
def test_predict_rejects_videos_that_do_not_match_the_queries(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model.predict(BATCH["pixel_values_videos"][:2], BATCH["input_ids"], **inputs)


def test_model_with_visual_token_pooling_is_saved_and_loaded(folder, tmp_path):
    """A checkpoint without it can be loaded with it: it adds no weights."""
    pooled = VLJEPAModel.from_pretrained(folder, visual_token_pooling=2)
    pooled.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.visual_token_pooling == 2
    plain = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected, result = (some.predict(**query()) for some in (pooled, loaded))
        assert_near(result, expected)
        tokens = plain.encode_video(BATCH["pixel_values_videos"])  # 2 tubelets of 2 x 2 patches
        means = tokens.unflatten(1, (2, 4)).mean(dim=2)
        texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        assert_near(plain.predict(visual_embeds=means, **texts), expected)
        assert not torch.allclose(plain.predict(**query()), expected, atol=1e-3)


def test_predict_rejects_missing_or_double_visual_inputs(model):
    ids = BATCH["input_ids"]
    for both_or_none in ({}, {**query(), "visual_embeds": torch.zeros(3, 8, 48)}):
        with pytest.raises(ValueError, match="pixel_values_videos or visual_embeds, and not both"):
            model.predict(**({"input_ids": ids} | both_or_none))


def test_predict_without_query_equals_an_empty_query(model):
    """The paper's pretraining has no query and predicts a caption."""
    pixels, nothing = BATCH["pixel_values_videos"], torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        expected = model.predict(pixels, nothing)
        assert_near(model.predict(pixels), expected)
        assert_near(model(pixel_values_videos=pixels).predicted_embeds, expected)
        assert not torch.allclose(model.predict(**query()), expected, atol=1e-3)


def test_encode_target_from_pooler_output_equals_from_tokens(model):
    ids, mask = BATCH["target_input_ids"], BATCH["target_attention_mask"]
    with torch.no_grad():
        expected = model.encode_target(ids, mask)
        pooled = model.y_encoder(ids, mask)
        assert_near(model.encode_target(target_pooler_output=pooled), expected)
        index = torch.tensor([2, 0, 2])
        outputs = model(**query(), target_pooler_output=pooled, target_index=index)
    assert_near(outputs.target_embeds, expected[index])
    for both_or_none in ({}, {"target_input_ids": ids, "target_pooler_output": pooled}):
        with pytest.raises(ValueError, match="target_input_ids or target_pooler_output"):
            model.encode_target(**both_or_none)


def test_model_rejects_invalid_token_ids_masks_and_unmasked_padding(model):
    """On a GPU, an id outside the vocabulary fails with an assertion that names no tensor. Padding
    without a mask would be read as text."""
    pixels, ids = BATCH["pixel_values_videos"], BATCH["input_ids"]
    mask = BATCH["attention_mask"]
    for wrong in (300, -1):
        bad = ids.masked_fill(ids == ids[0, 0], wrong)
        message = f"input_ids holds the id {wrong}, but the vocabulary of this encoder has 300"
        with pytest.raises(ValueError, match=f"^{message}"):
            model.predict(pixels, bad, mask)
        with pytest.raises(ValueError, match=f"^target_{message}"):
            model.encode_target(bad, mask)
    padded = ids * mask
    with pytest.raises(ValueError, match=r"^target_input_ids holds padding \(id 0\), which would"):
        model.encode_target(padded)
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \(3, 4\), input_ids has \(3, 5\)"
    ):
        model.predict(pixels, ids, mask[:, :4])
    with torch.no_grad():
        embeds = model.encode_target(padded, mask)  # with a mask, padding is ignored
        alone = model.encode_target(ids[2:, :1])
        torch.testing.assert_close(embeds[2:], alone, rtol=0, atol=1e-5)


IDS, MASK = BATCH["target_input_ids"], BATCH["target_attention_mask"]
BLANK = MASK * torch.tensor([[1], [0], [1]])  # row 1 has no token
TOKENS = {
    "no_rows": (
        {"input_ids": IDS[:0], "attention_mask": MASK[:0]},
        r"input_ids has shape \(0, 12\): give \(batch, length\), with at least one row",
    ),
    "one_axis": ({"input_ids": IDS[0]}, r"input_ids has shape \(12,\): give \(batch, length\)"),
    "no_length": (
        {"input_ids": IDS[:, :0], "attention_mask": MASK[:, :0]},
        r"input_ids has shape \(3, 0\), no token in any row: an empty text has no embedding, so",
    ),
    "no_token": (
        {"input_ids": IDS, "attention_mask": BLANK},
        r"attention_mask has no real token in row 1: an empty text has no embedding, so leave it",
    ),
    "no_token_of_bool": (
        {"input_ids": IDS, "attention_mask": BLANK.bool()},
        r"attention_mask has no real token in row 1: an empty text has no embedding, so leave it",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", TOKENS)
def test_model_rejects_targets_without_rows_or_tokens(model, case, training):
    """Without a check, they give a zero vector, NaN, or an index error of torch."""
    given, message = TOKENS[case]
    targets = {f"target_{name}": tensor for name, tensor in given.items()}
    model.train(training)
    try:
        with pytest.raises(ValueError, match=f"^target_{message}"):
            model.encode_target(**targets)
        with pytest.raises(ValueError, match=f"^target_{message}"):
            model(**query(), **targets, return_loss=True)
        with pytest.raises(ValueError, match=f"^{message}"):
            model.get_text_features(**given)
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"pixel_values_videos": torch.zeros(0, 4, 3, 32, 32)},
            r"pixel_values_videos has shape \(0",
        ),
        (
            {"visual_embeds": torch.zeros(0, 8, 48)},
            r"visual_embeds has shape \(0, 8, 48\): give \(b",
        ),
        (
            {"visual_embeds": torch.zeros(2, 0, 48)},
            r"visual_embeds has shape \(2, 0, 48\): give \(b",
        ),
        (
            {"visual_embeds": torch.zeros(8, 48)},
            r"visual_embeds has shape \(8, 48\): give \(batch,",
        ),
        (
            {"visual_embeds": torch.zeros(1, 8, 48), "input_ids": torch.zeros(0, 3).long()},
            r"input_ids has shape \(0, 3\): give \(batch, length\), with at least one row",
        ),
    ],
)
def test_model_rejects_media_and_queries_without_rows(model, given, message):
    for call in (model.predict, model):
        with pytest.raises(ValueError, match=f"^{message}"):
            call(**given)


def test_encode_target_rejects_a_pooler_output_without_rows(model):
    with pytest.raises(
        ValueError, match=r"^target_pooler_output has shape \(0, 32\): give \(batch"
    ):
        model.encode_target(target_pooler_output=torch.zeros(0, 32))
    with pytest.raises(
        ValueError, match=r"^target_pooler_output has shape \(32,\): give \(batch, w"
    ):
        model(**query(), target_pooler_output=torch.zeros(32))


def test_predict_takes_queries_without_tokens(model):
    """A query of no token, or of padding alone, asks for a caption."""
    pixels = BATCH["pixel_values_videos"]
    with torch.no_grad():
        expected = model.predict(pixels)
        assert expected.norm(dim=1).tolist() == pytest.approx([1] * 3)
        masked = model.predict(pixels, BATCH["input_ids"], torch.zeros(3, 5, dtype=torch.long))
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-5)
        without = model.predict(pixels, BATCH["input_ids"][:, :0], BATCH["attention_mask"][:, :0])
        assert_near(without, expected)


# Encoders with a table of absolute positions, and how many tokens each can read.
LIMITED = {
    "bert": ({**BERT, "max_position_embeddings": 20}, 20),
    "roberta": ({**BERT, "model_type": "roberta", "max_position_embeddings": 20}, 18),
    "mpnet": ({**BERT, "model_type": "mpnet", "max_position_embeddings": 20}, 18),
    "clip": (
        {**BERT, "model_type": "clip_text_model", "max_position_embeddings": 20, "eos_token_id": 2},
        20,
    ),
}


@pytest.mark.parametrize("kind", LIMITED)
def test_model_rejects_texts_beyond_the_position_table_of_the_y_encoder(kind):
    """Its tokenizer may allow longer texts. Unchecked, that is an index error, on a GPU of all."""
    config, limit = LIMITED[kind]
    limited = tiny_model(text_config=config)
    ids = torch.full((1, limit + 1), 5)
    with torch.no_grad():
        embeds = limited.encode_target(ids[:, :limit], torch.ones_like(ids[:, :limit]))
        assert embeds.norm().item() == pytest.approx(1)
        message = f"has {limit + 1} tokens, but the position table of this {config['model_type']} "
        message += f"ends at {limit}: give the processor a max_target_length of {limit}"
        with pytest.raises(ValueError, match=f"^target_input_ids {message}"):
            limited.encode_target(ids, torch.ones_like(ids))
        assert tiny_model().y_encoder.limit is None  # rotary positions


def test_from_pretrained_rejects_another_architecture(tmp_path):
    """Upstream warns only, and loads random weights."""
    AutoModel.from_config(tiny_model(text_config=BERT).config.text_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a checkpoint of a 'bert' model, not of a VL-JEPA"):
        VLJEPAModel.from_pretrained(tmp_path)


def test_features_methods_equal_predict_and_encode(model):
    pixels, ids, mask = (query()[name] for name in query())
    with torch.no_grad():
        features = model.get_video_features(pixels, ids, mask)
        assert_near(features.pooler_output, model.predict(pixels, ids, mask))
        assert_near(features.last_hidden_state, model.encode_video(pixels))
        nothing = torch.empty(3, 0, dtype=torch.long)
        expected = model.predict(pixels[:, :1], nothing)
        assert_near(model.get_image_features(pixels[:, 0]).pooler_output, expected)
        ids, mask = BATCH["target_input_ids"], BATCH["target_attention_mask"]
        assert_near(
            model.get_text_features(ids, mask).pooler_output, model.encode_target(ids, mask)
        )


def test_model_output_is_independent_of_padding_and_batch(model):
    with torch.no_grad():
        expected = model(**BATCH)
        order = torch.tensor([2, 0, 1])
        permuted = model(**{name: tensor[order] for name, tensor in BATCH.items()})
        longer = torch.nn.functional.pad
        padded = model(
            **BATCH
            | {name: longer(BATCH[name], (0, 4)) for name in ("input_ids", "attention_mask")}
            | {k: longer(BATCH[k], (0, 9)) for k in ("target_input_ids", "target_attention_mask")}
        )
        for row in range(3):
            alone = {name: tensor[row : row + 1] for name, tensor in BATCH.items()}
            for prefix in ("", "target_"):  # cut to the text itself, without a mask
                length = int(alone.pop(f"{prefix}attention_mask").sum())
                alone[f"{prefix}input_ids"] = alone[f"{prefix}input_ids"][:, :length]
            single = model(**alone)
            for name in ("predicted_embeds", "target_embeds"):
                reference = expected[name][row : row + 1]
                torch.testing.assert_close(single[name], reference, rtol=0, atol=1e-5)
    for name in ("predicted_embeds", "target_embeds"):
        torch.testing.assert_close(permuted[name], expected[name][order], rtol=0, atol=1e-5)
        torch.testing.assert_close(padded[name], expected[name], rtol=0, atol=1e-5)
        assert (expected[name][0] - expected[name][1]).abs().max() > 1e-2  # rows do differ


def test_predict_depends_on_order_of_frames_positions_and_words(model):
    """A model that pools the visual tokens before the Predictor would run and train, but could not
    distinguish the order of frames or the position of objects."""
    with torch.no_grad():
        expected = model.predict(**query())

        def moved(**changes: torch.Tensor) -> float:
            changed = model.predict(**(query() | changes))
            return (changed - expected).norm(dim=1).min().item()

        pixels = BATCH["pixel_values_videos"]
        assert moved(pixel_values_videos=pixels[:, [2, 3, 0, 1]]) > 1e-4  # order of frames
        assert moved(pixel_values_videos=pixels.roll(16, dims=-1)) > 1e-4  # position
        assert moved(input_ids=BATCH["input_ids"].roll(1, dims=0)) > 1e-3
        swapped = BATCH["input_ids"][:1, [1, 0, 2, 3, 4]].expand(3, -1)
        plain = BATCH["input_ids"][:1].expand(3, -1)
        full = torch.ones_like(plain)
        order = [model.predict(pixels, ids, full) for ids in (plain, swapped)]
        assert (order[0] - order[1]).norm(dim=1).min() > 1e-4  # order of words
        assert moved() < 1e-6


@pytest.mark.parametrize("text_config", [{}, BERT], ids=["gemma", "bert"])
def test_every_trainable_parameter_gets_a_gradient(text_config):
    model = tiny_model(freeze_vision=False, freeze_token_embedding=False, text_config=text_config)
    model.train()
    model(**BATCH, return_loss=True).loss.backward()
    assert all(p.requires_grad for p in model.parameters())
    empty = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert empty == []


# -- the loss ------------------------------------------------------------------------------


def test_target_index_gives_the_loss_and_gradient_of_repeated_targets(model):
    """`target_index` selects rows of the distinct targets; repeating these rows in the input gives
    the same loss and gradient."""
    index = torch.tensor([2, 0, 2])
    ids, mask = BATCH["target_input_ids"], BATCH["target_attention_mask"]
    repeated = {"target_input_ids": ids[index], "target_attention_mask": mask[index]}
    results = []
    for targets in ({"target_index": index}, repeated):
        model.zero_grad()
        outputs = model(**(BATCH | targets))
        scale = outputs.logit_scale
        loss = info_nce(outputs.predicted_embeds, outputs.target_embeds, scale, index).loss
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    model.zero_grad()
    (loss, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_model_loss_excludes_repeated_targets_from_the_negatives(model):
    index = torch.tensor([0, 0, 1])
    with torch.no_grad():
        outputs = model(**BATCH, target_index=index, return_loss=True)
        parts = outputs.predicted_embeds, outputs.target_embeds, outputs.logit_scale
        assert_near(outputs.loss, info_nce(*parts, index).loss)
        assert (outputs.loss - info_nce(*parts).loss).abs() > 0.1  # positive control
        plain = model(**BATCH, return_loss=True)
        parts = plain.predicted_embeds, plain.target_embeds, plain.logit_scale
        assert_near(plain.loss, info_nce(*parts).loss)
