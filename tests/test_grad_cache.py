"""GradCache: the parts of a batch, and dropout that is drawn twice the same way."""

import copy

import pytest
import torch

from tests.tiny import tiny_model
from training.grad_cache import cached_step, split
from training.objective import Embeds, Ids, Objective

ROWS, TEXTS = 7, 4
INDEX = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def batch(rows: int = ROWS, texts: int = TEXTS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values_videos": torch.randn(rows, 2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 300, (rows, 4), generator=generator),
        "attention_mask": torch.ones(rows, 4, dtype=torch.long),
        "target_input_ids": torch.randint(3, 300, (texts, 6), generator=generator),
    }


def loss_of(embeds: Embeds) -> torch.Tensor:
    groups = -1 - torch.arange(ROWS)
    return Objective()(embeds, Ids(target_index=INDEX, target_ids=INDEX, group_ids=groups))[0]


@pytest.mark.parametrize(("rows", "texts"), [(1, 1), (2, 9), (3, 4), (7, 2), (50, 1), (2, 3)])
def test_parts_hold_every_row_once_and_at_least_one_text(rows, texts):
    whole = batch(texts=texts)
    parts = split(whole, rows)
    assert len(parts) == -(-ROWS // rows)
    for name in ("pixel_values_videos", "input_ids", "attention_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        assert all(1 <= len(part[name]) <= rows for part in parts)
    found = torch.cat([part["target_input_ids"] for part in parts])
    assert torch.equal(found[:texts], whole["target_input_ids"])
    assert len({len(part["target_input_ids"]) for part in parts}) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_dropout_is_drawn_again_as_it_was(rows):
    """The second pass must see the masks of the first, or its gradient belongs to another loss;
    and the step after it must not see them a third time."""
    model = tiny_model(predictor_config={"attention_dropout": 0.5}).train()
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = cached_step(model, batch(), rows, loss_of)
    after = torch.get_rng_state()

    torch.manual_seed(1)
    outputs = [reference(**part) for part in split(batch(), rows)]
    predicted = torch.cat([output.predicted_embeds for output in outputs])
    texts = torch.cat([output.target_embeds for output in outputs])[:TEXTS]
    expected = loss_of(Embeds(predicted, texts, outputs[0].logit_scale))
    expected.backward()

    assert torch.equal(loss, expected.detach())
    assert torch.equal(after, torch.get_rng_state())
    pairs = list(zip(model.named_parameters(), reference.parameters(), strict=True))
    for (name, found), parameter in pairs:
        if parameter.requires_grad:
            distance = (found.grad - parameter.grad).norm() / parameter.grad.norm()
            assert distance <= 1e-5, name
    # Positive control: other masks, another loss.
    torch.manual_seed(2)
    assert abs(cached_step(model, batch(), rows, loss_of) - loss) > 1e-4


def test_gradients_are_added_to_those_that_are_there():
    """As a backward pass does it: gradient accumulation works on top."""
    once, twice = tiny_model(), tiny_model()
    cached_step(once, batch(), 3, loss_of)
    for _ in range(2):
        cached_step(twice, batch(), 3, loss_of)
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(2 * one.grad, two.grad)


def test_data_parallelism_exchanges_gradients_once():
    calls = []

    class Recorder:
        def __enter__(self):
            calls.append("no_sync")

        def __exit__(self, *_):
            return None

    def backward(handed: torch.Tensor) -> None:
        calls.append("backward")
        handed.backward()

    cached_step(tiny_model(), batch(), 3, loss_of, backward, Recorder)
    assert calls == ["no_sync", "backward", "no_sync", "backward", "backward"]
