"""What a person sees while it trains: one line with fixed fields."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """step/total (%) · loss (chance) · in-batch accuracy · scale · lr · grad norm · rate · eta."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs,
    ) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        seconds = (time.monotonic() - self.start) / (state.global_step - self.first_step)
        eta = round(seconds * (state.max_steps - state.global_step))
        print(
            f"step {state.global_step:>5}/{state.max_steps} "
            f"({100 * state.global_step / state.max_steps:3.0f}%)"
            f" · loss {logs['loss']:.3f} (chance {logs['chance_loss']:.3f})"
            f" · in-batch acc {logs['accuracy']:.3f}"
            f" · scale {logs['logit_scale']:5.1f}"
            f" · lr {logs['learning_rate']:.1e}"
            f" · grad {logs['grad_norm']:5.2f}"
            f" · {args.global_batch_size / seconds:5.0f} samples/s"
            f" · eta {eta // 60}:{eta % 60:02d}",
            flush=True,
        )
