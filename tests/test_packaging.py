"""The distribution: the contents of its wheel, its requirements, one version in all files."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from importlib.metadata import packages_distributions

import pytest
import yaml

import modeling_vljepa
import processing
from tests.test_layout import OWN, ROOT, imported

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ["modeling_vljepa", "modeling_vljepa/pipelines", "processing"]


def distribution(requirement: str) -> str:
    """Return the normalised name of a requirement such as `PyYAML>=6`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", requirement)[0]).lower()


def declared(*extras: str) -> set[str]:
    """Return the distributions of the dependencies and of some extras, and of extras they name."""
    requirements = [*PROJECT["dependencies"]]
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    names = {distribution(each) for each in requirements}
    for each in requirements:
        if distribution(each) == PROJECT["name"]:
            names |= declared(*re.search(r"\[(.+)\]", each)[1].split(","))
    return names - {PROJECT["name"]}


@pytest.fixture(scope="module")
def installed() -> Mapping[str, list[str]]:
    """The distributions that install each top-level module of this environment."""
    return packages_distributions()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built from a copy: setuptools writes into the folder that it builds from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in OWN:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    # Neither an isolated build nor a dependency: both would be downloaded.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source)]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)]
    subprocess.run(command, check=True)
    [path] = source.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_two_packages_with_their_types_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = [path for each in PACKAGES for path in (ROOT / each).glob("*.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in modules}
    assert files == expected | {"modeling_vljepa/py.typed", "processing/py.typed"}
    assert len(expected) > 25  # positive control: the folders hold modules


def test_wheel_metadata_states_name_python_and_licence(wheel):
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = message_from_bytes(wheel.read(metadata))
    assert fields["Name"] == "open-vljepa"
    assert fields["Version"] == processing.__version__
    assert fields["Requires-Python"] == PROJECT["requires-python"]
    assert fields["License-Expression"] == "Apache-2.0"


def test_version_is_the_same_in_all_files():
    """The wheel's version is compared with `processing.__version__` above."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    versions = {modeling_vljepa.__version__, citation["version"], released[0]}
    assert versions == {processing.__version__}


@pytest.mark.parametrize(
    ("folder", "extras", "optional"),
    [
        ("modeling_vljepa", [], {"sentence-transformers"}),  # loads one file of this package itself
        ("processing", [], set()),
        ("eval", ["training", "mteb"], set()),
        ("training", ["training", "demo", "pictures", "export"], set()),
        ("space", ["training", "app"], set()),
        ("tests", ["dev"], {"selenium", "mteb"}),  # `make app-test` installs it; some are skipped
        ("benchmarks", ["dev"], {"torchcodec"}),  # its file states how to install it
    ],
)
def test_imports_are_declared_as_dependencies(installed, folder, extras, optional):
    modules = imported(folder) - OWN - set(sys.stdlib_module_names)
    names = {distribution(installed.get(module, [module])[0]) for module in modules}
    assert names - optional <= declared(*extras)


def test_dependencies_are_imported_by_an_installed_package(installed):
    modules = imported("modeling_vljepa") | imported("processing")
    names = {distribution(name) for module in modules for name in installed.get(module, [])}
    assert declared() <= names


def test_requirements_of_the_space_are_those_of_the_project():
    """A Space reads `requirements.txt` only."""
    lines = set((ROOT / "space" / "requirements.txt").read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    assert lines <= {*PROJECT["dependencies"], *extras["training"]}
    assert {"torch", "transformers"} <= {distribution(line) for line in lines}
