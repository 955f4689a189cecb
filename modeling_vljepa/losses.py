"""Losses and regularizers: pure functions of embeddings, a scale and vectors of ids.

| function             | source                                                              |
|----------------------|---------------------------------------------------------------------|
| `info_nce`           | the paper's loss (section 3.2); CLIP, Radford et al. 2021           |
| `sigmoid_loss`       | SigLIP, Zhai et al. 2023 (arXiv 2303.15343)                         |
| `cosine_loss`, `l1_loss`, `l2_loss` | the paper's ablation 7c, with a frozen text encoder  |
| `sigreg`             | LeJEPA, Balestriero and LeCun 2025 (arXiv 2511.08544)               |
| `vicreg_terms`       | VICReg, Bardes et al. 2022 (arXiv 2105.04906)                       |

Shapes: B batch (of all processes together), b rows of this process, K hard negatives, D embedding
size, r rows of a tile. The caller gathers the rows of other processes: see
`training/loop/objective.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TILE_ELEMENTS = 2**23  # logits in one tile: 32 MiB in fp32


@dataclass
class InfoNCE:
    """The loss, its chance level and its accuracy; only `loss` is differentiable.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of both directions over the given rows.
        chance_loss (`torch.Tensor` of shape `()`): loss of a model that gives all pairs the same
            similarity: the mean of ln(1 + negatives), which is ln B if no row is masked.
        accuracy (`torch.Tensor` of shape `()`): share of predictions closer to their own target
            than to every negative; a tie counts as wrong. It depends on the batch size: use it to
            monitor training, not to report results.
    """

    loss: torch.Tensor
    chance_loss: torch.Tensor
    accuracy: torch.Tensor


def check_rows(least: int = 1, **embeds: torch.Tensor) -> None:
    """Raise `ValueError` for matrices of embeddings with too few rows: their mean would be NaN."""
    for name, rows in embeds.items():
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)}: give (rows, dimensions), with at least "
                f"{least} rows."
            )


def check_pairs(predicted_embeds: torch.Tensor, target_embeds: torch.Tensor) -> None:
    """Raise `ValueError` unless every prediction has a target; torch would repeat a single one."""
    check_rows(predicted_embeds=predicted_embeds, target_embeds=target_embeds)
    if predicted_embeds.shape != target_embeds.shape:
        raise ValueError(
            f"target_embeds has shape {tuple(target_embeds.shape)}, predicted_embeds has "
            f"{tuple(predicted_embeds.shape)}: give one target for each prediction."
        )


def bounds(ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each of the ids `(B,)` the first index, and the one after the last, of the equal
    ids in the sorted `table` `(K,)`.

    `unique` would give counts too, but its size depends on values, so the host would wait for the
    device. Comparing all pairs would need a (B, K) matrix.
    """
    return torch.searchsorted(table, ids), torch.searchsorted(table, ids, right=True)


def count_equal(ids: torch.Tensor) -> torch.Tensor:
    """Count for each of the ids `(B,)` the ids equal to it, itself included."""
    start, end = bounds(ids, ids.sort().values)
    return end - start


def pair_ids(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return for each pair of ids, `(B,)` and `(B,)`, an id that only equal pairs share."""
    # Ids are hashes of 63 bits, too long to combine; their first indices in the sorted ids are
    # below B, so a pair of these fits.
    first, second = (bounds(each, each.sort().values)[0] for each in (ids, others))
    return first * len(ids) + second


@dataclass(frozen=True)
class Matches:
    """Pairs of rows that are not each other's negatives, from vectors of ids.

    Masks are built for one tile at a time: a B x B mask would need as much memory as the logits
    that the tiles avoid.

    Attributes:
        target_ids (`torch.LongTensor` of shape `(B,)`): equal for equal target texts.
        group_ids (`torch.LongTensor` of shape `(B,)`): equal for interchangeable targets.
        negative_ids (`torch.LongTensor` of shape `(K,)`, *optional*): text ids of the hard
            negatives; -1 for padding, because rows have different numbers of hard negatives.
        first_row: prediction i belongs to target `first_row + i`.
    """

    target_ids: torch.Tensor
    group_ids: torch.Tensor
    negative_ids: torch.Tensor | None
    first_row: int

    def own(self, rows: range) -> torch.Tensor:
        """Return for each prediction the column `(r,)` of its own target."""
        first = self.first_row + rows.start
        return torch.arange(first, first + len(rows), device=self.target_ids.device)

    def interchangeable(self, rows: range) -> torch.Tensor:
        """Return a mask `(r, B)` of the other targets that share a text or group with the own."""
        own = self.own(rows)
        alike = self.target_ids[own, None] == self.target_ids
        alike |= self.group_ids[own, None] == self.group_ids
        return alike.scatter_(1, own[:, None], False)

    def false_negatives(self, rows: range) -> torch.Tensor:
        """Return a mask `(r, K)` of hard negatives that have the row's own text or are padding."""
        own_ids = self.target_ids[self.own(rows), None]
        return (own_ids == self.negative_ids) | (self.negative_ids == -1)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Number `(B,)` of targets that are correct for each row, its own included."""
        # Inclusion and exclusion: a target that shares both text and group would count twice.
        both = count_equal(pair_ids(self.target_ids, self.group_ids))
        return count_equal(self.target_ids) + count_equal(self.group_ids) - both

    @property
    def hard_counts(self) -> torch.Tensor | int:
        """Number `(B,)` of hard negatives of each row: all but those that have its own text."""
        if self.negative_ids is None:
            return 0
        # Padding stays among the sorted ids: to select the others would read values.
        start, end = bounds(self.target_ids, self.negative_ids.sort().values)
        own = (end - start).masked_fill(self.target_ids == -1, 0)
        return (self.negative_ids != -1).sum() - own


def tiles(rows: int, columns: int, elements: int) -> Iterator[range]:
    """Split `rows` into ranges of at most `elements` logits each, but of at least one row."""
    step = max(1, elements // max(1, columns))
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def tile_of_logits(
    predicted: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    alike: torch.Tensor,
    as_positives: bool,
) -> torch.Tensor:
    """Return the logits `(r, B)` of one tile from `(r, D)` and `(B, D)`.

    False negatives are masked with -inf, or kept if they count as positives.
    """
    logits = (predicted @ targets.T).mul_(scale)
    return logits if as_positives else logits.masked_fill_(alike, -torch.inf)


def tile_of_negatives(
    predicted: torch.Tensor,
    negatives: torch.Tensor,
    scale: torch.Tensor,
    matches: Matches,
    rows: range,
) -> torch.Tensor:
    """Return the logits `(r, K)` of the hard negatives from `(r, D)` and `(K, D)`."""
    logits = (predicted @ negatives.T).mul_(scale)
    return logits.masked_fill_(matches.false_negatives(rows), -torch.inf)


def attraction_of(matches: Matches, alike: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the weights `(r, B)` of the positives in the attraction of both directions.

    The positives of a row, and those of a column, share its attraction in equal parts.
    """
    share = 1 / matches.counts.to(torch.get_default_dtype())  # (B,)
    return alike.scatter(1, own, True) * (share[own] + share)


class TiledInfoNCE(torch.autograd.Function):
    """InfoNCE over the (b, B) logits of a process, of which one tile exists at a time.

    The forward pass stores the log-sum-exp of each row and column. The backward pass computes each
    tile again, and from it the gradient of both sides. That takes four matrix products; with a
    stored matrix of logits it would take three.
    """

    @staticmethod
    def forward(
        ctx,
        predicted: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        negatives: torch.Tensor | None,
        matches: Matches,
        as_positives: bool,
        over_processes: Callable[[torch.Tensor], torch.Tensor],
        elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows_lse = predicted.new_empty(len(predicted))  # (b,)
        columns_lse = predicted.new_full((len(targets),), -torch.inf)  # (B,)
        attraction = predicted.new_empty(len(predicted))  # (b,), sum of both directions
        right = predicted.new_empty(len(predicted))  # (b,), 1 for a correct prediction
        for rows in tiles(len(predicted), len(targets), elements):
            part = slice(rows.start, rows.stop)
            own = matches.own(rows)[:, None]  # (r, 1)
            alike = matches.interchangeable(rows)  # (r, B)
            logits = tile_of_logits(predicted[part], targets, scale, alike, as_positives)
            own_logits = logits.gather(1, own)[:, 0]  # (r,)
            rows_lse[part] = logits.logsumexp(dim=1)
            # A tile holds whole rows but a part of each column, so columns are summed tile by
            # tile. `logaddexp` keeps them in range: exp of a logit of 100 overflows fp32.
            columns_lse = torch.logaddexp(columns_lse, logits.logsumexp(dim=0))
            attraction[part] = 2 * own_logits
            if as_positives:
                attraction[part] = (attraction_of(matches, alike, own) * logits).sum(dim=1)
                # Only the accuracy reads the tile from here on, and it ignores other positives.
                logits.masked_fill_(alike, -torch.inf)
            # In place, after the last use of the tile: a copy would double the peak memory.
            hardest = logits.scatter_(1, own, -torch.inf).amax(dim=1)  # (r,)
            if negatives is not None:
                # Rows only: a hard negative has no prediction, so it belongs to no column.
                hard = tile_of_negatives(predicted[part], negatives, scale, matches, rows)
                rows_lse[part] = torch.logaddexp(rows_lse[part], hard.logsumexp(dim=1))
                hardest = torch.maximum(hardest, hard.amax(dim=1))
            right[part] = (own_logits > hardest).to(right.dtype)
        # Before saving: the backward pass needs the sums over the rows of all processes.
        columns_lse = over_processes(columns_lse)  # (B,)
        ctx.save_for_backward(predicted, targets, scale, negatives, rows_lse, columns_lse)
        ctx.matches, ctx.as_positives, ctx.elements = matches, as_positives, elements
        accuracy = right.mean()
        ctx.mark_non_differentiable(accuracy)
        # This process's share of the columns; the mean over processes then has each column once.
        columns_lse = columns_lse[matches.own(range(len(predicted)))]  # (b,)
        return (rows_lse + columns_lse - attraction).mean() / 2, accuracy

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        predicted, targets, scale, negatives, rows_lse, columns_lse = ctx.saved_tensors
        matches = ctx.matches
        factor = gradient * scale / (2 * len(predicted))
        to_predicted = torch.empty_like(predicted)
        to_targets = torch.zeros_like(targets) if ctx.needs_input_grad[1] else None
        to_negatives = None if negatives is None else torch.zeros_like(negatives)
        for rows in tiles(len(predicted), len(targets), ctx.elements):
            part = slice(rows.start, rows.stop)
            own = matches.own(rows)[:, None]  # (r, 1)
            alike = matches.interchangeable(rows)  # (r, B)
            logits = tile_of_logits(predicted[part], targets, scale, alike, ctx.as_positives)
            # Softmax of the columns, then of the rows; a masked logit of -inf gives 0.
            push = (logits - columns_lse).exp_()  # (r, B)
            push += logits.sub_(rows_lse[part, None]).exp_()
            if ctx.as_positives:
                push -= attraction_of(matches, alike, own)
            else:
                # The own target attracts once in each direction.
                push.scatter_add_(1, own, push.new_full(own.shape, -2))
            push *= factor
            torch.matmul(push, targets, out=to_predicted[part])
            if to_targets is not None:
                to_targets.addmm_(push.T, predicted[part])
            if negatives is not None:
                hard = tile_of_negatives(predicted[part], negatives, scale, matches, rows)
                hard.sub_(rows_lse[part, None]).exp_().mul_(factor)
                to_predicted[part].addmm_(hard, negatives)
                to_negatives.addmm_(hard.T, predicted[part])
        # d loss / d scale sums cosine * d loss / d logit over all pairs. The gradient of the
        # predictions holds the same products times the scale: no further matrix product is needed.
        to_scale = (to_predicted * predicted).sum().div(scale).view_as(scale)
        return to_predicted, to_targets, to_scale, to_negatives, None, None, None, None


def find_matches(
    size: int,
    device: torch.device,
    target_ids: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    negative_ids: torch.Tensor | None,
    first_row: int,
) -> Matches:
    """Return the `Matches`; without `target_ids` or `group_ids`, no two rows share one."""
    different = torch.arange(size, device=device)
    return Matches(
        different if target_ids is None else target_ids,
        different if group_ids is None else group_ids,
        negative_ids,
        first_row,
    )


def info_nce(
    predicted_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    scale: torch.Tensor,
    target_ids: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    negative_embeds: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    *,
    as_positives: bool = False,
    first_row: int = 0,
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda columns_lse: columns_lse,
    tile_elements: int = TILE_ELEMENTS,
) -> InfoNCE:
    """Bi-directional InfoNCE over in-batch negatives (paper section 3.2, Radford et al. 2021).

    Two rows that share a target text or a group are not each other's negatives: pushing "yes" away
    from "yes" would teach the model that its correct answer is wrong. Such pairs are left out or,
    with `as_positives`, share the attraction in equal parts (Khosla et al. 2020, arXiv
    2004.11362, L_out).

    With several processes, each passes its own predictions and the targets of all. The mean of
    their losses is then the loss of the whole batch, and the mean of their gradients its gradient.

    Args:
        predicted_embeds (`torch.Tensor` of shape `(b, D)`): unit vectors.
        target_embeds (`torch.Tensor` of shape `(B, D)`): unit vectors.
        scale (`torch.Tensor` of shape `()` or `(1,)`): the inverse temperature.
        target_ids (`torch.LongTensor` of shape `(B,)`, *optional*): equal for equal target texts.
        group_ids (`torch.LongTensor` of shape `(B,)`, *optional*): equal for interchangeable
            targets, such as two captions of one clip.
        negative_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): unit vectors of the hard
            negatives of all rows. Each is a negative of every prediction that has another target
            text. The direction from targets to predictions ignores them: they have no predictions.
        negative_ids (`torch.LongTensor` of shape `(K,)`, *optional*): their text ids, as in
            `target_ids`; -1 for padding.
        as_positives: see above.
        first_row: prediction i belongs to target `first_row + i`.
        over_processes: combines the log-sum-exp `(B,)` over this process's rows with the others'.
        tile_elements: logits in memory at a time.
    """
    check_rows(predicted_embeds=predicted_embeds, target_embeds=target_embeds)
    device = predicted_embeds.device
    matches = find_matches(
        len(target_embeds), device, target_ids, group_ids, negative_ids, first_row
    )
    # Without autocast: rounding a logit of 100 to bf16 is wrong by up to 0.25.
    with torch.autocast(device.type, enabled=False):
        loss, accuracy = TiledInfoNCE.apply(
            predicted_embeds,
            target_embeds,
            scale,
            negative_embeds,
            matches,
            as_positives,
            over_processes,
            tile_elements,
        )
    candidates = 1 + len(target_embeds) - matches.counts  # (B,)
    chance_loss = (candidates.log() + (candidates + matches.hard_counts).log()).mean() / 2
    return InfoNCE(loss, chance_loss, accuracy)


def sigmoid_loss(
    predicted_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    target_ids: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    *,
    as_positives: bool = False,
    first_row: int = 0,
    tile_elements: int = TILE_ELEMENTS,
) -> torch.Tensor:
    """Classify each pair by itself as matching or not (SigLIP, arXiv 2303.15343).

    The loss is the sum over the pairs of a prediction, averaged over predictions. Two rows that
    share a text or a group are left out or, with `as_positives`, form matching pairs.

    Args:
        bias (`torch.Tensor` of shape `()` or `(1,)`): added to every logit. A start near -ln B
            reflects that most pairs do not match.

    The other arguments are those of `info_nce`.
    """
    check_rows(predicted_embeds=predicted_embeds, target_embeds=target_embeds)
    device = predicted_embeds.device
    matches = find_matches(len(target_embeds), device, target_ids, group_ids, None, first_row)

    def tile(
        rows: range,
        predicted: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        logits = scale * (predicted @ targets.T) + bias  # (r, B)
        alike = matches.interchangeable(rows)  # (r, B)
        is_match = torch.zeros_like(alike).scatter_(1, matches.own(rows)[:, None], True)
        if as_positives:
            is_match |= alike
        losses = -F.logsigmoid(torch.where(is_match, logits, -logits))  # (r, B)
        return losses.sum() if as_positives else losses.masked_fill(alike, 0).sum()

    # The checkpoint computes each tile again in the backward pass, so one exists at a time.
    with torch.autocast(device.type, enabled=False):
        losses = [
            checkpoint(
                tile,
                rows,
                predicted_embeds[rows.start : rows.stop],
                target_embeds,
                scale,
                bias,
                use_reentrant=False,
            )
            for rows in tiles(len(predicted_embeds), len(target_embeds), tile_elements)
        ]
    return torch.stack(losses).sum() / len(predicted_embeds)


def cosine_loss(predicted_embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine of unit vectors `(b, D)`, averaged over rows."""
    check_pairs(predicted_embeds, target_embeds)
    return 1 - (predicted_embeds * target_embeds).sum(dim=1).mean()


def l1_loss(predicted_embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    """Sum the absolute differences over the dimensions of `(b, D)`; average over rows."""
    check_pairs(predicted_embeds, target_embeds)
    return (predicted_embeds - target_embeds).abs().sum(dim=1).mean()


def l2_loss(predicted_embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of unit vectors `(b, D)`, averaged over rows.

    The squared distance would not be another loss: on the unit sphere it is twice the cosine loss.
    """
    check_pairs(predicted_embeds, target_embeds)
    return torch.linalg.vector_norm(predicted_embeds - target_embeds, dim=1).mean()


def sigreg(embeds: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Measure the distance `()` of the embeddings from an isotropic Gaussian (SIGReg, arXiv
    2511.08544).

    Along each direction, this is the Epps-Pulley distance between the sample's characteristic
    function and the standard normal one, weighted by the latter, integrated from -5 to 5 over 17
    points, and multiplied by B. The result is the mean over directions. Unit vectors are first
    scaled by the square root of D, the length of a standard normal vector.

    Args:
        embeds (`torch.Tensor` of shape `(B, D)`): unit vectors.
        directions (`torch.Tensor` of shape `(D, S)`): unit columns, new at every step and the
            same in every process.
    """
    check_rows(embeds=embeds)
    with torch.autocast(embeds.device.type, enabled=False):
        projected = embeds.shape[1] ** 0.5 * embeds @ directions  # (B, S)
        points = torch.linspace(-5, 5, 17, device=embeds.device, dtype=embeds.dtype)
        normal = (-points.square() / 2).exp()  # (17,)
        angles = projected.unsqueeze(2) * points  # (B, S, 17)
        distance = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
        statistic = torch.trapezoid(distance * normal, points, dim=1) * len(embeds)  # (S,)
        return statistic.mean()


def vicreg_terms(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the variance and covariance terms `()` of VICReg (arXiv 2105.04906, equations 1, 3).

    Unit vectors `(B, D)` are first scaled by the square root of D. Otherwise no dimension could
    reach the standard deviation of 1 that the variance term requires.
    """
    check_rows(2, embeds=embeds)  # a covariance needs two
    with torch.autocast(embeds.device.type, enabled=False):
        size = embeds.shape[1]
        centred = size**0.5 * (embeds - embeds.mean(dim=0))  # (B, D)
        covariance = centred.T @ centred / (len(embeds) - 1)  # (D, D)
        variances = covariance.diagonal()
        variance_term = F.relu(1 - (variances + 1e-4).sqrt()).mean()
        covariance_term = (covariance.square().sum() - variances.square().sum()) / size
        return variance_term, covariance_term


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An entry of `LOSSES`: a function and the arguments it needs from the objective.

    The function takes `predicted_embeds` `(b, D)` and `target_embeds`, unit vectors, and returns
    the loss `()` of this process's rows. The mean over processes must be the loss of the whole
    batch. A function that has a chance level and an accuracy returns an `InfoNCE` instead, and
    both appear in the log.

    Attributes:
        function: the loss.
        needs_negatives: `target_embeds` are the targets of all processes `(B, D)`, and the
            function takes `target_ids`, `group_ids`, `as_positives` and `first_row` as `info_nce`
            does. Without it, the loss is pairwise: row i of `target_embeds` `(b, D)` is the target
            of prediction i, and only targets that cannot move, or a regularizer, prevent collapse.
        needs_scale: the function takes `scale`. Without it, the temperature is frozen.
        needs_bias: the function takes `bias`, and the model must have a logit bias.
        needs_hard_negatives: the function takes `negative_embeds` and `negative_ids`; the
            objective leaves them out if the rows have none.
        needs_over_processes: the function takes `over_processes`.
    """

    function: Callable[..., torch.Tensor | InfoNCE]
    needs_negatives: bool = False
    needs_scale: bool = False
    needs_bias: bool = False
    needs_hard_negatives: bool = False
    needs_over_processes: bool = False


# The values of `training.objective`. To add a loss: write its function above and its entry here,
# and test its value in tests/model/test_losses.py, which tests the gradient of every entry.
LOSSES = {
    "info_nce": Loss(
        function=info_nce,
        needs_negatives=True,
        needs_scale=True,
        needs_hard_negatives=True,
        needs_over_processes=True,
    ),
    "sigmoid": Loss(function=sigmoid_loss, needs_negatives=True, needs_scale=True, needs_bias=True),
    "cosine": Loss(function=cosine_loss),
    "l1": Loss(function=l1_loss),
    "l2": Loss(function=l2_loss),
}


__all__ = [
    "LOSSES",
    "InfoNCE",
    "Loss",
    "cosine_loss",
    "info_nce",
    "l1_loss",
    "l2_loss",
    "sigmoid_loss",
    "sigreg",
    "vicreg_terms",
]
