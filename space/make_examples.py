"""Make `space/examples` from the demo's BabyAI test clips: `python -m space.make_examples`.

Run it in a clone after `make data`. The number in a clip's name is the seed of its episode
(`training.demo_data.babyai.play`). The image is the room before the first step. The long video is
a chain of missions, each in another room.
"""

import json
import shutil
from pathlib import Path

import av
from PIL import Image

from training.demo_data.babyai import play
from training.demo_data.babyai_splits import NARRATE

DATA = Path("data/demo/babyai")
EXAMPLES = Path(__file__).parent / "examples"
CANDIDATES = {
    "what": ["the purple key", "the grey box", "the green key", "the red ball", "the blue box"],
    "action": ["went to it", "moved it", "picked it up", "nothing"],
    "count": ["zero", "one", "two", "three", "four"],
    "color": ["grey", "blue", "green", "red", "purple", "yellow"],
    "where": ["top left", "top right", "bottom left", "bottom right"],
}
CLIPS = {
    "test_2000000000": "what",
    "test_2000000300": "action",
    "test_2000000401": "count",
    "test_2000000500": "color",
    "test_2000000200": "where",
}
IMAGE = "test_2000000100"
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
    rows = [json.loads(line) for line in (DATA / "test_events.jsonl").open(encoding="utf-8")]
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


def main() -> None:
    EXAMPLES.mkdir(exist_ok=True)
    write_chain()
    rows = [json.loads(line) for line in (DATA / "test_vqa.jsonl").open(encoding="utf-8")]
    examples = []
    for clip, kind in {**CLIPS, IMAGE: "count"}.items():
        file = f"{clip}.png" if clip == IMAGE else f"{clip}.mp4"
        if clip == IMAGE:
            first = play(int(clip.split("_")[1])).frames[0]
            Image.fromarray(first).save(EXAMPLES / file, optimize=True)
        else:
            shutil.copyfile(DATA / "clips" / file, EXAMPLES / file)
        row = next(
            row for row in rows if Path(row["video"]).stem == clip and row["question_type"] == kind
        )
        candidates = CANDIDATES[kind]
        assert row["target"] in candidates, row
        example = {"file": file, "query": row["query"], "candidates": candidates}
        examples.append(example | {"target": row["target"]})
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (EXAMPLES / "examples.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
