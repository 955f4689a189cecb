"""What is minimised: the recipe's objective over the rows of all processes.

Shapes: b rows of this process, B of all, U distinct texts of this process, n hard negatives of a
row, K of all rows, D embedding size.
"""

from dataclasses import dataclass

import torch

from modeling_vljepa import VLJEPAModel
from modeling_vljepa.losses import LOSSES, InfoNCE, Loss, sigreg, vicreg_terms
from training.arguments import RecipeError, VLJEPATrainingArguments
from training.loop.distributed import all_gather, all_logsumexp, gather_with_gradient, rank
from training.model.adapters import any_trains


@dataclass
class Embeds:
    """What the objective is a function of.

    Attributes:
        predicted_embeds (`torch.FloatTensor` of shape `(b, D)`): Ŝ_Y.
        distinct_target_embeds (`torch.FloatTensor` of shape `(U, D)`): S_Y of every distinct text
            of this process's rows, their hard negatives among them; `Ids` says whose is which.
        logit_scale (`torch.FloatTensor` of shape `(1,)`)
        logit_bias (`torch.FloatTensor` of shape `(1,)`, *optional*): of the sigmoid loss.
    """

    predicted_embeds: torch.Tensor
    distinct_target_embeds: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None


@dataclass
class Ids:
    """Which text is whose, as the collator says it.

    Attributes:
        target_index (`torch.LongTensor` of shape `(b,)`): each row's target among the texts.
        target_ids (`torch.LongTensor` of shape `(b,)`): equal for equal texts, everywhere.
        group_ids (`torch.LongTensor` of shape `(b,)`): equal for interchangeable targets.
        negative_index (`torch.LongTensor` of shape `(b, n)`, *optional*): each row's hard
            negatives among the texts.
        negative_ids (`torch.LongTensor` of shape `(b, n)`, *optional*): of their texts; -1 where
            a row has fewer than n.
    """

    target_index: torch.Tensor
    target_ids: torch.Tensor
    group_ids: torch.Tensor
    negative_index: torch.Tensor | None = None
    negative_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Embeddings to a loss whose mean over processes is the loss of the whole batch.

    Attributes:
        name: "info_nce", "sigmoid", "cosine", "l1" or "l2"; see `modeling_vljepa/losses.py`.
        as_positives: whether interchangeable rows attract each other, or are only left out.
        sigreg_weight, variance_weight, covariance_weight: of the terms that keep the embeddings
            of both sides apart without negatives.
        num_directions: of SIGReg's sketch.
    """

    name: str = "info_nce"
    as_positives: bool = False
    sigreg_weight: float = 0.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    num_directions: int = 256

    def __call__(
        self, embeds: Embeds, ids: Ids, seed: int = 0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss `()`, and its parts by name; only the loss is differentiated.

        Args:
            seed: of SIGReg's directions; the same in every process, another at every step.
        """
        loss, parts = self.contrast(embeds, ids)
        parts |= {"logit_scale": embeds.logit_scale.mean()}
        for side, rows in (
            ("predicted", embeds.predicted_embeds),
            ("target", embeds.distinct_target_embeds),
        ):
            parts[f"{side}_spread"] = spread(rows)
        return loss + self.regularize(embeds, ids, seed, parts), parts

    def contrast(self, embeds: Embeds, ids: Ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss `()` of this process's rows, and its parts by name.

        The entry in `LOSSES` states which arguments the function takes.
        """
        loss = LOSSES[self.name]
        targets = embeds.distinct_target_embeds[ids.target_index]  # (b, D)
        arguments, parts = {}, {}
        if loss.needs_negatives:
            arguments["target_ids"] = all_gather(ids.target_ids)  # (B,)
            arguments["group_ids"] = all_gather(ids.group_ids)  # (B,)
            arguments["as_positives"] = self.as_positives
            arguments["first_row"] = rank() * len(targets)
            targets = gather_with_gradient(targets)  # (B, D)
        if loss.needs_scale:
            arguments["scale"] = embeds.logit_scale
        if loss.needs_bias:
            arguments["bias"] = embeds.logit_bias
            parts["logit_bias"] = embeds.logit_bias.mean()
        if loss.needs_hard_negatives and ids.negative_index is not None:
            negatives = embeds.distinct_target_embeds[ids.negative_index.flatten()]  # (b * n, D)
            arguments["negative_embeds"] = gather_with_gradient(negatives)  # (K, D)
            arguments["negative_ids"] = all_gather(ids.negative_ids.flatten())  # (K,)
        if loss.needs_over_processes:
            arguments["over_processes"] = all_logsumexp
        result = loss.function(embeds.predicted_embeds, targets, **arguments)
        if isinstance(result, InfoNCE):
            parts |= {"chance_loss": result.chance_loss, "accuracy": result.accuracy}
            return result.loss, parts
        return result, parts

    def regularize(
        self, embeds: Embeds, ids: Ids, seed: int, parts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The weighted terms over both sides' rows of all processes, added to `parts` as well."""
        total = embeds.predicted_embeds.new_zeros(())
        if not (self.sigreg_weight or self.variance_weight or self.covariance_weight):
            return total
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(
            embeds.predicted_embeds.shape[1], self.num_directions, generator=generator
        ).to(embeds.predicted_embeds)
        directions = directions / directions.norm(dim=0)  # (D, S)
        for side, rows in (
            ("predicted", embeds.predicted_embeds),
            ("target", embeds.distinct_target_embeds[ids.target_index]),
        ):
            rows = gather_with_gradient(rows)  # (B, D)
            if self.sigreg_weight:
                parts[f"{side}_sigreg"] = sigreg(rows, directions)
                total = total + self.sigreg_weight * parts[f"{side}_sigreg"]
            if self.variance_weight or self.covariance_weight:
                variance, covariance = vicreg_terms(rows)
                parts |= {f"{side}_variance": variance, f"{side}_covariance": covariance}
                total = total + self.variance_weight * variance
                total = total + self.covariance_weight * covariance
        return total


@torch.no_grad()
def spread(embeds: torch.Tensor) -> torch.Tensor:
    """Variance `()` of unit vectors `(B, D)` around their centre: 0 when all are one point, and 1
    when they are spread over the sphere."""
    return 1 - embeds.mean(dim=0).square().sum()


def check_objective(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
    """Reject an objective this model cannot use; freeze the parameters the objective ignores.

    Raises:
        RecipeError: a loss without negatives would pull all embeddings into one point, because
            the side of the targets trains (paper section 4.6, 7c); or the loss needs a logit bias
            and the model has none.
    """
    loss = LOSSES[args.objective]
    name = f"training.objective: {args.objective!r}"
    kept_apart = args.sigreg_weight or args.variance_weight
    moves = [name for name in ("y_encoder", "y_head") if any_trains(getattr(model, name))]
    if not loss.needs_negatives and moves and not kept_apart:
        raise RecipeError(
            f"{name} has no negatives, and the targets' {moves[0]} trains: everything would "
            "become one point. Set model.config.freeze_text to true and project_target to false, "
            "or give training.sigreg_weight or training.variance_weight."
        )
    if loss.needs_bias and model.logit_bias is None:
        raise RecipeError(f"{name} learns a bias: set model.config.logit_bias_init_value (-10).")
    freeze_ignored(model, loss)


def freeze_ignored(model: VLJEPAModel, loss: Loss) -> None:
    """Freeze the temperature and the bias if the loss ignores them.

    Data-parallel training waits for the gradient of every parameter that trains.
    """
    if not loss.needs_scale:
        model.logit_scale.requires_grad_(False)
    if not loss.needs_bias and model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)


__all__ = ["Embeds", "Ids", "Objective", "check_objective"]
