"""Write Ego-Exo4D's atomic descriptions as annotated streams, for
`eval/tasks/selective_decoding.py`.

    egoexo -o DOWNLOADS --parts metadata annotations downscaled_takes/448
    python -m eval.egoexo4d DOWNLOADS --split val --output data/egoexo4d_val.jsonl

A stream is the video of the camera wearer of a take. The domains are those of the paper's section
4.6: cooking, bike repair and health, which are procedures. The annotations are those of the first
annotator whose work was not rejected. Layout and keys are documented at docs.ego-exo4d-data.org
(metadata, downscaled takes, atomic descriptions).
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from processing.output import check_output_file, writing

PROCEDURES = ("Cooking", "Bike Repair", "Health")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.egoexo4d", description=__doc__)
    parser.add_argument("downloads", type=Path, help="the egoexo command's folder, its -o")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument(
        "--domains", nargs="+", default=PROCEDURES, help="parent_task_name of takes"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    return parser.parse_args(argv)


def video_of(take: dict, downloads: Path) -> Path | None:
    """Return the camera wearer's video: the downscaled one if it exists, else the original."""
    for streams in take["frame_aligned_videos"].values():
        if "rgb" in streams:
            path = downloads / take["root_dir"] / streams["rgb"]["relative_path"]
            small = path.parent / "downscaled" / "448" / path.name
            return next((each for each in (small, path) if each.is_file()), None)
    return None


def events_of(annotations: list[dict]) -> list[dict]:
    """Return the events of the first annotator whose work was not rejected; [] if all were."""
    for annotation in annotations:
        if not annotation["rejected"]:
            return [
                {"time": each["timestamp"], "text": each["text"].strip()}
                for each in annotation["descriptions"]
                if each["text"].strip()
            ]
    return []


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_output_file("--output", args.output)
    named = args.downloads / "annotations" / f"atomic_descriptions_{args.split}.json"
    takes = json.loads((args.downloads / "takes.json").read_text(encoding="utf-8"))
    annotations = json.loads(named.read_text(encoding="utf-8"))["annotations"]
    left_out: Counter[str] = Counter()
    rows = []
    for take in takes:
        if take["take_uid"] not in annotations:
            continue
        video, events = video_of(take, args.downloads), events_of(annotations[take["take_uid"]])
        if take["parent_task_name"] not in args.domains:
            left_out["takes of other domains"] += 1
        elif not events:
            left_out["takes without an accepted annotation"] += 1
        elif video is None:
            left_out["takes whose video was not downloaded"] += 1
        else:
            path = os.path.relpath(video, args.output.parent)
            rows.append({"video": path, "take": take["take_name"], "events": events})
    if unknown := len(annotations.keys() - {take["take_uid"] for take in takes}):
        left_out["annotated takes that takes.json does not contain"] = unknown
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    if not rows:
        raise ValueError(
            f"no take of {', '.join(args.domains)} can be used, so nothing is written. Download "
            "their videos, or name other --domains."
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(lines, encoding="utf-8")
    count = sum(len(row["events"]) for row in rows)
    print(f"{args.output}: {len(rows)} streams, {count} annotations")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
