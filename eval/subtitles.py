"""Write captions as subtitles: SubRip (`.srt`) and WebVTT (`.vtt`), for any player.

A caption is `{"start", "end", "text"}` with seconds, as the `streaming-caption` pipeline yields it.
In both formats an empty line ends a cue and `-->` marks its times, so a text is written as one line
without `-->`. WebVTT has escapes for its markup. SubRip has none: characters that a player would
read as markup are replaced by similar ones.

No library is used, since none is safe for any text and any length: pysubs2 ends at 100 hours and
drops `{…}`, webvtt-py does not escape markup, and srt writes SubRip only. After the cleaning, each
format is one line of code.
"""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LOOK_ALIKES = str.maketrans("<>{}", "‹›()")  # also of `-->`
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """Replace line breaks and control characters, which could end a cue or steer a terminal."""
    return " ".join(CONTROL.sub(" ", text).split())


def clock(seconds: float, decimals: int = 3, point: str = ".") -> str:
    """Return `HH:MM:SS.mmm`, with more digits for hours from 100.

    Raises: `ValueError` for negative times.
    """
    if seconds < 0:
        raise ValueError(f"a caption is at {seconds} seconds: give times from 0.")
    # Rounded before it is divided: 59.9996 is the next minute, not second 60.
    whole, part = divmod(round(seconds * 10**decimals), 10**decimals)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours:02}:{minutes:02}:{whole % 60:02}{point}{part:0{decimals}}"


def cues(captions: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Return start, end and text of the captions that have a text, as one line.

    A cue lasts at least a millisecond: WebVTT does not allow a cue that ends where it starts.
    """
    lines = [(each, one_line(each["text"])) for each in captions]
    return [
        (each["start"], max(each["end"], each["start"] + 0.001), text)
        for each, text in lines
        if text
    ]


def srt(captions: Iterable[Mapping[str, Any]]) -> str:
    """Return captions as SubRip; those without a text are left out."""
    return "".join(
        f"{index}\n{clock(start, point=',')} --> {clock(end, point=',')}\n"
        f"{text.translate(LOOK_ALIKES)}\n\n"
        for index, (start, end, text) in enumerate(cues(captions), 1)
    )


def vtt(captions: Iterable[Mapping[str, Any]]) -> str:
    """Return captions as WebVTT; those without a text are left out."""
    body = [
        f"{clock(start)} --> {clock(end)}\n{html.escape(text, quote=False)}\n\n"
        for start, end, text in cues(captions)
    ]
    return "".join(["WEBVTT\n\n", *body])


def write_subtitles(folder: Path, captions: list[Mapping[str, Any]]) -> None:
    """Write `captions.srt` and `captions.vtt` in a folder."""
    (folder / "captions.srt").write_text(srt(captions), encoding="utf-8")
    (folder / "captions.vtt").write_text(vtt(captions), encoding="utf-8")


__all__ = ["clock", "one_line", "srt", "vtt", "write_subtitles"]
