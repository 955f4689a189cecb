"""The Predictor's attention: bidirectional, over real tokens only."""

import copy

import pytest
import torch
from transformers import LlamaModel

from modeling_vljepa.predictor import Predictor
from tests.tiny import SUB_CONFIGS, tiny_config, tiny_model

VISUAL, LENGTH = 6, 5
BACKENDS = ("sdpa", "eager")


def predictor(backend: str = "sdpa", seed: int = 0) -> Predictor:
    module = tiny_model(seed).predictor
    module.backbone.set_attn_implementation(backend)
    return module


@pytest.fixture
def visual_embeds() -> torch.Tensor:
    return torch.randn(3, VISUAL, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def read(module: Predictor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Return the last states `(B, N + L, Dp)`."""
    return module(*inputs)[0].last_hidden_state


def reaction(
    module: Predictor, visual_embeds: torch.Tensor, input_ids: torch.Tensor, padded: bool
) -> torch.Tensor:
    """Measure how much each visual position `(B, N)` changes with the last real query token."""
    last, mask = LENGTH - 1, None
    if padded:
        last, mask = LENGTH - 3, torch.ones_like(input_ids)
        mask[:, last + 1 :] = 0
    other = input_ids.clone()
    other[:, last] = (other[:, last] + 1) % 300
    with torch.no_grad():
        states = [read(module, visual_embeds, ids, mask)[:, :VISUAL] for ids in (input_ids, other)]
    return (states[0] - states[1]).abs().amax(dim=-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictor_visual_tokens_see_the_last_query_token(
    visual_embeds, input_ids, backend, padded
):
    """Disabling causality on the attention modules alone has no effect with some back-ends, and
    works for unpadded batches only with others."""
    module = predictor(backend)
    assert reaction(module, visual_embeds, input_ids, padded).min() > 1e-3
    causal = copy.deepcopy(module)  # positive control
    causal.backbone.config.is_causal = True
    assert reaction(causal, visual_embeds, input_ids, padded).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictor_equals_stock_llama_with_a_full_mask(visual_embeds, input_ids, backend):
    module = predictor(backend)
    config = copy.deepcopy(module.backbone.config)
    config.is_causal = True
    stock = LlamaModel(config).eval()
    stock.set_attn_implementation(backend)
    stock.load_state_dict(module.backbone.state_dict())
    visual, query = module.visual_projection(visual_embeds), stock.embed_tokens(input_ids)
    total = VISUAL + LENGTH
    expected = stock(
        inputs_embeds=torch.cat([visual, query], dim=1),  # the visual tokens come first
        attention_mask=torch.zeros(3, 1, total, total),
        position_ids=torch.arange(total)[None],
        use_cache=False,
    ).last_hidden_state
    states, mask = module(visual_embeds, input_ids)
    assert mask is None
    torch.testing.assert_close(states.last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictor_is_independent_of_padding_and_batch(visual_embeds, input_ids, backend):
    module = predictor(backend)
    mask = (torch.arange(LENGTH) < torch.tensor([[5], [3], [0]])).long()
    states, full_mask = module(visual_embeds, input_ids, mask)
    states = states.last_hidden_state
    assert full_mask.tolist() == [[1] * VISUAL + row for row in mask.tolist()]
    for row, length in enumerate((5, 3, 0)):
        alone = read(module, visual_embeds[row : row + 1], input_ids[row : row + 1, :length])
        real = states[row : row + 1, : VISUAL + length]
        torch.testing.assert_close(real, alone, rtol=0, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    permuted = read(module, visual_embeds[order], input_ids[order], mask[order])
    torch.testing.assert_close(permuted, states[order], rtol=0, atol=1e-5)
    # Positive control: without the mask the padding is read.
    unmasked = read(module, visual_embeds, input_ids)
    moved = (unmasked - states)[:, :VISUAL].abs().amax(dim=(1, 2))
    assert moved[0] < 1e-5 and moved[1] > 1e-3 and moved[2] > 1e-3


@pytest.mark.parametrize("length", [4, 30])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictor_equals_its_backbone_with_the_mask_of_padding(backend, family, length):
    """Mistral's window of 8 tokens is kept: 6 visual tokens and 30 of a query are more."""
    window = {"sliding_window": 8} if family == "mistral" else {}
    config = SUB_CONFIGS["predictor_config"] | {"model_type": family, **window}
    module = tiny_model(predictor_config=config).predictor
    module.backbone.set_attn_implementation(backend)
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(3, VISUAL, 48, generator=generator)
    ids = torch.randint(3, 300, (3, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [3], [0]])).long()
    states, joined = module(visual, ids, mask)
    query = module.backbone.get_input_embeddings()(ids)
    expected = module.backbone(
        inputs_embeds=torch.cat([module.visual_projection(visual), query], dim=1),
        attention_mask=joined,
    ).last_hidden_state
    is_real = joined.bool()  # padding sees no token within Mistral's window
    torch.testing.assert_close(
        states.last_hidden_state[is_real], expected[is_real], rtol=0, atol=1e-5
    )


def test_predictor_with_empty_query_reads_the_visual_tokens(visual_embeds):
    module = predictor()
    nothing = torch.empty(3, 0, dtype=torch.long)
    expected = module.backbone(
        inputs_embeds=module.visual_projection(visual_embeds)
    ).last_hidden_state
    states, mask = module(visual_embeds, nothing)
    assert mask is None
    torch.testing.assert_close(states.last_hidden_state, expected, rtol=0, atol=1e-6)
    states, mask = module(visual_embeds, nothing, nothing)
    assert mask.shape == (3, VISUAL) and mask.all()
    torch.testing.assert_close(states.last_hidden_state, expected, rtol=0, atol=1e-5)


def test_predictor_config_is_causal_by_causal_predictor_alone(tmp_path):
    config = tiny_config(causal_predictor=True)
    assert config.predictor_config.is_causal is True
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).predictor_config.is_causal is True
    config.causal_predictor = False
    assert config.predictor_config.is_causal is False


def test_predictor_config_is_always_bidirectional(tmp_path):
    config = tiny_config(predictor_config={"is_causal": True})
    assert config.predictor_config.is_causal is False
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).predictor_config.is_causal is False
    path = tmp_path / "config.json"
    assert '"is_causal": false' in path.read_text()
    path.write_text(path.read_text().replace('"is_causal": false', '"is_causal": true'))
    assert type(config).from_pretrained(tmp_path).predictor_config.is_causal is False


def test_predictor_drops_values_of_visual_tokens_in_training_only(visual_embeds, input_ids):
    model = tiny_model(visual_dropout=0.25).predictor
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.eye(*model.visual_projection.weight.shape))
        model.visual_projection.bias.zero_()
    kept = model.eval().join(visual_embeds, input_ids)
    plain = tiny_model().predictor
    plain.load_state_dict(model.state_dict())
    assert torch.equal(kept, plain.train().join(visual_embeds, input_ids))
    torch.manual_seed(0)
    tokens, width = visual_embeds.shape[1], min(model.visual_projection.weight.shape)
    dropped = model.train().join(visual_embeds, input_ids)[:, :tokens, :width]
    kept = kept[:, :tokens, :width]
    share = (dropped == 0).float().mean()
    assert share == pytest.approx(0.25, abs=0.06)
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.75)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        tiny_model(visual_dropout=1.5)
