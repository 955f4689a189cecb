"""Saving checkpoints completely or not at all, and finding the one to resume from."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)

from processing.output import writing
from training.arguments import RecipeError
from training.data.mixture import Positions
from training.loop.fingerprint import FINGERPRINT, Fingerprint, write_fingerprint
from training.loop.rates import set_rates

# Names that `get_last_checkpoint` does not match.
INCOMPLETE = "incomplete-checkpoint"
REPLACED = "replaced-checkpoint"
STATE = "trainer_state.json"
GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer's group
POSITIONS = "positions_{}.json"  # one for each process
# The parts of a checkpoint and their files, as written by Trainer, by peft, by DeepSpeed, or by
# accelerate for a model sharded by FSDP. If one is missing, Trainer silently starts that part from
# the beginning.
PARTS = {
    "state": (STATE,),
    "weights": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp*"),
    "optimizer's state": ("optimizer.*", "optimizer_*", "global_step*/*optim_states.pt"),
    "schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "place in the data": (POSITIONS.format("*"),),
    "recipe": (FINGERPRINT,),
}


def sync(folder: Path) -> None:
    """Flush a folder and everything in it to the disk.

    Without this a power failure after the renaming could leave a complete name with empty files.
    """
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def fault_of(folder: Path, parts: Iterable[str]) -> str | None:
    """Return why a run cannot resume from this folder, or `None` if it can.

    Args:
        parts: names of the parts that the run needs.
    """
    if folder.name in (INCOMPLETE, REPLACED):
        return "it was being written or deleted when its run stopped"
    for part in parts:
        patterns = PARTS[part]
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"it lacks the run's {part} ({' or '.join(patterns)})"
    for path in folder.glob("*.safetensors"):
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            return f"{path.name} is broken: {error}"
    return None


def checkpoint_to_resume(
    wanted: str | bool | None, output_dir: str, parts: Iterable[str] = tuple(PARTS)
) -> str | None:
    """Return the checkpoint to resume from; `None` to start from the beginning.

    Args:
        wanted: the recipe's `training.resume_from_checkpoint`.
        parts: names of the parts that the run needs.
    Raises:
        RecipeError: the checkpoint is incomplete.
    """
    if wanted in (None, False):
        return None
    cure = f"Give a folder {PREFIX_CHECKPOINT_DIR}-STEP of a run, or true for the last one"
    if wanted is True:
        wanted = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        cure = "Remove this folder to resume from the previous one"
    if wanted is not None and (fault := fault_of(Path(wanted), parts)):
        raise RecipeError(
            f"training.resume_from_checkpoint: {wanted} is not a complete checkpoint: {fault}. "
            f"{cure}, or start a new run from its weights with model.checkpoint."
        )
    return wanted


# -- the place in the data --------------------------------------------------------------------


class Place(NamedTuple):
    """Place in the data at which a checkpoint's run stopped.

    Attributes:
        positions: position of each lane of the streamed sources.
        seen, bad: numbers of read and of unusable rows, by source.
        planned: number of steps for which the order of the sources was drawn at first.
    """

    positions: Positions
    seen: list[int]
    bad: list[int]
    planned: int


def write_place(path: Path, place: Place) -> None:
    """Write a process's place in the data."""
    path.write_text(json.dumps(place._asdict()))


def read_place(folder: Path, *, lanes: int, is_first: bool) -> Place:
    """Return a checkpoint's place in the data, of all its processes.

    Args:
        lanes: the number of lanes of this run.
        is_first: return the counts, summed over the checkpoint's processes. The other processes
            start at 0, because counts are summed over processes again when they are reported.

    Raises:
        RecipeError: a file of one of the processes is missing.
    """
    positions: Positions = {}
    paths = sorted(folder.glob(POSITIONS.format("*")))
    parts = [Place(**json.loads(path.read_text())) for path in paths]
    for part in parts:
        # Each process of that run wrote the lanes it read; JSON keys are text.
        for bucket, lane_positions in part.positions.items():
            positions.setdefault(int(bucket), {}).update(
                {int(lane): position for lane, position in lane_positions.items()}
            )
    if any(len(lane_positions) != lanes for lane_positions in positions.values()):
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} lacks {POSITIONS.format('N')} of some "
            "processes of its run. Copy the whole folder, or give another checkpoint."
        )
    counts = (
        [sum(column) if is_first else 0 for column in zip(*rows, strict=True)]
        for rows in ([part.seen for part in parts], [part.bad for part in parts])
    )
    return Place(positions, *counts, parts[0].planned)


class AtomicCheckpoints(Trainer):
    """Trainer whose checkpoints are complete or absent, and whose recipe counts when it resumes.

    It writes a checkpoint under another name and renames it when every process has written its
    part. A run that is killed in between leaves no incomplete checkpoint under a valid name.

    Args:
        settings: the settings of the run, which each checkpoint contains.
    """

    def __init__(self, *args, settings: Fingerprint, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings

    def _init_training_state(self, max_steps, *args) -> tuple[int, int]:
        done = super()._init_training_state(max_steps, *args)
        # A resumed state has the intervals of the run that wrote it.
        self.state.compute_steps(self.args, max_steps)
        return done

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of the optimizer and the schedule, but not the settings in them.

        Both contain the learning rate, and the optimizer's the weight decay and betas, of the run
        that wrote them. Loaded, they would replace those of the recipe.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        schedule = self.lr_scheduler
        groups = [
            {name: value for name, value in group.items() if name in GROUP_SETTINGS}
            for group in self.optimizer.param_groups
        ]
        rates = list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if rates is None:  # its rate is a state: `compare` has refused another one
            return
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(given)
        schedule.base_lrs = rates
        set_rates(schedule)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint.

        Raises:
            OutputError: the disk is full, or the folder cannot be written to.
            RecipeError: the processes do not share a disk.
        """
        kept = (
            "Earlier checkpoints are kept; training.resume_from_checkpoint=true continues from the "
            "last one."
        )
        with writing(f"training.output_dir: {self.args.output_dir}", kept):
            self.write_checkpoint(trial)

    def write_checkpoint(self, trial) -> None:
        """Write a checkpoint under another name, and rename it when it is complete."""
        run = Path(self._get_output_dir(trial))
        written, replaced = run / INCOMPLETE, run / REPLACED
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            for leftover in (written, replaced):  # from a killed run
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()

        # 1. Model, optimizer, random states
        self.store_flos()
        self.save_model(str(written), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(written))
            self._save_scaler(str(written))
            self._save_rng_state(str(written))

        # 2. The state of the run
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            callbacks = [*self.callback_handler.callbacks, self.control]
            for callback in callbacks:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(written / STATE))
            write_fingerprint(written, self.settings)

        # 3. The valid name, when everything is written. `rename` cannot replace a folder that has
        #    files, so an old checkpoint of this name is first moved away, then deleted.
        self.accelerator.wait_for_everyone()
        if not (written / STATE).is_file():
            raise RecipeError(
                f"training.output_dir: {run} on this node is not the first process's folder, to "
                "which the weights are written. Give a folder on a disk that all nodes share."
            )
        if self.args.should_save:
            sync(written)
            if final.is_dir():  # from a run that was resumed at an earlier step
                final.rename(replaced)
            written.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


__all__ = ["AtomicCheckpoints", "Place", "checkpoint_to_resume", "read_place", "write_place"]
