"""Each entry of eval/paper/captioning.yaml on a tiny set with the published names and columns.

The Y-Decoder writes a given caption for each clip. CIDEr is computed by hand: with two clips, an
n-gram in the references of one of them weighs ln 2, and one in those of both weighs 0.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from eval import egoexo4d
from eval.benchmarks import load_benchmarks
from eval.task import Task
from eval.tasks import TASKS, captioning, selective_decoding
from tests.paper_files import write_json, write_tar
from tests.shade_model import PAPER, ShadeModel, media_bytes, write_media

EYE = torch.eye(2).tolist()
WRITTEN = ("stir soup", "stir tea")  # by the number of the clip


@dataclass(frozen=True)
class Set:
    """A tiny set, and the scores that it must give.

    Attributes:
        write: writes its files into a folder.
        cider: mean CIDEr.
        exact: share of captions that equal a reference.
        pool: measured clips and those that the paper's name needs.
        references: mean number of references of a clip.
    """

    write: Callable[[Path], None]
    cider: float
    exact: float
    pool: tuple[int, int | None]
    references: float


def write_msr_vtt(data: Path) -> None:
    """Write two references of the first clip, apart from each other, and one of the second."""
    pairs = (("video7010", "stir soup"), ("video7011", "stir rice"), ("video7010", "cook"))
    sentences = [
        {"caption": text, "video_id": name, "sen_id": 200000 + number}
        for number, (name, text) in enumerate(pairs)
    ]
    videos = [
        {
            "category": 9,
            "url": "https://www.youtube.com/watch?v=A9pM9iOuAzM",
            "video_id": name,
            "start time": 116.03,
            "end time": 126.21,
            "split": "test",
            "id": int(name[5:]),
        }
        for name in ("video7010", "video7011")
    ]
    content = {"info": {"version": "1.0"}, "videos": videos, "sentences": sentences}
    write_json(data / "msr_vtt/test_videodatainfo.json", content)
    for index, video in enumerate(videos):
        write_media(data / f"msr_vtt/videos/{video['video_id']}.mp4", index)


def write_youcook2(data: Path) -> None:
    """Write two steps of a video whose parts of 0.4 seconds are the clips 1, 0 and 1."""
    steps = [
        {"segment": segment, "id": number, "sentence": text}
        for number, (segment, text) in enumerate(
            (([0.4, 0.8], "stir soup"), ([0.8, 1.2], "stir rice"))
        )
    ]
    video = {
        "duration": 310.65,
        "subset": "validation",
        "recipe_type": "113",
        "annotations": steps,
        "video_url": "https://www.youtube.com/watch?v=GLd3aX16zBg",
    }
    content = {"database": {"GLd3aX16zBg": video, "_": {**video, "subset": "training"}}}
    write_json(data / "youcook2/youcookii_annotations_trainval.json", content)
    write_media(data / "youcook2/raw_videos/validation/113/GLd3aX16zBg.mkv", 1, 0, 1)


def write_pvd(data: Path) -> None:
    members = {}
    for index, caption in enumerate(("stir soup", "stir tea", None)):
        members[f"{index}.mp4"] = media_bytes("video", index)
        members[f"{index}.json"] = json.dumps({"human_caption": caption}).encode()
    write_tar(data / "facebook/PE-Video/test/000000.tar", members)


SETS = {
    # The first clip has "stir soup" and "cook" as references. Against the first, both words and
    # pairs agree: (1 + 1) / 4. Against the other, nothing does. The second clip's caption shares
    # only "stir", which weighs 0.
    "msr_vtt_captions": Set(write_msr_vtt, 10 * (1 / 2 + 0) / 2 / 2, 1 / 2, (2, 2990), 3 / 2),
    "youcook2_captions": Set(write_youcook2, 10 * (1 / 2) / 2, 1 / 2, (2, None), 1.0),
    "pvd_bench_captions": Set(write_pvd, 10 * (1 / 2), 1.0, (2, 15000), 1.0),
}


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ShadeModel:
    """Return a model that writes the caption of each clip."""

    def decode(model, processor, given, queries, previous, num_beams):
        return [WRITTEN[index] for index in given.argmax(dim=1).tolist()]

    monkeypatch.setattr(captioning, "decode_texts", decode)
    monkeypatch.setattr(Task, "writer", property(lambda task: task.model))
    texts = {"stir soup": [2, 1], "cook": [2, 1], "stir rice": [1, 2], "stir tea": [1, 2]}
    return ShadeModel(EYE, texts)


def measured(name: str, data: Path, model: ShadeModel):
    [benchmark] = load_benchmarks(PAPER / "captioning.yaml", [name], data)
    return TASKS[benchmark.task].evaluate(Task(model, model.processor, benchmark))


@pytest.mark.parametrize("name", SETS)
def test_paper_captioning_gives_the_scores_computed_by_hand(name, writer, tmp_path):
    tiny = SETS[name]
    tiny.write(tmp_path)
    result = measured(name, tmp_path, writer)
    assert result.scores["CIDEr"].value == pytest.approx(tiny.cider)
    assert result.scores["exact match"].value == tiny.exact
    assert result.protocol["references_per_clip"] == tiny.references
    assert result.protocol["frames"] == "16"
    assert set(writer.asked) == {"Describe this video in one sentence."}
    assert (result.pool, result.pool_expected) == tiny.pool
    assert result.title.startswith(f"{result.paper['name']} (2 ")
    assert result.paper["metric"] in result.scores


def egoexo4d_download(folder: Path) -> None:
    """Write two validation takes and two training takes, each one clip of four seconds."""
    notes = {"val": ("stir soup", "stir rice"), "train": ("stir soup", "stir tea")}
    takes = []
    for split, texts in notes.items():
        annotations = {}
        for index, text in enumerate(texts):
            name = f"{split}{index}"
            ego = {"rgb": {"relative_path": "frame_aligned_videos/aria01_214-1.mp4"}}
            takes.append(
                {
                    "take_uid": name,
                    "take_name": name,
                    "root_dir": f"takes/{name}",
                    "parent_task_name": "Cooking",
                    "frame_aligned_videos": {"aria01": ego},
                }
            )
            event = {"text": text, "timestamp": 1.5, "subject": "C", "ego_visible": True}
            annotations[name] = [{"rejected": False, "descriptions": [event]}]
            path = folder / f"takes/{name}/frame_aligned_videos/aria01_214-1.mp4"
            write_media(path, *[index] * 10)
        path = folder / f"annotations/atomic_descriptions_{split}.json"
        write_json(path, {"annotations": annotations})
    write_json(folder / "takes.json", takes)


@pytest.fixture
def streams(writer, monkeypatch, tmp_path) -> Path:
    """Write the streams of two validation takes and two training takes."""
    tried = {name: values[:1] for name, values in selective_decoding.ONLINE.items()}
    monkeypatch.setattr(selective_decoding, "ONLINE", tried)
    folder = tmp_path / "egoexo4d"
    egoexo4d_download(folder)
    for split in ("val", "train"):
        egoexo4d.main([str(folder), "--split", split, "--output", str(folder / f"{split}.jsonl")])
    writer.x_encoder = SimpleNamespace(is_video=True)
    return tmp_path


def test_paper_streams_give_the_scores_computed_by_hand(writer, streams):
    """Each stream is one clip, so every choice writes its caption: CIDEr is 5 and 0."""
    result = measured("egoexo4d_streams", streams, writer)
    assert result.paper["metric"] in result.scores
    assert {score.value for score in result.scores.values()} == {10 * (1 / 2) / 2}
    assert (result.pool, result.pool_expected) == (2, 218)
    assert result.title == "EgoExo4D selective decoding (2 of 218 streams)"
    assert result.protocol["prompt"] == "Describe this video in one sentence."


def test_paper_streams_name_a_video_whose_embedding_is_nan(writer, streams):
    writer.clips[1] = float("nan")
    with pytest.raises(ValueError, match=r"val1/.*214-1\.mp4: .* is not finite"):
        measured("egoexo4d_streams", streams, writer)


def test_paper_captioning_has_a_tiny_set_of_every_entry():
    entries = yaml.safe_load((PAPER / "captioning.yaml").read_text())
    assert {*SETS, "egoexo4d_streams"} == set(entries)
