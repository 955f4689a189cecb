"""Compare the tiled loss with the plain one: `python -m benchmarks.loss`.

Both compute bi-directional InfoNCE, forward and backward, in fp32, and mask the same false
negatives (rows with equal texts). The plain one is ½ (cross_entropy(S) + cross_entropy(Sᵀ)) under
autograd.
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.measure import Cost, cost, in_own_process
from modeling_vljepa.losses import info_nce


def inputs(size: int, width: int) -> tuple[torch.Tensor, ...]:
    """Return unit vectors, a scale, and text ids of which some occur twice."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        F.normalize(torch.randn(size, width, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    ]
    scale = torch.tensor([14.3], requires_grad=True)
    return *sides, scale, torch.randint(5 * size, (size,), generator=generator)


def plain(predicted: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor):
    logits = scale * (predicted @ target.T)  # (B, B)
    equal = (ids[:, None] == ids).fill_diagonal_(False)
    logits = logits.masked_fill(equal, -torch.inf)
    labels = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def tiled(predicted: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor):
    return info_nce(predicted, target, scale, ids).loss


def measure(name: str, size: int, width: int) -> Cost:
    """Run forward and backward; `value` is the loss and the norm of each gradient.

    The memory of the gradients is subtracted: it is the same for both losses.
    """
    predicted, target, scale, ids = inputs(size, width)
    function = {"plain": plain, "tiled": tiled}[name]

    def step() -> list[float]:
        for leaf in (predicted, target, scale):
            leaf.grad = None
        loss = function(predicted, target, scale, ids)
        loss.backward()
        norms = [leaf.grad.norm().item() for leaf in (predicted, target, scale)]
        return [loss.item(), *norms]

    found = cost(step)
    gradients = predicted.grad.nbytes + target.grad.nbytes
    return replace(found, peak_bytes=found.peak_bytes - gradients)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--size", type=int, default=24_576, help="rows, the paper's batch")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    found = {
        name: in_own_process(measure, name, args.size, args.width, threads=args.threads)
        for name in ("plain", "tiled")
    }
    print(f"B = {args.size}, D = {args.width}, fp32, {args.threads} threads, forward + backward")
    print(f"{'':<8}{'CPU-seconds':>12}{'peak GiB':>10}   loss and gradient norms")
    for name, one in found.items():
        values = " ".join(f"{value:.7g}" for value in one.value)
        print(f"{name:<8}{one.cpu_seconds:>12.1f}{one.peak_bytes / 2**30:>10.2f}   {values}")
    ratio = found["tiled"].cpu_seconds / found["plain"].cpu_seconds
    less = found["plain"].peak_bytes / found["tiled"].peak_bytes
    print(f"tiled / plain: {ratio:.2f} of the CPU-seconds, 1/{less:.0f} of the memory")
    print("memory: in addition to the inputs and their gradients")


if __name__ == "__main__":
    main()
