"""Action anticipation: the text of an action that has not begun (paper section 4.4).

An entry has one of two forms:

- With `seconds_before`, as on EPIC-KITCHENS-100, the clip lasts `context` seconds and ends that
  long before the action of its row starts. The clip is shorter if the video begins later. It is the
  first frame if it would end before the video begins.
- Without it, as on COIN, the clip is one step, and the answer is the text of the next step of the
  video, in the order of their starts.

Candidates are those of the entry, or else the actions of the training rows, or else all actions of
the rows. A tie is decided against the model. The paper states neither the query nor the wording of
the candidates.

There are two metrics. Top-1 is a share of the rows. The class-mean Recall@5 is the mean over the
actions of the Recall@5 of their rows: rare actions count the same as frequent ones.

The baselines do not see the clip:

- majority: the most frequent actions of the training rows. Without training rows, those of the
  measured rows, and no fixed answer has a higher top-1.
- majority of the activity: the same for each `activity` of the rows, such as a recipe.

Shapes: R rows, C candidates, D embedding size.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
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
from eval.parts import equal_parts, within_one
from eval.results import Score, TaskResult, answer_examples
from eval.sources import Source
from eval.task import Kind, Task, origin_facts, usable_rows
from processing.rows import BadRow, media_file

MOMENT = 0.04  # seconds that show the first frame only, at up to 25 frames per second
RECALL = 5


@dataclass(frozen=True, kw_only=True)
class AnticipationBenchmark(CandidatesBenchmark):
    """A benchmark of actions before they begin.

    A row has `video`, the `start` of an action in seconds, and its text as `target`. It may have
    `activity`, a name such as that of the recipe to which the action belongs.

    Attributes:
        seconds_before (`list[float]`, *optional*): times from the end of the clip to the start of
            the action, each of which is measured. `None`: the clip is the action before.
        context (`float`, *optional*, defaults to 4): seconds of a clip with `seconds_before`.
        train_rows (`Path`, *optional*): JSONL file with the actions of the training split.
        train_source (`Source`, *optional*): published data in its place; no clip of them is read.
    """

    roles: ClassVar[dict[str, str]] = {"activity": "text"}

    prompt: str | None = "action"
    seconds_before: list | None = None
    context: int | float = 4
    train_rows: Path | None = None
    train_source: Source | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_rows is not None and self.train_source is not None:
            raise ValueError(f"{self.name}: give either train_rows or train_source")
        if isinstance(self.context, bool) or not 0 < self.context < math.inf:
            raise ValueError(f"{self.name}: context is {self.context}, must be above 0 seconds")
        if self.seconds_before is None:
            return
        if not self.seconds_before:
            raise ValueError(f"{self.name}: seconds_before is empty: give times or leave it out")
        for seconds in self.seconds_before:
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not (is_number and 0 <= seconds < math.inf):
                raise ValueError(
                    f"{self.name}: seconds_before holds {seconds!r}: give seconds from 0"
                )
        if len(set(self.seconds_before)) < len(self.seconds_before):
            raise ValueError(f"{self.name}: seconds_before holds a time twice")

    @property
    def training(self) -> Path | Source | None:
        """The file or the source of the training rows."""
        return self.train_source or self.train_rows

    @cached_property
    def actions(self) -> tuple[list[dict], list[BadRow]]:
        """The rows as they are, one for each action, and the bad ones."""
        rows, bad = super().load()
        needed = ("start", "end") if self.seconds_before is None else ("start",)
        actions = []
        for row in rows:
            if missing := [name for name in needed if name not in row]:
                bad.append(self.bad_row(row, f"{missing[0]} of the action is missing"))
            else:
                actions.append(row)
        if not actions:
            raise ValueError(f"{self.name}: no usable row. The first reason: {bad[0]}")
        return actions, bad

    @cached_property
    def train_actions(self) -> list[dict]:
        """The rows of the training split; empty without one."""
        return [] if self.training is None else usable_rows(self.training)[0]

    @cached_property
    def texts(self) -> list[str]:
        """The candidates: those given, the training split's, or those of these rows."""
        rows = self.train_actions or self.actions[0]
        return self.given_candidates() or sorted({row["target"] for row in rows})

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Return a row for each clip, and the bad rows.

        Rows whose action is not among the candidates are left out, as on EPIC-KITCHENS-100. The
        next step is the next usable one: unusable rows are skipped.

        Raises: `ValueError` when no clip is left.
        """
        actions, bad = self.actions
        if self.seconds_before is None:
            clips = next_steps(actions)
        else:
            times = self.seconds_before
            clips = [
                clip_before(action, each, self.context) for action in actions for each in times
            ]
        if not clips:
            raise ValueError(f"{self.name}: no video has two usable steps, so none has a next one")
        known = set(self.texts)
        clips = [clip for clip in clips if clip["target"] in known]
        if not clips:
            raise ValueError(f"{self.name}: no action is among the candidates: {named(self.texts)}")
        return clips, bad


def clip_before(action: dict, seconds: float, context: float) -> dict:
    """Return a row about the clip that ends `seconds` before the action and lasts `context`."""
    end = action["start"] - seconds
    start = max(end - context, 0)
    times = {"start": start, "end": end} if end > MOMENT else {"start": 0, "end": MOMENT}
    return action | times | {"seconds_before": seconds}


def next_steps(steps: list[dict]) -> list[dict]:
    """Return a row for each step but the last of a video: its clip, and the text of the next."""
    videos = defaultdict(list)
    for step in steps:
        videos[media_file(step)].append(step)
    return [
        step | {"target": following["target"], "step": step["target"]}
        for video in videos.values()
        for step, following in pairwise(sorted(video, key=lambda step: step["start"]))
    ]


class Majority:
    """The most frequent actions, of all rows and of those of an activity.

    Args:
        rows: rows whose targets are counted.
    """

    def __init__(self, rows: list[dict]):
        self.overall = Counter(row["target"] for row in rows)
        self.by_activity = defaultdict(Counter)
        for row in rows:
            if "activity" in row:
                self.by_activity[row["activity"]][row["target"]] += 1

    def best(self, count: int) -> list[str]:
        """Return the `count` most frequent actions; of equally frequent ones the first."""
        return [text for text, _ in self.overall.most_common(count)]

    def best_of(self, activity: str | None, count: int) -> list[str]:
        """Return the `count` most frequent actions of an activity, then those of all."""
        own = [text for text, _ in self.by_activity[activity].most_common(count)]
        return list(dict.fromkeys(own + self.best(count + len(own))))[:count]

    def hits(self, rows: list[dict], count: int) -> dict[str, np.ndarray]:
        """Return, for each baseline, the rows whose action is among the `count` first `(R,)`."""
        best = self.best(count)
        guesses = {"majority": [best for _ in rows]}
        if self.by_activity:
            of_activity = {row.get("activity"): None for row in rows}
            of_activity = {name: self.best_of(name, count) for name in of_activity}
            guesses["majority of the activity"] = [of_activity[row.get("activity")] for row in rows]
        return {
            name: np.array([row["target"] in each for row, each in zip(rows, texts, strict=True)])
            for name, texts in guesses.items()
        }


def evaluate(task: Task) -> TaskResult:
    """Rank the candidate actions for each clip by similarity."""
    benchmark = task.benchmark
    texts = benchmark.texts
    templates = templates_of(task, task.model.config.target_prompts["action"])
    predictions, similarity = compare(task, task.rows(), texts, templates)  # similarity (R, C)
    rows = predictions.rows
    index_of = {text: index for index, text in enumerate(texts)}
    truth = torch.tensor([index_of[row["target"]] for row in rows])  # (R,)
    relevant = relevant_index(truth, len(texts))  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)
    picked = chosen(similarity, relevant, ranks, texts)

    protocol = candidate_facts(task, texts, templates) | {"ties": "wrong"} | facts(benchmark, rows)
    if benchmark.training is not None:
        protocol |= origin_facts(benchmark.training, benchmark.train_actions, "train_")
    majority = Majority(benchmark.train_actions or task.all_rows())
    scores, items = {}, []
    parts = parts_of(rows)
    for suffix, part in parts.items():
        own = [rows[index] for index in part]
        found, values = scores_of(own, ranks[part], relevant[part], majority)
        scores |= {f"{metric}{suffix}": score for metric, score in found.items()}
        items.append(
            Items(
                clips=[[row] for row in own],
                texts=[[row["target"]] for row in own],
                clusters=numbered(map(media_file, own)),
                scores={f"{metric}{suffix}": each for metric, each in values.items()},
                predictions=[picked[index] for index in part],
            )
        )
    # An action is measured at every time before it, and counts once. The time with the fewest
    # counts: a clip can be unusable at one time, and each score needs the whole pool.
    pool = {"pool": min(map(len, parts.values()))} if benchmark.paper is not None else {}
    return task.result(
        predictions,
        protocol,
        scores,
        cluster="video",
        examples=answer_examples(predictions, similarity, texts, ranks),
        items=items,
        **pool,
    )


def parts_of(rows: list[dict]) -> dict[str, list[int]]:
    """Return the indices of the rows of each time before the action, by the end of their metrics'
    names: " at 1 s"."""
    parts = defaultdict(list)
    for index, row in enumerate(rows):
        parts[f" at {row['seconds_before']:g} s" if "seconds_before" in row else ""].append(index)
    return parts


def scores_of(
    rows: list[dict], ranks: torch.Tensor, relevant: torch.Tensor, majority: Majority
) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
    """Return the scores of R rows, and the values `(R,)` that they are means of.

    Args:
        ranks (`torch.LongTensor` of shape `(R,)`): rank of the right action.
        relevant (`torch.BoolTensor` of shape `(R, C)`)
    """
    clusters, actions = numbered(map(media_file, rows)), [row["target"] for row in rows]

    def averaged(hits: np.ndarray, per_class: bool) -> np.ndarray:
        """Return values `(R,)` whose mean is the share of rows, or the mean of the classes'."""
        return equal_parts(hits, actions, drawn=True) if per_class else hits.astype(np.float64)

    scores, values = {}, {}
    for metric, k, per_class in (("top-1", 1, False), (f"class-mean R@{RECALL}", RECALL, True)):
        values[metric] = averaged((ranks <= k).numpy(), per_class)
        baselines = {"chance": chance_recall(relevant, k)}
        for name, hits in majority.hits(rows, k).items():
            baselines[name] = float(averaged(hits, per_class).mean())
        scores[metric] = within_one(Score.of(values[metric], clusters, baselines))
    return scores, values


def facts(benchmark: AnticipationBenchmark, rows: list[dict]) -> dict[str, str | int | float]:
    """Return the facts about clips and actions for the protocol."""
    known, actions = set(benchmark.texts), benchmark.actions[0]
    found = {
        "rows": len(rows),
        "actions": len({row["target"] for row in rows}),
        "rows_of_other_actions": sum(action["target"] not in known for action in actions),
    }
    if benchmark.seconds_before is None:
        repeated = sum(row["target"] == row["step"] for row in rows)
        return found | {"clip": "the step before", "next_steps_equal_to_the_step": repeated}
    firsts = sum(row["end"] == MOMENT for row in rows)
    times = ", ".join(f"{seconds:g}" for seconds in benchmark.seconds_before)
    return found | {
        "seconds_before": times,
        "context_seconds": benchmark.context,
        "clips_of_the_first_frame": firsts,
    }


KIND = Kind(
    name="anticipation",
    benchmark=AnticipationBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    by_tokens=True,
    hub_tasks=dict.fromkeys(("image", "video"), "video-classification"),
    examples="answers",
)

__all__ = ["KIND", "AnticipationBenchmark", "evaluate"]
