"""Prompts of a model: the queries that it was trained with, and templates for target texts.

A query that the model was not trained with gives worse embeddings without an error. So a checkpoint
records its queries, and every use of the model takes its default query from there.
"""

from collections.abc import Collection
from typing import Any

# `retrieval` is the caption query unless it is given.
PROMPTS = {
    "caption": "Describe this video in one sentence.",
    "detail": "Describe this video in detail.",
    "question": "{}",
    "action": "What is the action shown?",
}
TARGET_PROMPTS = {"action": "{}", "image": "This is a photo of {}."}


def check_prompts(
    name: str, given: Any, known: Collection[str], templates: Collection[str]
) -> dict[str, str]:
    """Return prompts by name.

    Args:
        known: the allowed names.
        templates: those of them that contain `{}` once, in the position of another text.

    Raises: `ValueError` for another type, an unknown name, half of a surrogate pair, and a template
        without `{}` or with several.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{name} is a {type(given).__name__}: give names and texts.")
    for key, text in given.items():
        if key not in known:
            raise ValueError(f"{name} has no {key!r}: choose among {', '.join(known)}.")
        if not isinstance(text, str):
            raise ValueError(f"{name}.{key} is a {type(text).__name__}: give a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}.{key} holds half a character, {ascii(text[error.start])}: cut texts "
                "between characters."
            ) from error
        if key in templates and text.count("{}") != 1:
            raise ValueError(
                f"{name}.{key} is {text[:50]!r} and has {{}} {text.count('{}')} times: put {{}} "
                "once, where the text goes."
            )
    return given


def complete_prompts(given: Any, current: dict[str, str] | None = None) -> dict[str, str]:
    """Return queries for all names.

    Args:
        given: queries by name; the others are taken from `current`.
        current (*optional*): queries for all names; default: `PROMPTS`.

    Raises: `ValueError`, see `check_prompts`.
    """
    current = current or PROMPTS | {"retrieval": PROMPTS["caption"]}
    completed = current | check_prompts("prompts", given, current, templates={"question"})
    if "retrieval" not in given and current["retrieval"] == current["caption"]:
        completed["retrieval"] = completed["caption"]
    return completed


def complete_target_prompts(given: Any, current: dict[str, str] | None = None) -> dict[str, str]:
    """Return templates for all names; see `complete_prompts`."""
    current = current or TARGET_PROMPTS
    return current | check_prompts("target_prompts", given, current, templates=current)


__all__ = ["complete_prompts", "complete_target_prompts"]
