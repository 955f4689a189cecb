"""Visual question answering: the candidate answer nearest to the prediction (paper section 4).

The paper does not give its candidate sets. Here they are those of the entry, or the distinct
answers of the training rows, whatever the question: a question of colour can be answered with
"yes", and is then wrong. Of several nearest answers the model chooses a wrong one.

Shapes: R rows, C candidate answers, D embedding size.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from eval.answers import ANSWERS
from eval.candidates import (
    CandidatesBenchmark,
    candidate_facts,
    check_texts,
    chosen,
    compare,
    named,
    templates_of,
)
from eval.intervals import difference_interval, numbered
from eval.items import Items
from eval.metrics import chance_recall, first_relevant_ranks, precision_recall_f1, relevant_index
from eval.parts import f1_score, mean_of_parts, rows_of_parts
from eval.results import Score, TaskResult, answer_examples
from eval.sources import Source
from eval.task import Kind, Task, origin_facts, usable_rows
from processing.rows import Media, media_of


@dataclass(frozen=True, kw_only=True)
class VQABenchmark(CandidatesBenchmark):
    """A VQA benchmark. It takes no `query`, since its rows ask their own questions.

    A row may have `question_type`, for a score of each type, and `pair`: rows of equal `pair` are
    one item of the score `pairs`, which is right if every row of it is.

    Attributes:
        train_rows (`Path`, *optional*): JSONL file. Its distinct answers are the candidates if the
            entry gives none, and the baseline "question only" learns from it.
        train_source (`Source`, *optional*): published data in its place; no clip of them is read.
        answers (`str`, *optional*, defaults to `"exact"`): normal form in which answers are
            compared, a name in [`ANSWERS`].
        positive (`str`, *optional*): the answer whose F1 is measured, such as "yes".
        mean_of_types (`bool`, *optional*): measure the mean of the scores of all question types
            too, in which each type counts the same.
    """

    roles: ClassVar[dict[str, str]] = {"question_type": "text", "pair": "text"}

    train_rows: Path | None = None
    train_source: Source | None = None
    answers: str = "exact"
    positive: str | None = None
    mean_of_types: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query is not None:
            raise ValueError(f"{self.name}: a vqa benchmark takes no query: its rows ask")
        if self.train_rows is not None and self.train_source is not None:
            raise ValueError(f"{self.name}: give either train_rows or train_source")
        has_candidates = self.candidates or self.candidates_file or self.candidates_source
        if self.training is None and not has_candidates:
            raise ValueError(
                f"{self.name}: a vqa benchmark needs train_rows, train_source, candidates or "
                "candidates_file"
            )
        if self.answers not in ANSWERS:
            raise ValueError(
                f"{self.name}: answers is {self.answers!r}, must be one of {', '.join(ANSWERS)}"
            )

    @property
    def training(self) -> Path | Source | None:
        """The file or the source of the training rows."""
        return self.train_source or self.train_rows

    def normalized(self, rows: list[dict], name: str = "row") -> list[dict]:
        """Return rows with the normal forms of their answers.

        Args:
            name: word for a row in a message.

        Raises: `ValueError` for an answer without one, with the number of its line.
        """
        normalize, found = ANSWERS[self.answers], []
        for row in rows:
            try:
                found.append(row | {"target": normalize(row["target"])})
            except ValueError as error:
                raise ValueError(f"{self.name}: {name} {row['line']}: {error}") from error
        return found

    def answer_texts(self, train_rows: list[dict]) -> list[str]:
        """Return the candidate answers: those given in their order, or the sorted answers of
        training rows.

        Raises: `ValueError` for given answers with the same normal form, or without one.
        """
        given = self.given_candidates()
        if given is None:
            return sorted({row["target"] for row in train_rows})
        try:
            answers = [ANSWERS[self.answers](text) for text in given]
        except ValueError as error:
            raise ValueError(f"{self.name}: candidates: {error}") from error
        check_texts(f"{self.name}: candidates, as {self.answers},", answers)
        return answers

    def check_positive(self, answers: list[str]) -> None:
        """Raise `ValueError` if the answer whose F1 is measured is not among the candidates."""
        if self.positive is not None and self.positive not in answers:
            raise ValueError(
                f"{self.name}: positive is {self.positive!r}, which is not among the candidates: "
                f"{named(answers)}"
            )


class QuestionOnly:
    """A baseline that answers without the image: a model that sees must do better.

    It gives the most common answer of the training rows to this very question. For a question that
    is new, it gives the most common answer to questions of this `question_type`, or else the most
    common answer of all.
    """

    def __init__(self, train_rows: list[dict]):
        self.by_query, self.by_type = defaultdict(Counter), defaultdict(Counter)
        self.overall = Counter(row["target"] for row in train_rows)
        for row in train_rows:
            self.by_query[row["query"]][row["target"]] += 1
            self.by_type[row.get("question_type")][row["target"]] += 1

    def answer(self, row: dict) -> str:
        known = (
            self.by_query.get(row["query"])
            or self.by_type.get(row.get("question_type"))
            or self.overall
        )
        return known.most_common(1)[0][0]

    def majority(self) -> str:
        return self.overall.most_common(1)[0][0]


def type_of(row: dict) -> str:
    return row.get("question_type", "untyped")


def cluster_of(row: dict) -> Media:
    """Return the row's pair, or its clip: questions about one clip are not independent."""
    return row["pair"] if "pair" in row else media_of(row)


def baseline_answers(rows: list[dict], train_rows: list[dict]) -> dict[str, list[str]]:
    """Return the answers of each baseline to the rows.

    Without training rows, "majority" is the most common answer of these very rows, and "question
    only" is missing.
    """
    if not train_rows:
        [(common, _)] = Counter(row["target"] for row in rows).most_common(1)
        return {"majority": [common] * len(rows)}
    blind = QuestionOnly(train_rows)
    return {
        "majority": [blind.majority()] * len(rows),
        "question only": [blind.answer(row) for row in rows],
    }


def score(
    part: np.ndarray,
    hits: np.ndarray,
    relevant: torch.Tensor,
    known: dict[str, np.ndarray],
    clusters: np.ndarray,
) -> Score:
    """Return the accuracy over some of R rows.

    Args:
        part (`np.ndarray`): indices of the rows.
        hits (`np.ndarray` of shape `(R,)`): whether the model is right.
        relevant (`torch.BoolTensor` of shape `(R, C)`)
        known: whether each baseline is right, `(R,)`.
        clusters (`np.ndarray` of shape `(R,)`)
    """
    baselines = {"chance": chance_recall(relevant[torch.from_numpy(part)], 1)}
    baselines |= {name: float(right[part].mean()) for name, right in known.items()}
    return Score.of(hits[part], numbered(clusters[part].tolist()), baselines)


def complete_pairs(rows: list[dict]) -> list[list[int]]:
    """Return the indices of the rows of each pair; one row alone, whose other is missing, is left
    out."""
    members = defaultdict(list)
    for index, row in enumerate(rows):
        if "pair" in row:
            members[row["pair"]].append(index)
    return [indices for indices in members.values() if len(indices) > 1]


def pair_items(rows: list[dict], pairs: list[list[int]], hits: np.ndarray) -> Items:
    """Return the pairs as items: a pair is right if all its rows are."""
    asked = [[rows[index] for index in pair] for pair in pairs]
    return Items(
        clips=asked,
        texts=[[text for row in pair for text in (row["query"], row["target"])] for pair in asked],
        clusters=np.arange(len(pairs)),
        scores={"pairs": np.array([hits[pair].all() for pair in pairs])},
        predictions=[],
    )


def pair_score(
    pairs: list[list[int]], items: Items, relevant: torch.Tensor, known: dict[str, np.ndarray]
) -> Score:
    """Return the share of pairs of which every row is right."""
    chance = (relevant.any(dim=1) / relevant.shape[1]).double().numpy()  # (R,)
    baselines = {"chance": float(np.mean([chance[pair].prod() for pair in pairs]))}
    for name, right in known.items():
        baselines[name] = float(np.mean([right[pair].all() for pair in pairs]))
    return Score.of(items.scores["pairs"], items.clusters, baselines)


def against_blind(
    rows: list[dict], ranks: torch.Tensor, blind: QuestionOnly
) -> dict[str, dict[str, float]]:
    """Return how much the accuracy exceeds that of the question alone, with its 95 % interval: over
    all rows, and for each `question_type`.

    The difference is taken row by row, and clips are resampled: the baseline varies with the rows
    too, so the interval of the accuracy alone would not do.
    """
    known = np.array([row["target"] == blind.answer(row) for row in rows], dtype=np.float64)
    better = (ranks == 1).double().numpy() - known  # (R,)
    clusters, types = numbered(map(cluster_of, rows)), [type_of(row) for row in rows]
    parts = {"accuracy": np.full(len(rows), True)}
    parts |= {name: np.array([each == name for each in types]) for name in sorted(set(types))}
    found = {}
    for name, part in parts.items():
        interval = difference_interval(better[part], clusters[part], largest=1.0)
        numbers = {"difference": float(better[part].mean())}
        numbers |= {"low": interval.low, "high": interval.high}
        found[f"{name} against question only"] = {
            key: round(number, 4) for key, number in numbers.items()
        }
    return found


def evaluate(task: Task) -> TaskResult:
    """Rank all candidate answers for each question by similarity; see [`compare`].

    A true answer that is not among the candidates counts as wrong; the protocol counts them.

    Raises: `ValueError` for an answer without the normal form of the benchmark.
    """
    benchmark = task.benchmark
    train_rows, bad_train, protocol = [], [], {}
    if benchmark.training is not None:
        train_rows, bad_train = usable_rows(benchmark.training)
        protocol |= origin_facts(benchmark.training, train_rows, "train_")
        train_rows = benchmark.normalized(train_rows, "training row")
    answers = benchmark.answer_texts(train_rows)
    benchmark.check_positive(answers)
    templates = templates_of(task, "{}")
    asked = benchmark.normalized(task.rows())
    predictions, similarity = compare(task, asked, answers, templates)  # similarity (R, C)
    rows = predictions.rows
    index_of = {answer: index for index, answer in enumerate(answers)}
    truth = torch.tensor([index_of.get(row["target"], -1) for row in rows])  # (R,)
    relevant = relevant_index(truth, len(answers))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)
    found = chosen(similarity, relevant, ranks, answers)

    hits, clusters = (ranks == 1).numpy(), numbered(map(cluster_of, rows))
    targets, types = [row["target"] for row in rows], [type_of(row) for row in rows]
    given = baseline_answers(rows, train_rows)
    known = {name: np.array(texts) == np.array(targets) for name, texts in given.items()}
    scores = {"accuracy": score(np.arange(len(rows)), hits, relevant, known, clusters)}
    by_type = {
        name: score(part, hits, relevant, known, clusters)
        for name, part in rows_of_parts(types).items()
    }
    if benchmark.mean_of_types:
        scores["mean accuracy of types"] = mean_of_parts(by_type, 1.0 * hits, types, clusters)
    items = [
        Items(
            clips=[[row] for row in rows],
            texts=[[row["query"], row["target"]] for row in rows],
            clusters=clusters,
            scores={"accuracy": hits},
            predictions=found,
            types=types,
        )
    ]
    if pairs := complete_pairs(rows):
        items.append(pair_items(rows, pairs, hits))
        scores["pairs"] = pair_score(pairs, items[-1], relevant, known)
    numbers = {}
    if benchmark.positive is not None:
        scores |= f1_scores(benchmark, answers, found, targets, types, clusters, given)
        numbers = detection_numbers(benchmark.positive, found, targets, types)

    protocol = candidate_facts(task, answers, templates) | {
        "answers": benchmark.answers,
        "ties": "wrong",
        "rows": len(rows),
        "answers_not_among_candidates": int((truth == -1).sum()),
        **protocol,
    }
    if benchmark.training is not None:
        protocol["train_rows_unusable"] = len(bad_train)
    if benchmark.train_rows is not None:
        shared = {media_of(row) for row in rows} & {media_of(row) for row in train_rows}
        protocol["media_shared_with_training"] = len(shared)
    return task.result(
        predictions,
        protocol,
        scores,
        cluster="pair of questions" if "pair" in rows[0] else "clip",
        comparisons=against_blind(rows, ranks, QuestionOnly(train_rows)) if train_rows else {},
        by_type=by_type,
        numbers=numbers,
        examples=answer_examples(predictions, similarity, answers, ranks),
        items=items,
    )


def f1_scores(
    benchmark: VQABenchmark,
    answers: list[str],
    found: list[str],
    targets: list[str],
    types: list[str],
    clusters: np.ndarray,
    given: dict[str, list[str]],
) -> dict[str, Score]:
    """Return F1 of the positive answer over all rows, and the mean of the types' F1 if measured."""
    positive = benchmark.positive

    def is_positive(texts: list[str]) -> np.ndarray:
        return np.array([text == positive for text in texts])

    baselines = {"chance": 1 / len(answers)}
    baselines |= {name: is_positive(texts) for name, texts in given.items()}

    def f1(parts: list[str]) -> Score:
        return f1_score(is_positive(found), is_positive(targets), parts, clusters, baselines)

    scores = {"F1": f1(["all"] * len(found))}
    if benchmark.mean_of_types:
        scores["mean F1 of types"] = f1(types)
    return scores


def detection_numbers(
    positive: str, found: list[str], targets: list[str], types: list[str]
) -> dict[str, float]:
    """Return precision, recall, F1 and the share of positive answers of each type, as POPE does."""
    numbers = {}
    for name, rows in rows_of_parts(types).items():
        chosen_rows = [found[row] == positive for row in rows]
        values = precision_recall_f1(chosen_rows, [targets[row] == positive for row in rows])
        facts = ("precision", "recall", "F1", f"share of {positive}")
        for fact, value in zip(facts, (*values, sum(chosen_rows) / len(rows)), strict=True):
            numbers[f"{name} {fact}"] = round(value, 4)
    return numbers


KIND = Kind(
    name="vqa",
    benchmark=VQABenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    by_tokens=True,
    hub_tasks={"image": "visual-question-answering", "video": "video-text-to-text"},
    examples="answers",
)

__all__ = ["KIND", "QuestionOnly", "VQABenchmark", "evaluate"]
