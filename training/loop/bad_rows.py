"""Unusable rows of a training: counted by source, reported, and limited."""

from pathlib import Path

import torch
from accelerate.utils import gather_object

from processing.rows import BadRow
from training.arguments import RecipeError, SourceArguments
from training.loop.distributed import all_sum

BAD_ROWS = "bad_rows.txt"
FEW_ROWS = 1000  # the limit is a share of at least this many rows: few rows vary too much


class BadRows:
    """Counts of the rows that this process read and could not use.

    Args:
        sources: the dataset's sources, in its order.
        output_dir: folder of the run; every unusable row is appended to `bad_rows.txt` in it.
        max_bad_share: share of a source's rows that may be unusable, 0 to 1.

    Attributes:
        seen, bad: numbers of read rows and of unusable rows, by source; checkpoints store them.
    """

    def __init__(self, sources: list[SourceArguments], output_dir: Path, max_bad_share: float):
        self.sources, self.output_dir = sources, output_dir
        self.max_bad_share = max_bad_share
        self.seen, self.bad = [0] * len(sources), [0] * len(sources)
        self._new: list[BadRow] = []

    def count(self, source: int, rows: int, bad: list[BadRow]) -> None:
        """Count a batch's `rows` usable rows and its unusable ones; append these to the file."""
        self.seen[source] += rows + len(bad)
        self.bad[source] += len(bad)
        self._new += bad
        if bad:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.output_dir / BAD_ROWS, "a", encoding="utf-8") as file:
                file.writelines(f"{row}\n" for row in bad)

    def report(self, device: torch.device) -> str:
        """Return a report of the rows that all processes found unusable since the last call.

        Every process must call it, because it gathers counts and rows.

        Returns: one paragraph for each source that has unusable rows; "" if none are new.
        Raises:
            RecipeError: more than `max_bad_share` of a source's rows are unusable.
        """
        counts = all_sum(torch.tensor([self.seen, self.bad], device=device))
        new, self._new = gather_object(self._new), []
        if not new:
            return ""
        few = "".join(f"\n  {row}" for row in new[:20])
        reports = []
        for source, seen, bad in zip(self.sources, *counts.tolist(), strict=True):
            if not bad:
                continue
            report = (
                f"{source.name}: {bad} of {seen} rows are unusable; {self.output_dir / BAD_ROWS} "
                "lists them"
            )
            if bad > self.max_bad_share * max(seen, FEW_ROWS):
                raise RecipeError(
                    f"{report}{few}\nAt most {100 * self.max_bad_share:.3g}% may be unusable "
                    f"(data.max_bad_share), and {100 * bad / seen:.3g}% are; correct the rows "
                    "above or raise the limit."
                )
            reports.append(f"{report}{few}")
        return "\n".join(reports)


__all__ = ["BAD_ROWS", "BadRows"]
