"""Memory and time of GradCache: `python -m benchmarks.grad_cache --size 4096`.

Three runs of the model of `benchmarks/configs.py`, each in its own process: one small batch, the
large batch with GradCache, and the rows of the large batch as consecutive small batches. The last
has another loss; its time is the least for these rows.

The peak is of resident memory. By default glibc retains freed blocks, more of them the longer a
process runs. A fixed threshold makes it return large blocks to the system, so that resident memory
is memory in use.
"""

import argparse
import os

import torch

from benchmarks.configs import mid_config
from benchmarks.measure import Cost, cost, in_own_process
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAVideoProcessor
from training.data.collator import to_pixel_values
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective

FRAMES, LENGTH = 2, 32


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Return uint8 clips of two frames of 256 pixels, as the collator makes them, and queries and
    targets of 32 tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, FRAMES, 3, 256, 256)
    return {
        "frames": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        "input_ids": torch.randint(3, 32_000, (size, LENGTH), generator=generator),
        "target_input_ids": torch.randint(3, 32_000, (size, LENGTH), generator=generator),
    }


def make_ready(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Normalise the frames of a part, as the Trainer does on the device."""
    if "frames" not in part:
        return part
    part = dict(part)
    frames = part.pop("frames")
    return part | {"pixel_values_videos": to_pixel_values(frames, VLJEPAVideoProcessor())}


def loss_of(embeds: Embeds) -> torch.Tensor:
    rows = torch.arange(len(embeds.predicted_embeds))
    return Objective()(embeds, Ids(target_index=rows, target_ids=rows, group_ids=rows))[0]


def plain_step(model: VLJEPAModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**make_ready(batch))
    loss = loss_of(Embeds(output.predicted_embeds, output.target_embeds, output.logit_scale))
    loss.backward()
    return loss.detach()


def measure(name: str, size: int, rows: int) -> Cost:
    torch.manual_seed(0)
    model = VLJEPAModel(mid_config()).train()
    plain_step(model, make_batch(1))  # allocates gradients and workspaces before the measurement
    model.zero_grad(set_to_none=False)
    batch = make_batch(size)

    def small_batches() -> float:
        for start in range(0, size, rows):
            part = {key: value[start : start + rows] for key, value in batch.items()}
            loss = plain_step(model, part)
        return loss.item()

    def cached() -> float:
        return cached_step(model, batch, rows, loss_of, make_ready=make_ready).item()

    return cost({"plain": small_batches, "cached": cached}[name])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grad_cache", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows of the large batch")
    parser.add_argument(
        "--rows",
        type=int,
        default=64,
        help="rows of the small batch, and of a part of the large one",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by each process when it starts
    found = {
        f"{name} {size}": in_own_process(measure, name, size, args.rows, threads=args.threads)
        for name, size in (("plain", args.rows), ("cached", args.size), ("plain", args.size))
    }
    print(f"mid config, fp32, {FRAMES} frames, {args.rows} rows per pass, {args.threads} threads")
    print(f"{'':<14}{'CPU-seconds':>12}{'peak GiB':>10}")
    for name, one in found.items():
        print(f"{name:<14}{one.cpu_seconds:>12.1f}{one.peak_bytes / 2**30:>10.2f}")
    small, cached, plain = found.values()
    print(f"memory of cached / plain {args.rows}: {cached.peak_bytes / small.peak_bytes:.2f}")
    print(f"CPU-seconds of cached / plain: {cached.cpu_seconds / plain.cpu_seconds:.2f}")
    print("memory: in addition to the model, its gradients and the batch's tensors")


if __name__ == "__main__":
    main()
