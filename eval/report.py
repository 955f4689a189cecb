"""Show results: tables for the terminal, and one HTML file without any other file.

Each result is compared with its baselines, and with the numbers of the paper if the paper has the
benchmark.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from eval.page import png, render, strip
from eval.results import Example, Score, TaskResult
from eval.tasks import TASKS
from processing import Excerpt, read_clip, read_image
from processing.images import media_kind
from processing.rows import Media

OWN = "this model"
COLOURS = {"uniform": "#64748b", "selective": "#2563eb", "online": "#16a34a"}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def text_tables(results: list[TaskResult]) -> str:
    """Return one table per kind of benchmark: scores, intervals and baselines, then the protocol.

    A CIDEr of 1.2 is shown as 120, as usual. Results have the paper's name only where they can be
    compared with the paper's; its numbers follow the table.
    """
    tables = []
    for task in dict.fromkeys(result.task for result in results):
        family = [result for result in results if result.task == task]
        names = baselines_of(family)
        rows = [["benchmark", "metric", "score", "95 % interval", "n", "clusters", *names]]
        for result in family:
            for metric, score in result.scores.items():
                rows.append(_cells(result.title, metric, score, names))
            for name, score in result.by_type.items():
                rows.append(_cells("", f"  {name}", score, names))
        compared = [
            f"{result.name}: {name}: {_facts(numbers)}"
            for result in family
            for name, numbers in result.comparisons.items()
        ]
        published = [
            f"{result.title}: {chart.title}, published: {chart.published_line()}"
            for result in family
            for chart in charts_of(result)
            if chart.published_line()
        ]
        protocols = [f"{result.name}: {_facts(_protocol(result))}" for result in family]
        lines = [f"{task} (in %)", aligned(rows), "", *published, *compared, *protocols]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def write_report(
    path: Path, model_name: str, results: list[TaskResult], trainer_state: Path
) -> None:
    """Write `report.html`, with the loss curve of the file `trainer_state` if it exists."""
    page = render(
        Path(__file__).with_name("report_template.html"),
        {
            "percent": percent,
            "strip": frame_strip,
            "kind": kind_of,
            "shared_kind": shared_kind,
            "protocol": _protocol,
            "published": _published,
            "facts": _facts,
        },
        model_name=model_name,
        results=results,
        baselines=baselines_of(results),
        has_paper=any(result.paper for result in results),
        charts={result.name: charts_of(result) for result in results},
        curve_charts={result.name: curve_chart(result) for result in results},
        type_charts={result.name: type_chart(result.by_type) for result in results},
        layouts={kind.name: kind.examples for kind in TASKS.values()},
        loss_curve=loss_curve(trainer_state) if trainer_state.is_file() else None,
    )
    path.write_text(page, encoding="utf-8")


def baselines_of(results: list[TaskResult]) -> list[str]:
    """Return the names of the baselines of any score: not every score has all of them."""
    scores = [
        score for result in results for score in (*result.scores.values(), *result.by_type.values())
    ]
    return list(dict.fromkeys(name for score in scores for name in score.baselines))


@dataclass(frozen=True)
class Bar:
    """One number of a bar chart.

    Attributes:
        name (`str`): a model, or a baseline of the benchmark.
        value (`float`, *optional*): from 0 to 1, or a CIDEr; None if it was not measured.
        kind (`str`): `"own"`, `"baseline"` or `"paper"`.
        low, high (`float`, *optional*): 95 % interval.
    """

    name: str
    value: float | None
    kind: Literal["own", "baseline", "paper"]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """A bar chart of one metric: this model, the benchmark's baselines, and the paper's models.

    Attributes:
        title (`str`): the metric, or a part of the benchmark.
        bars (`list[Bar]`)
    """

    title: str
    bars: list[Bar]

    @property
    def top(self) -> float:
        """The end of the axis: 1, or more for a CIDEr."""
        ends = [bar.value if bar.high is None else bar.high for bar in self.bars]
        return max([1.0, *(end for end in ends if end is not None)])

    def published_line(self) -> str:
        """Return the numbers of the paper in one line; empty if there are none."""
        of_paper = [bar for bar in self.bars if bar.kind == "paper"]
        return ", ".join(f"{bar.name} {percent(bar.value)}" for bar in of_paper)


def charts_of(result: TaskResult) -> list[Chart]:
    """Return the bar charts of a result: its main metric, and the parts that the paper states.

    A part is a type of rows, or another metric.

    The main metric is the paper's, or the first one.
    """
    paper = result.paper or {"metric": next(iter(result.scores)), "scores": {}, "parts": {}}
    main = [(paper["metric"], result.scores.get(paper["metric"]), paper["scores"])]
    parts = [
        (name, result.by_type.get(name) or result.scores.get(name), models)
        for name, models in paper["parts"].items()
    ]
    return [Chart(title, _bars(score, models)) for title, score, models in [*main, *parts]]


def _bars(score: Score | None, published: dict[str, float]) -> list[Bar]:
    """Return this model's bar, those of its baselines, and the published ones, given in percent."""
    bars = [Bar(OWN, None, "own")]
    if score is not None:
        bars = [Bar(OWN, score.value, "own", score.low, score.high)]
        bars += [Bar(name, value, "baseline") for name, value in score.baselines.items()]
    return bars + [Bar(name, value / 100, "paper") for name, value in published.items()]


def kind_of(media: Media) -> str:
    """Return "video" or "image"."""
    return "video" if isinstance(media, Excerpt) else media_kind(media)


def shared_kind(examples: list[Example]) -> str:
    """Return the kind of all clips of retrieval examples, or "clip" if there are both kinds."""
    kinds = {kind_of(path) for each in examples for path, _ in each.ranked}
    return kinds.pop() if len(kinds) == 1 else "clip"


@cache
def frame_strip(media: Media, num_frames: int) -> str:
    """Return frames of a clip side by side, or an image, as a data URI."""
    if isinstance(media, Excerpt):
        return strip(read_clip(media.video, num_frames, start=media.start, end=media.end).frames)
    return strip(
        read_image(media) if kind_of(media) == "image" else read_clip(media, num_frames).frames
    )


def type_chart(by_type: dict[str, Score]) -> str | None:
    """Draw the score of each type with its interval, and the last of its baselines."""
    if not by_type:
        return None
    figure = Figure(figsize=(5, 0.8 + 0.5 * len(by_type)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(by_type))
    scores = list(by_type.values())
    *_, baseline = scores[0].baselines or [None]
    values = np.array([score.value for score in scores])
    reach = np.array([[s.value - s.low for s in scores], [s.high - s.value for s in scores]])
    error = np.maximum(100 * reach, 0)  # rounding can make a reach of 0 slightly negative
    axes.barh(rows - 0.2, 100 * values, 0.4, xerr=error, color="#2563eb", label="model")
    if baseline is not None:
        compared = [100 * score.baselines[baseline] for score in scores]
        axes.barh(rows + 0.2, compared, 0.4, color="#cbd5e1", label=baseline)
    axes.set_yticks(rows, [f"{name} ({score.n})" for name, score in by_type.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("score in %, with 95 % interval")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return png(figure)


def curve_chart(result: TaskResult) -> str | None:
    """Draw CIDEr over the mean time between decodes, as in the paper's figure 4."""
    if not result.curves:
        return None
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in result.curves.items():
        rates, ciders = zip(*points, strict=True)
        seconds, scores = [1 / rate for rate in rates], [100 * each for each in ciders]
        style = "--" if name.endswith("pool") else "-"
        axes.plot(seconds, scores, style, color=COLOURS[name.split()[0]], label=name)
    axes.axvline(1 / result.numbers["reference rate"], color="#cbd5e1", zorder=0, label="reference")
    axes.set_xscale("log")
    axes.set_xlabel("mean seconds between decodes")
    axes.set_ylabel("CIDEr")
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)


def loss_curve(trainer_state: Path) -> str | None:
    """Return the `loss_figure` of a saved training log as a data URI."""
    history = json.loads(trainer_state.read_text(encoding="utf-8"))["log_history"]
    figure = loss_figure(history)
    return None if figure is None else png(figure)


def loss_figure(history: list[dict]) -> Figure | None:
    """Draw the training loss with the loss at chance level; return None if no loss was logged."""
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "loss", "-"), ("chance_loss", "chance", "--")):
        logged = [(entry["step"], entry[key]) for entry in history if key in entry]
        if logged:
            marker = "o" if len(logged) == 1 else ""  # a line of one point would not be seen
            axes.plot(*zip(*logged, strict=True), style, marker=marker, label=label)
    if not axes.lines:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE")
    axes.legend(frameon=False)
    return figure


def _cells(name: str, metric: str, score: Score, names: list[str]) -> list[str]:
    """Return a row of the table; `names` are those of the baselines."""
    interval = f"{percent(score.low)} - {percent(score.high)}"
    known = score.baselines
    baselines = [percent(known[each]) if each in known else "" for each in names]
    counts = [str(score.n), str(score.clusters)]
    return [name, metric, percent(score.value), interval, *counts, *baselines]


def aligned(rows: list[list[str]]) -> str:
    """Align a table: the two columns of text to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _protocol(result: TaskResult) -> dict[str, str]:
    """Return the facts of a measurement, by names with spaces."""
    facts = {**result.protocol, **result.ranks, **result.numbers, "skipped": len(result.skipped)}
    return {
        name.replace("_", " "): "(empty)" if value == "" else str(value)
        for name, value in facts.items()
    }


def _published(result: TaskResult) -> dict[str, str]:
    """Return the facts about a benchmark in the paper, by names with spaces."""
    paper = result.paper
    pool = "not stated" if result.pool_expected is None else f"{result.pool_expected:,}"
    facts = {
        "published in": paper["table"],
        f"{paper['unit']} measured": f"{result.pool:,}",
        f"{paper['unit']} of the paper": pool,
        "left open there": paper["open"],
        "chosen here": paper["choice"],
        "data": paper["terms"],
    }
    return {name: value for name, value in facts.items() if value}


def _facts(facts: dict[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


__all__ = [
    "Bar",
    "Chart",
    "aligned",
    "charts_of",
    "loss_figure",
    "percent",
    "text_tables",
    "write_report",
]
