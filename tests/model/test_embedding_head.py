"""The embedding head: the mean over real tokens only, and unit vectors."""

import numpy as np
import pytest
import torch

from modeling_vljepa import VLJEPAConfig
from modeling_vljepa.embedding_head import EmbeddingHead, masked_mean
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
