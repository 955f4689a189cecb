"""Streamed sources of millions of rows: start time, memory, and start time of a resumed run:
`python -m benchmarks.stream`.

    python -m benchmarks.stream --rows 10000000                  # a JSONL file
    python -m benchmarks.stream --rows 10000000 --form parquet

The rows are synthetic and no image is opened: the benchmark measures the reading of rows. A resumed
run replays the choice of sources and seeks to the stored position of each lane.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from benchmarks.measure import Cost, cost, in_own_process
from training.arguments import SourceArguments
from training.data.mixture import Bucket, MixtureSampler, Positions
from training.data.sources import StreamedSource, read_source

BATCH, LANES = 1024, 8
FILES = 16  # in Parquet
MIB = 2**20


def write_jsonl(folder: Path, rows: int) -> None:
    with open(folder / "rows.jsonl", "w") as file:
        for start in tqdm(range(0, rows, 100_000), desc="Writing rows"):
            file.writelines(
                f'{{"image": "1.png", "query": "what ?", "target": "number {number}"}}\n'
                for number in range(start, min(start + 100_000, rows))
            )


def write_parquet(folder: Path, rows: int) -> None:
    for number in tqdm(range(FILES), desc="Writing rows"):
        numbers = np.arange(number, rows, FILES)
        texts = [f"number {each}" for each in numbers]
        table = {"path": ["1.png"] * len(numbers), "text": texts}
        pq.write_table(pa.table(table), folder / f"{number:03d}.parquet", row_group_size=50_000)


def source_of(folder: Path, form: str) -> StreamedSource:
    if form == "jsonl":
        return read_source(SourceArguments(rows=str(folder / "rows.jsonl"), streaming=True))
    return read_source(
        SourceArguments(
            dataset="parquet",
            data_files=str(folder / "*.parquet"),
            columns={"image": "path", "target": "text"},
            streaming=True,
        )
    )


def read_steps(
    folder: Path, form: str, first: int, steps: int, positions: Positions
) -> tuple[Positions, list[float], list[str]]:
    """Read `steps` batches from step `first` on.

    Returns: the lanes' positions at the end, the seconds after which each batch was available, and
        the texts of the last batch.
    """
    since, seconds = time.monotonic(), []
    bucket = Bucket(1.0, streamed=source_of(folder, form))
    sampler = MixtureSampler(
        [bucket], BATCH, first + steps, 0, lanes=LANES, start=first, positions=positions
    )
    texts: list[str] = []
    for number, step in enumerate(sampler):
        if step is None:
            continue
        seconds.append(time.monotonic() - since)
        texts = [row["target"] for lane in step.rows for row in lane]
        sampler.forget(number)
    return sampler.position(first + steps), seconds, texts


def measure(folder: Path, form: str, first: int, steps: int, positions: Positions) -> Cost:
    (folder / "1.png").touch()
    return cost(lambda: read_steps(folder, form, first, steps, positions))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--form", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--steps", type=int, default=400, help="batches to read")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        {"jsonl": write_jsonl, "parquet": write_parquet}[args.form](folder, args.rows)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{args.rows:,} rows, {args.form}, {size / MIB:,.0f} MiB; steps of {BATCH} rows")
        for steps in (args.steps // 4, args.steps):
            found = in_own_process(measure, folder, args.form, 0, steps, {}, threads=1)
            _, seconds, _ = found.value
            rate = (len(seconds) - 1) * BATCH / (seconds[-1] - seconds[0])
            print(
                f"{steps:>6} steps: the first after {seconds[0]:.1f} s, then {rate:,.0f} rows/s; "
                f"peak {found.peak_bytes / MIB:.0f} MiB"
            )
        middle = args.rows // 2 // BATCH
        whole = in_own_process(measure, folder, args.form, 0, middle + 2, {}, threads=1)
        half = in_own_process(measure, folder, args.form, 0, middle, {}, threads=1)
        # Through JSON, which makes strings of the keys, as a checkpoint does.
        positions = {
            int(bucket): {int(lane): at for lane, at in lanes.items()}
            for bucket, lanes in json.loads(json.dumps(half.value[0])).items()
        }
        again = in_own_process(measure, folder, args.form, middle, 2, positions, threads=1)
        same = again.value[2] == whole.value[2]
        print(
            f"resumed at step {middle:,}, in the middle: the next step after "
            f"{again.value[1][0]:.1f} s; same rows as in an uninterrupted run: {same}"
        )


if __name__ == "__main__":
    main()
