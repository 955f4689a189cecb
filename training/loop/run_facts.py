"""Time and hardware of a training, for the model card."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from processing.output import writing
from training.hub.training_facts import RUNS, read_runs


def device_name(device: torch.device) -> str:
    """Return the name of a processor or accelerator, such as "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    # `platform.processor()` is empty or only the architecture on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"


class RunFacts(TrainerCallback, ExportableState):
    """Writer of `training_runs.json`: an entry for each run that led to the model.

    The runs of earlier stages come first. A resumed training adds an entry, and the entry of the
    run before it ends at the checkpoint. An entry has these keys:

    - `stage`: the name of `output_dir`
    - `first_step`, `last_step`: the steps that the run made, the first of them from 1
    - `seconds`: wall time of these steps, with the evaluations and checkpoints between them
    - `cpu_seconds`: processor time of the first process in the same steps, over all threads
    - `trainable_parameters`: number of parameters that train
    - `device`, `processes`, `precision`: what it ran on

    Args:
        checkpoint: the recipe's `model.checkpoint`, whose runs came before this one.
    """

    def __init__(self, checkpoint: str | None = None):
        self.checkpoint = checkpoint
        self.runs: list[dict[str, Any]] = []
        self.current: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return the runs so far, which checkpoints store in `trainer_state.json`."""
        return {"args": {"checkpoint": self.checkpoint}, "attributes": {"runs": self.all_runs()}}

    def all_runs(self) -> list[dict[str, Any]]:
        """Return the earlier runs and this one up to the present step, if it made one."""
        if self.current is None or self.trainer_state.global_step < self.current["first_step"]:
            return self.runs
        made = {
            "last_step": self.trainer_state.global_step,
            "seconds": round(time.monotonic() - self.start, 1),
            "cpu_seconds": round(time.process_time() - self.cpu_start, 3),
        }
        return [*self.runs, self.current | made]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs,
    ) -> None:
        # A new state has no runs, and neither has one of a run without this callback.
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.runs = saved["attributes"]["runs"] if saved else []
        if not self.runs and self.checkpoint is not None:
            self.runs = read_runs(self.checkpoint)
        self.trainer_state, self.start = state, time.monotonic()
        self.cpu_start = time.process_time()
        self.current = {
            "stage": Path(args.output_dir).name,
            "first_step": state.global_step + 1,
            "device": device_name(args.device),
            "processes": args.world_size,
            "precision": "bf16" if args.bf16 else "fp32",
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, RUNS)
        with writing(path):
            text = json.dumps(self.all_runs(), indent=2)
            path.write_text(text + "\n", encoding="utf-8")


__all__ = ["RunFacts", "device_name"]
