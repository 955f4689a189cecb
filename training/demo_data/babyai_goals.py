"""What an agent is to do, in words: BabyAI's missions, told ahead and told afterwards."""

import hashlib
from dataclasses import dataclass

from minigrid.envs.babyai.core.verifier import (
    AfterInstr,
    GoToInstr,
    Instr,
    ObjDesc,
    PickupInstr,
    PutNextInstr,
    SeqInstr,
)

COLORS = ("blue", "green", "grey", "purple", "red", "yellow")
TYPES = ("ball", "box", "key")
ALL_PAIRS = tuple(f"{color} {kind}" for color in COLORS for kind in TYPES)
HELD_OUT_PAIRS = frozenset({"yellow key", "purple ball", "green box"})
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)

PAST = {"go to": "went to", "pick up": "picked up", "put": "put"}
GERUND = {"go to": "going to", "pick up": "picking up", "put": "putting"}


@dataclass(frozen=True)
class Goal:
    """One clause of a mission, in the forms that captions and questions need."""

    verb: str  # "go to", "pick up" or "put"
    thing: str  # "red ball"
    beside: str | None = None  # only for "put"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.thing,) if self.beside is None else (self.thing, self.beside)

    @property
    def plain(self) -> str:
        return self._say(self.verb)

    @property
    def past(self) -> str:
        return self._say(PAST[self.verb])

    @property
    def gerund(self) -> str:
        return self._say(GERUND[self.verb])

    def _say(self, verb: str) -> str:
        tail = "" if self.beside is None else f" next to the {self.beside}"
        return f"{verb} the {self.thing}{tail}"


def goals_of(instr: Instr) -> tuple[Goal, ...]:
    """The clauses of a mission in the order in which they are to be done."""
    match instr:
        case AfterInstr():
            return goals_of(instr.instr_b) + goals_of(instr.instr_a)
        case SeqInstr():
            return goals_of(instr.instr_a) + goals_of(instr.instr_b)
        case GoToInstr():
            return (Goal("go to", _name(instr.desc)),)
        case PickupInstr():
            return (Goal("pick up", _name(instr.desc)),)
        case PutNextInstr():
            return (Goal("put", _name(instr.desc_move), _name(instr.desc_fixed)),)
    raise TypeError(f"no wording for {type(instr).__name__}")


def _name(described: ObjDesc) -> str:
    return f"{described.color} {described.type}"


def narrate(goals: tuple[Goal, ...]) -> str:
    return "the agent " + " and then ".join(goal.past for goal in goals)


def narrations(goals: tuple[Goal, ...]) -> list[str]:
    """What happened, in one wording for one goal and in two for two."""
    if len(goals) == 1:
        return [narrate(goals)]
    first, last = goals
    return [narrate(goals), f"after {first.gerund}, the agent {last.past}"]


def is_held_out(goals: tuple[Goal, ...]) -> bool:
    """Whether these goals, in this order, are among the tenth of missions kept from training.

    The hash is of the narration, not of the mission: "A, then B", "B after you A" and "A and B"
    are told by the same narration and must fall on the same side.
    """
    return hashlib.sha256(narrate(goals).encode()).digest()[0] < 256 // 10


__all__ = [
    "ALL_PAIRS",
    "HELD_OUT_PAIRS",
    "SEEN_PAIRS",
    "TYPES",
    "Goal",
    "goals_of",
    "is_held_out",
    "narrate",
    "narrations",
]
