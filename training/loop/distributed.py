"""What several processes have to agree on: how many they are, and each other's embeddings."""

import os

import torch
import torch.distributed as dist

from training.arguments import RecipeError


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of every process in rank order: `(B, …)` to `(world x B, …)`, without gradient."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def all_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over processes, without gradient."""
    return all_gather(tensor.detach()[None]).mean(dim=0)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, without gradient."""
    return all_gather(tensor[None]).sum(dim=0)


def all_logsumexp(columns_lse: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp `(B,)` over each process's rows to that over all rows, without gradient."""
    return all_gather(columns_lse[None]).logsumexp(dim=0)


class GatherWithGradient(torch.autograd.Function):
    """`all_gather` whose backward is its true adjoint: the sum over processes, then this one's
    slice. To return only the local slice loses what the other processes' losses owe to this
    one's rows; the loss would be right and the gradient wrong."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of every process, differentiable.

    When the mean over processes of what each makes of the result is the global loss, and data
    parallelism averages the gradients of the parameters, that average is the gradient of one
    process that holds the whole batch, for the parameters behind the rows and for those, like
    the temperature, that enter the loss directly.
    """
    return tensor if world_size() == 1 else GatherWithGradient.apply(tensor)


def check_world_size(found: int, expected: int | None) -> None:
    """Stop when fewer or more processes run than the recipe or the command asked for.

    Raises:
        RecipeError: naming both numbers and the command that gives the wanted one.
    """
    # `accelerate launch` on a CPU box starts one process whatever --num_processes says, and
    # leaves this trace: the address of a meeting to which nobody else is invited.
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
