"""Checks of texts before a tokenizer gets them, for JSONL rows and the processor.

Pipelines have their own in `text_checks.py`: they are shipped without this package, and also bound
the lengths of texts.
"""

from collections.abc import Iterable, Mapping, Set


def check_text(name: str, text: str) -> str:
    """Return a text.

    Args:
        name: what the error calls the text, such as "question" or "candidates[3]".

    Raises: `ValueError` for another type, and for half of a surrogate pair, which JSON has if a
        text was cut within an emoji and which no tokenizer takes.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a string but a {type(text).__name__}: give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{name} holds half a character, {half}: cut texts between characters"
        ) from error
    return text


def check_texts(name: str, texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list.

    Raises: `ValueError` that names the argument, and the index of a text that is not one.
    """
    if isinstance(texts, str):
        return [check_text(name, texts)]
    # A set has no order, so its texts would belong to no medium of the batch.
    if isinstance(texts, bytes | Mapping | Set) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} is a {type(texts).__name__}: give a string or a list of strings")
    try:
        texts = list(texts)
    except TypeError as error:  # an array without a dimension
        raise ValueError(f"{name} is a single {type(texts).__name__}: give a string") from error
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


__all__ = ["check_text", "check_texts"]
