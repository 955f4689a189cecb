"""The objective: pure functions of two matrices, a scale and vectors of ids.

Shapes: B batch (of all processes together), D embedding size. Gathering the rows of other
processes is not done here: see `training/distributed.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class InfoNCE:
    """The loss and what to read beside it; only `loss` is differentiated.

    Attributes:
        loss (`torch.Tensor` of shape `()`): mean of both directions.
        chance_loss (`torch.Tensor` of shape `()`): what a model that knows nothing gets: the mean
            of ln(1 + negatives), ln B only where no row is masked.
        accuracy (`torch.Tensor` of shape `()`): share of predictions closer to their own target
            than to every negative; a tie is wrong. It depends on the batch size: for watching, not
            for reporting.
    """

    loss: torch.Tensor
    chance_loss: torch.Tensor
    accuracy: torch.Tensor


def interchangeable(ids: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """Pairs of rows `(B, B)` that share an id, the diagonal left out."""
    if ids is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    same = ids.unsqueeze(0) == ids.unsqueeze(1)
    return same.fill_diagonal_(False)


def info_nce(
    predicted_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    scale: torch.Tensor,
    target_ids: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
) -> InfoNCE:
    """Bi-directional InfoNCE over in-batch negatives (paper section 3.2, Radford et al. 2021).

    Two rows that share a target text or a group are not each other's negatives: to push apart
    "yes" and "yes" would teach the model that its right answer is wrong.

    Args:
        predicted_embeds (`torch.Tensor` of shape `(B, D)`): unit vectors.
        target_embeds (`torch.Tensor` of shape `(B, D)`): unit vectors; row i belongs to row i.
        scale (`torch.Tensor`): the inverse temperature.
        target_ids (`torch.LongTensor` of shape `(B,)`, *optional*): equal for equal target texts.
        group_ids (`torch.LongTensor` of shape `(B,)`, *optional*): equal for interchangeable
            targets, such as two captions of one clip.
    """
    size, device = len(predicted_embeds), predicted_embeds.device
    # Out of autocast: a logit of 100 rounded to bf16 is wrong by up to a quarter.
    with torch.autocast(device.type, enabled=False):
        logits = scale * predicted_embeds @ target_embeds.T  # (B, B)
    masked = interchangeable(target_ids, size, device) | interchangeable(group_ids, size, device)
    logits = logits.masked_fill(masked, -torch.inf)
    labels = torch.arange(size, device=device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    with torch.no_grad():
        candidates = size - masked.sum(dim=1)  # (B,); the mask is symmetric
        chance_loss = candidates.float().log().mean()
        negatives = logits.masked_fill(torch.eye(size, dtype=torch.bool, device=device), -torch.inf)
        accuracy = (logits.diagonal() > negatives.amax(dim=1)).float().mean()
    return InfoNCE(loss, chance_loss, accuracy)


__all__ = ["InfoNCE", "info_nce"]
