"""Classification: the label nearest to the prediction (paper section 4).

Of several nearest labels the model chooses a wrong one.

Shapes: R rows, C candidate labels, D embedding size.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from eval.candidates import (
    CandidatesBenchmark,
    candidate_facts,
    chosen,
    compare,
    named,
    templates_of,
)
from eval.intervals import numbered
from eval.items import Items
from eval.metrics import chance_recall, first_relevant_ranks, relevant_index
from eval.results import Score, TaskResult, answer_examples
from eval.task import Kind, Task
from processing.rows import media_of


@dataclass(frozen=True, kw_only=True)
class ClassificationBenchmark(CandidatesBenchmark):
    """A classification benchmark.

    Its labels are the given candidates, or else the distinct targets of the rows. Its template is
    the model's own for actions, as in the pipelines, unless the entry has templates.
    """

    prompt: str | None = "action"


def evaluate(task: Task) -> TaskResult:
    """Rank the candidate labels for each row by similarity; see [`compare`].

    The majority baseline names the most common labels of these very rows: no fixed ranking does
    better.

    Raises: `ValueError` for a row whose target is not among the given `candidates`.
    """
    # All rows, so that a limit does not make the choice easier.
    distinct = {row["target"] for row in task.all_rows()}
    labels = task.benchmark.given_candidates() or sorted(distinct)
    if strange := sorted(distinct - set(labels)):
        raise ValueError(f"{task.benchmark.name}: not among the candidates: {named(strange)}")
    templates = templates_of(task, task.model.config.target_prompts["action"])
    predictions, similarity = compare(task, task.rows(), labels, templates)  # similarity (R, C)
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
    protocol = candidate_facts(task, labels, templates) | {"ties": "wrong", "rows": len(targets)}
    if unused := [label for label in labels if label not in distinct]:
        protocol["candidates_without_rows"] = f"{len(unused)}: {named(unused)}"
    return task.result(
        predictions,
        protocol,
        scores,
        examples=answer_examples(predictions, similarity, labels, ranks),
        items=[
            Items(
                clips=[[row] for row in predictions.rows],
                texts=[[target] for target in targets],
                clusters=clusters,
                scores=hits,
                predictions=chosen(similarity, relevant, ranks, labels),
            )
        ],
    )


KIND = Kind(
    name="classification",
    benchmark=ClassificationBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    by_tokens=True,
    hub_tasks={"image": "zero-shot-image-classification", "video": "video-classification"},
    examples="answers",
)

__all__ = ["KIND", "ClassificationBenchmark", "evaluate"]
