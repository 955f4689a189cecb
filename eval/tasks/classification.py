"""Classification: the label nearest to the prediction (paper section 4).

Shapes: R rows, C candidate labels, D embedding size.
"""

from collections import Counter

import torch

from eval.benchmarks import Benchmark
from eval.embed import embed_texts, predict_rows
from eval.metrics import chance_recall, first_relevant_ranks, relevant_index
from eval.results import Score, TaskResult, answer_examples, common_protocol, skipped_rows
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore


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
    """Rank the candidate labels for each row by cosine similarity.

    The majority baseline names the most common labels of these very rows: the best that one
    fixed ranking can do.

    Raises: `ValueError` for a row whose target is not among the given `candidates`.
    """
    all_rows, bad = benchmark.load()
    labels = benchmark.candidates or sorted({row["target"] for row in all_rows})
    if strange := sorted({row["target"] for row in all_rows} - set(labels)):
        raise ValueError(f"{benchmark.name}: not among the candidates: {', '.join(strange)}")
    predictions = predict_rows(
        model,
        processor,
        all_rows[:limit],
        num_frames=benchmark.num_frames,
        batch_size=batch_size,
        ablation=ablation,
        features=features,
    )
    label_embeds = embed_texts(model, processor, labels, batch_size=batch_size)  # (C, D)
    similarity = predictions.embeds @ label_embeds.T  # (R, C)
    targets = [row["target"] for row in predictions.rows]
    place = {label: index for index, label in enumerate(labels)}
    truth = torch.tensor([place[target] for target in targets])  # (R,)
    relevant = relevant_index(truth, len(labels))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)

    scores = {}
    for k in (1, 5):
        common_labels = sum(number for _, number in Counter(targets).most_common(k))
        baselines = {
            "chance": chance_recall(relevant, k),
            "majority": common_labels / len(targets),
        }
        scores[f"top-{k}"] = Score.of(ranks <= k, baselines)
    common = common_protocol(benchmark, processor, predictions, ablation=ablation, limit=limit)
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol={"candidates": len(labels), "rows": len(targets)} | common,
        scores=scores,
        skipped=skipped_rows(benchmark, all_rows, bad, predictions.broken),
        examples=answer_examples(predictions, similarity, labels, ranks),
    )


__all__ = ["evaluate"]
