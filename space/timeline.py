"""What a model saw of a video, as HTML: a curve over time, the segments below it, and their rows.

Widths and places are shares of the video's length, so that a page of any width shows it, and colors
are the theme's, so that it is legible in the light and in the dark. Everything with `data-seek`
makes the video go there: see `page.html`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Protocol

LEAST_TOP = 0.2  # of the curve's axis: what is calm looks calm
STEPS = (0.5, 1, 2, 5, 10, 15, 30, 60)  # seconds between the marks of the time axis
MARKS = 8  # of the time axis, at most
WIDTH, HEIGHT = 1000, 100  # units of the drawing, which is stretched to the page
GOLDEN_ANGLE = 137.5  # between the hues of texts, so that no two neighbours look alike


class Shown(Protocol):
    """A stretch of a video and its text, as `Segment` has them."""

    start_time: float
    end_time: float
    text: str
    confidence: float


@dataclass
class Curve:
    """How far the embedding moves from each window to the next, 1 - cosine.

    Attributes:
        times (`list[float]`): seconds, the middles of the windows.
        changes (`list[float]`): since the window before; 0 for the first.
    """

    times: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)


def clock(seconds: float) -> str:
    """Minutes, seconds and tenths: `1:04.2`."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def span(start: float, end: float) -> str:
    return f"{clock(start)} – {clock(end)}"


def hues(segments: Sequence[Shown]) -> dict[str, float]:
    """A hue for each distinct text, in the order in which they appear."""
    texts = dict.fromkeys(segment.text for segment in segments)
    return {text: (250 + GOLDEN_ANGLE * place) % 360 for place, text in enumerate(texts)}


def draw(
    curve: Curve,
    segments: Sequence[Shown],
    seconds: float,
    *,
    open_since: float | None = None,
    marked: tuple[float, float] | None = None,
) -> str:
    """The timeline of a video.

    Args:
        curve ([`Curve`])
        segments (`list[Segment]`): closed ones.
        seconds (`float`): the length of the video.
        open_since (`float`, *optional*): where the segment begins that is not closed yet; without
            it, the video was seen to its end.
        marked (`tuple[float, float]`, *optional*): start and end of a stretch to point at.
    """
    now = curve.times[-1] if curve.times else 0.0
    length = max(seconds, now, *(segment.end_time for segment in segments), 0.1)

    def place(time: float) -> str:
        return f"{100 * time / length:.2f}%"

    def stretch(start: float, end: float) -> str:
        return f"left:{place(start)};width:{100 * (end - start) / length:.2f}%"

    top = max([LEAST_TOP, *curve.changes])
    bounds = [place(segment.start_time) for segment in segments[1:]]
    if open_since and segments:
        bounds.append(place(open_since))
    parts = [
        '<figure class="timeline"><figcaption><b>Change of meaning</b>'
        "<span>1 − cosine, from one window to the next</span></figcaption>",
        f'<div class="plot"><span class="top">{top:.1f}</span><span class="zero">0</span>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Change of the embeddings over {clock(length)}">',
        *paths(curve, length, top),
        "</svg>",
        *(f'<i class="bound" style="left:{left}"></i>' for left in bounds),
    ]
    if open_since is not None:
        parts.append(f'<i class="ahead" style="{stretch(now, length)}"></i>')
    parts.append('<i class="played"></i></div><div class="lane">')
    colors = hues(segments)
    for segment in segments:
        when = span(segment.start_time, segment.end_time)
        parts.append(
            f'<button style="{stretch(segment.start_time, segment.end_time)};'
            f'--hue:{colors[segment.text]:.0f}" data-seek="{segment.start_time:.2f}" '
            f'title="{when}: {escape(segment.text)}"><span>{escape(segment.text)}</span></button>'
        )
    if open_since is not None:
        parts.append(f'<i class="open" style="{stretch(open_since, max(now, open_since))}"></i>')
    if marked is not None:
        parts.append(f'<i class="marked" style="{stretch(*marked)}"></i>')
    parts.append('</div><div class="axis">')
    parts += (f'<span style="left:{place(time)}">{mark}</span>' for time, mark in marks(length))
    parts.append("</div></figure>")
    return "".join(parts)


def paths(curve: Curve, length: float, top: float) -> Iterator[str]:
    """The curve as a filled shape and a line, in the drawing's units."""
    points = [
        f"{WIDTH * time / length:.1f},{HEIGHT * (1 - 0.94 * change / top):.1f}"
        for time, change in zip(curve.times, curve.changes, strict=True)
    ]
    if not points:
        return
    first, last = points[0].split(",")[0], points[-1].split(",")[0]
    line = " ".join(points)
    yield f'<polygon points="{first},{HEIGHT} {line} {last},{HEIGHT}"/>'
    yield f'<polyline points="{line}" vector-effect="non-scaling-stroke"/>'


def marks(length: float) -> list[tuple[float, str]]:
    """Round times on the axis, and how they are written."""
    step = next((step for step in STEPS if length / step <= MARKS), STEPS[-1])
    count = int(length / step) + 1
    tenths = step < 1
    return [
        (number * step, clock(number * step) if tenths else clock(number * step)[:-2])
        for number in range(count)
    ]


def rows(segments: Sequence[Shown], open_since: float | None = None) -> str:
    """One line for each segment: when, what, and how sure."""
    colors = hues(segments)
    lines = [
        f'<li style="--hue:{colors[segment.text]:.0f}">'
        f'<button data-seek="{segment.start_time:.2f}">'
        f"{span(segment.start_time, segment.end_time)}</button>"
        f"<b>{escape(segment.text)}</b>"
        f'<span class="sure"><i style="width:{segment.confidence:.1%}"></i></span>'
        f"<small>{segment.confidence:.2f}</small></li>"
        for segment in segments
    ]
    if open_since is not None:
        lines.append(f'<li class="open"><button>{clock(open_since)} – …</button><b>…</b></li>')
    return f'<ol class="segments">{"".join(lines)}</ol>' if lines else ""


def counts(windows: int, decodes: int, status: str, notes: Sequence[str] = ()) -> str:
    """What was done, beside what decoding every window would have been."""
    fewer = f"{windows / decodes:.1f} × as many" if decodes else "one for every window"
    tiles = (
        (windows, "windows embedded", escape(status)),
        (decodes, "texts decoded", "one for each segment"),
        (windows, "with uniform decoding", fewer),
    )
    shown = "".join(
        f"<div><b>{number}</b><span>{name}</span><small>{note}</small></div>"
        for number, name, note in tiles
    )
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="counts">{shown}</div>{said}'
