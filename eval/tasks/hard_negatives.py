"""Hard negatives for the text side: two texts of one meaning, and a similar text of another.

A row is right if its two positive texts are nearer to each other than either is to the negative
one (paper section 4, SugarCrepe++ and VISLA; the text-only task of Dumpala et al., 2024). All three
are embedded by the Y-Encoder, as targets; no clip is read. A tie is wrong.

Shapes: R rows, D embedding size.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from eval.embed import Predictions
from eval.intervals import numbered
from eval.items import Items
from eval.metrics import hard_negative_hits, words
from eval.parts import mean_of_parts, rows_of_parts
from eval.results import Example, Score, TaskResult, evenly_spaced
from eval.task import Benchmark, Kind, Task, texts_sha256

CHANCE = 1 / 3  # each of the three cosines is the largest of a random model with this probability


@dataclass(frozen=True, kw_only=True)
class HardNegativesBenchmark(Benchmark):
    """A benchmark of text triplets. It takes no `query`, since no clip is asked about.

    A row has `target` and `positive`, of one meaning, and `negative`. It may have `part`, for a
    score of each part, and `cluster`, such as the image that the texts are about: rows of one
    cluster are not independent.
    """

    media: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ("target", "positive", "negative")
    roles: ClassVar[dict[str, str]] = {
        "positive": "text",
        "negative": "text",
        "part": "text",
        "cluster": "text",
    }

    def __post_init__(self) -> None:
        if self.query is not None or self.num_frames is not None:
            raise ValueError(
                f"{self.name}: hard_negatives reads no clip: leave out query, num_frames"
            )


def triplet_cosines(first: torch.Tensor, second: torch.Tensor, negative: torch.Tensor) -> tuple:
    """Return three cosines of each row `(R,)`: both positives, and each of them with the negative.

    Args:
        first, second, negative (`torch.FloatTensor` of shape `(R, D)`): unit vectors.
    """
    pairs = ((first, second), (first, negative), (second, negative))
    # In float64: rounding must not decide between texts of equal embeddings.
    return tuple((one.double() * other.double()).sum(dim=-1) for one, other in pairs)


def overlap(one: str, other: str) -> float:
    """Return the share of the words of two texts that both have (Jaccard, 1901)."""
    first, second = set(words(one)), set(words(other))
    return len(first & second) / max(len(first | second), 1)


def overlap_is_right(row: dict) -> bool:
    """Return whether word overlap solves a row: negatives are made so that it does not."""
    first, second, negative = row["target"], row["positive"], row["negative"]
    own = overlap(first, second)
    return own > overlap(first, negative) and own > overlap(second, negative)


def evaluate(task: Task) -> TaskResult:
    """Compare the cosine of the positives with both cosines of the negative."""
    rows = task.rows()
    texts = [row[name] for name in ("target", "positive", "negative") for row in rows]
    distinct = list(dict.fromkeys(texts))
    embeds = task.embed_texts(distinct)
    index_of = {text: index for index, text in enumerate(distinct)}
    first, second, negative = embeds[[index_of[text] for text in texts]].chunk(3)  # (R, D) each
    positives, *others = triplet_cosines(first, second, negative)
    hits = hard_negative_hits(positives, *others).numpy()  # (R,)

    parts = [row.get("part", "all") for row in rows]
    clusters = numbered(row.get("cluster", index) for index, row in enumerate(rows))
    known = np.array([overlap_is_right(row) for row in rows])

    def score(part: np.ndarray) -> Score:
        baselines = {"chance": CHANCE, "word overlap": float(known[part].mean())}
        return Score.of(hits[part], numbered(clusters[part].tolist()), baselines)

    scores = {"accuracy": score(np.arange(len(rows)))}
    by_part = {name: score(part) for name, part in rows_of_parts(parts).items()}
    if len(by_part) > 1:
        scores["mean accuracy of parts"] = mean_of_parts(by_part, 1.0 * hits, parts, clusters)
    names = ("target and negative", "positive and negative")
    wrong = torch.stack(others).argmax(dim=0).tolist()
    nearest = ["positives" if hit else names[pair] for hit, pair in zip(hits, wrong, strict=True)]
    return task.result(
        Predictions(rows=rows, queries=[""] * len(rows), embeds=first, broken={}),
        {
            "rows": len(rows),
            "texts": len(distinct),
            "texts_sha256": texts_sha256(distinct),
            "ties": "wrong",
        },
        scores,
        cluster="cluster of the rows, or row",
        by_type=by_part,
        examples=text_examples(rows, hits, positives, torch.stack(others).amax(dim=0)),
        items=[
            Items(
                clips=[[] for _ in rows],
                texts=[[row["target"], row["positive"], row["negative"]] for row in rows],
                clusters=clusters,
                scores={"accuracy": hits},
                predictions=nearest,
                types=parts,
            )
        ],
    )


def text_examples(
    rows: list[dict], hits: np.ndarray, positives: torch.Tensor, negatives: torch.Tensor
) -> list[Example]:
    """Return six right rows and six wrong ones; cosines are `(R,)`."""
    examples = []
    right, wrong = (np.flatnonzero(hits == hit).tolist() for hit in (True, False))
    for row in evenly_spaced(right, 6) + evenly_spaced(wrong, 6):
        known = [
            (rows[row]["negative"], float(negatives[row])),
            (rows[row]["positive"], float(positives[row])),
        ]
        examples.append(
            Example(
                media=None,
                query=rows[row]["target"],
                truth=[rows[row]["positive"]],
                ranked=known[::-1] if hits[row] else known,
                rank=1 if hits[row] else 2,
            )
        )
    return examples


KIND = Kind(
    name="hard_negatives",
    benchmark=HardNegativesBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    hub_tasks=dict.fromkeys(("image", "video"), "sentence-similarity"),
    examples="texts",
)

__all__ = ["KIND", "HardNegativesBenchmark", "evaluate", "triplet_cosines"]
