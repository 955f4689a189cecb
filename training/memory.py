"""Estimate the memory of a training step, and what fits on a card, without a card.

    python -m training.memory                                  # the paper's model
    python -m training.memory --config runs/init --frames 8

A training step runs on tensors of torch's FakeTensorMode, which have shapes but no memory. Every
storage that is allocated or freed is counted.

| counted     | as                                                                            |
|-------------|-------------------------------------------------------------------------------|
| weights     | fp32; bf16 for frozen ones that `prepare_for_training` stores so              |
| gradients   | fp32, allocated from the start, as in all parts of GradCache after the first  |
| AdamW       | two states of fp32, or of 8 bits with an fp32 scale for every 256             |
| activations | the peak of a step, including its batch and autocast's bf16 copies of weights |

Texts of a batch differ in length, so there are attention masks. No two rows share a target or a
clip.
Attention is torch's fused kernel. A GPU without that kernel for a shape uses more: the plain one
holds a matrix of scores. Trained layer norms compute in fp32, as autocast does on CUDA only.

Not counted: the CUDA context, fragmentation and kernel workspaces, for which `--reserve-gib` is
set aside; the buckets of data parallelism, which are as large as the gradients. A GB is 10^9 bytes,
a little less than most cards sold under that size have; a GiB is 2^30 bytes.

Shapes: B rows of a batch, T frames, C channels, L query tokens, Ly target tokens.
"""

import argparse
import copy
import os
import sys
import weakref
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product, repeat
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers.utils import logging

from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.x_encoder import VIDEO, XEncoder, frame_side
from training.arguments import RecipeError, VLJEPATrainingArguments
from training.loop.objective import Embeds, Ids, Objective, check_objective
from training.model.adapters import prepare_for_training
from training.model.checkpoint_files import load

# Rows of the steps that are run. As a function of rows, memory is convex: it bends upwards where
# another moment of the step becomes the peak. So a line between two points is never too low.
MEASURED_ROWS = (1, 32, 1024)
STATE_BYTES = {"fp32": 2 * 4.0, "8-bit": 2 * (1 + 4 / 256)}  # AdamW's, for each parameter


@dataclass(frozen=True)
class Setting:
    """A row of the table: configuration changes, adapters and activation checkpointing."""

    name: str
    changes: dict
    lora: dict | None = None
    checkpointing: bool = False


FULL = {"freeze_vision": True, "freeze_text": False}
ADAPTED = {"freeze_vision": True, "freeze_text": True}
STAGE_3 = {"freeze_vision": False, "freeze_text": False}
SETTINGS = (
    Setting("full", FULL),
    Setting("full, checkpointing", FULL, checkpointing=True),
    Setting("LoRA", ADAPTED, {"r": 16}),
    Setting("LoRA, checkpointing", ADAPTED, {"r": 16}, checkpointing=True),
    Setting("X-Encoder too", STAGE_3),
    Setting("X-Encoder too, checkpointing", STAGE_3, checkpointing=True),
)


class HeldMemory(TorchDispatchMode):
    """Counter of the memory of tensors made inside it.

    Attributes:
        held: bytes now.
        peak: largest value of `held` so far.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, tensors: Any) -> None:
        """Count the storages of these tensors, each once, until it is freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()  # views share it, so they add nothing
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self.drop, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)

    def drop(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.held -= size


class HeldByFakes(HeldMemory):
    """Memory counter for fake tensors, which have no values.

    Where the code reads values, it gets these: an id is 1, and a mask has padding.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # `.item()`, `if tensor:`
            return int(args[0].dtype == torch.long)
        return super().__torch_dispatch__(function, types, args, kwargs)


@dataclass
class Need:
    """Memory of training, in bytes.

    Attributes:
        weights, gradients: those of the model.
        trained: number of parameters that the optimizer has states for.
        steps: peak of a step beyond weights and gradients, by its number of rows.
    """

    weights: int
    gradients: int
    trained: int
    steps: dict[int, int] = field(default_factory=dict)

    def fixed(self, states: str) -> float:
        """Return the memory of weights, gradients and AdamW's states, which no row adds to."""
        return self.weights + self.gradients + self.trained * STATE_BYTES[states]

    @property
    def row(self) -> float:
        """Memory of one more row in a large batch."""
        (rows, held), (more_rows, more_held) = list(self.steps.items())[-2:]
        return (more_held - held) / (more_rows - rows)

    def most_rows(self, room: float, states: str) -> int:
        """Return the largest number of rows of a step in `room` bytes."""
        rows, held = list(self.steps), list(self.steps.values())
        # Beyond the largest measured step memory grows linearly; `interp` alone would stop there.
        rows, held = [*rows, rows[-1] + 1e6], [*held, held[-1] + 1e6 * self.row]
        return int(np.interp(room - self.fixed(states), held, rows, left=0))


def random_batch(
    config: VLJEPAConfig, rows: int, frames: int, query_length: int, target_length: int
) -> dict[str, torch.Tensor]:
    """`frames` `(B, T, C, H, W)`, uint8, `input_ids` `(B, L)`, `target_input_ids` `(B, Ly)`, and
    their masks, in which the last row is shorter."""
    vision = config.vision_config
    is_video = vision.model_type in VIDEO
    channels = vision.in_chans if is_video else vision.num_channels
    side = frame_side(vision)
    batch = {"frames": torch.zeros(rows, frames, channels, side, side, dtype=torch.uint8)}
    for prefix, length in (("", query_length), ("target_", target_length)):
        batch[f"{prefix}input_ids"] = torch.ones(rows, length, dtype=torch.long)
        batch[f"{prefix}attention_mask"] = torch.ones(rows, length, dtype=torch.long)
        batch[f"{prefix}attention_mask"][-1:, -1:] = 0
    return batch


def make_ready(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace `frames`, where a batch has them, by pixels of the size that the model reads."""
    if "frames" not in batch:
        return batch
    batch = dict(batch)
    return batch | {"pixel_values_videos": batch.pop("frames").float()}


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> None:
    """Compute embeddings, loss and gradients of a batch, as a step of `VLJEPATrainer` does."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    outputs = convert_outputs_to_fp32(autocast(model.__call__))(**make_ready(batch))
    embeds = Embeds(outputs.predicted_embeds, outputs.target_embeds, outputs.logit_scale)
    indices = torch.arange(len(outputs.predicted_embeds))
    ids = Ids(target_index=indices, target_ids=indices, group_ids=indices)
    Objective()(embeds, ids)[0].backward()


def to_fp32(_: nn.LayerNorm, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].float(),)


def model_to_train(config: VLJEPAConfig, setting: Setting, bf16: bool) -> nn.Module:
    """Build a new model for this setting on the default device, as `training.train` does."""
    args = VLJEPATrainingArguments(
        output_dir="unused",
        max_steps=1,
        global_batch_size=1,
        precision="bf16" if bf16 else "fp32",
        use_cpu=True,
    )
    config = copy.deepcopy(config)
    config.update(setting.changes)
    model = VLJEPAModel(config).float()
    # As on a GPU. The CPU, which this counts on, would store the scores of short sequences.
    model.set_attn_implementation("sdpa")
    check_objective(model, args)
    model = prepare_for_training(model, setting.lora, args).train()
    if setting.checkpointing:
        model.activation_checkpointing_enable()
    # On CUDA autocast runs layer norms in fp32; CPU autocast, which runs here, does not.
    for module in model.modules():
        if bf16 and isinstance(module, nn.LayerNorm) and module.weight.requires_grad:
            module.register_forward_pre_hook(to_fp32)
    return model


def measure(
    config: VLJEPAConfig,
    setting: Setting,
    frames: int,
    lengths: tuple[int, int],
    *,
    rows: Iterable[int] = MEASURED_ROWS,
    bf16: bool = True,
) -> Need:
    """Measure the memory of training.

    Args:
        frames: frames of every video.
        lengths: tokens of the queries, and tokens of the targets.
        rows: numbers of rows of the steps that are run.
    """
    with torch.device("meta"):
        model = model_to_train(config, setting, bf16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Not `model.to_empty`: adapters register some modules twice, and it would empty them twice.
        for module in model.modules():
            module.to_empty(device="cpu", recurse=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        weights = [*model.parameters(), *model.buffers()]
        gradients = [p.grad for p in trained]
        sizes = [sum(t.nbytes for t in tensors) for tensors in (weights, gradients)]
        need = Need(*sizes, sum(p.numel() for p in trained))
        for size in rows:
            with HeldByFakes() as memory:
                memory.count([weights, gradients])
                training_step(model, random_batch(config, size, frames, *lengths), bf16)
            need.steps[size] = memory.peak - sum(sizes)
    return need


def waiting_row(
    config: VLJEPAConfig, frames: int, lengths: tuple[int, int], bf16: bool = True
) -> tuple[int, int]:
    """Return the bytes of a row that waits in GradCache, in main memory and on the device.

    Main memory holds its part of the batch and the visual tokens of a frozen X-Encoder. The device
    holds the gradients of its two embeddings `(D,)`.
    """
    with torch.device("meta"):
        batch = random_batch(config, 1, frames, *lengths)
        vision = XEncoder(
            config.vision_config,
            frozen=True,
            pooling=config.visual_token_pooling,
            concatenate_class=config.concatenate_class_token,
        )
        tokens = vision(batch["frames"].float()).numel()
    waits = sum(tensor.nbytes for tensor in batch.values())
    if config.freeze_vision:
        waits += tokens * (2 if bf16 else 4)
    return waits, 2 * 4 * config.embedding_dim


def table_line(
    setting: Setting, frames: int, need: Need, cards: Iterable[int], reserve_gib: float
) -> list[str]:
    """Return the cells of a line of the table.

    Args:
        cards: memory of each card, in GB.
        reserve_gib: part of each card's memory that is set aside, in GiB.
    """
    fixed = " / ".join(f"{need.fixed(states) / 2**30:.1f}" for states in STATE_BYTES)
    cells = [setting.name, str(frames), fixed, f"{need.row / 2**20:.0f}"]
    for card in cards:
        room = card * 10**9 - reserve_gib * 2**30
        most = [need.most_rows(room, states) for states in STATE_BYTES]
        cells.append(" / ".join(str(rows or "-") for rows in most))
    return cells


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="training.memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", help="folder or Hub id of a VL-JEPA; default: the paper's model")
    add("--frames", type=int, nargs="+", default=[1, 8, 32], help="frames of a video")
    add("--query-length", type=int, default=32, help="tokens of the longest query of a batch")
    add("--target-length", type=int, default=64, help="tokens of the longest target of a batch")
    add("--cards", type=int, nargs="+", default=[16, 24, 80, 141], help="memory of cards, in GB")
    add("--reserve-gib", type=float, default=1.5, help="memory set aside for what is not counted")
    args = parser.parse_args(argv)
    if min(*args.frames, args.target_length, args.query_length) < 1:
        raise RecipeError("--frames, --query-length, --target-length: give 1 or more.")

    # 1. The model's configuration
    config, lengths = VLJEPAConfig(), (args.query_length, args.target_length)
    if args.config is not None:
        config = load(VLJEPAConfig, "--config", args.config)

    # 2. Steps of every setting, on all cores, and the rows that fit
    header = ["trains", "frames", "fixed, GiB", "a row, MiB"]
    rows = [header + [f"{card} GB" for card in args.cards]]
    jobs = list(product(SETTINGS, args.frames))
    with ProcessPoolExecutor(
        min(8, os.cpu_count() or 1),
        mp_context=get_context("spawn"),
        initializer=logging.set_verbosity_error,
    ) as pool:
        needs = pool.map(measure, repeat(config), *zip(*jobs, strict=True), repeat(lengths))
        for (setting, frames), need in zip(jobs, tqdm(needs, total=len(jobs)), strict=True):
            rows.append(table_line(setting, frames, need, args.cards, args.reserve_gib))
    print(markdown(rows))
    waiting = {n: waiting_row(config, n, lengths) for n in args.frames}
    in_main = ", ".join(f"{size / 2**20:.1f} at {n}" for n, (size, _) in waiting.items())
    _, on_card = waiting[args.frames[0]]  # the same for all: it has no frames
    print(f"\nA row that waits in GradCache, KiB on the card: {on_card / 2**10:.0f}")
    print(f"A row that waits in GradCache, MiB of main memory, by frames: {in_main}")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
