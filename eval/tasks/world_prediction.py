"""World modelling: which candidate clip comes between two states (paper, table 3).

The states of a row are the first and the last frame of a segment of a video. One of the row's
candidate clips shows the action between them. As in the paper, the two frames are repeated and
joined to one clip, and the candidate is chosen whose predicted embedding is nearest to that of this
clip, by cosine similarity. A tie is decided against the model.

The paper states neither the queries nor the numbers of frames. Here states and candidates have the
same query, by default the model's `action` prompt, and the same number of frames unless the entry
has `state_frames`.

Two baselines do not see the transition:

- candidates only: the candidate that is most similar to the other candidates.
- final state only: the choice of the model if all frames of the states' clip show the final state.

Shapes: R rows, C candidates (the most that a row has), D embedding size.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from eval.candidates import chosen
from eval.embed import Predictions
from eval.intervals import difference_interval, numbered
from eval.items import Items
from eval.metrics import cosines, first_relevant_ranks
from eval.parts import rows_of_parts
from eval.results import Example, Score, TaskResult, best, evenly_spaced
from eval.task import Benchmark, Kind, Task
from processing.rows import BadRow, media_file, media_of


@dataclass(frozen=True, kw_only=True)
class WorldPredictionBenchmark(Benchmark):
    """A benchmark of states and candidate clips.

    A row has `video`, whose frames at its `start` and its `end` are the states, `candidates` (the
    files of the candidate clips), `candidate_ids`, and `target`, the id of the right candidate. It
    may have `candidate_starts` and `candidate_ends` in seconds, `candidate_labels` for the report,
    and `part`, such as the set that it is from, for a score of each part.

    Attributes:
        state_frames (`int`, *optional*): frames of the states' clip, half of them for each state;
            the number of a candidate's frames by default.
    """

    roles: ClassVar[dict[str, str]] = {
        "candidates": "media list",
        "candidate_ids": "texts",
        "candidate_starts": "numbers",
        "candidate_ends": "numbers",
        "candidate_labels": "texts",
        "part": "text",
    }
    required: ClassVar[tuple[str, ...]] = ("target", "candidates", "candidate_ids")

    prompt: str | None = "action"
    state_frames: int | None = None

    def __post_init__(self) -> None:
        frames = self.state_frames or self.num_frames
        if frames is not None and frames < 2:
            raise ValueError(f"{self.name}: {frames} frame cannot show two states: give 2 or more")

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Read the rows as every [`Benchmark`] does; rows with unusable candidates are bad.

        Raises: `ValueError` when no row is good, or when rows ask different queries.
        """
        rows, bad = super().load()
        faults = {index: fault for index, row in enumerate(rows) if (fault := fault_of(row))}
        bad += [self.bad_row(rows[index], fault) for index, fault in faults.items()]
        good = [row for index, row in enumerate(rows) if index not in faults]
        if not good:
            raise ValueError(f"{self.name}: no usable row. The first reason: {bad[0]}")
        self.check_one_query(good)
        return good, bad


def fault_of(row: dict) -> str | None:
    """Return why the states or the candidates of a row are unusable; `None` if they are usable."""
    if "video" not in row:
        return "an image has one state: give a video"
    files, ids = row["candidates"], row["candidate_ids"]
    for name in (name for name in WorldPredictionBenchmark.roles if name != "part"):
        if name in row and len(row[name]) != len(files):
            return f"candidates and {name} have {len(files)} and {len(row[name])} elements"
    if len(files) < 2:
        return "there is one candidate: give two or more"
    if len(set(ids)) < len(ids):
        return f"candidate_ids holds {max(ids, key=ids.count)!r} twice"
    if row["target"] not in ids:
        return f"target {row['target']!r} is not among candidate_ids: {', '.join(ids)}"
    clips = candidate_rows(row)
    for name, clip in zip(ids, clips, strict=True):
        start, end = clip.get("start", 0), clip.get("end", float("inf"))
        if not 0 <= start < end:
            return f"candidate {name} is from {start} to {end} seconds: give 0 <= start < end"
    if len({media_of(clip) for clip in clips}) < len(clips):
        return "two candidates are the same clip"
    return None


def candidate_rows(row: dict) -> list[dict]:
    """Return a row about each candidate clip, with the query of the states."""
    clips = [{"video": file, "query": row["query"]} for file in row["candidates"]]
    for name in ("start", "end"):
        for clip, seconds in zip(clips, row.get(f"candidate_{name}s", ()), strict=False):
            clip[name] = seconds
    return clips


def evaluate(task: Task) -> TaskResult:
    """Rank the candidate clips of each row by cosine similarity with its states.

    Raises: `ValueError` if no row has readable candidates.
    """
    clips = {media_of(clip): clip for row in task.rows() for clip in candidate_rows(row)}
    found = task.predict(list(clips.values()))
    left_out = {row["line"]: fault for row in task.rows() if (fault := broken_in(row, found))}
    rows = [row for row in task.rows() if row["line"] not in left_out]
    if not rows:
        reason = next(iter(left_out.values()))
        raise ValueError(f"{task.benchmark.name}: no row has readable candidates. First: {reason}")
    frames = task.benchmark.state_frames or task.benchmark.num_frames
    states = task.predict(rows, states="both", num_frames=frames)
    final = task.predict(rows, states="final", num_frames=frames)

    rows = states.rows
    embeds = dict(zip(map(media_of, found.rows), found.embeds, strict=True))
    candidates = [
        torch.stack([embeds[media_of(clip)] for clip in candidate_rows(row)]) for row in rows
    ]
    relevant = padded([right_one(row) for row in rows], False)  # (R, C)
    similarity = similarities(candidates, states.embeds)  # (R, C)
    ranks = first_relevant_ranks(similarity, relevant)  # (R,)
    blind = {
        "candidates only": padded([typicality(each) for each in candidates], -torch.inf),
        "final state only": similarities(candidates, final.embeds),
    }
    hits = {name: first_relevant_ranks(each, relevant) == 1 for name, each in blind.items()}
    clusters = numbered(map(media_file, rows))
    chances = np.array([1 / len(each) for each in candidates])  # (R,)

    def score(part: np.ndarray | slice) -> Score:
        """Return the accuracy over some of the rows."""
        baselines = {"chance": float(chances[part].mean())}
        baselines |= {name: each[part].double().mean().item() for name, each in hits.items()}
        return Score.of((ranks == 1)[part], clusters[part], baselines)

    parts = rows_of_parts([row.get("part", "") for row in rows])
    picked = chosen(similarity, relevant, ranks, list(range(relevant.shape[1])))
    return task.result(
        states,
        facts(rows, frames or task.processor.video_processor.num_frames),
        {"accuracy": score(slice(None))},
        cluster="video of the states",
        left_out=left_out,
        comparisons={
            f"accuracy against {name}": difference(ranks == 1, each, clusters)
            for name, each in hits.items()
        },
        by_type={name: score(part) for name, part in parts.items()} if len(parts) > 1 else {},
        examples=examples(rows, similarity, ranks),
        items=[
            Items(
                clips=[[row, *candidate_rows(row)] for row in rows],
                texts=[[row["target"]] for row in rows],
                clusters=clusters,
                scores={"accuracy": ranks == 1},
                types=[row.get("part", "") for row in rows] if len(parts) > 1 else None,
                predictions=[
                    row["candidate_ids"][index] for row, index in zip(rows, picked, strict=True)
                ],
            )
        ],
    )


def broken_in(row: dict, found: Predictions) -> str | None:
    """Return why a candidate of a row could not be read; `None` if all could be."""
    for name, clip in zip(row["candidate_ids"], candidate_rows(row), strict=True):
        if media_of(clip) in found.broken:
            return f"candidate {name}: {found.broken[media_of(clip)]}"
    return None


def right_one(row: dict) -> torch.Tensor:
    """Return which candidates of a row are right: bool, one for each candidate."""
    return torch.tensor([name == row["target"] for name in row["candidate_ids"]])


def padded(rows: list[torch.Tensor], value: float | bool) -> torch.Tensor:
    """Return rows of up to C values as one matrix `(R, C)`, filled up with `value`."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def similarities(candidates: list[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each candidate with its row's states, `(R, C)`.

    Args:
        candidates: unit vectors of each row's candidates, `(up to C, D)`.
        states (`torch.FloatTensor` of shape `(R, D)`): unit vectors.
    """
    pairs = zip(candidates, states, strict=True)
    rows = [cosines(state[None], each).squeeze(0) for each, state in pairs]
    return padded(rows, -torch.inf)


def typicality(candidates: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cosines of each candidate `(C, D)` with the others, `(C,)`."""
    return cosines(candidates, candidates).fill_diagonal_(0).sum(dim=1)


def difference(hits: torch.Tensor, others: torch.Tensor, clusters: np.ndarray) -> dict[str, float]:
    """Return how much one accuracy exceeds another, with its 95 % interval.

    The difference is taken row by row, because both vary with the rows.

    Args:
        hits, others (`torch.BoolTensor` of shape `(R,)`): rows that are right.
        clusters (`np.ndarray` of shape `(R,)`): number of each row's cluster.
    """
    better = (hits.double() - others.double()).numpy()
    found = difference_interval(better, clusters, largest=1.0)
    numbers = {"difference": float(better.mean()), "low": found.low, "high": found.high}
    return {name: round(number, 4) for name, number in numbers.items()}


def facts(rows: list[dict], state_frames: int) -> dict[str, str | int]:
    """Return the facts about states and candidates for the protocol."""
    counts = sorted({len(row["candidates"]) for row in rows})
    shared = [
        row["video"] == row["candidates"][row["candidate_ids"].index(row["target"])] for row in rows
    ]
    return {
        "rows": len(rows),
        "candidates_per_row": ", ".join(map(str, counts)),
        "candidate_clips": len({media_of(clip) for row in rows for clip in candidate_rows(row)}),
        # Such a candidate may be recognised by its background.
        "right_candidates_of_the_same_video": sum(shared),
        "state_frames": state_frames,
        "ties": "wrong",
    }


def examples(rows: list[dict], similarity: torch.Tensor, ranks: torch.Tensor) -> list[Example]:
    """Return four rows with the right candidate and four with a wrong one."""
    right, wrong = (ranks == 1).nonzero().flatten(), (ranks != 1).nonzero().flatten()
    found = []
    for index in evenly_spaced(right.tolist(), 4) + evenly_spaced(wrong.tolist(), 4):
        row = rows[index]
        clips = [media_of(clip) for clip in candidate_rows(row)]
        truth = row["candidate_ids"].index(row["target"])
        labels = row.get("candidate_labels", row["candidate_ids"])
        found.append(
            Example(
                media=media_of(row),
                query=labels[truth],
                truth=[clips[truth]],
                ranked=best(similarity[index, : len(clips)], clips, len(clips)),
                rank=int(ranks[index]),
            )
        )
    return found


KIND = Kind(
    name="world_prediction",
    benchmark=WorldPredictionBenchmark,
    evaluate=evaluate,
    needs_decoder=False,
    hub_tasks=dict.fromkeys(("image", "video"), "video-classification"),
    examples="states",
)

__all__ = ["KIND", "WorldPredictionBenchmark", "evaluate"]
