"""Communication between processes: their number, and gathering of tensors."""

import os

import torch
import torch.distributed as dist

from training.arguments import RecipeError


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the rows of every process in rank order: `(b, …)` to `(world x b, …)`.

    The result has no gradient.
    """
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def all_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over processes, without gradient."""
    return all_gather(tensor.detach()[None]).mean(dim=0)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes, without gradient."""
    return all_gather(tensor[None]).sum(dim=0)


def all_logsumexp(columns_lse: torch.Tensor) -> torch.Tensor:
    """Combine the log-sum-exp `(B,)` over each process's rows into that over all rows.

    The result has no gradient.
    """
    return all_gather(columns_lse[None]).logsumexp(dim=0)


class GatherWithGradient(torch.autograd.Function):
    """`all_gather` with the correct gradient: the sum over processes, then this process's slice.

    A backward pass that returns the local slice alone would omit the gradients of the other
    processes' losses at this process's rows. The loss would be correct and the gradient wrong.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the rows of every process; the result has a gradient.

    Suppose that each process computes a loss from the gathered rows, that the mean of these losses
    is the loss of the whole batch, and that data parallelism averages the parameters' gradients.
    Then the average equals the gradient of one process with the whole batch. This holds for the
    parameters that compute the rows, and for those, such as the temperature, that the loss reads
    directly.
    """
    return tensor if world_size() == 1 else GatherWithGradient.apply(tensor)


def check_world_size(found: int, expected: int | None) -> None:
    """Raise `RecipeError` if the number of processes is not the one that was asked for.

    Args:
        found: processes that run.
        expected: `training.world_size_expected`; `None` accepts any number.
    """
    # On a machine without GPUs, `accelerate launch` ignores --num_processes and starts one
    # process. It sets MASTER_ADDR for several processes, but not WORLD_SIZE.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION") is not None
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise RecipeError(
            "accelerate launch was asked for several processes and started one, as it does "
            "without GPUs. Use: torchrun --nproc_per_node N -m training.train RECIPE"
        )
    if expected is not None and found != expected:
        raise RecipeError(
            f"The recipe expects {expected} process(es) and {found} run. Use: torchrun "
            f"--nproc_per_node {expected} -m training.train RECIPE, or change "
            "training.world_size_expected."
        )
