"""Run a grid of trainings: `python -m experiments.run experiments/NAME/grid.yaml`.

Preparations run once. Then each run trains in a process of its own, with one thread and a limit of
processor time, is evaluated, and appends one line to `experiments/NAME/results.jsonl`. The same
command continues: finished runs are skipped. A run whose settings have changed since is refused, or
repeated with `--again`. The weights are deleted; logs, recipe and items stay in
`runs/experiments/NAME`. `experiments/grid.py` lists the keys of a grid.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from eval.evaluate import at_least_one
from eval.items import FILE as ITEMS_FILE
from eval.items import read_items
from experiments.grid import RECIPE_OF, WORK, Grid, GridError, Run, Step, read_grid
from experiments.results import append_line, pack_all, read_lines
from processing.output import check_output_folder
from training.arguments import Recipe, RecipeError
from training.hub.training_facts import read_runs

LAST_LINES = 3  # of a log, in an error
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
CURVE = {"step": "step", "loss": "loss", "chance": "chance_loss", "grad_norm": "grad_norm"}


class RunError(RuntimeError):
    """A command that failed; the message has its last lines or its limit."""


# -- processes -------------------------------------------------------------------------------


def in_own_process(words: list[str], log: Path, cpu_seconds: int) -> float:
    """Run `python -m WORDS` with one thread, and return its processor time in seconds.

    Args:
        words: module and arguments.
        log: file to which its output is appended.
        cpu_seconds: limit of its processor time.

    Raises:
        RunError: it failed, or reached the limit.
    """
    # A soft limit ends the process by SIGXCPU, a hard one by SIGKILL, as a lack of memory does.
    script = 'ulimit -S -t "$0"; ulimit -c 0; exec nice -n 5 "$@"'
    command = ["sh", "-c", script, str(cpu_seconds), sys.executable, "-m", *words]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ python -m {' '.join(words)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            close_fds=False,  # it holds the lock of `only_runner`
        )
        # `Popen.wait` would not return the processor time of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGXCPU:
        raise RunError(f"{words[0]} reached its limit of {cpu_seconds} CPU-seconds; see {log}")
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        code = process.returncode
        raise RunError(f"{words[0]} ended with exit code {code}; see {log}: {' / '.join(lines)}")
    return usage.ru_utime + usage.ru_stime


# -- preparation -----------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def prepare(grid: Grid, runs: list[Run]) -> None:
    """Run the preparations that runs need and that do not exist yet.

    Raises:
        GridError: a folder was made by another command of this grid.
        RunError: a command failed.
    """
    steps = {}
    for run in runs:
        steps |= {step.folder: (step, run) for step in grid.needed(run.recipe, run.seed)}
    made_by = WORK / grid.name / "prepared.json"
    commands = json.loads(made_by.read_text(encoding="utf-8")) if made_by.is_file() else {}
    for folder, (step, run) in tqdm(steps.items(), "prepare", unit="step"):
        if Path(folder, step.complete).is_file():
            if commands.get(folder, step.command) != step.command:
                raise GridError(
                    f"prepare: {folder} was made by {commands[folder]!r}. Delete it, and the next "
                    "run makes it anew."
                )
            continue
        tqdm.write(f"prepare: {step.command}")
        make(grid, step, run.seed)
        commands[folder] = step.command
        made_by.write_text(json.dumps(commands, indent=2) + "\n", encoding="utf-8")


def make(grid: Grid, step: Step, seed: int) -> None:
    """Run a preparation; it has no limit of processor time.

    Raises:
        RunError: it failed, or did not write its file.
    """

    def recipe_file(match) -> str:
        run = grid.run(match[1], seed)
        run.write_recipe()
        return str(run.recipe_file)

    words = shlex.split(RECIPE_OF.sub(recipe_file, step.command))[2:]
    log = WORK / grid.name / "prepare.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    in_own_process(words, log, cpu_seconds=10**6)
    if not Path(step.folder, step.complete).is_file():
        raise RunError(f"{step.command} did not write {step.folder}/{step.complete}; see {log}")


def made(grid: Grid, run: Run) -> dict[str, str]:
    """Return a hash of the file that completes each preparation of a run.

    It differs if the same command has made other data, or if a folder of other data was there.
    """
    steps = grid.needed(run.recipe, run.seed)
    paths = {step.folder: Path(step.folder, step.complete) for step in steps}
    return {folder: digest(path) for folder, path in paths.items() if path.is_file()}


# -- runs ------------------------------------------------------------------------------------


def execute(grid: Grid, folder: Path, run: Run) -> dict:
    """Train and evaluate one run; return its line.

    Args:
        folder: where the results are, for the items.

    Raises:
        RunError: a command failed, or reached the limit of processor time.
    """
    shutil.rmtree(run.folder, ignore_errors=True)  # of a run that was killed
    recipe = run.write_recipe()
    model, log = run.folder / "model", run.folder / "log.txt"
    limit = round(60 * grid.cpu_minutes)
    used = {"training": in_own_process(["training.train", str(run.recipe_file)], log, limit)}
    if recipe.evaluation.tasks:
        used["evaluation"] = in_own_process(evaluation(recipe, model), log, limit)
    line = collect(folder, run, recipe, model)
    for pattern in WEIGHTS:
        for path in run.folder.rglob(pattern):
            path.unlink()
    return line | {"process_cpu_seconds": {name: round(each, 1) for name, each in used.items()}}


def evaluation(recipe: Recipe, model: Path) -> list[str]:
    """Return the words of the command that measures a trained model."""
    given = recipe.evaluation
    words = ["eval.evaluate", "--model", str(model), "--tasks", *given.tasks]
    words += ["--benchmarks", given.benchmarks]
    return words + ([] if given.limit is None else ["--limit", str(given.limit)])


def collect(folder: Path, run: Run, recipe: Recipe, model: Path) -> dict:
    """Return the line of a finished run, from the files in its model's folder."""
    state = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))
    log = [entry for entry in state["log_history"] if "loss" in entry]
    facts = read_runs(model)[-1]
    rows = recipe.training.max_steps * recipe.training.global_batch_size
    line = {
        "setting": run.setting,
        "seed": run.seed,
        "settings": run.settings,
        "overrides": run.overrides,
        "curve": {
            name: [round(entry[key], 5) for entry in log]
            for name, key in CURVE.items()
            if all(key in entry for entry in log)  # a loss without negatives has no chance level
        },
        "rows": rows,
        "cpu_seconds": facts["cpu_seconds"],
        "rows_per_cpu_second": round(rows / max(facts["cpu_seconds"], 0.1), 2),
        "trainable_parameters": facts["trainable_parameters"],
        "scores": {},
        "items": {},
        "device": facts["device"],
        "precision": facts["precision"],
        "revision": revision(),
    }
    if recipe.evaluation.tasks:
        found = json.loads((model / "eval" / "results.json").read_text(encoding="utf-8"))
        line["versions"] = found["versions"]
        for name, benchmark in found["benchmarks"].items():
            scores = benchmark["scores"] | benchmark["by_type"]
            kept = ("value", "low", "high", "n", "baselines")
            line["scores"] |= {
                f"{name} {metric}": {key: score[key] for key in kept}
                for metric, score in scores.items()
            }
        columns = read_items(model / "eval" / ITEMS_FILE)
        line["items"] = pack_all(folder, columns, set(line["scores"]))
    return line


def revision() -> str:
    """Return the commit of the code, with "-dirty" if files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()


@contextmanager
def only_runner(folder: Path) -> Iterator[None]:
    """Lock a grid's folder.

    Trainings inherit the lock: one that outlives a killed runner would write into the folder of the
    run that repeats it.

    Raises:
        GridError: it is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GridError(
                f"{folder}: another command runs this grid, or a training of one that was killed. "
                "Wait until it ends, or end it."
            ) from error
        yield


# -- the command -----------------------------------------------------------------------------


def unfinished(
    runs: list[Run], lines: dict[tuple[str, int], dict], data: list[dict[str, str]], again: bool
) -> list[Run]:
    """Return the runs without a result.

    Args:
        lines: the results, see `read_lines`; a line with an `error` does not count.
        data: see `made`, one for each run.
        again: repeat runs whose settings or data have changed.

    Raises:
        GridError: runs have changed, and not `again`.
    """
    todo, changed = [], []
    for run, now in zip(runs, data, strict=True):
        line = lines.get((run.setting, run.seed), {"error": "none"})
        if "error" in line:
            todo.append(run)
            continue
        before = line["prepared"]
        other = [name for name in now if before.get(name) != now[name]]
        if line["settings"] != run.settings or other:
            named = f" ({', '.join(other)})" if other else ""
            changed.append(f"{run.setting} {run.seed}{named}")
            todo.append(run)
    if changed and not again:
        raise GridError(
            f"results of other settings or data: {', '.join(changed)}. Repeat them with --again, "
            "or give the new settings new names."
        )
    return todo


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, help="such as experiments/calibration/grid.yaml")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time; one per core")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="only these settings")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the grid's")
    parser.add_argument("--again", action="store_true", help="repeat runs that have changed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the missing runs; return the number of failed runs."""
    args = parse(argv)
    grid, folder = read_grid(args.grid), args.grid.parent
    check_output_folder("grid", folder)
    check_output_folder("runs", WORK / grid.name)

    with only_runner(WORK / grid.name):
        # 1. All settings are checked before the first run, which may take hours
        runs = list(grid.runs(args.only, args.seeds))
        for run in {run.setting: run for run in runs}.values():
            run.write_recipe()
        data = [made(grid, run) for run in runs]
        todo = unfinished(runs, read_lines(folder), data, args.again)
        print(f"{grid.name}: {len(runs)} runs, {len(runs) - len(todo)} of them finished before")

        # 2. Data, models and features, then the runs
        prepare(grid, todo)
        return run_all(grid, folder, todo, args.jobs)


def run_all(grid: Grid, folder: Path, todo: list[Run], jobs: int) -> int:
    """Execute runs, `jobs` at a time, and append their lines; return the number of failed ones."""
    failed = 0
    with (
        tqdm(total=len(todo), desc=grid.name, unit="run", dynamic_ncols=True) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        started = {pool.submit(execute, grid, folder, run): run for run in todo}
        try:
            for future in as_completed(started):
                run = started[future]
                line = {"setting": run.setting, "seed": run.seed, "settings": run.settings}
                try:
                    line = future.result()
                    tqdm.write(f"{run.setting} {run.seed}: {summary(grid, line)}")
                except RunError as error:
                    failed += 1
                    line["error"] = str(error)
                    tqdm.write(f"{run.setting} {run.seed}: FAILED: {error}")
                append_line(folder, line | {"prepared": made(grid, run)})
                progress.update()
        except BaseException:  # Ctrl-C too: the runs in the queue must not start
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def summary(grid: Grid, line: dict) -> str:
    """Return the last loss, the grid's scores and the cost of a run."""
    names = [name for name in grid.scores or line["scores"] if name in line["scores"]]
    scores = [f"{name} {line['scores'][name]['value']:.3f}" for name in names]
    words = [f"loss {line['curve']['loss'][-1]:.3f}", *scores, f"{line['cpu_seconds']:.0f} CPU-s"]
    return " · ".join(words)


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except (GridError, RecipeError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
