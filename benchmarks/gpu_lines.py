"""Lines and parts of `benchmarks.gpu`: a cut, a failure or a late part loses no line before it."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import shown


class Skip(Exception):
    """A part that this machine cannot run; the message is the reason."""


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        seconds: the most that it should take on an H100; it is skipped if less time is left.
        run: measures it.
    """

    name: str
    seconds: float
    run: Callable[[], None]


class Lines:
    """Lines of the run, in the format of `benchmarks.report`.

    Args:
        output: JSONL file to which every line is appended; `None` prints only.
        facts: the machine and its versions.
    """

    def __init__(self, output: Path | None, facts: dict):
        self.output, self.facts = output, facts
        self.failed: list[str] = []  # names of parts, and of comparisons beyond their tolerance
        self.skipped: list[str] = []

    def add(
        self,
        part: str,
        case: str,
        numbers: dict[str, float],
        note: str = "",
        *,
        goal: dict | None = None,
        **more: str,
    ) -> None:
        """Print a line and append it to the file, at once.

        Args:
            goal: `column`, `least` and `most` of a bound, and if it is `met`.
            more: other keys of the line in the file.
        """
        words = [f"{name} {shown(value)}" for name, value in numbers.items()]
        if goal is not None:
            words.append(f"{'PASS' if goal['met'] else 'FAIL'}, at most {goal['most']:g}")
            if not goal["met"]:
                self.failed.append(f"{part} {case}")
        print(f"{part}: {case}: {'; '.join([*words, *filter(None, [note])])}", flush=True)
        line = {"part": part, "case": case, "numbers": numbers, "note": note, **more}
        if goal is not None:
            line["goal"] = goal
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"machine": self.facts}) + "\n")

    def fail(self, part: str, case: str, note: str) -> None:
        """Report a failure, with the traceback of the current exception in the file."""
        self.failed.append(case)
        self.add(part, case, {}, " ".join(note.split())[:400], traceback=traceback.format_exc())

    def compare(self, case: str, difference: float, tolerance: float) -> None:
        """Report a difference of two computations, and whether it is within its tolerance."""
        goal = {"column": "difference", "least": None, "most": tolerance}
        # Not `difference > tolerance`, which is false for NaN.
        met = bool(difference <= tolerance)
        self.add("parity", case, {"difference": difference}, goal=goal | {"met": met})


def run_parts(parts: list[Part], lines: Lines, end: float) -> None:
    """Run the parts in their order, as long as there is time until `end` of `time.monotonic`."""
    for name, seconds, run in parts:
        left = end - time.monotonic()
        if left < seconds:
            lines.skipped.append(name)
            reason = f"skipped: it may take {seconds:.0f} s, and {left:.0f} s are left"
            lines.add("run", name, {}, reason)
            continue
        since = time.monotonic()
        try:
            run()
        except Skip as reason:
            lines.skipped.append(name)
            lines.add("run", name, {}, f"skipped: {reason}")
        except Exception as error:  # whatever it is, the next part can run
            lines.fail("run", name, f"failed: {type(error).__name__}: {error}")
        else:
            lines.add("run", name, {"seconds": time.monotonic() - since})
