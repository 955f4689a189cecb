"""Visual question answering: the candidate answer nearest to the prediction (paper section 4).

The paper does not give its candidate sets. Here they are the distinct answers of the training
rows, whatever the question: a question of colour can be answered with "yes", and is then wrong.

Shapes: R rows, C candidate answers, D embedding size.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.intervals import difference_interval, numbered
from eval.items import Items
from eval.metrics import chance_recall, first_relevant_ranks, relevant_index
from eval.results import Score, TaskResult, answer_examples, portable
from eval.task import Benchmark, Kind, Task, sha256, texts_sha256, usable_rows
from processing.rows import media_of


@dataclass(frozen=True, kw_only=True)
class VQABenchmark(Benchmark):
    """A VQA benchmark. It takes no `query`, since its rows ask their own questions.

    Attributes:
        train_rows (`Path`): JSONL file with the candidate answers; the baselines learn from it.
    """

    train_rows: Path

    def __post_init__(self) -> None:
        if self.query is not None:
            raise ValueError(f"{self.name}: a vqa benchmark takes no query: its rows ask")


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


def score(
    rows: list[dict],
    ranks: torch.Tensor,
    relevant: torch.Tensor,
    blind: QuestionOnly,
) -> Score:
    """Return the accuracy over R rows; the questions about one clip form a cluster.

    Args:
        ranks (`torch.LongTensor` of shape `(R,)`): rank of the true answer.
        relevant (`torch.BoolTensor` of shape `(R, C)`)
    """
    majority = blind.majority()
    baselines = {
        "chance": chance_recall(relevant, 1),
        "majority": sum(row["target"] == majority for row in rows) / len(rows),
        "question only": sum(row["target"] == blind.answer(row) for row in rows) / len(rows),
    }
    return Score.of(ranks == 1, numbered(map(media_of, rows)), baselines)


def type_of(row: dict) -> str:
    return row.get("question_type", "untyped")


def score_by_type(
    rows: list[dict], ranks: torch.Tensor, relevant: torch.Tensor, blind: QuestionOnly
) -> dict[str, Score]:
    """Return `score` for each `question_type`, in the order of their names."""
    types = defaultdict(list)
    for index, row in enumerate(rows):
        types[type_of(row)].append(index)
    return {
        name: score([rows[index] for index in indices], ranks[indices], relevant[indices], blind)
        for name, indices in sorted(types.items())
    }


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
    clusters, types = numbered(map(media_of, rows)), [type_of(row) for row in rows]
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
    """Rank all candidate answers for each question by cosine similarity.

    A true answer that is not among the candidates counts as wrong; the protocol counts them.
    """
    train_file = task.benchmark.train_rows
    train_rows, bad_train = usable_rows(train_file)
    answers = sorted({row["target"] for row in train_rows})
    predictions = task.predict(task.rows())
    rows = predictions.rows
    similarity = predictions.embeds @ task.embed_texts(answers).T  # (R, C)
    index_of = {answer: index for index, answer in enumerate(answers)}
    truth = torch.tensor([index_of.get(row["target"], -1) for row in rows])  # (R,)
    relevant = relevant_index(truth, len(answers))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)

    blind = QuestionOnly(train_rows)
    shared = {media_of(row) for row in rows} & {media_of(row) for row in train_rows}
    protocol = {
        "candidates": len(answers),
        "candidates_sha256": texts_sha256(answers),
        "rows": len(rows),
        "answers_not_among_candidates": int((truth == -1).sum()),
        "train_rows_file": portable(train_file),
        "train_rows_sha256": sha256(train_file),
        "train_rows_unusable": len(bad_train),
        "media_shared_with_training": len(shared),
    }
    items = Items(
        clips=[[row] for row in rows],
        texts=[[row["query"], row["target"]] for row in rows],
        clusters=numbered(map(media_of, rows)),
        scores={"accuracy": ranks == 1},
        predictions=[answers[index] for index in similarity.argmax(dim=1).tolist()],
        types=[type_of(row) for row in rows],
    )
    return task.result(
        predictions,
        protocol,
        {"accuracy": score(rows, ranks, relevant, blind)},
        comparisons=against_blind(rows, ranks, blind),
        by_type=score_by_type(rows, ranks, relevant, blind),
        examples=answer_examples(predictions, similarity, answers, ranks),
        items=[items],
    )


KIND = Kind(
    name="vqa",
    benchmark=VQABenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    hub_tasks={"image": "visual-question-answering", "video": "video-text-to-text"},
    examples="answers",
)

__all__ = ["KIND", "QuestionOnly", "VQABenchmark", "evaluate"]
