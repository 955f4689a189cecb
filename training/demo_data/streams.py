"""Make long streams to watch: `python -m training.demo_data.streams`.

A stream is BabyAI episodes joined without a pause: the agent reaches one goal or two, and the next
frame shows another room. The output folder contains:

- `{split}_NNN.mp4`: a stream of 40 episodes, 64 x 64 pixels at 5 frames per second.
- `{split}_streams.jsonl`: a stream per line with its timed annotations, `{"video": ...,
  "events": [{"time": seconds, "text": ...}, ...]}`: each reached goal and its time.
  `eval/tasks/selective_decoding.py` reads such files, for any video.
- `{split}_moments.jsonl`: windows of the streams. The target of a window is the annotation nearest
  to its middle; `previous` is the annotation before that. `training/recipes/babyai_streams.yaml`
  trains on them.

The streams of a split consist of episodes of that split of the demonstration data, so training
never sees the rooms of `val` and `test`.
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

# To be raised whenever the same arguments give other streams than before.
GENERATOR_VERSION = 1
STREAMS = {"train": 100, "val": 8, "test": 20}
EPISODES = 40  # per stream: about 100 seconds
WINDOW = 8  # frames: most goals take no more
WINDOWS_PER_EVENT = 2


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.demo_data.streams")
    parser.add_argument("--output", type=Path, default=Path("data/streams"))
    parser.add_argument("--train", type=int, default=STREAMS["train"], help="streams for training")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    manifest = args.output / "manifest.json"
    sizes = STREAMS | {"train": args.train}
    wanted = {"generator_version": GENERATOR_VERSION, **sizes}
    if manifest.exists() and json.loads(manifest.read_text())["arguments"] == wanted:
        print(f"{args.output} already contains these streams.")
        return

    # The manifest is written last, so a folder without one is unfinished.
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
    print(f"Wrote {args.output}; see {manifest} for its contents.")


def record(folder: Path, split: str, number: int) -> dict:
    """Play 40 episodes, write them as one video, and return its row."""
    indices = range(number * EPISODES, (number + 1) * EPISODES)
    episodes = [play(first_seed(split, index)) for index in indices]
    name = f"{split}_{number:03d}.mp4"
    write_clip(folder / name, [frame for each in episodes for frame in each.frames], FPS)
    annotations, count = [], 0
    for episode in episodes:
        for event in events(episode):
            annotations.append({**event, "time": round(count / FPS + event["time"], 3)})
        count += len(episode.frames)
    return {"video": name, "fps": FPS, "frames": count, "events": annotations}


def moments_of(stream: dict) -> list[dict]:
    """Return windows that contain an annotated moment, nearer to the middle than any other."""
    rng = random.Random(stream["video"])
    moments = [round(event["time"] * FPS) for event in stream["events"]]  # frames
    # The first and the last have no neighbour on one side: a moment too far away to be nearer.
    padded = [-stream["frames"], *moments, 2 * stream["frames"]]
    texts = ["", *(event["text"] for event in stream["events"])]
    rows = []
    for index, (previous, text) in enumerate(pairwise(texts)):
        before, moment, after = padded[index : index + 3]
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
