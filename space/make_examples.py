"""Make `space/examples` from the demo's BabyAI test clips: `python -m space.make_examples`.

Run it from a clone after `make data`. The number in a clip's name is the seed that plays it again
(`training.demo_data.babyai.play`). The picture is the room before the first step.
"""

import json
import shutil
from pathlib import Path

from PIL import Image

from training.demo_data.babyai import play

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
PICTURE = "test_2000000100"


def main() -> None:
    EXAMPLES.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (DATA / "test_vqa.jsonl").open(encoding="utf-8")]
    examples = []
    for clip, kind in {**CLIPS, PICTURE: "count"}.items():
        file = f"{clip}.png" if clip == PICTURE else f"{clip}.mp4"
        if clip == PICTURE:
            first = play(int(clip.split("_")[1])).frames[0]
            Image.fromarray(first).save(EXAMPLES / file, optimize=True)
        else:
            shutil.copyfile(DATA / "clips" / file, EXAMPLES / file)
        row = next(
            row for row in rows if Path(row["video"]).stem == clip and row["question_type"] == kind
        )
        candidates = CANDIDATES[kind]
        assert row["target"] in candidates, row
        examples.append({"file": file, "query": row["query"], "candidates": candidates})
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (EXAMPLES / "examples.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
