"""Run a grid of trainings: `python -m experiments.run experiments/NAME/grid.yaml`.

Preparations run once, each after those that it needs. Then each run trains in a process of its own,
with one thread and a limit of processor time, is evaluated, and appends one line to
`experiments/NAME/results.jsonl`. The same command continues: finished runs are skipped, and a run
that was killed or failed in its evaluation does not train again. A run whose settings have changed
since is refused, or repeated with `--again`. The weights are deleted, except those that another
setting starts from; logs, recipe and items stay in `runs/experiments/NAME`. Ctrl-C, SIGTERM and
SIGHUP end the trainings with the command. `experiments/grid.py` lists the keys of a grid.
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from safetensors import safe_open
from tqdm import tqdm

from eval.evaluate import at_least_one
from eval.items import FILE as ITEMS_FILE
from eval.items import read_items
from experiments.grid import (
    RECIPE_OF,
    WORK,
    Grid,
    GridError,
    Run,
    Step,
    benchmarks,
    is_named,
    read_grid,
)
from experiments.results import BENCHMARK, append_line, digest, pack_all, read_lines
from processing.output import check_output_folder, complete_file
from training.arguments import Recipe, RecipeError
from training.decoder.recipe import read_recipe as read_decoder_recipe
from training.hub.training_facts import read_runs

LAST_LINES = 3  # of a log, in an error
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
SECONDS_TO_END = 5  # of a process after SIGTERM, before SIGKILL
# Between two looks at what has ended. A signal that arrives just before a blocking call does not
# wake it, so no call blocks for longer.
SECONDS_TO_LOOK = 0.2
CURVE = {"step": "step", "loss": "loss", "chance": "chance_loss", "grad_norm": "grad_norm"}


class RunError(RuntimeError):
    """A command that failed; the message has its last lines or its limit."""


# -- processes -------------------------------------------------------------------------------

RUNNING: set[subprocess.Popen] = set()
ENDING = threading.Event()  # commands that start from now on are ended at once


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
            start_new_session=True,  # `end_processes` ends its workers, too
        )
        RUNNING.add(process)
        try:
            if ENDING.is_set():
                end_processes()
            # `Popen.wait` would not return the processor time of this child alone.
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                time.sleep(SECONDS_TO_LOOK)
            _, status, usage = ended
        finally:
            RUNNING.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGXCPU:
        raise RunError(f"{words[0]} reached its limit of {cpu_seconds} CPU-seconds; see {log}")
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        code = process.returncode
        raise RunError(f"{words[0]} ended with exit code {code}; see {log}: {' / '.join(lines)}")
    return usage.ru_utime + usage.ru_stime


def end_processes(number: int = signal.SIGTERM) -> None:
    """Send a signal to the commands that run, and to the processes that they started."""
    for process in list(RUNNING):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def end_runs(futures: Iterable[Future]) -> None:
    """End the commands of runs, and wait until the runs have noticed.

    A command that starts meanwhile is ended at once (`ENDING`): that of a run which is not among
    the futures yet, or the next one of a run whose first one was ended.
    """
    ENDING.set()
    end_processes()
    start = time.monotonic()
    while not all(future.done() for future in futures):
        has_time = time.monotonic() - start < SECONDS_TO_END
        end_processes(signal.SIGTERM if has_time else signal.SIGKILL)
        time.sleep(0.1)


def in_order(
    tasks: dict[Any, tuple[set, Callable[[], Any]]], jobs: int
) -> Iterator[tuple[Any, Future]]:
    """Run functions in threads, `jobs` at a time; yield the key and the future of each that ends.

    An exception, in the caller as well if it closes the iterator, ends the commands that run.

    Args:
        tasks: functions, each with the keys of those that must have ended before. Keys that are
            not among the tasks do not count.
    """
    waiting, started = dict(tasks), {}
    ENDING.clear()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or started:
                coming = {*waiting, *started.values()}
                for key in [each for each in waiting if not waiting[each][0] & coming]:
                    _, function = waiting.pop(key)
                    started[pool.submit(function)] = key
                done, _ = wait(started, SECONDS_TO_LOOK, return_when=FIRST_COMPLETED)
                for future in done:
                    yield started.pop(future), future
        except BaseException:  # Ctrl-C and SIGTERM, too
            pool.shutdown(wait=False, cancel_futures=True)
            end_runs(started)
            raise


# -- preparation -----------------------------------------------------------------------------


def prepare(grid: Grid, runs: list[Run], jobs: int) -> None:
    """Run the preparations that runs need and that do not exist yet, `jobs` at a time.

    Raises:
        GridError: a folder was made by another command.
        RunError: a command failed.
    """
    steps: dict[str, tuple[Step, int]] = {}
    for run in runs:
        # A folder that all seeds share is made once, with the first seed: the steps that it needs
        # stand before it here. Those of a later seed would follow it.
        for step in grid.needed(run.recipe, run.seed, run.options):
            steps.setdefault(step.folder, (step, run.seed))
    tasks: dict[str, tuple[set[str], Callable[[], None]]] = {}
    for folder, (step, seed) in steps.items():
        if is_made(step):
            continue
        texts = grid.texts_of(step, seed)
        before = {each for each in tasks if is_named(each, texts)}
        tasks[folder] = before, partial(make_alone, grid, step, seed)
    with (
        tqdm(total=len(tasks), desc="prepare", unit="step", dynamic_ncols=True) as progress,
        closing(in_order(tasks, jobs)) as ended,
    ):
        for _, future in ended:
            future.result()
            progress.update()


def note_of(step: Step, ending: str) -> Path:
    """Return a file about a prepared folder, which all grids share."""
    return WORK / "prepared" / f"{step.folder.replace('/', '-')}.{ending}"


def is_made(step: Step) -> bool:
    """Return whether a step's folder is complete.

    Raises:
        GridError: another command made it.
    """
    if not Path(step.folder, step.complete).is_file():
        return False
    note = note_of(step, "txt")  # none for a folder that was made without a grid
    command = note.read_text(encoding="utf-8") if note.is_file() else step.command
    if command != step.command:
        raise GridError(
            f"prepare: {step.folder} was made by {command!r}. Delete it, and the next run makes it "
            "anew; or name another folder."
        )
    return True


def make_alone(grid: Grid, step: Step, seed: int) -> None:
    """Run a preparation, or wait until another grid has run it.

    Raises:
        GridError: see `is_made`.
        RunError: see `make`.
    """
    lock = note_of(step, "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        while not is_locked(file):
            if ENDING.is_set():
                raise RunError(f"{step.folder}: ended while another grid prepared it")
            time.sleep(SECONDS_TO_LOOK)
        if not is_made(step):
            make(grid, step, seed)
            note_of(step, "txt").write_text(step.command, encoding="utf-8")


def is_locked(file: TextIO) -> bool:
    """Try to lock a file; return False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make(grid: Grid, step: Step, seed: int) -> None:
    """Run a preparation; it has no limit of processor time.

    Raises:
        RunError: it failed, or did not write its file.
    """

    def recipe_file(match) -> str:
        run = grid.run(match[1], seed)
        run.write_recipe()
        return str(run.recipe_file)

    tqdm.write(f"prepare: {step.command}")
    words = shlex.split(RECIPE_OF.sub(recipe_file, step.command))[2:]
    log = WORK / grid.name / "prepare" / f"{step.folder.replace('/', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    in_own_process(words, log, cpu_seconds=10**6)
    if not Path(step.folder, step.complete).is_file():
        raise RunError(f"{step.command} did not write {step.folder}/{step.complete}; see {log}")


def made(grid: Grid, run: Run) -> dict[str, str]:
    """Return a hash of the file that completes each preparation of a run, and of the entry of each
    of its benchmarks.

    The first differs if the same command has made other data, or if a folder of other data was
    there.
    """
    steps = grid.needed(run.recipe, run.seed, run.options)
    paths = {step.folder: Path(step.folder, step.complete) for step in steps}
    entries = benchmarks(run.recipe, run.options)
    return {
        **{folder: digest(path.read_bytes()) for folder, path in paths.items() if path.is_file()},
        **{
            f"{BENCHMARK}{name}": digest(json.dumps(entry, sort_keys=True).encode())
            for name, entry in entries.items()
        },
    }


# -- runs ------------------------------------------------------------------------------------


def check(run: Run, recipe: Recipe) -> None:
    """Check what a run's commands would refuse after its training.

    Raises:
        GridError: an option or a value of the recipe.
        RecipeError: the recipe of its Y-Decoder.
    """
    options, training = run.options, recipe.training
    if training.logging_steps > training.max_steps:
        raise GridError(
            f"{run.setting}: training.logging_steps ({training.logging_steps:g}) is above "
            f"max_steps ({training.max_steps}), so no loss would be logged. Give less."
        )
    if options.cached and recipe.data.features is None:
        raise GridError(f"{run.setting}: cached: the recipe has no data.features to read.")
    if options.validation and options.trainer != "token_baseline":
        raise GridError(
            f"{run.setting}: validation: it chooses the form of a likelihood, and only the "
            "trainer token_baseline has one. Leave it out."
        )
    if options.decoder is not None:
        read_decoder_recipe(options.decoder, decoder_options(run))


def decoder_options(run: Run) -> list[str]:
    """Return what a run changes in the recipe of its Y-Decoder."""
    paths = {
        "model.checkpoint": run.folder / "model",
        "training.output_dir": run.folder / "decoder",
    }
    return [*(f"{key}={path}" for key, path in paths.items()), f"training.seed={run.seed}"]


def execute(grid: Grid, folder: Path, run: Run) -> dict:
    """Train and evaluate one run; return its line.

    A run that was killed or failed continues after its last finished command.

    Args:
        folder: where the results are, for the items.

    Raises:
        RunError: a command failed, or reached the limit of processor time.
    """
    note, state = run.folder / "commands.json", {"settings": run.settings} | made(grid, run)
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    used = found["used"] if found.get("state") == state else {}  # CPU-seconds of each command
    # That of the training: while a run trains, its code may be committed or changed.
    code = found.get("revision", "") if used else revision()
    if not used:
        shutil.rmtree(run.folder, ignore_errors=True)
    recipe = run.write_recipe()
    model, log = run.folder / "model", run.folder / "log.txt"
    commands = {"training": [f"training.{run.options.trainer}", str(run.recipe_file)]}
    measured = model
    if run.options.decoder is not None:
        measured = run.folder / "decoder"
        commands["decoder"] = [
            "training.train_decoder",
            run.options.decoder,
            *decoder_options(run),
        ]
        if "decoder" not in used:
            shutil.rmtree(measured, ignore_errors=True)
    if recipe.evaluation.tasks:
        commands["evaluation"] = evaluation(run, recipe, measured)
    for name, words in commands.items():
        if name not in used:
            left = max(1, round(60 * grid.cpu_minutes - sum(used.values())))
            used[name] = in_own_process(words, log, left)
            done = {"state": state, "used": used, "revision": code}
            with complete_file(note) as path:
                path.write_text(json.dumps(done), encoding="utf-8")
    line = collect(grid, folder, run, recipe, measured) | {"revision": code}
    note.unlink()  # before the weights: without them, nothing can continue
    for pattern in WEIGHTS:
        for path in run.folder.rglob(pattern):
            if run.setting not in grid.kept or model not in path.parents:
                path.unlink()
    return line | {"process_cpu_seconds": {name: round(each, 1) for name, each in used.items()}}


def evaluation(run: Run, recipe: Recipe, model: Path) -> list[str]:
    """Return the words of the command that measures a trained model."""
    given, options = recipe.evaluation, run.options
    words = ["eval.evaluate", "--model", str(model), "--tasks", *given.tasks, *options.more_tasks]
    words += ["--benchmarks", given.benchmarks]
    if given.limit is not None:
        words += ["--limit", str(given.limit)]
    if options.cached:
        words += ["--features", recipe.data.features]
    if options.validation:
        words += ["--validation", *options.validation]
    if options.validation_benchmarks is not None:
        words += ["--validation-benchmarks", options.validation_benchmarks]
    return words


def parameters(model: Path) -> dict[str, int]:
    """Return the number of parameters of each part of a saved model, such as `y_encoder`."""
    counts: dict[str, int] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = name.removeprefix("vljepa.").split(".")[0]
                counts[part] = counts.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    return counts


def collect(grid: Grid, folder: Path, run: Run, recipe: Recipe, measured: Path) -> dict:
    """Return the line of a finished run, from the files in the folders of its models.

    Args:
        measured: folder of the model that was evaluated, which may be the model with a Y-Decoder.
    """
    model = run.folder / "model"
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
        "parameters": parameters(measured),
        "flos": state["total_flos"],
        "scores": {},
        "items": {},
        "device": facts["device"],
        "precision": facts["precision"],
    }
    if run.before is not None:
        first = read_lines(folder)[run.before, run.seed]
        line["before"] = {name: first[name] for name in ("setting", "rows", "cpu_seconds")}
    if measured != model:
        line["decoder_parameters"] = read_runs(measured)[-1]["trainable_parameters"]
    if recipe.evaluation.tasks:
        found = json.loads((measured / "eval" / "results.json").read_text(encoding="utf-8"))
        line["versions"] = found["versions"]
        for name, benchmark in found["benchmarks"].items():
            scores = benchmark["scores"] | benchmark["by_type"]
            kept = ("value", "low", "high", "n", "baselines")
            line["scores"] |= {
                f"{name} {metric}": {key: score[key] for key in kept}
                for metric, score in scores.items()
            }
        chosen = {
            name: benchmark["protocol"]["likelihood"]
            for name, benchmark in found["benchmarks"].items()
            if "likelihood" in benchmark["protocol"]
        }
        if chosen:
            line["likelihood"] = chosen
        columns = read_items(measured / "eval" / ITEMS_FILE)
        line["items"] = pack_all(folder, columns, set(line["scores"]))
    return line


def revision() -> str:
    """Return the commit of the code, with "-dirty" if tracked files differ from it; "" without git.

    Results are no code: a grid adds to them while it runs.
    """
    results = (":(top)", ":(top,exclude)experiments/*/results.jsonl")
    results += (":(top,exclude)experiments/*/items",)
    try:
        commit = git("describe", "--always", "--exclude=*")
        return commit + ("-dirty" if git("diff", "--name-only", "HEAD", "--", *results) else "")
    except FileNotFoundError:
        return ""


def git(*words: str) -> str:
    """Return the output of a git command in this repository; "" if it fails."""
    here = Path(__file__).resolve().parent
    command = ["git", *words]
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
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
        if not is_locked(file):
            raise GridError(
                f"{folder}: another command runs this grid, or a training of one that was killed. "
                "Wait until it ends, or end it."
            )
        yield


def check_owner(path: Path, folder: Path) -> None:
    """Raise `GridError` if another grid of the same name works in a folder; else note the grid."""
    note, own = folder / "grid.txt", os.path.relpath(path.resolve())
    owner = note.read_text(encoding="utf-8") if note.is_file() else own
    if owner != own:
        raise GridError(
            f"{folder}: it belongs to {owner}, a grid of the same name. Rename the folder of {own}."
        )
    note.write_text(own, encoding="utf-8")


# -- the command -----------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def with_models(runs: list[Run], todo: list[Run]) -> list[Run]:
    """Return the runs to do, with those whose weights they start from and that are missing.

    Args:
        runs: all runs, each after the one that it starts from.
    """
    wanted = {(run.before, run.seed) for run in todo}
    missing = [
        run
        for run in runs
        if (run.setting, run.seed) in wanted and not has_weights(run.folder / "model")
    ]
    return [run for run in runs if run in todo or run in missing]


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
        # Older lines have no benchmarks.
        before = line["prepared"]
        other = [
            name
            for name in now
            if before.get(name, now[name] if name.startswith(BENCHMARK) else None) != now[name]
        ]
        if line["settings"] != run.settings or other:
            named = f" ({', '.join(other)})" if other else ""
            changed.append(f"{run.setting} {run.seed}{named}")
            todo.append(run)
    if changed and not again:
        raise GridError(
            f"results of other settings or data: {', '.join(changed)}. Repeat them with --again, "
            "leave them out with --only and --seeds, or give the new settings new names."
        )
    return todo


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, help="such as experiments/calibration/grid.yaml")
    parser.add_argument(
        "--jobs", type=at_least_one, default=1, help="processes at a time; one per core"
    )
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
        check_owner(args.grid, WORK / grid.name)
        # 1. All settings are checked before the first run, which may take hours
        runs = list(grid.runs(args.only, args.seeds))
        for run in {run.setting: run for run in runs}.values():
            check(run, run.write_recipe())
        data = [made(grid, run) for run in runs]
        todo = unfinished(runs, read_lines(folder), data, args.again)
        todo = with_models(runs, todo)
        print(f"{grid.name}: {len(runs)} runs, {len(runs) - len(todo)} of them finished before")

        # 2. Data, models and features, then the runs
        prepare(grid, todo, args.jobs)
        return run_all(grid, folder, todo, args.jobs)


def run_all(grid: Grid, folder: Path, todo: list[Run], jobs: int) -> int:
    """Execute runs, `jobs` at a time, and append their lines; return the number of failed ones.

    A run waits for the one that it starts from, and fails with it.
    """
    failed: set[tuple[str | None, int]] = set()

    def task(run: Run) -> dict:
        if (run.before, run.seed) in failed:
            raise RunError(f"it starts from the model of {run.before}, which failed")
        return execute(grid, folder, run)

    runs = {(run.setting, run.seed): run for run in todo}
    tasks = {key: ({(run.before, run.seed)}, partial(task, run)) for key, run in runs.items()}
    with (
        tqdm(total=len(runs), desc=grid.name, unit="run", dynamic_ncols=True) as progress,
        closing(in_order(tasks, jobs)) as ended,
    ):
        for key, future in ended:
            run = runs[key]
            line = {"setting": run.setting, "seed": run.seed, "settings": run.settings}
            try:
                line = future.result()
                text = summary(grid, line)
            except Exception as error:  # of one run; the others go on
                failed.add(key)
                kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
                line["error"] = f"{kind}{error}"
                text = f"FAILED: {line['error']}"
            append_line(folder, line | {"prepared": made(grid, run)})
            tqdm.write(f"{run.setting} {run.seed}: {text}")
            progress.update()
    return len(failed)


def summary(grid: Grid, line: dict) -> str:
    """Return the last loss, the grid's scores and the cost of a run."""
    names = [name for name in grid.scores or line["scores"] if name in line["scores"]]
    scores = [f"{name} {line['scores'][name]['value']:.3f}" for name in names]
    words = [f"loss {line['curve']['loss'][-1]:.3f}", *scores, f"{line['cpu_seconds']:.0f} CPU-s"]
    return " · ".join(words)


def end(number: int, frame: FrameType | None) -> None:
    """End the command by a signal as by an error, so that its trainings are ended, too."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) == signal.SIG_DFL:  # under nohup, SIGHUP is ignored
            signal.signal(each, end)
    try:
        sys.exit(min(main(), 1))
    except (GridError, RecipeError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
