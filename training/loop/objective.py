"""What is minimised: the recipe's objective over the rows of all processes.

Shapes: b rows of this process, B of all, U distinct texts of this process, n hard negatives of a
row, K of all rows, D embedding size.
"""

from dataclasses import dataclass

import torch

from modeling_vljepa.losses import (
    cosine_loss,
    info_nce,
    l1_loss,
    l2_loss,
    sigmoid_loss,
    sigreg,
    vicreg_terms,
)
from training.loop.distributed import all_gather, all_logsumexp, gather_with_gradient, rank

PAIRWISE = {"cosine": cosine_loss, "l1": l1_loss, "l2": l2_loss}


@dataclass
class Embeds:
    """What the objective is a function of.

    Attributes:
        predicted (`torch.FloatTensor` of shape `(b, D)`): Ŝ_Y.
        texts (`torch.FloatTensor` of shape `(U, D)`): S_Y of every distinct text.
        logit_scale (`torch.FloatTensor` of shape `(1,)`)
        logit_bias (`torch.FloatTensor` of shape `(1,)`, *optional*): of the sigmoid loss.
    """

    predicted: torch.Tensor
    texts: torch.Tensor
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
        for side, rows in (("predicted", embeds.predicted), ("target", embeds.texts)):
            parts[f"{side}_spread"] = spread(rows)
        return loss + self.regularize(embeds, ids, seed, parts), parts

    def contrast(self, embeds: Embeds, ids: Ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        targets = embeds.texts[ids.target_index]  # (b, D)
        if self.name in PAIRWISE:
            return PAIRWISE[self.name](embeds.predicted, targets), {}
        shared = {
            "target_ids": all_gather(ids.target_ids),  # (B,)
            "group_ids": all_gather(ids.group_ids),  # (B,)
            "as_positives": self.as_positives,
            "first_row": rank() * len(targets),
        }
        targets = gather_with_gradient(targets)  # (B, D)
        if self.name == "sigmoid":
            loss = sigmoid_loss(
                embeds.predicted, targets, embeds.logit_scale, embeds.logit_bias, **shared
            )
            return loss, {"logit_bias": embeds.logit_bias.mean()}
        if ids.negative_index is not None:
            negatives = embeds.texts[ids.negative_index.flatten()]  # (b * n, D)
            shared["negative_embeds"] = gather_with_gradient(negatives)  # (K, D)
            shared["negative_ids"] = all_gather(ids.negative_ids.flatten())  # (K,)
        result = info_nce(
            embeds.predicted, targets, embeds.logit_scale, over_processes=all_logsumexp, **shared
        )
        return result.loss, {"chance_loss": result.chance_loss, "accuracy": result.accuracy}

    def regularize(
        self, embeds: Embeds, ids: Ids, seed: int, parts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The weighted terms over both sides' rows of all processes, added to `parts` as well."""
        total = embeds.predicted.new_zeros(())
        if not (self.sigreg_weight or self.variance_weight or self.covariance_weight):
            return total
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(
            embeds.predicted.shape[1], self.num_directions, generator=generator
        ).to(embeds.predicted)
        directions = directions / directions.norm(dim=0)  # (D, S)
        for side, rows in (
            ("predicted", embeds.predicted),
            ("target", embeds.texts[ids.target_index]),
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


__all__ = ["Embeds", "Ids", "Objective"]
