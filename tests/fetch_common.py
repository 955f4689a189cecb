"""Download the common tests of the installed transformers: `python -m tests.fetch_common`."""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers

FOLDER = Path(sys.prefix) / f"transformers-{transformers.__version__}-tests"
# Modules of the suite that the common tests import but do not need here.
STUBS = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch() -> Path:
    """Download the source distribution and store its common tests in the environment.

    Returns: their folder, which is reused if it exists.
    """
    if FOLDER.is_dir():
        return FOLDER
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--dest", folder]
        package = ["--no-binary", ":all:", f"transformers=={transformers.__version__}"]
        subprocess.run([sys.executable, "-m", "pip", *download, *package], check=True)
        unpacked = Path(folder) / "unpacked"
        with tarfile.open(next(Path(folder).glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        tests = next(unpacked.iterdir()) / "tests"
        for path in tests.glob("*.py"):
            target = FOLDER.with_suffix(".part") / "tests" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    part = FOLDER.with_suffix(".part")
    for name, code in STUBS.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).parent.joinpath("__init__.py").touch()
        (part / name).write_text(code)
    (part / "tests" / "__init__.py").touch()
    return part.rename(FOLDER)


def upstream(module: str) -> ModuleType:
    """Import a module of transformers' test suite, a package named `tests` like this one.

    The tests of the caller's module are skipped if the suite was not fetched.
    """
    if not FOLDER.is_dir():
        pytest.skip(
            "transformers' own tests are missing: fetch them with `make env` or "
            "`python -m tests.fetch_common`",
            allow_module_level=True,
        )
    # Run their slow tests too; tests still skipped need other hardware.
    os.environ["RUN_SLOW"] = "1"
    # The import needs the name, so this suite's modules give it up until the import is done.
    own = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tests"
    }
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(f"tests.{module}")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.update(own)


if __name__ == "__main__":
    print(fetch())
