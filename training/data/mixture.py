"""Which rows make the next global batch, and which of them are this process's.

Every batch comes from one bucket, chosen by weight. The sequence depends on the seed alone: not on
the number of processes or of DataLoader workers, and a resumed run goes on with the same one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from processing.rows import BadRow
from training.arguments import RecipeError
from training.data.lanes import Lane
from training.data.sources import StreamedSource

VISIT = 2**40  # more than there are rows
WINDOW = 50  # batches among which texts are sorted by length

Positions = dict[int, dict[int, dict]]  # of each lane, in each streamed bucket


@dataclass
class Bucket:
    """Rows that may share a batch.

    Attributes:
        weight: how often, relative to the others, a batch is drawn from it.
        source: the number of the source that they are from.
        rows (`np.ndarray` of shape `(n,)`): their numbers, where they are in memory.
        lengths (`np.ndarray` of shape `(n,)`, *optional*): of their texts; batches are then of
            rows of about one length.
        stream: where they are read from, otherwise.
    """

    weight: float
    source: int = 0
    rows: np.ndarray | None = None
    lengths: np.ndarray | None = None
    stream: StreamedSource | None = None


@dataclass
class Step:
    """A process's share of a global batch.

    Attributes:
        source: the number of the source.
        lanes: the numbers of the lanes.
        rows: of each lane; numbers, as `row + visit * VISIT`, or the rows themselves.
        spares: another row for each lane.
        bad: what was met while reading, and is no row.
    """

    source: int
    lanes: list[int]
    rows: list[list[int | dict]]
    spares: list[int | dict]
    bad: list[BadRow] = field(default_factory=list)


class Walk:
    """The rows of a bucket in a random order, again and again in a new one, so that a small source
    is repeated, never skipped."""

    def __init__(self, bucket: Bucket, batch_size: int):
        self.bucket, self.batch_size = bucket, batch_size
        self.left = np.empty(0, dtype=np.int64)
        self.visits = 0

    def next(self, generator: np.random.Generator) -> list[int]:
        while len(self.left) < self.batch_size:
            again = self.shuffled(generator)
            self.left = np.concatenate([self.left, again + self.visits * VISIT])
            self.visits += 1
        batch, self.left = np.split(self.left, [self.batch_size])
        return batch.tolist()

    def shuffled(self, generator: np.random.Generator) -> np.ndarray:
        """One walk through all rows; where lengths count, its batches are of like lengths."""
        if self.bucket.lengths is None:
            return generator.permutation(self.bucket.rows)
        order = generator.permutation(len(self.bucket.rows))
        windows = np.split(
            order, range(WINDOW * self.batch_size, len(order), WINDOW * self.batch_size)
        )
        batches = []
        for window in windows:
            window = window[np.argsort(self.bucket.lengths[window], kind="stable")]
            some = np.split(window, range(self.batch_size, len(window), self.batch_size))
            batches += [some[place] for place in generator.permutation(len(some))]
        return self.bucket.rows[np.concatenate(batches)]


class MixtureSampler(Sampler[Step]):
    """This process's shares of the batches, one for each part of each optimizer step.

    Args:
        batch_size: rows of an optimizer step, over all processes and parts.
        num_batches: optimizer steps.
        parts: of a step that go through the model one after the other (gradient accumulation).
        lanes: into how many parts a batch is dealt; processes divide these among them.
        start: steps that a run before has done; they are counted, and not read.
        positions: of the lanes, where that run left off.

    Raises:
        RecipeError: the lanes do not divide among the processes, or the batch among the lanes.
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
    ):
        if lanes % world_size or batch_size % (parts * lanes):
            raise RecipeError(
                f"data.lanes: {lanes} lanes have to divide the {batch_size // parts} rows of a "
                f"batch, and the {world_size} processes the lanes. Set it to a number that does."
            )
        self.buckets, self.seed = buckets, seed
        self.batch_size, self.num_batches, self.parts = batch_size, num_batches, parts
        self.lanes, self.start, self.given = lanes, start, positions or {}
        some = lanes // world_size
        self.mine = range(rank * some, (rank + 1) * some)
        self.positions: dict[int, Positions] = {}

    def __len__(self) -> int:
        return self.num_batches * self.parts

    def __iter__(self) -> Iterator[Step | None]:
        generator = np.random.default_rng(self.seed)
        weights = np.array([bucket.weight for bucket in self.buckets])
        walks = [Walk(bucket, self.batch_size) for bucket in self.buckets]
        streams = self.open_lanes()
        self.positions = {}
        choices = generator.choice(
            len(self.buckets), size=self.num_batches, p=weights / weights.sum()
        )
        for number, choice in enumerate(choices.tolist()):
            bucket = self.buckets[choice]
            rows = [] if bucket.stream is not None else walks[choice].next(generator)
            if number < self.start:
                yield from [None] * self.parts
                continue
            if bucket.stream is None:
                steps = [self.held_step(bucket, rows, part) for part in range(self.parts)]
            else:
                steps = [self.streamed_step(bucket, streams[choice]) for _ in range(self.parts)]
            # Before it is handed out: the DataLoader asks for steps ahead of the one that trains.
            self.positions[number + 1] = {
                each: {lane: row.position() for lane, row in lanes.items()}
                for each, lanes in streams.items()
            }
            yield from steps

    def held_step(self, bucket: Bucket, rows: list[int], part: int) -> Step:
        """Of the rows of all processes and parts."""
        share = len(rows) // (self.parts * self.lanes)
        dealt = [rows[place : place + share] for place in range(0, len(rows), share)]
        dealt = dealt[part * self.lanes : (part + 1) * self.lanes]
        return Step(
            bucket.source,
            list(self.mine),
            [dealt[lane] for lane in self.mine],
            [dealt[lane - 1][0] for lane in self.mine],
        )

    def streamed_step(self, bucket: Bucket, lanes: dict[int, Lane]) -> Step:
        share = self.batch_size // (self.parts * self.lanes)
        rows = [lane.take(share) for lane in lanes.values()]
        spares = [lane.peek() for lane in lanes.values()]
        bad = [row for lane in lanes.values() for row in lane.take_bad()]
        return Step(bucket.source, list(lanes), rows, spares, bad)

    def position(self, step: int) -> Positions:
        """Of the lanes after so many optimizer steps."""
        return self.positions[step]

    def forget(self, step: int) -> None:
        """Positions before this step are not asked for any more."""
        self.positions = {number: at for number, at in self.positions.items() if number >= step}

    def open_lanes(self) -> dict[int, dict[int, Lane]]:
        """This process's lanes of the streamed buckets, where they were left."""
        streams = {}
        for number, bucket in enumerate(self.buckets):
            if bucket.stream is None:
                continue
            seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
            streams[number] = {
                lane: bucket.stream.lane(lane, self.lanes, seed) for lane in self.mine
            }
            for lane, position in self.given.get(number, {}).items():
                if lane in streams[number]:
                    streams[number][lane].seek(position)
        return streams
