"""Lines of the benchmarks, and their tables: `python -m benchmarks.report LINES.jsonl`.

Every benchmark prints a line when it has measured it and appends it to a JSONL file, so that a run
that is stopped loses nothing. This command appends the lines of a file to `benchmarks/RESULTS.md`
as a section with tables. Lines with the same columns share a table.
"""

import argparse
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Goal:
    """Bound of one of a line's numbers.

    Attributes:
        column: name of the number.
        least, most: its bounds; one of them is given.
    """

    column: str
    least: float | None = None
    most: float | None = None

    def is_met(self, numbers: dict[str, float]) -> bool:
        value = float(
            numbers[self.column]
        )  # a NumPy number would give a NumPy bool, unknown to JSON
        return value >= self.least if self.most is None else value <= self.most

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.most is None else f"at most {self.most:g}"


def revision() -> str:
    """Return the short name of the commit; "" for a copy without a repository, or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        run = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def machine() -> dict[str, str | int]:
    """Return facts of this machine and the versions on which a measurement depends."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = (line for line in info.splitlines() if line.startswith("model name"))
    return {
        "processor": next(named, "model name unknown").split(":")[-1].strip(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": revision(),
    }


def shown(value: float) -> str:
    """Return a number with three significant digits."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


class Report:
    """Lines of one benchmark.

    Args:
        part: name of the benchmark.
        output: JSONL file to which lines are appended; `None` prints them only.
        quick: the sizes are too small for goals, so lines have none.

    Attributes:
        lines: the lines, as they are written.
    """

    def __init__(self, part: str, output: Path | None = None, quick: bool = False):
        self.part, self.output, self.quick = part, output, quick
        self.lines: list[dict] = []
        # `None`: no bar in a file.
        self.bar = tqdm(desc=part, unit=" lines", leave=False, dynamic_ncols=True, disable=None)

    def start(self, case: str) -> None:
        """Show the case that runs now in the progress bar."""
        self.bar.set_postfix_str(case)

    def add(
        self, case: str, numbers: dict[str, float], goal: Goal | None = None, note: str = ""
    ) -> dict:
        """Print and store a line.

        Args:
            numbers: the columns of the table and their values.
            note: remark, such as the reason why a case has no numbers.
        """
        line = {"part": self.part, "case": case, "numbers": numbers, "note": note}
        goal = None if self.quick else goal
        if goal is not None:
            line["goal"] = asdict(goal) | {"met": goal.is_met(numbers)}
        self.lines.append(line)
        words = [f"{name} {shown(value)}" for name, value in numbers.items()]
        if goal is not None:
            met = "met" if line["goal"]["met"] else "MISSED"
            words.append(f"goal: {goal.column} {goal}, {met}")
        self.bar.write(f"{self.part}: {case}: {'; '.join([*words, *filter(None, [note])])}")
        self.bar.update()
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "machine": machine()}) + "\n")
        return line

    def close(self) -> list[dict]:
        """Remove the progress bar and return the lines."""
        self.bar.close()
        return self.lines


def goal_text(line: dict) -> str:
    if "goal" not in line:
        return ""
    found = dict(line["goal"])
    met = found.pop("met")
    goal = Goal(**found)
    return f"{goal.column} {goal}: {'met' if met else '**missed**'}"


def table(lines: list[dict]) -> str:
    """Return a Markdown table of lines with the same columns."""
    columns = list(lines[0]["numbers"])
    goals = any("goal" in line for line in lines)
    notes = any(line["note"] for line in lines)
    head = [lines[0]["part"], *columns, *["goal"] * goals, *["note"] * notes]
    rows = [
        [
            line["case"],
            *(shown(line["numbers"][name]) for name in columns),
            *[goal_text(line)] * goals,
            *[line["note"]] * notes,
        ]
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    )


def section(lines: list[dict], command: str, title: str = "All benchmarks") -> str:
    """Return a Markdown section of all lines, with the machine and the versions."""
    facts = lines[0]["machine"]
    loads = [line["machine"]["load"] for line in lines]
    busy = ", busy with other work" if max(loads) > facts["threads"] + 0.5 else ""
    bf16 = "native bf16" if facts["native_bf16"] else "no native bf16"
    text = (
        f"## {title}, {date.today().isoformat()}, revision {facts['revision']}\n\n"
        f"```\n{command}\n```\n\n"
        f"{facts['processor']}, {facts['cores']} cores, {facts['instructions']}, {bf16}, "
        f"{facts['threads']} thread(s){busy}: load average {min(loads)} to {max(loads)}.\n"
        f"Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}.\n"
    )
    for _, same in groupby(lines, key=lambda line: (line["part"], tuple(line["numbers"]))):
        text += f"\n{table(list(same))}\n"
    return text


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--only", nargs="+", help="names of the cases to run; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute for all parts")
    parser.add_argument("--output", type=Path, help="JSONL file to which lines are appended")
    parser.add_argument("--threads", type=int, default=1)


def chosen(cases: dict, only: list[str] | None, parser: argparse.ArgumentParser) -> dict:
    """Return the cases named by `--only`, or all."""
    if unknown := sorted(set(only or ()) - cases.keys()):
        parser.error(f"--only {unknown[0]}: no such case; there are {', '.join(cases)}")
    return {name: case for name, case in cases.items() if not only or name in only}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("lines", type=Path, help="JSONL file that the benchmarks wrote")
    parser.add_argument("--command", default="make bench", help="the command that made it")
    parser.add_argument("--title", default="All benchmarks", help="of the section")
    args = parser.parse_args()
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n" + section(read_lines(args.lines), args.command, args.title))


if __name__ == "__main__":
    main()
