"""Scores from similarities, plain functions of tensors; and of texts beside what they should be.

Shapes: R rows (what is asked), C candidates (what is ranked).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

LONGEST = 4  # CIDEr compares runs of one to four words
LENGTH_SPREAD = 6.0  # words by which a caption may be too long or short before CIDEr-D minds
CLITIC = re.compile(r"(n't|'s|'re|'ve|'ll|'d|'m)\b")
TOKEN = re.compile(r"n't|'\w+|\w+(?:-\w+)*")


def first_relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Rank of the best relevant candidate of each row, from 1: int64 `(R,)`.

    Ties are pessimistic: rank = 1 + irrelevant candidates that score at least as high. A model
    that gives one score to everything is last, not first. A row without any relevant candidate
    gets C + 1.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`): the higher, the better.
        relevant (`torch.BoolTensor` of shape `(R, C)`): several candidates of a row may be right.
    """
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # (R, 1)
    # "not lower" instead of "higher or equal": NaN is neither, and must not win.
    ahead = ~relevant & ~(similarity < best)  # (R, C)
    return 1 + ahead.sum(dim=1)


def relevant_index(index: torch.Tensor, candidates: int) -> torch.Tensor:
    """One right candidate per row: `(R,)` indices to bool `(R, C)`; -1 stands for none."""
    return index.unsqueeze(1) == torch.arange(candidates)


def chance_recall(relevant: torch.Tensor, k: int) -> float:
    """Expected recall@k of a random order: k / C where each row has one relevant candidate.

    With m relevant ones, 1 - C(C - m, k) / C(C, k) (hypergeometric), averaged over the rows.
    """
    candidates = relevant.shape[1]
    k = min(k, candidates)
    ways = math.comb(candidates, k)
    return sum(
        (1 - math.comb(candidates - m, k) / ways) * rows
        for m, rows in enumerate(torch.bincount(relevant.sum(dim=1)).tolist())
    ) / len(relevant)


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion (Wilson, 1927), 95 % by default: `(low, high)`.

    It takes the rows for independent. Questions about one clip are not quite, so the true
    interval is somewhat wider.
    """
    share, spread = hits / total, z * z / total
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def mean_interval(values: torch.Tensor, z: float = 1.959964) -> tuple[float, float]:
    """The interval of the mean of `(R,)` values, 95 % by default, by their standard error.

    It takes the rows for independent, as `wilson` does.
    """
    mean = values.mean().item()
    half = z * values.std(correction=0).item() / math.sqrt(len(values))
    return mean - half, mean + half


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, clitics apart: what the tokenizer of the COCO caption
    evaluation (Stanford's PTB) makes of plain English, without Java."""
    return TOKEN.findall(CLITIC.sub(r" \1", text.lower()))


def token_f1(candidate: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands in both
    (SQuAD's; here articles count)."""
    found, wanted = Counter(words(candidate)), Counter(words(reference))
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def exact_match(candidate: str, reference: str) -> bool:
    """Whether both have the same words in the same order."""
    return words(candidate) == words(reference)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> torch.Tensor:
    """CIDEr-D (Vedantam et al., 2015) of each caption with its references: `(R,)`, from 0 to 10.

    The corpus' score is the mean. Run lengths of 1 to 4 words are compared by cosine; a run weighs
    less the more rows have it in their references, so a row's score depends on the other rows. As
    in `pycocoevalcap`, whose numbers the tests repeat.
    """
    wanted = [[_runs(text) for text in texts] for texts in references]
    rows_with = Counter(run for texts in wanted for run in set().union(*texts))
    log_rows = math.log(max(len(references), 1))

    def weigh(runs: Counter) -> list[dict[tuple[str, ...], float]]:
        """Weights of the runs, apart by their length."""
        weights = [{} for _ in range(LONGEST)]
        for run, count in runs.items():
            weights[len(run) - 1][run] = count * (log_rows - math.log(max(rows_with[run], 1)))
        return weights

    def similarity(runs: Counter, other: Counter) -> float:
        total = 0.0
        for mine, theirs in zip(weigh(runs), weigh(other), strict=True):
            # The lesser of both weights: a run does not count for more by being repeated.
            dot = sum(
                min(weight, theirs.get(run, 0.0)) * theirs.get(run, 0.0)
                for run, weight in mine.items()
            )
            norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            total += dot / norms if norms else dot
        excess = _length(runs) - _length(other)
        return math.exp(-(excess**2) / (2 * LENGTH_SPREAD**2)) * total / LONGEST

    scores = []
    for candidate, texts in zip(candidates, wanted, strict=True):
        runs = _runs(candidate)
        scores.append(10 * sum(similarity(runs, other) for other in texts) / len(texts))
    return torch.tensor(scores, dtype=torch.float64)


def _runs(text: str) -> Counter:
    """How often each run of one to four words stands in a text."""
    tokens = words(text)
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(tokens) - length + 1)
    )


def _length(runs: Counter) -> int:
    """Of a text in pairs of words, as the reference implementation counts it."""
    return sum(count for run, count in runs.items() if len(run) == 2)


__all__ = [
    "chance_recall",
    "cider",
    "exact_match",
    "first_relevant_ranks",
    "mean_interval",
    "relevant_index",
    "token_f1",
    "wilson",
    "words",
]
