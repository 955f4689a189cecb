"""Texts for BabyAI's missions: goals, narrations of reached goals, and the held-out missions."""

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
    next_to: str | None = None  # "blue box", for "put" only

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objects in the goal."""
        return (self.thing,) if self.next_to is None else (self.thing, self.next_to)

    @property
    def plain(self) -> str:
        """Goal in the imperative: "pick up the red ball"."""
        return self._text(self.verb)

    @property
    def past(self) -> str:
        """Goal in the past tense: "picked up the red ball"."""
        return self._text(PAST[self.verb])

    @property
    def gerund(self) -> str:
        """Goal as a gerund: "picking up the red ball"."""
        return self._text(GERUND[self.verb])

    def _text(self, verb: str) -> str:
        tail = "" if self.next_to is None else f" next to the {self.next_to}"
        return f"{verb} the {self.thing}{tail}"


def goals_of(instr: Instr) -> tuple[Goal, ...]:
    """Return the clauses of a mission, in the order of execution."""
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
    raise TypeError(f"{type(instr).__name__} has no text here: add a case to goals_of")


def _name(described: ObjDesc) -> str:
    return f"{described.color} {described.type}"


def narrate(goals: tuple[Goal, ...]) -> str:
    """Return a sentence on reached goals: "the agent went to … and then picked up …"."""
    return "the agent " + " and then ".join(goal.past for goal in goals)


def narrations(goals: tuple[Goal, ...]) -> list[str]:
    """Return one wording for one goal, and two wordings for two goals."""
    if len(goals) == 1:
        return [narrate(goals)]
    first, last = goals
    return [narrate(goals), f"after {first.gerund}, the agent {last.past}"]


def is_held_out(goals: tuple[Goal, ...]) -> bool:
    """Return whether goals in this order belong to the tenth of missions that training never sees.

    The hash is of the narration, not of the mission: "A, then B", "B after you A" and "A and B"
    have the same narration and must be on the same side.
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
