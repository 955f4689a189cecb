"""What an evaluation hands back: numbers that cannot be read without their protocol."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from eval.embed import Predictions
from eval.metrics import mean_interval, wilson
from processing.rows import Media, media_of


@dataclass(frozen=True)
class Score:
    """A share of n rows, from 0 to 1, or a mean over them, beside what it is to be judged by.

    Attributes:
        value (`float`): the share or mean.
        low, high (`float`): its 95 % interval: Wilson's of a share, by the standard error of a
            mean.
        n (`int`): rows.
        baselines (`dict[str, float]`): the same for chance, the most common answer, ...
    """

    value: float
    low: float
    high: float
    n: int
    baselines: dict[str, float]

    @classmethod
    def of(cls, hits: torch.Tensor, baselines: dict[str, float]) -> "Score":
        """`hits` (`torch.BoolTensor` of shape `(n,)`): which rows were right."""
        right, n = int(hits.sum()), len(hits)
        return cls(right / n, *wilson(right, n), n, baselines)

    @classmethod
    def of_mean(cls, values: torch.Tensor, baselines: dict[str, float]) -> "Score":
        """`values` (`torch.DoubleTensor` of shape `(n,)`): the score of each row."""
        return cls(values.mean().item(), *mean_interval(values), len(values), baselines)


@dataclass(frozen=True)
class Example:
    """One row to look at.

    Attributes:
        media (`Media`, *optional*): the clip that was asked about. None where a text was asked for
            and files were ranked.
        query (`str`): what was asked, the text that was searched for, or the caption written.
        truth (`list[str]`): the right answers, or the right files.
        ranked (`list[tuple[str, float]]`): answers or files with their similarity, best first; of
            a caption, what else could have been written, with its CIDEr.
        rank (`int`): of the first right one.
    """

    media: Media | None
    query: str
    truth: list[str]
    ranked: list[tuple[str, float]]
    rank: int

    @property
    def found(self) -> bool:
        """Whether a right one is among those shown."""
        return any(name in self.truth for name, _ in self.ranked)


@dataclass(frozen=True)
class TaskResult:
    """Everything about one benchmark.

    Attributes:
        name, task, description (`str`): those of the benchmark.
        protocol (`dict`): how the numbers came about.
        scores (`dict[str, Score]`): by metric.
        ranks (`dict[str, float]`): median and mean ranks, of retrieval.
        numbers (`dict[str, float]`): what is no share of rows, of streaming.
        comparisons (`dict[str, dict[str, float]]`): one way against another, of captioning
            and streaming.
        curves (`dict[str, list[tuple[float, float]]]`): decodes per second and CIDEr, by the way
            of choosing what to decode, of streaming.
        by_type (`dict[str, Score]`): accuracy by question type, of VQA.
        skipped (`list[str]`): each line and file that was left out, and why.
        examples (`list[Example]`): for the report.
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

    def as_json(self) -> dict:
        """All but the examples, whose paths hold on one machine only."""
        return {name: value for name, value in asdict(self).items() if name != "examples"}


def portable(path: Path) -> str:
    """A path as it was given, or only its name where it holds on one machine alone."""
    return path.name if path.is_absolute() else path.as_posix()


def evenly_spaced(indices: list[int], count: int) -> list[int]:
    """Return at most `count` of the indices, evenly spaced: examples then show the whole file."""
    if len(indices) <= count:
        return indices
    return [indices[step * len(indices) // count] for step in range(count)]


def answer_examples(
    predictions: Predictions, similarity: torch.Tensor, candidates: list[str], ranks: torch.Tensor
) -> list[Example]:
    """Six rows answered rightly and six answered wrongly, with their five best answers.

    Args:
        similarity (`torch.FloatTensor` of shape `(R, C)`)
        ranks (`torch.LongTensor` of shape `(R,)`): of the right answer.
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
    """The `count` names of highest similarity `(C,)`, best first."""
    values, places = similarity.sort(descending=True, stable=True)
    pairs = zip(places.tolist(), values.tolist(), strict=True)
    return [(names[place], value) for place, value in pairs][:count]


__all__ = [
    "Example",
    "Score",
    "TaskResult",
    "answer_examples",
    "best",
    "evenly_spaced",
    "portable",
]
