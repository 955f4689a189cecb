"""Show results: tables for the terminal, and one HTML file without any other file."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from eval.page import png, render, strip
from eval.results import Example, Score, TaskResult
from eval.tasks import TASKS
from processing import Excerpt, read_clip, read_image
from processing.images import media_kind
from processing.rows import Media

COLOURS = {"uniform": "#64748b", "selective": "#2563eb", "online": "#16a34a"}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def text_tables(results: list[TaskResult]) -> str:
    """Return one table per kind of benchmark: scores, intervals and baselines, then the protocol.

    A CIDEr of 1.2 is shown as 120, as usual.
    """
    tables = []
    for task in dict.fromkeys(result.task for result in results):
        family = [result for result in results if result.task == task]
        names = list(next(iter(family[0].scores.values())).baselines)
        rows = [["benchmark", "metric", "score", "95 % interval", "n", "clusters", *names]]
        for result in family:
            rows += [_cells(result.name, metric, score) for metric, score in result.scores.items()]
            rows += [_cells("", f"  {name}", score) for name, score in result.by_type.items()]
        compared = [
            f"{result.name}: {name}: {_facts(numbers)}"
            for result in family
            for name, numbers in result.comparisons.items()
        ]
        protocols = [f"{result.name}: {_facts(_protocol(result))}" for result in family]
        tables.append("\n".join([f"{task} (in %)", aligned(rows), "", *compared, *protocols]))
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
            "facts": _facts,
        },
        model_name=model_name,
        results=results,
        baselines=list(
            dict.fromkeys(
                name
                for result in results
                for score in result.scores.values()
                for name in score.baselines
            )
        ),
        curve_charts={result.name: curve_chart(result) for result in results},
        type_charts={result.name: type_chart(result.by_type) for result in results},
        layouts={kind.name: kind.examples for kind in TASKS.values()},
        loss_curve=loss_curve(trainer_state) if trainer_state.is_file() else None,
    )
    path.write_text(page, encoding="utf-8")


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
    *_, baseline = scores[0].baselines
    values = np.array([score.value for score in scores])
    reach = np.array([[s.value - s.low for s in scores], [s.high - s.value for s in scores]])
    compared = [100 * score.baselines[baseline] for score in scores]
    error = np.maximum(100 * reach, 0)  # rounding can make a reach of 0 slightly negative
    axes.barh(rows - 0.2, 100 * values, 0.4, xerr=error, color="#2563eb", label="model")
    axes.barh(rows + 0.2, compared, 0.4, color="#cbd5e1", label=baseline)
    axes.set_yticks(rows, [f"{name} ({score.n})" for name, score in by_type.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %, with 95 % interval")
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
            axes.plot(*zip(*logged, strict=True), style, label=label)
    if not axes.lines:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE")
    axes.legend(frameon=False)
    return figure


def _cells(name: str, metric: str, score: Score) -> list[str]:
    interval = f"{percent(score.low)} - {percent(score.high)}"
    baselines = map(percent, score.baselines.values())
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


def _facts(facts: dict[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


__all__ = ["aligned", "loss_figure", "percent", "text_tables", "write_report"]
