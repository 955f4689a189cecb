"""Classification: the label nearest to the prediction (paper section 4).

Shapes: R rows, C candidate labels, D embedding size.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from eval.intervals import numbered
from eval.items import Items
from eval.metrics import chance_recall, first_relevant_ranks, relevant_index
from eval.results import Score, TaskResult, answer_examples
from eval.task import Benchmark, Kind, Task, texts_sha256
from processing.rows import media_of


@dataclass(frozen=True, kw_only=True)
class ClassificationBenchmark(Benchmark):
    """A classification benchmark.

    Attributes:
        candidates (`list[str]`, *optional*): the labels to choose from; the distinct targets of
            the rows by default.
    """

    prompt = "action"

    candidates: list | None = None


def evaluate(task: Task) -> TaskResult:
    """Rank the candidate labels for each row by cosine similarity.

    The majority baseline names the most common labels of these very rows: no fixed ranking does
    better.

    Raises: `ValueError` for a row whose target is not among the given `candidates`.
    """
    # All rows, so that a limit does not make the choice easier.
    distinct = {row["target"] for row in task.all_rows()}
    labels = task.benchmark.candidates or sorted(distinct)
    if strange := sorted(distinct - set(labels)):
        raise ValueError(f"{task.benchmark.name}: not among the candidates: {', '.join(strange)}")
    predictions = task.predict(task.rows())
    similarity = predictions.embeds @ task.embed_texts(labels).T  # (R, C)
    targets = [row["target"] for row in predictions.rows]
    index_of = {label: index for index, label in enumerate(labels)}
    truth = torch.tensor([index_of[target] for target in targets])  # (R,)
    relevant = relevant_index(truth, len(labels))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)

    clusters = numbered(map(media_of, predictions.rows))
    hits = {f"top-{k}": ranks <= k for k in (1, 5)}
    scores = {}
    for k in (1, 5):
        most_common = sum(count for _, count in Counter(targets).most_common(k))
        baselines = {
            "chance": chance_recall(relevant, k),
            "majority": most_common / len(targets),
        }
        scores[f"top-{k}"] = Score.of(hits[f"top-{k}"], clusters, baselines)
    return task.result(
        predictions,
        {
            "candidates": len(labels),
            "candidates_sha256": texts_sha256(labels),
            "rows": len(targets),
        },
        scores,
        examples=answer_examples(predictions, similarity, labels, ranks),
        items=[
            Items(
                clips=[[row] for row in predictions.rows],
                texts=[[target] for target in targets],
                clusters=clusters,
                scores=hits,
                predictions=[labels[index] for index in similarity.argmax(dim=1).tolist()],
            )
        ],
    )


KIND = Kind(
    name="classification",
    benchmark=ClassificationBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    hub_tasks={"image": "zero-shot-image-classification", "video": "video-classification"},
    examples="answers",
)

__all__ = ["KIND", "ClassificationBenchmark", "evaluate"]
