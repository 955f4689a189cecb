"""Captions as subtitles: SubRip (`.srt`) and WebVTT (`.vtt`), for any player.

A caption is `{"start", "end", "text"}` with seconds, as the `streaming-caption` pipeline yields it.
Both formats end a cue at an empty line and find its times by `-->`, so a text becomes one line in
which neither is left. WebVTT has escapes for its markup; SubRip has none, and what a player would
read as markup is written in letters that look alike.
"""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LOOK_ALIKES = str.maketrans("<>{}", "‹›()")  # also of `-->`
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """A text without line breaks, and without characters that would steer a terminal."""
    return " ".join(CONTROL.sub(" ", text).split())


def clock(seconds: float, decimals: int = 3, point: str = ".") -> str:
    """`HH:MM:SS.mmm`; of hours there are as many digits as needed, at least two.

    Raises: `ValueError` for times before the beginning.
    """
    if seconds < 0:
        raise ValueError(f"a caption is at {seconds} seconds: times begin at 0.")
    # Rounded as a whole: 59.9996 is the next minute, not second 60.
    whole, part = divmod(round(seconds * 10**decimals), 10**decimals)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours:02}:{minutes:02}:{whole % 60:02}{point}{part:0{decimals}}"


def cues(captions: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Start, end and text of what has words, on one line each.

    A cue lasts a millisecond at least: one that ends where it starts is against WebVTT's rules.
    """
    lines = [(each, one_line(each["text"])) for each in captions]
    return [
        (each["start"], max(each["end"], each["start"] + 0.001), text)
        for each, text in lines
        if text
    ]


def srt(captions: Iterable[Mapping[str, Any]]) -> str:
    """SubRip; captions without words are left out, as there is nothing to show."""
    return "".join(
        f"{number}\n{clock(start, point=',')} --> {clock(end, point=',')}\n"
        f"{text.translate(LOOK_ALIKES)}\n\n"
        for number, (start, end, text) in enumerate(cues(captions), 1)
    )


def vtt(captions: Iterable[Mapping[str, Any]]) -> str:
    """WebVTT; captions without words are left out, as there is nothing to show."""
    body = [
        f"{clock(start)} --> {clock(end)}\n{html.escape(text, quote=False)}\n\n"
        for start, end, text in cues(captions)
    ]
    return "".join(["WEBVTT\n\n", *body])


def write_subtitles(folder: Path, captions: list[Mapping[str, Any]]) -> None:
    """`captions.srt` and `captions.vtt` in a folder."""
    (folder / "captions.srt").write_text(srt(captions), encoding="utf-8")
    (folder / "captions.vtt").write_text(vtt(captions), encoding="utf-8")


__all__ = ["clock", "one_line", "srt", "vtt", "write_subtitles"]
