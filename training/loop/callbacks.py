"""Log lines of a training: progress, scores, and a warning of collapse."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Fields of a progress line after the loss; fields without a value are left out.
FIELDS = {
    "accuracy": "in-batch acc {:.3f}",
    "logit_scale": "scale {:5.1f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "grad {:5.2f}",
    "samples_per_second": "{:5.0f} samples/s",
    "mfu": "mfu {:.2f}",
    "peak_memory_gib": "{:.1f} GiB",
}
COLLAPSED_SPREAD = 0.01  # variance of a side's embeddings; 1 if they are evenly spread
AT_CHANCE = 0.99  # share of the chance loss
PATIENCE = 5  # lines of the log


class ProgressLine(TrainerCallback):
    """Progress line, and a line for each score of an evaluation.

    Its fields: step/total (%) · loss (chance loss) · in-batch accuracy · scale · learning rate ·
    gradient norm · samples/s · mfu · peak memory · eta.
    """

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
        # From this run's own steps: a resumed run begins at `first_step`, not at 0.
        seconds = (time.monotonic() - self.start) / (state.global_step - self.first_step)
        eta = round(seconds * (state.max_steps - state.global_step))
        chance = f" (chance {logs['chance_loss']:.3f})" if "chance_loss" in logs else ""
        shown = [text.format(logs[name]) for name, text in FIELDS.items() if name in logs]
        print(
            f"step {state.global_step:>5}/{state.max_steps} "
            f"({100 * state.global_step / state.max_steps:3.0f}%)",
            f"loss {logs['loss']:.3f}{chance}",
            *shown,
            f"eta {eta // 60}:{eta % 60:02d}",
            sep=" · ",
            flush=True,
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs,
    ) -> None:
        if state.is_world_process_zero:
            for name, score in metrics.items():
                if f"{name}_chance" in metrics:
                    chance = metrics[f"{name}_chance"]
                    print(f"  {name} {score:.3f} (chance {chance:.3f})", flush=True)


class CollapseWarning(TrainerCallback):
    """Warning of a collapse: for `PATIENCE` log lines after warm-up, the embeddings of a side are
    one point or the loss is the chance loss."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.lines = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs,
    ) -> None:
        warmup_steps = args.get_warmup_steps(state.max_steps)
        if "loss" not in logs or state.global_step <= warmup_steps:
            return
        sides = [s for s in ("predicted", "target") if logs[f"{s}_spread"] < COLLAPSED_SPREAD]
        signs = [f"{side} embeddings are one point" for side in sides]
        if logs["loss"] > AT_CHANCE * logs.get("chance_loss", float("inf")):
            signs.append("the loss is the chance loss")
        self.lines = self.lines + 1 if signs else 0
        if self.lines == PATIENCE and state.is_world_process_zero:  # `==`: once, not at every line
            print(
                f"WARNING: collapse: {' and '.join(signs)}, for {PATIENCE} lines. Try "
                "training.text_learning_rate_scale=0.05 for a pretrained Y-Encoder, a lower "
                "learning_rate, a longer warm-up or a frozen Y-Encoder.",
                flush=True,
            )


__all__ = ["CollapseWarning", "ProgressLine"]
