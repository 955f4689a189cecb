"""Checkpoints that are whole or not there, and which of them to go on with."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)

from training.arguments import RecipeError, SourceArguments, VLJEPATrainingArguments
from training.data.mixture import Positions

# No names that a search for checkpoints would find.
INCOMPLETE = "incomplete-checkpoint"
REPLACED = "replaced-checkpoint"
STATE = "trainer_state.json"
POSITIONS = "positions_{}.json"  # of each process
# What a run goes on from, and the files that hold it: those of the Trainer, of peft, or of
# accelerate where FSDP spreads a model. Without some of them the Trainer would start anew.
PARTS = {
    "state": (STATE,),
    "weights": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp*"),
    "optimizer's state": ("optimizer.*", "optimizer_*"),
    "schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "place in the data": (POSITIONS.format("*"),),
}


def sync(folder: Path) -> None:
    """Have everything below a folder on the disk, and not only on its way there."""
    for path in [*folder.rglob("*"), folder]:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def fault_of(folder: Path) -> str | None:
    """Why a training cannot go on from this folder as if it had never stopped, or `None`."""
    if folder.name in (INCOMPLETE, REPLACED):
        return "its name says that it is not whole"
    for part, patterns in PARTS.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"it lacks the run's {part} ({' or '.join(patterns)})"
    for path in folder.glob("*.safetensors"):
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            return f"{path.name} is broken: {error}"
    return None


def checkpoint_to_resume(args: VLJEPATrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` means; `None` to start from the beginning.

    Raises:
        RecipeError: it means a folder that is no complete checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, False):
        return None
    cure = (
        f"Give one of the folders {PREFIX_CHECKPOINT_DIR}-STEP of a run, or true for the last of "
        "training.output_dir"
    )
    if wanted is True:
        wanted = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        cure = "Remove this folder to go on from the one before"
    if wanted is not None and (fault := fault_of(Path(wanted))):
        raise RecipeError(
            f"training.resume_from_checkpoint: {wanted} is no complete checkpoint: {fault}. "
            f"{cure}; or begin a new run with its weights: model.checkpoint."
        )
    return wanted


# -- places in the data --------------------------------------------------------------------


def reading(sources: list[SourceArguments]) -> list[dict]:
    """How each source is read. A place in a streamed one means other rows where it differs."""
    return [
        {
            "streaming": source.streaming,
            "shuffle_rows": source.shuffle_rows if source.streaming else None,
        }
        for source in sources
    ]


def write_positions(path: Path, positions: Positions, **others: list | int) -> None:
    path.write_text(json.dumps({"positions": positions, **others}))


def read_positions(
    folder: Path, *, lanes: int, sources: list[dict], is_first: bool
) -> tuple[Positions, list[int], list[int]]:
    """Where a checkpoint's run was in each lane, of all its processes, and what it had counted,
    which the first process of this one goes on with.

    Args:
        lanes, sources: of this run; the latter as `reading` says.

    Raises:
        RecipeError: the checkpoint's run read its sources in another way.
    """
    positions: Positions = {}
    seen, bad = [0] * len(sources), [0] * len(sources)
    for path in sorted(folder.glob(POSITIONS.format("*"))):
        content = json.loads(path.read_text())
        check_reading(folder, content, lanes, sources)
        for bucket, places in content["positions"].items():
            positions.setdefault(int(bucket), {}).update(
                {int(lane): position for lane, position in places.items()}
            )
        if is_first:
            seen = [a + b for a, b in zip(seen, content["seen"], strict=True)]
            bad = [a + b for a, b in zip(bad, content["bad"], strict=True)]
    if any(len(places) != lanes for places in positions.values()):
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} lacks {POSITIONS.format('N')} of some of "
            "the processes that wrote it. Copy all of it, or give another checkpoint."
        )
    return positions, seen, bad


def check_reading(folder: Path, content: dict, lanes: int, sources: list[dict]) -> None:
    """Stop where a checkpoint's places mean other rows: some would be read twice, others never."""
    if len(content["sources"]) != len(sources):
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} was trained on {len(content['sources'])} "
            f"sources, and the recipe has {len(sources)}. Resume with the recipe it was started "
            "with, or start from its weights: model.checkpoint."
        )
    for number, (before, now) in enumerate(zip(content["sources"], sources, strict=True)):
        for name, value in before.items():
            if now[name] != value:
                raise RecipeError(
                    f"data.sources[{number}].{name}: {folder} was trained with {value}, and its "
                    f"places mean other rows with {now[name]}. Set it to {value} to resume."
                )
    if content["lanes"] != lanes and any(source["streaming"] for source in sources):
        raise RecipeError(
            f"data.lanes: {folder} was trained with {content['lanes']} lanes, and its places mean "
            f"other rows in {lanes}. Set data.lanes to {content['lanes']} to resume, on a number "
            "of processes that divides it."
        )


class AtomicCheckpoints(Trainer):
    """A Trainer that writes a checkpoint under another name, and renames it when every process has
    written its part: a run that is killed leaves no half of one where it would be looked for.

    Raises:
        RecipeError: the processes do not share a disk.
    """

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        written, replaced = run / INCOMPLETE, run / REPLACED
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            for leftover in (written, replaced):  # of a run that was killed
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

        # 3. All of it at once
        self.accelerator.wait_for_everyone()
        if not (written / STATE).is_file():
            raise RecipeError(
                f"training.output_dir: {run} is another folder here than for the first process, "
                "which alone writes the weights. Give one on a disk that all nodes share."
            )
        if self.args.should_save:
            sync(written)
            if final.is_dir():  # of a run that was taken up before it
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


__all__ = [
    "AtomicCheckpoints",
    "checkpoint_to_resume",
    "read_positions",
    "reading",
    "write_positions",
]
