"""The losses against closed forms and loops over pairs in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from modeling_vljepa.losses import (
    LOSSES,
    InfoNCE,
    cosine_loss,
    info_nce,
    l1_loss,
    l2_loss,
    sigmoid_loss,
    sigreg,
    vicreg_terms,
)
from training.loop.objective import Embeds, Ids, Objective

SIZE = 6
TARGET_IDS = torch.tensor([3, 5, 3, 8, 9, 5])  # rows 0 and 2 share a text, and 1 and 5
GROUP_IDS = torch.tensor([-1, -2, -3, 7, 7, -6])  # rows 3 and 4 share a group
NEGATIVE_IDS = torch.tensor([20, 3, -1, 9, 21])  # 3: text of rows 0 and 2; 9: of row 4; -1: padding
IDS = {"target_ids": TARGET_IDS, "group_ids": GROUP_IDS}


def unit(rows: int, seed: int, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def scale_of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def interchangeable(size: int, with_ids: bool) -> np.ndarray:
    """Return `same[i, j]`: the two different rows i and j share a target or a group."""
    same = np.zeros((size, size), dtype=bool)
    for i in range(size):
        for j in range(size):
            same[i, j] = with_ids and i != j and any(ids[i] == ids[j] for ids in IDS.values())
    return same


def log_sum_exp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def loop(
    predicted: np.ndarray,
    target: np.ndarray,
    scale: float,
    same: np.ndarray,
    *,
    as_positives: bool = False,
    negatives: np.ndarray | None = None,
) -> tuple[float, float, float]:
    """Compute loss, chance loss and accuracy candidate by candidate."""
    size, losses, chances, right = len(predicted), [], [], []
    for queries, keys in ((predicted, target), (target, predicted)):
        for i in range(size):
            logits = [scale * float(queries[i] @ keys[j]) for j in range(size)]
            pushed = [j for j in range(size) if as_positives or not same[i, j]]
            candidates = [logits[j] for j in pushed]
            wrong = [logits[j] for j in range(size) if j != i and not same[i, j]]
            if negatives is not None and queries is predicted:
                ids = NEGATIVE_IDS.tolist()
                hard = [k for k in range(len(ids)) if ids[k] not in (-1, TARGET_IDS[i].item())]
                candidates += [scale * float(queries[i] @ negatives[k]) for k in hard]
                wrong += [scale * float(queries[i] @ negatives[k]) for k in hard]
            pulled = [j for j in range(size) if j == i or (as_positives and same[i, j])]
            losses.append(log_sum_exp(candidates) - np.mean([logits[j] for j in pulled]))
            chances.append(math.log(1 + len(wrong)))
            if queries is predicted:
                right.append(all(logits[i] > other for other in wrong))
    return np.mean(losses), np.mean(chances), np.mean(right)


def check(result: InfoNCE, expected: tuple[float, float, float]) -> None:
    assert result.loss.item() == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
    assert result.chance_loss.item() == pytest.approx(expected[1], abs=1e-6)
    assert result.accuracy.item() == pytest.approx(expected[2], abs=1e-6)


# -- InfoNCE: its value --------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 32])
def test_info_nce_of_equal_similarities_is_log_batch_size(size):
    zeros = torch.zeros(size, 8)
    result = info_nce(zeros, zeros, torch.tensor([14.3]))
    assert result.loss.item() == pytest.approx(math.log(size), abs=1e-6)
    assert result.chance_loss.item() == pytest.approx(math.log(size), abs=1e-6)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("size", [1, 2, SIZE])
def test_info_nce_equals_the_loop(size, scale, with_ids):
    predicted, target = unit(size, 0), unit(size, 1)
    same = interchangeable(size, with_ids)
    ids = {name: values[:size] for name, values in IDS.items()} if with_ids else {}
    result = info_nce(predicted, target, scale_of(scale), **ids)
    check(result, loop(predicted.numpy(), target.numpy(), scale, same))


@pytest.mark.parametrize("as_positives", [False, True])
@pytest.mark.parametrize("with_negatives", [False, True])
def test_info_nce_with_options_equals_the_loop(as_positives, with_negatives):
    predicted, target, hard = unit(SIZE, 0), unit(SIZE, 1), unit(len(NEGATIVE_IDS), 2)
    negatives = {"negative_embeds": hard, "negative_ids": NEGATIVE_IDS} if with_negatives else {}
    result = info_nce(
        predicted, target, scale_of(9.0), **IDS, **negatives, as_positives=as_positives
    )
    same = interchangeable(SIZE, True)
    options = {"as_positives": as_positives, "negatives": hard.numpy() if with_negatives else None}
    check(result, loop(predicted.numpy(), target.numpy(), 9.0, same, **options))
    plain = info_nce(predicted, target, scale_of(9.0), **IDS)
    differs = as_positives or with_negatives
    assert (abs(result.loss - plain.loss) > 0.01) == differs  # positive control


def test_info_nce_equals_cross_entropy_of_the_whole_matrix():
    """The reference is ½ (cross_entropy(S) + cross_entropy(Sᵀ)), in value and every gradient."""
    same = torch.from_numpy(interchangeable(SIZE, True))
    labels = torch.arange(SIZE)

    def gradients(tiled: bool) -> list[torch.Tensor]:
        leaves = [unit(SIZE, 0), unit(SIZE, 1), scale_of(20.0)]
        for leaf in leaves:
            leaf.requires_grad_()
        predicted, target, scale = leaves
        if tiled:
            loss = info_nce(predicted, target, scale, **IDS, tile_elements=2 * SIZE).loss
        else:
            logits = (scale * predicted @ target.T).masked_fill(same, -torch.inf)
            loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
            loss = loss / 2
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("as_positives", [False, True])
def test_info_nce_with_hard_negatives_has_the_gradient_of_finite_differences(as_positives):
    def loss(predicted, target, scale, hard):
        return info_nce(
            predicted,
            target,
            scale,
            **IDS,
            negative_embeds=hard,
            negative_ids=NEGATIVE_IDS,
            as_positives=as_positives,
            tile_elements=4 * SIZE,
        ).loss

    leaves = [unit(SIZE, 0), unit(SIZE, 1), scale_of(5.0), unit(len(NEGATIVE_IDS), 2)]
    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("elements", [1, 3 * SIZE, 5 * SIZE, 1000])
def test_info_nce_is_equal_for_tiles_of_any_size(elements):
    """One row at a time, a shorter last tile, or all rows at once."""
    predicted, target = unit(SIZE, 0).requires_grad_(), unit(SIZE, 1).requires_grad_()
    results = []
    for tile_elements in (elements, 10**9):
        result = info_nce(predicted, target, scale_of(14.0), **IDS, tile_elements=tile_elements)
        gradients = torch.autograd.grad(result.loss, [predicted, target])
        results.append([result.loss, result.accuracy, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_info_nce_of_two_halves_averages_to_that_of_all_rows():
    """Two processes, simulated: each has its own predictions, the targets of both, and the
    combined log-sum-exp of the columns."""
    predicted, target = unit(SIZE, 0).requires_grad_(), unit(SIZE, 1).requires_grad_()
    scale, half = scale_of(14.0).requires_grad_(), SIZE // 2
    leaves = [predicted, target, scale]
    whole = info_nce(predicted, target, scale, **IDS)
    logits = (14.0 * predicted @ target.T).detach()
    logits[torch.from_numpy(interchangeable(SIZE, True))] = -torch.inf
    columns_lse, seen = logits.logsumexp(dim=0), []
    halves = [
        info_nce(
            predicted[first : first + half],
            target,
            scale,
            **IDS,
            first_row=first,
            over_processes=lambda own: seen.append(own) or columns_lse,
        )
        for first in (0, half)
    ]
    torch.testing.assert_close(torch.stack(seen).logsumexp(dim=0), columns_lse)
    mean = (halves[0].loss + halves[1].loss) / 2
    torch.testing.assert_close(mean, whole.loss, rtol=1e-12, atol=0)
    accuracy = (halves[0].accuracy + halves[1].accuracy) / 2
    torch.testing.assert_close(accuracy, whole.accuracy)
    for found, expected in zip(
        torch.autograd.grad(mean, leaves), torch.autograd.grad(whole.loss, leaves), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_info_nce_weighs_both_directions_equally():
    predicted, target = unit(SIZE, 0), unit(SIZE, 1)
    scale = scale_of(20.0)
    loss = info_nce(predicted, target, scale, **IDS).loss
    swapped = info_nce(target, predicted, scale, **IDS).loss
    torch.testing.assert_close(loss, swapped, rtol=1e-12, atol=0)
    # Positive control: the two directions differ, so the test would notice a missing one.
    logits, labels = scale * predicted @ target.T, torch.arange(SIZE)
    assert abs(F.cross_entropy(logits, labels) - F.cross_entropy(logits.T, labels)) > 0.01


# -- InfoNCE: positives and negatives ------------------------------------------------------


def test_info_nce_does_not_push_rows_that_share_a_target_or_group():
    """Two captions of one clip, or two questions with one answer, are not negatives. Among 512
    rows of a captioning set, every fourteenth row would have a false negative."""
    same = [(0, 2), (1, 5), (3, 4)]
    same += [(j, i) for i, j in same]

    def pull(**ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradients whose entry (i, j) is the push of pair (i, j) on prediction i, and on
        target i."""
        predicted = torch.eye(SIZE).requires_grad_()
        target = torch.eye(SIZE).requires_grad_()
        info_nce(predicted, target, torch.tensor([3.0]), **ids).loss.backward()
        return predicted.grad, target.grad

    for gradient in pull(**IDS):
        zeros = [(i, j) for i in range(SIZE) for j in range(SIZE) if gradient[i, j] == 0]
        assert sorted(zeros) == sorted(same)
    for gradient in pull():  # positive control
        assert (gradient != 0).all()


def test_info_nce_pulls_rows_that_count_as_positives():
    def pull(as_positives: bool) -> torch.Tensor:
        predicted = torch.eye(SIZE).requires_grad_()
        result = info_nce(
            predicted, torch.eye(SIZE), torch.tensor([3.0]), **IDS, as_positives=as_positives
        )
        result.loss.backward()
        return predicted.grad

    pulled = {(i, j) for i, j in (pull(True) < 0).nonzero().tolist() if i != j}
    assert pulled == {(0, 2), (2, 0), (1, 5), (5, 1), (3, 4), (4, 3)}
    assert not (pull(False) < 0).fill_diagonal_(False).any()


def test_info_nce_hard_negative_pushes_all_predictions_with_another_text():
    hard = torch.eye(8)[SIZE : SIZE + 1]  # orthogonal to all targets
    predicted = torch.eye(8)[:SIZE].clone().requires_grad_()
    ids = {"negative_embeds": hard, "negative_ids": TARGET_IDS[:1]}
    info_nce(predicted, torch.eye(8)[:SIZE], torch.tensor([3.0]), **IDS, **ids).loss.backward()
    pushed = (predicted.grad[:, SIZE] > 0).tolist()
    assert pushed == [False, True, False, True, True, True]  # rows 0 and 2 have this text


def test_info_nce_chance_loss_counts_unmasked_negatives():
    result = info_nce(unit(4, 0), unit(4, 1), scale_of(1.0), torch.tensor([7, 7, 7, 1]))
    assert result.chance_loss.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    blind = torch.zeros(SIZE, 8)
    for negatives in (
        {},
        {"negative_embeds": torch.zeros(5, 8), "negative_ids": NEGATIVE_IDS},
    ):
        result = info_nce(blind, blind, torch.tensor([1.0]), **IDS, **negatives)
        assert result.loss.item() == pytest.approx(result.chance_loss.item(), abs=1e-6)
    assert info_nce(blind, blind, torch.tensor([1.0]), **IDS).chance_loss < math.log(SIZE) - 0.1


@pytest.mark.parametrize("kinds", [2, 5, 10**6])
def test_info_nce_chance_loss_counts_the_pairs_of_a_full_matrix(kinds):
    """Ids are hashes of 63 bits, groups without one are negative, and a text may be -1."""
    generator = torch.Generator().manual_seed(kinds)

    def draw(first: int, last: int, count: int) -> torch.Tensor:
        words = torch.randint(first, last, (kinds,), generator=generator)
        return words[torch.randint(kinds, (count,), generator=generator)]

    texts, groups = draw(-1, 2**63 - 1, 40), draw(-(2**62), 2**63 - 1, 40)
    hard = torch.cat([draw(-1, 2**63 - 1, 20), texts[:20], torch.full((7,), -1)])
    alike = (texts[:, None] == texts) | (groups[:, None] == groups)
    is_hard = (hard != -1) & (hard != texts[:, None])  # (B, K)
    candidates = 1 + 40 - alike.sum(dim=1)
    expected = (candidates.log() + (candidates + is_hard.sum(dim=1)).log()).mean() / 2
    predicted = unit(40, 0)
    result = info_nce(predicted, unit(40, 1), scale_of(1.0), texts, groups, unit(47, 2), hard)
    assert result.chance_loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_read_no_values(name):
    """A read waits for the device. Fake tensors have no values, and raise an error."""
    loss, fakes = LOSSES[name], FakeTensorMode()
    arguments, ids = {}, {each: fakes.from_tensor(value) for each, value in IDS.items()}
    with fakes:
        predicted, targets = (torch.zeros(SIZE, 8, requires_grad=True) for _ in range(2))
        if loss.needs_negatives:
            arguments |= {**ids, "as_positives": True}
        if loss.needs_scale:
            arguments["scale"] = torch.ones(1, requires_grad=True)
        if loss.needs_bias:
            arguments["bias"] = torch.ones(1, requires_grad=True)
        if loss.needs_hard_negatives:
            arguments["negative_embeds"] = torch.zeros(len(NEGATIVE_IDS), 8)
            arguments["negative_ids"] = torch.zeros(len(NEGATIVE_IDS), dtype=torch.long)
        result = loss.function(predicted, targets, **arguments)
        (result.loss if isinstance(result, InfoNCE) else result).backward()
        with pytest.raises(DynamicOutputShapeException):
            ids["target_ids"].unique()
    assert predicted.grad.shape == predicted.shape


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 0, 1, 1])])
def test_info_nce_accuracy_of_a_collapsed_model_is_zero(ids):
    """All rows tie, and a tie counts as wrong. If argmax took the first of the tied rows, some
    would count as correct, above chance if rows are masked."""
    point = torch.eye(4)[[0, 0, 0, 0]]
    assert info_nce(point, point, torch.tensor([10.0]), ids).accuracy == 0
    apart = unit(4, 0)
    assert info_nce(apart, apart, scale_of(10.0), ids).accuracy == 1


def test_info_nce_of_one_text_for_all_rows_has_no_gradient():
    predicted = unit(4, 0).requires_grad_()
    result = info_nce(predicted, unit(4, 1), scale_of(10.0), torch.zeros(4))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0, abs=1e-12)
    assert (result.chance_loss, result.accuracy) == (0, 1)
    assert predicted.grad.abs().max() < 1e-12


def test_info_nce_disables_autocast():
    predicted, target, scale = unit(SIZE, 0).float(), unit(SIZE, 1).float(), torch.tensor([100.0])
    expected = info_nce(predicted, target, scale).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert (100 * predicted @ target.T).dtype == torch.bfloat16  # positive control
        loss = info_nce(predicted, target, scale).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# -- every entry of LOSSES -----------------------------------------------------------------


@pytest.mark.parametrize("as_positives", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_gradient_of_finite_differences(name, as_positives):
    """Every loss is called as in training: with hard negatives, two rows with one target, and a
    temperature and a bias that get a gradient only if the entry needs them."""
    index = torch.tensor([0, 1, 0, 2, 3, 1])  # rows 0 and 2, rows 1 and 5 share a target
    ids = Ids(
        target_index=index,
        target_ids=TARGET_IDS,
        group_ids=GROUP_IDS,
        negative_index=torch.tensor([[4], [5], [0], [4], [0], [5]]),
        negative_ids=torch.tensor([[20], [21], [-1], [20], [3], [21]]),
    )
    objective = Objective(name=name, as_positives=as_positives)
    leaves = [unit(SIZE, 0), unit(6, 1), scale_of(5.0), scale_of(-2.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loss_of(*leaves: torch.Tensor) -> torch.Tensor:
        return objective(Embeds(*leaves), ids)[0]

    gradients = torch.autograd.grad(loss_of(*leaves), leaves, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [
        True,
        True,
        LOSSES[name].needs_scale,
        LOSSES[name].needs_bias,
    ]
    for gradient in gradients:
        assert gradient is None or (gradient.isfinite().all() and gradient.any())
    assert torch.autograd.gradcheck(loss_of, leaves)


# -- the other losses ----------------------------------------------------------------------


@pytest.mark.parametrize("elements", [2 * SIZE, 1000])
@pytest.mark.parametrize("as_positives", [False, True])
def test_sigmoid_loss_equals_the_loop(as_positives, elements):
    predicted, target = unit(SIZE, 0).requires_grad_(), unit(SIZE, 1)
    scale, bias = scale_of(10.0), scale_of(-3.0).requires_grad_()
    loss = sigmoid_loss(
        predicted, target, scale, bias, **IDS, as_positives=as_positives, tile_elements=elements
    )
    same, total = interchangeable(SIZE, True), 0.0
    for i in range(SIZE):
        for j in range(SIZE):
            if same[i, j] and not as_positives:
                continue
            sign = 1 if i == j or same[i, j] else -1
            logit = sign * (10.0 * (predicted[i] @ target[j]).item() - 3.0)
            total += math.log1p(math.exp(-logit))
    assert loss.item() == pytest.approx(total / SIZE, rel=1e-12)
    whole = torch.autograd.grad(loss, [predicted, bias])
    again = sigmoid_loss(predicted, target, scale, bias, **IDS, as_positives=as_positives)
    for found, expected in zip(whole, torch.autograd.grad(again, [predicted, bias]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("loss", "distance"),
    [
        (cosine_loss, lambda p, t: 1 - p @ t),
        (l1_loss, lambda p, t: np.abs(p - t).sum()),
        (l2_loss, lambda p, t: np.sqrt(((p - t) ** 2).sum())),
    ],
    ids=["cosine", "l1", "l2"],
)
def test_pairwise_loss_equals_numpy(loss, distance):
    predicted, target = unit(SIZE, 0), unit(SIZE, 1)
    pairs = zip(predicted.numpy(), target.numpy(), strict=True)
    expected = np.mean([distance(p, t) for p, t in pairs])
    assert loss(predicted, target).item() == pytest.approx(expected, rel=1e-12)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-12)


def test_sigreg_equals_numpy_and_separates_a_gaussian_from_a_point():
    embeds, directions = unit(50, 0, width=8), unit(12, 1, width=8).T
    projected = math.sqrt(8) * embeds.numpy() @ directions.numpy()  # (50, 12)
    points = np.linspace(-5, 5, 17)
    statistics = []
    for column in projected.T:
        function = np.array([np.exp(1j * t * column).mean() for t in points])
        normal = np.exp(-(points**2) / 2)
        distance = np.abs(function - normal) ** 2 * normal
        statistics.append(50 * np.trapezoid(distance, points))
    assert sigreg(embeds, directions).item() == pytest.approx(np.mean(statistics), rel=1e-12)

    directions = unit(64, 1, width=128).T
    spread, point = unit(500, 0, width=128), unit(1, 0, width=128).expand(500, 128)
    assert sigreg(spread, directions) < 3 < 50 < sigreg(point, directions)


def test_vicreg_terms_equal_numpy():
    embeds = unit(50, 0, width=8)
    stretched = math.sqrt(8) * embeds.numpy()
    covariance = np.cov(stretched, rowvar=False)
    deviations = np.sqrt(np.diag(covariance) + 1e-4)
    variance_term, covariance_term = vicreg_terms(embeds)
    assert variance_term.item() == pytest.approx(np.maximum(0, 1 - deviations).mean(), rel=1e-12)
    off = covariance - np.diag(np.diag(covariance))
    assert covariance_term.item() == pytest.approx((off**2).sum() / 8, rel=1e-12)
    point = unit(1, 0, width=8).expand(50, 8)
    assert vicreg_terms(point)[0].item() == pytest.approx(0.99, abs=1e-6)


# -- too few rows --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (3, 0)])
def test_loss_rejects_matrices_without_rows(name, rows):
    """Their mean would be NaN, without an error."""
    scales = {"scale": torch.ones(1), "bias": torch.zeros(1)}
    needs = {"scale": LOSSES[name].needs_scale, "bias": LOSSES[name].needs_bias}
    arguments = {key: scales[key] for key in scales if needs[key]}
    wrong = "predicted_embeds" if not rows[0] else "target_embeds"
    message = rf"^{wrong} has shape \(0, 8\): give \(rows, dimensions\), with at least 1 row"
    with pytest.raises(ValueError, match=message):
        LOSSES[name].function(torch.ones(rows[0], 8), torch.ones(rows[1], 8), **arguments)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_one_row_is_finite(name):
    predicted = unit(1, 0, width=8).requires_grad_()
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-3.0])
    arguments = {"scale": scale} if LOSSES[name].needs_scale else {}
    arguments |= {"bias": bias} if LOSSES[name].needs_bias else {}
    result = LOSSES[name].function(predicted, unit(1, 1, width=8), **arguments)
    loss = result.loss if isinstance(result, InfoNCE) else result
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad.isfinite().all()
    assert scale.grad is None or scale.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cosine_loss, l1_loss, l2_loss])
def test_pairwise_loss_rejects_a_target_for_several_predictions(loss):
    with pytest.raises(ValueError, match=r"^target_embeds has shape \(1, 8\), predicted_embeds"):
        loss(unit(3, 0, width=8), unit(1, 0, width=8))


def test_regularizers_reject_too_few_rows():
    directions = unit(12, 1, width=8).T
    with pytest.raises(ValueError, match=r"^embeds has shape \(0, 8\): .* with at least 1 row"):
        sigreg(torch.ones(0, 8), directions)
    with pytest.raises(ValueError, match=r"^embeds has shape \(1, 8\): .* with at least 2 rows"):
        vicreg_terms(unit(1, 0, width=8))  # whose covariance would be NaN
    assert sigreg(unit(1, 0, width=8), directions).isfinite()
    assert all(term.isfinite() for term in vicreg_terms(unit(2, 0, width=8)))
