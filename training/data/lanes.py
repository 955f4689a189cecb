"""Rows of streamed sources, which are read lazily, and the positions from which a run resumes.

A streamed source is divided into a fixed number of lanes (`data.lanes`), and every global batch
takes the same number of rows from each. A process reads some of the lanes. So the rows of a step
are the same whether one process reads all lanes or several processes read a few each.

    block      a few hundred rows of a lane, in the order of the files
    lane       its blocks in turn, the rows of each block shuffled; epoch after epoch
    position   of a lane: where its current block starts, and how many rows of it were taken

A row that cannot be used is a bad row: it is skipped and reported.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from processing.rows import BadRow, RowError, open_rows, parse_line
from training.arguments import RecipeError

MIB = 2**20
CHUNKS = 8  # chunks of a JSONL file in a block: more mix better and cost more seeks
# Keys that reading adds to a row; the underscore keeps them apart from the data's own columns.
FILE = "_streamed_from"  # the JSONL file of the row
DRAW = "_draw"  # (block, offset) of the row in its lane: unique over all epochs


class Blocks:
    """Rows of one lane, read block by block without end.

    Attributes:
        name: source of the rows, for messages.
        epoch: epoch of the next block.
    """

    name: str
    epoch: int

    def read(self) -> tuple[list[dict], list[BadRow]]:
        """Return the rows and the bad rows of the next block."""
        raise NotImplementedError

    def position(self) -> Any:
        """Return where the next block starts, as a value that JSON can hold."""
        raise NotImplementedError

    def seek(self, position: Any) -> None:
        """Continue from a stored `position`."""
        raise NotImplementedError

    def first_epoch(self) -> Iterator[tuple[list[dict], list[BadRow]]]:
        """Yield the lane's rows of the first epoch, each once; call it before `read`."""
        while self.epoch == 0:
            yield self.read()


@cache
def shuffled_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of a source's chunks or shards in an epoch, the same in every process.

    Chunks are shuffled instead of rows: an order of rows would need the place of every line in
    files that may be larger than memory, and one seek for each row.
    """
    return np.random.default_rng((seed, epoch)).permutation(count)


class JSONLBlocks(Blocks):
    """Blocks of JSONL files.

    The bytes of the files are cut into chunks of equal size. Every epoch reads the chunks in a new
    random order and deals them to the lanes in turn.

    Args:
        rows: approximate number of rows in a block.
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
        try:
            for path in self.paths:
                open_rows(path, in_chunks=True).close()
        except ValueError as error:
            raise RecipeError(f"data.sources: {error}") from error
        # The mean of the first 64 KiB: an exact one would read every file before training starts.
        with open(self.paths[0], "rb") as file:
            head = file.read(2**16)
        row_bytes = len(head) / max(head.count(b"\n"), 1)
        self.size = int(max(rows / CHUNKS, 2) * row_bytes)
        self.chunks = -(-int(self.ends[-1]) // self.size)  # rounded up
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
        for index in range(CHUNKS * self.block, CHUNKS * (self.block + 1)):
            chunk_rows, chunk_bad = self.read_chunk(index)
            rows += chunk_rows
            bad += chunk_bad
        self.block += 1
        return rows, bad

    def first_epoch(self) -> Iterator[tuple[list[dict], list[BadRow]]]:
        # By chunks, because the lane's last block of an epoch may reach into the next one.
        yield from map(self.read_chunk, range(-(-(self.chunks - self.lane) // self.lanes)))

    def read_chunk(self, index: int) -> tuple[list[dict], list[BadRow]]:
        """Return the rows and the bad rows of the lane's chunk `index`, counted over all epochs."""
        # Chunks are dealt like cards, and dealing goes on across the end of an epoch. If each epoch
        # began again with lane 0, the last lanes would get fewer chunks and run ahead of the rest.
        epoch, turn = divmod(index * self.lanes + self.lane, self.chunks)
        chunk = int(shuffled_order(self.chunks, self.seed, epoch)[turn])
        rows, bad = [], []
        for path, offset, line in self.lines(chunk * self.size, (chunk + 1) * self.size):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            try:
                # The row's `line` is its byte offset: the number of the line would have to be
                # counted from the start of the file. `bad_row` counts it where it is needed.
                parsed = parse_line(line, path.parent, where=(str(path), offset))
                rows += [{**row, FILE: str(path)} for row in parsed]
            except RowError as error:
                bad.append(BadRow(str(path), line_number(path, offset), str(error)))
        return rows, bad

    def lines(self, start: int, end: int) -> Iterator[tuple[Path, int, bytes]]:
        """Yield path, byte offset and content of every line that begins in the bytes from `start`
        to `end` of all files joined end to end."""
        first = 0  # byte at which the file starts
        for path, last in zip(self.paths, self.ends.tolist(), strict=True):
            if start < last and first < end:
                with open(path, "rb") as file:
                    # A line belongs to the chunk in which it begins, so the rest of a line from the
                    # chunk before is skipped. Reading starts one byte early: if that byte is a
                    # newline, it alone is skipped, and the line that begins at `start` is kept.
                    file.seek(max(start - first - 1, 0))
                    if start > first:
                        file.readline()
                    while (offset := file.tell()) < min(end, last) - first:
                        yield path, offset, file.readline()
            first = last


@cache
def lines_before(path: Path) -> np.ndarray:
    """Return the number of lines that end before each MiB of a file."""
    with open(path, "rb") as file:
        counts = [part.count(b"\n") for part in iter(partial(file.read, MIB), b"")]
    return np.cumsum([0, *counts])


def line_number(path: Path, offset: int) -> int:
    """Return the number, from 1, of the line that begins at a byte offset."""
    part, rest = divmod(offset, MIB)
    with open(path, "rb") as file:
        file.seek(part * MIB)
        return int(lines_before(path)[part]) + file.read(rest).count(b"\n") + 1


def bad_row(row: dict, name: str, reason: str) -> BadRow:
    """Report a row found unusable after it was parsed.

    A streamed JSONL row carries its byte offset, which is converted to a line number here.
    """
    if FILE in row:
        return BadRow(row[FILE], line_number(Path(row[FILE]), row["line"]), reason)
    return BadRow(name, row["line"], reason)


class DatasetBlocks(Blocks):
    """Blocks of a streamed dataset of the library `datasets`: files of any of its formats, or the
    Hub.

    Every epoch reads the shards in a new random order and deals them to the lanes in turn. With
    fewer shards than lanes, every lane reads all shards and takes each `lanes`-th example.

    A truncated file, or a member of it that cannot be read, ends its shard: `datasets` reads
    nothing after such a place.

    Args:
        samples_of: function from an example to its rows and its bad rows.
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
            dataset = dataset.reshard()  # parquet files into their row groups
        self.dataset, self.samples_of = dataset, samples_of
        self.lane, self.lanes, self.rows, self.seed = lane, lanes, rows, seed
        self.name = f"{name} (lane {lane} of {lanes})"
        self.begin(turn=0)

    def begin(self, turn: int, state: dict | None = None, number: int = 0) -> None:
        """Open the lane's shard of a turn.

        Args:
            state: state of the iteration to continue from. Default: the start of the shard.
            number: number of the shard's examples that were read before.
        """
        shards = self.dataset.num_shards
        if shards < self.lanes:
            self.epoch, self.lost = turn, "all that this lane had left of the epoch"
            self.part = split_dataset_by_node(self.dataset, self.lane, self.lanes)
        else:
            # Dealt across the ends of epochs, as in `JSONLBlocks.read_chunk`.
            self.epoch, index = divmod(turn * self.lanes + self.lane, shards)
            shard = int(shuffled_order(shards, self.seed, self.epoch)[index])
            self.lost = f"the rest of shard {shard + 1} of {shards}"
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
                raise  # the file is not at fault: the run can resume from its last checkpoint
            # Readers of files raise errors of any type; each one is reported.
            except Exception as error:
                reason = (
                    f"cannot be read, and {self.lost} is lost ({type(error).__name__}: {error})"
                )
                bad.append(BadRow(self.name, self.number + 1, reason))
                self.begin(self.turn + 1)
                return rows, bad
            self.number += 1
            example_rows, example_bad = self.samples_of(example, (self.name, self.number))
            rows += example_rows
            bad += example_bad
        self.state = self.part.state_dict()
        return rows, bad


class Lane:
    """Rows of a lane in the order of training.

    Args:
        kind: "video" or "image". All rows of a batch are of one kind, so the others are bad rows.
        query: query that replaces every row's own.
    """

    def __init__(self, blocks: Blocks, kind: str, seed: tuple[int, ...], query: str | None = None):
        self.blocks, self.kind, self.seed, self.query = blocks, kind, seed, query
        self.rows: list[dict] = []
        self.block, self.offset = -1, 0  # index of the block, and rows taken of it
        self.start: Any = None  # position at which the block starts
        self.bad: list[BadRow] = []

    def next_block(self) -> None:
        """Read on to the next block that has a usable row.

        Raises:
            RecipeError: a whole epoch has none.
        """
        epoch, block = self.blocks.epoch, self.block
        # A lane of a small source has few blocks in an epoch, and all of them may be empty by
        # chance: 100 blocks are read before the source is called unusable.
        while self.blocks.epoch <= epoch + 1 or self.block < block + 100:
            self.start = self.blocks.position()
            rows, bad = self.blocks.read()
            bad += [
                bad_row(row, self.blocks.name, f"no {self.kind}, as the others are")
                for row in rows
                if self.kind not in row
            ]
            rows = [row for row in rows if self.kind in row]
            self.block += 1
            self.offset = 0
            self.bad += bad
            # Seeded by the block's index, so a resumed lane restores the order of this block
            # without a replay of those before it.
            order = np.random.default_rng((*self.seed, self.block)).permutation(len(rows))
            self.rows = [rows[index] for index in order]
            if self.rows:
                return
        few = "".join(f"\n  {row}" for row in self.bad[:20])
        raise RecipeError(f"{self.blocks.name}: no row of an epoch is usable.{few}")

    def take(self, count: int) -> list[dict]:
        """Return the next `count` rows and move past them."""
        taken = []
        while len(taken) < count:
            taken.append(self.peek())
            self.offset += 1
        return taken

    def peek(self) -> dict:
        """Return the next row without moving past it."""
        if self.offset == len(self.rows):
            self.next_block()
        row = {**self.rows[self.offset], DRAW: (self.block, self.offset)}
        return row if self.query is None else {**row, "query": self.query}

    def take_bad(self) -> list[BadRow]:
        """Return and clear the bad rows found since the last call."""
        bad, self.bad = self.bad, []
        return bad

    def position(self) -> dict:
        """Return the position of the lane, as a value that JSON can hold."""
        return {"start": self.start, "block": self.block, "offset": self.offset}

    def seek(self, position: dict) -> None:
        """Continue from the `position` of the same lane in an earlier run."""
        self.block = position["block"]
        if self.block < 0:  # nothing was read
            return
        self.blocks.seek(position["start"])
        self.block -= 1  # `next_block` adds 1
        self.next_block()
        self.offset = position["offset"]
        self.bad = []  # the earlier run has reported them
