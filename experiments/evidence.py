"""Write docs/evidence.md: the paper's claims against this repository's results, one row each.

    python -m experiments.evidence [--check]

`experiments/claims.yaml` has the claims; the numbers are those of `experiments/*/results.jsonl`.
The text between the two markers of the page is replaced, and `docs/figures/evidence/*.svg` are
drawn.
`--check` writes nothing and fails if page or figures are not those of the results.

A difference is paired by seed and item, with the interval of `experiments/report.py`.

| its interval                      | verdict                                                   |
|-----------------------------------|-----------------------------------------------------------|
| excludes 0, with the paper's sign | holds                                                     |
| excludes 0, with the other sign   | does not hold                                             |
| contains 0, within 2 points of it | cannot tell: a difference, if there is one, is this small |
| contains 0, and is wider          | open: more seeds or items are needed                      |

The paper's sign counts if its difference is at least a point: its runs are single ones. Without it,
the verdict is "higher", "lower", "cannot tell" or "open". A difference of one seed has no verdict:
its interval does not cover what another seed would change.

A setting has learnt from clips if the interval of its score is above the best baseline without the
clip (`BLIND`). A difference is marked if one of its settings, or both, are not.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.yaml_text import parse_yaml
from experiments.cost import FILE as COST
from experiments.grid import GridError, read_grid
from experiments.report import (
    Mean,
    ReportError,
    average,
    difference_of_scores,
    digest_of,
    markdown,
    mean_score,
    number,
    of_stage_before,
    settings_of,
    split_page,
    with_interval,
    write_page,
)
from experiments.results import FILE, digest, read_lines
from training.arguments import RecipeError, check_keys

FOLDER = Path("experiments")
CLAIMS = FOLDER / "claims.yaml"
PAGE = Path("docs/evidence.md")
FIGURES = Path("docs/figures/evidence")
BEGIN = "<!-- evidence: written by experiments.evidence -->"
END = "<!-- end of evidence -->"
WITHIN = 2.0  # points: "cannot tell" only if the whole interval is within them
MOST_DIGITS = 3
SIGNED = 1.0  # points: a smaller difference of the paper has no sign
ONE_SEED = "one seed"
NOT_RUN = "not run yet"
BLIND = ("chance", "majority", "question only", "unconditional")  # baselines without the clip
MARKS = ("", "†", "‡")  # by the number of settings that are not above them


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A difference that the paper states, or that its table invites.

    Attributes:
        text (`str`): what is compared, as "second instead of first".
        pair (`list[str]`): both settings, without the data set's prefix.
        paper (`dict`): the paper's difference in points by the name of the score; a sign in quotes,
            "+" or "-", for a direction without a number.
    """

    text: str
    pair: list
    paper: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and the experiment on it.

    Attributes:
        name (`str`), title (`str`)
        folder (`str`): of its grid.
        scores (`dict[str, dict[str, str]]`): the prefix of each data set's settings, and its scores
            by the names of `Statement.paper`.
        statements (`list`): see [`Statement`].
        about (`str`): Markdown below the table: question, protocol, limits.
        short (`str`): the result in one sentence, for the list above the table.
        data (`dict[str, str]`): the name of each data set for readers, by its prefix.
        curves (`dict[str, list[str]]`): settings of growing budgets by the model's name, to draw
            over the rows seen; default: the differences are drawn.
        cost (`list[str]`): settings whose parameters and processor time are listed.
    """

    name: str
    title: str
    folder: str
    scores: dict
    statements: list
    about: str
    short: str = ""
    data: dict = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    cost: list = field(default_factory=list)

    def name_of(self, data: str) -> str:
        """Return the name of a data set for readers."""
        return self.data.get(data, data)


@dataclass(frozen=True)
class Found:
    """A measured difference.

    Attributes:
        score (`str`), mean ([`Mean`]): of second - first, in points.
        verdict (`str`)
        mark (`str`): see `MARKS`.
    """

    score: str
    mean: Mean
    verdict: str
    mark: str = ""

    @property
    def text(self) -> str:
        """The difference for the table; more digits where rounding would hide the verdict."""
        digits = 1
        while hides_verdict(self.mean, digits) and digits < MOST_DIGITS:
            digits += 1
        return f"{self.score} {with_interval(self.mean, sign='+', digits=digits)}{self.mark}"


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """Read the claims and check that their grids have the settings and scores.

    Raises:
        ReportError: an unknown or missing key, setting or score.
    """
    claims = []
    try:
        listed = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ReportError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(listed, list):
        raise ReportError(f"{path}: {listed!r} is not a list of claims.")
    for given in listed:
        if not isinstance(given, dict):
            raise ReportError(f"{path}: {given!r} is not a claim: give a mapping with its keys.")
        try:
            claim = Claim(**check_keys(given, Claim, given.get("name", "claim")))
            rows = [Statement(**check_keys(row, Statement, claim.name)) for row in claim.statements]
        except RecipeError as error:
            raise ReportError(f"{path}: {error}") from error
        for row in rows:
            if len(row.pair) != 2:
                raise ReportError(f"{path}: {claim.name}: {row.pair} is not a pair of settings.")
        claim.statements[:] = rows
        grid = read_grid(FOLDER / claim.folder / "grid.yaml")
        for data in claim.scores:
            named = [name for row in rows for name in row.pair]
            named += [*claim.cost, *(name for names in claim.curves.values() for name in names)]
            for name in named:
                grid.check_setting(f"{path}: {claim.name}", f"{data}-{name}")
        for row in rows:
            if unknown := row.paper.keys() - set().union(*claim.scores.values()):
                raise ReportError(f"{path}: {claim.name}: no score is named {min(unknown)}.")
        claims.append(claim)
    return claims


# -- results ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The results of a claim.

    Attributes:
        claim ([`Claim`])
        found (`dict[str, list[dict]]`): the finished lines of each setting, by seed.
        differences (`dict`): by the text of a statement and a data set, its differences and the
            lines that they are of.
    """

    claim: Claim
    found: dict[str, list[dict]]
    differences: dict[tuple[str, str], tuple[list[Found], list[dict]]]

    @classmethod
    def of(cls, claim: Claim) -> "Measured":
        """Compute the differences of a claim, once for table and figure."""
        found = results(claim)
        keys = [(row, data) for row in claim.statements for data in claim.scores]
        return cls(
            claim,
            found,
            {(row.text, data): differences(claim, row, data, found) for row, data in keys},
        )


def results(claim: Claim) -> dict[str, list[dict]]:
    """Return the finished lines of each setting, by seed, that are of its present recipe."""
    folder = FOLDER / claim.folder
    grid, lines = read_grid(folder / "grid.yaml"), read_lines(folder)
    if not lines:
        return {}
    expected = {(run.setting, run.seed): run.settings for run in grid.runs()}
    found: dict[str, list[dict]] = {}
    for key, line in sorted(lines.items(), key=lambda item: item[0][1]):
        if "error" not in line and settings_of(grid, expected, key) == line["settings"]:
            found.setdefault(key[0], []).append(line)
    return found


def in_points(mean: Mean) -> Mean:
    return Mean(100 * mean.value, 100 * mean.low, 100 * mean.high)


def verdict(mean: Mean, sign: int | None, seeds: int) -> str:
    """Return the verdict on a difference in points; see the module.

    Args:
        sign: the paper's, 1 or -1; None without a claim.
        seeds: the number that the difference is of.
    """
    if seeds == 1:
        return ONE_SEED
    if mean.low > 0 or mean.high < 0:
        found = 1 if mean.low > 0 else -1
        if sign is None:
            return "higher" if found > 0 else "lower"
        return "holds" if found == sign else "does not hold"
    return "cannot tell" if mean.low >= -WITHIN and mean.high <= WITHIN else "open"


def hides_verdict(mean: Mean, digits: int) -> bool:
    """Return whether a rounded end of an interval is on another side of 0 or of two points."""

    bounds = (-WITHIN, 0, WITHIN) if mean.low <= 0 <= mean.high else (0,)

    def sides(value: float) -> tuple[bool, ...]:
        return tuple(value > bound for bound in bounds)

    def is_moved(value: float) -> bool:
        rounded = round(value, digits)
        return value != 0 and (rounded == 0 or sides(value) != sides(rounded))

    return is_moved(mean.low) or is_moved(mean.high)


def is_above_blind(folder: Path, lines: list[dict], score: str) -> bool:
    """Return whether the interval of a setting's score is above its best baseline without clip."""
    baselines = baselines_of(lines, score)
    best = max((float(np.mean(baselines[name])) for name in BLIND if name in baselines), default=0)
    return mean_score(folder, lines, score).low > best


def sign_of(given: float | str | None) -> int | None:
    """Return the sign of a paper's difference, a number or "+" or "-"; None below a point."""
    if given is None or (isinstance(given, int | float) and abs(given) < SIGNED):
        return None
    return -1 if str(given).startswith("-") else 1


def differences(
    claim: Claim, statement: Statement, data: str, found: dict[str, list[dict]]
) -> tuple[list[Found], list[dict]]:
    """Return the differences of a statement on a data set, and the lines that they are of."""
    by_seed = [
        {line["seed"]: line for line in found.get(f"{data}-{name}", [])} for name in statement.pair
    ]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    a, b = ([lines[seed] for seed in seeds] for lines in by_seed)
    measured = []
    for name, score in claim.scores[data].items():
        if seeds and all(score in line["items"] for line in [*a, *b]):
            mean = in_points(difference_of_scores(FOLDER / claim.folder, a, b, score))
            sign = sign_of(statement.paper.get(name))
            below = [not is_above_blind(FOLDER / claim.folder, lines, score) for lines in (a, b)]
            mark = MARKS[sum(below)]
            measured.append(Found(name, mean, verdict(mean, sign, len(seeds)), mark))
    return measured, [*a, *b]


# -- the page --------------------------------------------------------------------------------


def paper_text(given: dict) -> str:
    """Return the paper's differences, such as "cls +6.8, VQA -2.3"."""
    texts = [
        f"{name} {value:+.1f}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in given.items()
    ]
    return ", ".join(texts) or "–"


def cpu_hours(lines: list[dict]) -> float:
    """Return the processor time of runs and of those that they started from, in hours."""
    seconds = [
        sum(line["process_cpu_seconds"].values()) + of_stage_before(line, "cpu_seconds")
        for line in lines
    ]
    return sum(seconds) / 3600


def hours_of_all() -> float:
    """Return the processor time of all runs of the claims' folders, in hours.

    With the runs that were repeated, and with the searches of learning rates.
    """
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.glob(f"c[0-9]*/{FILE}")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return sum(sum(line.get("process_cpu_seconds", {}).values()) for line in lines) / 3600


def table(measured: list[Measured]) -> str:
    """Return the table of all claims."""
    head = ["claim", "data (seeds)", "the paper's difference, points", "ours (95 % interval)"]
    head += ["verdict", "CPU-hours", "command"]
    rows = []
    for each in measured:
        claim = each.claim
        command = f"python -m experiments.run experiments/{claim.folder}/grid.yaml --only"
        for statement in claim.statements:
            for data in claim.scores:
                found, lines = each.differences[statement.text, data]
                seeds = len({line["seed"] for line in lines})
                ours = "<br>".join(one.text for one in found)
                verdicts = "<br>".join(f"{one.score}: {one.verdict}" for one in found)
                rows.append(
                    [
                        f"[{claim.name}](#{claim.name.lower()}) {statement.text}",
                        claim.name_of(data) + (f" ({seeds})" if seeds else ""),
                        paper_text(statement.paper),
                        ours or NOT_RUN,
                        verdicts or NOT_RUN,
                        f"{cpu_hours(lines):.1f}" if lines else "–",
                        f"`{command} {' '.join(f'{data}-{name}' for name in statement.pair)}`",
                    ]
                )
    return markdown(head, rows)


def count_verdicts(measured: list[Measured]) -> tuple[int, int, str]:
    """Count the differences of several seeds, those of one seed, and the verdicts on the first.

    The last is a text, such as "2 holds, 1 open".
    """
    counts = Counter(
        one.verdict for each in measured for rows, _ in each.differences.values() for one in rows
    )
    single = counts.pop(ONE_SEED, 0)
    listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return counts.total(), single, listed


def cost_table(claim: Claim, found: dict[str, list[dict]]) -> str:
    """Return parameters and processor time of a claim's `cost` settings; "" without results.

    The times are those of the seeds that all these settings have, because processors differ.
    """
    head = ["setting", "trained parameters", "all, without X- and Y-Encoder", "Y-Encoder"]
    head += ["Y-Decoder", "rows seen", "training, CPU-s", "Y-Decoder's training, CPU-s"]
    head += ["evaluation, CPU-s"]
    rows = []
    names = [f"{data}-{setting}" for data in claim.scores for setting in claim.cost]
    by_setting = [found[name] for name in names if name in found]
    if not by_setting:
        return ""
    seeds = set.intersection(*({line["seed"] for line in same} for same in by_setting))
    shared = [[line for line in same if line["seed"] in seeds] for same in by_setting]
    for same in filter(None, shared):
        parts = same[0]["parameters"]
        own = sum(parts.values()) - parts.get("x_encoder", 0) - parts.get("y_encoder", 0)
        own -= parts.get("y_decoder", 0)
        used = [line["process_cpu_seconds"] for line in same]
        rows.append(
            [
                same[0]["setting"],
                f"{same[0]['trainable_parameters'] / 1e6:.2f} M",
                f"{own / 1e6:.2f} M",
                f"{parts.get('y_encoder', 0) / 1e6:.2f} M",
                f"{parts.get('y_decoder', 0) / 1e6:.2f} M",
                number(same[0]["rows"]),
                *(
                    number(average(used, lambda each, key=key: each.get(key, 0)))
                    for key in ("training", "decoder", "evaluation")
                ),
            ]
        )
    if not rows:
        return ""
    devices = {line["device"] for same in shared for line in same}
    listed = ", ".join(map(str, sorted(seeds)))
    return f"{markdown(head, rows)}\n\nTimes of the seeds {listed} on {'; '.join(sorted(devices))}."


def query_table(folder: Path) -> str:
    """Return the processor time of a query, of the last line of `experiments.cost`; "" without."""
    path = folder / COST
    if not path.is_file():
        return ""
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    rows = [
        [model, part, number(time)]
        for model, parts in line["milliseconds"].items()
        for part, time in parts.items()
    ]
    table = markdown(["model", "part", "CPU-milliseconds of one query"], rows)
    return f"{table}\n\n{line['device']}; rows of {line['rows']}."


def scores_table(claim: Claim, data: str, found: dict[str, list[dict]]) -> str:
    """Return the scores of a claim's settings on a data set, with their baselines; "" without
    results.

    A baseline without the clip, such as "question only", shows what a model has learnt from clips.
    One that is equal for all settings has a row of its own.
    """
    names = dict.fromkeys(f"{data}-{name}" for row in claim.statements for name in row.pair)
    measured = {name: found[name] for name in names if name in found}
    lines = [line for of_setting in measured.values() for line in of_setting]
    scores = {name: key for name, key in claim.scores[data].items() if has_items(lines, key)}
    if not scores:
        return ""
    baselines = {name: baselines_of(lines, key) for name, key in scores.items()}
    equal = {
        name: {each for each, values in of.items() if are_equal(values, len(lines))}
        for name, of in baselines.items()
    }
    rows = []
    for setting, of_setting in measured.items():
        cells = []
        for name, key in scores.items():
            mean = in_points(mean_score(FOLDER / claim.folder, of_setting, key))
            own = baselines_of(of_setting, key)
            texts = [f"{each} {100 * np.mean(own[each]):.1f}" for each in own.keys() - equal[name]]
            cells.append("<br>".join([with_interval(mean), *sorted(texts)]))
        rows.append([setting, str(len(of_setting)), *cells])
    for baseline in dict.fromkeys(each for name in scores for each in sorted(equal[name])):
        values = [
            f"{100 * baselines[name][baseline][0]:.1f}" if baseline in equal[name] else "–"
            for name in scores
        ]
        rows.append([f"*{baseline}*", "", *values])
    table = markdown(["setting", "seeds", *scores], rows)
    return f"Scores on {claim.name_of(data)} in % (CIDEr x 100), and baselines:\n\n{table}"


def has_items(lines: list[dict], score: str) -> bool:
    return bool(lines) and all(score in line["items"] for line in lines)


def baselines_of(lines: list[dict], score: str) -> dict[str, list[float]]:
    """Return the values of each baseline of a score in the lines that have it."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line["scores"][score]["baselines"].items():
            found.setdefault(name, []).append(value)
    return found


def are_equal(values: list[float], number: int) -> bool:
    """Return whether there are as many values as `number`, and all are the same."""
    return len(values) == number and max(values) - min(values) < 1e-9


def in_short(each: Measured) -> str:
    """Return a line with the claim, its result and the number of each verdict."""
    several, single, counts = count_verdicts([each])
    if single:
        counts += f"{'; ' if several else ''}{single} of one seed"
    texts = [f"- **[{each.claim.name}](#{each.claim.name.lower()}) {each.claim.title}.**"]
    texts += [each.claim.short, f"({counts or NOT_RUN})"]
    return " ".join(filter(None, texts))


def page_text(measured: list[Measured], figure: Callable[[Measured], str]) -> str:
    """Return the Markdown between the markers.

    Args:
        figure: draws a claim's figure, or checks it, and returns its path from `docs`.
    """
    several, single, listed = count_verdicts(measured)
    parts = ["\n".join(map(in_short, measured)), table(measured)]
    parts.append(
        f"Comparisons: {several} of several seeds ({listed or 'no verdict'}), and {single} of one "
        "seed. None is corrected for their number: a 95 % interval excludes a difference of 0 once "
        "in 20 comparisons on average, and more often where seeds were added to open ones."
        if several or single
        else "Comparisons: none yet."
    )
    parts.append(
        f"All runs of the claims and of their searches of rates, each counted once, took "
        f"{hours_of_all():.1f} CPU-hours; preparations are not counted."
    )
    for each in measured:
        claim, found = each.claim, each.found
        parts += [f"## {claim.name}", f"**{claim.title}.**", claim.about.strip()]
        if any(rows for rows, _ in each.differences.values()):
            parts.append(f"![{claim.name}: {claim.title}]({figure(each)})")
        else:
            parts.append(f"Figure: {NOT_RUN}.")
        tables = [cost_table(claim, found), query_table(FOLDER / claim.folder)]
        tables += [scores_table(claim, data, found) for data in claim.scores]
        parts += filter(None, tables)
    return "\n\n".join(parts)


# -- figures ---------------------------------------------------------------------------------


def figure_path(claim: Claim) -> Path:
    return FIGURES / f"{claim.folder}.svg"


def draw(measured: Measured) -> Figure:
    """Draw the curves of a claim, or else its differences."""
    if measured.claim.curves:
        return draw_curves(measured.claim, measured.found)
    return draw_differences(measured)


def draw_curves(claim: Claim, found: dict[str, list[dict]]) -> Figure:
    """Draw each score over the rows seen, a row of axes for each data set with results."""
    names = [name for settings in claim.curves.values() for name in settings]
    shown = {
        data: scores
        for data, scores in claim.scores.items()
        if any(f"{data}-{name}" in found for name in names)
    }
    width = max(len(scores) for scores in shown.values())
    figure = Figure(figsize=(3.2 * width, 2.9 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), width, squeeze=False)
    for row, (data, scores) in zip(axes, shown.items(), strict=True):
        longest = max(claim.curves.values(), key=len)
        same = [found[f"{data}-{name}"] for name in longest if f"{data}-{name}" in found]
        budgets = [lines[0]["rows"] for lines in same]
        for axis, (name, score) in zip(row, scores.items(), strict=False):
            for color, settings in enumerate(claim.curves.values()):
                lines = [found.get(f"{data}-{setting}", []) for setting in settings]
                lines = [same for same in lines if same and score in same[0]["items"]]
                means = [
                    in_points(mean_score(FOLDER / claim.folder, same, score)) for same in lines
                ]
                if not means:
                    continue
                values = np.array([[mean.value, mean.low, mean.high] for mean in means])
                spread = np.abs(values[:, 1:] - values[:, :1]).T  # (2, budgets)
                seen = [same[0]["rows"] for same in lines]
                axis.errorbar(seen, values[:, 0], spread, marker="o", capsize=3, color=f"C{color}")
            axis.set(title=f"{claim.name_of(data)}: {name}", xlabel="rows seen", xscale="log")
            axis.minorticks_off()
            axis.set_xticks(budgets, [f"{rows:,}" for rows in budgets])
            axis.grid(alpha=0.3)
        for axis in row[len(scores) :]:
            axis.remove()
    axes[0][0].set_ylabel("%, CIDEr x 100")
    handles = [Line2D([], [], color=f"C{n}", marker="o") for n in range(len(claim.curves))]
    figure.legend(handles, claim.curves, loc="outside lower center", ncols=len(handles))
    return figure


def marker(color: int, verdict: str) -> dict:
    """Return the marker of a difference: hollow for one seed."""
    fill = "white" if verdict == ONE_SEED else f"C{color}"
    return {"color": f"C{color}", "marker": "o", "markerfacecolor": fill}


def draw_differences(measured: Measured) -> Figure:
    """Draw the differences of all statements, an axis for each score; those of one seed hollow."""
    claim = measured.claim
    found = {each.score for rows, _ in measured.differences.values() for each in rows}
    named = dict.fromkeys(name for scores in claim.scores.values() for name in scores)
    names = [name for name in named if name in found]
    height = 1.2 + 0.5 * len(claim.statements)
    figure = Figure(figsize=(2.2 + 2.9 * len(names), height), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for index, data in enumerate(claim.scores):
        shift = 0.3 * (index - (len(claim.scores) - 1) / 2)
        for place, statement in enumerate(claim.statements):
            for each in measured.differences[statement.text, data][0]:
                mean = each.mean
                spread = [[mean.value - mean.low], [mean.high - mean.value]]
                axis = axes[names.index(each.score)]
                look = marker(index, each.verdict)
                axis.errorbar(mean.value, place + shift, xerr=spread, capsize=3, **look)
    handles = {}
    for (_, data), (rows, _) in measured.differences.items():
        for each in rows:
            look = marker([*claim.scores].index(data), each.verdict)
            name = claim.name_of(data) + (f" ({ONE_SEED})" if each.verdict == ONE_SEED else "")
            handles[name] = Line2D([], [], **look)
    for axis, name in zip(axes, names, strict=True):
        for place, statement in enumerate(claim.statements):
            given = statement.paper.get(name)
            if isinstance(given, int | float):
                handles["paper"] = axis.plot(given, place, "kx")[0]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=name, xlabel="difference, points")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set(
        yticks=range(len(claim.statements)),
        yticklabels=[row.text for row in claim.statements],
        ylim=(len(claim.statements) - 0.5, -0.5),  # the first statement is on top
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


# -- the command -----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    args = parser.parse_args(argv)
    claims, around = read_claims(), split_page(PAGE, BEGIN, END)

    def figure(measured: Measured) -> str:
        claim = measured.claim
        shown = replace(claim, about="", short="")
        drawn_from = f"{digest_of(FOLDER / claim.folder)} {digest(repr(shown).encode())}"
        path = figure_path(claim)
        if args.check:
            if not path.is_file() or drawn_from not in path.read_text(encoding="utf-8"):
                raise ReportError(f"{path}: not of these results. Run experiments.evidence.")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context({"svg.hashsalt": "experiments"}):
                metadata = {"Date": None, "Description": drawn_from}
                draw(measured).savefig(path, metadata=metadata)
        return str(path.relative_to(PAGE.parent))

    results = page_text([Measured.of(claim) for claim in claims], figure)
    write_page(PAGE, around, results, check=args.check, command="experiments.evidence")


if __name__ == "__main__":
    try:
        main()
    except (GridError, OSError, ReportError, ValueError) as error:
        sys.exit(f"error: {error}")
