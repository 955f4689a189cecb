"""Results of an evaluation: scores, examples, and the protocol that they need to be understood."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.embed import Predictions
from eval.intervals import RESAMPLES, mean_interval
from eval.items import Items
from processing.rows import Media, media_of


@dataclass(frozen=True)
class Score:
    """A share of n rows, from 0 to 1, or a mean over them, with its baselines.

    Attributes:
        value (`float`): the share or mean.
        low, high (`float`): its 95 % interval, see [`mean_interval`].
        n (`int`): rows.
        clusters (`int`): clusters of rows, such as clips, that the interval resamples.
        interval (`str`): kind of the interval.
        baselines (`dict[str, float]`): the value of chance, of the most common answer and so on.
            All scores of one kind of benchmark have the same baselines, in the same order.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    interval: str
    baselines: dict[str, float]

    @classmethod
    def of(
        cls,
        values: torch.Tensor | np.ndarray,
        clusters: np.ndarray,
        baselines: dict[str, float],
        highest: float = 1.0,
    ) -> "Score":
        """Return the mean of `values` `(n,)`, one for each row; a share if they are booleans.

        Args:
            clusters (`np.ndarray` of shape `(n,)`): number of each row's cluster.
            highest: the highest value possible.
        """
        values = np.asarray(values, dtype=np.float64)
        found = mean_interval(values, clusters, highest)
        value, n = float(values.mean()), len(values)
        return cls(value, found.low, found.high, n, found.clusters, found.kind, baselines)


@dataclass(frozen=True)
class Example:
    """One row, to be shown in the report.

    Attributes:
        media (`Media`, *optional*): the clip of the row; None if clips are ranked for a text.
        query (`str`): the question, the text whose clip is searched, or the caption written.
        truth (`list[str]`): the right answers or clips.
        ranked (`list[tuple[str, float]]`): answers or clips with their similarity, best first; for
            a caption, all captions of the clip with their CIDEr.
        rank (`int`): rank of the first right answer or clip.
    """

    media: Media | None
    query: str
    truth: list[str]
    ranked: list[tuple[str, float]]
    rank: int

    @property
    def found(self) -> bool:
        """True if a right answer or clip is among `ranked`."""
        return any(name in self.truth for name, _ in self.ranked)


@dataclass(frozen=True)
class TaskResult:
    """The results of one benchmark.

    Attributes:
        name, task, description (`str`): those of the benchmark.
        protocol (`dict`): how the scores were measured.
        scores (`dict[str, Score]`): by metric.
        ranks (`dict[str, float]`): median and mean ranks; only retrieval has them.
        numbers (`dict[str, float]`): numbers that are not a share of rows; only streaming has them.
        comparisons (`dict[str, dict[str, float]]`): differences between two methods, or from a
            baseline; VQA, captioning and streaming have them.
        curves (`dict[str, list[tuple[float, float]]]`): decodes per second and CIDEr, by the method
            of choosing what to decode; only streaming has them.
        by_type (`dict[str, Score]`): accuracy by question type; only VQA has it.
        skipped (`list[str]`): each line and file that was left out, and why.
        examples (`list[Example]`): for the report.
        items (`list[Items]`): the rows that the scores are means over, with the scores of each.
        paper (`dict`, *optional*): the entry's block `paper`, as the fields of `eval.task.Paper`.
        pool (`int`, *optional*): number of measured items, those that `paper.pool` counts.
        pool_expected (`int`, *optional*): number that the paper's name needs; None if the paper
            does not state it.
    """

    name: str
    task: str
    description: str
    protocol: dict[str, str | int | float]
    scores: dict[str, Score]
    ranks: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    comparisons: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    by_type: dict[str, Score] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    items: list[Items] = field(default_factory=list)
    paper: dict[str, Any] | None = None
    pool: int | None = None
    pool_expected: int | None = None

    @property
    def reservations(self) -> list[str]:
        """Reasons why these scores cannot be compared with the paper's; empty if they can.

        The pool decides the difficulty, and an ablation hides the clip or the query.
        """
        if self.paper is None:
            return []
        found, unit = [], self.paper["unit"]
        if self.pool_expected is None:
            found.append(f"{self.pool:,} {unit}, the paper does not state how many")
        elif self.pool != self.pool_expected:
            found.append(f"{self.pool:,} of {self.pool_expected:,} {unit}")
        if (ablation := self.protocol.get("ablation", "none")) != "none":
            found.append(f"ablation {ablation}")
        return found

    @property
    def title(self) -> str:
        """The paper's name of the benchmark, never bare if the scores cannot be compared with the
        paper's; the entry's name if the paper does not have the benchmark."""
        if self.paper is None:
            return self.name
        reasons = "; ".join(self.reservations)
        return f"{self.paper['name']} ({reasons})" if reasons else self.paper["name"]

    def as_json(self) -> dict:
        """Return the title, the reservations and all fields except the examples, whose paths are
        valid on one machine only, and the items, which have a file of their own."""
        left_out = {"examples": [], "items": []}  # `asdict` would copy them
        fields = asdict(replace(self, **left_out))
        return {"title": self.title, "reservations": self.reservations} | {
            name: value for name, value in fields.items() if name not in left_out
        }


def interval_facts(scores: Iterable[Score], cluster: str) -> dict[str, str | int]:
    """Return the facts about the intervals of scores, for the protocol.

    Args:
        cluster: the rows that form a cluster, such as "clip".
    """
    scores = list(scores)
    kinds = dict.fromkeys(score.interval for score in scores)
    return {
        "interval": f"95 %, {', '.join(kinds)}",
        "cluster": cluster,
        "clusters": ", ".join(dict.fromkeys(str(score.clusters) for score in scores)),
        "resamples": RESAMPLES,
    }


def portable(path: Path) -> str:
    """Return a relative path unchanged, and of an absolute path the file's name.

    An absolute path is valid on one machine only; results of two machines must be equal.
    """
    return path.name if path.is_absolute() else path.as_posix()


def evenly_spaced(indices: list[int], count: int) -> list[int]:
    """Return at most `count` of the indices, evenly spaced: examples then show the whole file."""
    if len(indices) <= count:
        return indices
    return [indices[step * len(indices) // count] for step in range(count)]


def answer_examples(
    predictions: Predictions, similarity: torch.Tensor, candidates: list[str], ranks: torch.Tensor
) -> list[Example]:
    """Return six rows with a right answer and six with a wrong one, each with its best five.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`)
        ranks (`torch.LongTensor` of shape `(R,)`): rank of the right answer.
    """
    right = [row for row, rank in enumerate(ranks.tolist()) if rank == 1]
    wrong = [row for row, rank in enumerate(ranks.tolist()) if rank != 1]
    return [
        Example(
            media=media_of(predictions.rows[row]),
            query=predictions.queries[row],
            truth=[predictions.rows[row]["target"]],
            ranked=best(similarity[row], candidates, 5),
            rank=int(ranks[row]),
        )
        for row in evenly_spaced(right, 6) + evenly_spaced(wrong, 6)
    ]


def best(similarity: torch.Tensor, names: list[str], count: int) -> list[tuple[str, float]]:
    """Return the `count` names of highest similarity `(C,)`, best first."""
    values, indices = similarity.sort(descending=True, stable=True)
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return [(names[index], value) for index, value in pairs][:count]


__all__ = [
    "Example",
    "Score",
    "TaskResult",
    "answer_examples",
    "best",
    "evenly_spaced",
    "interval_facts",
    "portable",
]
