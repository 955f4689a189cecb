"""The mixture: the rows of each global batch, and this process's share of them.

Every batch comes from one bucket, chosen by weight. The sequence depends on the seed alone: not on
the number of processes or of DataLoader workers. A resumed run continues the same sequence.

A batch is divided into equal parts, the lanes, and each process gets some of them. In a streamed
source, a lane also reads its own rows (`lanes.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from processing.rows import BadRow
from training.arguments import RecipeError
from training.data.lanes import Lane
from training.data.sources import StreamedSource

# `row + epoch * EPOCH_STRIDE` is one number for a row and the epoch in which it is drawn. The
# stride exceeds any number of rows.
EPOCH_STRIDE = 2**40
WINDOW = 50  # batches among which texts are sorted by length

Positions = dict[int, dict[int, dict]]  # bucket -> lane -> position


@dataclass
class Bucket:
    """Rows that may share a batch.

    Attributes:
        weight: how often, relative to the others, a batch is drawn from it.
        source: index of the rows' source.
        rows (`np.ndarray` of shape `(n,)`, *optional*): indices of the rows, if they are in memory.
        lengths (`np.ndarray` of shape `(n,)`, *optional*): lengths of the rows' texts. With them, a
            batch holds rows of about one length.
        clips (`np.ndarray` of shape `(n,)`, *optional*): number of each row's clip.
        rows_per_clip: with `clips`, up to this many rows of a clip are drawn together.
        streamed: the source from which the rows are read, if they are not in memory.
    """

    weight: float
    source: int = 0
    rows: np.ndarray | None = None
    lengths: np.ndarray | None = None
    clips: np.ndarray | None = None
    rows_per_clip: int = 1
    streamed: StreamedSource | None = None


@dataclass
class Step:
    """A process's share of a global batch.

    Attributes:
        source: index of the source.
        lanes: indices of the lanes.
        rows: rows of each lane: `row + epoch * EPOCH_STRIDE`, or the rows themselves if streamed.
        replacements: one more row for each lane, used if none of the lane's rows can be read.
        bad: bad rows found while the step was read.
    """

    source: int
    lanes: list[int]
    rows: list[list[int | dict]]
    replacements: list[int | dict]
    bad: list[BadRow] = field(default_factory=list)


def group_by_clip(clips: np.ndarray, size: int) -> np.ndarray:
    """Return an order of rows in which up to `size` rows of a clip follow each other.

    Every group is at the index of its first row, so a random order of rows gives a random order of
    groups.

    Args:
        clips (`np.ndarray` of shape `(n,)`): number of each row's clip.
    """
    sorted_rows = np.argsort(clips, kind="stable")
    sorted_clips = clips[sorted_rows]
    # How many earlier rows have the same clip.
    earlier = np.arange(len(clips)) - np.searchsorted(sorted_clips, sorted_clips)
    first_row = np.empty_like(sorted_rows)  # of each row's group
    first_row[sorted_rows] = sorted_rows[np.arange(len(clips)) - earlier % size]
    return np.argsort(first_row, kind="stable")


class ShuffledRows:
    """Rows of a bucket in memory, epoch after epoch, each epoch in a new random order."""

    def __init__(self, bucket: Bucket, batch_size: int):
        self.bucket, self.batch_size = bucket, batch_size
        self.left = np.empty(0, dtype=np.int64)
        self.epoch = 0

    def next(self, generator: np.random.Generator) -> list[int]:
        """Return the next batch, as `row + epoch * EPOCH_STRIDE`."""
        # A batch may reach into the next epoch. Dropping the incomplete batch instead would skip
        # rows, and a source smaller than a batch would have none.
        while len(self.left) < self.batch_size:
            order = self.shuffled_order(generator)
            self.left = np.concatenate([self.left, order + self.epoch * EPOCH_STRIDE])
            self.epoch += 1
        batch, self.left = np.split(self.left, [self.batch_size])
        return batch.tolist()

    def shuffled_order(self, generator: np.random.Generator) -> np.ndarray:
        """Return all rows in the order of one epoch."""
        if self.bucket.clips is not None:
            order = generator.permutation(len(self.bucket.rows))
            order = order[group_by_clip(self.bucket.clips[order], self.bucket.rows_per_clip)]
            return self.bucket.rows[order]
        if self.bucket.lengths is None:
            return generator.permutation(self.bucket.rows)
        # Lengths are sorted within windows of a random order. If all rows were sorted at once, a
        # row would meet the same neighbours, its negatives, in every epoch.
        order = generator.permutation(len(self.bucket.rows))
        size = WINDOW * self.batch_size
        batches = []
        for window in np.split(order, range(size, len(order), size)):
            window = window[np.argsort(self.bucket.lengths[window], kind="stable")]
            parts = np.split(window, range(self.batch_size, len(window), self.batch_size))
            # Shuffled again: sorted batches would train from short texts to long ones.
            batches += [parts[index] for index in generator.permutation(len(parts))]
        return self.bucket.rows[np.concatenate(batches)]


class MixtureSampler(Sampler[Step]):
    """Sampler of this process's shares of the batches, one for each part of each optimizer step.

    Args:
        batch_size: rows of an optimizer step, over all processes and parts.
        num_batches: number of optimizer steps.
        parts: parts of a step that pass through the model in turn (gradient accumulation).
        lanes: number of lanes; the processes divide them among themselves.
        start: number of optimizer steps that an earlier run has done. Each of their parts is
            `None`.
        positions: positions of the lanes at the end of that run.
        planned: `num_batches` of the run that began the sequence.

    Raises:
        RecipeError: the lanes do not divide the batch, or the processes do not divide the lanes.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        batch_size: int,
        num_batches: int,
        seed: int,
        *,
        parts: int = 1,
        lanes: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        positions: Positions | None = None,
        planned: int | None = None,
    ):
        if lanes % world_size or batch_size % (parts * lanes):
            raise RecipeError(
                f"data.lanes: {lanes} lanes must divide the {batch_size // parts} rows of a batch, "
                f"and {world_size} process(es) must divide the lanes. Change data.lanes or "
                "training.global_batch_size."
            )
        self.buckets, self.seed = buckets, seed
        self.batch_size, self.num_batches, self.parts = batch_size, num_batches, parts
        self.lanes, self.start, self.start_positions = lanes, start, positions or {}
        self.planned = num_batches if planned is None else planned
        share = lanes // world_size
        self.own_lanes = range(rank * share, (rank + 1) * share)
        self.positions: dict[int, Positions] = {}  # after each optimizer step

    def __len__(self) -> int:
        return self.num_batches * self.parts

    def __iter__(self) -> Iterator[Step | None]:
        generator = np.random.default_rng(self.seed)
        weights = np.array([bucket.weight for bucket in self.buckets])
        shuffled = [ShuffledRows(bucket, self.batch_size) for bucket in self.buckets]
        lanes_of = self.open_lanes()
        self.positions = {}
        # The choices of the planned batches are drawn first, so the order of the rows depends on
        # their number. A longer run keeps it and draws the choices beyond them separately.
        more = np.random.default_rng((self.seed, self.planned))
        draws = ((generator, self.planned), (more, max(self.num_batches - self.planned, 0)))
        choices = np.concatenate(
            [
                each.choice(len(self.buckets), size=size, p=weights / weights.sum())
                for each, size in draws
            ]
        )[: self.num_batches]
        for index, choice in enumerate(choices.tolist()):
            bucket = self.buckets[choice]
            # Every process draws the rows of every step: also those of other processes and those
            # before `start`. So all generators have the same state, and nothing is exchanged.
            rows = [] if bucket.streamed is not None else shuffled[choice].next(generator)
            if index < self.start:
                yield from [None] * self.parts
                continue
            if bucket.streamed is None:
                steps = [self.step_in_memory(bucket, rows, part) for part in range(self.parts)]
            else:
                steps = [self.streamed_step(bucket, lanes_of[choice]) for _ in range(self.parts)]
            # Stored before the step is handed out: the DataLoader asks for steps ahead of the one
            # that trains.
            self.positions[index + 1] = {
                each: {lane: opened.position() for lane, opened in lanes.items()}
                for each, lanes in lanes_of.items()
            }
            yield from steps

    def step_in_memory(self, bucket: Bucket, rows: list[int], part: int) -> Step:
        """Return this process's share of one part of a batch.

        Args:
            rows: rows of the batch, of all processes and parts.
        """
        share = len(rows) // (self.parts * self.lanes)
        dealt = [rows[start : start + share] for start in range(0, len(rows), share)]
        dealt = dealt[part * self.lanes : (part + 1) * self.lanes]
        return Step(
            bucket.source,
            list(self.own_lanes),
            [dealt[lane] for lane in self.own_lanes],
            # A row of the neighbouring lane, which may be another process's: the replacement is
            # the same on any number of processes, and no row of a later batch is used up.
            [dealt[lane - 1][0] for lane in self.own_lanes],
        )

    def streamed_step(self, bucket: Bucket, lanes: dict[int, Lane]) -> Step:
        """Read this process's share of one part of a batch."""
        share = self.batch_size // (self.parts * self.lanes)
        rows = [lane.take(share) for lane in lanes.values()]
        replacements = [lane.peek() for lane in lanes.values()]
        bad = [row for lane in lanes.values() for row in lane.take_bad()]
        return Step(bucket.source, list(lanes), rows, replacements, bad)

    def position(self, step: int) -> Positions:
        """Return the positions of this process's lanes after an optimizer step."""
        return self.positions[step]

    def forget(self, step: int) -> None:
        """Drop the positions after steps before `step`."""
        self.positions = {index: at for index, at in self.positions.items() if index >= step}

    def open_lanes(self) -> dict[int, dict[int, Lane]]:
        """Return this process's lanes of each streamed bucket, at their start positions."""
        lanes_of = {}
        for index, bucket in enumerate(self.buckets):
            if bucket.streamed is None:
                continue
            # A seed of its own for each bucket, or two buckets of one source would read alike.
            seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
            lanes_of[index] = {
                lane: bucket.streamed.lane(lane, self.lanes, seed) for lane in self.own_lanes
            }
            for lane, position in self.start_positions.get(index, {}).items():
                if lane in lanes_of[index]:
                    lanes_of[index][lane].seek(position)
        return lanes_of
