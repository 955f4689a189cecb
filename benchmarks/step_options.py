"""Gain of options of a training step: `python -m benchmarks.step_options`.

Each case takes steps without the option and with it, alternately, and compares the minima of
CPU-seconds.

| case            | without / with                                                         |
|-----------------|------------------------------------------------------------------------|
| lengths         | random batches / `group_by_length`; queries of 3 to 120 words          |
| distinct texts  | each of 64 texts encoded / equal ones once; as equal as in the demo    |
| shared clips    | X-Encoder once for a question / once for a clip with four              |
| compile         | `torch.compile` of the demo's model, for batches of one shape          |
| malloc          | glibc's thresholds / those of the Makefile, which keep freed memory    |
| features        | live / features from the store, against the ratio of operations        |
| pooled features | live, not pooled / from the store, pooled 2 x 2; adapters, 8 frames    |
"""

import argparse
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import yaml
from torch import nn

from benchmarks import features
from benchmarks.against import HERE, PacedSteps, alternate
from benchmarks.configs import MID, SMALL
from benchmarks.plain import Batch, to_pixels
from benchmarks.report import Goal, Report, add_arguments, chosen
from benchmarks.synthetic import Texts, write_clips, write_demo
from benchmarks.train_step import Run, batches_of, start
from training.loop.objective import Embeds, Ids, Objective
from training.loop.trainer import take_ids

WITHOUT, WITH, GAIN = "without, CPU-s", "with, CPU-s", "gain"


def step(model: nn.Module, batch: Batch, run: Run) -> None:
    """Compute the gradient of a collated batch as the trainer does; no optimizer."""
    batch = dict(batch)
    ids = Ids(**take_ids(batch))
    if "frames" in batch:
        video = run.processor.video_processor
        batch["pixel_values_videos"] = to_pixels(batch.pop("frames"), video)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.recipe.training.bf16):
        outputs = model(**batch)
    embeds = Embeds(outputs.predicted_embeds, outputs.target_embeds, outputs.logit_scale)
    Objective()(embeds, ids)[0].backward()
    model.zero_grad()


def least(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least CPU-seconds of each call; the calls alternate."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            since = time.process_time()
            call()
            best[index] = min(best[index], time.process_time() - since)
    return best


def reported(report: Report, case: str, without: float, with_it: float, note: str = "") -> None:
    numbers = {WITHOUT: without, WITH: with_it, GAIN: without / with_it}
    report.add(case, numbers, note=note)


def started(path: Path) -> Run:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return start(path)


def change_source(path: Path, **changes: object) -> Path:
    """Write a recipe next to another, with changes of its source; return its path."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"]["sources"][0] |= changes
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return changed


def questions(words: Sequence[int]) -> list[tuple[str, str]]:
    """Return rows whose queries have these numbers of words."""
    texts, rows = Texts(), []
    for count in words:
        query = " ".join(texts.question()[0] for _ in range(-(-count // 5)))
        rows.append((" ".join(query.split()[:count]), texts.narration()))
    return rows


def lengths(report: Report, folder: Path, quick: bool) -> None:
    """Measure batches of similar lengths against random ones: all batches of an epoch."""
    rows = 8 if quick else 32
    # Log-normal, as lengths of texts are: most queries are short, few are long.
    drawn = torch.randn(8 * rows, generator=torch.Generator().manual_seed(0))
    words = (12 * drawn.mul(0.8).exp()).clamp(3, 120).int().tolist()
    path = write_clips(
        *(folder, SMALL), rows=rows, frames=2, side=64, texts=questions(words), max_steps=8
    )
    run = started(path)
    grouped = started(change_source(path, group_by_length=True))
    batches = [list(batches_of(each)) for each in (run, grouped)]
    model = run.trainer.model.train()
    calls = [lambda each=each: [step(model, batch, run) for batch in each] for each in batches]
    reported(report, "lengths", *least(calls, 1 if quick else 3))


def distinct_texts(report: Report, folder: Path, quick: bool) -> None:
    rows = 8 if quick else 64
    texts = Texts()
    path = write_clips(
        *(folder, SMALL),
        **{"rows": rows, "frames": 2, "side": 64, "max_steps": 1},
        texts=[texts.question() for _ in range(16 * rows)],
    )
    run = started(path)
    batch = next(batches_of(run))
    every = dict(batch)
    for name in ("target_input_ids", "target_attention_mask"):
        if name in batch:
            every[name] = batch[name][batch["target_index"]]
    every["target_index"] = torch.arange(rows)
    model = run.trainer.model.train()
    calls = [lambda each=each: step(model, each, run) for each in (every, batch)]
    count = len(batch["target_input_ids"])
    note = f"{count} of {rows} texts are distinct"
    reported(report, "distinct texts", *least(calls, 2 if quick else 6), note)


def shared_clips(report: Report, folder: Path, quick: bool) -> None:
    rows, config, side = (4, SMALL, 64) if quick else (8, MID, 256)
    path = write_clips(folder, config, rows=rows, frames=2, side=side, max_steps=1)
    run = started(path)
    apart = next(batches_of(run))
    index = torch.arange(rows) // 4
    shared = apart | {"frames": apart["frames"][: rows // 4], "visual_index": index}
    apart = apart | {"frames": shared["frames"][index]}
    model = run.trainer.model.train()
    calls = [lambda each=each: step(model, each, run) for each in (apart, shared)]
    reported(report, "shared clips", *least(calls, 1 if quick else 3), "4 questions about a clip")


def compiled(report: Report, folder: Path, quick: bool) -> None:
    compiler = os.environ.get("CXX", "g++")
    if quick or shutil.which(compiler) is None:
        why = "compiling takes a minute" if quick else f"there is no C++ compiler ({compiler})"
        report.add("compile", {}, note=f"not measured: {why}")
        return
    rows = 64
    path = write_clips(folder, SMALL, rows=rows, frames=4, side=64, max_steps=1)
    run = started(path)
    batch = next(batches_of(run))
    model = run.trainer.model.train()
    since = time.process_time()
    fast = torch.compile(model)
    step(fast, batch, run)
    note = f"compiling took {time.process_time() - since:.0f} CPU-s of this process"
    calls = [lambda each=each: step(each, batch, run) for each in (model, fast)]
    reported(report, "compile", *least(calls, 6), note)
    torch.compiler.reset()


# As in the Makefile.
KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**33))


def malloc(report: Report, folder: Path, quick: bool) -> None:
    if quick:
        report.add("malloc", {}, note="not measured: it starts processes")
        return
    recipe = write_demo(folder, max_steps=24)
    defaults = dict.fromkeys(KEEP_MEMORY)  # removes those that make has exported
    both = {}
    try:
        for name, environment in ((WITHOUT, defaults), (WITH, KEEP_MEMORY)):
            both[name] = PacedSteps(HERE, recipe, folder / name, environment)
        seconds = alternate(both, dict.fromkeys(both, recipe), 24)
    finally:
        for paced in both.values():
            paced.close()
    reported(report, "malloc", seconds[WITHOUT], seconds[WITH], "the demo's steps")


def from_store(report: Report, folder: Path, quick: bool) -> None:
    """Measure steps from the feature store; nothing is written to `folder`."""
    config, frames = ("small", 2) if quick else ("mid", 8)
    for trains in ("LoRA", "full"):
        for bf16 in (False,) if quick else (False, True):
            case = f"features, {trains}, {'bf16' if bf16 else 'fp32'}"
            report.start(case)
            live, stored, allowed = features.compare(
                config, trains, ["step"], 2, frames, 1 if quick else 3, bf16, 1
            )["step"]
            numbers = {
                WITHOUT: live,
                WITH: stored,
                GAIN: live / stored,
                "in operations": allowed,
                "share": live / stored / allowed,
            }
            report.add(case, numbers, Goal("share", least=0.95))


def pooled_features(report: Report, folder: Path, quick: bool) -> None:
    config, frames = ("small", 2) if quick else ("mid", 8)
    for bf16 in (False,) if quick else (False, True):
        case = f"pooled features, LoRA, {'bf16' if bf16 else 'fp32'}"
        report.start(case)
        live, stored, allowed = features.compare(
            config, "LoRA", ["step"], 2, frames, 1 if quick else 3, bf16, 2
        )["step"]
        numbers = {WITHOUT: live, WITH: stored, GAIN: live / stored, "in operations": allowed}
        report.add(case, numbers, Goal(GAIN, least=3))


CASES = {
    "lengths": lengths,
    "distinct texts": distinct_texts,
    "shared clips": shared_clips,
    "compile": compiled,
    "malloc": malloc,
    "features": from_store,
    "pooled features": pooled_features,
}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and return the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_options", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases = chosen(CASES, args.only, parser)
    report = Report("step_options", args.output, args.quick)
    for name, case in cases.items():
        report.start(name)
        with tempfile.TemporaryDirectory() as folder:
            case(report, Path(folder), args.quick)
    return report.close()


if __name__ == "__main__":
    main()
