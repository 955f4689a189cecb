"""The demonstration data: its rows are checked against a replay of each clip."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from minigrid.envs.babyai.core.levelgen import LevelGen
from minigrid.envs.babyai.core.verifier import ActionInstr, SeqInstr
from minigrid.utils.baby_ai_bot import BabyAIBot

from training.demo_data import babyai, babyai_goals, babyai_splits, easy_vqa
from training.demo_data.__main__ import main
from training.demo_data.babyai_world import VERBS, state_rows

EPISODES, EVAL_CLIPS = 40, 12
TRAINING_SPLITS = ("train", "val", "test")
ASKED_SPLITS = tuple(split for split in babyai.SPLITS if split != "test_actions")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    make(output)
    return output


def make(output: Path, *, episodes: int = EPISODES, eval_clips: int = EVAL_CLIPS) -> None:
    sizes = ["--episodes", str(episodes), "--eval-clips", str(eval_clips)]
    main(["--output", str(output), *sizes, "--workers", "2"])


# A replay of a clip, which does not use the code under test.


@dataclass
class Replay:
    """The record of a replayed episode."""

    mission: str
    start: dict[str, list[tuple[int, int]]]  # name -> tiles
    end: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)
    successes: dict[str, int] = field(default_factory=dict)  # clause -> first step
    picked: set[str] = field(default_factory=set)
    held: str | None = None


@cache
def replay(seed: int) -> Replay:
    """Play a seed again and record the successes of each clause's `verify`."""
    room = babyai.make_room(seed)
    with redirect_stdout(None):
        room.reset(seed=seed)
    seen = Replay(room.mission, start=objects(room))
    for clause in clauses(room.instrs):
        record_success(clause, room, seen)
    bot, action, over = BabyAIBot(room), None, False
    seen.frames.append(room.get_frame(tile_size=8, highlight=False))
    while not over:
        action = bot.replan(action)
        over = room.step(action)[2]
        seen.frames.append(room.get_frame(tile_size=8, highlight=False))
        if room.carrying:
            seen.picked.add(f"{room.carrying.color} {room.carrying.type}")
    seen.end = objects(room)
    seen.held = room.carrying and f"{room.carrying.color} {room.carrying.type}"
    return seen


def objects(room: LevelGen) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for x in range(1, room.width - 1):
        for y in range(1, room.height - 1):
            if cell := room.grid.get(x, y):
                found.setdefault(f"{cell.color} {cell.type}", []).append((x, y))
    return found


def clauses(instr: ActionInstr | SeqInstr) -> list[ActionInstr]:
    return [instr] if isinstance(instr, ActionInstr) else [instr.instr_a, instr.instr_b]


def record_success(clause: ActionInstr, room: LevelGen, seen: Replay) -> None:
    """Wrap `verify` so that the first step of a success is recorded."""
    text, verify = clause.surface(room), clause.verify

    def recording(action: int) -> str:
        status = verify(action)
        if status == "success":
            seen.successes.setdefault(text, room.step_count)
        return status

    clause.verify = recording


def seed_of(row: dict) -> int:
    return int(Path(row["video"]).stem.rsplit("_", 1)[1])


CLAUSE = re.compile(r"(go|went|pick|put)\w* (?:to |up )?the (\w+ \w+)(?: next to the (\w+ \w+))?")


def story(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the goals of a mission or narration in any wording, in the order of execution."""
    goals = [(verb.replace("went", "go"), *names) for verb, *names in CLAUSE.findall(text.lower())]
    return tuple(reversed(goals) if " after you " in text else goals)


# The tests.


def test_story_reads_every_wording() -> None:
    goals = (("go", "red ball", ""), ("put", "blue key", "grey box"))
    for text in (
        "go to the red ball, then put the blue key next to the grey box",
        "go to the red ball and put the blue key next to the grey box",
        "put the blue key next to the grey box after you go to the red ball",
        "the agent went to the red ball and then put the blue key next to the grey box",
        "after going to the red ball, the agent put the blue key next to the grey box",
    ):
        assert story(text) == goals


def test_babyai_clips_and_rows_do_not_depend_on_the_number_of_workers(
    demo: Path, tmp_path: Path
) -> None:
    babyai_splits.write(tmp_path, episodes=EPISODES, eval_clips=EVAL_CLIPS, workers=1)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert files == sorted(
        path.relative_to(demo / "babyai") for path in (demo / "babyai").rglob("*.*")
    )
    for file in files:
        assert (tmp_path / file).read_bytes() == (demo / "babyai" / file).read_bytes(), file


def test_demo_data_that_exists_is_not_made_again(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    make(demo)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    assert "already contains this data" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_data_that_is_unfinished_or_different_is_made_again(tmp_path: Path) -> None:
    leftover = tmp_path / "babyai" / "clips" / "leftover.mp4"
    leftover.parent.mkdir(parents=True)
    for episodes in (3, 4):
        leftover.touch()
        make(tmp_path, episodes=episodes, eval_clips=1)
        assert not leftover.exists()
        assert len(list(leftover.parent.glob("train_*"))) == episodes


@pytest.mark.slow
def test_demo_data_first_index_continues_the_training_clips(tmp_path: Path) -> None:
    names = {}
    for first, episodes in ((0, 3), (1, 2)):
        folder = tmp_path / str(first)
        sizes = ["--episodes", str(episodes), "--eval-clips", "1", "--first-index", str(first)]
        main(["--output", str(folder), "--workers", "1", *sizes])
        names[first] = sorted(path.name for path in (folder / "babyai" / "clips").iterdir())
    train = [name for name in names[0] if name.startswith("train_")]
    assert [name for name in names[1] if name.startswith("train_")] == train[1:]
    assert [name for name in names[0] if name not in train] == [
        name for name in names[1] if name not in train
    ]


@pytest.mark.parametrize("first", ["-1", "10000000"])
def test_demo_data_rejects_an_index_of_another_split(tmp_path: Path, first: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--episodes", "1", "--first-index", first])
    assert "the indices are 0 to 9999999" in capsys.readouterr().err


def test_babyai_splits_have_their_sizes(demo: Path) -> None:
    counts = json.loads((demo / "manifest.json").read_text())["counts"]["babyai"]
    assert [counts[split]["clips"] for split in babyai.SPLITS] == [EPISODES] + 5 * [EVAL_CLIPS]
    assert counts["train"]["one_goal"] == EPISODES * 3 // 5
    rows = read(demo / "babyai" / "train_captions.jsonl")
    missions = " | ".join(row["target"] for row in rows)
    assert all(joint in missions for joint in (", then ", " after you ", " and "))
    for split in ASKED_SPLITS[1:]:
        pool = read(demo / "babyai" / f"{split}_captions.jsonl")
        assert len({story(row["target"]) for row in pool}) == len(pool) == EVAL_CLIPS


def test_babyai_test_actions_have_one_goal_of_a_trained_kind(demo: Path) -> None:
    rows = read(demo / "babyai" / "test_actions_captions.jsonl")
    assert len(rows) == EVAL_CLIPS
    for row in rows:
        (goal,) = babyai.play(seed_of(row), render=False).goals
        assert goal.verb in ("go to", "pick up") and not babyai_goals.is_held_out((goal,))


def test_babyai_splits_have_disjoint_seeds(demo: Path) -> None:
    seeds = {
        split: {seed_of(row) for row in read(demo / "babyai" / f"{split}_captions.jsonl")}
        for split in babyai.SPLITS
    }
    assert sum(map(len, seeds.values())) == len(set.union(*seeds.values()))


def texts(demo: Path, splits: tuple[str, ...], kind: str) -> Iterator[str]:
    for split in splits:
        for row in read(demo / "babyai" / f"{split}_{kind}.jsonl"):
            yield row["query"]
            yield row["target"]


def test_babyai_held_out_pairs_are_not_in_training(demo: Path) -> None:
    forbidden = re.compile("|".join(babyai_goals.HELD_OUT_PAIRS))
    for kind in ("captions", "vqa"):
        for text in texts(demo, (*TRAINING_SPLITS, "unseen_missions"), kind):
            assert not forbidden.search(text), text
    for text in texts(demo, ("train",), "narrations"):
        assert not forbidden.search(text), text
    for split in TRAINING_SPLITS:
        for row in read(demo / "babyai" / f"{split}_captions.jsonl"):
            assert babyai_goals.HELD_OUT_PAIRS.isdisjoint(replay(seed_of(row)).start)
    for row in read(demo / "babyai" / "unseen_pairs_captions.jsonl"):
        assert forbidden.search(row["target"])


def test_babyai_held_out_missions_are_not_in_training(demo: Path) -> None:
    trained_on = {story(text) for text in texts(demo, TRAINING_SPLITS, "captions")}
    trained_on |= {story(text) for text in texts(demo, ("train",), "narrations")}
    held_out = {story(text) for text in texts(demo, ("unseen_missions",), "captions")} - {()}
    assert len(held_out) == EVAL_CLIPS
    assert trained_on.isdisjoint(held_out)
    # The few rows here could be disjoint by chance, so the rule is tested too: it holds out a tenth
    # of all missions, and every clip is on its side.
    goals = [babyai_goals.Goal("go to", name) for name in babyai_goals.SEEN_PAIRS]
    pairs = [(first, last) for first in goals for last in goals if first != last]
    assert sum(map(babyai_goals.is_held_out, pairs)) / len(pairs) == pytest.approx(0.1, abs=0.04)
    for split in (*TRAINING_SPLITS, "unseen_missions"):
        for row in read(demo / "babyai" / f"{split}_captions.jsonl"):
            goals = babyai.play(seed_of(row), render=False).goals
            assert babyai_goals.is_held_out(goals) == (split == "unseen_missions")


@pytest.mark.parametrize("name", [*map("{}_captions".format, babyai.SPLITS), "train_narrations"])
def test_babyai_captions_agree_with_the_verifiers(demo: Path, name: str) -> None:
    for row in read(demo / "babyai" / f"{name}.jsonl"):
        seen = replay(seed_of(row))
        done = sorted(seen.successes, key=seen.successes.get)
        assert story(row["target"]) == story("; ".join(done))
        if name != "train_narrations":
            assert row["target"] == seen.mission
        assert row["group_id"] in row["video"]


def test_babyai_questions_about_every_place_are_in_training_only(demo: Path) -> None:
    rows = read(demo / "babyai" / "train_where.jsonl")
    assert {path.name for path in (demo / "babyai").glob("*_where.jsonl")} == {"train_where.jsonl"}
    for row in rows:
        check_where(replay(seed_of(row)), row["query"], row["target"])
    asked = {(row["video"], row["query"]) for row in rows}
    assert len(asked) == len(rows) > 4 * EPISODES
    some = [r for r in read(demo / "babyai" / "train_vqa.jsonl") if r["question_type"] == "where"]
    assert some and {(row["video"], row["query"]) for row in some} < asked
    shares = Counter(row["target"] for row in rows)
    assert len(shares) == 4 and max(shares.values()) < 0.4 * len(rows)


def test_babyai_clips_show_the_replay_and_events_have_its_times(demo: Path) -> None:
    for row in read(demo / "babyai" / "test_events.jsonl"):
        seen = replay(seed_of(row))
        with av.open(demo / "babyai" / row["video"]) as file:
            assert file.streams.video[0].average_rate == row["fps"] == babyai.FPS
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == len(seen.frames)
        assert frames[0].shape == (64, 64, 3)
        for step, decoded in enumerate(frames):
            errors = [np.abs(decoded.astype(float) - frame).mean() for frame in seen.frames]
            assert errors[step] < 2
            # The frame is nearest to its own step; two steps may have the same picture.
            assert errors[step] == min(errors)

        times = [event["time"] for event in row["events"]]
        assert times == sorted(step / babyai.FPS for step in seen.successes.values())
        assert times[0] > 0 and times[-1] == (len(frames) - 1) / row["fps"]
        assert len(set(times)) == len(times)
        goals = [story(event["text"])[0] for event in row["events"]]
        assert tuple(goals) == story(seen.mission)


def successes_of(row: dict) -> list[tuple[str, int]]:
    """Return each reached goal of a row's clip and its step, in their order."""
    return sorted(replay(seed_of(row)).successes.items(), key=lambda pair: pair[1])


def test_babyai_steps_are_the_two_goals_of_a_clip_with_their_times(demo: Path) -> None:
    rows = read(demo / "babyai" / "test_steps.jsonl")
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["video"] == second["video"]
        (one, step), (other, last) = successes_of(first)
        assert (story(first["target"]), story(second["target"])) == (story(one), story(other))
        times = [row[name] * babyai.FPS for row in (first, second) for name in ("start", "end")]
        assert times == pytest.approx([0, step + 1, step, last + 1])
    captions = read(demo / "babyai" / "test_captions.jsonl")
    assert len(rows) == 2 * sum(len(story(row["target"])) == 2 for row in captions) > 0


@pytest.mark.parametrize("split", ["val", "test_actions"])
def test_babyai_goals_start_when_the_replay_reaches_them(demo: Path, split: str) -> None:
    rows = read(demo / "babyai" / f"{split}_goals.jsonl")
    for row in rows:
        [(goal, step)] = successes_of(row)
        assert story(row["target"]) == story(goal)
        assert row["start"] * babyai.FPS == pytest.approx(step)
        assert row["end"] * babyai.FPS == pytest.approx(step + 1)
    captions = read(demo / "babyai" / f"{split}_captions.jsonl")
    assert len(rows) == sum(len(story(row["target"])) == 1 for row in captions) > 0


def rooms(count: int, things: str) -> list[dict]:
    """Return rooms of `babyai_world.room_of`: each has its own object and two others."""
    return [
        {
            "video": f"clips/{index}.mp4",
            "name": str(index),
            "verb": VERBS[index % 2],
            "thing": things[index // 2 % len(things)],
            "objects": [things[(index // 2 + step) % len(things)] for step in (1, 2)],
        }
        for index in range(count)
    ]


def test_state_rows_do_not_give_the_right_candidate_away() -> None:
    """Every candidate could be the right one: it shows another room, one of two objects of the
    states' room and one of two goals, in any position."""
    pool = {room["video"]: room for room in rooms(400, "abcdefgh")}
    rows = state_rows(list(pool.values()))
    assert len(rows) == 400
    places = Counter()
    for row in rows:
        room, candidates = pool[row["video"]], [pool[video] for video in row["candidates"]]
        assert room not in candidates and len({each["name"] for each in candidates}) == 4
        missions = [(each["verb"], each["thing"]) for each in candidates]
        things = {thing for _, thing in missions}
        assert room["thing"] in things <= {room["thing"], *room["objects"]}
        assert sorted(missions) == sorted((verb, thing) for verb in VERBS for thing in things)
        assert row["candidate_labels"] == [f"{verb} the {thing}" for verb, thing in missions]
        assert row["candidate_ids"] == [each["name"] for each in candidates]
        right = row["candidate_ids"].index(row["target"])
        assert missions[right] == (room["verb"], room["thing"])
        places[right] += 1
    assert len(places) == 4 and min(places.values()) > 70
    assert state_rows(list(pool.values())) == rows  # whatever was drawn before


def test_state_rows_of_few_rooms_take_any_other_missions() -> None:
    few = [room | {"objects": []} for room in rooms(12, "abc")]
    rows = state_rows(few)
    assert len(rows) == 12
    for row in rows:
        assert len(set(row["candidate_labels"])) == 4
        assert row["video"] not in row["candidates"]
    assert state_rows(few[:6]) == []  # no mission has a clip of another room


def check_what(seen: Replay, query: str, target: str) -> None:
    if query == "What did the agent pick up?":
        assert {target} == {f"the {name}" for name in seen.picked}
    elif query == "What did the agent go to?":
        assert seen.mission == f"go to {target}"
    else:
        moved = re.fullmatch(r"What did the agent put the (.+) next to\?", query)[1]
        assert f"put the {moved} next to {target}" in seen.mission
        assert neighbours(seen, moved) == [target.removeprefix("the ")]


def neighbours(seen: Replay, name: str) -> list[str]:
    ((x, y),) = seen.end[name]
    around = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)}
    return [other for other, places in seen.end.items() for at in places if at in around]


def check_color(seen: Replay, query: str, target: str) -> None:
    kind = re.fullmatch(r"What color is the (\w+)\?", query)[1]
    assert [(name, len(at)) for name, at in seen.start.items() if name.endswith(kind)] == [
        (f"{target} {kind}", 1)
    ]


def check_where(seen: Replay, query: str, target: str) -> None:
    name, when = re.fullmatch(r"Where is the (.+) at the (start|end)\?", query).groups()
    ((x, y),) = getattr(seen, when)[name]
    assert target.split() == [("top", "bottom")[y > 3], ("left", "right")[x > 3]]


def check_count(seen: Replay, query: str, target: str) -> None:
    kind = re.fullmatch(r"How many (ball|box|key)e?s are there at the start\?", query)[1]
    number = sum(len(at) for name, at in seen.start.items() if name.endswith(kind))
    assert target == ("zero", "one", "two", "three", "four")[number]


def check_exists(seen: Replay, query: str, target: str) -> None:
    name = re.fullmatch(r"Is there a (.+) in the room\?", query)[1]
    assert target == ("yes" if name in seen.start else "no")


def check_action(seen: Replay, query: str, target: str) -> None:
    name = re.fullmatch(r"What did the agent do with the (.+)\?", query)[1]
    (start,) = seen.start[name]
    assert target in ("went to it", "picked it up", "moved it", "nothing")
    assert (target == "picked it up") == (name == seen.held)
    assert (target == "moved it") == (name in seen.end and seen.end[name] != [start])
    assert (target == "went to it") == (f"go to the {name}" in seen.mission)
    if target == "nothing":
        assert name not in seen.picked and seen.end[name] == [start]


def check_order(seen: Replay, query: str, target: str) -> None:
    done = [story(text)[0] for text in sorted(seen.successes, key=seen.successes.get)]
    if when := re.fullmatch(r"What did the agent do (first|last)\?", query):
        assert story(target)[0] == done[("first", "last").index(when[1])]
    else:
        assert target == ("yes" if list(story(query)) == done else "no")
        assert sorted(story(query)) == sorted(done)


CHECKS = {
    "what": check_what,
    "color": check_color,
    "where": check_where,
    "count": check_count,
    "exists": check_exists,
    "action": check_action,
    "order": check_order,
}


@pytest.mark.parametrize("split", ASKED_SPLITS)
def test_babyai_answers_agree_with_the_replay(demo: Path, split: str) -> None:
    rows = read(demo / "babyai" / f"{split}_vqa.jsonl")
    for row in rows:
        CHECKS[row["question_type"]](replay(seed_of(row)), row["query"], row["target"])
        assert "group_id" not in row
    assert {row["question_type"] for row in rows} == CHECKS.keys()


def test_demo_data_query_differs_from_its_target_and_the_file_exists(demo: Path) -> None:
    for path in demo.glob("*/*_*.jsonl"):
        for row in read(path):
            if "query" in row:
                assert row["query"].lower() != row["target"].lower()
                assert (path.parent / row.get("video", row.get("image"))).exists()


def test_easy_vqa_is_the_official_data(demo: Path) -> None:
    rows = {path.stem: read(path) for path in (demo / "easy_vqa").glob("*.jsonl")}
    assert len(rows["train_vqa"]) + len(rows["val_vqa"]) == 38575
    assert len(rows["test_vqa"]) == 9673
    images = {name: {row["image"] for row in group} for name, group in rows.items()}
    assert len(images["train_vqa"]) == 3600 and len(images["val_vqa"]) == 400
    assert images["train_vqa"].isdisjoint(images["val_vqa"])
    assert images["train_captions"] <= images["train_vqa"]
    assert images["test_captions"] <= images["test_vqa"]
    assert Counter(row["question_type"] for row in rows["test_vqa"])["yes/no"] == sum(
        row["target"] in ("yes", "no") for row in rows["test_vqa"]
    )
    # An answer that is a shape or a color is in the image's caption.
    captions = {row["image"]: row["target"].split() for row in rows["train_captions"]}
    for row in rows["train_vqa"]:
        if row["question_type"] != "yes/no" and row["image"] in captions:
            assert row["target"] in captions[row["image"]]


@pytest.mark.parametrize(
    ("text", "answer", "facts"),
    [
        ("what is the blue shape?", "circle", {"blue", "circle"}),
        ("is there a red shape?", "yes", {"red"}),
        ("is there a red shape?", "no", set()),
        ("is there not a triangle in the image?", "no", {"triangle"}),
        ("is no triangle present?", "yes", set()),
    ],
)
def test_easy_vqa_facts_of_a_question(text: str, answer: str, facts: set[str]) -> None:
    assert easy_vqa._facts(text, answer) == facts
