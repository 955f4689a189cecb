"""Normal forms of answers, as the benchmarks define them: equal forms are equal answers."""

import re
from collections.abc import Callable

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
YES_NO = dict.fromkeys(("yes", "true", "1"), "yes") | dict.fromkeys(("no", "false", "0"), "no")
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The evaluation of VQA restores the apostrophes of these. "its" and "were" are missing: they are
# words themselves.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# With one apostrophe left out: "dont" is "don't", "couldnt've" is "couldn't've".
RESTORED = {
    text[: mark.start()] + text[mark.end() :]: text
    for text in CONTRACTIONS.split()
    for mark in re.finditer("'", text)
}


def exact(answer: str) -> str:
    """Return the answer itself, as in GQA's exact match."""
    return answer


def yes_no(answer: str) -> str:
    """Return "yes" or "no"; case, white space and a full stop at the end do not count.

    True and false, and 1 and 0, are read too: copies of a data set differ in how they store labels.

    Raises: `ValueError` for another answer.
    """
    plain = answer.strip().rstrip(".").casefold()
    if plain not in YES_NO:
        raise ValueError(f"{answer!r} is not yes or no")
    return YES_NO[plain]


def number(answer: str) -> str:
    """Return a whole number in digits: "three", "3" and "3.0" are "3".

    Raises: `ValueError` for an answer that is not a whole number, in digits or up to "twenty".
    """
    plain = answer.strip().casefold()
    if plain in NUMBERS:
        return str(NUMBERS.index(plain))
    digits = re.fullmatch(r"(\d+)(\.0*)?", plain, re.ASCII)
    if digits is None:
        raise ValueError(f"{answer!r} is not a whole number")
    return str(int(digits[1]))


def vqa(answer: str) -> str:
    """Return the answer as the official evaluation of VQA (Antol et al., 2015) compares it.

    It is in lower case, without articles and punctuation, with numbers up to ten in digits and with
    the apostrophes of contractions.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    # The official evaluation looks at the text as given, not at the text with marks removed.
    between_digits = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in PUNCTUATION:
        joined = not (f"{mark} " in text or f" {mark}" in text or between_digits)
        plain = plain.replace(mark, " " if joined else "")
    plain = re.sub(r"\.(?!\d)", "", plain)
    digits = {word: str(value) for value, word in enumerate(NUMBERS[:11])} | {"none": "0"}
    found = [digits.get(word, word) for word in plain.split()]
    return " ".join(RESTORED.get(word, word) for word in found if word not in ARTICLES)


ANSWERS: dict[str, Callable[[str], str]] = {
    "exact": exact,
    "yes_no": yes_no,
    "number": number,
    "vqa": vqa,
}

__all__ = ["ANSWERS"]
