"""Test which answers the frozen X-Encoder's tokens contain: a linear classifier per question.

    python -m eval.probe --model runs/small-seed0/sft --features runs/small-seed0/features \\
        --rows data/demo/babyai/train_where.jsonl --match "at the start" --tokens 17

For each distinct query, ridge regression learns the answer from the visual tokens of four fifths of
its clips, read from a feature store. It is tested on the other clips and compared with the most
common answer. If the classifier is right where the model is not, the tokens contain the answer, and
the Predictor has not learnt to read it. The converse does not hold: attention can also read answers
that are not linear in the tokens.
"""

import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from eval.evaluate import at_least_one
from eval.intervals import mean_interval, numbered
from eval.models import load_model
from eval.task import usable_rows
from processing.feature_store import FeatureStore
from processing.rows import clip_key

LEAST_ROWS = 100  # per question
ALPHAS = (1e2, 1e3, 1e4, 1e5)  # strong: there are thousands of features and hundreds of clips


@dataclass(frozen=True)
class Probed:
    """Held-out rows.

    Attributes:
        hits (`list[bool]`): True where the classifier is right, by row.
        usual (`int`): rows whose answer is the most common one.
        clips (`list[str]`): name of each row's clip.
    """

    hits: list[bool]
    usual: int
    clips: list[str]

    @property
    def right(self) -> int:
        """Number of rows on which the classifier is right."""
        return sum(self.hits)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.hits)

    def __add__(self, other: "Probed") -> "Probed":
        """Return the rows of both; a clip can be in both, with two questions."""
        return Probed(self.hits + other.hits, self.usual + other.usual, self.clips + other.clips)

    def __str__(self) -> str:
        """Return accuracy, its 95 % interval over clips, and that of the most common answer."""
        found = mean_interval(np.array(self.hits, dtype=np.float64), numbered(self.clips))
        share, usual = self.right / self.rows, self.usual / self.rows
        return f"{share:.3f} ({found.low:.3f} to {found.high:.3f}), most common answer {usual:.3f}"


def can_be_learnt(rows: list[dict]) -> bool:
    """Return True for enough rows, of several clips, with several answers."""
    clips, answers = {clip_key(row) for row in rows}, {row["target"] for row in rows}
    return len(rows) >= LEAST_ROWS and len(clips) > 1 and len(answers) > 1


def probe(tokens: np.ndarray, answers: list[str], clips: list[str]) -> Probed:
    """Learn from four fifths of the clips, and test on the others.

    Args:
        tokens: visual tokens of each row's clip, `(R, N * Dx)`.
        answers: R answers.
        clips: R names of clips. Rows of one clip are all learnt or all tested: a classifier that
            knows the clip could repeat its answer.
    """
    ((seen, held_out),) = GroupShuffleSplit(1, test_size=0.2, random_state=0).split(
        tokens, groups=clips
    )
    learnt, truth = ([answers[row] for row in part] for part in (seen, held_out))
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(ALPHAS))
    predicted = classifier.fit(tokens[seen], learnt).predict(tokens[held_out])
    usual = Counter(learnt).most_common(1)[0][0]
    hits = (predicted == np.array(truth)).tolist()
    return Probed(hits, truth.count(usual), [clips[row] for row in held_out])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.probe")
    parser.add_argument("--model", required=True, help="folder or Hub id of the X-Encoder's model")
    parser.add_argument("--features", required=True, type=Path, help="the model's feature store")
    parser.add_argument(
        "--rows", required=True, type=Path, help="JSONL of questions about its clips"
    )
    parser.add_argument("--match", default="", help="only queries that contain this text")
    parser.add_argument(
        "--tokens", type=at_least_one, help="only the first TOKENS of a clip: its first frames"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Probed:
    args = arguments(argv)

    # 1. questions with enough clips and more than one answer
    usable, bad = usable_rows(args.rows)
    asked = defaultdict(list)
    for row in usable:
        if args.match in row["query"]:
            asked["video" if "video" in row else "image", row["query"]].append(row)
    queries = [query for query in sorted(asked) if can_be_learnt(asked[query])]
    if not queries:
        raise ValueError(
            f"{args.rows}: no query that contains {args.match!r} has {LEAST_ROWS} rows and two "
            "answers, of two clips. Give other rows, or another --match."
        )

    # 2. the visual tokens of their clips
    model, processor = load_model(args.model)
    store = FeatureStore.open(args.features, model.base_model, processor.video_processor)
    store.check([row for query in queries for row in asked[query]])

    # 3. one classifier after the other
    found = []
    for kind, query in tqdm(queries, desc="probes", unit="question"):
        rows = asked[kind, query]
        clips = torch.stack([store[row][: args.tokens].float() for row in rows])  # (R, N, Dx)
        answers = [row["target"] for row in rows]
        found.append(probe(clips.flatten(1).numpy(), answers, [clip_key(row) for row in rows]))
        tqdm.write(f"{found[-1]}  {kind}s: {query}")
    total = sum(found, Probed([], 0, []))
    print(f"{total}  all {len(queries)} questions, {total.rows} rows held out")

    # 4. the questions and rows left out, by name
    if left := sorted(asked.keys() - set(queries)):
        few = f"left out, with fewer than {LEAST_ROWS} rows, one clip or one answer: "
        few += f"{len(left)} questions"
        print(few, *(f"{kind}s: {query}" for kind, query in left[:20]), sep="\n  ")
    if bad:
        print(f"left out, unusable: {len(bad)} rows", *bad[:20], sep="\n  ")
    return total


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
