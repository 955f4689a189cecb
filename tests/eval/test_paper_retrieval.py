"""Each entry of eval/paper/retrieval.yaml on a tiny set with the published names and columns.

Clips are unit vectors e0, e1, …; a text is a list of its similarities to them, up to its length,
which all texts of a set share. Ranks are written by hand: of equal similarities, the wrong one is
first.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from eval.benchmarks import load_benchmarks
from eval.task import Task
from eval.tasks import retrieval
from tests.paper_files import write_csv, write_json, write_tar, write_zip
from tests.shade_model import PAPER, ShadeModel, measure, media_bytes, write_media

EYE = torch.eye(3).tolist()


def gain(rank: int) -> float:
    """Return the discounted gain of a rank."""
    return 1 / math.log2(1 + rank)


@dataclass(frozen=True)
class Set:
    """A tiny set, and the scores that it must give.

    Attributes:
        write: writes its files into a folder.
        texts: embedding of each text.
        scores: Recall@1 and nDCG@10 of both directions, text to clip first.
        pool: measured clips and those that the paper's name needs.
        texts_in_pool: number of texts.
        left_out: parts of the lines that report what was left out, in their order.
    """

    write: Callable[[Path], None]
    texts: dict[str, list[float]]
    scores: tuple[float, float, float, float]
    pool: tuple[int, int | None]
    texts_in_pool: int
    left_out: list[str] = field(default_factory=list)


def write_msr_vtt(data: Path) -> None:
    names = ("video9770", "video9771", "video7020", "video9773")
    sentences = ("a man is cooking", "a man is cooking", "a dog runs", "a cat sleeps")
    rows = [
        (f"ret{index}", f"msr{name[5:]}", name, sentence)
        for index, (name, sentence) in enumerate(zip(names, sentences, strict=True))
    ]
    header = ("key", "vid_key", "video_id", "sentence")
    write_csv(data / "msr_vtt/MSRVTT_JSFUSION_test.csv", header, *rows)
    for index, name in enumerate(names[:3]):  # the last video is missing
        write_media(data / f"msr_vtt/videos/{name}.mp4", index)


def write_msr_vtt_mteb(data: Path) -> None:
    """Write two clips with the columns of MTEB's copy, but for the audio."""
    clips = [{"bytes": media_bytes("video", index), "path": f"{index}.mp4"} for index in (0, 1)]
    features = datasets.Features({"video": datasets.Video(), "caption": datasets.Value("string")})
    rows = {"video": clips, "caption": ["a man is cooking", "a dog runs"]}
    path = data / "mteb/MSR-VTT/data/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_activitynet(data: Path) -> None:
    captions = {
        "v_uqiMw7tQ1Cc": {
            "duration": 55.15,
            "timestamps": [[0.28, 55.15], [13.79, 54.32]],
            "sentences": ["The man goes to the goal.", " He lifts a weight."],
        },
        "v_bXdq2zI1Ms0": {
            "duration": 73.1,
            "timestamps": [[0, 10.23]],
            "sentences": ["Three men are standing on a mat."],
        },
    }
    write_json(data / "activitynet/val_1.json", captions)
    write_media(data / "activitynet/videos/v_uqiMw7tQ1Cc.mp4", 0)
    write_media(data / "activitynet/videos/v_bXdq2zI1Ms0.mkv", 1)


def write_didemo(data: Path) -> None:
    names = ("12090392@N02_13482799053_87ef417396.mov", "24511045@N04_5736945886_d8c61a2c92.avi")
    moments = [
        {
            "annotation_id": number,
            "description": text,
            "video": names[video],
            "times": [[0, 0], [0, 1], [1, 1], [0, 0]],
            "num_segments": 6,
            "dl_link": "https://www.flickr.com/video_download.gne?id=1",
        }
        for number, video, text in (
            (0, 0, "camera zooms in"),
            (1, 1, "the boat turns"),
            (2, 0, "a man in grey walks by"),
        )
    ]
    write_json(data / "didemo/test_data.json", moments)
    for index, name in enumerate(names):
        write_media(data / "didemo/videos" / name, index)


def write_msvd(data: Path) -> None:
    captions = {"aM-RcQj0a7I_37_55": ["a man sings", "a man plays"], "bruzcOyIGeg_4_12": ["a dog"]}
    rows = [
        {"video_id": name, "video": f"{name}.avi", "caption": texts}
        for name, texts in captions.items()
    ]
    write_json(data / "msvd/msvd_test.json", rows)
    for index, name in enumerate(captions):
        write_media(data / f"msvd/videos/{name}.avi", index)


def youcook2_video(subset: str, recipe: str, *steps: tuple[list[float], str]) -> dict:
    return {
        "duration": 310.65,
        "subset": subset,
        "recipe_type": recipe,
        "annotations": [
            {"segment": segment, "id": number, "sentence": text}
            for number, (segment, text) in enumerate(steps)
        ],
        "video_url": "https://www.youtube.com/watch?v=GLd3aX16zBg",
    }


def write_youcook2(data: Path) -> None:
    """Write one video whose parts of 0.4 seconds are the clips 2, 1 and 0."""
    videos = {
        "GLd3aX16zBg": youcook2_video(
            "validation", "113", ([0.4, 0.8], "mix the eggs"), ([0.8, 1.2], "fry the bacon")
        ),
        "xHr8X2Wpmno": youcook2_video("training", "101", ([0, 9], "cut the bread")),
    }
    write_json(data / "youcook2/youcookii_annotations_trainval.json", {"database": videos})
    write_media(data / "youcook2/raw_videos/validation/113/GLd3aX16zBg.webm", 2, 1, 0)


def pvd_clip(caption: str | None) -> bytes:
    facts = {
        "human_caption": caption,
        "model_caption": "a video",
        "category": 1,
        "category_name": "Hand Actions",
        "video_duration_in_s": 0.4,
        "fps": 10.0,
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "keywords": ["hand"],
        "description": "",
        "has_face": False,
    }
    return json.dumps(facts).encode()


def write_pvd(data: Path) -> None:
    """Write two clips of the benchmark, and one without a caption by a person."""
    captions = ("a hand opens a door", "a bird lands", None)
    members = {}
    for index, caption in enumerate(captions):
        members[f"0000{index}.mp4"] = media_bytes("video", index)
        members[f"0000{index}.json"] = pvd_clip(caption)
    write_tar(data / "facebook/PE-Video/test/000000.tar", members)


def write_dream(data: Path) -> None:
    rows = [
        {
            "idx": f"DREAM-1K_{index}",
            "video_file": f"video/{index}.mp4",
            "source": "Live-action",
            "duration": 8.0,
            "description": text,
            "events": [text],
            "n_subjects": 1,
            "n_shots": 1,
            "n_events": 1,
        }
        for index, text in enumerate(("A man jumps.", "A woman nods."))
    ]
    write_json(data / "omni-research/DREAM-1K/json/metadata.json", rows)
    members = {f"DREAM-1K_videos/{index}.mp4": media_bytes("video", index) for index in (0, 1)}
    write_zip(data / "omni-research/DREAM-1K/video/video.zip", members)


def write_vdc(data: Path) -> None:
    rows = [
        {
            "video_id": name,
            "video_name": f"{name}.mp4",
            "short_caption": "short",
            "background_caption": "background",
            "main_object_caption": "object",
            "camera_caption": "camera",
            "detailed_caption": text,
        }
        for name, text in (("pexels_1", "Snow falls."), ("mixkit_2", "A car stops."))
    ]
    path = data / "wchai/Video-Detailed-Caption/VDC_1k.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in ((1, "pexels_1"), (2, "mixkit_2")):
        archive = path.parent / f"videos/videos_{number}.tar.gz"
        write_tar(archive, {f"videos_{number}/{name}.mp4": media_bytes("video", number - 1)})


def karpathy_images(folder: dict[str, str], *images: tuple[str, str, list[str]]) -> dict:
    return {
        "images": [
            {
                **folder,
                "sentids": list(range(len(texts))),
                "imgid": number,
                "sentences": [
                    {"tokens": text.split(), "raw": text, "imgid": number, "sentid": sentid}
                    for sentid, text in enumerate(texts)
                ],
                "split": split,
                "filename": name,
            }
            for number, (name, split, texts) in enumerate(images)
        ],
        "dataset": "name",
    }


CAPTIONS = (["a man sings", "a man plays"], ["a dog"])


def write_flickr30k(data: Path) -> None:
    images = karpathy_images(
        {},
        ("1000092795.jpg", "train", ["two men"]),
        ("1007129816.jpg", "test", CAPTIONS[0]),
        ("1009434119.jpg", "test", CAPTIONS[1]),
    )
    write_json(data / "flickr30k/dataset_flickr30k.json", images)
    for index, name in enumerate(("1007129816.jpg", "1009434119.jpg")):
        write_media(data / "flickr30k/flickr30k-images" / name, index)


def write_coco(data: Path) -> None:
    names = ("COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg")
    images = karpathy_images(
        {"filepath": "val2014"},
        (names[0], "test", CAPTIONS[0]),
        (names[1], "test", CAPTIONS[1]),
        ("COCO_val2014_000000483108.jpg", "restval", ["a train"]),
    )
    write_json(data / "coco/dataset_coco.json", images)
    for index, name in enumerate(names):
        write_media(data / "coco/val2014" / name, index)


# Two texts of clip 0, the second nearer to clip 1, and one text of clip 1.
#   Texts: ranks 1, 2, 1. Clip 0: its texts have ranks 1 and 3, since the second one ties with that
#   of clip 1. Clip 1: its text ties with the second one of clip 0, so it has rank 2.
THREE_CAPTIONS = {"a man sings": [2, 1], "a man plays": [1, 2], "a dog": [1, 2]}
THREE_SCORES = (
    2 / 3,
    (1 + gain(2) + 1) / 3,
    1 / 2,
    ((1 + gain(3)) / (1 + gain(2)) + gain(2)) / 2,
)
# Text 0 has rank 1 and text 1 rank 2. Both tie for either clip, so the right one has rank 2.
ONE_FOR_BOTH = (1 / 2, (1 + gain(2)) / 2, 0.0, gain(2))
ALL_FOUND = (1.0, 1.0, 1.0, 1.0)

SETS = {
    # The equal captions are not merged: the second one finds the first one's clip, rank 2. Each
    # ties with the other for its own clip, so both clips have rank 2.
    "msr_vtt": Set(
        write_msr_vtt,
        {"a man is cooking": [3, 2, 1], "a dog runs": [2, 1, 3]},
        (2 / 3, (1 + gain(2) + 1) / 3, 1 / 3, (gain(2) + gain(2) + 1) / 3),
        (3, 1000),
        3,
        ["videos/video9773.mp4"],
    ),
    "msr_vtt_mteb": Set(
        write_msr_vtt_mteb,
        {"a man is cooking": [2, 1], "a dog runs": [2, 1]},
        ONE_FOR_BOTH,
        (2, 1000),
        2,
    ),
    "activitynet": Set(
        write_activitynet,
        {
            "The man goes to the goal. He lifts a weight.": [2, 1],
            "Three men are standing on a mat.": [2, 1],
        },
        ONE_FOR_BOTH,
        (2, 4917),
        2,
    ),
    "didemo": Set(
        write_didemo,
        {"camera zooms in a man in grey walks by": [2, 1], "the boat turns": [1, 2]},
        ALL_FOUND,
        (2, 1004),
        2,
    ),
    "msvd": Set(write_msvd, THREE_CAPTIONS, THREE_SCORES, (2, 670), 3),
    # The steps are the clips 1 and 0 of the video, not its beginning, clip 2.
    "youcook2": Set(
        write_youcook2,
        {"mix the eggs": [1, 3, 2], "fry the bacon": [1, 3, 2]},
        ONE_FOR_BOTH,
        (2, None),
        2,
    ),
    "pvd_bench": Set(
        write_pvd,
        {"a hand opens a door": [2, 1], "a bird lands": [2, 1]},
        ONE_FOR_BOTH,
        (2, 15000),
        2,
    ),
    "dream_1k": Set(
        write_dream, {"A man jumps.": [2, 1], "A woman nods.": [1, 2]}, ALL_FOUND, (2, 1000), 2
    ),
    "vdc_1k": Set(
        write_vdc, {"Snow falls.": [2, 1], "A car stops.": [2, 1]}, ONE_FOR_BOTH, (2, 1027), 2
    ),
    "flickr30k": Set(write_flickr30k, THREE_CAPTIONS, THREE_SCORES, (2, 1000), 3),
    "coco": Set(write_coco, THREE_CAPTIONS, THREE_SCORES, (2, 5000), 3),
}


@pytest.mark.parametrize("name", SETS)
def test_paper_retrieval_gives_the_scores_computed_by_hand(name, tmp_path):
    tiny = SETS[name]
    tiny.write(tmp_path)
    result, model = measure("retrieval", name, tmp_path, EYE, tiny.texts)
    kind = "image" if name in ("flickr30k", "coco") else "video"
    directions = (f"text to {kind}", f"{kind} to text")
    metrics = [f"{direction} {metric}" for direction in directions for metric in ("R@1", "nDCG@10")]
    assert [result.scores[metric].value for metric in metrics] == pytest.approx(tiny.scores)
    assert set(model.asked) == {"Describe this video in detail."}
    assert (result.pool, result.pool_expected) == tiny.pool
    assert result.protocol[f"{kind}_pool"] == tiny.pool[0]
    assert result.protocol["text_pool"] == tiny.texts_in_pool
    assert result.paper["metric"] == f"text to {kind} R@1" == next(iter(result.scores))
    assert result.title != result.paper["name"], "a tiny pool has the paper's bare name"
    for line, part in zip(result.skipped, tiny.left_out, strict=True):
        assert part in line


def test_paper_retrieval_has_a_tiny_set_of_every_entry():
    assert set(SETS) == set(yaml.safe_load((PAPER / "retrieval.yaml").read_text()))


def test_paper_retrieval_has_the_bare_name_for_the_right_pool_only(tmp_path):
    """Numbers on a smaller pool are higher and were published under the full pool's name."""
    write_msr_vtt(tmp_path)
    [benchmark] = load_benchmarks(PAPER / "retrieval.yaml", ["msr_vtt"], tmp_path)
    model = ShadeModel(EYE, SETS["msr_vtt"].texts)
    titles = []
    for pool in (1000, 3, None):
        paper = replace(benchmark.paper, pool=pool)
        task = Task(model, model.processor, replace(benchmark, paper=paper))
        titles.append(retrieval.evaluate(task).title)
    assert titles[0] == "MSR-VTT (3 of 1,000 clips)" and titles[1] == "MSR-VTT"
    assert titles[2].startswith("MSR-VTT (3 clips")


CSV = "msr_vtt/MSRVTT_JSFUSION_test.csv"
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "clips", "message"),
    [
        (lambda text: text.replace("sentence", "text", 1), EYE, "no column 'sentence', but 'key'"),
        (lambda text: text.replace("ret1", "ret0"), EYE, "ids that occur more than once: ret0"),
        (lambda text: text.splitlines()[0], EYE, "no row can be measured: .*: there is no example"),
        (
            lambda text: re.sub(r"video(?=\d)", "film", text),
            EYE,
            r"4 of 4 .* missing: .*film9770\.mp4",
        ),
        (None, [[NAN, 0.0, 0.0], *EYE[1:]], r"video9770\.mp4: its embedding holds NaN"),
    ],
    ids=["wrong column", "repeated id", "empty pool", "no video", "NaN"],
)
def test_paper_retrieval_names_what_is_wrong(tmp_path, change, clips, message):
    write_msr_vtt(tmp_path)
    if change is not None:
        (tmp_path / CSV).write_text(change((tmp_path / CSV).read_text()))
    with pytest.raises(ValueError, match=message):
        measure("retrieval", "msr_vtt", tmp_path, clips, SETS["msr_vtt"].texts)


def test_paper_retrieval_names_a_text_whose_embedding_is_nan(tmp_path):
    write_msr_vtt(tmp_path)
    texts = SETS["msr_vtt"].texts | {"a dog runs": [NAN, 1, 1]}
    with pytest.raises(ValueError, match="the text 'a dog runs': its embedding holds NaN"):
        measure("retrieval", "msr_vtt", tmp_path, EYE, texts)


@pytest.mark.parametrize("broken", [False, True], ids=["no video", "broken video"])
def test_paper_retrieval_counts_a_caption_without_a_video(tmp_path, broken):
    """The caption is left out of the pool of texts too."""
    write_msr_vtt(tmp_path)
    if broken:
        (tmp_path / "msr_vtt/videos/video9771.mp4").write_bytes(b"no video")
    else:
        text = (tmp_path / CSV).read_text().replace("video9771", "")
        (tmp_path / CSV).write_text(text)
    result, _ = measure("retrieval", "msr_vtt", tmp_path, EYE, SETS["msr_vtt"].texts)
    assert (result.pool, result.protocol["text_pool"]) == (2, 2)
    assert [f"{CSV}:2: " in line for line in result.skipped] == [True, False]
    assert not any(str(tmp_path) in line for line in result.skipped)
