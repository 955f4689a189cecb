"""The watch command prints and writes the captions of the streaming pipeline."""

import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.models import load_model
from eval.subtitles import clock, one_line, srt, vtt
from eval.timeline import MOST_ROWS, timeline
from eval.watch import FILE_BATCH, Watched, main, uninterrupted, watch
from modeling_vljepa import StreamSession, WardSegmenter, stream
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPAStreamingCaptionPipeline
from modeling_vljepa.pipelines.stream_session import EmbeddedWindow
from processing.feature_store import made_with
from tests.eval.test_subtitles import parsed
from tests.pipelines.rounding import clear_choices
from tests.pipelines.test_pipeline_streaming import QUICK, TEXTS
from tests.pipelines.test_stream_session import cut, quick, scenes
from tests.tiny import tiny_model, tiny_processor, tiny_writer, write_clip
from training.data.stream_writer import write_stream

SETTINGS = ["--segmenter", *(f"{name}={value}" for name, value in QUICK.items())]
LINE = re.compile(r"(\d\d:\d\d:\d\d\.\d) → (\d\d:\d\d:\d\d\.\d)  (.+)  \((\d\.\d\d)\)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with a Y-Decoder, one without, and a clip of three scenes."""
    path = tmp_path_factory.mktemp("watch")
    for name, model in (("writer", tiny_writer()), ("mute", tiny_model())):
        model.save_pretrained(path / name)
        tiny_processor().save_pretrained(path / name)
    write_clip(path / "clip.mp4", np.stack([frame for _, frame in scenes([40, 30, 50])]))
    return path


def command(folder: Path, *options: str, model: str = "writer") -> list[str]:
    return ["--model", str(folder / model), "--source", str(folder / "clip.mp4"), *options]


def test_watch_command_prints_and_writes_the_captions_of_the_pipeline(folder, capsys, tmp_path):
    main(command(folder, *SETTINGS, "--query", "a", "--output", str(tmp_path / "new" / "out")))
    printed = capsys.readouterr().out.splitlines()
    model, processor = load_model(str(folder / "writer"))
    pipe = VLJEPAStreamingCaptionPipeline(model=model, processor=processor, device="cpu")
    settings = {"query": "a", "segmenter_kwargs": QUICK, "batch_size": FILE_BATCH}
    with clear_choices(model):
        captions = list(pipe(folder / "clip.mp4", **settings))
    found = [LINE.fullmatch(line).groups() for line in printed[:3]]
    for line, caption in zip(found, captions, strict=True):
        assert line[:2] == (clock(caption["start"], 1), clock(caption["end"], 1))
        assert line[2] == one_line(caption["text"])
        assert float(line[3]) == pytest.approx(caption["confidence"], abs=0.0051)
    assert printed[3] == "59 windows of 4 frames, 3 decodes instead of 59"
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


def test_watch_command_reads_the_windows_of_a_feature_store(folder, capsys, tmp_path, monkeypatch):
    options = [*SETTINGS, "--query", "a", "--candidates", *TEXTS]
    main(command(folder, *options, model="mute"))
    live = capsys.readouterr().out.splitlines()
    model, processor = load_model(str(folder / "mute"))
    facts = made_with(model, processor.video_processor, 4)
    (tmp_path / "plan.json").touch()
    store = {"dtype": "bfloat16", "batch_size": 16, "bf16": False}
    write_stream(tmp_path, str(folder / "clip.mp4"), (4, 2, None), facts, model, processor, **store)
    monkeypatch.setattr(type(model), "encode_video", None)  # a call would raise a TypeError
    options += ["--features", str(tmp_path)]
    main(command(folder, *options, model="mute"))
    stored = capsys.readouterr().out.splitlines()
    assert stored[:4] == live[:4]  # three captions, and the numbers of windows and decodes
    assert stored[4] == f"from {tmp_path}, 0 broken frames"
    with pytest.raises(ValueError, match="clip.mp4 is not in it.*stride 3"):
        main(command(folder, *options, "--stride", "3", model="mute"))


@pytest.mark.parametrize("options", [("--segments", "4"), ("--threshold", "0.5")])
def test_watch_command_segments_offline_by_wards_distance(folder, capsys, options):
    main(command(folder, *options, "--candidates", *TEXTS, "--stride", "4", model="mute"))
    printed = capsys.readouterr().out.splitlines()
    model, processor = load_model(str(folder / "mute"))
    source = folder / "clip.mp4"
    embedded = list(stream(model, processor, source, stride=4, batch_size=FILE_BATCH))
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
        targets = model.encode_target(**processor(targets=TEXTS))
    cosines = torch.stack([each.embedding for each in expected]) @ targets.T
    chosen = cosines[range(len(found)), [TEXTS.index(each[2]) for each in found]]
    torch.testing.assert_close(chosen, cosines.amax(dim=1), atol=1e-6, rtol=0)
    assert printed[len(expected)].startswith(f"30 windows of 4 frames, {len(expected)} decodes ")
    assert 2 <= len(expected) <= 4


def test_watch_stops_at_an_interruption_and_keeps_the_captions(capsys):
    session = StreamSession(
        tiny_model(), tiny_processor(), segmenter=quick(), decode=lambda embeds: ["a\nb"]
    )

    def interrupted():
        for index, window in enumerate(session.encoder.stream(cut(scenes([40, 200])))):
            if index == 40:
                raise KeyboardInterrupt
            yield window

    watched = watch(session, interrupted(), None)
    printed = capsys.readouterr()
    assert len(watched.captions) == 2 and len(watched.times) == 40
    assert watched.captions[-1]["end"] == 40.5 and printed.err == "interrupted\n"
    assert [line.split("  ")[1] for line in printed.out.splitlines()] == ["a b", "a b"]


def test_watch_decodes_the_segment_before_an_interruption_ends_it():
    def decode(embeds: torch.Tensor) -> list[str]:
        if not session.memories:
            signal.raise_signal(signal.SIGINT)  # while the first segment is decoded
        return ["a"]

    session = StreamSession(tiny_model(), tiny_processor(), segmenter=quick(), decode=decode)
    before = signal.getsignal(signal.SIGINT)
    watched = watch(session, session.encoder.stream(cut(scenes([40, 30, 30]))), None)
    assert signal.getsignal(signal.SIGINT) is before
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--source", "gone.mp4"), "gone.mp4: no such file. Check the path."),
        (("--source", "{tmp}/text.mp4"), "text.mp4: cannot be opened as a video"),
        (("--source", "{tmp}"), "is a folder"),
        (("--source", "http://127.0.0.1/a.mp4"), "--allow-urls"),
        (("--source", "file:///a.mp4"), "file:// is not opened"),
        (("--source", "0", "--segments", "3"), "a camera has no end"),
        (("--model", "nowhere"), "--model: nowhere is not a folder or Hub id"),
        (("--model", "{tmp}/empty"), "empty is not a folder or Hub id of a readable VL-JEPA"),
        (("--model", "{folder}/mute"), "has no Y-Decoder"),
        (("--window", "0"), "window is 0: give at least 1 frame"),
        (("--stride", "9"), "stride is 9 and size 4"),
        (("--fps", "-1"), "fps is -1.0"),
        (("--fps", "nan"), "fps is nan"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--segmenter", "patience=0"), "patience is 0"),
        (("--segmenter", "patient=1"), "--segmenter: .*'patient'"),
        (("--segmenter", "patience"), "--segmenter: patience must be NAME=VALUE"),
        (("--segmenter", "window=99999999999999999999"), "give at most 2147483647"),
        (("--segmenter", "patience=much"), "patience is 'much': give a whole number"),
        (("--segmenter", "drift_threshold=abc"), "drift_threshold is 'abc'"),
        (("--segmenter", "drift_threshold=NaN"), "drift_threshold is nan"),
        (("--segmenter", "patience=1", "--segments", "2"), "leave one out"),
        (("--segments", "2", "--threshold", "1"), "--segments and --threshold: each defines"),
        (("--segments", "0"), "num_segments is 0"),
        (("--threshold", "nan"), "threshold is nan"),
        (("--output", "{folder}/clip.mp4"), "--output: .* is not a folder"),
    ],
)
def test_watch_command_names_bad_input(folder, tmp_path, options, message):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    paths = {"tmp": tmp_path, "folder": folder}
    with pytest.raises(ValueError, match=message):
        main(command(folder, *(option.format(**paths) for option in options)))


def test_watch_command_exits_with_one_line(folder, monkeypatch):
    words = ["eval.watch", *command(folder, "--window", "0")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, "eval.watch")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("eval.watch", run_name="__main__")
    # A text as code: Python prints it and exits with 1.
    assert stopped.value.code == "error: window is 0: give at least 1 frame."
    assert sys.stdout.errors == "replace"  # a terminal without "→" does not end the watching


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[1]", "damaged is not a folder or Hub id of .*'list'"),
        ("config.json", '{"model_type": "vlj', "not a valid JSON file"),
        ("model.safetensors", "half", "header"),
        ("tokenizer.json", None, "tokenizer"),
    ],
)
def test_watch_command_names_a_damaged_model_in_one_line(folder, tmp_path, name, content, message):
    damaged = shutil.copytree(folder / "mute", tmp_path / "damaged")
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        main(command(folder, "--candidates", "a", "--model", str(damaged)))
    assert str(raised.value).startswith("--model: ") and "\n" not in str(raised.value)


def test_watch_command_checks_the_output_folder_first(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output: .*file is a file. Give a folder"):
        main(command(folder, "--output", str(tmp_path / "file" / "out")))
    assert capsys.readouterr().out == ""


# -- the timeline --------------------------------------------------------------------------


def captions_of(count: int) -> list[dict]:
    return [
        {"start": 2.0 * i, "end": 2.0 * i + 2, "text": f"text {i}", "confidence": 1.0}
        for i in range(count)
    ]


def test_timeline_shows_every_segment_and_every_change():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 1]]))
    watched = Watched()
    for index, vector in enumerate(vectors):
        watched.see(EmbeddedWindow(index, index + 1, vector, torch.zeros(1, 1)))
    assert watched.times == [0.5, 1.5, 2.5, 3.5]
    half = 1 - 0.5**0.5
    assert watched.changes == pytest.approx([0, half, half, 0], abs=1e-6)

    captions = captions_of(3)
    captions[1]["text"] = "costs $5 or $6,\n" + "and more " * 30
    captions[0]["text"] = "字" * 400  # a script without spaces
    captions[2]["text"] = " "
    above, below = timeline(captions, watched.times, watched.changes).axes
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


def test_timeline_shows_the_longest_of_too_many_segments(tmp_path):
    captions = captions_of(MOST_ROWS + 20)
    captions[7]["end"] += 1.0
    for short in captions[30:50]:
        short["end"] -= 1.0
    _, below = timeline(captions, [0.0], [0.0]).axes
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels == [each["text"] for each in captions if each not in captions[30:50]]
    assert below.get_ylabel() == f"the {MOST_ROWS} longest of {MOST_ROWS + 20} segments"
    timeline([], [], []).savefig(tmp_path / "nothing.png")
