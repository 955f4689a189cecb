"""Questions about a BabyAI episode, answered from the simulator's state.

Each function lists every question of its type that has one true answer. `ask` draws from the lists
so that the answer is hard to guess from the question alone.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from training.demo_data.babyai import Episode, Thing
from training.demo_data.babyai_goals import TYPES

QUESTIONS_PER_CLIP = 5
NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"ball": "balls", "box": "boxes", "key": "keys"}

Asked = tuple[str, str]  # question, answer


def _what(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    asked = [
        (f"What did the agent put the {goal.thing} next to?", f"the {goal.next_to}")
        for goal in episode.goals
        if goal.verb == "put"
    ]
    carried = [thing.name for thing in episode.things if thing.carried]
    if len(carried) == 1:
        asked.append(("What did the agent pick up?", f"the {carried[0]}"))
    if [goal.verb for goal in episode.goals] == ["go to"]:
        asked.append(("What did the agent go to?", f"the {episode.goals[0].thing}"))
    return asked


def _color(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    kinds = Counter(thing.kind for thing in episode.things)
    return [
        (f"What color is the {thing.kind}?", thing.color)
        for thing in episode.things
        if kinds[thing.kind] == 1
    ]


def _where(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    return [
        (f"Where is the {thing.name} at the {when}?", _quadrant(*place))
        for thing in _unique(episode)
        for when, place in (("start", thing.start), ("end", thing.end))
        if place is not None
    ]


def _quadrant(x: int, y: int) -> str:
    # Tiles 1 to 6 are floor, so the third is the last of the first half.
    return f"{'top' if y <= 3 else 'bottom'} {'left' if x <= 3 else 'right'}"


def _count(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    kinds = Counter(thing.kind for thing in episode.things)
    return [
        (f"How many {PLURALS[kind]} are there at the start?", NUMBERS[kinds[kind]])
        for kind in TYPES
        if kinds[kind] < len(NUMBERS)
    ]


def _exists(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    present = {thing.name for thing in episode.things}
    return [
        (f"Is there a {pair} in the room?", "yes" if pair in present else "no") for pair in pairs
    ]


def _action(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    return [
        (f"What did the agent do with the {thing.name}?", deed)
        for thing in _unique(episode)
        if (deed := _deed(episode, thing)) is not None
    ]


def _deed(episode: Episode, thing: Thing) -> str | None:
    """Return one of four answers on an object, or `None` if none of them is clearly true."""
    if thing.carried:
        if thing.end is None:
            return "picked it up"
        return "moved it" if thing.end != thing.start else None
    if any(goal.verb == "go to" and goal.thing == thing.name for goal in episode.goals):
        return "went to it"
    return "nothing" if thing.faced_at is None else None


def _order(episode: Episode, pairs: Sequence[str]) -> list[Asked]:
    if len(episode.goals) == 1:
        return []
    first, last = episode.goals
    # No question has a "put" as its answer: "put the red ball next to the blue box" and its like
    # would add two hundred answers to thirty.
    return [
        (f"Did the agent {first.plain} before {last.gerund}?", "yes"),
        (f"Did the agent {last.plain} before {first.gerund}?", "no"),
        *(
            (f"What did the agent do {when}?", goal.past)
            for when, goal in (("first", first), ("last", last))
            if goal.verb != "put"
        ),
    ]


def _unique(episode: Episode) -> list[Thing]:
    """Return the objects that colour and type identify."""
    names = Counter(thing.name for thing in episode.things)
    return [thing for thing in episode.things if names[thing.name] == 1]


_QUESTIONS: dict[str, Callable[[Episode, Sequence[str]], list[Asked]]] = {
    "order": _order,
    "what": _what,
    "color": _color,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "action": _action,
}


def ask(episode: Episode, pairs: Sequence[str]) -> list[dict[str, str]]:
    """Return up to five questions of different types, which mention objects of `pairs` only."""
    rng = random.Random(f"questions {episode.seed}")
    asked = {kind: list_all(episode, pairs) for kind, list_all in _QUESTIONS.items()}
    kinds = [kind for kind in asked if asked[kind]]
    # "order" first: it needs two goals, so only two clips of five have it.
    kinds.sort(key=lambda kind: (kind != "order", rng.random()))
    rows = []
    for kind in kinds[:QUESTIONS_PER_CLIP]:
        query, target = _draw(asked[kind], rng)
        rows.append({"query": query, "target": target, "question_type": kind})
    return rows


def ask_where(episode: Episode) -> list[dict[str, str]]:
    """Return every question about a place, because a model learns these later than the others."""
    return [
        {"query": query, "target": target, "question_type": "where"}
        for query, target in _where(episode, ())
    ]


def _draw(asked: list[Asked], rng: random.Random) -> Asked:
    """Draw an answer and then a question with it, so that frequent answers are not preferred."""
    answers = sorted({answer for _, answer in asked})
    # Nearly every room has untouched objects: without this, "nothing" is half of all answers to
    # "What did the agent do with ...?".
    if len(answers) > 1 and rng.random() < 0.5:
        answers = [answer for answer in answers if answer != "nothing"]
    answer = rng.choice(answers)
    return rng.choice([pair for pair in asked if pair[1] == answer])


__all__ = ["ask"]
