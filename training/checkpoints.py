"""Checkpoints that are whole or not there, and which of them to go on with."""

import os
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)

from .arguments import RecipeError, VLJEPATrainingArguments

INCOMPLETE = "incomplete-checkpoint"  # no name that a search for checkpoints would find
STATE = "trainer_state.json"


def sync(folder: Path) -> None:
    """Have everything below a folder on the disk, and not only on its way there."""
    for path in [*folder.rglob("*"), folder]:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def checkpoint_to_resume(args: VLJEPATrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` means; `None` to start from the beginning.

    Raises:
        RecipeError: it names a folder that is no complete checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is True or wanted == "true":
        return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if wanted in (None, False, "false"):
        return None
    if not Path(wanted, STATE).is_file() or Path(wanted).name == INCOMPLETE:
        raise RecipeError(
            f"training.resume_from_checkpoint: {wanted} is no complete checkpoint. Give one of "
            f"the folders {PREFIX_CHECKPOINT_DIR}-STEP of a run, or true for the last of "
            "training.output_dir."
        )
    return wanted


class AtomicCheckpoints(Trainer):
    """A Trainer that writes a checkpoint under another name, and renames it when every process has
    written its part: a run that is killed leaves no half of one where it would be looked for.

    Raises:
        RecipeError: the processes do not share a disk.
    """

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        written = run / INCOMPLETE
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)  # of a run that was killed
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

        # 3. All of it at once
        self.accelerator.wait_for_everyone()
        if not (written / STATE).is_file():
            raise RecipeError(
                f"training.output_dir: {run} is another folder here than for the first process, "
                "which alone writes the weights. Give one on a disk that all nodes share."
            )
        if self.args.should_save:
            sync(written)
            shutil.rmtree(final, ignore_errors=True)  # of a run that was taken up before it
            written.rename(final)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()


__all__ = ["AtomicCheckpoints", "checkpoint_to_resume"]
