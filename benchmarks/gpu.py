"""Everything to measure on a GPU, in one run of at most nine minutes: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --output gpu.jsonl                # one H100 or H200
    python -m benchmarks.gpu --tiny                            # all of it on a CPU, in seconds

It needs no network and no file: weights and batches are random, with the paper's sizes. Every
figure is printed as soon as it is measured, and appended to `--output`, so a run that is cut loses
nothing. A part that fails prints its error, and the next part runs. A part that would not end in
`--minutes` is skipped by name. `python -m benchmarks.report gpu.jsonl` makes tables of the lines.

| part      | measures                                                                          |
|-----------|-----------------------------------------------------------------------------------|
| parity    | GPU against CPU, GradCache against one batch, tiled loss against plain, bf16      |
| train     | steps of the trainer: samples/s, MFU, peak memory against `training.memory`       |
| loss      | InfoNCE, tiled and plain                                                          |
| predict   | Ŝ_Y, against twenty tokens written by a language model of the Predictor's layers  |
| gradcache | a step of 4,096 rows                                                              |
| profile   | the slowest step of `train`: ten longest operations, host waits, idle GPU         |
"""

import argparse
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu_lines import Lines

ROOT = Path(__file__).parents[1]
# Packages that this command imports, itself or by way of datasets, whose versions are those of
# `pyproject.toml`.
NEEDED = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "av", "numpy", "pillow", "tqdm"),
    *("safetensors", "huggingface_hub", "pyyaml", "jinja2", "matplotlib", "filelock", "pyarrow"),
    *("pandas", "dill", "multiprocess", "xxhash"),
)


def faults() -> list[str]:
    """Return a sentence for each package that is missing or has an unsuitable version."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return ["packaging is missing: install it with the other packages."]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["training"]]
    wanted = {each.name: each.specifier for each in map(Requirement, listed)}
    found = []
    for name in NEEDED:
        versions = wanted.get(name, SpecifierSet())
        try:
            installed = version(name)
        except PackageNotFoundError:
            found.append(f"{name} is missing: install {name}{versions}.")
            continue
        if not versions.contains(installed, prereleases=True):
            found.append(f"{name} {installed} is installed: {name}{versions} is needed.")
    return found


def main(argv: list[str] | None = None) -> "Lines":
    since = time.monotonic()  # imports take a part of the minutes too
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which every line is appended")
    parser.add_argument("--minutes", type=float, default=9.0, help="parts beyond it are skipped")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names of parts")
    args = parser.parse_args(argv)
    if found := faults():
        sys.exit("\n".join(found))

    # Not at the top of the file: a missing package would end it before `faults` can name it.
    import torch

    from benchmarks import gpu_parts
    from benchmarks.gpu_lines import Lines, run_parts

    if not args.tiny and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: run on a GPU, or on a CPU with --tiny.")
    device = torch.device("cpu" if args.tiny else "cuda:0")
    lines = Lines(args.output, gpu_parts.facts(device))
    print(", ".join(f"{name} {value}" for name, value in lines.facts.items()), flush=True)
    with gpu_parts.Lab(device, lines, gpu_parts.TINY if args.tiny else gpu_parts.PAPER) as lab:
        parts = gpu_parts.parts(lab)
        if args.only:
            parts = [part for part in parts if part.name.startswith(tuple(args.only))]
        run_parts(parts, lines, since + 60 * args.minutes)
    print(f"failed: {', '.join(lines.failed) or 'none'}", flush=True)
    print(f"skipped: {', '.join(lines.skipped) or 'none'}", flush=True)
    return lines


if __name__ == "__main__":
    sys.exit(1 if main().failed else 0)
