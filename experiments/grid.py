"""Grids of trainings: a base recipe, settings that change it, and their preparations.

A grid is a YAML file, `experiments/NAME/grid.yaml`:

| key           | value                                                                           |
|---------------|---------------------------------------------------------------------------------|
| `recipe`      | the base recipe                                                                 |
| `seeds`       | values of `training.seed`                                                       |
| `seeds_of`    | settings with fewer of these seeds: `{babyai-plain: [0]}`                       |
| `cpu_minutes` | limit of processor time of a training, and again of its evaluation; default: 10 |
| `overrides`   | changes for every setting: `{training.max_steps: 400}`                          |
| `settings`    | names, each with its own changes                                                |
| `parts`       | YAML anchors for the settings to merge (`<<: *name`); the runner ignores it     |
| `prepare`     | steps that run once: `folder`, `command` and the file `complete`                |
| `groups`      | titles of tables and figures, each with its settings; default: one of all       |
| `compare`     | pairs of settings; the report computes second - first                           |
| `same_loss`   | false if the pairs train different losses, whose values are not to be compared  |
| `scores`      | those to report, such as `babyai_val_vqa accuracy`; default: all                |

A recipe's section `evaluation` names the benchmarks to measure after training. `{seed}` in a text
is the seed: a step whose folder contains it runs for each seed. `{recipe SETTING}` in a command is
the file with a setting's recipe. `{model SETTING}` in a recipe is the model that another setting
trains with the same seed: it is trained first, and its weights are kept.

A setting's changes are keys of its recipe, such as `training.learning_rate`. It may also have keys
of the runner, which `Options` lists; `overrides` may have both for all settings.
"""

import copy
import functools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from eval.benchmarks import read_entries
from eval.yaml_text import parse_yaml
from experiments.results import digest
from training.arguments import (
    EvaluationArguments,
    Recipe,
    RecipeError,
    apply_override,
    check_keys,
    read_recipe,
)
from training.tokens.recipe import read_recipe as read_token_recipe

WORK = Path("runs/experiments")
NAME = re.compile(r"\w[\w.-]*")
RECIPE_OF = re.compile(r"\{recipe ([\w.-]+)\}")
MODEL_OF = re.compile(r"\{model ([\w.-]+)\}")
TRAINERS = {"train": read_recipe, "token_baseline": read_token_recipe}


class GridError(ValueError):
    """An invalid grid; the message names the key, the fault and the cure."""


def is_named(folder: str, texts: list[str]) -> bool:
    """Return whether one of the texts names a folder, not as a part of another name.

    init-2 is not init-2-calibrated. A path may begin with `./` or with the working directory.
    """
    name = re.compile(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])")
    return any(name.search(relative(text)) for text in texts)


def relative(text: str) -> str:
    """Return a text whose paths have no working directory, no `./` and no double slash."""
    text = text.replace(f"{Path.cwd()}/", "")
    return re.sub(r"(?<![\w.])\./|(?<=[^:/]/)/+", "", text)


def as_text(value: Any) -> str:
    """Return a YAML value as a text in which its folders can be looked for."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Step:
    """A preparation that runs once.

    Attributes:
        folder (`str`): the folder that it makes; recipes and later steps name it.
        command (`str`): begins with `python -m`.
        complete (`str`): file in `folder` that it writes last.
    """

    folder: str
    command: str
    complete: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of a setting that the runner reads; none of them has a dot.

    Attributes:
        trainer (`str`): `train`, or `token_baseline` for the model that predicts tokens.
        decoder (`str`, *optional*): recipe of `training.train_decoder`. It trains a Y-Decoder on
            the trained model, and both are evaluated together.
        more_tasks (`list[str]`): benchmarks to measure besides `evaluation.tasks`, which training
            checks: those that need the Y-Decoder.
        cached (`bool`): the evaluation reads `data.features`, too, which then has its clips.
        validation (`list[str]`): benchmarks of validation data, on which the form of a token
            model's likelihood is chosen for each kind; TEST=NAME for the benchmark TEST alone.
        validation_benchmarks (`str`, *optional*): the file of their entries.
    """

    trainer: str = "train"
    decoder: str | None = None
    more_tasks: list = field(default_factory=list)
    cached: bool = False
    validation: list = field(default_factory=list)
    validation_benchmarks: str | None = None

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise GridError(f"trainer: {self.trainer!r} is not one of {', '.join(TRAINERS)}.")
        if self.validation and self.validation_benchmarks is None:
            raise GridError("validation: give validation_benchmarks, the file of its entries, too.")


@dataclass(frozen=True)
class Run:
    """One training: a setting with a seed.

    Attributes:
        setting (`str`), seed (`int`)
        overrides (`dict[str, Any]`): changes to the base recipe, without those of all settings.
        recipe (`dict`): the whole recipe.
        folder (`Path`): where it trains.
        settings (`str`): hash of everything that decides the result except data files and code.
        options (`Options`): how it is trained and evaluated.
        before (`str`, *optional*): the setting whose model it starts from.
    """

    setting: str
    seed: int
    overrides: dict[str, Any]
    recipe: dict
    folder: Path
    settings: str
    options: Options = field(default_factory=Options)
    before: str | None = None

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self) -> Recipe:
        """Write the recipe to its file, and return it checked.

        Raises:
            RecipeError: see `read_recipe`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe_file.write_text(yaml.safe_dump(self.recipe, sort_keys=False), encoding="utf-8")
        try:
            return TRAINERS[self.options.trainer](str(self.recipe_file))
        except RecipeError as error:
            raise RecipeError(f"{self.setting}: {error}") from error


@dataclass(kw_only=True)
class Grid:
    """A grid as in its file, with the name of its folder."""

    name: str
    recipe: str
    seeds: list[int]
    settings: dict
    cpu_minutes: float = 10
    overrides: dict = field(default_factory=dict)
    seeds_of: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)
    prepare: list = field(default_factory=list)
    groups: dict = field(default_factory=dict)
    compare: list = field(default_factory=list)
    same_loss: bool = True
    scores: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in self.settings:
            # YAML reads 0.1 as a number and `on` as true; in quotes both are names.
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise GridError(
                    f"settings: {name!r}: give a name of letters, digits, '.', '_' and '-'; put a "
                    "number or a word such as on into quotes."
                )
            self.settings[name] = self.settings[name] or {}
            if not isinstance(self.settings[name], dict):
                raise GridError(f"settings: {name}: {self.settings[name]!r} is not a mapping.")
            for key in self.settings[name]:
                if not isinstance(key, str):
                    raise GridError(f"settings: {name}: {key!r} is not the name of a setting.")
        if not self.settings or not self.seeds:
            raise GridError("settings and seeds: give at least one of each.")
        if not 0 < self.cpu_minutes < math.inf:
            raise GridError(f"cpu_minutes: {self.cpu_minutes} is not a positive number.")
        for title, names in self.groups.items():
            if not isinstance(title, str):
                raise GridError(f"groups: {title!r}: put the title into quotes.")
            if not isinstance(names, list):
                raise GridError(f"groups: {title}: {names!r} is not a list of settings.")
        for pair in self.compare:
            if not isinstance(pair, list) or len(pair) != 2:
                raise GridError(f"compare: {pair} is not a pair of settings.")
        self.groups = self.groups or {"All settings": list(self.settings)}
        named = [name for group in self.groups.values() for name in group]
        named += [name for pair in self.compare for name in pair]
        for name in named:
            self.check_setting("groups and compare", name)
        for name, seeds in self.seeds_of.items():
            self.check_setting("seeds_of", name)
            if not isinstance(seeds, list) or not seeds or any(s not in self.seeds for s in seeds):
                raise GridError(f"seeds_of: {name}: {seeds} are not some of the seeds.")
        for name in self.settings:
            if (first := self.before(name)) is None:
                continue
            own, its = (self.seeds_of.get(each, self.seeds) for each in (name, first))
            if missing := set(own) - set(its):
                raise GridError(
                    f"seeds_of: {name} starts from {first}, which is left out for seed "
                    f"{min(missing)}."
                )

    def check_setting(self, where: str, name: str) -> None:
        """Raise `GridError` if the grid lacks a setting."""
        if name not in self.settings:
            raise GridError(
                f"{where}: {name!r}: no such setting; there are {', '.join(self.settings)}."
            )

    def steps(self, seed: int) -> list[Step]:
        """Return the preparations for a seed, in order."""
        names = {each.name for each in fields(Step)}
        steps = []
        for given in self.prepare:
            is_step = isinstance(given, dict) and set(given) == names
            if not is_step or not all(isinstance(value, str) for value in given.values()):
                raise GridError(
                    f"prepare: give {', '.join(sorted(names))}, each a text; found {given}."
                )
            step = Step(**with_seed(given, seed))
            step = replace(step, folder=relative(os.path.normpath(step.folder)))
            if step.folder in [each.folder for each in steps]:
                raise GridError(f"prepare: two steps make {step.folder}; give one.")
            for setting in RECIPE_OF.findall(step.command):
                self.check_setting("prepare", setting)
            if step.command.split()[:2] != ["python", "-m"]:
                raise GridError(f"prepare: {step.command!r} does not begin with python -m.")
            steps.append(step)
        return steps

    def needed(self, recipe: dict, seed: int, options: Options | None = None) -> list[Step]:
        """Return the steps whose folders a recipe or its benchmarks name, and those that these
        need, in order.

        Raises:
            GridError: there is no such benchmark.
        """
        options, needed = options or Options(), []
        texts = [as_text(recipe), *map(as_text, benchmarks(recipe, options).values())]
        if options.decoder is not None:
            texts.append(as_text(yaml_of("decoder", options.decoder)))
        for step in reversed(self.steps(seed)):
            if is_named(step.folder, texts):
                needed.append(step)
                texts += self.texts_of(step, seed)
        return needed[::-1]

    def texts_of(self, step: Step, seed: int) -> list[str]:
        """Return the texts that name the folders which a step needs: its command and recipes.

        Raises:
            GridError: the command names a YAML file that cannot be read.
        """
        try:
            words = shlex.split(step.command)
        except ValueError as error:
            raise GridError(f"prepare: {step.command!r}: {error}.") from error
        files = [word for word in words if word.endswith(".yaml")]
        # A step may write such a file, and then it cannot be read yet.
        made = tuple(f"{each.folder}/" for each in self.steps(seed))
        recipes = [yaml_of("prepare", each) for each in files if not is_in(each, made)]
        recipes += [self.recipe_of(each, seed) for each in RECIPE_OF.findall(step.command)]
        return [step.command, *map(as_text, recipes)]

    def recipe_of(self, setting: str, seed: int) -> dict:
        """Return the whole recipe of a setting with a seed.

        Raises:
            RecipeError: a change has no place in the recipe.
        """
        recipe = yaml_of("recipe", self.recipe)
        changes = {**self.overrides, **self.settings[setting]}
        changes = {key: value for key, value in changes.items() if is_of_recipe(key)}
        changes |= {
            "training.seed": seed,
            "training.output_dir": str(self.folder_of(setting, seed) / "model"),
        }
        for key, value in with_seed(changes, seed).items():
            if isinstance(value, str):
                value = MODEL_OF.sub(lambda match: str(self.model_of(match[1], seed)), value)
            apply_override(recipe, f"{key}={yaml.safe_dump(value)}")
        return recipe

    def options_of(self, setting: str, seed: int) -> Options:
        """Return how a setting is trained and evaluated.

        Raises:
            GridError: an unknown key, or a value of another type.
        """
        given = {**self.overrides, **self.settings[setting]}
        given = {key: value for key, value in given.items() if not is_of_recipe(key)}
        try:
            return Options(**check_keys(with_seed(given, seed), Options, ""))
        except (GridError, RecipeError) as error:
            raise GridError(f"{setting}: {error}") from error

    def before(self, setting: str) -> str | None:
        """Return the setting whose model a setting starts from, if there is one.

        Raises:
            GridError: it starts from more than one, or from one that the grid lacks or that
                starts from a third.
        """
        found = set(MODEL_OF.findall(as_text({**self.overrides, **self.settings[setting]})))
        if not found:
            return None
        first, *others = found
        if others:
            raise GridError(f"{setting}: it names {len(found)} models of settings; name one.")
        self.check_setting(f"{setting}: model", first)
        if MODEL_OF.search(as_text(self.settings[first])):
            raise GridError(f"{setting}: {first} starts from a model itself; two stages at most.")
        return first

    @property
    def kept(self) -> set[str]:
        """The settings whose weights are kept, because another setting starts from them."""
        return {self.before(setting) for setting in self.settings} - {None}

    def model_of(self, setting: str, seed: int) -> Path:
        """Return the folder of a setting's trained model."""
        return self.folder_of(setting, seed) / "model"

    def folder_of(self, setting: str, seed: int) -> Path:
        return WORK / self.name / setting / str(seed)

    def run(self, setting: str, seed: int) -> Run:
        recipe, options = self.recipe_of(setting, seed), self.options_of(setting, seed)
        before = self.before(setting)
        decides = copy.deepcopy(recipe)
        del decides["training"]["output_dir"]
        commands = [step.command for step in self.needed(recipe, seed, options)]
        parts = [decides, commands]
        if options != Options():
            parts.append(asdict(options))
        if options.decoder is not None:
            parts.append(yaml_of("decoder", options.decoder))
        if before is not None:
            parts.append(self.run(before, seed).settings)
        settings = digest(json.dumps(parts, sort_keys=True).encode())
        folder, changes = self.folder_of(setting, seed), self.settings[setting]
        return Run(setting, seed, changes, recipe, folder, settings, options, before)

    def runs(self, only: list[str] | None = None, seeds: list[int] | None = None) -> Iterator[Run]:
        """Yield the runs, all settings of the first seed first, and each after the run that it
        starts from.

        Args:
            only: names of settings; those that they start from are added.
            seeds: instead of the grid's.
        """
        for name in only or []:
            self.check_setting("--only", name)
        named = [each for name in only or self.settings for each in (self.before(name), name)]
        for seed in self.seeds if seeds is None else seeds:
            for setting in dict.fromkeys(named):
                left_out = seeds is None and seed not in self.seeds_of.get(setting, self.seeds)
                if setting is not None and not left_out:
                    yield self.run(setting, seed)


def is_of_recipe(key: str) -> bool:
    """Return True for a key of a recipe, which has a dot, and False for one of `Options`."""
    return "." in key


def is_in(path: str, folders: tuple[str, ...]) -> bool:
    return relative(os.path.normpath(path)).startswith(folders)


def benchmarks(recipe: dict, options: Options | None) -> dict[str, dict]:
    """Return the entries of the benchmarks of a recipe and of its options.

    Those of validation data have "validation " before their names.

    Raises:
        GridError: there is no such benchmark.
    """
    evaluation, options = recipe.get("evaluation") or {}, options or Options()
    tasks = [*(evaluation.get("tasks") or []), *options.more_tasks]
    entries = {}
    for path, names, prefix in (
        (evaluation.get("benchmarks", EvaluationArguments.benchmarks), tasks, ""),
        (
            options.validation_benchmarks,
            [name.rpartition("=")[2] for name in options.validation],
            "validation ",
        ),
    ):
        if not names:
            continue
        is_folder = Path(path).is_dir()
        known = read_entries(Path(path)) if is_folder else yaml_of("benchmarks", path)
        if unknown := [name for name in names if name not in known]:
            raise GridError(f"benchmarks: {path} has no {', '.join(unknown)}.")
        entries |= {f"{prefix}{name}": known[name] for name in names}
    return entries


def yaml_of(key: str, path: str) -> Any:
    """Return the content of a YAML file that a grid names.

    Raises:
        GridError: it is missing, or not a YAML file of a mapping.
    """
    if not Path(path).is_file():
        raise GridError(f"{key}: {path} is not a file; the command runs in the repository.")
    try:
        content = copy.deepcopy(parsed(Path(path).read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise GridError(f"{key}: {path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise GridError(f"{key}: {path} is empty or not a mapping.")
    return content


@functools.cache
def parsed(text: str) -> Any:
    """Return a YAML text's content; each of a grid's runs reads the same few files."""
    return parse_yaml(text)


def with_seed(value: Any, seed: int) -> Any:
    """Return a copy of a YAML value with the seed in place of `{seed}` in its texts."""
    if isinstance(value, dict):
        return {key: with_seed(each, seed) for key, each in value.items()}
    if isinstance(value, list):
        return [with_seed(each, seed) for each in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def read_grid(path: Path) -> Grid:
    """Read a grid from its file.

    Raises:
        GridError: it is missing, not YAML, or has an unknown or missing key.
    """
    if not path.is_file():
        raise GridError(f"{path}: no such grid.")
    given, name = yaml_of("grid", str(path)), path.resolve().parent.name
    own = path.with_name("recipe.yaml")
    try:
        grid = Grid(**check_keys({"name": name} | given, Grid, ""))
        if own.is_file() and not (Path(grid.recipe).is_file() and own.samefile(grid.recipe)):
            raise GridError(f"recipe: {grid.recipe} is not the {own} of this grid. Name that one.")
        return grid
    except (GridError, RecipeError) as error:
        raise GridError(f"{path}: {error}") from error


__all__ = [
    "RECIPE_OF",
    "WORK",
    "Grid",
    "GridError",
    "Options",
    "Run",
    "Step",
    "as_text",
    "benchmarks",
    "read_grid",
]
