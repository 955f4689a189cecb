"""CPU time of the attention kernels that transformers can choose, and of plain products.

    OMP_NUM_THREADS=1 python -m benchmarks.attention [--heads 4] [--lengths 16 32 …] [--seconds 0.3]

Every ratio is the least CPU time of a kernel over that of `sdpa`, measured in turns; below 1 it is
faster. "plain" is the kernel of `modeling_vljepa/attention.py`, whose rule these ratios support.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from modeling_vljepa.attention import plain_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = 16_384  # of a batch, at most 64 sequences
PASSES = ("forward", "both")  # "both": forward and backward


def sdpa(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    return sdpa_attention_forward(layer, *inputs)[0]


def math(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(layer, *inputs)


def eager(layer: nn.Module, query: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    *others, mask = inputs
    if mask is not None:  # transformers gives `eager` a mask to add
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -1e9)
    return eager_attention_forward(layer, query, *others, mask, query.shape[-1] ** -0.5)[0]


def plain(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    return plain_attention(*inputs, 0.0, None, False)


KERNELS = {"sdpa": sdpa, "math": math, "eager": eager, "plain": plain}


def calls(
    dtype: torch.dtype, size: int, length: int, heads: int, passes: str, masked: bool
) -> dict[str, Callable[[], None]]:
    """Return one call of each kernel on the same random inputs; `size` is that of a head."""
    rows = max(1, min(64, TOKENS // length))
    shape, both = (rows, length, heads, size), passes == "both"
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=both) for _ in range(3)]
    gradient = torch.randn(shape, dtype=dtype)
    mask = None
    if masked:
        lengths = torch.randint(length // 2, length + 1, (rows, 1))
        mask = (torch.arange(length) < lengths)[:, None, None].expand(rows, 1, length, length)
        mask = mask.contiguous()
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 1, False

    def call(kernel: Callable) -> None:
        with torch.set_grad_enabled(both):
            output = kernel(layer, *(tensor.transpose(1, 2) for tensor in inputs), mask)
            if both:
                torch.autograd.grad(output, inputs, gradient)

    return {name: lambda kernel=kernel: call(kernel) for name, kernel in KERNELS.items()}


def least_times(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Return the least CPU time of each call, measured in turns for at least `seconds`."""
    best, end = dict.fromkeys(runs, float("inf")), time.monotonic() + seconds
    for turn in range(1000):
        if turn > 3 and time.monotonic() > end:
            break
        for name, run in runs.items():
            since = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - since)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.attention", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[16, 32, 64, 128, 192, 256, 512, 1024]
    )
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.3)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| dtype | head | length | passes | mask | sdpa, ms | math | eager | plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        for size in args.sizes:
            for length in args.lengths:
                for passes in PASSES:
                    for masked in (False, True):
                        runs = calls(DTYPES[dtype], size, length, args.heads, passes, masked)
                        best = least_times(runs, args.seconds)
                        ratios = [f"{best[name] / best['sdpa']:.2f}" for name in KERNELS]
                        cells = [dtype, size, length, passes, "yes" if masked else "no"]
                        cells += [f"{1000 * best['sdpa']:.2f}", *ratios[1:]]
                        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
