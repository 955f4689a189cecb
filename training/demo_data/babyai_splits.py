"""The BabyAI splits: their clips, and the rows written for them.

Training and classification use consecutive clips. Every other split has one clip per story, so that
a text fits exactly one clip of the split.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from multiprocessing import Pool
from multiprocessing.pool import Pool as PoolType
from pathlib import Path

from tqdm import tqdm

from training.demo_data.babyai import FPS, SPLITS, Episode, first_seed, play, split_of
from training.demo_data.babyai_goals import ALL_PAIRS, SEEN_PAIRS, narrate, narrations
from training.demo_data.babyai_questions import ask, ask_where
from training.demo_data.babyai_world import goal_rows, room_of, state_rows, step_rows
from training.demo_data.writing import write_clip, write_jsonl

EVAL_CLIPS = {
    "val": 300,
    "test": 700,
    "unseen_missions": 300,
    "unseen_pairs": 300,
    "test_actions": 300,
}
NARRATE = "Tell what the agent did."
CONSECUTIVE = ("train", "test_actions")


def write(
    directory: Path, *, episodes: int, eval_clips: int, workers: int, first_index: int = 0
) -> dict[str, dict]:
    """Write clips and rows of every split; return the counts of each split.

    Args:
        first_index: index of the first training clip; the other splits do not depend on it.
    """
    (directory / "clips").mkdir(parents=True)
    summary: dict[str, dict] = {}
    trained_on: frozenset[str] = frozenset()
    with Pool(workers) as pool:
        for split in SPLITS:
            size = episodes if split == "train" else min(EVAL_CLIPS[split], eval_clips)
            if split in CONSECUTIVE:
                first = first_index if split == "train" else 0
                seeds = [first_seed(split, first + index) for index in range(size)]
            else:
                seeds = _distinct_stories(pool, split, size)
            done = pool.imap(partial(_record, directory), seeds, chunksize=8)
            clips = list(tqdm(done, f"babyai {split}", len(seeds)))
            if split == "train":
                trained_on = frozenset(map(_mission, clips))
            _write_rows(directory, split, clips)
            summary[split] = _summarise(clips, trained_on)
    return summary


def _distinct_stories(pool: PoolType, split: str, size: int) -> list[int]:
    """Return seeds of `size` clips with different stories.

    "A, then B" and "B after you A" are two missions but one story: either text fits both.
    """
    seeds: dict[str, int] = {}
    with tqdm(total=size, desc=f"babyai {split}, choosing clips") as progress:
        for start in count(step=size):
            tried = (first_seed(split, index) for index in range(start, start + size))
            for story, seed in pool.imap(_scout, tried, chunksize=8):
                seeds.setdefault(story, seed)
            progress.update(min(len(seeds), size) - progress.n)
            if len(seeds) >= size:
                return list(seeds.values())[:size]


def _scout(seed: int) -> tuple[str, int]:
    """Play an episode without frames; return its story and its seed."""
    episode = play(seed, render=False)
    return narrate(episode.goals), episode.seed


def _record(directory: Path, seed: int) -> dict[str, list[dict]]:
    """Play an episode, write its clip, and return its rows by file."""
    episode = play(seed)
    split = split_of(episode.seed)
    clip = {"video": f"clips/{episode.clip}.mp4"}
    write_clip(directory / clip["video"], episode.frames, FPS)
    pairs = ALL_PAIRS if split == "unseen_pairs" else SEEN_PAIRS
    return {
        # Captions are BabyAI's own missions, narrations are our wording of the goals reached. They
        # have different queries, because one query could not ask for both wordings.
        "captions": [{**clip, "query": "", "target": episode.mission, "group_id": episode.clip}],
        "narrations": [
            {**clip, "query": NARRATE, "target": text, "group_id": episode.clip}
            for text in narrations(episode.goals)
        ],
        "vqa": [{**clip, **question} for question in ask(episode, pairs)],
        "where": [{**clip, **question} for question in ask_where(episode)],
        "events": [{**clip, "fps": FPS, "events": list(events(episode))}],
        "steps": step_rows(clip, episode),
        "goals": goal_rows(clip, episode),
        "states": [room_of(clip, episode)],  # `_write_rows` makes the rows, from all clips
    }


def events(episode: Episode) -> Iterator[dict[str, float | str]]:
    """Yield the time of each reached goal, in seconds, and its narration."""
    for goal, step in zip(episode.goals, episode.goal_steps, strict=True):
        yield {"time": step / FPS, "text": narrate((goal,))}


def _write_rows(directory: Path, split: str, clips: list[dict[str, list[dict]]]) -> None:
    rows = {name: [row for clip in clips for row in clip[name]] for name in clips[0]}
    if split != "train":
        del rows["narrations"], rows["where"]
    if split != "test":
        del rows["events"]
    if split == "test_actions":
        del rows["vqa"]
        rows["states"] = state_rows(rows["states"])
    else:
        del rows["states"]  # the other splits for evaluation have one clip of a mission
    if split != "test":
        del rows["steps"]
    if split not in ("val", "test_actions"):
        del rows["goals"]
    for name, group in rows.items():
        write_jsonl(directory / f"{split}_{name}.jsonl", group)


def _mission(clip: dict[str, list[dict]]) -> str:
    return clip["captions"][0]["target"]


def _summarise(clips: list[dict[str, list[dict]]], trained_on: frozenset[str]) -> dict:
    missions = [_mission(clip) for clip in clips]
    return {
        "clips": len(clips),
        "one_goal": sum(len(clip["events"][0]["events"]) == 1 for clip in clips),
        "missions": len(set(missions)),
        "missions_in_training": len(trained_on.intersection(missions)),
        "questions": Counter(row["question_type"] for clip in clips for row in clip["vqa"]),
        "answers": len({row["target"] for clip in clips for row in clip["vqa"]}),
    }


__all__ = ["NARRATE", "events", "write"]
