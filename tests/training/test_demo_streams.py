"""The demonstration's streams: joined episodes, and windows around annotated moments."""

import json
from pathlib import Path

import numpy as np
import pytest

from processing import read_clip, read_rows
from training.demo_data import babyai, streams
from training.demo_data.babyai_splits import events
from training.demo_data.streams import WINDOW, main, moments_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("streams") / "made"
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(streams, "EPISODES", 6)
        changed.setattr(streams, "STREAMS", {"train": 9, "val": 1, "test": 1})
        main(["--output", str(output), "--train", "2", "--workers", "2"])
    return output


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stream_joins_the_frames_and_events_of_its_episodes(made: Path) -> None:
    _, second = read(made / "train_streams.jsonl")
    episodes = [babyai.play(babyai.first_seed("train", index)) for index in range(6, 12)]
    frames = np.stack([frame for episode in episodes for frame in episode.frames])
    clip = read_clip(made / second["video"], None)
    assert second["frames"] == len(frames) == len(clip.frames)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 3  # x264 is not lossless

    expected, start = [], 0.0
    for episode in episodes:
        expected += [(start + event["time"], event["text"]) for event in events(episode)]
        start += len(episode.frames) / babyai.FPS
    found = [(event["time"], event["text"]) for event in second["events"]]
    assert [text for _, text in found] == [text for _, text in expected]
    assert [time for time, _ in found] == pytest.approx([time for time, _ in expected], abs=1e-3)


def test_streams_of_each_split_have_their_own_episodes(made: Path) -> None:
    first = {split: read(made / f"{split}_streams.jsonl")[0] for split in ("train", "val", "test")}
    assert len({json.dumps(stream["events"]) for stream in first.values()}) == 3
    counts = json.loads((made / "manifest.json").read_text())["counts"]
    assert counts["train"]["streams"] == 2
    assert counts["train"]["moments"] == len(read(made / "train_moments.jsonl"))


def test_moments_are_in_their_window_and_nearest_to_its_middle(made: Path) -> None:
    rows, bad = read_rows(made / "train_moments.jsonl")
    annotated = {
        Path(row["video"]).name: row["events"] for row in read(made / "train_streams.jsonl")
    }
    assert not bad
    for row in rows:
        moments = annotated[Path(row["video"]).name]
        last_frame = row["end"] - 1 / babyai.FPS
        middle = (row["start"] + last_frame) / 2
        nearest = min(moments, key=lambda event: abs(event["time"] - middle))
        index = moments.index(nearest)
        assert nearest["text"] == row["target"]
        assert row["previous"] == (moments[index - 1]["text"] if index else "")
        assert row["start"] - 1e-6 <= nearest["time"] <= last_frame + 1e-6
    clip = read_clip(rows[0]["video"], None, start=rows[0]["start"], end=rows[0]["end"])
    assert len(clip.frames) == WINDOW


def test_moments_of_a_stream_are_reproducible(made: Path) -> None:
    rows = read(made / "train_streams.jsonl")
    assert [each for row in rows for each in moments_of(row)] == read(made / "train_moments.jsonl")


def test_streams_that_exist_are_not_made_again(made: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(streams, "STREAMS", {"train": 9, "val": 1, "test": 1})
    before = (made / "manifest.json").stat().st_mtime_ns
    main(["--output", str(made), "--train", "2"])
    assert "already contains" in capsys.readouterr().out
    assert (made / "manifest.json").stat().st_mtime_ns == before
