"""BabyAI as video: rooms of BabyAI's generator, solved by BabyAI's expert.

`play` turns a seed into an `Episode`: one room, one mission, every frame, and a record of each
object. The seed determines everything, including the split, so any clip can be played again from
the number in its name.
"""

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.levelgen import LevelGen
from minigrid.envs.babyai.core.roomgrid_level import RejectSampling
from minigrid.envs.babyai.core.verifier import AfterInstr, Instr, ObjDesc, SeqInstr, pos_next_to
from minigrid.utils.baby_ai_bot import BabyAIBot

from training.demo_data.babyai_goals import HELD_OUT_PAIRS, TYPES, Goal, goals_of, is_held_out

FPS = 5
TILE = 8  # pixels; a room of 8 x 8 tiles makes frames of 64 x 64
MAX_STEPS = 40
MISSIONS_PER_ROOM = 50  # drawn before the room is rejected

SPLITS = ("train", "val", "test", "unseen_missions", "unseen_pairs", "test_actions")
SEEDS_PER_SPLIT = 10**9
SEEDS_PER_CLIP = 100  # one is used; the others replace it if its episode is not good


@dataclass(frozen=True)
class Thing:
    """One object of the room and its record, read from the simulator."""

    kind: str
    color: str
    start: tuple[int, int]
    end: tuple[int, int] | None  # None: the agent carries it at the end
    carried: bool
    faced_at: int | None  # first step at which the agent was directly in front of it

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Episode:
    """One mission in one room, from its first step to its last."""

    seed: int
    mission: str
    goals: tuple[Goal, ...]  # in the order they were reached
    goal_steps: tuple[int, ...]
    things: tuple[Thing, ...]
    frames: tuple[np.ndarray, ...]  # (64, 64, 3) uint8 each; empty if not rendered

    @property
    def clip(self) -> str:
        """Name of the clip, which contains the seed."""
        return f"{split_of(self.seed)}_{self.seed:010d}"


def first_seed(split: str, index: int) -> int:
    """Return the first of the seeds of clip `index` of `split`."""
    return SPLITS.index(split) * SEEDS_PER_SPLIT + index * SEEDS_PER_CLIP


def split_of(seed: int) -> str:
    """Return the split to which a seed belongs."""
    return SPLITS[seed // SEEDS_PER_SPLIT]


class _Room(LevelGen):
    """BabyAI's generator of missions, restricted to one room, clear wording and one split."""

    def __init__(
        self, split: str, *, num_objects: int, actions: Sequence[str], instruction: str
    ) -> None:
        self.split = split
        super().__init__(
            num_rows=1,
            num_cols=1,
            num_dists=num_objects,
            locked_room_prob=0,
            locations=False,
            unblocking=False,
            action_kinds=actions,
            instr_kinds=(instruction,),
        )

    @property
    def objects(self) -> list[WorldObj]:
        """Objects on the floor, without walls and without a carried object."""
        return [cell for cell in self.grid.grid if cell is not None and cell.type != "wall"]

    def add_object(self, i: int, j: int, kind: str, color: str) -> tuple:
        """Add an object, unless its colour and type are held out from the split."""
        if self.split != "unseen_pairs" and f"{color} {kind}" in HELD_OUT_PAIRS:
            raise RejectSampling("the object is held out from this split")
        return super().add_object(i, j, kind, color)

    def rand_instr(
        self, action_kinds: Sequence[str], instr_kinds: Sequence[str], depth: int = 0
    ) -> Instr:
        """Draw missions until one suits, with at most two clauses (BabyAI draws up to four)."""
        if depth > 0:
            return super().rand_instr(action_kinds, ("action",), depth)
        for _ in range(MISSIONS_PER_ROOM):
            instr = super().rand_instr(action_kinds, instr_kinds)
            if self._suits(goals_of(instr)):
                return instr
        raise RejectSampling("the room has no clear mission for this split")

    def rand_obj(self, types: Sequence[str] = TYPES) -> ObjDesc:
        """Describe an object by colour and type: BabyAI's "the ball" would be ambiguous."""
        thing = self._rand_elem(self.objects)
        return ObjDesc(thing.type, thing.color)

    def _suits(self, goals: tuple[Goal, ...]) -> bool:
        """Return whether a mission is unambiguous in this room and belongs to the split."""
        names = [name for goal in goals for name in goal.names]
        in_room = Counter(f"{thing.color} {thing.type}" for thing in self.objects)
        # Each object is named once and exists once, so its name identifies it.
        if len(set(names)) < len(names) or any(in_room[name] > 1 for name in names):
            return False
        if self.split == "unseen_pairs":
            return not HELD_OUT_PAIRS.isdisjoint(names)
        return is_held_out(goals) == (self.split == "unseen_missions")

    def gen_obs(self) -> dict:
        return {}  # the agent's view is slow to compute, and the expert computes its own


def make_room(seed: int) -> _Room:
    """Return the room of a seed: of five clips, three have one goal and two have two.

    `test_actions` is for classification: one goal, of the few kinds that all occur in training.
    """
    clip = seed // SEEDS_PER_CLIP
    rng, split = random.Random(clip), split_of(seed)
    if split == "test_actions":
        action = rng.choice(("goto", "pickup"))
        return _Room(split, num_objects=rng.randint(2, 6), actions=(action,), instruction="action")
    if clip % 5 >= 3:
        return _Room(
            split,
            num_objects=rng.randint(4, 6),
            actions=("goto", "pickup", "putnext"),
            instruction=rng.choice(("and", "seq", "seq")),
        )
    # "putnext" twice as often as the others: it has 210 missions, they have 15 each.
    action = rng.choice(("goto", "pickup", "putnext", "putnext"))
    return _Room(split, num_objects=rng.randint(2, 6), actions=(action,), instruction="action")


def play(seed: int, *, render: bool = True) -> Episode:
    """Return the first good episode at or after `seed`, within the seeds of its clip.

    Raises: `RuntimeError` if there is none.
    """
    for candidate in range(seed, (seed // SEEDS_PER_CLIP + 1) * SEEDS_PER_CLIP):
        episode = _attempt(candidate, render)
        if episode is not None and _is_good(episode):
            return episode
    raise RuntimeError(f"seed {seed}: its clip has no good episode; raise SEEDS_PER_CLIP")


def _attempt(seed: int, render: bool) -> Episode | None:
    """Let the expert play one room; return `None` if it needs more than `MAX_STEPS`."""
    room = make_room(seed)
    with redirect_stdout(None):  # BabyAI prints each layout that it rejects
        room.reset(seed=seed)
    goals, objects = goals_of(room.instrs), room.objects
    starts = [_place(thing) for thing in objects]
    goal_steps: dict[Goal, int] = {}
    faced_at: dict[int, int] = {}
    carried: set[int] = set()
    frames: list[np.ndarray] = []

    bot, action, solved = BabyAIBot(room), None, False
    for step in range(MAX_STEPS + 1):
        for goal, reached in zip(goals, _reached(room.instrs, solved), strict=True):
            if reached:
                goal_steps.setdefault(goal, step)
        faced_at.setdefault(id(room.grid.get(*room.front_pos)), step)
        carried.add(id(room.carrying))
        if render:
            frames.append(_frame(room))
        if solved:
            break
        action = bot.replan(action)
        _, reward, _, _, _ = room.step(action)
        solved = reward > 0
    else:
        return None

    things = tuple(
        Thing(
            kind=thing.type,
            color=thing.color,
            start=start,
            end=None if thing is room.carrying else _place(thing),
            carried=id(thing) in carried,
            faced_at=faced_at.get(id(thing)),
        )
        for thing, start in zip(objects, starts, strict=True)
    )
    steps = tuple(goal_steps[goal] for goal in goals)
    return Episode(seed, room.mission, goals, steps, things, tuple(frames))


def _place(thing: WorldObj) -> tuple[int, int]:
    x, y = thing.cur_pos
    return int(x), int(y)


def _reached(instr: Instr, solved: bool) -> tuple[bool, ...]:
    """Return which goals BabyAI's verifiers report as reached, in the order of `goals_of`."""
    if not isinstance(instr, SeqInstr):
        return (solved,)
    reached = (instr.a_done == "success", instr.b_done == "success")
    return reached[::-1] if isinstance(instr, AfterInstr) else reached


def _frame(room: _Room) -> np.ndarray:
    """Return the frame of `get_frame(highlight=False)`, without computing the agent's view."""
    here = tuple(room.agent_pos)
    rows = (
        [
            Grid.render_tile(
                room.grid.get(x, y),
                room.agent_dir if (x, y) == here else None,
                tile_size=TILE,
            )
            for x in range(room.width)
        ]
        for y in range(room.height)
    )
    return np.vstack([np.hstack(row) for row in rows]).astype(np.uint8)  # tiles are floats


def _is_good(episode: Episode) -> bool:
    """Return whether the clip shows its mission and nothing that contradicts it."""
    if episode.goal_steps[-1] < 2:
        return False  # too short to show anything
    named = {thing.name: thing for thing in episode.things}
    to_carry = {goal.thing for goal in episode.goals if goal.verb != "go to"}
    if {thing.name for thing in episode.things if thing.carried} != to_carry:
        return False  # an object was moved out of the way
    for goal in episode.goals:
        if goal.verb == "put" and _neighbours(episode, named[goal.thing]) != [goal.next_to]:
            return False  # another object is next to it as well
    if len(episode.goals) == 1:
        return True
    # Two goals: the order must be visible, so the second may not be reached before the first.
    last, (first_step, last_step) = episode.goals[1], episode.goal_steps
    passed_by = last.verb == "go to" and named[last.thing].faced_at <= first_step
    return first_step < last_step and not passed_by


def _neighbours(episode: Episode, thing: Thing) -> list[str]:
    """Return the objects on the tiles around an object, at the end."""
    return [
        other.name
        for other in episode.things
        if other.end is not None and pos_next_to(thing.end, other.end)
    ]


__all__ = [
    "FPS",
    "SPLITS",
    "Episode",
    "Thing",
    "first_seed",
    "make_room",
    "play",
    "split_of",
]
