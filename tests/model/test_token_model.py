"""The token-prediction baseline: loss, likelihoods and generation against transformers' own."""

import pytest
import torch
from transformers import AutoModel, LlamaForCausalLM

from modeling_vljepa import VLJEPAConfig, VLJEPATokenModel
from modeling_vljepa.hub_files import pipeline_code
from tests.tiny import run_elsewhere, tiny_batch, tiny_model, tiny_token_model

INPUTS = ("pixel_values_videos", "input_ids", "attention_mask")
# Texts of six, three and one token, the last of each an end token.
LABELS = torch.tensor(
    [[9, 8, 7, 6, 5, 2], [30, 31, 2, -100, -100, -100], [2, -100, -100, -100, -100, -100]]
)


@pytest.fixture(scope="module")
def model() -> VLJEPATokenModel:
    return tiny_token_model()


@pytest.fixture(scope="module")
def hybrid() -> VLJEPATokenModel:
    return tiny_token_model(predicts_embeddings=True)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Three clips and queries of five, two and one token."""
    batch = tiny_batch()
    return {name: batch[name] for name in INPUTS}


@pytest.fixture(scope="module")
def llama(model) -> LlamaForCausalLM:
    """transformers' own language model with the same weights."""
    llama = LlamaForCausalLM(model.predictor.backbone.config).eval()
    llama.load_state_dict(model.predictor.backbone.state_dict())
    return llama


@torch.no_grad()
def states(model: VLJEPATokenModel, inputs: dict[str, torch.Tensor], row: int, text: torch.Tensor):
    """Return the input states (1, N + L + Ly, H) of one row and text without any padding."""
    visual = model.encode_video(inputs["pixel_values_videos"][row : row + 1])
    visual = model.predictor.visual_projection(visual)
    query = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    tokens = model.get_input_embeddings()(torch.cat([query, text])[None])
    return torch.cat([visual, tokens], dim=1)


def real(text: torch.Tensor) -> torch.Tensor:
    return text[text != -100]


# -- the loss ------------------------------------------------------------------------------


@torch.no_grad()
def test_token_loss_equals_that_of_llama_for_causal_lm(model, llama, inputs):
    sums, counts = [], []
    for row in range(3):
        text = real(LABELS[row])
        joined = states(model, inputs, row, text)
        labels = torch.full(joined.shape[:2], -100)
        labels[0, -len(text) :] = text
        loss = llama(inputs_embeds=joined, labels=labels).loss
        sums.append(loss * len(text))
        counts.append(len(text))
    output = model(**inputs, labels=LABELS)
    assert output.target_tokens == sum(counts) == 10
    torch.testing.assert_close(output.loss, sum(sums) / sum(counts), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_token_loss_ignores_padding_and_reads_the_query(model, inputs):
    loss = model(**inputs, labels=LABELS).loss
    padded = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 77)
    others = inputs | {"input_ids": padded}
    assert model(**others, labels=LABELS).loss == loss
    wider = torch.nn.functional.pad(LABELS, (0, 3), value=-100)
    torch.testing.assert_close(model(**inputs, labels=wider).loss, loss)
    # Positive control: a real token of the query matters.
    changed = inputs["input_ids"].clone()
    changed[2, 0] = 77
    assert (model(**inputs | {"input_ids": changed}, labels=LABELS).loss - loss).abs() > 1e-5


def test_token_loss_has_no_gradient_at_labels_outside_the_target(model, inputs):
    output = model(**inputs, labels=LABELS)
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    # (B, L + Ly + 1): position i predicts the token at i + 1, and the first is the last visual
    # token. A row's target follows its query.
    trained = gradient.abs().sum(dim=-1) > 0
    for row, (query, text) in enumerate([(5, 6), (2, 3), (1, 1)]):
        expected = torch.zeros(trained.shape[1], dtype=torch.bool)
        expected[query : query + text] = True
        assert torch.equal(trained[row], expected)


@torch.no_grad()
def test_token_model_reads_stored_visual_tokens_that_rows_share(model, inputs):
    index = torch.tensor([1, 1, 0])
    visual = model.encode_video(inputs["pixel_values_videos"])
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    shared = model(visual_embeds=visual, visual_index=index, **text, labels=LABELS)
    repeated = model(visual_embeds=visual[index], **text, labels=LABELS)
    torch.testing.assert_close(shared.loss, repeated.loss)


def test_token_model_names_bad_inputs(model, inputs):
    with pytest.raises(ValueError, match="^labels is missing"):
        model(**inputs)
    with pytest.raises(ValueError, match="^labels has no token in row 1"):
        model(**inputs, labels=LABELS.where(torch.arange(3)[:, None] != 1, -100))
    with pytest.raises(ValueError, match="predicts tokens alone"):
        model.predict(**inputs)


# -- likelihoods ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 64])
@torch.no_grad()
def test_score_texts_equals_single_forward_passes(model, llama, inputs, batch_size):
    expected = torch.zeros(3, 3)
    for row in range(3):
        for column in range(3):
            text = real(LABELS[column])
            logits = llama(inputs_embeds=states(model, inputs, row, text)).logits[0]
            known = logits[-len(text) - 1 : -1].log_softmax(dim=-1)
            expected[row, column] = known.gather(1, text[:, None]).sum()
    scores = model.score_texts(LABELS, **inputs, batch_size=batch_size)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_score_texts_of_all_one_token_texts_sum_to_one(model, inputs):
    texts = torch.arange(300)[:, None]
    assert model.score_texts(texts, **inputs).exp().sum(dim=1).tolist() == pytest.approx([1] * 3)


# -- generation ----------------------------------------------------------------------------


@torch.no_grad()
def test_token_model_generates_the_greedy_text_of_every_row(model, llama, inputs):
    generated = model.generate(**inputs, max_new_tokens=4)
    for row in range(3):
        text = torch.empty(0, dtype=torch.long)
        while len(text) < 4 and 2 not in text:
            logits = llama(inputs_embeds=states(model, inputs, row, text)).logits[0, -1]
            text = torch.cat([text, logits.argmax()[None]])
        assert generated[row, : len(text)].tolist() == text.tolist()


# -- the hybrid ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "query", "attention"])
@torch.no_grad()
def test_hybrid_predicts_the_embedding_without_reading_the_target(hybrid, inputs, pooling):
    if pooling != "mean":
        by_mean = hybrid.predict(**inputs)
        weights = hybrid.state_dict()
        hybrid = tiny_token_model(predicts_embeddings=True, predictor_pooling=pooling)
        hybrid.load_state_dict(weights, strict=False)
        if pooling == "attention":
            hybrid.predictor_head.attention.vector.weight.normal_()
        assert (hybrid.predict(**inputs) - by_mean).abs().max() > 0.01
    predicted = hybrid.predict(**inputs)
    first = hybrid(**inputs, labels=LABELS)
    second = hybrid(**inputs, labels=LABELS.flip(0))
    assert (first.loss - second.loss).abs() > 1e-3
    for output in (first, second):
        torch.testing.assert_close(output.predicted_embeds, predicted, rtol=1e-4, atol=1e-5)
    assert predicted.norm(dim=1).tolist() == pytest.approx([1] * 3)


@torch.no_grad()
def test_hybrid_embeds_targets_as_the_vljepa_of_the_same_weights(hybrid, inputs):
    batch = tiny_batch()
    target = {name: batch[name] for name in ("target_input_ids", "target_attention_mask")}
    base = tiny_model()
    base.y_encoder.load_state_dict(hybrid.y_encoder.state_dict())
    base.y_head.load_state_dict(hybrid.y_head.state_dict())
    found = hybrid(**inputs, **target, labels=LABELS).target_embeds
    torch.testing.assert_close(found, base.encode_target(**target))


# -- files ---------------------------------------------------------------------------------


@torch.no_grad()
def test_token_model_is_loaded_by_auto_model(hybrid, inputs, tmp_path):
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is VLJEPATokenModel
    assert loaded.config.predictor_config.is_causal
    torch.testing.assert_close(
        loaded(**inputs, labels=LABELS).loss, hybrid(**inputs, labels=LABELS).loss
    )
    frozen = {name for name, weight in loaded.named_parameters() if not weight.requires_grad}
    assert frozen and all(
        name.startswith("x_encoder.") or "embed_tokens" in name for name in frozen
    )
    with pytest.raises(ValueError, match="a checkpoint of a 'vljepa_tokens' model"):
        VLJEPAConfig.from_pretrained(tmp_path)


def test_code_of_the_token_model_is_saved_with_token_models_only(model, tmp_path):
    model.save_pretrained(tmp_path / "tokens")
    tiny_model().save_pretrained(tmp_path / "vljepa")
    assert (tmp_path / "tokens" / "token_model.py").is_file()
    assert not (tmp_path / "vljepa" / "token_model.py").exists()
    assert not any((tmp_path / "tokens" / name).exists() for name in pipeline_code(""))


@pytest.mark.slow
def test_token_model_loads_without_this_package(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "tokens")
    script = (
        "import torch\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('tokens', trust_remote_code=True)\n"
        "print(float(model.predictor.backbone.lm_head.weight.double().sum()))"
    )
    found = float(run_elsewhere(script, tmp_path).splitlines()[-1])
    assert found == pytest.approx(
        float(model.predictor.backbone.lm_head.weight.detach().double().sum())
    )
