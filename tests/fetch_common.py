"""Download the common tests of the installed transformers: `python -m tests.fetch_common`."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

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


if __name__ == "__main__":
    print(fetch())
