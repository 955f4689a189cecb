"""Metrics: plain functions of similarities, and of texts with their references.

Shapes: R rows (queries), C candidates (ranked for each row).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

AT_ONCE = 2**24  # similarities that are ranked in one step
LONGEST = 4  # CIDEr compares n-grams of one to four words
HIGHEST_CIDER = 10.0
LENGTH_STD = 6.0  # of CIDEr-D's Gaussian penalty for a difference of lengths
CLITIC = re.compile(r"(n't|'s|'re|'ve|'ll|'d|'m)\b")
TOKEN = re.compile(r"n't|'\w+|\w+(?:-\w+)*")


def cosines(embeds: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each unit vector `(R, D)` with each other one `(C, D)`: `(R, C)`.

    Equal vectors, such as those of equal texts, have equal cosines. A plain product of matrices
    rounds a number by its position, and rounding would decide such ties. Evaluation during training
    runs under autocast, which is off here: in bf16 different texts would tie.
    """
    rows, row_of = embeds.unique(dim=0, return_inverse=True)
    columns, column_of = others.unique(dim=0, return_inverse=True)
    if len(rows) == len(embeds):  # a slice copies nothing
        rows, row_of = embeds, slice(None)
    if len(columns) == len(others):
        columns, column_of = others, slice(None)
    with torch.autocast(embeds.device.type, enabled=False):
        return (rows @ columns.T)[row_of][:, column_of]


def first_relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Return the rank of the best relevant candidate of each row, from 1: int64 `(R,)`.

    Ties are pessimistic: rank = 1 + irrelevant candidates that score at least as high. A model
    that gives every candidate the same score is last, not first. A row without any relevant
    candidate gets C + 1. torchmetrics and ranx are not used: they order ties as the sort does, so
    such a model can be first, and torchmetrics' recall ignores relevant candidates of negative
    score.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`): the higher, the better.
        relevant (`torch.BoolTensor` of shape `(R, C)`): a row may have several.
    """
    return relevant_ranks(similarity, relevant, 1).squeeze(1)


def relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ranks of the `count` best relevant candidates of each row, ascending: int64
    `(R, count)`.

    Ties are those of [`first_relevant_ranks`]. A row with fewer relevant candidates gets C + 1 for
    the missing ones.
    """
    rows = max(1, AT_ONCE // max(1, similarity.shape[1]))  # a copy of all would double the memory
    parts = zip(similarity.split(rows), relevant.split(rows), strict=True)
    return torch.cat([_relevant_ranks(*part, count) for part in parts])


def _relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor, count: int) -> torch.Tensor:
    """Return `relevant_ranks` of some rows."""
    candidates = similarity.shape[1]
    # NaN counts as the lowest score; topk would put it first.
    scores = similarity.masked_fill(~relevant | similarity.isnan(), -torch.inf)
    best = scores.topk(min(count, candidates), dim=1).values  # (R, count)
    totals = relevant.sum(dim=1)  # (R,)
    ranks = torch.full((len(similarity), count), candidates + 1)
    for index in range(best.shape[1]):
        # "not lower" instead of "higher or equal": both are false for NaN, which must not win.
        ahead = (~relevant & ~(similarity < best[:, index, None])).sum(dim=1)  # (R,)
        has_one = totals > index
        ranks[has_one, index] = 1 + index + ahead[has_one]
    return ranks


def ndcg(similarity: torch.Tensor, relevant: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Return the normalised discounted cumulative gain of the first k candidates: float64 `(R,)`.

    Relevance is binary: a relevant candidate of rank r counts 1 / log2(1 + r), and the sum is
    divided by that of the best order (Järvelin and Kekäläinen, 2002). Ties are pessimistic, see
    [`first_relevant_ranks`]. A row without any relevant candidate gets 0.
    """
    totals = relevant.sum(dim=1).clamp(max=k)  # (R,)
    ranks = relevant_ranks(similarity, relevant, max(1, int(totals.max())))
    found = ranks <= min(k, relevant.shape[1])  # rank C + 1: no such candidate
    gains = torch.where(found, 1 / torch.log2(1.0 + ranks.double()), 0.0).sum(dim=1)
    return torch.where(totals > 0, gains / _ideal_gains(k)[totals.clamp(min=1) - 1], 0.0)


def chance_ndcg(relevant: torch.Tensor, k: int = 10) -> float:
    """Return the expected nDCG@k of a random order, averaged over the rows."""
    candidates, ideal = relevant.shape[1], _ideal_gains(k)
    totals = relevant.sum(dim=1)
    # Every rank holds a relevant candidate with probability m / C.
    gains = totals / candidates * ideal[min(k, candidates) - 1]
    best = ideal[totals.clamp(1, k) - 1]
    return (gains / best).mean().item()


def _ideal_gains(k: int) -> torch.Tensor:
    """Return the gains of 1 to k relevant candidates at the first ranks: float64 `(k,)`."""
    return (1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))).cumsum(dim=0)


def relevant_index(index: torch.Tensor, candidates: int) -> torch.Tensor:
    """Mark one relevant candidate per row: `(R,)` indices to bool `(R, C)`; -1 marks none."""
    return index.unsqueeze(1) == torch.arange(candidates)


def chance_recall(relevant: torch.Tensor, k: int) -> float:
    """Return the expected recall@k of a random order: k / C if each row has one relevant candidate.

    With m relevant candidates it is 1 - binom(C - m, k) / binom(C, k) (hypergeometric), averaged
    over the rows.
    """
    candidates = relevant.shape[1]
    k = min(k, candidates)
    ways = math.comb(candidates, k)
    return sum(
        (1 - math.comb(candidates - m, k) / ways) * rows
        for m, rows in enumerate(torch.bincount(relevant.sum(dim=1)).tolist())
    ) / len(relevant)


def precision_recall_f1(
    found: Sequence[bool] | np.ndarray, wanted: Sequence[bool] | np.ndarray
) -> tuple[float, float, float]:
    """Return precision, recall and F1 of the positive answer, 0 where they are 0 / 0.

    Args:
        found, wanted: R rows each; True for a row with the positive answer, predicted and true.
    """
    found, wanted = np.asarray(found, dtype=bool), np.asarray(wanted, dtype=bool)
    hits, positives, true = int((found & wanted).sum()), int(found.sum()), int(wanted.sum())
    precision, recall = hits / max(positives, 1), hits / max(true, 1)
    return precision, recall, 2 * hits / max(positives + true, 1)


def hard_negative_hits(
    positives: torch.Tensor, first_negative: torch.Tensor, second_negative: torch.Tensor
) -> torch.Tensor:
    """Return which rows have both positives nearer to each other than to the negative: bool `(R,)`.

    A tie and NaN are wrong.

    Args:
        positives, first_negative, second_negative (`torch.FloatTensor` of shape `(R,)`): the
            similarity of both positives, and that of each of them with the negative.
    """
    return (positives > first_negative) & (positives > second_negative)


def wilson(hits: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval `(low, high)` of a proportion (Wilson, 1927), 95 % by default.

    It assumes independent rows; `eval.intervals` has intervals for rows that are not, such as
    several questions about one clip.
    """
    share, shrink = hits / total, z * z / total
    centre = share + shrink / 2
    half = math.sqrt(shrink * (share * (1 - share) + shrink / 4))
    return max(0.0, (centre - half) / (1 + shrink)), min(1.0, (centre + half) / (1 + shrink))


def words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation, clitics as words of their own.

    For plain English the result equals that of the COCO caption evaluation's tokenizer (Stanford's
    PTB), which needs Java.
    """
    return TOKEN.findall(CLITIC.sub(r" \1", text.lower()))


def token_f1(candidate: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of words, repetitions counted (as in SQuAD,
    but articles count)."""
    found, wanted = Counter(words(candidate)), Counter(words(reference))
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def exact_match(candidate: str, reference: str) -> bool:
    """Return True if both have the same words in the same order."""
    return words(candidate) == words(reference)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return CIDEr-D (Vedantam et al., 2015) of each caption with its references: `(R,)`, 0 to 10.

    The score of a corpus is the mean. N-grams of 1 to 4 words are compared by cosine. An n-gram
    weighs less the more rows have it in their references, so a row's score depends on the other
    rows. `pycocoevalcap` gives the same numbers (the tests repeat them) and is not used: a download
    of 104 MB that tokenizes with Java, last released in 2020.
    """
    wanted = [[_ngrams(text) for text in texts] for texts in references]
    rows_with = Counter(ngram for texts in wanted for ngram in set().union(*texts))
    log_rows = math.log(len(references))

    def weigh(ngrams: Counter) -> list[dict[tuple[str, ...], float]]:
        """Return TF-IDF weights of n-grams, one dictionary for each length."""
        weights = [{} for _ in range(LONGEST)]
        for ngram, count in ngrams.items():
            # An n-gram that no reference has weighs as if one row had it.
            weights[len(ngram) - 1][ngram] = count * (log_rows - math.log(max(rows_with[ngram], 1)))
        return weights

    def similarity(ngrams: Counter, other: Counter) -> float:
        total = 0.0
        for mine, theirs in zip(weigh(ngrams), weigh(other), strict=True):
            # The lesser of both weights, so that repeating an n-gram does not raise the score.
            dot = sum(
                min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0)
                for ngram, weight in mine.items()
            )
            norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
            total += dot / norms if norms else dot
        excess = _length(ngrams) - _length(other)
        return math.exp(-(excess**2) / (2 * LENGTH_STD**2)) * total / LONGEST

    scores = []
    for candidate, texts in zip(candidates, wanted, strict=True):
        ngrams = _ngrams(candidate)
        scores.append(
            HIGHEST_CIDER * sum(similarity(ngrams, other) for other in texts) / len(texts)
        )
    return torch.tensor(scores, dtype=torch.float64)


def _ngrams(text: str) -> Counter:
    """Count the n-grams of one to four words in a text."""
    tokens = words(text)
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(tokens) - length + 1)
    )


def _length(ngrams: Counter) -> int:
    """Return a text's length in pairs of words, as the reference implementation counts it."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


__all__ = [
    "HIGHEST_CIDER",
    "chance_ndcg",
    "chance_recall",
    "cider",
    "cosines",
    "exact_match",
    "first_relevant_ranks",
    "hard_negative_hits",
    "ndcg",
    "precision_recall_f1",
    "relevant_index",
    "relevant_ranks",
    "token_f1",
    "wilson",
    "words",
]
