"""Checks of the texts that a caller gives: types, lengths and characters.

The processor checks texts too, but it does not know the argument's name.
"""

from collections.abc import Iterable
from typing import Any

MAX_CHARACTERS = 100_000  # per text: encoders read 512 tokens, but a tokenizer reads it all
MAX_TOTAL_CHARACTERS = 10**9  # per call: texts times the characters of the longest


def check_length(name: str, length: int, most: int) -> None:
    if length > most:
        raise ValueError(f"{name} has {length} characters: give at most {most}.")


def check_total(name: str, count: int, longest: int, most: int) -> None:
    # Not the sum: every text of a batch is padded to the longest.
    if count * longest > most:
        raise ValueError(
            f"{name} has {count} texts of up to {longest} characters: give fewer or shorter ones; "
            f"number times length is at most {most}."
        )


def check_string(name: str, text: Any, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a text, which may be empty.

    Raises: `ValueError` that names the argument, for another type, a text that is too long, and
        half of a surrogate pair, which no tokenizer accepts.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}: give a string.")
    check_length(name, len(text), max_characters)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON holds one as "\ud83d" if a text was cut within an emoji.
        half = ascii(text[error.start])
        raise ValueError(
            f"{name} holds half a character, {half}: cut texts between characters."
        ) from error
    return text


def check_text(name: str, text: Any, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a text after the checks of `check_string`; also reject one that is empty."""
    if not check_string(name, text, max_characters).strip():
        raise ValueError(f"{name} is empty: give a text.")
    return text


def check_texts(
    name: str,
    texts: Iterable[str],
    max_characters: int = MAX_CHARACTERS,
    max_total: int = MAX_TOTAL_CHARACTERS,
) -> list[str]:
    """Return texts as a list.

    Raises: `ValueError` that names the argument, for an empty list, for a text that `check_text`
        rejects, and for too many texts of their length.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} is a {type(texts).__name__}: give a list of strings.")
    texts = list(texts)
    if not texts:
        raise ValueError(f"{name} is empty: give at least one text.")
    for index, text in enumerate(texts):
        check_text(f"{name}[{index}]", text, max_characters)
    check_total(name, len(texts), max(len(text) for text in texts), max_total)
    return texts


def fill_template(
    template: str,
    labels: list[str],
    max_characters: int = MAX_CHARACTERS,
    max_total: int = MAX_TOTAL_CHARACTERS,
) -> list[str]:
    """Return the template once for each label, with the label in the position of `{}`.

    Raises: `ValueError` for a template without `{}` or with several, and for filled templates that
        are too long.
    """
    check_text("hypothesis_template", template, max_characters)
    if template.count("{}") != 1:  # several would multiply the length of a label
        raise ValueError(
            f"hypothesis_template is {template[:50]!r} and has {{}} {template.count('{}')} times: "
            "put {} once, where the label goes."
        )
    # The lengths are checked first: the filled templates may need all of the memory.
    lengths = [len(template) - len("{}") + len(label) for label in labels]
    for index, length in enumerate(lengths):
        name = f"candidate_labels[{index}] in hypothesis_template"
        check_length(name, length, max_characters)
    name = "candidate_labels in hypothesis_template"
    check_total(name, len(labels), max(lengths), max_total)
    # Not `format`: a template or a label may contain other braces.
    return [template.replace("{}", label) for label in labels]


__all__ = ["check_string", "check_text", "check_texts", "fill_template"]
