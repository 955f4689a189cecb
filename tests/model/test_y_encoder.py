"""The Y-Encoder: equal to the stock text encoders, bidirectional, frozen or trained."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from modeling_vljepa.embedding_head import masked_mean
from modeling_vljepa.y_encoder import pool
from tests.tiny import BERT, tiny_batch, tiny_config, tiny_model

KINDS = {"gemma": {}, "bert": {"text_config": BERT}}
BATCH = tiny_batch()
IDS, MASK = BATCH["target_input_ids"], BATCH["target_attention_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_y_encoder_equals_the_stock_encoder(kind):
    encoder = tiny_model(**KINDS[kind]).y_encoder
    stock = AutoModel.from_config(tiny_config(**KINDS[kind]).text_config).eval()
    loaded = stock.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert all(key.startswith("pooler.") for key in loaded.missing_keys)
    assert loaded.unexpected_keys == []
    for mask in (None, MASK):
        expected = stock(input_ids=IDS, attention_mask=mask).last_hidden_state
        states = encoder.read(IDS, mask).last_hidden_state
        torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            encoder(IDS, mask), masked_mean(expected, mask), rtol=1e-6, atol=1e-6
        )


WINDOW = tiny_config().text_config.sliding_window  # tokens on each side, the token itself included


def masks_of_attention(monkeypatch) -> list[torch.Tensor | None]:
    """Return the list to which every later call of torch's attention adds its mask."""
    masks, attention = [], F.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return masks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 20])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_y_encoder_equals_stock_gemma_within_and_beyond_its_window(backend, length, padded):
    encoder = tiny_model().y_encoder
    stock = AutoModel.from_config(tiny_config().text_config).eval()
    stock.load_state_dict(encoder.backbone.state_dict())
    for gemma in (stock, encoder.backbone):
        gemma.set_attn_implementation(backend)
    ids = torch.randint(3, 300, (3, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[length], [1], [3]])).long() if padded else None
    expected = stock(input_ids=ids, attention_mask=mask).last_hidden_state
    states = encoder.read(ids, mask).last_hidden_state
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(states[real], expected[real], rtol=0, atol=1e-5)


def test_y_encoder_gives_gemma_masks_only_where_tokens_are_hidden(monkeypatch):
    """CUDA has no flash kernel for attention with a mask."""
    encoder = tiny_model().y_encoder  # a layer with a window, and one without
    masks = masks_of_attention(monkeypatch)
    encoder(IDS[:, :WINDOW])
    encoder(IDS[:, :WINDOW], torch.ones_like(IDS[:, :WINDOW]))  # hides nothing
    assert masks == [None] * 4
    masks.clear()
    encoder(IDS)
    near, full = masks
    distances = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    assert full is None and torch.equal(near[0, 0], distances < WINDOW)
    masks.clear()
    encoder(IDS, MASK)
    assert all(torch.equal(mask.any(dim=-2)[:, 0], MASK.bool()) for mask in masks)
    masks.clear()  # positive control: stock Gemma
    AutoModel.from_config(tiny_config().text_config)(input_ids=IDS[:, :WINDOW])
    assert all(mask.shape == (3, 1, WINDOW, WINDOW) for mask in masks) and len(masks) == 2


def test_y_encoder_removes_the_pooler_of_bert():
    """Its parameters would get no gradient, and data-parallel training would stop."""
    model = tiny_model(**KINDS["bert"])
    assert not any("pooler" in name for name, _ in model.named_parameters())
    model(**BATCH, return_loss=True).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_y_encoder_first_token_sees_the_last(kind):
    encoder = tiny_model(**KINDS[kind]).y_encoder
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 300
    states, changed = (encoder.read(ids).last_hidden_state for ids in (IDS, other))
    assert (states - changed)[:, 0].abs().amax(dim=-1).min() > 1e-4


def test_y_encoder_rejects_a_causal_gemma():
    """Gemma is causal by default: a token's state would not depend on the tokens after it."""
    causal = {"use_bidirectional_attention": False}
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        tiny_model(text_config=causal)
    # Positive control of the test above: the rejected model does ignore the last token.
    gemma = AutoModel.from_config(tiny_config(text_config=causal).text_config).eval()
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 300
    states, changed = (gemma(ids).last_hidden_state[:, :-1] for ids in (IDS, other))
    torch.testing.assert_close(states, changed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_y_encoder_ignores_padding(kind):
    model = tiny_model(**KINDS[kind])
    embeds = model.encode_target(IDS, MASK)
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        alone = model.encode_target(IDS[row : row + 1, :length])
        torch.testing.assert_close(embeds[row : row + 1], alone, rtol=0, atol=1e-5)
    # Positive control: without the mask the padding is read.
    moved = (model.encode_target(IDS) - embeds).abs().amax(dim=1)
    assert moved[0] < 1e-5 and moved[1:].min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_y_encoder_frozen_does_not_change_and_its_head_trains(kind):
    model = tiny_model(freeze_text=True, **KINDS[kind])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = model.y_encoder(IDS, MASK)
    model.train()
    assert not any(p.requires_grad for p in model.y_encoder.parameters())
    assert not any(module.training for module in model.y_encoder.modules())
    assert not states.requires_grad
    model.y_encoder.requires_grad_()  # as an adapter or a user may do
    assert not model.y_encoder(IDS, MASK).requires_grad
    model.freeze()
    again = model.y_encoder(IDS, MASK)
    torch.testing.assert_close(again, states, rtol=1e-6, atol=1e-6)  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(**BATCH, return_loss=True).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("y_encoder.")} <= same
    assert not any(name.startswith("y_head.") for name in same)


def test_pool_equals_the_loop():
    """A last-token pool that takes `[:, -1]` would read padding."""
    states = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
    last = [max(i for i in range(5) if row[i]) for row in mask.tolist()]
    assert last == [4, 1, 3]
    expected = torch.stack([states[row, i] for row, i in enumerate(last)])
    assert torch.equal(pool(states, mask, "lasttoken"), expected)
    assert torch.equal(pool(states, None, "lasttoken"), states[:, 4])
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    mean = pool(states, mask, "mean")
    torch.testing.assert_close(mean, masked_mean(states, mask), rtol=1e-6, atol=1e-6)


def test_y_encoder_applies_dense_layers_after_the_pooling():
    dense = [
        {"out_features": 20, "bias": True, "activation": "tanh"},
        {"out_features": 24, "bias": False, "activation": "linear"},
    ]
    model = tiny_model(text_dense=dense, text_pooling="cls", project_target=False)
    first, second = (layer.linear for layer in model.y_encoder.dense)
    pooled = model.y_encoder.read(IDS, MASK).last_hidden_state[:, 0]
    expected = torch.tanh(pooled @ first.weight.T + first.bias) @ second.weight.T
    torch.testing.assert_close(model.y_encoder(IDS, MASK), expected, rtol=0, atol=1e-6)
    expected = torch.nn.functional.normalize(expected, dim=1)
    torch.testing.assert_close(model.encode_target(IDS, MASK), expected, rtol=0, atol=1e-6)
    frozen = tiny_model(text_dense=dense, freeze_text=True)
    assert not any(p.requires_grad for p in frozen.y_encoder.parameters())
    with pytest.raises(ValueError, match=r"text_pooling is 'max': expected one of"):
        tiny_model(text_pooling="max")


def test_y_encoder_unfrozen_has_dropout_and_trains():
    """Positive control of the test of the frozen Y-Encoder."""
    model = tiny_model(**KINDS["bert"]).train()
    moved = model.y_encoder(IDS, MASK) - model.y_encoder(IDS, MASK)
    assert moved.abs().max() > 1e-3
    assert model.y_encoder(IDS, MASK).requires_grad
    assert all(p.requires_grad for p in model.y_encoder.parameters())
