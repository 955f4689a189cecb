"""Rows for world modelling and anticipation, about clips of held-out splits.

- `states`: an initial and a final state, and four candidate clips of other rooms. The candidates'
  missions are "go to" and "pick up" for two objects of the room. Any of them could be the clip's
  own mission, so the candidates alone do not show which one is right. The states show the object;
  only both together show whether it was picked up.
- `steps`: the two goals of a clip, each with its start and end. The clip of the first goal does not
  show the second, only which objects are in the room.
- `goals`: the moment in which the only goal of a clip is reached. Before it, the clip shows where
  the agent goes.
"""

import random
from collections import defaultdict
from collections.abc import Callable

from training.demo_data.babyai import FPS, Episode

VERBS = ("go to", "pick up")
CANDIDATES = 4
Mission = tuple[str, str]  # verb and object
Choice = Callable[[dict, set[Mission], random.Random], list[Mission]]


def step_rows(clip: dict, episode: Episode) -> list[dict]:
    """Return a row for each goal of a clip with two goals, from the previous goal to this one."""
    if len(episode.goals) == 1:
        return []
    first, last = episode.goal_steps
    spans = ((0, first), (first, last))  # the frame of a goal ends one clip and begins the next
    return [
        {**clip, "query": "", "target": goal.plain, "start": start / FPS, "end": (end + 1) / FPS}
        for goal, (start, end) in zip(episode.goals, spans, strict=True)
    ]


def goal_rows(clip: dict, episode: Episode) -> list[dict]:
    """Return a row for the moment of the goal of a clip with one goal."""
    if len(episode.goals) == 2:
        return []
    (goal,), (step,) = episode.goals, episode.goal_steps
    times = {"start": step / FPS, "end": (step + 1) / FPS}
    return [{**clip, "query": "", "target": goal.plain, **times}]


def room_of(clip: dict, episode: Episode) -> dict:
    """Return the facts about a clip with one goal that `state_rows` needs."""
    goal = episode.goals[0]
    objects = sorted({thing.name for thing in episode.things} - {goal.thing})
    return {
        **clip,
        "name": episode.clip,
        "verb": goal.verb,
        "thing": goal.thing,
        "objects": objects,
    }


def state_rows(rooms: list[dict]) -> list[dict]:
    """Return a row for each room that has two objects with clips of other rooms about them.

    Fewer than about 40 clips show too few missions. If no room has such objects, the missions of
    the other candidates are any three.

    Args:
        rooms: those of `room_of`, of a whole split with the goals `VERBS`.
    """
    clips = defaultdict(list)
    for room in rooms:
        clips[room["verb"], room["thing"]].append(room)
    for choose in (_missions_in_the_room, _any_missions):
        if rows := [row for room in rooms if (row := _state_row(room, clips, choose)) is not None]:
            return rows
    return []


def _state_row(room: dict, clips: dict[Mission, list[dict]], choose: Choice) -> dict | None:
    rng = random.Random(room["name"])
    own = room["verb"], room["thing"]
    others = {
        mission: [each for each in found if each is not room] for mission, found in clips.items()
    }
    missions = choose(room, {mission for mission, found in others.items() if found}, rng)
    if own not in missions or len(missions) < CANDIDATES:
        return None
    rng.shuffle(missions)
    candidates = [rng.choice(others[mission]) for mission in missions]
    return {
        "video": room["video"],
        "query": "",
        "target": candidates[missions.index(own)]["name"],
        "candidates": [each["video"] for each in candidates],
        "candidate_ids": [each["name"] for each in candidates],
        "candidate_labels": [f"{verb} the {thing}" for verb, thing in missions],
        "part": room["verb"],
    }


def _missions_in_the_room(room: dict, known: set[Mission], rng: random.Random) -> list[Mission]:
    """Return all goals of the room's own object and of one other."""
    things = [thing for thing in room["objects"] if all((verb, thing) in known for verb in VERBS)]
    if not things:
        return []
    pairs = [(verb, thing) for thing in (room["thing"], rng.choice(things)) for verb in VERBS]
    return [pair for pair in pairs if pair in known]


def _any_missions(room: dict, known: set[Mission], rng: random.Random) -> list[Mission]:
    """Return the room's own mission and three others."""
    own = room["verb"], room["thing"]
    others = sorted(known - {own})
    return [own, *rng.sample(others, CANDIDATES - 1)] if own in known and others[2:] else []


__all__ = ["goal_rows", "room_of", "state_rows", "step_rows"]
