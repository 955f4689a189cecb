"""Draw a timeline of a stream: its segments with their texts, and how fast its meaning changed."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eval.subtitles import clock, one_line

MOST_ROWS = 150  # more segments would make the picture too tall
LETTERS = 90  # per text


def timeline(
    captions: Sequence[Mapping[str, Any]], times: Sequence[float], changes: Sequence[float]
) -> Figure:
    """Draw each segment as a bar along time, in its own row with its text. Draw above them the
    change from one window to the next: 1 - cosine of their embeddings, at the later one's time.

    If there are more than `MOST_ROWS` segments, the longest are drawn, as an axis label states.
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
    """Draw one bar per row, with its text at the end of the row."""
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
        parse_math=False,  # else matplotlib reads two dollar signs as a formula
    )
    axes.tick_params("y", length=0)
    axes.set_xlim(0, end)
    axes.set_ylim(len(captions) - 0.4, -0.6)


def shortened(text: str) -> str:
    """Cut a text to at most `LETTERS` letters, between words if possible."""
    words = textwrap.shorten(text, LETTERS, placeholder=" …")
    # In a script without spaces a whole text is one word, and `shorten` would drop all of it.
    return words if len(words) > LETTERS // 2 or len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


__all__ = ["timeline"]
