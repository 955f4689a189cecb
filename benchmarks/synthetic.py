"""A data set with the shapes of the demonstration's, made without downloads.

Texts follow the demonstration's templates, so their lengths and the share of equal answers are
realistic. Clips are noise: speed does not depend on what they show.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from training.demo_data.writing import write_clip, write_jsonl

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
COLORS = ("blue", "green", "grey", "purple", "red", "yellow")
KINDS = ("ball", "box", "key")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
VERBS = ("went to", "picked up")
SHAPES = ("circle", "rectangle", "triangle")
CLIP_FRAMES, FPS = 11, 5  # as BabyAI's

# The Y-Encoder of the demonstration, all-MiniLM-L6-v2. Its outputs are computed once before
# training, so its vocabulary does not matter.
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}


class Texts:
    """Queries and answers with the demonstration's wording."""

    def __init__(self, seed: int = 0):
        self.generator = np.random.default_rng(seed)

    def one(self, *choices: str) -> str:
        return choices[self.generator.integers(len(choices))]

    def thing(self) -> str:
        return f"{self.one(*COLORS)} {self.one(*KINDS)}"

    def narration(self) -> str:
        """Return a narration of one goal or two."""
        first = f"the agent {self.one(*VERBS)} the {self.thing()}"
        second = f" and then put the {self.thing()} next to the {self.thing()}"
        return first + second * bool(self.generator.integers(2))

    def question(self) -> tuple[str, str]:
        pairs = (
            (f"What color is the {self.one(*KINDS)}?", self.one(*COLORS)),
            (f"Is there a {self.thing()} in the room?", self.one("yes", "no")),
            (f"What did the agent do with the {self.thing()}?", self.one("nothing", "moved it")),
            (f"Did the agent go to the {self.thing()} before picking up the {self.thing()}?", "no"),
            (f"What did the agent put the {self.thing()} next to?", f"the {self.thing()}"),
        )
        return pairs[self.generator.integers(len(pairs))]

    def place(self) -> tuple[str, str]:
        when = self.one("start", "end")
        return f"Where is the {self.thing()} at the {when}?", self.one(*CORNERS)

    def shape(self) -> tuple[str, str]:
        pairs = (
            ("What shape is in the image?", self.one(*SHAPES)),
            (f"What is the color of the {self.one(*SHAPES)}?", self.one(*COLORS)),
            (f"Is there not a {self.one(*COLORS)} shape in the image?", self.one("yes", "no")),
        )
        return pairs[self.generator.integers(len(pairs))]

    def caption(self) -> tuple[str, str]:
        return "", self.narration()


# Sources of babyai_sft.yaml, of this revision or an earlier one, by the names of their files;
# easy-VQA's has that of its folder. Each has its media, its rows about a clip, and its texts.
SOURCES = {
    "train_vqa": ("video", 5, Texts.question),
    "train_where": ("video", 7, Texts.place),
    "easy_vqa": ("image", 9, Texts.shape),
    "train_captions": ("video", 1, Texts.caption),
    "train_narrations": ("video", 1, Texts.caption),
}


def write_media(folder: Path, side: int, frames: int, count: int) -> None:
    """Write `count` clips and `count` images of noise."""
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 256, (frames, side // 8, side // 8, 3), np.uint8)
        pictures = [np.asarray(Image.fromarray(each).resize((side, side))) for each in pixels]
        write_clip(folder / f"{index}.mp4", pictures, FPS)
        Image.fromarray(pictures[0]).save(folder / f"{index}.png")


def write_demo(folder: Path, *, clips: int = 192, side: int = 64, **training: Any) -> Path:
    """Write rows, clips and the recipe of the demonstration's SFT; return the recipe.

    Args:
        clips: number of clips, and of images.
        training: changes of the section `training`.
    """
    write_demo_rows(folder, clips=clips, side=side)
    return write_demo_recipe(folder, **training)


def write_demo_rows(folder: Path, *, clips: int = 192, side: int = 64) -> None:
    """Write clips and rows like those of the demonstration, with fewer clips."""
    write_media(folder, side, CLIP_FRAMES, clips)
    texts = Texts()
    for name, (kind, rows_of_each, draw) in SOURCES.items():
        written = []
        for index in range(clips * rows_of_each):
            query, target = draw(texts)
            media = f"{index // rows_of_each}.{'mp4' if kind == 'video' else 'png'}"
            written.append({kind: media, "query": query, "target": target})
        write_jsonl(folder / f"{name}.jsonl", written)


def write_demo_recipe(
    folder: Path, *, recipes: Path = RECIPES, name: str = "recipe.yaml", **training: Any
) -> Path:
    """Write the recipe of the demonstration's SFT for the rows of `folder`; return its path.

    The model is new instead of stage A's, and so is the Y-Encoder.

    Args:
        recipes: folder of the recipes, of this revision or another.
        name: name of the file.
        training: changes of the section `training`.
    """
    start, recipe = (
        yaml.safe_load((recipes / f"babyai_{stage}.yaml").read_text(encoding="utf-8"))
        for stage in ("pretrain", "sft")
    )
    config = start["model"]["config"] | {"text_config": MINILM}
    del config["backbones"]  # the names of pretrained parts
    recipe["model"] = {
        "vocab_size": start["model"]["vocab_size"],
        "config": config,
        "tokenizer_rows": [str(folder / f"{each}.jsonl") for each in ("train_vqa", "easy_vqa")],
    }
    recipe["processor"] = start["processor"] | recipe["processor"]
    for source in recipe["data"]["sources"]:
        rows = Path(source["rows"])
        each = "easy_vqa" if rows.parent.name == "easy_vqa" else rows.stem
        source["rows"] = str(folder / f"{each}.jsonl")
    recipe["data"] |= {"cache_dir": str(folder / "cache"), "num_workers": 1}
    return write_recipe(folder / name, recipe, **training)


def write_recipe(path: Path, recipe: dict, **training: Any) -> Path:
    """Write a recipe that trains on the CPU and saves nothing on the way."""
    recipe["training"] |= {
        "output_dir": str(path.parent / "out"),
        "save_strategy": "no",
        "save_total_limit": None,
        "report_to": "none",
        "use_cpu": True,
        **training,
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_clips(
    folder: Path,
    config: dict,
    *,
    rows: int,
    frames: int,
    side: int,
    texts: list[tuple[str, str]] | None = None,
    **training: Any,
) -> Path:
    """Write clips of one size with questions, and a recipe for a new model; return the recipe.

    Args:
        config: the recipe's `model.config`.
        rows: rows of a step.
        texts: queries and targets, one pair for each clip; by default questions, each with a
            narration.
        training: changes of the section `training`.
    """
    if texts is None:
        drawn = Texts()
        texts = [(drawn.question()[0], drawn.narration()) for _ in range(16 * rows)]
    write_media(folder, side, frames, len(texts))
    written = [
        {"video": f"{index}.mp4", "query": query, "target": target}
        for index, (query, target) in enumerate(texts)
    ]
    write_jsonl(folder / "rows.jsonl", written)
    recipe = {
        "model": {"vocab_size": 1000, "config": copy.deepcopy(config)},
        "processor": {"image_size": side, "num_frames": frames},
        "data": {
            "sources": [{"rows": str(folder / "rows.jsonl")}],
            "cache_dir": str(folder / "cache"),
            "num_workers": 1,
        },
        "training": {"global_batch_size": rows, "learning_rate": 5e-5, "warmup_steps": 2},
    }
    return write_recipe(folder / "recipe.yaml", recipe, **training)
