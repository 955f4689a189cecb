"""Grids of trainings: their recipes, the runs to repeat, and a small one from start to report."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from experiments import report, run
from experiments.grid import GridError, Run, as_text, benchmarks, is_named, read_grid
from experiments.results import append_line, read_lines
from tests.tiny import tiny_recipe, tiny_rows
from training.arguments import RecipeError

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "experiments").glob("*/grid.yaml"))
CLAIMS = {each["folder"] for each in yaml.safe_load((ROOT / "experiments/claims.yaml").read_text())}
GRID = {
    "recipe": "recipe.yaml",
    "seeds": [0, 1],
    "overrides": {"training.max_steps": 2},
    "settings": {"plain": None, "fast": {"training.learning_rate": 1e-2}},
    "compare": [["plain", "fast"]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a recipe and a place for a grid."""
    monkeypatch.chdir(tmp_path)
    tiny_recipe(tiny_rows(tmp_path))
    (tmp_path / "trial").mkdir()
    return tmp_path / "trial"


def write_grid(folder: Path, **changes) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


# -- the grid --------------------------------------------------------------------------------


def step(name: str, command: str) -> dict:
    """Return a preparation as in a grid's file."""
    return {"folder": f"made/{name}", "command": f"python -m {command}", "complete": "done"}


def test_grid_runs_have_recipes_with_the_changes_of_all_and_of_their_setting(folder):
    runs = list(read_grid(write_grid(folder)).runs())
    assert [(each.setting, each.seed) for each in runs] == [
        ("plain", 0),
        ("fast", 0),
        ("plain", 1),
        ("fast", 1),
    ]
    training = runs[3].write_recipe().training
    assert (training.max_steps, training.learning_rate, training.seed) == (2, 1e-2, 1)
    assert training.output_dir == "runs/experiments/trial/fast/1/model"
    assert runs[0].write_recipe().training.learning_rate == 1e-3


def test_grid_prepares_only_what_a_run_needs_for_its_seed(folder):
    steps = [
        step("data", "x"),
        step("init-seed{seed}", "x made/data --seed {seed}"),
        step("init", "x"),
        step("features", "x {recipe plain}"),
        step("rows", "x"),
        step("stored", "x rows.yaml"),  # the file names the rows
    ]
    Path("rows.yaml").write_text("data: {sources: [{rows: made/rows/train.jsonl}]}")
    settings = {
        "plain": {"model.checkpoint": "made/init-seed{seed}"},
        "cached": {"data.features": "made/features", "model.checkpoint": "elsewhere/made/init"},
        "stored": {"data.features": "made/stored"},
    }
    grid = read_grid(write_grid(folder, prepare=steps, settings=settings, compare=[]))
    plain, cached, stored = (grid.run(name, 1) for name in settings)
    needed = [each.folder for each in grid.needed(plain.recipe, 1)]
    assert needed == ["made/data", "made/init-seed1"]
    assert [each.folder for each in grid.needed(cached.recipe, 1)] == [*needed, "made/features"]
    needed = [each.folder for each in grid.needed(stored.recipe, 1)]
    assert needed == ["made/rows", "made/stored"]
    steps[0]["command"] += " --more"
    other = read_grid(write_grid(folder, prepare=steps, settings=settings, compare=[]))
    assert other.run("plain", 1).settings != plain.settings


def two_inits(folder: Path, command: str) -> Path:
    """Write a grid whose settings start from two models, which both need the same data."""
    steps = [
        step("data", "x"),
        *(step(name, command) for name in ("one", "two")),
    ]
    settings = {name: {"model.checkpoint": f"made/{name}"} for name in ("one", "two")}
    return write_grid(folder, seeds=[0], prepare=steps, settings=settings, compare=[])


def test_prepare_runs_steps_at_the_same_time_but_after_what_they_need(folder, monkeypatch):
    grid = read_grid(two_inits(folder, "x made/data"))
    both, order = threading.Barrier(2, timeout=60), []

    def make(grid, step, seed):
        if step.folder == "made/data":
            time.sleep(0.2)  # the others would begin meanwhile
        else:
            assert Path("made/data/done").is_file()
            both.wait()  # fails if one is alone
        order.append(step.folder)
        Path(step.folder).mkdir(parents=True)
        Path(step.folder, step.complete).touch()

    monkeypatch.setattr(run, "make", make)
    run.prepare(grid, list(grid.runs()), jobs=2)
    assert order[0] == "made/data" and set(order[1:]) == {"made/one", "made/two"}
    run.prepare(grid, list(grid.runs()), jobs=2)
    assert len(order) == 3
    # Another grid with another command for the same folder
    (folder.parent / "other").mkdir()
    other = read_grid(two_inits(folder.parent / "other", "x --more made/data"))
    with pytest.raises(GridError, match="made/one was made by 'python -m x made/data'. Delete it"):
        run.prepare(other, list(other.runs()), jobs=2)


def test_prepare_makes_a_folder_of_all_seeds_with_the_first(folder, monkeypatch):
    steps = [step("init-seed{seed}", "x"), step("features", "x {recipe plain}")]
    settings = {
        "plain": {"model.checkpoint": "made/init-seed{seed}", "data.features": "made/features"}
    }
    path = write_grid(folder, seeds=[3, 4], prepare=steps, settings=settings, compare=[])
    grid, order = read_grid(path), []

    def make(grid, step, seed):
        if step.folder == "made/features":
            assert Path(f"made/init-seed{seed}/done").is_file()
        order.append((step.folder, seed))
        Path(step.folder).mkdir(parents=True)
        Path(step.folder, step.complete).touch()

    monkeypatch.setattr(run, "make", make)
    run.prepare(grid, list(grid.runs()), jobs=1)
    assert sorted(order) == [("made/features", 3), ("made/init-seed3", 3), ("made/init-seed4", 4)]


def test_prepare_waits_for_another_grid_that_makes_the_same_folder(folder, monkeypatch):
    grid = read_grid(two_inits(folder, "x"))
    one = grid.steps(0)[1]
    monkeypatch.setattr(run, "make", lambda *_: pytest.fail("made twice"))
    lock = run.note_of(one, "lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        assert run.is_locked(file)
        waiting = threading.Thread(target=run.make_alone, args=(grid, one, 0))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        Path(one.folder).mkdir(parents=True)
        Path(one.folder, one.complete).touch()
    waiting.join(60)
    assert not waiting.is_alive() and not run.note_of(one, "txt").exists()


@pytest.mark.parametrize("named", ["made/é", "./made/é", "made//é", "{here}/made/é", "a=made/é"])
def test_is_named_finds_a_folder_however_its_path_begins(folder, named):
    named = named.replace("{here}", str(folder.parent))
    assert is_named("made/é", [as_text({"data": named})])
    assert not is_named("made/é", [as_text({"data": f"{named}-2"})])
    assert not is_named("made/é", [as_text({"data": "other/made/é"})])


def test_grid_needs_what_a_decoder_or_a_file_of_an_earlier_step_names(folder):
    steps = [
        step("texts/", "x"),
        step("config", "x --write made/config/own.yaml"),
        step("init", "x made/config/own.yaml"),  # there is no such file yet
    ]
    Path("decoder.yaml").write_text("data: {sources: [{rows: ./made/texts/train.jsonl}]}")
    settings = {"plain": {"decoder": "decoder.yaml", "model.checkpoint": "made/init"}}
    grid = read_grid(write_grid(folder, prepare=steps, settings=settings, compare=[]))
    (plain,) = grid.runs(seeds=[0])
    needed = grid.needed(plain.recipe, 0, plain.options)
    assert [each.folder for each in needed] == ["made/texts", "made/config", "made/init"]


def test_prepare_ends_its_other_commands_when_one_fails(folder, monkeypatch):
    (folder.parent / "endless.py").write_text("import time\ntime.sleep(60)")
    grid = read_grid(two_inits(folder, "endless"))
    own = run.make

    def make(grid, step, seed):
        if step.folder == "made/one":
            own(grid, step, seed)
        while not run.RUNNING:
            time.sleep(0.01)
        raise run.RunError("no space")

    monkeypatch.setattr(run, "make", make)
    with run.only_runner(run.WORK / grid.name), pytest.raises(run.RunError, match="no space"):
        run.prepare(grid, list(grid.runs()), jobs=2)
    assert not run.RUNNING
    log = run.WORK / grid.name / "prepare/made-one.txt"
    assert log.read_text() == "$ python -m endless\n"


TWO_STAGES = {
    "first": None,
    "tokens": {
        "trainer": "token_baseline",
        "validation": ["val"],
        "validation_benchmarks": "v.yaml",
        "cached": True,
        "data.features": "made/features-seed{seed}",
    },
    "second": {"model.checkpoint": "{model first}", "training.max_steps": 3},
}


def test_grid_leaves_out_seeds_of_a_setting(folder):
    grid = read_grid(write_grid(folder, seeds_of={"fast": [1]}))
    found = [(each.setting, each.seed) for each in grid.runs()]
    assert found == [("plain", 0), ("plain", 1), ("fast", 1)]
    assert [each.seed for each in grid.runs(["fast"], seeds=[0])] == [0]


def test_grid_starts_a_setting_from_the_model_of_another(folder):
    Path("v.yaml").write_text("val: {}")
    grid = read_grid(write_grid(folder, settings=TWO_STAGES, compare=[], seeds=[1]))
    first, tokens, second = grid.runs()
    assert second.recipe["model"]["checkpoint"] == "runs/experiments/trial/first/1/model"
    assert (first.before, second.before, grid.kept) == (None, "first", {"first"})
    assert [run.setting for run in grid.runs(["second"])] == ["first", "second"]
    assert tokens.write_recipe().training.token_loss_weight == 1  # by the baseline's own reader
    changed = TWO_STAGES | {"first": {"training.learning_rate": 2.0}}
    other = read_grid(write_grid(folder, settings=changed, compare=[], seeds=[1]))
    hashes = [
        [each.run(name, 1).settings for name in ("tokens", "second")] for each in (grid, other)
    ]
    assert hashes[0][0] == hashes[1][0] and hashes[0][1] != hashes[1][1]


def test_evaluation_has_the_options_of_its_setting(folder):
    Path("v.yaml").write_text("val: {rows: made/samples/x.jsonl}\nsome: {}")
    evaluation = {"evaluation.tasks": ["some"], "evaluation.benchmarks": "v.yaml"}
    overrides = GRID["overrides"] | evaluation
    steps = [{"folder": "made/samples", "command": "python -m x", "complete": "done"}]
    changes = {"settings": TWO_STAGES, "compare": [], "prepare": steps}
    path = write_grid(folder, overrides=overrides, **changes)
    runs = {each.setting: each for each in read_grid(path).runs(seeds=[1])}
    words = {
        name: run.evaluation(each, each.write_recipe(), Path("m")) for name, each in runs.items()
    }
    same = ["eval.evaluate", "--model", "m", "--tasks", "some"]
    same += ["--benchmarks", "v.yaml"]
    assert words["first"] == same
    more = ["--features", "made/features-seed1", "--validation", "val"]
    assert words["tokens"] == [*same, *more, "--validation-benchmarks", "v.yaml"]
    grid = read_grid(path)
    needed = [grid.needed(each.recipe, 1, each.options) for each in runs.values()]
    assert [len(each) for each in needed] == [0, 1, 0]  # of the validation's rows
    with pytest.raises(GridError, match="v.yaml has no none"):
        read_grid(write_grid(folder, overrides=overrides | {"evaluation.tasks": ["none"]})).run(
            "plain", 0
        )


STEP = {"folder": "made", "command": "python -m x", "complete": "y"}
USES_STEP = {"model.checkpoint": "made/model"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"a b": None}}, "settings: 'a b': give a name of letters"),
        ({"settings": {"..": None}}, "settings: '..': give a name of letters"),
        ({"settings": {0.1: None}}, "settings: 0.1: give a name .* into quotes"),
        ({"settings": {"plain": 3}}, "settings: plain: 3 is not a mapping"),
        ({"cpu_minutes": float("inf")}, "cpu_minutes: inf is not a positive number"),
        ({"cpu_minutes": -1}, "cpu_minutes: -1.0 is not a positive number"),
        ({"groups": {"all": None}}, "groups: all: None is not a list"),
        ({"compare": [3]}, "compare: 3 is not a pair"),
        ({"prepare": [None]}, "prepare: give command, complete, folder, each a text; found None"),
        ({"prepare": [{**STEP, "folder": 3}]}, "prepare: give command, complete, folder, each a"),
        ({"settings": {"plain": {1: 2}, "fast": None}}, "settings: plain: 1 is not the name"),
        ({"groups": {1: ["plain"]}}, "groups: 1: put the title into quotes"),
        ({"seeds_of": {"plain": [[1]]}}, "seeds_of: plain: ..1.. are not some of the seeds"),
        ({"prepare": [STEP, {**STEP, "folder": "./made/"}]}, "two steps make made; give one"),
        (
            {"prepare": [{**STEP, "command": "python -m x 'a"}], "overrides": USES_STEP},
            "prepare: .*No closing quotation",
        ),
        ({"seeds_of": {"plain": []}}, "seeds_of: plain: .. are not some of the seeds"),
        (
            {
                "settings": {"plain": None, "fast": {"model.checkpoint": "{model plain}"}},
                "seeds_of": {"plain": [1]},
            },
            "seeds_of: fast starts from plain, which is left out for seed 0",
        ),
        ({"seeds": []}, "give at least one"),
        ({"seeds_of": {"plain": [2]}}, "seeds_of: plain: .2. are not some of the seeds"),
        ({"compare": [["plain", "none"]]}, "'none': no such setting; there are plain, fast"),
        ({"compare": [["plain"]]}, "is not a pair"),
        ({"groups": {"all": ["none"]}}, "'none': no such setting"),
        ({"nothing": 1}, "nothing: no such key"),
        ({"settings": {"plain": {"trainers": "x"}, "fast": None}}, "plain: trainers: no such key"),
        ({"settings": {"plain": {"trainer": "x"}, "fast": None}}, "'x' is not one of train, to"),
        ({"settings": {"plain": {"cached": 1}, "fast": None}}, "plain: cached: "),
        ({"settings": {"plain": {"validation": ["x"]}, "fast": None}}, "give validation_bench"),
        ({"settings": {"plain": {"decoder": "x"}, "fast": None}}, "decoder: x is not a file"),
        (
            {"settings": {"plain": {"model.checkpoint": "{model none}"}, "fast": None}},
            "'none': no such setting",
        ),
        (
            {
                "settings": {
                    "plain": {"model.checkpoint": "{model fast}"},
                    "fast": {"model.checkpoint": "{model plain}"},
                }
            },
            "plain: fast starts from a model itself",
        ),
        ({"prepare": [{"folder": "x"}]}, "prepare: give command, complete, folder"),
        (
            {"prepare": [{"folder": "x", "command": "ls", "complete": "y"}]},
            "'ls' does not begin with python -m",
        ),
    ],
)
def test_grid_names_what_is_wrong(folder, changes, message):
    with pytest.raises(GridError, match=message):
        list(read_grid(write_grid(folder, **changes)).runs())


def test_revision_is_dirty_by_changed_code_and_not_by_results(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    files = [tmp_path / f"experiments/{name}" for name in ("run.py", "c9/results.jsonl")]
    files[1].parent.mkdir(parents=True)
    monkeypatch.setattr(run, "__file__", str(files[0]))
    for file in files:
        file.write_text("a")
    assert run.revision() == ""  # no repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    clean = run.revision()
    assert clean and not clean.endswith("-dirty")
    files[1].write_text("b")
    (files[0].parent / "new.txt").write_text("untracked")
    assert run.revision() == clean
    files[0].write_text("b")
    assert run.revision() == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty or not a mapping"),
        (b"- a", "is empty or not a mapping"),
        (b"a: [", "is not a YAML file"),
        (b"a: {b: 1, c: 2, b: 3}", "is not a YAML file: 'b' stands twice"),
        (b"\xff", "is not a YAML file"),
    ],
)
@pytest.mark.parametrize("name", ["trial/grid.yaml", "recipe.yaml", "v.yaml"])
def test_grid_names_an_unreadable_file(folder, name, content, message):
    evaluation = {"evaluation.benchmarks": "v.yaml", "evaluation.tasks": ["vqa"]}
    path = write_grid(folder, overrides=evaluation)
    Path("v.yaml").write_text("vqa: {task: vqa}")
    Path(name).write_bytes(content)
    with pytest.raises(GridError, match=f"{name} {message}"):
        list(read_grid(path).runs())


def test_grid_refuses_the_recipe_of_another_grid_instead_of_its_own(folder):
    (folder / "recipe.yaml").write_text(Path("recipe.yaml").read_text())
    with pytest.raises(GridError, match="recipe.yaml is not the .*trial/recipe.yaml of this grid"):
        read_grid(write_grid(folder))
    assert read_grid(write_grid(folder, recipe="./trial/recipe.yaml")).name == "trial"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.logging_steps": 20}, r"logging_steps \(20\) is above max_steps \(2\)"),
        ({"cached": True}, "fast: cached: the recipe has no data.features"),
        (
            {"validation": ["vqa"], "validation_benchmarks": "v.yaml"},
            "fast: validation: .*Leave it out",
        ),
        ({"decoder": "wrong.yaml"}, "model.nothing: no such key"),
    ],
)
def test_run_checks_the_options_of_every_setting_before_the_first_run(folder, changes, message):
    Path("v.yaml").write_text("vqa: {task: vqa}")
    Path("wrong.yaml").write_text("{model: {nothing: 1}, data: {}, training: {}}")
    with pytest.raises((GridError, RecipeError), match=message):
        run.main([str(write_grid(folder, settings={"plain": None, "fast": changes}))])


def test_run_refuses_two_grids_of_one_name(folder):
    other = folder.parent / "elsewhere" / "trial"
    other.mkdir(parents=True)
    work = run.WORK / "trial"
    work.mkdir(parents=True)
    for _ in range(2):
        run.check_owner(write_grid(folder), work)
    with pytest.raises(GridError, match="it belongs to trial/grid.yaml, a grid of the same name"):
        run.check_owner(write_grid(other), work)


def test_run_checks_every_recipe_before_the_first_run(folder):
    settings = {"plain": None, "wrong": {"training.learning_rates": 1}}
    with pytest.raises(RecipeError, match="wrong: training.learning_rates: no such key"):
        run.main([str(write_grid(folder, settings=settings, compare=[]))])


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.parent.name)
def test_shipped_grids_have_valid_recipes_and_a_report_of_their_results(
    path, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    grid = read_grid(path)
    monkeypatch.setattr(Run, "recipe_file", property(lambda self: tmp_path / "recipe.yaml"))
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: None)
    rows = set()
    for each in grid.runs(seeds=grid.seeds[:1]):
        recipe = each.write_recipe()
        run.check(each, recipe)
        made = {step.folder for step in grid.needed(each.recipe, each.seed, each.options)}
        starts = {recipe.data.features} | ({recipe.model.checkpoint} if not each.before else set())
        assert starts - {None} <= made  # None: random weights, or nothing cached
        rows |= {entry["rows"] for entry in benchmarks(each.recipe, None).values()}
    # Nothing is chosen by test data: grids that measure them are on a claim.
    assert any("test" in name for name in rows) == (path.parent.name in CLAIMS)
    for step in grid.steps(grid.seeds[0]):
        assert importlib.util.find_spec(shlex.split(step.command)[2]) is not None
    report.main([str(path.parent), "--check"])


# -- the runs to repeat -----------------------------------------------------------------------


def line(setting: str, seed: int, **more) -> dict:
    facts = {"settings": "a", "prepared": {"data": "1"}, "items": {}}
    return {"setting": setting, "seed": seed, **facts, **more}


def a_run(setting: str, seed: int = 0, settings: str = "a", **more) -> Run:
    return Run(setting, seed, {}, {}, Path("x", setting), settings, **more)


def test_with_models_repeats_a_run_whose_weights_are_needed_and_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [a_run("first"), a_run("alone"), a_run("second", before="first")]
    assert run.with_models(runs, runs[2:]) == [runs[0], runs[2]]
    assert run.with_models(runs, runs[1:2]) == runs[1:2]
    model = runs[0].folder / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    assert run.with_models(runs, runs[2:]) == runs[2:]


def test_execute_continues_after_the_last_finished_command(folder, monkeypatch):
    Path("v.yaml").write_text("vqa: {task: vqa}")
    Path("decoder.yaml").write_text("{model: {checkpoint: x}, data: {sources: [x]}}")
    evaluation = {"evaluation.benchmarks": "v.yaml", "evaluation.tasks": ["vqa"]}
    path = write_grid(folder, overrides={**evaluation, "decoder": "decoder.yaml"})
    train, decode, measure = "training.train", "training.train_decoder", "eval.evaluate"
    calls, failing, limits = [], {decode, measure}, []

    def command(words: list[str], log: Path, cpu_seconds: int) -> float:
        calls.append(words[0])
        limits.append(cpu_seconds)
        made = log.parent / ("model" if words[0] == train else "decoder")
        if words[0] != measure:
            made.mkdir()  # fails if half of a model is left
            (made / "model.safetensors").touch()
        if words[0] in failing:
            failing.remove(words[0])
            raise run.RunError("killed")
        return 1.0

    monkeypatch.setattr(run, "in_own_process", command)
    monkeypatch.setattr(run, "collect", lambda *_: {})
    commits = iter("abcdef")
    monkeypatch.setattr(run, "revision", lambda: next(commits))

    def execute() -> dict:
        grid = read_grid(path)
        return run.execute(grid, folder, grid.run("plain", 0))

    with pytest.raises(run.RunError):
        execute()
    assert calls == [train, decode]
    with pytest.raises(run.RunError):
        execute()
    assert calls[2:] == [decode, measure]
    assert execute() == {
        "process_cpu_seconds": {"training": 1.0, "decoder": 1.0, "evaluation": 1.0},
        "revision": "a",  # of the training, not of the evaluation
    }
    assert calls[4:] == [measure]
    assert limits == [600, 599, 599, 598, 598]  # ten minutes for all commands
    assert not list(Path("runs").rglob("*.safetensors"))
    execute()  # a finished run is trained again
    assert calls[5:] == [train, decode, measure]
    failing.add(measure)
    with pytest.raises(run.RunError):
        execute()
    write_grid(folder, overrides={**evaluation, "training.max_steps": 3})
    calls.clear()
    execute()  # other settings
    assert calls == [train, measure]


def test_run_all_trains_the_model_that_a_run_starts_from_first(folder, monkeypatch):
    grid = read_grid(write_grid(folder))
    order = []

    def execute(grid, folder, this):
        order.append(this.setting)
        if this.setting == "wrong":
            raise KeyError("value")  # of any kind: the other runs go on
        return line(this.setting, this.seed, curve={"loss": [1.0]}, cpu_seconds=1.0, scores={})

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "made", lambda *_: {})
    runs = [a_run("second", before="first"), a_run("third", before="wrong")]
    runs += [a_run("wrong"), a_run("first")]
    assert run.run_all(grid, folder, runs, 1) == 2
    assert order == ["wrong", "first", "second"]
    assert read_lines(folder)["wrong", 0]["error"] == "KeyError: 'value'"
    message = "it starts from the model of wrong, which failed"
    assert read_lines(folder)["third", 0]["error"] == message


def test_run_all_ends_its_commands_when_it_is_interrupted(folder, monkeypatch):
    (folder.parent / "endless.py").write_text("import time\ntime.sleep(600)")
    log, grid = folder / "log.txt", read_grid(write_grid(folder))
    calls = []

    def execute(*_):
        calls.append(run.in_own_process(["endless"], log, 60))

    def interrupted(*_, **__):
        while not run.RUNNING:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_all(grid, folder, [a_run("plain"), a_run("fast")], 1)
    assert not run.RUNNING and not calls
    assert log.read_text().count("$ python -m endless") == 1  # the one in the queue did not begin


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_runner_ends_its_training_and_frees_its_lock(folder, number):
    path = write_grid(folder, overrides={"training.max_steps": 10**6})
    work = Path("runs/experiments/trial")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.run", str(path)]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.DEVNULL,
        # A shell without job control starts its background commands with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (work / "plain" / "0" / "log.txt").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        with pytest.raises(GridError, match="another command runs"), run.only_runner(work):
            pass
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    finally:  # a training that lived on would take a core from the other tests
        process.terminate()
        process.wait(30)
    with run.only_runner(work):  # a training that lived on would have it
        pass


def test_run_all_ends_a_command_that_starts_while_it_is_interrupted(folder, monkeypatch):
    (folder.parent / "endless.py").write_text("import time\ntime.sleep(600)")
    log, grid = folder / "log.txt", read_grid(write_grid(folder))
    errors = []

    def execute(*_):
        run.ENDING.wait(60)  # the command is not in RUNNING when `end_runs` looks
        time.sleep(0.2)
        try:
            run.in_own_process(["endless"], log, 60)
        except run.RunError as error:
            errors.append(str(error))

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(*args)
            raise KeyboardInterrupt  # before its future is known

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        run.run_all(grid, folder, [a_run("plain")], 1)
    (error,) = errors
    assert f"ended with exit code {-signal.SIGTERM}" in error and not run.RUNNING


def test_runner_looks_up_from_its_waits(folder, monkeypatch):
    # A signal that arrives just before a blocking call does not wake it.
    grid, limits = read_grid(write_grid(folder)), []

    def wait(futures, timeout=None, **more):
        limits.append(timeout)
        return run_wait(futures, timeout, **more)

    def execute(*_):
        deadline = time.monotonic() + 60
        while len(limits) < 3 and time.monotonic() < deadline:  # the third look is while it runs
            time.sleep(0.01)
        return line("plain", 0)

    run_wait = run.wait
    monkeypatch.setattr(run, "wait", wait)
    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "summary", lambda *_: "")
    monkeypatch.setattr(run, "made", lambda *_: {})
    assert run.run_all(grid, folder, [a_run("plain")], 1) == 0
    assert len(limits) > 2 and set(limits) == {run.SECONDS_TO_LOOK}


def test_unfinished_skips_equal_settings_and_repeats_failed_runs():
    lines = {("done", 0): line("done", 0), ("failed", 0): line("failed", 0, error="limit")}
    runs = [a_run("done"), a_run("done", 1), a_run("failed")]
    todo = run.unfinished(runs, lines, [{"data": "1"}] * 3, again=False)
    assert todo == runs[1:]


@pytest.mark.parametrize(
    ("settings", "data", "message"), [("b", "1", "data: done 0. "), ("a", "2", r"done 0 \(data\)")]
)
def test_unfinished_refuses_changed_settings_or_data_unless_again(settings, data, message):
    arguments = [a_run("done", 0, settings)], {("done", 0): line("done", 0)}, [{"data": data}]
    with pytest.raises(GridError, match=message):
        run.unfinished(*arguments, again=False)
    assert run.unfinished(*arguments, again=True) == arguments[0]


def test_unfinished_repeats_a_run_whose_benchmark_has_another_entry():
    lines = {("done", 0): line("done", 0)}  # a line without entries is an old one
    data = [{"data": "1", "benchmark vqa": "1"}]
    assert run.unfinished([a_run("done")], lines, data, again=False) == []
    lines["done", 0]["prepared"] = {"data": "1", "benchmark vqa": "2"}
    with pytest.raises(GridError, match=r"done 0 \(benchmark vqa\)"):
        run.unfinished([a_run("done")], lines, data, again=False)


def test_made_has_the_entry_of_each_benchmark(folder):
    def made() -> dict[str, str]:
        grid = read_grid(path)
        return run.made(grid, grid.run("plain", 0))

    evaluation = {"evaluation.benchmarks": "v.yaml", "evaluation.tasks": ["vqa"]}
    path = write_grid(folder, overrides=evaluation)
    Path("v.yaml").write_text("vqa: {task: vqa}\nother: {task: vqa}")
    first = made()
    assert first.keys() == {"benchmark vqa"}
    Path("v.yaml").write_text("vqa: {task: vqa}\nother: {task: no}")
    assert made() == first
    Path("v.yaml").write_text("vqa: {task: vqa, query: What}")
    assert made() != first


def test_read_lines_takes_the_last_line_of_a_run_and_names_a_torn_one(tmp_path):
    for loss in (2, 1):
        append_line(tmp_path, line("done", 0, loss=loss, text="a\u2028b"))
    assert read_lines(tmp_path)["done", 0]["loss"] == 1
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"setting": "do')
    append_line(tmp_path, line("next", 0))  # on a line of its own
    with pytest.raises(ValueError, match="results.jsonl: line 3 is not a result; delete it"):
        read_lines(tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().split("\n")
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:2] + lines[3:]))
    assert [*read_lines(tmp_path)] == [("done", 0), ("next", 0)]
    incomplete = line("next", 1)
    del incomplete["prepared"]
    append_line(tmp_path, incomplete)
    with pytest.raises(ValueError, match="results.jsonl: line 4 is not a result"):
        read_lines(tmp_path)


def test_only_runner_refuses_a_second_one(tmp_path):
    refused = pytest.raises(GridError, match="trial: another command runs this grid")
    with run.only_runner(tmp_path / "trial"), refused, run.only_runner(tmp_path / "trial"):
        pass
    with run.only_runner(tmp_path / "trial"):
        pass


@pytest.mark.slow
def test_in_own_process_measures_and_reports_failure_and_limit(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    assert run.in_own_process(["this"], log, 60) < 10
    with pytest.raises(run.RunError, match="json.tool ended with exit code 2; see .*unrecognized"):
        run.in_own_process(["json.tool", "--nothing"], log, 60)
    endless = tmp_path / "endless.py"
    endless.write_text("while True: pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(run.RunError, match="endless reached its limit of 1 CPU-seconds"):
        run.in_own_process(["endless"], log, 1)


@pytest.mark.slow
def test_grid_runs_once_and_its_report_is_that_of_the_results(folder, monkeypatch, capsys):
    calls = []

    def here(words: list[str], log: Path, cpu_seconds: int) -> float:
        calls.append(words[0])
        importlib.import_module(words[0]).main(words[1:])
        return 1.5

    monkeypatch.setattr(run, "in_own_process", here)
    rows = folder.parent / "rows.jsonl"
    entry = {"task": "retrieval", "description": "tiny", "rows": str(rows), "query": "what ?"}
    (folder / "val.yaml").write_text(yaml.safe_dump({"tiny_val": entry}))
    evaluation = {
        "evaluation.benchmarks": str(folder / "val.yaml"),
        "evaluation.tasks": ["tiny_val"],
    }
    path = write_grid(folder, seeds=[0], overrides=GRID["overrides"] | evaluation)
    assert run.main([str(path)]) == 0
    assert calls == ["training.train", "eval.evaluate"] * 2
    lines = read_lines(folder)
    assert lines["fast", 0]["curve"]["step"] == [1, 2]
    assert lines["fast", 0]["rows"] == 4
    assert lines["fast", 0]["trainable_parameters"] > 0
    assert any(name.startswith("tiny_val ") for name in lines["fast", 0]["items"])
    assert not list((folder.parent / "runs").rglob("*.safetensors"))
    assert run.main([str(path)]) == 0  # nothing is left
    assert len(calls) == 4
    (folder / "README.md").write_text(f"# Trial\n\n{report.BEGIN}\n{report.END}\n\nAfter.\n")
    with pytest.raises(report.ReportError, match="Run experiments.report"):
        report.main([str(folder), "--check"])
    report.main([str(folder)])
    report.main([str(folder), "--check"])
    text = (folder / "README.md").read_text()
    assert "| plain → fast | 1 |" in text and text.endswith("After.\n")
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(lines["fast", 0] | {"cpu_seconds": 9.0}) + "\n")
    with pytest.raises(report.ReportError, match="not of these results"):
        report.main([str(folder), "--check"])
