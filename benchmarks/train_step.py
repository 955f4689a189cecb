"""The trainer's step against a plain loop: `python -m benchmarks.train_step`.

`training.train` builds the trainer, which runs by itself: data loader, collator, forward, backward,
clipping, optimizer, schedule, log. After each of its steps, a plain loop of bare transformers
modules (`plain.py`) takes the same step: with equal weights at the start, the same batch through
the same collator, cross entropy both ways, and torch's fused AdamW. In fp32 the losses of all steps
must agree. The minimum of CPU-seconds over the steps counts, after the first ones. The peak of
memory is that of the last step, beyond weights, optimizer states and everything else in memory.

| case  | model and batch                                                                        |
|-------|----------------------------------------------------------------------------------------|
| demo  | `babyai_sft.yaml`: 64 rows of clips or images of 64 pixels, the mean by source weights |
| mid   | `configs.py`: 2 clips of 4 frames of 256 pixels                                        |
| paper | the paper's widths, half its layers, tables of 32,000 rows: 2 clips of 2 frames        |

`--against FOLDER` compares the demo with that of another checkout, such as one of
`git worktree add FOLDER REVISION` (`against.py`).
"""

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from benchmarks.against import compare_revisions
from benchmarks.configs import MID, SMALL
from benchmarks.measure import Cost, PeakMemory, in_own_process, return_freed_memory
from benchmarks.plain import Batch, PlainLoop, PlainModel
from benchmarks.report import Goal, Report, add_arguments, chosen
from benchmarks.steps import Steps
from benchmarks.synthetic import write_clips, write_demo
from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from processing import VLJEPAProcessor
from training.arguments import Recipe, read_recipe
from training.data.collator import ContrastiveCollator
from training.data.dataset import ContrastiveDataset
from training.data.mixture import MixtureSampler
from training.data.sources import Source, read_source, texts_of
from training.loop.callbacks import CollapseWarning, ProgressLine
from training.loop.run import build_trainer, read_data, run_settings
from training.loop.run_facts import RunFacts
from training.loop.trainer import VLJEPATrainer, default_lanes
from training.model.recipe_model import new_config, new_processor, start_model, train_tokenizer

TOLERANCE = 1e-4  # of the loss of every step, in fp32
VOCABULARY = 32_000
DEMO_STEPS, DEMO_WARM_UP = 28, 4


def half_paper() -> dict:
    """Return `model.config` of the paper's widths with half its layers."""
    config = VLJEPAConfig()
    layers = {
        name: {
            "model_type": sub.model_type,
            "num_hidden_layers": sub.num_hidden_layers // 2,
        }
        for name, sub in (
            ("vision_config", config.vision_config),
            ("predictor_config", config.predictor_config),
            ("text_config", config.text_config),
        )
    }
    given = {name: dict(config.sub_configs_defaults[name].init_kwargs or {}) for name in layers}
    return {name: given[name] | changes for name, changes in layers.items()}


@dataclass(frozen=True)
class Case:
    """A model, its data, and the bound for the trainer's CPU-seconds / those of the plain loop.

    Attributes:
        write: writes data and recipe into a folder.
        steps, warm_up: steps of each loop, and the first ones that do not count.
        vocabulary: rows of the token tables; `None` for those of the tokenizer.
    """

    write: Callable[..., Path]
    most: float
    steps: int
    warm_up: int
    vocabulary: int | None = None


def write_mid(folder: Path, **training) -> Path:
    return write_clips(folder, MID, rows=2, frames=4, side=256, **training)


def write_paper(folder: Path, **training) -> Path:
    return write_clips(folder, half_paper(), rows=2, frames=2, side=256, **training)


CASES = {
    "demo": Case(write_demo, most=1.15, steps=DEMO_STEPS, warm_up=DEMO_WARM_UP),
    "mid": Case(write_mid, most=1.05, steps=7, warm_up=1, vocabulary=VOCABULARY),
    "paper": Case(write_paper, most=1.05, steps=6, warm_up=1, vocabulary=VOCABULARY),
}


def write_quick_demo(folder: Path, **training) -> Path:
    return write_demo(folder, clips=8, **(training | {"global_batch_size": 8}))


def write_quick(folder: Path, **training) -> Path:
    return write_clips(folder, SMALL, rows=4, frames=2, side=64, **training)


# Too small for a goal: they show that the benchmarks run, and compare the losses.
QUICK = {
    "demo": Case(write_quick_demo, most=math.inf, steps=4, warm_up=0),
    "mid": Case(write_quick, most=math.inf, steps=2, warm_up=0),
    "paper": Case(write_quick, most=math.inf, steps=2, warm_up=0, vocabulary=1500),
}


def new_model_of(
    recipe: Recipe, sources: list[Source], vocabulary: int | None
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Build the recipe's model, with token tables of another size if it is given."""
    if vocabulary is None:
        return start_model(recipe, sources)
    tokenizer = train_tokenizer(texts_of(sources), recipe.model.vocab_size)
    processor = new_processor(tokenizer, recipe.processor, None)
    config = new_config(recipe.model, processor, None)
    config.predictor_config.vocab_size = config.text_config.vocab_size = vocabulary
    return VLJEPAModel(config), processor


@dataclass
class Run:
    """A trainer and what it was built from."""

    recipe: Recipe
    trainer: VLJEPATrainer
    dataset: ContrastiveDataset
    collator: ContrastiveCollator
    processor: VLJEPAProcessor
    plain: PlainModel


def start(path: Path, vocabulary: int | None = None) -> Run:
    """Build the trainer of a recipe as `training.train` does, and a plain model."""
    recipe = read_recipe(str(path))
    set_seed(recipe.training.seed)
    sources = [read_source(source) for source in recipe.data.sources]
    settings = run_settings(recipe, sources)
    model, processor = new_model_of(recipe, sources, vocabulary)
    dataset, collator = read_data(recipe, model, processor, sources)
    plain = PlainModel(model, recipe.training.bf16)  # before adapters and bf16 weights
    trainer = build_trainer(
        recipe,
        model,
        processor,
        dataset=dataset,
        collator=collator,
        benchmarks=[],
        settings=settings,
        callbacks=[ProgressLine(), CollapseWarning(), RunFacts(recipe.model.checkpoint)],
    )
    return Run(recipe, trainer, dataset, collator, processor, plain)


def batches_of(run: Run) -> Iterator[Batch]:
    """Yield the batches of the run's trainer, in its order."""
    args = run.recipe.training
    sampler = MixtureSampler(
        run.dataset.buckets,
        batch_size=args.global_batch_size,
        num_batches=args.max_steps,
        seed=args.seed,
        lanes=default_lanes(args),
    )
    for step in sampler:
        yield run.collator(run.dataset.__getitems__(step).samples)


class Alternate(TrainerCallback):
    """Runs a step of the plain loop after each step of the trainer, and measures both.

    The trainer's step lasts from the end of the plain step before it, so that loading, logging and
    callbacks count.
    """

    def __init__(self, run: Run, steps: Steps):
        self.steps = steps
        self.kind = ""
        batches = self.with_kind(batches_of(run))
        self.loop = PlainLoop(
            run.plain, run.recipe.training, batches, run.processor.video_processor
        )
        step = run.trainer.training_step

        def recorded(*args, **kwargs) -> torch.Tensor:
            loss = step(*args, **kwargs)
            self.loss = loss.item()
            return loss

        run.trainer.training_step = recorded

    def with_kind(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.kind = "images" if batch["frames"].shape[1] == 1 else "clips"
            yield batch

    def on_train_begin(self, *args, **kwargs) -> None:
        self.peak, self.since = PeakMemory(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.trainer.append(time.process_time() - self.since)
        self.steps.peaks["trainer"] = self.peak.read()
        if state.global_step == args.max_steps:
            return_freed_memory()  # that of the trainer's step, which the plain step would reuse
        self.peak, since = PeakMemory(), time.process_time()
        loss = self.loop.step()
        self.steps.plain.append(time.process_time() - since)
        self.steps.peaks["plain"] = self.peak.read()
        self.steps.losses.append((self.loss, loss))
        self.steps.kinds.append(self.kind)
        if state.global_step == args.max_steps - 1:
            return_freed_memory()  # the last step's peak counts
        self.peak, self.since = PeakMemory(), time.process_time()


def quietly(call: Callable[[], object]) -> None:
    """Call without the progress line and the warnings of training."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        call()


def measure(path: Path, vocabulary: int | None = None) -> tuple[Run, Steps]:
    """Train with a recipe and with the plain loop, alternately."""
    run, steps = None, Steps()

    def train() -> None:
        nonlocal run
        run = start(path, vocabulary)
        run.trainer.add_callback(Alternate(run, steps))
        run.trainer.train()

    quietly(train)
    return run, steps


def weights_of(run: Run) -> dict[str, float]:
    """Return how often a step has clips, and how often images."""
    found = {"clips": 0.0, "images": 0.0}
    for bucket in run.dataset.buckets:
        is_video = "video" in run.dataset.rows[bucket.rows[0]]
        found["clips" if is_video else "images"] += float(bucket.weight)  # NumPy's, not JSON's
    return found


def check_losses(steps: Steps, precision: str) -> float:
    """Return the largest difference of losses, relative to the loss.

    Raises:
        RuntimeError: in fp32 it exceeds the tolerance, so the two loops do not compute the same.
    """
    ours, plain = torch.tensor(steps.losses, dtype=torch.float64).T
    most = ((ours - plain).abs() / plain.abs().clamp_min(1)).max().item()  # NaN if any is
    if precision == "fp32" and not most <= TOLERANCE:
        raise RuntimeError(f"losses of the trainer and of the plain loop differ by {most:.1e}")
    return most


def figures(name: str, precision: str, quick: bool) -> Cost:
    """Measure a case; return its numbers as the value of a `Cost`."""
    case = (QUICK if quick else CASES)[name]
    with tempfile.TemporaryDirectory() as folder:
        path = case.write(Path(folder), precision=precision, max_steps=case.steps)
        run, steps = measure(path, case.vocabulary)
    weights = weights_of(run)
    ours, plain = (steps.mean(each, weights, case.warm_up) for each in ("trainer", "plain"))
    numbers = {
        "plain, CPU-s": plain,
        "trainer, CPU-s": ours,
        "trainer / plain": ours / plain,
        "samples per CPU-s": run.recipe.training.global_batch_size / ours,
        "difference of losses": check_losses(steps, precision),
        "plain, peak GiB": steps.peaks["plain"] / 2**30,
        "trainer, peak GiB": steps.peaks["trainer"] / 2**30,
    }
    return Cost(sum(steps.plain + steps.trainer), max(steps.peaks.values()), numbers)


def compare(name: str, precision: str, report: Report, args: argparse.Namespace) -> None:
    """Measure a case in its own process, or in this one for `--quick`, and report it."""
    report.start(f"{name} {precision}")
    settings = (name, precision, args.quick)
    if args.quick:
        found = figures(*settings)
    else:
        found = in_own_process(figures, *settings, threads=args.threads)
    report.add(f"{name} {precision}", found.value, Goal("trainer / plain", most=CASES[name].most))


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and return the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--against", type=Path, help="a checkout of another revision")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.against is not None:
        report = Report("train_step", args.output)
        compare_revisions(args.against, args.precision, report, DEMO_STEPS)
        return report.close()
    cases = chosen(CASES, args.only, parser)
    report = Report("train_step", args.output, args.quick)
    for name in cases:
        for precision in args.precision:
            compare(name, precision, report, args)
    return report.close()


if __name__ == "__main__":
    main()
