"""Visual question answering: the candidate answer nearest to the prediction (paper section 4).

The paper does not give its candidate sets. Here they are the distinct answers of the training
rows, whatever the question: a question of colour can be answered with "yes", and is then wrong.

Shapes: R rows, C candidate answers, D embedding size.
"""

from collections import Counter, defaultdict

import torch

from eval.benchmarks import Benchmark, sha256, usable_rows
from eval.embed import embed_texts, predict_rows
from eval.metrics import chance_recall, first_relevant_ranks, relevant_index
from eval.results import (
    Score,
    TaskResult,
    answer_examples,
    common_protocol,
    portable,
    skipped_rows,
)
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import media_of


class QuestionOnly:
    """Answers without looking: what a model must beat before it can be said to see.

    The most common answer of the training rows to this very question; to one it never met, the
    most common answer to questions of this `question_type`; failing that, the most common one.
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
    rows: list[dict], ranks: torch.Tensor, relevant: torch.Tensor, blind: QuestionOnly
) -> Score:
    """Accuracy over R rows, from the ranks `(R,)` of the truth; `relevant` is `(R, C)`."""
    majority = blind.majority()
    baselines = {
        "chance": chance_recall(relevant, 1),
        "majority": sum(row["target"] == majority for row in rows) / len(rows),
        "question only": sum(row["target"] == blind.answer(row) for row in rows) / len(rows),
    }
    return Score.of(ranks == 1, baselines)


def evaluate(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    benchmark: Benchmark,
    *,
    batch_size: int = 64,
    ablation: str = "none",
    limit: int | None = None,
    features: FeatureStore | None = None,
) -> TaskResult:
    """Rank all candidate answers for each question by cosine similarity.

    A true answer that is no candidate counts as wrong, and is counted in the protocol.
    """
    all_rows, bad = benchmark.load()
    train_rows, bad_train = usable_rows(benchmark.train_rows)
    answers = sorted({row["target"] for row in train_rows})
    predictions = predict_rows(
        model,
        processor,
        all_rows[:limit],
        num_frames=benchmark.num_frames,
        batch_size=batch_size,
        ablation=ablation,
        features=features,
    )
    answer_embeds = embed_texts(model, processor, answers, batch_size=batch_size)  # (C, D)
    similarity = predictions.embeds @ answer_embeds.T  # (R, C)
    rows = predictions.rows
    place = {answer: index for index, answer in enumerate(answers)}
    truth = torch.tensor([place.get(row["target"], -1) for row in rows])  # (R,)
    relevant = relevant_index(truth, len(answers))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)

    blind = QuestionOnly(train_rows)
    types = defaultdict(list)
    for index, row in enumerate(rows):
        types[row.get("question_type", "untyped")].append(index)
    by_type = {
        name: score([rows[index] for index in places], ranks[places], relevant[places], blind)
        for name, places in sorted(types.items())
    }
    train_media = {media_of(row) for row in train_rows}
    protocol = {
        "candidates": len(answers),
        "rows": len(rows),
        "answers_not_among_candidates": int((truth == -1).sum()),
        "train_rows_file": portable(benchmark.train_rows),
        "train_rows_sha256": sha256(benchmark.train_rows),
        "train_rows_unusable": len(bad_train),
        "media_shared_with_training": len({media_of(row) for row in rows} & train_media),
    }
    common = common_protocol(benchmark, processor, predictions, ablation=ablation, limit=limit)
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol=protocol | common,
        scores={"accuracy": score(rows, ranks, relevant, blind)},
        by_type=by_type,
        skipped=skipped_rows(benchmark, all_rows, bad, predictions.broken),
        examples=answer_examples(predictions, similarity, answers, ranks),
    )


__all__ = ["QuestionOnly", "evaluate"]
