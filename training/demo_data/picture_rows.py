"""Rows about pictures: labels, tags, groups, and questions that CLDR's data answers.

The questions of one sheet, which has at most one picture of each concept, are balanced: each of
them has "yes" and "no", or either of two words, equally often. So the question alone does not
answer it.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.demo_data.picture_sets import Concept

NAME_A_TAG = "Name one thing that this picture is about."
WHICH_GROUP = "Which group does this picture belong to?"
WHICH_SUBGROUP = "Which subgroup does this picture belong to?"
IN_GROUP = "Does this picture belong to {}?"
HAS_TAG = "Is this picture about {}?"
WHICH_TAG = "Is this picture about {} or {}?"
TAGS_PER_PICTURE = 2
FREQUENT = 12  # concepts of a tag that is one of two to choose from
ANSWERS = ("yes", "no")
PAIRS = 200  # of such tags; each sheet has two questions about each


@dataclass(frozen=True)
class Picture:
    """A picture of a concept.

    Attributes:
        concept ([`Concept`])
        style: name of the set that it is from.
        view: 0 for the drawing itself, 1 and above for an altered view.
    """

    concept: Concept
    style: str
    view: int = 0

    @property
    def path(self) -> str:
        """The file, relative to that of the rows."""
        view = f"_{self.view}" if self.view else ""
        return f"pictures/{self.style}/{self.concept.code}{view}.png"

    @property
    def sheet(self) -> str:
        """Name of the pictures among which its questions are balanced."""
        return f"{self.style} {self.view}"


Rows = dict[str, list[dict]]  # by kind
Pair = tuple[str, str]


def row(picture: Picture, query: str, target: str, **others: str) -> dict:
    return {"image": picture.path, "query": query, "target": target, **others}


def pairs_of_tags(concepts: Sequence[Concept], seed: int) -> list[Pair]:
    """Return pairs of tags that many concepts have, and that no concept has both of."""
    coded = defaultdict(set)
    for concept in concepts:
        for tag in concept.tags:
            coded[tag].add(concept.code)
    frequent = sorted(
        tag for tag, codes in coded.items() if len(codes) >= FREQUENT and tag not in ANSWERS
    )
    pairs = [
        (one, other)
        for index, one in enumerate(frequent)
        for other in frequent[index + 1 :]
        if not coded[one] & coded[other]
    ]
    return sorted(random.Random(seed).sample(pairs, min(PAIRS, len(pairs))))


def exchanged(
    items: list, wrong_for: Callable[[object, object], bool], rng: random.Random
) -> list | None:
    """Return the items in another order, in which each is wrong for the one before it there.

    `None` if no such order was found.
    """
    others = rng.sample(items, len(items))
    for index, item in enumerate(items):
        for _ in range(200):
            if wrong_for(item, others[index]):
                break
            swap = rng.randrange(len(items))
            if wrong_for(items[swap], others[index]) and wrong_for(item, others[swap]):
                others[index], others[swap] = others[swap], others[index]
        else:
            return None
    return others


def yes_or_no(
    asked: list[tuple[Picture, str]],
    query: str,
    kind: str,
    right: Callable[[Concept], Sequence[str]],
    rng: random.Random,
) -> list[dict]:
    """Return two questions for each picture: one about its own word, one about another's.

    Args:
        asked: pictures, each with a word that is right for it.
        right: all words that are right for a concept.
    """
    others = exchanged(asked, lambda one, two: two[1] not in right(one[0].concept), rng)
    if others is None:  # pictures of one group only
        return []
    return [
        row(picture, query.format(word), answer, question_type=kind)
        for (picture, own), (_, other) in zip(asked, others, strict=True)
        for word, answer in zip((own, other), ANSWERS, strict=True)
    ]


def either_or(pictures: list[Picture], pairs: list[Pair], rng: random.Random) -> list[dict]:
    """Return questions that name two tags, each the answer equally often."""
    tagged = defaultdict(list)
    for picture in pictures:
        for tag in picture.concept.tags:
            tagged[tag].append(picture)
    rows = []
    for one, other in pairs:
        only_one = [each for each in tagged[one] if other not in each.concept.tags]
        only_other = [each for each in tagged[other] if one not in each.concept.tags]
        if only_one and only_other:
            query = WHICH_TAG.format(one, other)
            for tag, found in ((one, only_one), (other, only_other)):
                rows.append(row(rng.choice(found), query, tag, question_type="which tag"))
    return rows


def questions(sheet: list[Picture], pairs: list[Pair], rng: random.Random) -> list[dict]:
    """Return questions about the pictures of a sheet."""
    rows = []
    for picture in sheet:
        concept = picture.concept
        rows.append(row(picture, WHICH_GROUP, concept.group, question_type="group"))
        rows.append(row(picture, WHICH_SUBGROUP, concept.subgroup, question_type="subgroup"))
    rows += yes_or_no(
        [(picture, picture.concept.group) for picture in sheet],
        IN_GROUP,
        "in group",
        lambda concept: (concept.group,),
        rng,
    )
    rows += yes_or_no(
        [(picture, rng.choice(picture.concept.tags)) for picture in sheet if picture.concept.tags],
        HAS_TAG,
        "has tag",
        # A word of the label is right even if CLDR has no such tag.
        lambda concept: (*concept.tags, *concept.label.lower().replace(":", "").split()),
        rng,
    )
    return rows + either_or(sheet, pairs, rng)


def rows_of(pictures: list[Picture], pairs: list[Pair]) -> Rows:
    """Return the rows about pictures, by kind."""
    sheets = defaultdict(list)
    for picture in pictures:
        sheets[picture.sheet].append(picture)
    rows: Rows = {name: [] for name in ("captions", "tags", "groups", "subgroups", "questions")}
    for name, sheet in sheets.items():
        rng = random.Random(name)
        for picture in sheet:
            concept = picture.concept
            rows["captions"].append(row(picture, "", concept.label, group_id=concept.same))
            rows["groups"].append(row(picture, WHICH_GROUP, concept.group))
            rows["subgroups"].append(row(picture, WHICH_SUBGROUP, concept.subgroup))
            count = min(TAGS_PER_PICTURE, len(concept.tags))
            rows["tags"] += [
                row(picture, NAME_A_TAG, tag, group_id=concept.same)
                for tag in rng.sample(concept.tags, count)
            ]
        rows["questions"] += questions(sheet, pairs, rng)
    return rows


__all__ = ["Pair", "Picture", "pairs_of_tags", "rows_of"]
