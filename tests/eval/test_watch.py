"""The command that watches: what it prints and writes is what the pipeline says."""

import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.subtitles import clock, one_line, srt, vtt
from eval.timeline import MOST_ROWS, timeline
from eval.watch import Watched, main, uninterrupted, watch
from modeling_vljepa import StreamSession, WardSegmenter, stream
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPAStreamingCaptionPipeline
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow
from tests.eval.test_subtitles import parsed
from tests.pipelines.test_pipeline_streaming import QUICK, TEXTS
from tests.pipelines.test_stream_session import cut, quick, scenes
from tests.tiny import tiny_model, tiny_processor, tiny_writer, write_clip

SETTINGS = ["--segmenter", *(f"{name}={value}" for name, value in QUICK.items())]
LINE = re.compile(r"(\d\d:\d\d:\d\d\.\d) → (\d\d:\d\d:\d\d\.\d)  (.+)  \((\d\.\d\d)\)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a Y-Decoder, one without, and a clip of three scenes."""
    path = tmp_path_factory.mktemp("watch")
    for name, model in (("writer", tiny_writer()), ("mute", tiny_model())):
        model.save_pretrained(path / name)
        tiny_processor().save_pretrained(path / name)
    write_clip(path / "clip.mp4", np.stack([frame for _, frame in scenes([40, 30, 50])]))
    return path


def command(folder: Path, *options: str, model: str = "writer") -> list[str]:
    return ["--model", str(folder / model), "--source", str(folder / "clip.mp4"), *options]


def test_it_prints_and_writes_what_the_pipeline_says(folder, capsys, tmp_path):
    main(command(folder, *SETTINGS, "--query", "a", "--output", str(tmp_path / "new" / "out")))
    printed = capsys.readouterr().out.splitlines()
    pipe = VLJEPAStreamingCaptionPipeline(
        model=tiny_writer(), processor=tiny_processor(), device="cpu"
    )
    captions = list(pipe(folder / "clip.mp4", query="a", segmenter_kwargs=QUICK))
    found = [LINE.fullmatch(line).groups() for line in printed[:3]]
    for line, caption in zip(found, captions, strict=True):
        assert line[:2] == (clock(caption["start"], 1), clock(caption["end"], 1))
        assert line[2] == one_line(caption["text"])
        assert line[3] == f"{caption['confidence']:.2f}"
    assert printed[3] == (
        "59 windows of 4 frames, 3 decodes; decoding every window would have been 59"
    )
    assert printed[4] == (
        "120 frames, 0 dropped, 0 broken, 0 changes of size, 0 leaps in time, 0 stalls; "
        "the source has ended"
    )
    out = tmp_path / "new" / "out"
    names = ("captions.srt", "captions.vtt", "timeline.png")
    assert printed[5:] == [str(out / name) for name in names]
    assert (out / "captions.srt").read_text(encoding="utf-8") == srt(captions)
    assert (out / "captions.vtt").read_text(encoding="utf-8") == vtt(captions)
    for name in names[:2]:
        spans = [each[:2] for each in parsed(out / name)]
        assert np.allclose(spans, [(each["start"], each["end"]) for each in captions], atol=1e-3)
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [("--segments", "4"), ("--threshold", "0.5")])
def test_offline_it_cuts_by_wards_distance(folder, capsys, options):
    main(command(folder, *options, "--candidates", *TEXTS, "--stride", "4", model="mute"))
    printed = capsys.readouterr().out.splitlines()
    model = tiny_model()
    embedded = list(stream(model, tiny_processor(), folder / "clip.mp4", stride=4))
    times = [embedded[0].start_time, *(each.time for each in embedded[1:])]
    value = float(options[1])
    segmenter = WardSegmenter(4) if options[0] == "--segments" else WardSegmenter(threshold=value)
    embeds = torch.stack([each.embedding for each in embedded])
    expected = segmenter.segment(embeds, times, embedded[-1].end_time)
    found = [LINE.fullmatch(line).groups() for line in printed[: len(expected)]]
    assert [each[:2] for each in found] == [
        (clock(each.start_time, 1), clock(each.end_time, 1)) for each in expected
    ]
    with torch.no_grad():
        targets = model.encode_target(**tiny_processor()(targets=TEXTS))
    chosen = torch.stack([each.embedding for each in expected]) @ targets.T
    assert [each[2] for each in found] == [TEXTS[place] for place in chosen.argmax(dim=1)]
    assert printed[len(expected)].startswith(f"30 windows of 4 frames, {len(expected)} decodes;")
    assert 2 <= len(expected) <= 4


def test_an_interruption_ends_the_stream_and_not_the_captions(capsys):
    session = StreamSession(
        tiny_model(), tiny_processor(), segmenter=quick(), decode=lambda embeds: ["a\nb"]
    )

    def interrupted():
        for number, window in enumerate(session.encoder.stream(cut(scenes([40, 200])))):
            if number == 40:
                raise KeyboardInterrupt
            yield window

    watched = watch(session, interrupted(), None)
    printed = capsys.readouterr()
    assert len(watched.captions) == 2 and len(watched.times) == 40
    assert watched.captions[-1]["end"] == 40.5 and printed.err == "interrupted\n"
    assert [line.split("  ")[1] for line in printed.out.splitlines()] == ["a b", "a b"]


def test_an_interruption_waits_for_the_segment_that_is_put_into_words():
    def decode(embeds: torch.Tensor) -> list[str]:
        if not session.memories:
            signal.raise_signal(signal.SIGINT)  # while the first is
        return ["a"]

    session = StreamSession(tiny_model(), tiny_processor(), segmenter=quick(), decode=decode)
    former = signal.getsignal(signal.SIGINT)
    watched = watch(session, session.encoder.stream(cut(scenes([40, 30, 30]))), None)
    assert signal.getsignal(signal.SIGINT) is former
    first, last = watched.captions
    assert (first["start"], first["end"]) == (0, last["start"])
    assert last["end"] < 49  # of fifty seconds

    def held() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            after.append("one press")
            signal.raise_signal(signal.SIGINT)
            after.append("two")

    after = []
    with pytest.raises(KeyboardInterrupt):
        held()
    assert after == ["one press"]


def test_bad_input_is_met_with_a_sentence(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    for options, message in (
        (("--source", "gone.mp4"), "gone.mp4: no such file. Check the path."),
        (("--source", str(tmp_path / "text.mp4")), "text.mp4: cannot be opened as a video"),
        (("--source", "http://127.0.0.1/a.mp4"), "--allow-urls"),
        (("--source", "file:///a.mp4"), "file:// is not opened"),
        (("--source", "0", "--segments", "3"), "a camera has no end"),
        (("--model", "nowhere"), "--model: nowhere is no folder or Hub id"),
        (("--model", str(tmp_path / "empty")), "empty is no folder or Hub id of a VL-JEPA"),
        (("--model", str(folder / "mute")), "has no Y-Decoder"),
        (("--window", "0"), "window is 0: give at least 1 frame"),
        (("--stride", "9"), "stride is 9 and size 4"),
        (("--fps", "-1"), "fps is -1.0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--segmenter", "patience=0"), "patience is 0"),
        (("--segmenter", "patient=1"), "--segmenter: .*'patient'"),
        (("--segmenter", "window=99999999999999999999"), "give at most 2147483647"),
        (("--segmenter", "patience=much"), "patience is 'much': give a whole number"),
        (("--segmenter", "drift_threshold=abc"), "drift_threshold is 'abc'"),
        (("--segmenter", "drift_threshold=NaN"), "drift_threshold is nan"),
        (("--threshold", "nan"), "threshold is nan"),
        (("--fps", "nan"), "fps is nan"),
        (("--source", str(tmp_path)), "is a folder"),
        (("--segmenter", "patience"), "--segmenter: patience is no NAME=VALUE"),
        (("--segmenter", "patience=1", "--segments", "2"), "leave one away"),
        (("--segments", "2", "--threshold", "1"), "--segments and --threshold: each says where"),
        (("--segments", "0"), "num_segments is 0"),
        (("--output", str(folder / "clip.mp4")), "--output: .* is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            main(command(folder, *options))
    # As a command: the sentence, exit code 1, and no traceback.
    words = ["eval.watch", *command(folder, "--window", "0")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "eval.watch")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("eval.watch", run_name="__main__")
    assert stopped.value.code == "error: window is 0: give at least 1 frame."  # printed, code 1
    assert sys.stdout.errors == "replace"  # a terminal without arrows ends no watching


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[1]", "damaged is no folder or Hub id of a VL-JEPA .*'list'"),
        ("config.json", '{"model_type": "vlj', "not a valid JSON file"),
        ("model.safetensors", "half", "header"),
        ("tokenizer.json", None, "tokenizer"),
    ],
)
def test_a_damaged_model_is_named_in_one_sentence(folder, tmp_path, name, content, message):
    damaged = shutil.copytree(folder / "mute", tmp_path / "damaged")
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        main(command(folder, "--candidates", "a", "--model", str(damaged)))
    assert str(raised.value).startswith("--model: ") and "\n" not in str(raised.value)


def test_where_nothing_can_be_written_nothing_is_watched(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output: .* cannot be made"):
        main(command(folder, "--output", str(tmp_path / "file" / "out")))
    assert capsys.readouterr().out == ""


# -- the timeline --------------------------------------------------------------------------


def captions_of(count: int) -> list[dict]:
    return [
        {"start": 2.0 * i, "end": 2.0 * i + 2, "text": f"text {i}", "confidence": 1.0}
        for i in range(count)
    ]


def test_the_timeline_shows_every_segment_and_every_change():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 1]]))
    watched = Watched()
    for number, vector in enumerate(vectors):
        watched.see(EmbeddedWindow(number, number + 1, vector, torch.zeros(1, 1)))
    assert watched.times == [0.5, 1.5, 2.5, 3.5]
    half = 1 - 0.5**0.5
    assert watched.changes == pytest.approx([0, half, half, 0], abs=1e-6)

    said = captions_of(3)
    said[1]["text"] = "costs $5 or $6,\n" + "and more " * 30
    said[0]["text"] = "字" * 400  # of a script without spaces
    said[2]["text"] = " "
    above, below = timeline(said, watched.times, watched.changes).axes
    [line] = above.lines[-1:]
    assert line.get_xydata().tolist() == [
        [time, change] for time, change in zip(watched.times, watched.changes, strict=True)
    ]
    bars = [(bar.get_x(), bar.get_width()) for bar in below.patches]
    assert bars == [(0, 2), (2, 2), (4, 2)]
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels[0] == "字" * 89 + "…" and labels[2] == "(no words)"
    assert labels[1].startswith("costs $5 or $6, and more") and len(labels[1]) <= 90
    assert not any(label.get_parse_math() for label in below.get_yticklabels())
    assert below.get_ylabel() == "3 segments"


def test_of_too_many_segments_the_longest_are_shown(tmp_path):
    said = captions_of(MOST_ROWS + 20)
    said[7]["end"] += 1.0
    for short in said[30:50]:
        short["end"] -= 1.0
    _, below = timeline(said, [0.0], [0.0]).axes
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels == [each["text"] for each in said if each not in said[30:50]]
    assert below.get_ylabel() == f"the {MOST_ROWS} longest of {MOST_ROWS + 20} segments"
    timeline([], [], []).savefig(tmp_path / "nothing.png")
