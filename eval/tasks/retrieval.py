"""Text-to-video and video-to-text retrieval (paper section 4, Recall@1 under a fixed prompt).

A pool of images is called one of images, and a mixed pool one of clips.

Shapes: V distinct files, T distinct texts, D embedding size.
"""

import torch

from eval.metrics import chance_recall, first_relevant_ranks
from eval.results import Example, Score, TaskResult, best, evenly_spaced
from eval.task import Benchmark, Kind, Task, one_row_per_clip
from processing.rows import BadRow, media_of


class RetrievalBenchmark(Benchmark):
    """A retrieval benchmark: every clip is asked the same query."""

    prompt = "retrieval"

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Read the rows as every [`Benchmark`] does.

        Raises: `ValueError` when no row is good, or when rows ask different queries.
        """
        rows, bad = super().load()
        self.check_one_query(rows)
        return rows, bad


def relevance(rows: list[dict], files: list[str], texts: list[str]) -> torch.Tensor:
    """Return which texts are right for which files: bool `(V, T)`.

    A text is right for the files of its rows, and for those of every row that shares a
    `group_id` with one of them. A row without that column forms a group with the other rows of
    its file.
    """
    file_index = {file: index for index, file in enumerate(files)}
    text_index = {text: index for index, text in enumerate(texts)}
    files_of, texts_of = {}, {}
    for row in rows:
        group = row.get("group_id", media_of(row))
        files_of.setdefault(group, set()).add(file_index[media_of(row)])
        texts_of.setdefault(group, set()).add(text_index[row["target"]])
    relevant = torch.zeros(len(files), len(texts), dtype=torch.bool)
    for group, indices in files_of.items():
        # (files, 1) and (texts,) broadcast: every file of the group with every text of it
        relevant[torch.tensor(list(indices))[:, None], torch.tensor(list(texts_of[group]))] = True
    return relevant


def evaluate(task: Task) -> TaskResult:
    """Rank all files for each text and all texts for each file, by cosine similarity."""
    predictions = task.predict(one_row_per_clip(task.rows()))
    rows = [row for row in task.rows() if media_of(row) not in predictions.broken]
    files = [media_of(row) for row in predictions.rows]
    texts = list(dict.fromkeys(row["target"] for row in rows))
    similarity = predictions.embeds @ task.embed_texts(texts).T  # (V, T)
    relevant = relevance(rows, files, texts)  # (V, T)

    scores, rank_statistics = {}, {}
    kinds = {"image" if "image" in row else "video" for row in predictions.rows}
    kind = kinds.pop() if len(kinds) == 1 else "clip"
    for direction, found, right in (
        (f"text to {kind}", similarity.T, relevant.T),
        (f"{kind} to text", similarity, relevant),
    ):
        ranks = first_relevant_ranks(found, right)
        for k in (1, 5, 10):
            chance = {"chance": chance_recall(right, k)}
            scores[f"{direction} R@{k}"] = Score.of(ranks <= k, chance)
        rank_statistics[f"{direction} median rank"] = ranks.double().quantile(0.5).item()
        rank_statistics[f"{direction} mean rank"] = round(ranks.double().mean().item(), 2)

    protocol = {
        f"{kind}_pool": len(files),
        "text_pool": len(texts),
        f"texts_per_{kind}": round(float(relevant.sum(dim=1).float().mean()), 4),
        f"{kind}s_per_text": round(float(relevant.sum(dim=0).float().mean()), 4),
    }
    return task.result(
        predictions,
        protocol,
        scores,
        ranks=rank_statistics,
        examples=text_examples(similarity.T, relevant.T, texts, files),
    )


def text_examples(
    similarity: torch.Tensor, relevant: torch.Tensor, texts: list[str], files: list[str]
) -> list[Example]:
    """Return eight texts with their five best files; both matrices are `(T, V)`."""
    ranks = first_relevant_ranks(similarity, relevant)
    return [
        Example(
            media=None,
            query=texts[text],
            truth=[files[index] for index in relevant[text].nonzero().flatten().tolist()],
            ranked=best(similarity[text], files, 5),
            rank=int(ranks[text]),
        )
        for text in evenly_spaced(list(range(len(texts))), 8)
    ]


KIND = Kind(
    name="retrieval",
    benchmark=RetrievalBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    hub_tasks=dict.fromkeys(("image", "video"), "feature-extraction"),  # the Hub has no retrieval
    examples="clips",
)

__all__ = ["KIND", "RetrievalBenchmark", "evaluate", "relevance"]
