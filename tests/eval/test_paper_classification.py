"""Each entry of eval/paper/classification.yaml on a tiny set with the published names and columns.

Clips are unit vectors e0, e1, …; a label is a list of its similarities to them, up to its length,
which all labels of a set share. A label that ties with the right one makes the row wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from tests.paper_files import write_csv, write_json
from tests.shade_model import PAPER, measure, media_bytes, write_media

EYE = torch.eye(3).tolist()


@dataclass(frozen=True)
class Set:
    """A tiny set, and the scores that it must give.

    Attributes:
        write: writes its files into a folder.
        labels: embedding of each label.
        top1: accuracy.
        pool: measured rows and those that the paper's name needs.
        unused: labels without a row.
        left_out: parts of the lines that report what was left out, in their order.
        asked: the query.
    """

    write: Callable[[Path], None]
    labels: dict[str, list[float]]
    top1: float
    pool: tuple[int, int | None]
    unused: str | None = None
    left_out: list[str] = field(default_factory=list)
    asked: str = "What is the action shown?"


def write_ssv2(data: Path) -> None:
    """Write three videos of three classes; no video has the fourth."""
    labels = ("Holding something", "Moving something up", "Opening something", "Closing something")
    rows = [
        {
            "id": str(number),
            "label": label.replace("something", "a cup").lower(),
            "template": label.replace("something", "[something]"),
            "placeholders": ["a cup"],
        }
        for number, label in zip((78687, 42326, 100904), labels, strict=False)
    ]
    write_json(data / "ssv2/something-something-v2-validation.json", rows)
    numbers = {label: str(index) for index, label in enumerate(labels)}
    write_json(data / "ssv2/something-something-v2-labels.json", numbers)
    for index, row in enumerate(rows):
        write_media(data / f"ssv2/20bn-something-something-v2/{row['id']}.webm", index)


def write_hub_rows(folder: Path, labels: list[str]) -> None:
    """Write two clips with their classes in the files of a repository on the Hub."""
    (folder / "data").mkdir(parents=True)
    clips = [{"bytes": media_bytes("video", index), "path": f"{index}.mp4"} for index in (0, 1)]
    features = {"video": datasets.Video(), "label": datasets.ClassLabel(names=labels)}
    rows = datasets.Dataset.from_dict(
        {"video": clips, "label": [1, 0]}, features=datasets.Features(features)
    )
    rows.to_parquet(folder / "data/test-00000-of-00001.parquet")


def write_ssv2_mteb(data: Path) -> None:
    labels = ["Holding something", "Opening something"]
    write_hub_rows(data / "mteb/SomethingSomethingV2", labels)


def write_kinetics_mteb(data: Path) -> None:
    write_hub_rows(data / "mteb/kinetics-400", ["abseiling", "zumba"])


def write_kinetics(data: Path) -> None:
    """Write two videos, and the annotation of a third that is gone; no other has its class."""
    header = ("label", "youtube_id", "time_start", "time_end", "split")
    videos = (
        ("abseiling", "0wR5jVB-WPk", 417),
        ("zumba", "2UlwCf-yZ7E", 7),
        ("yodelling", "gone", 1),
    )
    rows = [(label, name, start, start + 10, "val") for label, name, start in videos]
    write_csv(data / "kinetics_400/val.csv", header, *rows)
    for index, (_, name, start) in enumerate(videos[:2]):
        file = f"{name}_{start:06d}_{start + 10:06d}.mp4"
        write_media(data / "kinetics_400/val" / file, index)


def coin_video(name: str, subset: str, *steps: tuple[list[float], str]) -> dict:
    return {
        "duration": 1.2,
        "class": name,
        "video_url": "https://www.youtube.com/embed/QCzTvK9aXxQ",
        "start": steps[0][0][0],
        "end": steps[-1][0][1],
        "subset": subset,
        "recipe_type": 131,
        "annotation": [
            {"id": str(number), "segment": segment, "label": label}
            for number, (segment, label) in enumerate(steps)
        ],
    }


def write_coin(data: Path) -> None:
    """Write two testing videos of three parts of 0.4 seconds, and a training video."""
    videos = {
        "QCzTvK9aXxQ": coin_video(
            "ReplaceHardDisk",
            "testing",
            ([0.0, 0.4], "take out the disk"),
            ([0.4, 0.8], "insert the disk"),
        ),
        "aXxQQCzTvK9": coin_video("MakeTea", "testing", ([0.8, 1.2], "insert the disk")),
        "vK9aXxQQCzT": coin_video("MakeTea", "training", ([0, 9], "boil water")),
    }
    write_json(data / "coin/COIN.json", {"database": videos})
    write_media(data / "coin/videos/QCzTvK9aXxQ.mp4", 1, 0, 2)
    write_media(data / "coin/videos/aXxQQCzTvK9.webm", 2, 2, 1)


def write_coin_task(data: Path) -> None:
    """As `write_coin`, with one clip in each video."""
    write_coin(data)
    write_media(data / "coin/videos/QCzTvK9aXxQ.mp4", 1, 1, 0)
    write_media(data / "coin/videos/aXxQQCzTvK9.webm", 1, 1, 0)


def write_crosstask(data: Path) -> None:
    """Write a video of each of two tasks, one of a task without steps, and one without a file."""
    folder = data / "crosstask"
    (folder / "annotations").mkdir(parents=True)
    (folder / "tasks_primary.txt").write_text(
        "23521\nMake Jello Shots\nhttps://www.wikihow.com/Make-Jello-Shots\n2\npour water,stir\n\n"
        "94276\nChange a Tire\nhttps://www.wikihow.com/Change-a-Tire\n3\nget tools,jack up,stir\n\n"
    )
    videos = (("23521", "-9Ez6jSXkxk"), ("94276", "0AvIrFx-lFU"), ("94276", "gone"), ("1", "other"))
    rows = [(task, name, f"https://youtu.be/{name}") for task, name in videos]
    write_csv(folder / "videos_val.csv", *rows)
    write_csv(folder / "annotations/23521_-9Ez6jSXkxk.csv", (2, 0, 0.4), (1, 0.4, 0.8))
    write_csv(folder / "annotations/94276_0AvIrFx-lFU.csv", (2, 0.0, 0.4))
    write_csv(folder / "annotations/94276_gone.csv", (1, 0.0, 0.4))
    write_media(folder / "videos/-9Ez6jSXkxk.mp4", 0, 1)
    write_media(folder / "videos/0AvIrFx-lFU.mkv", 2)


def write_crosstask_task(data: Path) -> None:
    write_crosstask(data)
    write_media(data / "crosstask/videos/-9Ez6jSXkxk.mp4", 0, 0)


EK100_HEADER = (
    *("narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp"),
    *("stop_timestamp", "start_frame", "stop_frame", "narration", "verb", "verb_class", "noun"),
    *("noun_class", "all_nouns", "all_noun_classes"),
)


def write_ek100(data: Path) -> None:
    """Write three actions in one video, whose parts of 0.4 seconds are the clips 2, 1 and 0."""
    classes = ("id", "key", "instances", "category")
    verbs = ((0, "take", "['take', 'get']", "retrieve"), (9, "turn-on", "['turn-on']", "turn"))
    nouns = ((3, "board:chopping", "['board:chopping']", "crockery"), (7, "tap", "['tap']", "fix"))
    write_csv(data / "ek100/EPIC_100_verb_classes.csv", classes, *verbs)
    write_csv(data / "ek100/EPIC_100_noun_classes.csv", classes, *nouns)
    actions = ((0, "get", 0, "board", 3), (1, "turn-on", 9, "tap", 7), (2, "take", 0, "tap", 7))
    rows = [
        (
            f"P01_11_{part}",
            "P01",
            "P01_11",
            "00:00:00.100",
            f"00:00:0{0.4 * part:.2f}",
            f"00:00:0{0.4 * part + 0.4:.2f}",
            24 * part,
            24 * part + 24,
            f"{verb} {noun}",
            verb,
            verb_class,
            noun,
            noun_class,
            f"['{noun}']",
            f"[{noun_class}]",
        )
        for part, verb, verb_class, noun, noun_class in actions
    ]
    write_csv(data / "ek100/EPIC_100_validation.csv", EK100_HEADER, *rows)
    write_media(data / "ek100/EPIC-KITCHENS/P01/videos/P01_11.MP4", 2, 1, 0)


def egoexo4d_take(name: str) -> dict:
    ego = {"rgb": {"relative_path": "frame_aligned_videos/aria01_214-1.mp4"}}
    exo = {"0": {"relative_path": "frame_aligned_videos/cam01.mp4"}}
    return {
        "take_uid": f"uid-{name}",
        "take_name": name,
        "root_dir": f"takes/{name}",
        "parent_task_name": "Cooking",
        "frame_aligned_videos": {"cam01": exo, "aria01": ego},
    }


def egoexo4d_steps(*steps: tuple[float, float, str]) -> dict:
    return {
        "segments": [
            {
                "start_time": start,
                "end_time": end,
                "step_name": name,
                "step_description": f"{name} in the kitchen",
                "step_id": number,
                "step_unique_id": number,
            }
            for number, (start, end, name) in enumerate(steps)
        ]
    }


def write_egoexo4d(data: Path) -> None:
    """Write two takes with a downscaled and an original video, and one without a video."""
    folder = data / "egoexo4d"
    write_json(folder / "takes.json", [egoexo4d_take(name) for name in ("eggs", "tea", "gone")])
    annotations = {
        "uid-eggs": egoexo4d_steps((0.0, 0.4, "Crack the egg"), (0.4, 0.8, "Whisk the egg")),
        "uid-tea": egoexo4d_steps((0.0, 0.4, "Boil water")),
        "uid-gone": egoexo4d_steps((0.0, 0.4, "Boil water")),
        "uid-unknown": egoexo4d_steps((0.0, 0.4, "Boil water")),
    }
    keysteps = {"annotations": annotations, "taxonomy": {}, "vocabulary": {}}
    write_json(folder / "annotations/keystep_val.json", keysteps)
    videos = folder / "takes/eggs/frame_aligned_videos/downscaled/448"
    write_media(videos / "aria01_214-1.mp4", 0, 1)
    write_media(folder / "takes/tea/frame_aligned_videos/aria01_214-1.mp4", 2)


def write_imagenet(data: Path) -> None:
    """Write an image of each class but the last."""
    names = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\nn07745940 berry\n"
    path = data / "imagenet/LOC_synset_mapping.txt"
    path.parent.mkdir(parents=True)
    path.write_text(names)
    images = (("n01440764", 293), ("n02012849", 2138), ("n03126707", 236))
    for index, (folder, number) in enumerate(images):
        file = f"{folder}/ILSVRC2012_val_{number:08d}.JPEG"
        write_media(data / "imagenet/val" / file, index)


SETS = {
    # Clip 1: "Closing something", which no video has, ties with its label.
    "ssv2": Set(
        write_ssv2,
        {
            "Holding something": [3, 1, 2],
            "Moving something up": [2, 3, 1],
            "Opening something": [1, 2, 3],
            "Closing something": [2, 3, 1],
        },
        2 / 3,
        (3, 24777),
        "1: Closing something",
    ),
    # Clip 0 has the class of index 1 and clip 1 that of index 0.
    "ssv2_mteb": Set(
        write_ssv2_mteb,
        {"Holding something": [1, 2], "Opening something": [2, 1]},
        1.0,
        (2, 24777),
    ),
    "kinetics_400": Set(
        write_kinetics,
        {"abseiling": [3, 2, 1], "zumba": [2, 1, 3], "yodelling": [2, 3, 1]},
        1 / 2,
        (2, None),
        "1: yodelling",
        left_out=["gone_000001_000011.mp4"],
    ),
    "kinetics_400_mteb": Set(
        write_kinetics_mteb, {"abseiling": [1, 2], "zumba": [2, 1]}, 1.0, (2, None)
    ),
    # The parts are clip 1, clip 0 and, in the second video, clip 1. The second step has rank 2.
    "coin_step": Set(
        write_coin,
        {"take out the disk": [2, 1, 1], "insert the disk": [1, 2, 1]},
        1 / 3,
        (3, None),
    ),
    "coin_task": Set(
        write_coin_task,
        {"replace hard disk": [1, 2], "make tea": [2, 1]},
        1.0,
        (2, 2797),
    ),
    # "stir" is clip 0. "pour water", clip 1, ties with "jack up". "jack up" is clip 2, which is
    # nearest to "get tools", the step of a video that is missing.
    "crosstask_step": Set(
        write_crosstask,
        {"stir": [3, 1, 2], "pour water": [1, 3, 2], "jack up": [1, 3, 2], "get tools": [1, 2, 3]},
        1 / 3,
        (3, None),
        "1: get tools",
        left_out=["gone"],
    ),
    "crosstask_task": Set(
        write_crosstask_task,
        {"Make Jello Shots": [3, 1, 2], "Change a Tire": [2, 1, 3]},
        1.0,
        (2, None),
        left_out=["gone"],
    ),
    # "get" is in the class "take". The parts are the clips 2, 1 and 0; only the second is right.
    "ek100": Set(
        write_ek100,
        {
            "take board chopping": [3, 1, 2],
            "turn on tap": [1, 3, 2],
            "take tap": [2, 1, 3],
        },
        1 / 3,
        (3, 9668),
    ),
    "egoexo4d": Set(
        write_egoexo4d,
        {"Crack the egg": [3, 2, 1], "Whisk the egg": [2, 3, 1], "Boil water": [3, 1, 2]},
        2 / 3,
        (3, None),
        left_out=["takes/gone", "uid-unknown"],
    ),
    # Both classes named "crane" are one label. The second one's image is nearest to "berry".
    "imagenet": Set(
        write_imagenet,
        {"tench, Tinca tinca": [2, 1, 1], "crane": [1, 2, 1], "berry": [1, 1, 2]},
        2 / 3,
        (3, 50000),
        "1: berry",
        asked="Describe this video in one sentence.",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_paper_classification_gives_the_scores_computed_by_hand(name, tmp_path):
    tiny = SETS[name]
    tiny.write(tmp_path)
    result, model = measure("classification", name, tmp_path, EYE, tiny.labels)
    assert result.scores["top-1"].value == pytest.approx(tiny.top1)
    assert set(model.asked) == {tiny.asked}
    assert (result.pool, result.pool_expected) == tiny.pool
    assert result.protocol["candidates"] == len(tiny.labels)
    assert result.protocol.get("candidates_without_rows") == tiny.unused
    assert result.title != result.paper["name"], "a tiny pool has the paper's bare name"
    for line, part in zip(result.skipped, tiny.left_out, strict=True):
        assert part in line


def test_paper_classification_has_a_tiny_set_of_every_entry():
    assert set(SETS) == set(yaml.safe_load((PAPER / "classification.yaml").read_text()))
