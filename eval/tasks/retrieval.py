"""Text-to-video and video-to-text retrieval (paper section 4, Recall@1 under a fixed prompt).

Shapes: V distinct files, T distinct texts, D embedding size.
"""

import torch

from eval.benchmarks import Benchmark
from eval.embed import embed_texts, predict_rows
from eval.metrics import chance_recall, first_relevant_ranks
from eval.results import (
    Example,
    Score,
    TaskResult,
    best,
    common_protocol,
    skipped_rows,
    spread,
)
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import media_of


def relevance(rows: list[dict], files: list[str], texts: list[str]) -> torch.Tensor:
    """Which texts are right for which files: bool `(V, T)`.

    A text is right for the files of its rows, and for those of every row that shares a
    `group_id` with one of them. A row without that column is a group of its own file.
    """
    file_place = {file: place for place, file in enumerate(files)}
    text_place = {text: place for place, text in enumerate(texts)}
    files_of, texts_of = {}, {}
    for row in rows:
        group = row.get("group_id", media_of(row))
        files_of.setdefault(group, set()).add(file_place[media_of(row)])
        texts_of.setdefault(group, set()).add(text_place[row["target"]])
    relevant = torch.zeros(len(files), len(texts), dtype=torch.bool)
    for group, places in files_of.items():
        relevant[torch.tensor(list(places))[:, None], torch.tensor(list(texts_of[group]))] = True
    return relevant


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
    """Rank all files for each text and all texts for each file, by cosine similarity."""
    all_rows, bad = benchmark.load()
    asked = all_rows[:limit]
    one_per_file = list({media_of(row): row for row in asked}.values())
    predictions = predict_rows(
        model,
        processor,
        one_per_file,
        num_frames=benchmark.num_frames,
        batch_size=batch_size,
        ablation=ablation,
        features=features,
    )
    rows = [row for row in asked if media_of(row) not in predictions.broken]
    files = [media_of(row) for row in predictions.rows]
    texts = list(dict.fromkeys(row["target"] for row in rows))
    text_embeds = embed_texts(model, processor, texts, batch_size=batch_size)  # (T, D)
    similarity = predictions.embeds @ text_embeds.T  # (V, T)
    relevant = relevance(rows, files, texts)  # (V, T)

    scores, rank_statistics = {}, {}
    for direction, found, right in (
        ("text to video", similarity.T, relevant.T),
        ("video to text", similarity, relevant),
    ):
        ranks = first_relevant_ranks(found, right)
        for k in (1, 5, 10):
            chance = {"chance": chance_recall(right, k)}
            scores[f"{direction} R@{k}"] = Score.of(ranks <= k, chance)
        rank_statistics[f"{direction} median rank"] = ranks.double().quantile(0.5).item()
        rank_statistics[f"{direction} mean rank"] = round(ranks.double().mean().item(), 2)

    protocol = {
        "video_pool": len(files),
        "text_pool": len(texts),
        "texts_per_video": round(float(relevant.sum(dim=1).float().mean()), 4),
        "videos_per_text": round(float(relevant.sum(dim=0).float().mean()), 4),
    }
    common = common_protocol(benchmark, processor, predictions, ablation=ablation, limit=limit)
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol=protocol | common,
        scores=scores,
        ranks=rank_statistics,
        skipped=skipped_rows(benchmark, all_rows, bad, predictions.broken),
        examples=text_to_video_examples(similarity.T, relevant.T, texts, files),
    )


def text_to_video_examples(
    similarity: torch.Tensor, relevant: torch.Tensor, texts: list[str], files: list[str]
) -> list[Example]:
    """Eight texts with their five best files; both matrices are `(T, V)`."""
    ranks = first_relevant_ranks(similarity, relevant)
    return [
        Example(
            media=None,
            query=texts[text],
            truth=[files[place] for place in relevant[text].nonzero().flatten().tolist()],
            ranked=best(similarity[text], files, 5),
            rank=int(ranks[text]),
        )
        for text in spread(list(range(len(texts))), 8)
    ]


__all__ = ["evaluate", "relevance"]
