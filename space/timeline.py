"""The watched part of a video as HTML: a curve over time, its segments, and a row for each.

Positions and widths are percentages of the video's length, so the drawing fits a page of any width.
Colors are the theme's, so it is legible in light and dark. A click on an element with `data-seek`
moves the video to that second (`script.html`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Protocol

MIN_TOP = 0.2  # a curve's axis ends here or higher: with a lower end, noise would look like change
STEPS = (0.5, 1, 2, 5, 10, 15, 30, 60)  # seconds between the marks of the time axis
MAX_MARKS = 8  # on the time axis
WIDTH, HEIGHT = 1000, 100  # units of the drawing, which is stretched to the page
GOLDEN_ANGLE = 137.5  # between the hues of texts, so that neighbours differ clearly
AGREEMENT = (
    "Agreement within the segment: how similar the embeddings of its windows are, from 0 to 1. It "
    "does not measure whether the text is true."
)

Event = tuple[float, str]  # its end in seconds, and its text


class Shown(Protocol):
    """A part of a video and its text, with the attributes of `Segment`."""

    start_time: float
    end_time: float
    text: str
    confidence: float


@dataclass
class Curve:
    """Change of the embedding from each window to the next, 1 - cosine.

    Attributes:
        times (`list[float]`): middles of the windows in seconds.
        changes (`list[float]`): change since the previous window; 0 for the first.
    """

    times: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)


def clock(seconds: float) -> str:
    """Return minutes, seconds and tenths: `1:04.2`."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def span(start: float, end: float) -> str:
    """Return two times: `0:02.0 – 1:05.2`."""
    return f"{clock(start)} – {clock(end)}"


def hues(segments: Sequence[Shown]) -> dict[str, float]:
    """Return a hue in degrees for each distinct text, in the order of appearance."""
    texts = dict.fromkeys(segment.text for segment in segments)
    return {text: (250 + GOLDEN_ANGLE * index) % 360 for index, text in enumerate(texts)}


def draw(
    curve: Curve,
    segments: Sequence[Shown],
    seconds: float,
    *,
    open_since: float | None = None,
    marked: tuple[float, float] | None = None,
) -> str:
    """Return the timeline of a video: the curve, the track of segments, and the time axis.

    Args:
        curve ([`Curve`])
        segments (`list[Segment]`): closed ones.
        seconds (`float`): length of the video.
        open_since (`float`, *optional*): start of the open segment; `None` if the video was
            watched to its end.
        marked (`tuple[float, float]`, *optional*): start and end of a segment to highlight.
    """
    now = curve.times[-1] if curve.times else 0.0
    # Frames may be later than the header's length; 0.1, because a single frame may last 0 seconds.
    length = max(seconds, now, *(segment.end_time for segment in segments), 0.1)

    def percent(time: float) -> str:
        return f"{100 * time / length:.2f}%"

    def extent(start: float, end: float) -> str:
        return f"left:{percent(start)};width:{percent(end - start)}"

    top = max([MIN_TOP, *curve.changes])
    bounds = [percent(segment.start_time) for segment in segments[1:]]
    if open_since:  # at 0 every segment is still open: nothing to separate
        bounds.append(percent(open_since))
    parts = [
        '<figure class="timeline"><figcaption><b>Change of meaning</b>'
        "<span>1 − cosine similarity to the previous window</span></figcaption>",
        f'<div class="plot"><span class="top">{top:.1f}</span><span class="zero">0</span>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Change of the embeddings over {clock(length)}">',
        *paths(curve, length, top),
        "</svg>",
        *(f'<i class="bound" style="left:{left}"></i>' for left in bounds),
    ]
    if open_since is not None:
        parts.append(f'<i class="ahead" style="{extent(now, length)}"></i>')
    parts.append('<i class="played"></i></div><div class="track">')
    colors = hues(segments)
    for segment in segments:
        when = span(segment.start_time, segment.end_time)
        parts.append(
            f'<button style="{extent(segment.start_time, segment.end_time)};'
            f'--hue:{colors[segment.text]:.0f}" data-seek="{segment.start_time:.2f}" '
            f'title="{when}: {escape(segment.text)}"><span>{escape(segment.text)}</span></button>'
        )
    if open_since is not None:
        # A boundary may be later than the middle of the last window.
        parts.append(f'<i class="open" style="{extent(open_since, max(now, open_since))}"></i>')
    if marked is not None:
        parts.append(f'<i class="marked" style="{extent(*marked)}"></i>')
    parts.append('</div><div class="axis">')
    parts += (f'<span style="left:{percent(time)}">{mark}</span>' for time, mark in marks(length))
    parts.append("</div></figure>")
    return "".join(parts)


def paths(curve: Curve, length: float, top: float) -> Iterator[str]:
    """Yield the curve as a filled shape and a line, in the drawing's units."""
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
    """Return round times for the axis, each with its label."""
    step = next((step for step in STEPS if length / step <= MAX_MARKS), STEPS[-1])
    count = int(length / step) + 1
    tenths = step < 1
    return [
        (number * step, clock(number * step) if tenths else clock(number * step)[:-2])
        for number in range(count)
    ]


def rows(
    segments: Sequence[Shown],
    open_since: float | None = None,
    events: Sequence[Event] | None = None,
) -> str:
    """Return a row for each segment: its times, its text, and the agreement within it.

    Args:
        events (`list[Event]`, *optional*): the true events, if they are known. A segment shows
            those that end in it.
    """
    colors = hues(segments)
    limits = [segment.end_time for segment in segments]
    if limits and open_since is None:
        limits[-1] = float("inf")  # an event may end with the video's last frame
    lines = [
        f'<li style="--hue:{colors[segment.text]:.0f}">'
        f'<button data-seek="{segment.start_time:.2f}">'
        f"{span(segment.start_time, segment.end_time)}</button>"
        f"<b>{escape(segment.text)}{truth(segment, limit, events)}</b>"
        f'<span class="agreement" title="{AGREEMENT}"><i style="width:{segment.confidence:.1%}">'
        f"</i></span><small>{segment.confidence:.2f}</small></li>"
        for segment, limit in zip(segments, limits, strict=True)
    ]
    if open_since is not None:
        lines.append(f'<li class="open"><button>{clock(open_since)} – …</button><b>…</b></li>')
    if not lines:
        return ""
    head = "<span>Time</span><span>Text</span><span>Agreement within the segment</span>"
    return (
        f'<div class="segments-head">{head}</div><ol class="segments">{"".join(lines)}</ol>'
        f'<p class="legend">{AGREEMENT}</p>'
    )


def truth(segment: Shown, limit: float, events: Sequence[Event] | None) -> str:
    """Return the events that end in a segment, before `limit`, or a mark if its text is one."""
    if events is None:
        return ""
    inside = [text for time, text in events if segment.start_time <= time < limit]
    if segment.text in inside:
        return '<em class="right">✓ true</em>'
    return f"<em>true event: {escape('; '.join(inside) or 'none ends here')}</em>"


def counts(windows: int, decodes: int, status: str, notes: Sequence[str] = ()) -> str:
    """Return the numbers of windows and texts, compared with decoding every window."""
    ratio = f"{windows / decodes:.1f} per segment" if decodes else "one per window"
    tiles = (
        (windows, "windows embedded", escape(status)),
        (decodes, "texts decoded", "one per segment"),
        (windows, "texts with uniform decoding", ratio),
    )
    shown = "".join(
        f"<div><b>{number}</b><span>{name}</span><small>{note}</small></div>"
        for number, name, note in tiles
    )
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="counts">{shown}</div>{paragraphs}'
