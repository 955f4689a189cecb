"""The embedding head: the mean over real tokens only, and unit vectors."""

import numpy as np
import pytest
import torch

from modeling_vljepa import VLJEPAConfig
from modeling_vljepa.embedding_head import EmbeddingHead, PredictorHead, masked_mean
from tests.tiny import tiny_model

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def head() -> EmbeddingHead:
    torch.manual_seed(0)
    return EmbeddingHead(8, 6)


def test_masked_mean_equals_the_loop(states):
    expected = np.zeros((3, 8))
    for row in range(3):
        real = [token for token in range(5) if MASK[row, token]]
        for token in real:
            expected[row] += states[row, token].numpy() / len(real)
    mean = masked_mean(states, MASK)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(masked_mean(states, None), states.mean(1), rtol=0, atol=1e-6)
    assert not torch.allclose(mean, states.mean(1), atol=0.1)


def test_embedding_head_returns_the_normalized_projection(states, head):
    embeds = head(masked_mean(states, MASK))
    weight, bias = head.projection.weight.detach().numpy(), head.projection.bias.detach().numpy()
    expected = masked_mean(states, MASK).numpy() @ weight.T + bias
    expected /= np.sqrt((expected**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(embeds.detach().numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


def test_embedding_head_ignores_padding(states, head):
    """A pool that ignores the mask, or takes the last token, would depend on the batch."""
    padded = torch.cat([states, torch.full((3, 4, 8), 50.0)], dim=1)
    mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    expected = head(masked_mean(states, MASK))
    torch.testing.assert_close(head(masked_mean(padded, mask)), expected, rtol=0, atol=1e-6)
    # Positive control: read as real tokens, the padding changes the result.
    moved = head(masked_mean(padded, torch.ones_like(mask))) - expected
    assert moved.abs().amax(dim=1).min() > 0.1


def test_masked_mean_of_a_row_without_real_tokens_is_zero(states, head):
    mask = MASK.clone()
    mask[1] = 0
    assert (masked_mean(states, mask)[1] == 0).all()
    embeds = head(masked_mean(states.requires_grad_(), mask))
    direction = head.projection.bias / head.projection.bias.norm()
    torch.testing.assert_close(embeds[1], direction, rtol=0, atol=1e-6)
    embeds.sum().backward()
    assert states.grad.isfinite().all()
    assert (states.grad[1] == 0).all()


def test_embedding_head_disables_bf16_autocast(states, head):
    pooled = masked_mean(states, MASK)
    expected = head(pooled)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.projection(states).dtype == torch.bfloat16  # positive control
        embeds = head(masked_mean(states, MASK))
        rounded = head(masked_mean(states.bfloat16(), MASK))
    assert embeds.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.01)
    # A head stored in bf16 returns fp32 too.
    assert head.bfloat16()(pooled).dtype == torch.float32


def test_embedding_head_normalizes_truncated_embeddings(states, head):
    pooled = masked_mean(states, MASK)
    expected = torch.nn.functional.normalize(head.projection(pooled)[:, :4], dim=1)
    torch.testing.assert_close(head(pooled, 4), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head(pooled, 6), head(pooled), rtol=0, atol=1e-6)
    for wrong in (0, 7, -1):
        with pytest.raises(ValueError, match=f"truncate_dim is {wrong}, but an embedding has 6"):
            head(pooled, wrong)


def test_embedding_head_without_projection_keeps_the_encoders_space(states):
    pooled = masked_mean(states, MASK)
    head = EmbeddingHead(8, 8, project=False)
    assert list(head.parameters()) == []
    expected = torch.nn.functional.normalize(pooled, dim=1)
    torch.testing.assert_close(head(pooled), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="Y-Encoder's own of 8 dimensions, but embedding_dim is 6"):
        EmbeddingHead(8, 6, project=False)


def test_embedding_head_adds_the_adapters_output_to_its_input(states):
    pooled = masked_mean(states, MASK).detach()
    torch.manual_seed(0)
    head = EmbeddingHead(8, 6, adapter_size=5)
    fc1, fc2 = head.adapter.fc1, head.adapter.fc2
    scaled = pooled / pooled.square().mean(1, keepdim=True).sqrt()
    inner = scaled @ fc1.weight.T + fc1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = head.projection(scaled + inner @ fc2.weight.T + fc2.bias)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(pooled), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head(50 * pooled), expected, rtol=0, atol=1e-6)
    without = torch.nn.functional.normalize(head.projection(scaled), dim=1)
    assert (expected - without).abs().max() > 0.01  # the adapter has an effect


def test_new_adapter_leaves_the_encoders_space_as_it_is():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    size = tiny_model().y_encoder.output_size
    plain = tiny_model(project_target=False, embedding_dim=size)
    adapted = tiny_model(project_target=False, embedding_dim=size, target_adapter_size=7)
    adapted.y_encoder.load_state_dict(plain.y_encoder.state_dict())
    expected = plain.encode_target(ids)
    torch.testing.assert_close(adapted.encode_target(ids), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        adapted.y_head.adapter.fc2.weight.normal_()
    assert (adapted.encode_target(ids) - expected).abs().max() > 0.01


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_config_rejects_an_adapter_size_that_is_no_whole_number(value):
    with pytest.raises(ValueError, match=f"target_adapter_size is {value!r}: give a whole number"):
        VLJEPAConfig(target_adapter_size=value)


def test_attention_pooling_equals_the_loop(states):
    torch.manual_seed(0)
    head = PredictorHead(8, 6, "attention")
    vector = head.attention.vector.weight.detach().numpy()[0]
    expected = np.zeros((3, 8))
    for row in range(3):
        real = [states[row, token].numpy() for token in range(5) if MASK[row, token]]
        weights = np.exp([state @ vector for state in real])
        for weight, state in zip(weights / weights.sum(), real, strict=True):
            expected[row] += weight * state
    pooled = head.attention(states, MASK).detach()
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=1e-6)
    assert (pooled - masked_mean(states, MASK)).abs().max() > 0.01
    embeds = torch.nn.functional.normalize(head.projection(pooled), dim=1)
    torch.testing.assert_close(head(states, MASK, 2), embeds, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(states, MASK, 2), embeds, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [MASK, None])
def test_predictor_head_of_the_query_pools_no_visual_token(states, mask):
    """Row 1 has real tokens at 0 and 1 alone, so with 2 visual tokens its query is empty."""
    torch.manual_seed(0)
    head, visual = PredictorHead(8, 6, "query"), 2
    pooled = masked_mean(states[:, visual:], None if mask is None else mask[:, visual:])
    if mask is not None:
        pooled[1] = states[1, :visual].mean(0)
    expected = torch.nn.functional.normalize(head.projection(pooled), dim=1)
    torch.testing.assert_close(head(states, mask, visual), expected, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    mean = PredictorHead(8, 6)  # positive control: the same weights
    moved = (mean(states, mask, visual) - expected).norm(dim=1)
    assert moved[[0, 2]].min() > 0.05


def test_predictor_pooling_of_a_model():
    """A new learnt vector is 0, so its model equals the one that pools by the mean."""
    video = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    given = {"pixel_values_videos": video, "input_ids": ids, "attention_mask": mask}
    plain = tiny_model()
    expected = plain.predict(**given)
    for name in ("query", "attention"):
        model = tiny_model(predictor_pooling=name)
        info = model.load_state_dict(plain.state_dict(), strict=False)
        new = ["predictor_head.attention.vector.weight"] if name == "attention" else []
        assert (info.missing_keys, info.unexpected_keys) == (new, [])
        embeds = model.predict(**given)
        torch.testing.assert_close(model.predict(video), plain.predict(video), rtol=0, atol=1e-6)
        if name == "query":
            assert (embeds - expected).abs().max() > 0.01
            continue
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
        targets = {"target_input_ids": ids[:, :2], "return_loss": True}
        loss = model(**given, **targets).loss
        loss.backward()
        assert model.predictor_head.attention.vector.weight.grad.abs().max() > 0


@pytest.mark.parametrize("value", ["max", "", None, True])
def test_config_rejects_a_pooling_that_it_does_not_know(value):
    with pytest.raises(ValueError, match=f"predictor_pooling is {value!r}: give mean, query or"):
        VLJEPAConfig(predictor_pooling=value)
