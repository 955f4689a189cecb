"""Ego-Exo4D: a small download in the documented layout."""

import json
from pathlib import Path

import pytest

from eval.annotated_streams import read_streams
from eval.egoexo4d import main
from tests.tiny import noise, write_clip


def described(*events: tuple[float, str], rejected: bool = False) -> dict:
    return {
        "annotation_uid": "fe6b4107",
        "annotator_id": "5284063695022975",
        "rejected": rejected,
        "reject_reason": None,
        "descriptions": [
            {
                "text": text,
                "timestamp": time,
                "narration_subject": "C",
                "ego_visible": "1",
                "best_exo": {"raw_cam_id": "1", "cam_id": "cam01"},
                "unsure": "0",
            }
            for time, text in events
        ],
    }


def take(name: str, domain: str) -> dict:
    def stream(kind: str, file: str) -> dict:
        return {"readable_stream_id": kind, "relative_path": f"frame_aligned_videos/{file}.mp4"}

    return {
        "root_dir": f"takes/{name}",
        "take_name": name,
        "take_uid": f"uid-{name}",
        "parent_task_name": domain,
        "frame_aligned_videos": {
            "cam01": {"0": stream("0", "cam01")},
            "aria01": {
                "slam-left": stream("slam-left", "aria01_1201-1"),
                "rgb": stream("rgb", "aria01_214-1"),
            },
            "best_exo": {"0": {"relative_path": None}},
        },
    }


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    names = {"bike": "Bike Repair", "soup": "Cooking", "gone": "Cooking", "ball": "Soccer"}
    names |= {"bad": "Health", "other": "Cooking"}
    (tmp_path / "takes.json").write_text(json.dumps([take(*each) for each in names.items()]))
    for name, folder in (("bike", "downscaled/448"), ("soup", ""), ("bad", ""), ("ball", "")):
        videos = tmp_path / "takes" / name / "frame_aligned_videos" / folder
        videos.mkdir(parents=True)
        write_clip(videos / "aria01_214-1.mp4", noise(5, 40, 40, 3))
    turns = (0.5, "C turns the wheel."), (0.1, "C moves his right hand.")
    found = {
        "uid-bike": [described((1.0, "no"), rejected=True), described(*turns)],
        "uid-soup": [described((0.2, "C stirs."), (0.3, "  ")), described((0.4, "C leans."))],
        "uid-gone": [described((0.2, "C stirs."))],
        "uid-ball": [described((0.2, "C kicks."))],
        "uid-bad": [described((0.2, "C sits."), rejected=True)],
        "uid-lost": [described((0.2, "C jumps."))],
    }
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/atomic_descriptions_val.json"
    path.write_text(json.dumps({"annotations": found}))
    return tmp_path


def test_egoexo4d_writes_takes_as_streams(downloads: Path, capsys) -> None:
    output = downloads / "rows" / "val.jsonl"
    main([str(downloads), "--output", str(output)])
    streams, bad = read_streams(output)
    assert not bad
    assert [stream.texts for stream in streams] == [
        ["C moves his right hand.", "C turns the wheel."],
        ["C stirs."],
    ]
    assert "downscaled/448" in streams[0].video
    printed = capsys.readouterr().out
    for line in (
        "left out: 1 takes of other domains",
        "left out: 1 takes whose video was not downloaded",
        "left out: 1 takes without an accepted annotation",
        "left out: 1 annotated takes that takes.json does not contain",
        "2 streams, 3 annotations",
    ):
        assert line in printed


def test_egoexo4d_takes_other_domains(downloads: Path) -> None:
    output = downloads / "val.jsonl"
    main([str(downloads), "--output", str(output), "--domains", "Soccer"])
    assert [stream.texts for stream in read_streams(output)[0]] == [["C kicks."]]
    with pytest.raises(ValueError, match="no take of Music can be used"):
        main([str(downloads), "--output", str(output), "--domains", "Music"])
