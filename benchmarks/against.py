"""The demo's training in this checkout and in another one: `benchmarks.train_step --against`.

Both take the recipe of the other checkout, so that they do the same work: the demonstration has
another recipe now. A second comparison of steps lets four questions share a clip here
(`rows_per_clip`), which older revisions cannot do.

| line          | compared                                                                      |
|---------------|-------------------------------------------------------------------------------|
| start         | CPU-seconds before the first step: decoding, target texts, imports            |
| second start  | the same, started again                                                       |
| after a move  | the same, with rows and clips in another folder                               |
| values read   | tensors in a step whose values Python reads: on a GPU each one waits for it   |
| sizes read    | operators in a step whose result's size depends on values, which wait too     |
| copies        | copies and conversions in a step                                              |
| demo          | samples per CPU-second of two processes that take steps alternately           |
| shared clips  | the same, with `rows_per_clip: 4` for the rows of questions here              |
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.report import Goal, Report
from benchmarks.steps import Steps
from benchmarks.synthetic import SOURCES, write_demo_recipe, write_demo_rows
from training.arguments import read_recipe

WARM_UP = 4  # steps that do not count
# Goals of the samples per CPU-second against revision 02ec42d, on a processor with native bf16.
LEAST = {"fp32": 1.1, "bf16": 1.5}
QUESTIONS = {name for name, (_, rows_of_each, _) in SOURCES.items() if rows_of_each > 1}
SCRIPT = Path(__file__).with_name("paced_steps.py")
HERE = Path(__file__).parents[1]


class PacedSteps:
    """A checkout that trains with a recipe in its own process, one step at each call.

    Args:
        checkout: root of the repository, at any revision whose recipes have the demo's keys.
        folder: its output and its cache.
        environment: variables that are set, or removed if `None`.

    Attributes:
        start: CPU-seconds before the first step.
    """

    def __init__(
        self,
        checkout: Path,
        recipe: Path,
        folder: Path,
        environment: dict[str, str | None] | None = None,
    ):
        folder.mkdir(exist_ok=True)
        changed = os.environ | {"PYTHONPATH": str(checkout)} | (environment or {})
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(SCRIPT), str(recipe)),
                *(f"training.output_dir={folder / 'out'}", f"data.cache_dir={folder / 'cache'}"),
            ],
            cwd=checkout,
            env={name: value for name, value in changed.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.start = self.read()["start"]

    def step(self, *, count: bool = False) -> dict:
        """Take a step; return its CPU-seconds and sizes.

        Args:
            count: count operators instead; the step is then slower.
        """
        self.process.stdin.write("count\n" if count else "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            log = self.log.read_text(encoding="utf-8")
            raise RuntimeError(f"{' '.join(self.process.args)} ended:\n{log[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def add(report: Report, case: str, there: float, here: float) -> None:
    numbers = {"there": there, "here": here}
    if there:
        numbers["here / there"] = here / there
    report.add(case, numbers)


def compare_starts(
    checkouts: dict[str, Path], recipes: dict[str, Path], folder: Path, report: Report
) -> None:
    """Start both checkouts three times, the last time with moved rows and clips."""
    data, moved = recipes["here"].parent, folder / "moved"
    shutil.copytree(data, moved)
    for recipe in recipes.values():
        text = recipe.read_text(encoding="utf-8").replace(str(data), str(moved))
        (moved / recipe.name).write_text(text, encoding="utf-8")
    for case, place in (("start", data), ("second start", data), ("after a move", moved)):
        report.start(case)
        seconds = {}
        for name, checkout in checkouts.items():
            paced = PacedSteps(checkout, place / recipes[name].name, folder / name)
            seconds[name] = paced.start
            paced.close()
        add(report, f"{case}, CPU-s", seconds["there"], seconds["here"])


def weights_of(recipe: Path) -> dict[str, float]:
    """Return the weights of the kinds of steps: images, clips, and clips that rows share."""
    recipe = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    weights = {"images": 0.0, "clips": 0.0, "shared clips": 0.0}
    for source in recipe["data"]["sources"]:
        kind = "shared clips" if source.get("rows_per_clip", 1) > 1 else "clips"
        weights["images" if "easy_vqa" in source["rows"] else kind] += source["weight"]
    return weights


def kind_of(step: dict) -> str:
    if step["frames"] == 1:
        return "images"
    return "shared clips" if 2 * step["clips"] <= step["rows"] else "clips"


def alternate(
    both: dict[str, PacedSteps], recipes: dict[str, Path], steps: int
) -> dict[str, float]:
    """Take steps of two processes alternately; return the CPU-seconds of a step of each.

    The least of each kind of steps are averaged by the weights of their sources.
    """
    found = {name: Steps() for name in both}
    for _ in range(steps):
        for name, paced in both.items():
            step = paced.step()
            found[name].kinds.append(kind_of(step))
            found[name].trainer.append(step["seconds"])
    return {
        name: each.mean("trainer", weights_of(recipes[name]), WARM_UP)
        for name, each in found.items()
    }


def compare_steps(
    case: str,
    checkouts: dict[str, Path],
    recipes: dict[str, Path],
    folder: Path,
    report: Report,
    steps: int,
) -> None:
    """Take steps in both checkouts alternately, and count the operators of one more step."""
    training = read_recipe(str(recipes["here"])).training
    precision = "bf16" if training.bf16 else "fp32"
    both = {
        name: PacedSteps(each, recipes[name], folder / name) for name, each in checkouts.items()
    }
    try:
        seconds = alternate(both, recipes, steps - 1)
        counts = {name: paced.step(count=True)["counts"] for name, paced in both.items()}
    finally:
        for paced in both.values():
            paced.close()
    here, there = (training.global_batch_size / seconds[name] for name in ("here", "there"))
    report.add(
        f"{case} {precision}, samples per CPU-s",
        {"there": there, "here": here, "here / there": here / there},
        Goal("here / there", least=LEAST[precision]),
    )
    for kind in counts["here"]:
        name = f"{case} {precision}, {kind} in a step"
        add(report, name, counts["there"][kind], counts["here"][kind])


def share_clips(recipe: Path) -> Path:
    """Write a recipe in which four rows of questions are about one clip; return its path."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for source in settings["data"]["sources"]:
        if Path(source["rows"]).stem in QUESTIONS:
            source["rows_per_clip"] = 4
    path = recipe.with_name("shared.yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def compare_revisions(other: Path, precisions: list[str], report: Report, steps: int) -> None:
    """Compare starts and steps of this checkout and of `other`."""
    checkouts = {"there": other.resolve(), "here": HERE}
    for precision in precisions:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data")
            data.mkdir()
            write_demo_rows(data)
            recipes = {
                name: write_demo_recipe(
                    data,
                    recipes=other / "training" / "recipes",
                    name=f"{name}.yaml",
                    precision=precision,
                    max_steps=steps,
                )
                for name in checkouts
            }
            if precision == precisions[0]:
                compare_starts(checkouts, recipes, Path(folder), report)
            compare_steps("demo", checkouts, recipes, Path(folder), report, steps)
            recipes["here"] = share_clips(recipes["here"])
            compare_steps("shared clips", checkouts, recipes, Path(folder), report, steps)
