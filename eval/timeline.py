"""A picture of a stream: when its embeddings moved, and what was said of the time in between."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eval.subtitles import clock, one_line

MOST_ROWS = 150  # of a picture that can still be looked at
LETTERS = 90  # of a text


def timeline(
    captions: Sequence[Mapping[str, Any]], times: Sequence[float], changes: Sequence[float]
) -> Figure:
    """Segments as bars along time, each in a row of its own with its text; above them the change
    from one window to the next, 1 - cosine of their embeddings, at the later one's time.

    Of more than `MOST_ROWS` segments, the longest are shown, and the picture says so.
    """
    longest = sorted(captions, key=lambda each: each["start"] - each["end"])[:MOST_ROWS]
    shown = [each for each in captions if each in longest]
    height = 0.27 * len(shown)
    figure = Figure(figsize=(13, 3.2 + height), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, max(height, 0.5)])
    for axes in (above, below):
        for each in captions[1:]:
            axes.axvline(each["start"], color="#e2e8f0", linewidth=0.8, zorder=0)
    above.plot(times, changes, color="#2563eb", linewidth=1)
    above.set_ylabel("change of meaning\n(1 - cosine)")
    above.set_ylim(bottom=0)
    draw_segments(below, shown)
    few = "" if len(shown) == len(captions) else f"the {len(shown)} longest of "
    below.set_ylabel(f"{few}{len(captions)} segments")
    below.set_xlabel("time")
    below.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(max(seconds, 0), 1)))
    return figure


def draw_segments(axes: Any, captions: Sequence[Mapping[str, Any]]) -> None:
    """One bar per row, and at the end of the row its text."""
    rows, end = range(len(captions)), max((each["end"] for each in captions), default=0.0) or 1.0
    starts = [each["start"] for each in captions]
    lengths = [each["end"] - each["start"] for each in captions]
    axes.hlines(rows, starts, end, color="#e2e8f0", linewidth=0.8, zorder=0)
    axes.barh(rows, lengths, left=starts, color="#2563eb", height=0.7)
    texts = [one_line(each["text"]) or "(no words)" for each in captions]
    axes.yaxis.tick_right()
    axes.set_yticks(
        rows,
        [shortened(text) for text in texts],
        fontsize=8,
        parse_math=False,  # two dollar signs are no formula
    )
    axes.tick_params("y", length=0)
    axes.set_xlim(0, end)
    axes.set_ylim(len(captions) - 0.4, -0.6)


def shortened(text: str) -> str:
    """At most `LETTERS` of a text, cut between words where there are any."""
    words = textwrap.shorten(text, LETTERS, placeholder=" …")
    # Of a script without spaces, all of a text is one word, and nothing would be left of it.
    return words if len(words) > LETTERS // 2 or len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


__all__ = ["timeline"]
