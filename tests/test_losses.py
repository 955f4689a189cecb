"""InfoNCE against closed forms and a loop over rows in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_vljepa.losses import info_nce

SIZE = 6
TARGET_IDS = torch.tensor([3, 5, 3, 8, 9, 5])  # rows 0 and 2, rows 1 and 5
GROUP_IDS = torch.tensor([-1, -2, -3, 7, 7, -6])  # rows 3 and 4


def unit(rows: int, seed: int, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def loop(
    predicted: np.ndarray, target: np.ndarray, scale: float, same: np.ndarray
) -> tuple[float, float, float]:
    """Loss, chance loss and accuracy, candidate by candidate; `same[i, j]` is no negative."""
    losses, chances, right = [], [], []
    for queries, keys in ((predicted, target), (target, predicted)):
        for i in range(len(queries)):
            candidates = [j for j in range(len(keys)) if j == i or not same[i, j]]
            logits = {j: scale * sum(queries[i] * keys[j]) for j in candidates}
            losses.append(math.log(sum(math.exp(logits[j]) for j in candidates)) - logits[i])
            chances.append(math.log(len(candidates)))
            right.append(all(logits[i] > logits[j] for j in candidates if j != i))
    return np.mean(losses), np.mean(chances), np.mean(right[: len(predicted)])


@pytest.mark.parametrize("size", [1, 2, 32])
def test_no_knowledge_costs_log_batch_size(size):
    zeros = torch.zeros(size, 8)
    result = info_nce(zeros, zeros, torch.tensor([14.3]))
    assert result.loss.item() == pytest.approx(math.log(size), abs=1e-6)
    assert result.chance_loss.item() == pytest.approx(math.log(size), abs=1e-6)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("size", [1, 2, SIZE])
def test_equals_the_loop(size, scale, with_ids):
    predicted, target = unit(size, 0), unit(size, 1)
    same = np.zeros((size, size), dtype=bool)
    ids = {}
    if with_ids:
        ids = {"target_ids": TARGET_IDS[:size], "group_ids": GROUP_IDS[:size]}
        for i in range(size):
            for j in range(size):
                same[i, j] = any(values[i] == values[j] for values in ids.values())
    result = info_nce(predicted, target, torch.tensor([scale], dtype=torch.float64), **ids)
    expected = loop(predicted.numpy(), target.numpy(), scale, same)
    assert result.loss.item() == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
    assert result.chance_loss.item() == pytest.approx(expected[1], abs=1e-6)
    assert result.accuracy.item() == pytest.approx(expected[2], abs=1e-6)


def test_both_directions_count_alike():
    predicted, target = unit(SIZE, 0), unit(SIZE, 1)
    ids = {"target_ids": TARGET_IDS, "group_ids": GROUP_IDS}
    scale = torch.tensor([20.0], dtype=torch.float64)
    loss = info_nce(predicted, target, scale, **ids).loss
    swapped = info_nce(target, predicted, scale, **ids).loss
    torch.testing.assert_close(loss, swapped, rtol=1e-12, atol=0)
    # Positive control: the two directions differ, so that one alone would be seen.
    logits, labels = scale * predicted @ target.T, torch.arange(SIZE)
    assert abs(F.cross_entropy(logits, labels) - F.cross_entropy(logits.T, labels)) > 0.01


def test_rows_that_share_a_target_or_a_group_do_not_push_each_other():
    """Two captions of one clip, or two questions with one answer, are no negatives: with 512
    rows of a captioning set, every fourteenth row would hold a false one."""
    same = [(0, 2), (1, 5), (3, 4)]
    same += [(j, i) for i, j in same]

    def pull(**ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry (i, j) is how much pair (i, j) moves prediction i, and target i."""
        predicted = torch.eye(SIZE).requires_grad_()
        target = torch.eye(SIZE).requires_grad_()
        info_nce(predicted, target, torch.tensor([3.0]), **ids).loss.backward()
        return predicted.grad, target.grad

    for gradient in pull(target_ids=TARGET_IDS, group_ids=GROUP_IDS):
        zeros = [(i, j) for i in range(SIZE) for j in range(SIZE) if gradient[i, j] == 0]
        assert sorted(zeros) == sorted(same)
    for gradient in pull():  # positive control
        assert (gradient != 0).all()


def test_chance_loss_counts_the_negatives_that_are_left():
    result = info_nce(unit(4, 0), unit(4, 1), torch.tensor(1.0), torch.tensor([7, 7, 7, 1]))
    assert result.chance_loss.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    blind = torch.zeros(SIZE, 8)
    ids = {"target_ids": TARGET_IDS, "group_ids": GROUP_IDS}
    result = info_nce(blind, blind, torch.tensor(1.0), **ids)
    assert result.loss.item() == pytest.approx(result.chance_loss.item(), abs=1e-6)
    assert result.chance_loss.item() < math.log(SIZE) - 0.1


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 0, 1, 1])])
def test_a_collapsed_model_is_never_right(ids):
    """All rows tie. To take the first of them would count some as right, more than chance where
    rows are masked; here a tie is wrong."""
    point = torch.eye(4)[[0, 0, 0, 0]]
    assert info_nce(point, point, torch.tensor(10.0), ids).accuracy == 0
    apart = unit(4, 0)
    assert info_nce(apart, apart, torch.tensor(10.0), ids).accuracy == 1


def test_one_text_for_all_rows_leaves_nothing_to_learn():
    predicted = unit(4, 0).requires_grad_()
    result = info_nce(predicted, unit(4, 1), torch.tensor(10.0), torch.zeros(4))
    result.loss.backward()
    assert (result.loss, result.chance_loss, result.accuracy) == (0, 0, 1)
    assert (predicted.grad == 0).all()


def test_autocast_does_not_round_the_logits():
    predicted, target, scale = unit(SIZE, 0).float(), unit(SIZE, 1).float(), torch.tensor(100.0)
    expected = info_nce(predicted, target, scale).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert (100 * predicted @ target.T).dtype == torch.bfloat16  # positive control
        assert torch.equal(info_nce(predicted, target, scale).loss, expected)
