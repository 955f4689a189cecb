"""What fits on a card: the memory of a training step, found without a card.

    python -m training.memory                                  # the paper's model
    python -m training.memory --config runs/init --frames 8

A step of training runs on tensors of torch's FakeTensorMode, which have shapes and no memory, and
every storage that is made or dropped is counted.

| counted     | as                                                                            |
|-------------|-------------------------------------------------------------------------------|
| weights     | fp32; bf16 where `prepare_for_training` stores frozen ones so                 |
| gradients   | fp32, there from the start, as in all parts but the first of GradCache        |
| AdamW       | two states of fp32, or of 8 bits with an fp32 scale for every 256             |
| activations | the most that a step holds, its batch and autocast's bf16 weights among it    |

Texts of a batch differ in length, so that there are attention masks, and no two rows share a
target. Attention is torch's fused one; where a GPU has none for a shape, its plain one holds a
matrix of scores. Layer norms that train compute in fp32, as autocast has it on CUDA alone.

Not counted: the CUDA context, fragmentation and the workspace of kernels, for which
`--reserve-gib` is left; the buckets of data parallelism, as large as the gradients. A GB is 10^9
bytes, a little less than most cards named by it have; a GiB is 2^30.

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
from modeling_vljepa.x_encoder import XEncoder
from training.arguments import RecipeError, VLJEPATrainingArguments
from training.loop.objective import Embeds, Ids, Objective, check_objective
from training.model.adapters import prepare_for_training
from training.model.checkpoint_files import load

# Rows of the steps that are run. Memory bends where another moment of the step becomes its peak,
# always upwards: a line between two of these is never too low.
MEASURED_ROWS = (1, 32, 1024)
STATE_BYTES = {"fp32": 2 * 4.0, "8-bit": 2 * (1 + 4 / 256)}  # of AdamW, for one parameter


@dataclass(frozen=True)
class Setting:
    """What trains: changes to the configuration, adapters, and whether layers run twice."""

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
    """The bytes of the tensors made inside it: `held` now, and `peak`, the most at a time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, tensors: Any) -> None:
        """Take up the storages of these tensors, each once and until it is dropped."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self.drop, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)

    def drop(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.held -= size


class HeldByFakes(HeldMemory):
    """Of fake tensors. Where the code asks for values, which these do not have, an id is 1, a mask
    has padding, and no two ids of a batch are equal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # `.item()`, `if tensor:`
            return int(args[0].dtype == torch.long)
        if function is torch.ops.aten.unique_dim.default:
            places = torch.arange(len(args[0]))
            return args[0], places, torch.ones_like(places)
        return super().__torch_dispatch__(function, types, args, kwargs)


@dataclass
class Need:
    """What training takes, in bytes.

    Attributes:
        weights, gradients: of the model.
        trained: how many parameters the optimizer has states of.
        steps: what a step holds beside these, by its number of rows.
    """

    weights: int
    gradients: int
    trained: int
    steps: dict[int, int] = field(default_factory=dict)

    def fixed(self, states: str) -> float:
        """Weights, gradients and AdamW's states, whatever the number of rows."""
        return self.weights + self.gradients + self.trained * STATE_BYTES[states]

    @property
    def row(self) -> float:
        """What one more row takes where there are many."""
        (rows, held), (more_rows, more_held) = list(self.steps.items())[-2:]
        return (more_held - held) / (more_rows - rows)

    def most_rows(self, room: float, states: str) -> int:
        """How many rows a step can have in so many bytes; 0 where there is no room for one."""
        rows, held = list(self.steps), list(self.steps.values())
        rows, held = [*rows, rows[-1] + 1e6], [*held, held[-1] + 1e6 * self.row]
        return int(np.interp(room - self.fixed(states), held, rows, left=0))


def random_batch(
    config: VLJEPAConfig, rows: int, frames: int, query_length: int, target_length: int
) -> dict[str, torch.Tensor]:
    """`frames` `(B, T, C, H, W)`, uint8, `input_ids` `(B, L)`, `target_input_ids` `(B, Ly)`, and
    their masks, in which the last row is shorter."""
    vision = config.vision_config
    is_video = vision.model_type == "vjepa2"
    channels = vision.in_chans if is_video else vision.num_channels
    side = vision.crop_size if is_video else vision.image_size
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
    """Embeddings, loss and gradients of a batch, as in a step of `VLJEPATrainer`."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    outputs = convert_outputs_to_fp32(autocast(model.__call__))(**make_ready(batch))
    embeds = Embeds(outputs.predicted_embeds, outputs.target_embeds, outputs.logit_scale)
    places = torch.arange(len(outputs.predicted_embeds))
    ids = Ids(target_index=places, target_ids=places, group_ids=places)
    Objective()(embeds, ids)[0].backward()


def to_fp32(_: nn.LayerNorm, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].float(),)


def model_to_train(config: VLJEPAConfig, setting: Setting, bf16: bool) -> nn.Module:
    """The model of a recipe with this setting, new, on the default device."""
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
    check_objective(model, args)
    model = prepare_for_training(model, setting.lora, args).train()
    if setting.checkpointing:
        model.activation_checkpointing_enable()
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
    """What training takes.

    Args:
        frames: of every video.
        lengths: tokens of the queries and of the targets.
        rows: of the steps that are run.
    """
    with torch.device("meta"):
        model = model_to_train(config, setting, bf16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():  # each once: beside adapters some stand at two places
            module.to_empty(device="cpu", recurse=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        weights = [*model.parameters(), *model.buffers()]
        gradients = [p.grad for p in trained]
        sizes = [sum(tensor.nbytes for tensor in some) for some in (weights, gradients)]
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
    """Bytes of a row that waits in GradCache while others are worked on, beside the device and on
    it: its part of the batch and the tokens of a frozen X-Encoder; the gradients at its two
    embeddings `(D,)`."""
    with torch.device("meta"):
        batch = random_batch(config, 1, frames, *lengths)
        vision = XEncoder(config.vision_config, frozen=True)
        tokens = vision(batch["frames"].float()).numel()
    waits = sum(tensor.nbytes for tensor in batch.values())
    if config.freeze_vision:
        waits += tokens * (2 if bf16 else 4)
    return waits, 2 * 4 * config.embedding_dim


def table_line(
    setting: Setting, frames: int, need: Need, cards: Iterable[int], reserve_gib: float
) -> list[str]:
    """The cells of a line; `cards` are in GB."""
    fixed = " / ".join(f"{need.fixed(states) / 2**30:.1f}" for states in STATE_BYTES)
    cells = [setting.name, str(frames), fixed, f"{need.row / 2**20:.0f}"]
    for card in cards:
        room = card * 10**9 - reserve_gib * 2**30
        most = [need.most_rows(room, states) for states in STATE_BYTES]
        cells.append(" / ".join(str(rows or "-") for rows in most))
    return cells


def markdown(rows: list[list[str]]) -> str:
    """A table of cells, the first row its header, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="training.memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", help="folder or Hub id of a VL-JEPA; default: the paper's model")
    add("--frames", type=int, nargs="+", default=[1, 8, 32], help="of a video")
    add("--query-length", type=int, default=32, help="tokens of the longest query of a batch")
    add("--target-length", type=int, default=64, help="tokens of the longest target of a batch")
    add("--cards", type=int, nargs="+", default=[16, 24, 80, 141], help="memory of cards, in GB")
    add("--reserve-gib", type=float, default=1.5, help="of a card, for what is not counted")
    args = parser.parse_args(argv)
    if min(*args.frames, args.target_length, args.query_length) < 1:
        raise RecipeError("--frames, --query-length, --target-length: give 1 or more.")

    # 1. The model's configuration
    config, lengths = VLJEPAConfig(), (args.query_length, args.target_length)
    if args.config is not None:
        config = load(VLJEPAConfig, "--config", args.config)

    # 2. Some steps of every setting, on all cores, and what fits
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
    beside = ", ".join(f"{size / 2**20:.1f} at {n}" for n, (size, _) in waiting.items())
    _, on_it = waiting[args.frames[0]]
    print(f"\nKiB on the card of a row that waits in GradCache: {on_it / 2**10:.0f}")
    print(f"MiB beside it, in the machine's memory, by frames: {beside}")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
