"""Text-to-video and video-to-text retrieval (paper section 4, Recall@1 under a fixed prompt).

A pool of images is called one of images, and a mixed pool one of clips.

Shapes: V distinct files, T distinct texts, D embedding size.
"""

import numpy as np
import torch

from eval.intervals import numbered
from eval.items import Items
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


def clusters_of(
    rows: list[dict], files: list[str], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each file `(V,)` and of each text `(T,)`.

    Files of one group form a cluster; without `group_id`, each file is one. All texts of a file are
    in one cluster. A text of several files, or a file of several groups, belongs to the first.
    """
    group_of = {media_of(row): row.get("group_id", media_of(row)) for row in reversed(rows)}
    file_of = {row["target"]: media_of(row) for row in reversed(rows)}
    return (
        numbered(group_of[file] for file in files),
        numbered(group_of[file_of[text]] for text in texts),
    )


def evaluate(task: Task) -> TaskResult:
    """Rank all files for each text and all texts for each file, by cosine similarity."""
    predictions = task.predict(one_row_per_clip(task.rows()))
    rows = [row for row in task.rows() if media_of(row) not in predictions.broken]
    files = [media_of(row) for row in predictions.rows]
    texts = list(dict.fromkeys(row["target"] for row in rows))
    similarity = predictions.embeds @ task.embed_texts(texts).T  # (V, T)
    relevant = relevance(rows, files, texts)  # (V, T)

    scores, rank_statistics, items = {}, {}, []
    file_clusters, text_clusters = clusters_of(rows, files, texts)
    kinds = {"image" if "image" in row else "video" for row in predictions.rows}
    kind = kinds.pop() if len(kinds) == 1 else "clip"
    # Rows and texts that an item of each direction is known by, in another evaluation too
    by_text = [[predictions.rows[file] for file in indices_of(each)] for each in relevant.T]
    by_file = [[texts[text] for text in indices_of(each)] for each in relevant]
    own_row = [[row] for row in predictions.rows]
    own_text = [[text] for text in texts]
    for direction, found, right, clusters, clips, known_texts in (
        (f"text to {kind}", similarity.T, relevant.T, text_clusters, by_text, own_text),
        (f"{kind} to text", similarity, relevant, file_clusters, own_row, by_file),
    ):
        ranks = first_relevant_ranks(found, right)
        hits = {f"{direction} R@{k}": ranks <= k for k in (1, 5, 10)}
        for k, (metric, values) in zip((1, 5, 10), hits.items(), strict=True):
            scores[metric] = Score.of(values, clusters, {"chance": chance_recall(right, k)})
        items.append(Items(clips, known_texts, clusters, hits, predictions=ranks.tolist()))
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
        cluster="clip, or clips of one group_id",
        ranks=rank_statistics,
        items=items,
        examples=text_examples(similarity.T, relevant.T, texts, files),
    )


def indices_of(marks: torch.Tensor) -> list[int]:
    return marks.nonzero().flatten().tolist()


def text_examples(
    similarity: torch.Tensor, relevant: torch.Tensor, texts: list[str], files: list[str]
) -> list[Example]:
    """Return eight texts with their five best files; both matrices are `(T, V)`."""
    ranks = first_relevant_ranks(similarity, relevant)
    return [
        Example(
            media=None,
            query=texts[text],
            truth=[files[index] for index in indices_of(relevant[text])],
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
