"""Long streams to watch: `python -m training.demo_data.streams`.

BabyAI episodes one after the other, cut without a pause: the agent reaches a goal, perhaps a
second one, and stands in another room. What is written to the output folder:

- `{split}_NNN.mp4`: a stream of 40 episodes, 64x64 pixels at 5 frames a second.
- `{split}_streams.jsonl`: a stream per line with its timed annotations, `{"video": ...,
  "events": [{"time": seconds, "text": ...}, ...]}`: what was done, at the moment it was done.
  `eval/tasks/selective_decoding.py` reads such files, of any video.
- `{split}_moments.jsonl`: windows of them, each with what is told of the moment nearest to its
  middle, and of the one before (`previous`). `training/recipes/babyai_streams.yaml` trains on them.

The streams of a split are made of episodes of that split of the demonstration's data, whose
missions and rooms training never saw.
"""

import argparse
import json
import os
import random
import shutil
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from training.demo_data.babyai import FPS, first_seed, play
from training.demo_data.babyai_splits import NARRATE, events
from training.demo_data.writing import write_clip, write_jsonl

# Raised whenever the same arguments would give other streams than before.
GENERATOR_VERSION = 1
STREAMS = {"train": 100, "val": 8, "test": 20}
EPISODES = 40  # of a stream: about 100 seconds
WINDOW = 8  # frames: as many as most goals take
WINDOWS_PER_EVENT = 2


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.demo_data.streams")
    parser.add_argument("--output", type=Path, default=Path("data/streams"))
    parser.add_argument("--train", type=int, default=STREAMS["train"], help="streams to train on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    manifest = args.output / "manifest.json"
    sizes = STREAMS | {"train": args.train}
    wanted = {"generator_version": GENERATOR_VERSION, **sizes}
    if manifest.exists() and json.loads(manifest.read_text())["arguments"] == wanted:
        print(f"{args.output} already holds these streams.")
        return

    # The manifest comes last: without one, whatever is there is unfinished.
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    counts = {}
    with Pool(args.workers) as pool:
        for split, size in sizes.items():
            done = pool.imap(partial(record, args.output, split), range(size))
            rows = list(tqdm(done, f"{split} streams", size))
            write_jsonl(args.output / f"{split}_streams.jsonl", rows)
            counts[split] = {
                "streams": size,
                "seconds": sum(row["frames"] for row in rows) / FPS,
                "annotations": sum(len(row["events"]) for row in rows),
            }
            moments = [moment for row in rows for moment in moments_of(row)]
            write_jsonl(args.output / f"{split}_moments.jsonl", moments)
            counts[split]["moments"] = len(moments)
    manifest.write_text(json.dumps({"arguments": wanted, "counts": counts}, indent=2) + "\n")
    print(f"Wrote {args.output}; {manifest.name} in it says what it holds.")


def record(folder: Path, split: str, number: int) -> dict:
    """Play 40 episodes, write them as one video, and return its line."""
    places = range(number * EPISODES, (number + 1) * EPISODES)
    episodes = [play(first_seed(split, place)) for place in places]
    name = f"{split}_{number:03d}.mp4"
    write_clip(folder / name, [frame for each in episodes for frame in each.frames], FPS)
    annotations, count = [], 0
    for episode in episodes:
        for event in events(episode):
            annotations.append({**event, "time": round(count / FPS + event["time"], 3)})
        count += len(episode.frames)
    return {"video": name, "fps": FPS, "frames": count, "events": annotations}


def moments_of(stream: dict) -> list[dict]:
    """Windows in which an annotated moment is seen, nearer to the middle than any other."""
    rng = random.Random(stream["video"])
    moments = [round(event["time"] * FPS) for event in stream["events"]]
    ends = [-stream["frames"], *moments, 2 * stream["frames"]]
    texts = ["", *(event["text"] for event in stream["events"])]
    rows = []
    for place, (previous, text) in enumerate(pairwise(texts)):
        before, moment, after = ends[place : place + 3]
        first = range(max(0, moment - WINDOW + 1), min(moment, stream["frames"] - WINDOW) + 1)
        middles = {start: start + (WINDOW - 1) / 2 for start in first}
        near = [
            start
            for start, middle in middles.items()
            if abs(middle - moment) < min(abs(middle - before), abs(middle - after))
        ]
        for start in sorted(rng.sample(near, min(WINDOWS_PER_EVENT, len(near)))):
            rows.append(
                {
                    "video": stream["video"],
                    "start": start / FPS,
                    "end": (start + WINDOW) / FPS,
                    "query": NARRATE,
                    "target": text,
                    "previous": previous,
                }
            )
    return rows


if __name__ == "__main__":
    main()
