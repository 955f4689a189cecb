"""Text-to-video and video-to-text retrieval (paper section 4, Recall@1 under a fixed prompt).

A pool of images is called one of images, and a mixed pool one of clips.

Shapes: V distinct clips, T texts, D embedding size.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from eval.intervals import numbered
from eval.items import Items
from eval.metrics import chance_ndcg, chance_recall, cosines, first_relevant_ranks, ndcg
from eval.results import Example, Score, TaskResult, best, evenly_spaced
from eval.task import Benchmark, Kind, Task, one_row_per_clip
from processing.rows import BadRow, Media, media_of


@dataclass(frozen=True, kw_only=True)
class RetrievalBenchmark(Benchmark):
    """A retrieval benchmark: every clip is asked the same query.

    Attributes:
        paragraphs (`bool`, *optional*, defaults to `False`): join the texts of a clip, in the order
            of its rows, to one text.
        merge_texts (`bool`, *optional*, defaults to `True`): equal texts are one text, right for
            the clips of all its rows. The published protocols do not merge: with `False`, the text
            of each row is right for its own clip, or those of its `group_id`, and an equal text of
            another clip is wrong.
    """

    counts: ClassVar[str] = "clips"
    prompt: str | None = "retrieval"

    paragraphs: bool = False
    merge_texts: bool = True

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Read the rows as every [`Benchmark`] does.

        Raises: `ValueError` when no row is good, or when rows ask different queries.
        """
        rows, bad = super().load()
        self.check_one_query(rows)
        return joined(rows) if self.paragraphs else rows, bad


def joined(rows: list[dict]) -> list[dict]:
    """Return the first row of each clip, its target the targets of all rows of the clip."""
    texts: dict[Media, list[str]] = {}
    for row in rows:
        texts.setdefault(media_of(row), []).append(row["target"].strip())
    first_rows = {media_of(row): row for row in reversed(rows)}
    return [first_rows[clip] | {"target": " ".join(parts)} for clip, parts in texts.items()]


def texts_of(rows: list[dict], merge: bool) -> tuple[list[str], list[int]]:
    """Return the T texts, and the index of each row's text.

    Args:
        merge: equal texts are one; otherwise every row has its own.
    """
    targets = [row["target"] for row in rows]
    if not merge:
        return targets, list(range(len(rows)))
    index_of = {text: index for index, text in enumerate(dict.fromkeys(targets))}
    return list(index_of), [index_of[text] for text in targets]


def relevance(rows: list[dict], clips: list[Media], text_of: list[int]) -> torch.Tensor:
    """Return which texts are right for which clips: bool `(V, T)`.

    A text is right for the clips of its rows, and for those of every row that shares a
    `group_id` with one of them. A row without that column forms a group with the other rows of
    its clip.

    Args:
        text_of: index of each row's text, see `texts_of`.
    """
    clip_index = {clip: index for index, clip in enumerate(clips)}
    clips_of, texts_in = {}, {}
    for row, text in zip(rows, text_of, strict=True):
        group = row.get("group_id", media_of(row))
        clips_of.setdefault(group, set()).add(clip_index[media_of(row)])
        texts_in.setdefault(group, set()).add(text)
    relevant = torch.zeros(len(clips), max(text_of) + 1, dtype=torch.bool)
    for group, indices in clips_of.items():
        # (clips, 1) and (texts,) broadcast: every clip of the group with every text of it
        relevant[torch.tensor(list(indices))[:, None], torch.tensor(list(texts_in[group]))] = True
    return relevant


def clusters_of(
    rows: list[dict], clips: list[Media], text_of: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each clip `(V,)` and of each text `(T,)`.

    Clips of one group form a cluster; without `group_id`, each clip is one. All texts of a clip are
    in one cluster. A text of several clips, or a clip of several groups, belongs to the first.
    """
    group_of = {media_of(row): row.get("group_id", media_of(row)) for row in reversed(rows)}
    pairs = zip(reversed(text_of), reversed(rows), strict=True)
    clip_of = {text: media_of(row) for text, row in pairs}
    return (
        numbered(group_of[clip] for clip in clips),
        numbered(group_of[clip_of[text]] for text in range(max(text_of) + 1)),
    )


def evaluate(task: Task) -> TaskResult:
    """Rank all clips for each text and all texts for each clip, by cosine similarity."""
    benchmark = task.benchmark
    predictions = task.predict(one_row_per_clip(task.rows()))
    rows = [row for row in task.rows() if media_of(row) not in predictions.broken]
    clips = [media_of(row) for row in predictions.rows]
    texts, text_of = texts_of(rows, benchmark.merge_texts)
    similarity = cosines(predictions.embeds, task.embed_texts(texts))  # (V, T)
    relevant = relevance(rows, clips, text_of)  # (V, T)

    scores, rank_statistics, items = {}, {}, []
    clip_clusters, text_clusters = clusters_of(rows, clips, text_of)
    kinds = {"image" if "image" in row else "video" for row in predictions.rows}
    kind = kinds.pop() if len(kinds) == 1 else "clip"
    # Rows and texts that an item of each direction is known by, in another evaluation too
    by_text = [[predictions.rows[clip] for clip in indices] for indices in marked(relevant.T)]
    by_clip = [[texts[text] for text in indices] for indices in marked(relevant)]
    own_row = [[row] for row in predictions.rows]
    own_text = [[text] for text in texts]
    for direction, found, right, clusters, about, known_texts in (
        (f"text to {kind}", similarity.T, relevant.T, text_clusters, by_text, own_text),
        (f"{kind} to text", similarity, relevant, clip_clusters, own_row, by_clip),
    ):
        ranks = first_relevant_ranks(found, right)
        values = {f"{direction} R@{k}": ranks <= k for k in (1, 5, 10)}
        chances = [chance_recall(right, k) for k in (1, 5, 10)]
        values[f"{direction} nDCG@10"] = ndcg(found, right, 10)
        chances.append(chance_ndcg(right, 10))
        for (metric, each), chance in zip(values.items(), chances, strict=True):
            scores[metric] = Score.of(each, clusters, {"chance": chance})
        items.append(Items(about, known_texts, clusters, values, predictions=ranks.tolist()))
        rank_statistics[f"{direction} median rank"] = ranks.double().quantile(0.5).item()
        rank_statistics[f"{direction} mean rank"] = round(ranks.double().mean().item(), 2)

    protocol = {
        f"{kind}_pool": len(clips),
        "text_pool": len(texts),
        f"texts_per_{kind}": round(float(relevant.sum(dim=1).float().mean()), 4),
        f"{kind}s_per_text": round(float(relevant.sum(dim=0).float().mean()), 4),
        "texts": "all texts of a clip, joined" if benchmark.paragraphs else "one by one",
        "equal_texts": "merged" if benchmark.merge_texts else "each right for its own clip only",
        "ties": "wrong candidates first",
    }
    return task.result(
        predictions,
        protocol,
        scores,
        cluster="clip, or clips of one group_id",
        ranks=rank_statistics,
        items=items,
        examples=text_examples(similarity.T, relevant.T, texts, clips),
    )


def marked(marks: torch.Tensor) -> list[list[int]]:
    """Return the indices of the true columns of each row."""
    columns = marks.nonzero()[:, 1]  # ordered by row
    return [part.tolist() for part in columns.split(marks.sum(dim=1).tolist())]


def text_examples(
    similarity: torch.Tensor, relevant: torch.Tensor, texts: list[str], clips: list[Media]
) -> list[Example]:
    """Return four texts whose clip is the nearest and four others, each with its five best clips.

    Both matrices are `(T, V)`.
    """
    ranks = first_relevant_ranks(similarity, relevant)
    found, missed = (
        indices.flatten().tolist() for indices in ((ranks == 1).nonzero(), (ranks != 1).nonzero())
    )
    return [
        Example(
            media=None,
            query=texts[text],
            truth=[clips[index] for index in marked(relevant[text : text + 1])[0]],
            ranked=best(similarity[text], clips, 5),
            rank=int(ranks[text]),
        )
        for text in evenly_spaced(found, 4) + evenly_spaced(missed, 4)
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
