"""Write tables and figures of a grid into its README: `python -m experiments.report FOLDER`.

It reads `results.jsonl` and `items` of the folder alone. The text between the two markers of
`README.md` is replaced, and `figures/*.svg` are drawn: the loss per row seen and per CPU-second,
and the first of the grid's scores. `--check` writes nothing and fails if text or figures are not
those of the results.

A 95 % interval is about other seeds and other items. Both half-widths are added in quadrature:

- seeds: Student's t of the seeds' means, or of the differences of equal seeds
- items: the clusters of items, averaged over seeds, are resampled (`eval/intervals.py`)

With one seed it is about other items only. A loss has no items. Nothing is corrected for the number
of comparisons, which the report states.

Shapes: S seeds, n items.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval.intervals import difference_interval, mean_interval
from experiments.grid import Grid, GridError, read_grid
from experiments.results import BENCHMARK, FILE, digest, read_lines, unpack

BEGIN = "<!-- results: written by experiments.report -->"
END = "<!-- end of results -->"
# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; scipy.stats.t.ppf(0.975, n)
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SHARE_OF_ROWS = 0.5  # counted among comparisons: the baseline's loss in at most half of its rows


class ReportError(ValueError):
    """A report that cannot be written; the message names the cause and the cure."""


# -- means and intervals ---------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval; `low` and `high` are None for one loss."""

    value: float
    low: float | None
    high: float | None


def seeds_half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of the mean of S seeds by Student's t; None for one seed."""
    if len(values) < 2:
        return None
    quantile = T[min(len(values) - 1, len(T)) - 1]
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Return the mean of S values that have no items, such as losses."""
    mean, half = float(np.mean(values)), seeds_half_width(values)
    return Mean(mean, None, None) if half is None else Mean(mean, mean - half, mean + half)


def combined(mean: float, low: float, high: float, half: float | None) -> Mean:
    """Return a mean with the interval of its items and that of its seeds, added in quadrature."""
    half = half or 0.0
    return Mean(mean, mean - float(np.hypot(mean - low, half)), mean + np.hypot(high - mean, half))


def mean_score(folder: Path, lines: list[dict], score: str) -> Mean:
    """Return the mean of a score over the lines of S seeds.

    Raises:
        ReportError: see `items_of`.
    """
    values, clusters = items_of(folder, lines, score)  # (S, n), (n,)
    found = mean_interval(values.mean(0), clusters, highest=max(1.0, values.max()))
    half = seeds_half_width(values.mean(1).tolist())
    return combined(float(values.mean()), found.low, found.high, half)


def difference_of_scores(folder: Path, a: list[dict], b: list[dict], score: str) -> Mean:
    """Return the mean of b - a, paired by seed and item.

    Args:
        a, b: lines of the same S seeds in the same order.

    Raises:
        ReportError: see `items_of`.
    """
    values, clusters = items_of(folder, [*a, *b], score)  # (2 S, n), (n,)
    differences = values[len(a) :] - values[: len(a)]
    found = difference_interval(differences.mean(0), clusters, max(1.0, values.max()))
    half = seeds_half_width(differences.mean(1).tolist())
    return combined(float(differences.mean()), found.low, found.high, half)


def items_of(folder: Path, lines: list[dict], score: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values `(S, n)` of a score's items, and their clusters `(n,)`.

    Raises:
        ReportError: the lines were measured on different items, or by different entries of the
            benchmark.
    """
    named = ", ".join(f"{line['setting']} {line['seed']}" for line in lines)
    if len({line["items"][score]["items"] for line in lines}) > 1:
        raise ReportError(
            f"{score}: {named} were measured on different items. Repeat them on the same data."
        )
    entry = f"{BENCHMARK}{score.split()[0]}"
    entries = {line["prepared"][entry] for line in lines if entry in line["prepared"]}
    if len(entries) > 1:
        raise ReportError(
            f"{score}: the benchmark's entry has changed between the runs of {named}. Repeat them "
            "by the same entry, with --again."
        )
    values, (clusters, *_) = zip(*(unpack(folder, line, score) for line in lines), strict=True)
    return np.stack(values), clusters


def share_to_reach(line: dict, loss: float) -> float | None:
    """Return the share of a run's steps after which its logged loss is at most `loss`; None if it
    never is. A logged loss is the mean since the line before."""
    curve = line["curve"]
    steps = [step for step, each in zip(curve["step"], curve["loss"], strict=True) if each <= loss]
    return steps[0] / curve["step"][-1] if steps else None


def final_loss(line: dict) -> float:
    return line["curve"]["loss"][-1]


# -- tables ----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_interval(mean: Mean, factor: float = 1.0, sign: str = "", digits: int = 1) -> str:
    """Return a mean and its interval, such as "41.6 (39.0 to 44.1)"."""

    def shown(value: float) -> str:
        return f"{factor * value:{sign}.{digits}f}"

    if mean.low is None:
        return shown(mean.value)
    return f"{shown(mean.value)} ({shown(mean.low)} to {shown(mean.high)})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def average(lines: list[dict], value: Callable[[dict], float]) -> float:
    return float(np.mean([value(line) for line in lines]))


def scores_of(grid: Grid, lines: list[dict]) -> list[str]:
    """Return the names of the grid's scores that all lines have items of."""
    names = grid.scores or list(lines[0]["items"])
    return [name for name in names if all(name in line["items"] for line in lines)]


def scores_of_any(grid: Grid, found: dict[str, list[dict]]) -> list[str]:
    """Return the names of the grid's scores that at least one setting has."""
    names = [name for same in found.values() for name in scores_of(grid, same)]
    return sorted(set(names), key=grid.scores.index) if grid.scores else list(dict.fromkeys(names))


def of_stage_before(line: dict, name: str) -> float:
    """Return `rows` or `cpu_seconds` of the run that a run started from; 0 without one."""
    return line.get("before", {}).get(name, 0)


def of_all_stages(line: dict, name: str) -> float:
    """Return `rows` or `cpu_seconds` of a run, with those of the run that it started from."""
    return line[name] + of_stage_before(line, name)


def settings_table(folder: Path, grid: Grid, found: dict[str, list[dict]]) -> str:
    """Return a table of settings: loss, scores in percent and cost, each averaged over seeds.

    Args:
        found: the lines of each setting, one for each seed.
    """
    scores = scores_of_any(grid, found)
    head = ["setting", "seeds", "loss (chance)", *(f"{name}, %" for name in scores)]
    head += ["trained parameters", "rows seen", "rows per CPU-second", "CPU-seconds"]
    rows = []
    for name, same in found.items():
        loss = with_interval(mean_over_seeds([final_loss(line) for line in same]), digits=2)
        if all("chance" in line["curve"] for line in same):
            loss += f" ({average(same, lambda line: line['curve']['chance'][-1]):.2f})"
        rows.append(
            [
                name,
                str(len(same)),
                loss,
                *(
                    with_interval(mean_score(folder, same, score), 100)
                    if score in scores_of(grid, same)
                    else "–"
                    for score in scores
                ),
                f"{same[0]['trainable_parameters'] / 1e6:.2f} M",
                number(of_all_stages(same[0], "rows")),
                number(average(same, lambda line: line["rows_per_cpu_second"])),
                number(average(same, lambda line: of_all_stages(line, "cpu_seconds"))),
            ]
        )
    return markdown(head, rows)


def reached(a: list[dict], b: list[dict]) -> tuple[str, str, bool]:
    """Return when each seed of B reaches the final loss of A with that seed.

    Returns:
        The rows and the processor time until then, those of a stage before included, as shares of
        A's; and True if every seed needs at most half of A's rows.
    """
    rows, costs = [], []
    for one, other in zip(a, b, strict=True):
        share = share_to_reach(other, final_loss(one))  # of B's last stage
        for shares, name in ((rows, "rows"), (costs, "cpu_seconds")):
            used = None if share is None else share * other[name] + of_stage_before(other, name)
            shares.append(None if used is None else used / of_all_stages(one, name))
    texts = (
        ", ".join("never" if each is None else f"{100 * each:.0f} %" for each in values)
        for values in (rows, costs)
    )
    return *texts, all(share is not None and share <= SHARE_OF_ROWS for share in rows)


def comparison_table(folder: Path, grid: Grid, found: dict[str, list[dict]]) -> str:
    """Return a table of the grid's pairs of settings that have results, paired by seed."""
    rows, lower, surely, fast = [], 0, 0, 0
    for first, second in grid.compare:
        by_seed = [{line["seed"]: line for line in found.get(name, [])} for name in (first, second)]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        if not seeds:
            continue
        a, b = ([lines[seed] for seed in seeds] for lines in by_seed)
        row = [f"{first} → {second}", str(len(seeds))]
        if grid.same_loss:
            differences = [final_loss(y) - final_loss(x) for x, y in zip(a, b, strict=True)]
            loss, (shares, costs, is_fast) = mean_over_seeds(differences), reached(a, b)
            lower += loss.value < 0
            surely += loss.high is not None and loss.high < 0
            fast += is_fast
            row += [with_interval(loss, sign="+", digits=3), shares, costs]
        scores = [
            f"{name} {with_interval(difference_of_scores(folder, a, b, name), 100, '+')}"
            for name in scores_of(grid, [*a, *b])
        ]
        rows.append([*row, "<br>".join(scores) or "–"])
    if not rows:
        return ""
    head, counted = ["settings", "seeds"], ""
    if grid.same_loss:
        head += ["difference of loss", "share of the first one's rows to reach its loss"]
        head += ["share of its processor time"]
        counted = (
            f" The loss is lower on average in {lower}, and with its interval below 0 in {surely}; "
            f"every seed reaches the first setting's loss in at most half of its rows in {fast}."
        )
    head += ["difference of scores, points"]
    return (
        f"{markdown(head, rows)}\n\n"
        f"Comparisons: {len(rows)}, not corrected for their number.{counted}"
    )


# -- figures ---------------------------------------------------------------------------------


def figure_name(title: str) -> str:
    """Return the file of a group's figure, relative to the grid's folder."""
    return f"figures/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"


def draw(folder: Path, title: str, grid: Grid, found: dict[str, list[dict]], origin: str) -> str:
    """Draw one group of settings; return the name of the SVG file in `folder`.

    Args:
        origin: hashes that the file contains.
    """
    scores = scores_of_any(grid, found)[:1]
    figure = Figure(figsize=(9 + 4 * len(scores), 3.6), layout="constrained")
    axes = figure.subplots(1, 2 + len(scores))
    for name, same in found.items():
        losses = np.array([line["curve"]["loss"] for line in same])  # (S, points)
        steps = np.array(same[0]["curve"]["step"])
        share = steps / steps[-1]
        for axis, kind in zip(axes, ("rows", "cpu_seconds"), strict=False):
            first = average(same, lambda line, kind=kind: of_stage_before(line, kind))
            used = first + share * average(same, lambda line, kind=kind: line[kind])
            (drawn,) = axis.plot(used, losses.mean(0), label=name)
            axis.fill_between(
                used, losses.min(0), losses.max(0), color=drawn.get_color(), alpha=0.2
            )
    for axis, label in zip(axes, ("rows seen", "CPU-seconds"), strict=False):
        axis.set(xlabel=label, ylabel="loss")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    for score in scores:
        measured = {name: same for name, same in found.items() if score in scores_of(grid, same)}
        means = [mean_score(folder, same, score) for same in measured.values()]
        for index, mean in enumerate(means):
            low, high = 100 * (mean.value - mean.low), 100 * (mean.high - mean.value)
            axes[2].errorbar(100 * mean.value, index, xerr=[[low], [high]], fmt="o", capsize=3)
        label = f"{score}, %".replace(" ", "\n", 1)  # the benchmark, and its metric below
        axes[2].set(yticks=range(len(means)), yticklabels=list(measured), xlabel=label)
        axes[2].margins(y=0.2)
        axes[2].invert_yaxis()
        axes[2].grid(axis="x", alpha=0.3)
    path = folder / figure_name(title)
    path.parent.mkdir(exist_ok=True)
    # The hash makes the ids in the file equal in every run; a date would change it, too.
    with matplotlib.rc_context({"svg.hashsalt": "experiments"}):
        figure.savefig(path, metadata={"Date": None, "Description": origin})
    return figure_name(title)


# -- the README ------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    """Return a hash of the results, which the figures contain."""
    path = folder / FILE
    content = path.read_bytes() if path.is_file() else b""
    return digest(content)


def facts(lines: list[dict]) -> str:
    """Return revision, processor, precision and versions of the results."""

    def all_of(values: Sequence[str]) -> str:
        return "; ".join(sorted(set(values)))

    versions = [
        ", ".join(
            f"{name} {line['versions'][name]}" for name in ("python", "torch", "transformers")
        )
        for line in lines
        if "versions" in line
    ]
    devices = [f"{line['device']}, {line['precision']}" for line in lines]
    minutes = sum(sum(line["process_cpu_seconds"].values()) for line in lines) / 60
    return (
        f"{len(lines)} runs, {minutes:.0f} CPU-minutes of training and evaluation. "
        f"Revision {all_of([line['revision'] for line in lines])}; "
        f"{all_of(devices)}; {all_of(versions)}."
    )


def settings_of(
    grid: Grid, expected: dict[tuple[str, int], str], key: tuple[str, int]
) -> str | None:
    """Return the hash of a setting and seed, which may be a seed that the grid does not list; None
    if the grid has no such setting.

    Args:
        expected: those of the grid's own runs.
    """
    if key[0] not in grid.settings:
        return None
    return expected[key] if key in expected else grid.run(*key).settings


def results_text(
    folder: Path, grid: Grid, figure: Callable[[str, dict[str, list[dict]]], str]
) -> str:
    """Return the Markdown of all results.

    Args:
        figure: draws a title's group of settings, and returns its file's name.
    """
    expected = {(run.setting, run.seed): run.settings for run in grid.runs()}
    lines = read_lines(folder)
    is_valid = {
        key: line["settings"] == settings_of(grid, expected, key) for key, line in lines.items()
    }
    failed = [
        f"{name} {seed}: {each['error']}" for (name, seed), each in lines.items() if "error" in each
    ]
    other = [f"{name} {seed}" for (name, seed), is_same in is_valid.items() if not is_same]
    valid = [
        line
        for (name, seed), line in sorted(lines.items(), key=lambda item: item[0][1])
        if "error" not in line and is_valid[name, seed]
    ]
    found = {name: [line for line in valid if line["setting"] == name] for name in grid.settings}
    found = {name: same for name, same in found.items() if same}
    parts = []
    for title, settings in grid.groups.items():
        if group := {name: found[name] for name in settings if name in found}:
            image = f"![{title}: loss per row and per CPU-second]({figure(title, group)})"
            parts += [f"### {title}", settings_table(folder, grid, group), image]
    if compared := comparison_table(folder, grid, found):
        parts += ["### Comparisons", compared]
    missing = [f"{name} {seed}" for name, seed in expected if (name, seed) not in lines]
    measured = scores_of_any(grid, found)
    without = [name for name in grid.scores if name not in measured]
    notes = {
        "not run yet": missing,
        "failed": failed,
        "left out, of other settings": other,
        "in `scores` without a result": without,
    }
    parts += [
        f"{len(each)} {note}: {', '.join(each)}." for note, each in notes.items() if each and valid
    ]
    parts += [facts(valid)] if valid else ["No results yet."]
    return "\n\n".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="such as experiments/calibration")
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    return parser.parse_args(argv)


def split_page(page: Path, begin: str, end: str) -> tuple[str, str]:
    """Return a page's text up to the line `begin`, and from the line `end`.

    Raises:
        ReportError: it has not each of the two lines once.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ReportError(f"{page}: it needs the lines {begin!r} and {end!r} once each.")
    before, rest = text.split(begin)
    return before + begin, end + rest.split(end)[1]


def write_page(
    page: Path, around: tuple[str, str], results: str, *, check: bool, command: str
) -> None:
    """Write results between the two parts of a page, or compare them with what stands there.

    Args:
        around: parts of `split_page`.
        check: write nothing.
        command: module that writes the page, for the error.

    Raises:
        ReportError: with `check`, the page has other results.
    """
    whole = f"{around[0]}\n\n{results}\n\n{around[1]}"
    if not check:
        page.write_text(whole, encoding="utf-8")
    elif whole != page.read_text(encoding="utf-8"):
        raise ReportError(f"{page}: not of these results. Run {command}.")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder, results_hash = args.folder, digest_of(args.folder)
    grid, page = read_grid(folder / "grid.yaml"), folder / "README.md"
    around = split_page(page, BEGIN, END)

    def drawn_from(found: dict) -> str:
        """Return hashes of the results and of the settings and scores that a figure shows."""
        shown = repr((list(found), grid.scores))
        return f"{results_hash} {digest(shown.encode())}"

    def existing(title: str, found: dict) -> str:
        name = figure_name(title)
        path = folder / name
        if not path.is_file() or drawn_from(found) not in path.read_text(encoding="utf-8"):
            raise ReportError(f"{path}: not of these results. Run experiments.report.")
        return name

    def drawn(title: str, found: dict) -> str:
        return draw(folder, title, grid, found, drawn_from(found))

    results = results_text(folder, grid, existing if args.check else drawn)
    write_page(page, around, results, check=args.check, command="experiments.report")
    if not args.check:
        print(results)


if __name__ == "__main__":
    try:
        main()
    except (GridError, OSError, ReportError, ValueError) as error:
        sys.exit(f"error: {error}")
