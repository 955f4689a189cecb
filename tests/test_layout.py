"""Who may import whom, and what the Hub asks of files that it ships without this repository.

It copies the files that an entry file names as `from .sibling import ...` into one flat folder,
and reports any other import that is missing as a package to install.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [
    path
    for folder in ("modeling_vljepa", "modeling_vljepa/pipelines", "processing")
    for path in sorted((ROOT / folder).glob("[!_]*.py"))
]
OWN = {"modeling_vljepa", "processing", "training", "eval"}
OWN |= {"benchmarks", "experiments", "space", "tests"}
# The parts of `training/`, top first; its commands are the files next to these folders.
TRAINING = ("commands", "decoder", "tokens", "loop", "hub", "model", "data", "arguments")
# fsspec comes with torch.
PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "fsspec"}
OPTIONAL = {"av", "datasets", "filelock", "pyarrow"}  # under `if is_..._available():`
# Home folders and common working folders, none of which a manual would name.
MACHINE_PATH = re.compile(r"(?<![\w.:])/(?:home|Users|root|work|mnt|data|workspace|scratch)/\w")


def imports(code: str) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, and whether the import is guarded by an `if`."""
    tree = ast.parse(code)
    guarded = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in guarded
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), id(node) in guarded


def imported(folder: str) -> set[str]:
    """Top-level packages that the files of a folder import, its own left out."""
    names = {
        name.split(".")[0]
        for path in (ROOT / folder).rglob("*.py")
        for name, _ in imports(path.read_text())
    }
    return names - {"", folder}


def test_imports_are_seen():
    """The positive control of everything below."""
    code = "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nif h:\n    import i\n"
    assert list(imports(code)) == [
        ("a.b", False),
        ("c", False),
        (".", False),
        (".f", False),
        ("i", True),
    ]
    assert {"modeling_vljepa", "processing", "torch"} <= imported("training")


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("modeling_vljepa", {"processing"}),  # to register them together; no shipped file
        ("processing", set()),
        ("training", {"modeling_vljepa", "processing", "eval"}),
        ("space", {"modeling_vljepa", "processing", "training"}),  # training: to make its examples
        ("eval", {"modeling_vljepa", "processing"}),
        ("benchmarks", {"modeling_vljepa", "processing", "training", "eval"}),
        ("experiments", {"modeling_vljepa", "processing", "training", "eval"}),
    ],
)
def test_the_direction_of_imports(folder, allowed):
    assert imported(folder) & OWN <= allowed


def part_of_training(module: str) -> str:
    """The entry of `TRAINING` for a module such as `training.loop.trainer` or `training.train`."""
    name = module.split(".")[1]
    return name if name in TRAINING else "commands"


def upward_imports(module: str, code: str) -> list[str]:
    """Imports of higher parts of `training/`; for a command, imports of other commands too."""
    highest = max(1, TRAINING.index(part_of_training(module)))  # 1: commands share no code
    return [
        f"{module} imports {name}"
        for name, _ in imports(code)
        if name.startswith("training.") and TRAINING.index(part_of_training(name)) < highest
    ]


def test_training_imports_run_downwards():
    for module, name in [  # positive control
        ("training.data.sources", "training.model.recipe_model"),
        ("training.loop.trainer", "training.decoder.texts"),
        ("training.arguments", "training.data"),
        ("training.train", "training.publish"),
    ]:
        assert upward_imports(module, f"from {name} import x") == [f"{module} imports {name}"]
    found, parts = [], set()
    for path in sorted((ROOT / "training").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module != "training.__init__" and "demo_data" not in path.parts:
            parts.add(part_of_training(module))
            found += upward_imports(module, path.read_text(encoding="utf-8"))
    assert found == []
    assert parts == set(TRAINING)


def test_training_demo_data_is_independent_of_the_rest_of_training():
    for path in sorted((ROOT / "training").rglob("*.py")):
        names = {name for name, _ in imports(path.read_text(encoding="utf-8"))}
        demo = {name for name in names if name.startswith("training.demo_data")}
        other = {name for name in names if name.startswith("training.")} - demo
        assert not (other if "demo_data" in path.parts else demo), path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_import_siblings_and_three_packages(path):
    siblings = {sibling.stem for sibling in path.parent.glob("[!_]*.py")}
    for name, guarded in imports(path.read_text()):
        if name.startswith("."):
            assert re.fullmatch(r"\.\w+", name), f"{name}: only `from .sibling import ...` is seen"
            assert name[1:] in siblings
        else:
            package = name.split(".")[0]
            allowed = PACKAGES | set(sys.stdlib_module_names) | (OPTIONAL if guarded else set())
            if path.stem == "st_vljepa":  # which only sentence-transformers loads
                allowed |= {"sentence_transformers"}
            assert package in allowed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_relative_imports_stand_where_the_hub_looks(path):
    """It looks at the beginning of lines, and follows what is named there from file to file."""
    code = path.read_text()
    relative = {name[1:] for name, _ in imports(code) if name.startswith(".")}
    assert relative == set(re.findall(r"^from \.(\w+) import", code, flags=re.MULTILINE))


def test_shipped_files_have_names_of_their_own():
    names = [path.name for path in SHIPPED]
    assert len(names) > 8
    assert len(set(names)) == len(names)


def tracked() -> list[Path]:
    """The repository's files: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_somebodys_machine():
    for name, rest in product(("home", "work"), ("/me/x", "/main")):  # positive control
        assert MACHINE_PATH.search(f"see /{name}{rest}")
    found, read = [], 0
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        read += 1
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in MACHINE_PATH.findall(text)]
    assert read > 30
    assert found == []
