"""Make `space/examples` from the demo's BabyAI clips, for models that its recipe has trained:

    python -m space.make_examples runs/demo-seed0/sft runs/demo-seed1/sft runs/demo-seed2/sft

For each type of question, the example is the first validation clip that every model answers right
among the example's candidates. The test accuracy of the type, the mean over the models, is stored
beside it, because a chosen clip says nothing about how often a model is right. The app shows the
examples, and `training.publish --example space/examples/examples.jsonl` shows them on a card.

The number in a clip's name is the seed of its episode (`training.demo_data.babyai.play`). The image
is the room before the first step. The long video is a chain of test missions, each in another room.
"""

import json
import shutil
import sys
from pathlib import Path

import av
from PIL import Image
from transformers import AutoModel, AutoProcessor

import modeling_vljepa  # noqa: F401  makes VL-JEPA known to AutoModel and AutoProcessor
from space.ask import EXAMPLES, Asker
from training.demo_data.babyai import play
from training.demo_data.babyai_splits import NARRATE

DATA = Path("data/demo/babyai")
CANDIDATES = {
    "what": ["the purple key", "the grey box", "the green key", "the red ball", "the blue box"],
    "action": ["went to it", "moved it", "picked it up", "nothing"],
    "count": ["zero", "one", "two", "three", "four"],
    "color": ["grey", "blue", "green", "red", "purple", "yellow"],
    "exists": ["yes", "no"],
}
IMAGE = "count"  # type of the question about an image
BENCHMARK = "babyai_vqa"  # of the test clips
CHAIN = (
    "test_2000001100",
    "test_2000002600",
    "test_2000004000",
    "test_2000004200",
    "test_2000005700",
    "test_2000007100",
    "test_2000008000",
    "test_2000008600",
)
OTHER_EVENTS = (  # candidates that happen in none of the chain's clips
    "the agent put the red ball next to the grey box",
    "the agent picked up the yellow key",
    "the agent went to the purple ball",
)


def join(clips: list[Path], path: Path) -> list[float]:
    """Join videos of one size and frame rate; the frames are encoded again.

    Returns: the second at which each begins.
    """
    starts = []
    with av.open(path, "w") as joined:
        stream, index = None, 0
        for clip in clips:
            with av.open(clip) as container:
                video = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream("libx264", rate=video.guessed_rate)
                    stream.width, stream.height = video.width, video.height
                    stream.options = {"crf": "18"}
                    # x264's output depends on the number of threads.
                    stream.codec_context.thread_count = 1
                starts.append(round(float(index / video.guessed_rate), 3))
                for frame in container.decode(video):
                    frame.pts, frame.time_base = index, 1 / video.guessed_rate
                    joined.mux(stream.encode(frame))
                    index += 1
        joined.mux(stream.encode())
    return starts


def write_chain() -> None:
    """Write the long video to a folder of its own, because it is not a clip of the library."""
    folder = EXAMPLES / "watch"
    folder.mkdir(exist_ok=True)
    starts = join([DATA / "clips" / f"{clip}.mp4" for clip in CHAIN], folder / "missions.mp4")
    rows = read_lines(DATA / "test_events.jsonl")
    events = {Path(row["video"]).stem: row["events"] for row in rows}
    happened = {event["text"] for clip in CHAIN for event in events[clip]}
    example = {
        "file": "missions.mp4",
        "label": f"{len(CHAIN)} missions, one after the other",
        "query": NARRATE,
        "candidates": sorted({*happened, *OTHER_EVENTS}),
        "events": [
            [round(start + event["time"], 3), event["text"]]
            for start, clip in zip(starts, CHAIN, strict=True)
            for event in events[clip]
        ],
    }
    (folder / "examples.jsonl").write_text(json.dumps(example) + "\n")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def first_image(clip: Path, path: Path) -> None:
    """Write the room of a clip before the first step."""
    frame = play(int(clip.stem.split("_")[1])).frames[0]
    Image.fromarray(frame).save(path, optimize=True)


def all_right(askers: list[Asker], path: Path, example: dict) -> bool:
    """Return whether every model's first answer is the true one."""
    candidates = "\n".join(example["candidates"])
    ranked = (asker.rank(str(path), example["query"], candidates) for asker in askers)
    return all(answers[0][0] == example["target"] for answers in ranked)


def choose(askers: list[Asker], kind: str, rows: list[dict], used: set[str], image: bool) -> dict:
    """Copy the first clip that every model answers right to the examples; return its example.

    Args:
        kind (`str`): type of question.
        rows (`list[dict]`): validation rows, with paths relative to `DATA`.
        used (`set[str]`): names of clips that are examples already; the new one is added.
        image (`bool`): ask about the clip's first frame.

    Raises:
        ValueError: the models agree on no clip.
    """
    for row in rows:
        clip = DATA / row["video"]
        fits = row["question_type"] == kind and row["target"] in CANDIDATES[kind]
        if not fits or clip.stem in used:
            continue
        path = EXAMPLES / f"{clip.stem}{'.png' if image else '.mp4'}"
        first_image(clip, path) if image else shutil.copyfile(clip, path)
        example = {"image" if image else "video": path.name, "query": row["query"]}
        example |= {"target": row["target"], "candidates": CANDIDATES[kind], "question_type": kind}
        if all_right(askers, path, example):
            used.add(clip.stem)
            return example
        path.unlink()
    raise ValueError(f"no clip with a question about {kind!r} that every model answers right.")


def accuracies(folders: list[Path]) -> dict[str, float]:
    """Return the mean test accuracy of each type of question over the models."""
    found = []
    for folder in folders:
        results = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))
        found.append(results["benchmarks"][BENCHMARK]["by_type"])
    return {kind: sum(each[kind]["value"] for each in found) / len(found) for kind in CANDIDATES}


def main(folders: list[Path]) -> None:
    tested = accuracies(folders)
    askers = [
        Asker(*(auto.from_pretrained(folder) for auto in (AutoModel, AutoProcessor)))
        for folder in folders
    ]
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    EXAMPLES.mkdir()
    write_chain()
    rows, used = read_lines(DATA / "val_vqa.jsonl"), set()
    wanted = [(kind, False) for kind in CANDIDATES] + [(IMAGE, True)]
    examples = [choose(askers, kind, rows, used, image) for kind, image in wanted]
    facts = [
        {"accuracy": round(tested[each["question_type"]], 3), "models": len(folders)}
        for each in examples
    ]
    lines = "".join(
        json.dumps(example | fact) + "\n" for example, fact in zip(examples, facts, strict=True)
    )
    (EXAMPLES / "examples.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m space.make_examples MODEL [MODEL ...]")
    main([Path(folder) for folder in sys.argv[1:]])
