"""The recipe's objective over the rows of all processes: a loss and regularizers.

Shapes: b rows of this process, B rows of all processes, U distinct texts of this process, n hard
negatives of a row, K hard negatives of all rows, D embedding size, S directions of SIGReg.
"""

from dataclasses import dataclass

import torch
from torch import nn

from modeling_vljepa import VLJEPAModel
from modeling_vljepa.losses import LOSSES, InfoNCE, Loss, sigreg, vicreg_terms
from training.arguments import RecipeError, VLJEPATrainingArguments
from training.loop.distributed import all_gather, all_logsumexp, gather_with_gradient, rank
from training.model.adapters import any_trains


@dataclass
class Embeds:
    """Inputs of the objective that have a gradient.

    Attributes:
        predicted_embeds (`torch.FloatTensor` of shape `(b, D)`): Ŝ_Y.
        distinct_target_embeds (`torch.FloatTensor` of shape `(U, D)`): S_Y of every distinct text
            of this process's rows, their hard negatives included. `Ids` assigns them to rows.
        logit_scale (`torch.FloatTensor` of shape `(1,)`): the inverse temperature.
        logit_bias (`torch.FloatTensor` of shape `(1,)`, *optional*): the sigmoid loss's bias.
    """

    predicted_embeds: torch.Tensor
    distinct_target_embeds: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None


@dataclass
class Ids:
    """Assignment of texts to rows, from the collator.

    Attributes:
        target_index (`torch.LongTensor` of shape `(b,)`): each row's target among the texts.
        target_ids (`torch.LongTensor` of shape `(b,)`): equal for equal texts, in all processes.
        group_ids (`torch.LongTensor` of shape `(b,)`): equal for interchangeable targets.
        negative_index (`torch.LongTensor` of shape `(b, n)`, *optional*): each row's hard
            negatives among the texts.
        negative_ids (`torch.LongTensor` of shape `(b, n)`, *optional*): their text ids; -1 for
            padding in rows with fewer than n.
    """

    target_index: torch.Tensor
    target_ids: torch.Tensor
    group_ids: torch.Tensor
    negative_index: torch.Tensor | None = None
    negative_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss whose mean over processes is the loss of the whole batch.

    Attributes:
        name: a key of `LOSSES` in `modeling_vljepa/losses.py`.
        as_positives: interchangeable rows attract each other. If false, their pairs are left out.
        sigreg_weight, variance_weight, covariance_weight: weights of the regularizers, which keep
            the embeddings of both sides apart without negatives.
        num_directions: number of random directions of SIGReg.
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
        """Return the loss `()` and its parts by name; only the loss is differentiable.

        Args:
            seed: seed of SIGReg's directions: equal in all processes, different at every step.
        """
        loss, parts = self.contrast(embeds, ids)
        parts |= {"logit_scale": embeds.logit_scale.mean()}
        for side, rows in (
            ("predicted", embeds.predicted_embeds),
            ("target", embeds.distinct_target_embeds),
        ):
            parts[f"{side}_spread"] = embedding_variance(rows)
        return loss + self.regularize(embeds, ids, seed, parts), parts

    def contrast(self, embeds: Embeds, ids: Ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss `()` of this process's rows and its parts by name.

        The entry in `LOSSES` states the arguments that the function needs.
        """
        loss = LOSSES[self.name]
        targets = embeds.distinct_target_embeds[ids.target_index]  # (b, D)
        arguments, parts = {}, {}
        if loss.needs_negatives:
            arguments["target_ids"] = all_gather(ids.target_ids)  # (B,)
            arguments["group_ids"] = all_gather(ids.group_ids)  # (B,)
            arguments["as_positives"] = self.as_positives
            # Gathered rows are in rank order, so this process's own targets start here.
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
        """Return the weighted sum `()` of the regularizers, and add each to `parts`.

        Each regularizer reads the rows of all processes, on both sides.
        """
        total = embeds.predicted_embeds.new_zeros(())
        if not (self.sigreg_weight or self.variance_weight or self.covariance_weight):
            return total
        # On the CPU, so that one seed gives the same directions on every device.
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(
            embeds.predicted_embeds.shape[1], self.num_directions, generator=generator
        ).to(embeds.predicted_embeds, non_blocking=True)
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
def embedding_variance(embeds: torch.Tensor) -> torch.Tensor:
    """Return the variance `()` of unit vectors `(B, D)` around their mean.

    It is 0 if all vectors are equal, and 1 if they cover the sphere evenly.
    """
    # The mean of |x - m|^2 is the mean of |x|^2, which is 1, minus |m|^2.
    return 1 - embeds.mean(dim=0).square().sum()


def check_objective(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
    """Reject an objective that this model cannot use; freeze the parameters that it ignores.

    Raises:
        RecipeError: the loss has no negatives and the target side trains, so all embeddings would
            become one point (paper section 4.6, 7c); or the loss needs a logit bias and the model
            has none; or GradCache would change what batch norms compute.
    """
    loss = LOSSES[args.objective]
    name = f"training.objective: {args.objective!r}"
    kept_apart = args.sigreg_weight or args.variance_weight
    moves = [name for name in ("y_encoder", "y_head") if any_trains(getattr(model, name))]
    if not loss.needs_negatives and moves and not kept_apart:
        raise RecipeError(
            f"{name} has no negatives, and the targets' {moves[0]} trains, so all embeddings "
            "would become one point. Set model.config.freeze_text to true and project_target to "
            "false, or give training.sigreg_weight or training.variance_weight."
        )
    if loss.needs_bias and model.logit_bias is None:
        raise RecipeError(f"{name} learns a bias: set model.config.logit_bias_init_value (-10).")
    check_batch_norms(model, args)
    freeze_ignored(model, loss)


def trains_batch_norms(model: VLJEPAModel) -> bool:
    """Return True if the X-Encoder trains and has batch norms, so that a row's tokens depend on the
    other rows of its pass."""
    encoder = model.x_encoder
    return any_trains(encoder) and any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


def check_batch_norms(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
    """Raise `RecipeError` for GradCache with batch norms, which would average over its parts."""
    if args.gradient_cache_rows is not None and trains_batch_norms(model):
        raise RecipeError(
            f"training.gradient_cache_rows: the X-Encoder, a "
            f"{model.config.vision_config.model_type!r}, has batch norms, which would average over "
            f"{args.gradient_cache_rows} rows instead of the whole batch. Remove it, freeze the "
            "X-Encoder, or train one without batch norms, such as 'bit' or 'convnext'."
        )


def freeze_ignored(model: VLJEPAModel, loss: Loss) -> None:
    """Freeze the temperature and the bias if the loss ignores them.

    Otherwise data-parallel training would wait for gradients that never arrive.
    """
    if not loss.needs_scale:
        model.logit_scale.requires_grad_(False)
    if not loss.needs_bias and model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)


__all__ = ["Embeds", "Ids", "Objective", "check_objective", "trains_batch_norms"]
