"""Rows of sources that are read as they are needed, and where reading them has got to.

A streamed source is dealt to a fixed number of lanes, and every global batch takes equally many
rows of each. A process reads some of the lanes, so the rows of a step are the same whether one
process reads all of them or many read a few each.

    blocks     some hundred rows of a lane, as they lie in the files
    lane       block after block, each in a random order; where one source ends it begins again
    position   of a lane: the block, and how many of its rows were taken
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from processing.rows import BadRow, RowError, parse_line
from training.arguments import RecipeError

MIB = 2**20
CHUNKS = 8  # of a JSONL file in a block: more of them mix better, and are more places to read
FILE = "_streamed_from"  # key of the file that a row is from, beside the columns that it has there


class Blocks:
    """The rows of a lane, a block at a time, endlessly.

    A subclass's `read` returns the rows of the next block and what of it is no row; `position`
    says, as JSON, where that block begins, and `seek` goes there.
    """

    name: str
    epoch: int  # of the next block

    def read(self) -> tuple[list[dict], list[BadRow]]:
        raise NotImplementedError

    def position(self) -> Any:
        raise NotImplementedError

    def seek(self, position: Any) -> None:
        raise NotImplementedError

    def first_epoch(self) -> Iterator[tuple[list[dict], list[BadRow]]]:
        """What the lane has in the first epoch, once; asked before anything is read."""
        while self.epoch == 0:
            yield self.read()


@cache
def chunk_order(chunks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(chunks)


class JSONLBlocks(Blocks):
    """Of JSONL files. They are cut into chunks of so many bytes, which are read in a new random
    order in every epoch and dealt to the lanes in turn.

    Args:
        rows: of a block, roughly.
    """

    def __init__(self, paths: list[Path], lane: int, lanes: int, rows: int, seed: int):
        self.paths = [path for path in paths if path.stat().st_size]
        self.lane, self.lanes, self.seed = lane, lanes, seed
        self.name = str(paths[0])
        if not self.paths:
            raise RecipeError(
                f"{self.name}: the file holds no row. Write one JSON object per line."
            )
        self.ends = np.cumsum([path.stat().st_size for path in self.paths])
        with open(self.paths[0], "rb") as file:
            head = file.read(2**16)
        row_bytes = len(head) / max(head.count(b"\n"), 1)
        self.size = int(max(rows / CHUNKS, 2) * row_bytes)
        self.chunks = -(-int(self.ends[-1]) // self.size)
        self.block = 0

    @property
    def epoch(self) -> int:
        return (CHUNKS * self.block * self.lanes + self.lane) // self.chunks

    def position(self) -> int:
        return self.block

    def seek(self, position: int) -> None:
        self.block = position

    def read(self) -> tuple[list[dict], list[BadRow]]:
        rows, bad = [], []
        for number in range(CHUNKS * self.block, CHUNKS * (self.block + 1)):
            more, worse = self.read_chunk(number)
            rows += more
            bad += worse
        self.block += 1
        return rows, bad

    def first_epoch(self) -> Iterator[tuple[list[dict], list[BadRow]]]:
        """By chunks: the last of its blocks goes on into the next epoch."""
        yield from map(self.read_chunk, range(-(-(self.chunks - self.lane) // self.lanes)))

    def read_chunk(self, number: int) -> tuple[list[dict], list[BadRow]]:
        """The lane's chunk of this number, counted from the first epoch's first."""
        epoch, turn = divmod(number * self.lanes + self.lane, self.chunks)
        chunk = int(chunk_order(self.chunks, self.seed, epoch)[turn])
        rows, bad = [], []
        for path, place, line in self.lines(chunk * self.size, (chunk + 1) * self.size):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                parsed = parse_line(line, path.parent, where=(str(path), place))
                rows += [{**row, FILE: str(path)} for row in parsed]
            except RowError as error:
                bad.append(BadRow(str(path), line_number(path, place), str(error)))
        return rows, bad

    def lines(self, start: int, end: int) -> Iterator[tuple[Path, int, bytes]]:
        """The lines that begin in these bytes of all files end to end, and the place in its file
        where each begins."""
        first = 0  # byte of the file
        for path, last in zip(self.paths, self.ends.tolist(), strict=True):
            if start < last and first < end:
                with open(path, "rb") as file:
                    # A line that begins before is another chunk's.
                    file.seek(max(start - first - 1, 0))
                    if start > first:
                        file.readline()
                    while (place := file.tell()) < min(end, last) - first:
                        yield path, place, file.readline()
            first = last


@cache
def lines_before(path: Path) -> np.ndarray:
    """How many lines end before each MiB of a file."""
    with open(path, "rb") as file:
        counts = [part.count(b"\n") for part in iter(partial(file.read, MIB), b"")]
    return np.cumsum([0, *counts])


def line_number(path: Path, place: int) -> int:
    """Of the line that begins at this byte, from 1; wanted only of lines that are no rows."""
    part, rest = divmod(place, MIB)
    with open(path, "rb") as file:
        file.seek(part * MIB)
        return int(lines_before(path)[part]) + file.read(rest).count(b"\n") + 1


def bad_row(row: dict, name: str, reason: str) -> BadRow:
    """A row that turned out to be none; one of a streamed JSONL file has a place there, and its
    line is counted now."""
    if FILE in row:
        return BadRow(row[FILE], line_number(Path(row[FILE]), row["line"]), reason)
    return BadRow(name, row["line"], reason)


class DatasetBlocks(Blocks):
    """Of a streamed dataset of the library `datasets`: files of any of its formats, or the Hub.

    Its shards are read one by one, in a new random order in every epoch, and dealt to the lanes in
    turn. Where there are fewer shards than lanes, a lane takes every so many-th example of all.

    A file that breaks off, or a member of it that cannot be read, ends its shard: `datasets` reads
    nothing behind such a place.

    Args:
        samples_of: an example to its rows, and what of it is none.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        name: str,
        samples_of: Callable[[dict, tuple[str, int]], tuple[list[dict], list[BadRow]]],
        lane: int,
        lanes: int,
        rows: int,
        seed: int,
    ):
        if dataset.num_shards < lanes:
            dataset = dataset.reshard()
        self.dataset, self.samples_of = dataset, samples_of
        self.lane, self.lanes, self.rows, self.seed = lane, lanes, rows, seed
        self.name = f"{name} (lane {lane} of {lanes})"
        self.begin(turn=0)

    def begin(self, turn: int, state: dict | None = None, number: int = 0) -> None:
        """Go to this lane's shard of a turn, or to a place within."""
        shards = self.dataset.num_shards
        if shards < self.lanes:
            self.epoch, self.left = turn, "all that this lane had left of the epoch"
            self.part = split_dataset_by_node(self.dataset, self.lane, self.lanes)
        else:
            self.epoch, place = divmod(turn * self.lanes + self.lane, shards)
            shard = int(chunk_order(shards, self.seed, self.epoch)[place])
            self.left = f"the rest of shard {shard + 1} of {shards}"
            self.part = self.dataset.shard(shards, shard)
        if state is not None:
            self.part.load_state_dict(state)
        self.turn, self.number, self.state = turn, number, state
        self.examples = iter(self.part)

    def position(self) -> dict:
        return {"turn": self.turn, "number": self.number, "state": self.state}

    def seek(self, position: dict) -> None:
        self.begin(**position)

    def read(self) -> tuple[list[dict], list[BadRow]]:
        rows, bad = [], []
        for _ in range(self.rows):
            try:
                example = next(self.examples)
            except StopIteration:
                self.begin(self.turn + 1)
                return rows, bad
            except (ConnectionError, TimeoutError):
                raise  # that is no fault of the file: go on from the last checkpoint
            # Readers of files raise what they like; whatever it is, it is named.
            except Exception as error:
                reason = (
                    f"cannot be read, and {self.left} is lost ({type(error).__name__}: {error})"
                )
                bad.append(BadRow(self.name, self.number + 1, reason))
                self.begin(self.turn + 1)
                return rows, bad
            self.number += 1
            more, worse = self.samples_of(example, (self.name, self.number))
            rows += more
            bad += worse
        self.state = copy.deepcopy(self.part.state_dict())
        return rows, bad


class Lane:
    """The rows of a lane in the order of training.

    Args:
        kind: "video" or "image", which all rows of a batch have to be.
        query: asked of every row in place of its own.
    """

    def __init__(self, blocks: Blocks, kind: str, seed: tuple[int, ...], query: str | None = None):
        self.blocks, self.kind, self.seed, self.query = blocks, kind, seed, query
        self.rows: list[dict] = []
        self.block, self.offset = -1, 0  # the number of blocks before this one, rows taken of it
        self.start: Any = None
        self.bad: list[BadRow] = []

    def next_block(self) -> None:
        """Read on to the next row that is good.

        Raises:
            RecipeError: a whole epoch had none.
        """
        epoch, block = self.blocks.epoch, self.block
        # A block of a small source may be empty by chance, a hundred of them are not.
        while self.blocks.epoch <= epoch + 1 or self.block < block + 100:
            self.start = self.blocks.position()
            rows, bad = self.blocks.read()
            others = [row for row in rows if self.kind not in row]
            bad += [
                bad_row(row, self.blocks.name, f"no {self.kind}, as the others are")
                for row in others
            ]
            rows = [row for row in rows if self.kind in row]
            self.block += 1
            self.offset = 0
            self.bad += bad
            order = np.random.default_rng((*self.seed, self.block)).permutation(len(rows))
            self.rows = [rows[place] for place in order]
            if self.rows:
                return
        few = "".join(f"\n  {row}" for row in self.bad[:20])
        raise RecipeError(f"{self.blocks.name}: no row of an epoch is usable.{few}")

    def take(self, count: int) -> list[dict]:
        """The next rows."""
        taken = []
        while len(taken) < count:
            taken.append(self.peek())
            self.offset += 1
        return taken

    def peek(self) -> dict:
        """The row that is taken next; `visit` tells all apart that this lane ever gives."""
        if self.offset == len(self.rows):
            self.next_block()
        row = {**self.rows[self.offset], "visit": (self.block, self.offset)}
        return row if self.query is None else {**row, "query": self.query}

    def take_bad(self) -> list[BadRow]:
        """What was met since this was last asked, and is no row."""
        bad, self.bad = self.bad, []
        return bad

    def position(self) -> dict:
        return {"start": self.start, "block": self.block, "offset": self.offset}

    def seek(self, position: dict) -> None:
        """Go on where another lane of this number was."""
        self.block = position["block"]
        if self.block < 0:
            return
        self.blocks.seek(position["start"])
        self.block -= 1
        self.next_block()
        self.offset = position["offset"]
        self.bad = []  # met before, and counted then
