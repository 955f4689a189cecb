"""Subtitles: FFmpeg reads from the files the captions that were written, for any text."""

from pathlib import Path

import av
import pytest

from eval.subtitles import clock, one_line, srt, vtt, write_subtitles

HOUR = 3600.0


def caption(start: float, end: float, text: str) -> dict:
    return {"start": start, "end": end, "text": text, "confidence": 1.0}


def parsed(path: Path) -> list[tuple[float, float, str]]:
    """Return start, end and text of every cue, read by FFmpeg's demuxer and decoder."""
    cues = []
    with av.open(path) as container:
        stream = container.streams.subtitles[0]
        for packet in container.demux(stream):
            if packet.size:
                start = float(packet.pts * packet.time_base)
                end = start + float(packet.duration * packet.time_base)
                cues.append(
                    (start, end, "".join(each.dialogue.decode() for each in packet.decode()))
                )
    return cues


def read_back(folder: Path, captions: list[dict]) -> tuple[list, list]:
    write_subtitles(folder, captions)
    return parsed(folder / "captions.srt"), parsed(folder / "captions.vtt")


def test_clock_formats_and_rounds_times_of_any_length():
    assert clock(0) == "00:00:00.000"
    assert clock(3.2, 1) == "00:00:03.2"
    assert clock(3723.004, point=",") == "01:02:03,004"
    assert clock(59.9996) == "00:01:00.000" and clock(3599.96, 1) == "01:00:00.0"
    assert clock(123 * HOUR + 1) == "123:00:01.000"
    with pytest.raises(ValueError, match="at -0.5 seconds"):
        clock(-0.5)


def test_subtitles_are_read_back_as_written(tmp_path):
    captions = [
        caption(0, 1.25, "the agent went to the red ball"),
        caption(1.25, 59.9996, "Größe, 大きい, №"),
        caption(60, 100 * HOUR, "7"),  # looks like the index of a cue
        caption(100 * HOUR, 123 * HOUR + 4.5, "NOTE nothing"),
    ]
    expected = [(each["start"], each["end"], each["text"]) for each in captions]
    expected[1] = (1.25, 60, expected[1][2])
    for found in read_back(tmp_path, captions):
        assert [each[2] for each in found] == [each[2] for each in expected]
        for cue, truth in zip(found, expected, strict=True):
            assert cue[:2] == pytest.approx(truth[:2], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "plain", "alike"),
    [
        ("from a --> b", "from a --> b", "from a --› b"),
        ("one\ntwo\r\n\r\nthree", "one two three", "one two three"),
        ("one\u2028two\x0bthree\x00\x1b[2J", "one two three [2J", "one two three [2J"),
        ("press <b> & <i>run</i>", "press <b> & <i>run</i>", "press ‹b› & ‹i›run‹/i›"),
        ("&lt;b&gt; &amp;", "&lt;b&gt; &amp;", "&lt;b&gt; &amp;"),
        ("2\n00:00:09,000 --> 00:00:10,000\nforged", None, None),
    ],
)
def test_subtitles_keep_every_text_inside_its_cue(tmp_path, text, plain, alike):
    """SubRip has no escapes: similar characters replace markup."""
    captions = [caption(0, 1, text), caption(1, 2, "next")]
    from_srt, from_vtt = read_back(tmp_path, captions)
    for found in (from_srt, from_vtt):
        assert [each[:2] for each in found] == [(0, 1), (1, 2)] and found[1][2] == "next"
    line = one_line(text)
    assert from_vtt[0][2] == (plain or line)
    assert from_srt[0][2] == (alike or line.replace(">", "›"))
    for content in (srt(captions), vtt(captions)):
        assert content.count("-->") == 2


def test_srt_replaces_braces_that_players_read_as_commands(tmp_path):
    captions = [caption(0, 1, r"go {\an8}left")]
    from_srt, from_vtt = read_back(tmp_path, captions)
    assert from_srt[0][2] == r"go (\an8)left"
    assert r"go {\an8}left" in vtt(captions)  # WebVTT gives braces no meaning
    assert len(from_vtt) == 1


def test_subtitles_leave_out_empty_texts_and_lengthen_instants(tmp_path):
    captions = [
        caption(0, 1, " \n "),
        caption(1, 1, "an instant"),
        caption(1, 2, ""),
        caption(2, 3, "after"),
    ]
    for found in read_back(tmp_path, captions):
        assert [each[2] for each in found] == ["an instant", "after"]
        assert found[0][:2] == pytest.approx((1, 1.001), abs=1e-6)
    assert srt(captions).startswith("1\n00:00:01,000") and "\n2\n00:00:02,000" in srt(captions)
    assert srt([]) == "" and vtt([]) == "WEBVTT\n\n"
