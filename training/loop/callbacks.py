"""What a person sees while it trains."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# What a line of the log shows, where it is known.
FIELDS = {
    "accuracy": "in-batch acc {:.3f}",
    "logit_scale": "scale {:5.1f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "grad {:5.2f}",
    "samples_per_second": "{:5.0f} samples/s",
    "mfu": "mfu {:.2f}",
    "peak_memory_gib": "{:.1f} GiB",
}
COLLAPSED_SPREAD = 0.01
AT_CHANCE = 0.99
PATIENCE = 5


class ProgressLine(TrainerCallback):
    """step/total (%) · loss (chance) · in-batch accuracy · scale · lr · grad norm · rate · share
    of the possible rate · peak memory · eta; and a line for each score of an evaluation."""

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
    """Says so when the embeddings of a side are one point, or the loss stays what a model that
    knows nothing gets, for five lines of the log after warm-up."""

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
            signs.append("the loss is that of a model which knows nothing")
        self.lines = self.lines + 1 if signs else 0
        if self.lines == PATIENCE and state.is_world_process_zero:
            print(
                f"WARNING: collapse: {' and '.join(signs)}, since {PATIENCE} lines. A pretrained "
                "Y-Encoder wants text_learning_rate_scale 0.05; a lower learning_rate, a longer "
                "warm-up or a frozen Y-Encoder help.",
                flush=True,
            )


__all__ = ["CollapseWarning", "ProgressLine"]
