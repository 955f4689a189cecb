"""Write easy-VQA: 5,000 images of one coloured shape, with the official questions and split."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import easy_vqa

from training.demo_data.writing import write_jsonl

NUM_VAL_IMAGES = 400
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

Question = tuple[str, str, int]  # text, answer, image


def write(directory: Path) -> dict[str, int]:
    """Write images, questions and captions; return the number of rows per file."""
    for split, paths in (
        ("train", easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_image_paths()),
    ):
        images = directory / "images" / split
        images.mkdir(parents=True)
        for path in paths.values():
            shutil.copy(path, images)

    questions = list(zip(*easy_vqa.get_train_questions(), strict=True))
    first_val = len(easy_vqa.get_train_image_paths()) - NUM_VAL_IMAGES
    train = [question for question in questions if question[2] < first_val]
    test = list(zip(*easy_vqa.get_test_questions(), strict=True))
    captions = _captions("train", train)
    rows = {
        "train_vqa": [_vqa_row("train", *question) for question in train],
        "val_vqa": [_vqa_row("train", *q) for q in questions if q[2] >= first_val],
        "test_vqa": [_vqa_row("test", *question) for question in test],
        "train_captions": captions,
        "test_captions": _captions("test", test),
    }
    for name, group in rows.items():
        write_jsonl(directory / f"{name}.jsonl", group)
    counts = {name: len(group) for name, group in rows.items()}
    return counts | {"train_images_without_caption": first_val - len(captions)}


def _vqa_row(split: str, text: str, answer: str, image: int) -> dict[str, str]:
    return {
        "image": f"images/{split}/{image}.png",
        "query": text,
        "target": answer,
        "question_type": _question_type(answer),
    }


def _question_type(answer: str) -> str:
    if answer in SHAPES:
        return "shape"
    return "color" if answer in COLORS else "yes/no"


def _captions(split: str, questions: Sequence[Question]) -> list[dict[str, str]]:
    """Return a caption, such as "a blue rectangle", for each image whose questions state both."""
    known: dict[int, set[str]] = {}
    for text, answer, image in questions:
        known.setdefault(image, set()).update(_facts(text, answer))
    rows = []
    for image, facts in known.items():
        color, shape = facts & set(COLORS), facts & set(SHAPES)
        if color and shape:
            path = f"images/{split}/{image}.png"
            target = " ".join(("a", *color, *shape))
            rows.append({"image": path, "query": "", "target": target, "group_id": path})
    return rows


def _facts(text: str, answer: str) -> set[str]:
    """Return the colours and shapes which, by a question and its answer, are in the image."""
    words = set(re.findall(r"\w+", text))
    denied = bool(words & {"not", "no"})
    if (answer == "yes" and denied) or (answer == "no" and not denied):
        return set()
    return (words | {answer}) & {*COLORS, *SHAPES}


__all__ = ["write"]
