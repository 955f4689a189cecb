"""The app in `space/`: answers, refusals, served files, the published Space, and a browser.

Its packages are not in the default environment: `make app-test` installs them and runs this file.
"""

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import av
import numpy as np
import pytest
import torch

from tests.tiny import (
    noise,
    run_elsewhere,
    tiny_model,
    tiny_processor,
    tiny_writer,
    write_clip,
)
from training.hub.publishing import write_space

gr = pytest.importorskip("gradio", reason="gradio is missing: run `make app-test`")

from modeling_vljepa import StreamSession, decode_texts  # noqa: E402
from processing import FrameStream, windows  # noqa: E402
from space import app, ask, search, timeline, uploads, watch, watch_tab  # noqa: E402

ROOT = Path(__file__).parents[2]
# The first by name: a folder lists its files in any order.
EXAMPLE_CLIP, EXAMPLE_IMAGE = (min(ask.EXAMPLES.glob(each)) for each in ("*.mp4", "*.png"))
TOLERANCE = 1e-6  # between two computations of one similarity
BROWSER = [shutil.which("chromium"), shutil.which("chromedriver")]
CAPTION = "Describe this video in one sentence."  # the default caption and retrieval prompt
HANG_SECONDS = 300  # ends a test that hangs; a busy machine needs much less


@pytest.fixture(scope="module")
def pair() -> tuple:
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def library(pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> search.Library:
    folder = tmp_path_factory.mktemp("library")
    for number in range(8):
        frames = np.roll(noise(6, 32, 32, 3), number * 7, axis=2) // (number + 1)
        write_clip(folder / f"clip_{number}.mp4", frames)
    (folder / "damaged.mp4").write_bytes(b"no clip")
    return search.Library.from_folder(*pair, folder)


@pytest.fixture(scope="module")
def url(
    pair: tuple, library: search.Library, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Serve the app on a free port of loopback; return its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        blocks = app.build(*pair, library)
        _, url, _ = app.serve(blocks, library, prevent_thread_lock=True, quiet=True)
        yield url.rstrip("/")
        blocks.close(verbose=False)


@pytest.fixture
def clip(library: search.Library) -> str:
    return str(library.paths[0])


def refusal(function, *arguments: object) -> str:
    """Return the message of the `gr.Error` that a call raises."""
    with pytest.raises(gr.Error) as refused:
        function(*arguments)
    return refused.value.message


def assert_ranked(found: list[tuple], expected: dict) -> None:
    """Compare `(key, similarity, ...)` rows, best first, with the similarity of every key.

    Near-equal similarities may come in any order.
    """
    keys, values = [row[0] for row in found], [row[1] for row in found]
    assert len(set(keys)) == len(keys)
    np.testing.assert_allclose(values, [expected[key] for key in keys], atol=TOLERANCE)
    assert values == sorted(values, reverse=True)
    left_out = [value for key, value in expected.items() if key not in keys]
    assert all(value <= values[-1] + TOLERANCE for value in left_out)


# Answers.


def test_asker_ranks_answers_by_the_models_similarity(pair, clip):
    model, processor = pair
    names = ["red", "green", "a long answer about blue"]
    ranked = ask.Asker(*pair).rank(clip, " what is it ? ", "red\n\n green \nred\n" + names[2])
    with torch.inference_mode():
        predicted = model.predict(**processor(videos=clip, text="what is it ?"))
        similarities = (predicted @ model.encode_target(**processor(targets=names)).T)[0]
        shares = (similarities * model.logit_scale()).softmax(0)
    assert len(ranked) == len(names)
    assert_ranked(ranked, dict(zip(names, similarities.tolist(), strict=True)))
    expected = dict(zip(names, shares.tolist(), strict=True))
    for answer, _, share in ranked:
        assert share == pytest.approx(expected[answer], abs=TOLERANCE)


def test_asker_without_candidates_ranks_the_models_answers(pair, clip, monkeypatch):
    monkeypatch.setattr(pair[0].config, "answers", ["yes", "no"])
    ranked = ask.Asker(*pair).rank(clip, "is it red ?", " \n")
    assert {answer for answer, _, _ in ranked} == {"yes", "no"}


def test_asker_encodes_a_clip_once_for_all_its_questions(pair, clip, monkeypatch, tmp_path):
    model, encoded = pair[0], []
    encode = model.encode_video
    monkeypatch.setattr(model, "encode_video", lambda pixels: encoded.append(1) or encode(pixels))
    asker = ask.Asker(*pair)
    first = asker.rank(clip, "what is it ?", "a\nb")
    asker.rank(clip, "what color is it ?", "a\nb")
    assert asker.rank(clip, "what is it ?", "a\nb") == first
    assert len(encoded) == 1
    asker.rank(str(write_clip(tmp_path / "other.mp4", noise(3, 32, 32, 3))), "what ?", "a\nb")
    assert len(encoded) == 2


def test_asker_takes_an_image(pair):
    model, processor = pair
    ranked = ask.Asker(*pair).rank(str(EXAMPLE_IMAGE), "what is it ?", "red")
    with torch.inference_mode():
        predicted = model.predict(**processor(images=str(EXAMPLE_IMAGE), text="what is it ?"))
        target = model.encode_target(**processor(targets="red"))
    assert ranked[0][1] == pytest.approx((predicted @ target.T).item(), abs=TOLERANCE)


def test_search_equals_brute_force(pair, library):
    model, processor = pair
    assert [path.name for path in library.paths] == [f"clip_{n}.mp4" for n in range(8)]
    with torch.inference_mode():
        wanted = model.encode_target(**processor(targets="a red clip"))
        similarity = {
            path: (model.predict(**processor(videos=str(path), text=CAPTION)) @ wanted.T).item()
            for path in library.paths
        }
    found = search.search(*pair, library, "a red clip")
    assert len(found) == search.SHOWN
    assert_ranked(found, similarity)


def test_library_refuses_a_folder_without_clips(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="--library"):
        search.Library.from_folder(*pair, tmp_path)


def test_bars_escape_the_answers():
    shown = ask.bars([("<script>", 0.75, "similarity 0.500"), ("b", 0.25, "<i>")])
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "width:75.0%" in shown and "similarity 0.500" in shown and "&lt;i&gt;" in shown


@pytest.mark.parametrize(
    ("truth", "mark"),
    [
        ("b", '<small>two<em class="right">✓ true answer</em></small>'),
        ("<c>", '<p class="legend">The true answer is: &lt;c&gt;</p>'),
        (None, ""),
    ],
)
def test_bars_mark_the_true_answer(truth, mark):
    shown = ask.bars([("a", 0.75, "one"), ("b", 0.25, "two")], truth)
    assert mark in shown and shown.count("true answer") == (truth is not None)
    assert "share among the candidates" in shown


def test_ask_examples_have_true_answers_among_their_candidates():
    rows = [json.loads(line) for line in (ask.EXAMPLES / "examples.jsonl").open(encoding="utf-8")]
    assert len(rows) == 6 and all(row["target"] in row["candidates"] for row in rows)
    for row in watch_tab.example_rows():
        times = [time for time, _ in row["events"]]
        assert times == sorted(times) and {text for _, text in row["events"]} <= {
            *row["candidates"]
        }


def test_search_label_counts_videos_and_images(pair):
    def label(*names: str) -> str:
        return search.contents(search.Library(Path(), [Path(each) for each in names], None))

    assert label("a.mp4", "b.PNG", "c.webm") == "2 videos and 1 image"
    assert label("a.jpg", "b.gif") == "2 images"
    assert label("a.mp4") == "1 video"


# Watching.


def scenes(length: int = 20) -> np.ndarray:
    """Return four still scenes of `length` frames each; `write_clip` plays 10 a second."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    black, white = np.zeros_like(images[0]), np.full_like(images[0], 255)
    return np.stack([black, images[0], white, images[1]]).repeat(length, axis=0)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("film") / "film.mp4", scenes())


TEXTS = "red\ngreen\na long answer about blue"


def watched(watcher: watch.Watcher, *arguments: object) -> watch.Watched:
    """Watch a video to its end."""
    *_, seen = watcher.watch(*arguments)
    return seen


def test_watcher_finds_the_segments_of_a_session(pair, film):
    model, processor = pair
    seen = watched(watch.Watcher(*pair), film, " what is it ? ", TEXTS, 10)
    assert (seen.status, seen.seconds, seen.open_since) == ("seen", pytest.approx(8.0), None)

    cut = windows(FrameStream(film, fps=10), processor.video_processor, size=4, stride=1)
    session = StreamSession(model, processor, query="what is it ?")
    expected = list(session.run(cut))
    for name in ("start", "end", "start_time", "end_time", "confidence"):
        assert [getattr(each, name) for each in seen.segments] == pytest.approx(
            [getattr(each, name) for each in expected], abs=TOLERANCE
        )
    answers = session.ask(["a", "b"], query="which ?")
    same = seen.session.ask(["a", "b"], query="which ?")
    scores = {answer["text"]: answer["score"] for answer in answers}
    assert {answer["text"]: answer["score"] for answer in same} == pytest.approx(
        scores, abs=TOLERANCE
    )
    # Four scenes; a boundary is within a window's length of the change.
    np.testing.assert_allclose([each.start_time for each in expected], [0, 2, 4, 6], atol=0.4)

    texts = TEXTS.splitlines()
    with torch.inference_mode():
        known = model.encode_target(**processor(targets=texts))
    for each, same in zip(seen.segments, expected, strict=True):
        torch.testing.assert_close(each.embedding, same.embedding, rtol=0, atol=TOLERANCE)
        similarities = known @ same.embedding
        chosen = similarities[texts.index(each.text)]
        assert chosen >= similarities.max() - TOLERANCE  # near-equal ones may change places

    cut = windows(FrameStream(film, fps=10), processor.video_processor, size=4, stride=1)
    embeds = torch.stack([each.embedding for each in session.encoder.stream(cut)])
    changes = 1 - torch.cosine_similarity(embeds[1:], embeds[:-1])
    assert len(embeds) == 77
    np.testing.assert_allclose(seen.curve.changes, [0, *changes.clamp_min(0)], atol=TOLERANCE)


def test_watcher_yields_a_segment_as_soon_as_it_closes(pair, film):
    watcher = watch.Watcher(*pair)
    lengths = [len(seen.segments) for seen in watcher.watch(film, "what is it ?", TEXTS, 10)]
    assert len(lengths) == 1 + 77 + 1  # the start, each window, the end
    assert lengths[0] == 0 and lengths[-1] == 4
    # The delay after the next scene begins: a window, and the segmenter's patience.
    for number, scene in enumerate((2, 4, 6), 1):
        assert lengths.index(number) / 10 == pytest.approx(scene, abs=0.8)


def test_watcher_reads_the_given_frames_per_second(pair, film):
    assert len(watched(watch.Watcher(*pair), film, "", TEXTS, 2).curve.times) == 13  # of 16 frames


@pytest.mark.parametrize("reads", [False, True])
def test_watcher_decodes_segments_with_the_y_decoder(film, reads, monkeypatch):
    writer = tiny_writer(decoder_reads_query=reads, decoder_reads_previous=reads)
    processor = tiny_processor()
    watcher = watch.Watcher(writer.vljepa, processor, writer, captions=("never",))
    calls = []  # a second decoding of the same embedding could end in another token

    def decode(*arguments: object, previous: list[str], **options: object) -> list[str]:
        texts = decode_texts(*arguments, previous=previous, **options)
        calls.append((*arguments, list(previous), options, texts))
        return texts

    monkeypatch.setattr(watch, "decode_texts", decode)
    seen = watched(watcher, film, "what is it ?", "", 10)
    assert len(seen.segments) == len(calls) == 4
    before = [""]
    for segment, (model, used, embeds, previous, options, texts) in zip(
        seen.segments, calls, strict=True
    ):
        assert (model, used, options) == (writer, processor, {"queries": ["what is it ?"]})
        torch.testing.assert_close(embeds, segment.embedding[None], rtol=0, atol=TOLERANCE)
        assert previous == before
        assert [segment.text] == texts
        before = texts
    chosen = watched(watcher, film, "", "red", 10)
    assert {each.text for each in chosen.segments} == {"red"} and len(calls) == 4


def test_watcher_without_candidates_takes_the_captions(pair, film, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"target": "a cat"}\n{"target": "a dog"}\n{"target": "a cat"}\n')
    captions = watch.read_captions(path)
    assert captions == ("a cat", "a dog")
    seen = watched(watch.Watcher(*pair, captions=captions), film, "", "", 10)
    assert {each.text for each in seen.segments} <= set(captions)
    path.write_text('{"target": "a cat"}\n{"text": "a dog"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl:2 is not a JSON object with a target"):
        watch.read_captions(path)


@pytest.mark.parametrize("question", ["what color is it ?", ""])
def test_watcher_answers_a_question_as_its_session_does(pair, film, question):
    watcher = watch.Watcher(*pair)
    seen = watched(watcher, film, "what is it ?", "red", 10)
    answers = watcher.ask(seen, f" {question} ", "a\n\nb\nc")
    expected = seen.session.ask(["a", "b", "c"], query=question or None)
    assert [answer[0] for answer in answers] == [answer["text"] for answer in expected]
    scores = torch.tensor([answer["score"] for answer in expected])
    shares = (scores * pair[0].logit_scale()).softmax(0)
    np.testing.assert_allclose([answer[1] for answer in answers], shares.detach(), atol=TOLERANCE)
    best = expected[0]
    assert answers[0][2] == (
        f"best at {timeline.span(best['start_time'], best['end_time'])}, "
        f"similarity {best['score']:.3f}"
    )
    assert seen.marked == (best["start_time"], best["end_time"])


def test_watcher_answers_a_question_during_the_run(pair, film):
    watcher = watch.Watcher(*pair)
    running = watcher.watch(film, "", TEXTS, 10)
    seen = next(running)
    assert "Watch a video first" in refusal(watcher.ask, seen, "what ?", "a")
    next(running)
    assert watcher.ask(seen, "what ?", "a\nb")[0][2].startswith("best at 0:00.0 – 0:0")
    assert seen.status == "watching" and next(running) is seen


def test_watcher_embeds_nothing_after_a_stop(pair, film, monkeypatch):
    """Stop a run by its button, and by a closed page, whose generator gradio closes."""
    passes = []
    predict = pair[0].predict
    monkeypatch.setattr(pair[0], "predict", lambda **kw: passes.append(1) or predict(**kw))
    watcher = watch.Watcher(*pair)
    running = watcher.watch(film, "", TEXTS, 10)
    seen = [next(running) for _ in range(31)][-1]
    seen.stop()
    assert list(running) == [] and len(passes) == 30
    assert (seen.status, seen.open_since) == ("stopped", seen.segments[-1].end_time)
    assert watcher.ask(seen, "", "a\nb")

    passes.clear()
    running = watcher.watch(film, "", TEXTS, 10)
    seen = [next(running) for _ in range(6)][-1]
    running.close()
    assert len(passes) == 5 and seen.status == "stopped"


def test_watcher_remembers_only_the_last_videos(pair, film):
    watcher = watch.Watcher(*pair)
    first = watched(watcher, film, "", "red", 1)
    others = [watched(watcher, film, "", "red", 1) for _ in range(watch.MAX_VIDEOS)]
    assert "no longer in memory" in refusal(watcher.ask, first, "what ?", "a")
    assert len(watcher.videos) == watch.MAX_VIDEOS
    assert all(watcher.ask(each, "what ?", "a") for each in others)


def test_watcher_refuses_unusable_inputs(pair, film, tmp_path):
    watcher = watch.Watcher(*pair)

    def message(path: object, texts: str = "a") -> str:
        return refusal(lambda: list(watcher.watch(path, "", texts)))

    assert message(None) == "Upload a video first, or choose a clip from the library."
    assert message(EXAMPLE_IMAGE).startswith(f"{EXAMPLE_IMAGE.name} is an image: upload a video")
    assert message(tmp_path / "gone.mp4") == (
        "gone.mp4 was deleted: uploads are stored for an hour. Upload it again."
    )
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert message(tmp_path / "broken.mp4").startswith("broken.mp4 cannot be read")
    assert message(film, " \n") == (
        "Give candidate texts, one per line: this model has no Y-Decoder, so each segment gets "
        "the nearest candidate."
    )
    assert "up to 200" in message(film, "\n".join(map(str, range(201))))
    assert "Watch a video first" in refusal(watcher.ask, None, "what ?", "a")
    seen = watched(watcher, film, "", "a")  # still works
    assert "Give candidate answers" in refusal(watcher.ask, seen, "what ?", " ")


def test_watcher_reports_damage_inside_a_video(pair, tmp_path):
    path = write_clip(tmp_path / "damaged.mp4", noise(60, 32, 32, 3))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 8
    whole = bytes(data)
    middle = start + (len(data) - start) // 2
    data[middle : middle + 20000] = bytes(20000)
    path.write_bytes(data)
    seen = watched(watch.Watcher(*pair), path, "", "a", 10)
    assert 0 < len(seen.curve.times) < 57 and seen.notes()
    assert str(tmp_path) not in "".join(watch_tab.page(seen))
    path.write_bytes(whole)
    assert watched(watch.Watcher(*pair), path, "", "a", 10).notes() == []

    data[start:-2000] = bytes(len(data[start:-2000]))
    path.write_bytes(data)
    assert refusal(lambda: list(watch.Watcher(*pair).watch(path, "", "a"))).startswith(
        "damaged.mp4 cannot be read"
    )


@dataclass
class Part:
    """The attributes of a segment that the timeline reads."""

    start_time: float
    end_time: float
    text: str
    confidence: float = 0.5


def test_timeline_positions_are_percentages_of_the_video():
    curve = timeline.Curve([0.5, 1.0, 6.0], [0.0, 0.4, 0.1])
    parts = [Part(0.0, 2.0, "<b>"), Part(2.0, 5.0, "b"), Part(5.0, 5.5, "<b>")]
    drawn = timeline.draw(curve, parts, 10.0, open_since=5.5, marked=(2.0, 5.0))
    assert "<b>:" not in drawn and "0:00.0 – 0:02.0: &lt;b&gt;" in drawn
    assert re.findall(r'class="bound" style="left:([\d.]+)%', drawn) == ["20.00", "50.00", "55.00"]
    track = re.findall(r'<button style="left:([\d.]+)%;width:([\d.]+)%;--hue:(\d+)', drawn)
    assert track == [("0.00", "20.00", "250"), ("20.00", "30.00", "28"), ("50.00", "5.00", "250")]
    assert 'class="open" style="left:55.00%;width:5.00%"' in drawn
    assert 'class="ahead" style="left:60.00%;width:40.00%"' in drawn
    assert 'class="marked" style="left:20.00%;width:30.00%"' in drawn
    assert 'points="50.0,100.0 100.0,6.0 600.0,76.5"' in drawn  # the top of the axis is 0.4
    assert '<span class="top">0.4</span>' in drawn

    ended = timeline.draw(curve, parts, 10.0)
    assert "ahead" not in ended and 'class="open"' not in ended and "marked" not in ended


def test_timeline_rows_and_counts():
    parts = [Part(0.0, 2.0, "<i>", 0.834), Part(2.0, 65.25, "b")]
    lines = timeline.rows(parts, 65.25)
    assert lines.count("<li") == 3 and "&lt;i&gt;" in lines and "<small>0.83</small>" in lines
    assert "0:02.0 – 1:05.2" in lines and "1:05.2 – …" in lines
    assert "Agreement within the segment" in lines and "true event" not in lines
    events = [(1.9, "<i>"), (2.0, "a"), (65.0, "c"), (65.25, "d")]
    lines = timeline.rows(parts, 65.25, events)
    assert '<b>&lt;i&gt;<em class="right">✓ true</em></b>' in lines
    assert "<b>b<em>true event: a; c</em></b>" in lines
    assert "<em>true event: a; c; d</em>" in timeline.rows(parts, None, events)
    assert "<em>true event: none ends here</em>" in timeline.rows(parts, None, events[:1])
    tiles = timeline.counts(90, 4, "all of 0:08.0", ["2 damaged parts"])
    assert re.findall(r"<b>(\d+)</b>", tiles) == ["90", "4", "90"]
    assert "22.5 per segment" in tiles and "<p>2 damaged parts</p>" in tiles


@pytest.mark.parametrize(
    ("length", "shown"),
    [
        (3.2, ["0:00.0", "0:00.5", "0:01.0", "0:01.5", "0:02.0", "0:02.5", "0:03.0"]),
        (26.2, ["0:00", "0:05", "0:10", "0:15", "0:20", "0:25"]),
        (119.0, ["0:00", "0:15", "0:30", "0:45", "1:00", "1:15", "1:30", "1:45"]),
    ],
)
def test_timeline_axis_has_round_times(length, shown):
    assert [mark for _, mark in timeline.marks(length)] == shown


@pytest.mark.parametrize("limit", [0, -1])
def test_app_rejects_a_limit_below_one(limit, capsys):
    with pytest.raises(SystemExit):
        app.parse_args(["--model", "m", f"--limit={limit}"])
    assert f"--limit is {limit}; give 1 or more" in capsys.readouterr().err


def test_load_returns_no_writer_for_a_model_without_a_y_decoder(pair, tmp_path):
    for part in pair:
        part.save_pretrained(tmp_path)
    model, writer, processor = app.load(str(tmp_path))
    assert writer is None and processor.video_processor.num_frames == 4
    assert torch.equal(model.logit_scale(), pair[0].logit_scale())


# Refusals.


def test_asker_and_search_refuse_missing_inputs(pair, clip, library):
    rank = ask.Asker(*pair).rank
    assert refusal(rank, None, "what ?", "a") == (
        "Upload a clip or an image first, or choose an example."
    )
    assert refusal(rank, clip, "  ", "a") == "Type a question about the clip."
    assert refusal(rank, clip, "what ?", " \n ") == (
        "Give candidate answers, one per line: the model ranks them."
    )
    assert "up to 200" in refusal(rank, clip, "what ?", "\n".join(map(str, range(201))))
    assert "sentence" in refusal(search.search, *pair, library, "")
    assert "Upload it again" in refusal(rank, clip + ".gone", "what ?", "a")
    assert rank(clip, "what ?", "a\nb")  # still works


@pytest.mark.parametrize("name", ["broken.mp4", "broken.png", "cut.mp4", "cut.png", "note.txt"])
def test_asker_refuses_a_broken_file_without_naming_its_folder(pair, tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        whole = (EXAMPLE_CLIP if path.suffix == ".mp4" else EXAMPLE_IMAGE).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_text("this is neither a video nor an image\n" * 50)
    message = refusal(ask.Asker(*pair).rank, str(path), "what ?", "a")
    expected = f"{name} cannot be read: it is not a video or an image, or it is damaged."
    assert message.startswith(expected)
    assert str(tmp_path) not in message


def test_asker_refuses_damaged_packets_under_an_intact_header(pair, clip, tmp_path):
    data = bytearray(Path(clip).read_bytes())
    start = data.index(b"mdat") + 8
    data[start:-400] = bytes(len(data[start:-400]))
    (tmp_path / "damaged.mp4").write_bytes(data)
    message = refusal(ask.Asker(*pair).encode, tmp_path / "damaged.mp4")
    assert message.startswith("damaged.mp4 cannot be read")


def test_examine_refuses_a_long_clip(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", noise(1, 16, 16, 3).repeat(1210, axis=0))  # 10 fps
    assert refusal(uploads.examine, path) == (
        "long.mp4 lasts 121 seconds; the limit is 120 seconds. "
        "Cut out the part that you want to ask about."
    )
    monkeypatch.setattr(uploads, "MAX_SECONDS", 121)
    assert uploads.examine(path) == "videos"
    monkeypatch.setattr(uploads, "MAX_FRAMES", 1000)
    assert "1210 frames" in refusal(uploads.examine, path)


def test_measure_counts_the_duration_if_the_header_has_none(tmp_path):
    path = tmp_path / "live.mkv"  # written as a live stream: without duration or index
    write_clip(path, noise(1, 16, 16, 3).repeat(30, axis=0), live="1")
    with av.open(path) as container:
        assert container.duration is None
        frames, seconds = uploads.measure(container.streams.video[0])
    assert (frames, seconds) == (30, pytest.approx(3.0, abs=0.11))


def test_examine_reads_the_film_behind_a_still_by_the_clock_of_the_file(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(path, "w") as output:
        still = output.add_stream("mjpeg", rate=10)
        film = output.add_stream("mpeg4", rate=10)
        for stream, count in ((still, 1), (film, 20)):
            stream.height, stream.width = 48, 64
            stream.pix_fmt = "yuvj420p" if stream is still else "yuv420p"
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(noise(48, 64, 3), format="rgb24")
                frame.pts = index + 10 * (stream is film)  # a second after the still
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    assert uploads.examine(path) == "videos"
    assert uploads.seconds_of(path) == pytest.approx(3.0, abs=0.11)


def test_examine_refuses_a_large_file(tmp_path):
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(51_000_000)
    assert refusal(uploads.examine, path) == (
        "large.mp4 has 51 MB; the limit is 50 MB. Cut it, or save it smaller."
    )


def test_examine_refuses_large_pictures(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(uploads, "MAX_VIDEO_PIXELS", 64 * 64 - 1)
    assert "64 x 64 pixels" in refusal(uploads.examine, EXAMPLE_IMAGE)
    assert "64 x 64 pixels" in refusal(uploads.examine, EXAMPLE_CLIP)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
    ],
    ids=["hls", "concat"],
)
def test_examine_refuses_a_playlist_of_other_files(tmp_path, playlist):
    clip = shutil.copy(EXAMPLE_CLIP, tmp_path / "secret.mp4")
    path = tmp_path / "list.m3u8"
    path.write_text(playlist.format(clip=Path(clip).name))
    assert "cannot be read" in refusal(uploads.examine, path)


# Served files and endpoints.


def fetch(url: str, data: dict | None = None) -> tuple[int, bytes]:
    """Return the status and the body of a request; `data` is sent as JSON."""
    body = None if data is None else json.dumps(data).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def called(url: str, name: str, *arguments: object) -> str:
    """Return the events of a call to an endpoint, errors included."""
    _, started = fetch(f"{url}/gradio_api/call/{name}", {"data": list(arguments)})
    event = json.loads(started)["event_id"]
    return fetch(f"{url}/gradio_api/call/{name}/{event}")[1].decode()


def test_app_serves_only_the_library_and_the_examples(url, library, tmp_path):
    for path in (EXAMPLE_CLIP, library.paths[0]):
        assert fetch(f"{url}/gradio_api/file={path}") == (200, path.read_bytes())
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(EXAMPLE_CLIP.read_bytes())
    up = "%2e%2e"
    for path in (
        "/etc/passwd",
        outside,
        ROOT / "space" / "app.py",
        f"{ask.EXAMPLES}/../app.py",
        f"{ask.EXAMPLES}/{up}/app.py",
        f"{library.folder}/{up}/{up}/{up}/etc/passwd",
    ):
        status, _ = fetch(f"{url}/gradio_api/file={path}")
        assert status in (403, 404), path


def test_ask_endpoint_refuses_files_of_the_server(url, library):
    for path in ("/etc/passwd", str(ROOT / "space" / "app.py"), str(library.paths[0])):
        sent = {"path": path, "meta": {"_type": "gradio.FileData"}}
        events = called(url, "ask", sent, "what ?", "a\nb")
        assert "error" in events and "answers" not in events
    assert "clip_" in called(url, "search", "a red clip")  # still works


def test_app_serves_examples_from_their_own_folder(url):
    """gradio deletes copies of examples together with the uploads: no copy may be made."""
    row = json.loads((ask.EXAMPLES / "examples.jsonl").read_text().splitlines()[0])
    assert str(ask.EXAMPLES / row["file"]) in called(url, "load_example", 0)


def test_watch_endpoint_refuses_files_of_the_server(url, library):
    sent = {"path": str(library.paths[0]), "meta": {"_type": "gradio.FileData"}}
    assert "error" in called(url, "watch", sent, None, "", "a\nb", 10)
    for name in ("../app.py", "/etc/passwd", "damaged.mp4"):
        assert "error" in called(url, "watch", None, name, "", "a\nb", 10)
    assert "error" in called(url, "watch", None, "clip_0.mp4", "", "a\nb", 1000)  # fps
    assert "segments" in called(url, "watch", None, "clip_0.mp4", "", "a\nb", 10)


def test_ask_seen_endpoint_knows_only_the_callers_video(url):
    assert "segments" in called(url, "watch", None, "clip_0.mp4", "", "a\nb", 10)
    assert "Watch a video first" in called(url, "ask_seen", "what ?", "a\nb")


@pytest.mark.parametrize("address", ["https://example.com/a.mp4", "http://127.0.0.1:1/a.mp4"])
def test_ask_endpoint_does_not_download_from_addresses(url, address):
    sent = {"path": address, "meta": {"_type": "gradio.FileData"}}
    assert "does not download from addresses" in called(url, "ask", sent, "what ?", "a\nb")


def test_app_refuses_a_large_upload_by_its_status(url):
    boundary = "b0undary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body = head.encode() + bytes(50_500_000) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{url}/gradio_api/upload", body, kind))
    assert refused.value.code == 413


# The published Space.


def weights_hash(model: torch.nn.Module) -> str:
    data = (weight.numpy().tobytes() for weight in model.state_dict().values())
    return hashlib.sha256(b"".join(data)).hexdigest()


def test_published_space_works_without_the_repository(film, tmp_path):
    """Run its files alone: no module comes from the repository, the model's code from the model.

    A random decoder's best two tokens can be nearly equal, so texts are compared with a second
    decoding in the same process, and weights and embeddings with those of this process.
    """
    folder = tmp_path / "space"
    write_space(folder)
    writer, processor = tiny_writer(), tiny_processor()
    writer.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    script = f"""
import hashlib, json, sys
from pathlib import Path
import torch
sys.modules["training"] = sys.modules["eval"] = None
from space.app import load
from space.watch import Watcher, decode_texts
{inspect.getsource(weights_hash)}
model, writer, processor = load({str(tmp_path / "model")!r})
*_, seen = Watcher(model, processor, writer).watch({str(film)!r}, "what ?", "", 10)
ours = [module.__file__ for name, module in sys.modules.items()
        if name.split(".")[0] in ("space", "modeling_vljepa", "processing")]
print(json.dumps({{
    "inside": [Path(file).is_relative_to(Path.cwd()) for file in ours],
    "model": type(model).__module__,
    "weights": weights_hash(writer),
    "times": [each.start_time for each in seen.segments],
    "embeddings": [each.embedding.tolist() for each in seen.segments],
    "texts": [each.text for each in seen.segments],
    "decoded": [text for each in seen.segments for text in
                decode_texts(writer, processor, each.embedding[None], queries=["what ?"])],
}}))
"""
    found = json.loads(run_elsewhere(script, folder))
    assert len(found["inside"]) > 10 and all(found["inside"])
    assert found["model"].startswith("transformers_modules.")
    seen = watched(watch.Watcher(writer.vljepa, processor, writer), film, "what ?", "", 10)
    assert found["weights"] == weights_hash(writer)
    assert found["times"] == pytest.approx([each.start_time for each in seen.segments])
    expected = torch.stack([each.embedding for each in seen.segments]).numpy()
    np.testing.assert_allclose(found["embeddings"], expected, atol=TOLERANCE)
    assert found["texts"] == found["decoded"] and len(found["texts"]) == len(seen.segments)

    assert (folder / "app.py").read_text() == "from space.app import main\n\nmain()\n"
    assert {"README.md", "requirements.txt"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("make_examples.py"))


# In a browser.


class Page:
    """The app in headless Chromium; parts of the page are found by CSS selectors."""

    def __init__(self, url: str, shots: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER[0]
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
        self.url, self.shots = url, shots

    def open(self, width: int, height: int) -> None:
        """Load the app in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)
        self.until("document.querySelector('#ask')")

    def until(self, condition: str) -> object:
        """Wait for a JavaScript expression to be true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        run = self.driver.execute_script
        wait = WebDriverWait(self.driver, HANG_SECONDS)
        return wait.until(lambda _: run(f"return {condition}"), condition)

    def texts(self, selector: str, count: int) -> list[str]:
        """Wait until there are `count` parts, and return their texts."""
        parts = f"[...document.querySelectorAll({json.dumps(selector)})]"
        self.until(f"{parts}.length == {count}")
        return self.driver.execute_script(f"return {parts}.map(part => part.innerText)")

    def press(self, selector: str) -> None:
        """Click a part once it is there."""
        where = json.dumps(selector)
        self.until(f"document.querySelector({where})")
        self.driver.execute_script(f"document.querySelector({where}).click()")

    def write(self, name: str, text: str) -> None:
        """Replace the text of a field."""
        field = self.driver.find_element("css selector", f"#{name} textarea, #{name} input")
        field.clear()
        field.send_keys(text)

    def upload(self, path: Path, name: str = "clip") -> None:
        """Choose a file in a field for uploads."""
        field = f"#{name} input[type=file]"
        self.until(f"document.querySelector({json.dumps(field)})")
        self.driver.find_element("css selector", field).send_keys(str(path))

    def turn_to(self, tab: str) -> None:
        """Open a tab by its label."""
        tabs = "[...document.querySelectorAll('button[role=tab]')]"
        found = f"{tabs}.find(each => each.innerText.trim() == {json.dumps(tab)})"
        self.until(found)
        self.driver.execute_script(f"{found}.click()")

    def refused(self) -> str:
        """Return the message of the error that is shown, and close it."""
        message = self.texts(".toast-body", 1)[0]
        self.press(".toast-close")
        self.texts(".toast-body", 0)
        return message

    def shot(self, name: str) -> None:
        """Take a screenshot; fail if the page scrolls sideways."""
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))
        size = "[document.documentElement.scrollWidth, window.innerWidth]"
        width, inner = self.driver.execute_script(f"return {size}")
        assert width <= inner, name


@pytest.fixture
def page(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    pytest.importorskip("selenium", reason="selenium is missing: run `make app-test`")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    page = Page(url, tmp_path)
    yield page
    page.driver.save_screenshot(str(tmp_path / "last.png"))
    page.driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(
    None in BROWSER, reason="browser missing: apt-get install chromium chromium-driver"
)
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_browser_refuses_answers_and_searches(page, library, tmp_path, width, height):
    """Upload a broken file, ask, search. Screenshots go to pytest's temporary folder."""
    page.open(width, height)
    page.shot("start")

    (tmp_path / "broken.mp4").write_bytes(b"no clip at all")
    page.upload(tmp_path / "broken.mp4")
    page.texts(".toast-body", 1)
    page.shot("broken")
    assert "broken.mp4 cannot be read: it is not a video or an image" in page.refused()

    page.upload(library.paths[0])
    page.until("document.querySelector('#video video')?.readyState > 1")
    page.write("question", "what is it ?")
    page.write("candidates", "a red ball\na green key\na grey box")
    page.press("#ask")
    answers = page.texts("#answers li", 3)
    shares = [float(text.split("%")[0].split("\n")[-1]) for text in answers]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    page.driver.execute_script("document.querySelector('#answers').scrollIntoView(false)")
    page.shot("answers")

    page.write("question", " ")
    page.press("#ask")
    assert "Type a question about the clip." in page.refused()

    page.press("#examples button")
    page.texts("#answers li", 0)  # the previous clip's answers are cleared
    page.press("#ask")
    assert any("the purple key" in answer for answer in page.texts("#answers li", 5))
    page.shot("example")

    page.turn_to("Search")
    page.write("sentence", "a red clip")
    page.press("#search")
    page.texts("#found .thumbnail-item video", search.SHOWN)
    page.shot("search")
    page.press("#found .thumbnail-item")
    playing = "[...document.querySelectorAll('#found video')].map(video => (video.play(), video))"
    page.until(f"{playing}.some(video => video.currentTime > 0)")
    page.shot("clip")


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a video of a minute."""
    return write_clip(tmp_path_factory.mktemp("long") / "long.mp4", scenes(150))


@pytest.mark.slow
@pytest.mark.skipif(
    None in BROWSER, reason="browser missing: apt-get install chromium chromium-driver"
)
@pytest.mark.parametrize(
    ("width", "height", "theme"),
    [(1280, 1400, "light"), (390, 1400, "dark")],
    ids=["wide", "phone"],
)
def test_browser_watches_a_video(
    page, pair, film, long_film, tmp_path, monkeypatch, width, height, theme
):
    """Upload a broken file, watch, stop, watch to the end, ask, and go to a segment."""
    model, passes, resumed = pair[0], [], Event()
    predict = model.predict

    def pause_in_the_middle(**inputs: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        if len(passes) > 150:  # of 297 windows: the first segment is closed, the run goes on
            resumed.wait(HANG_SECONDS)
        return predict(**inputs)

    # Without the pause, a fast machine reads the video before the browser presses Stop.
    monkeypatch.setattr(model, "predict", pause_in_the_middle)
    page.url += f"?__theme={theme}"
    page.open(width, height)
    page.turn_to("Watch")
    page.press("#watch")
    assert "Upload a video first" in page.refused()
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    page.upload(tmp_path / "broken.mp4", "watch-clip")
    assert "broken.mp4 cannot be read" in page.refused()

    page.upload(long_film, "watch-clip")
    page.until("document.querySelector('#watch-video video')?.readyState > 1")
    page.press("#watch")
    assert "Give candidate texts" in page.refused()
    page.write("watch-query", "what is it ?")
    page.write("watch-texts", TEXTS)
    page.press("#watch")
    page.until("document.querySelector('.segments li:not(.open)')")
    assert page.driver.execute_script("return !!document.querySelector('.timeline .open')")
    page.shot("watching")
    page.press("#watch-stop")
    page.until("document.querySelector('.counts small')?.innerText.startsWith('stopped at 0:')")
    resumed.set()

    page.press("#watch-clip button")
    page.texts(".segments li", 0)  # cleared together with their video
    page.upload(film, "watch-clip")
    page.until("document.querySelector('#watch-video video')?.duration < 10")
    page.press("#watch")
    page.until("document.querySelector('.counts small')?.innerText == 'all of 0:08.0'")
    assert all(
        any(text in row for text in TEXTS.splitlines()) for row in page.texts(".segments li", 4)
    )
    page.write("seen-question", "what color is it ?")
    page.write("seen-candidates", "red\ngreen")
    page.press("#seen-ask")
    assert all("best at 0:0" in answer for answer in page.texts("#seen-answers li", 2))
    page.texts(".timeline .marked", 1)
    page.press(".segments li:last-child button")
    page.until("document.querySelector('#watch-video video').currentTime > 5")
    page.driver.execute_script("document.querySelector('#watch-counts').scrollIntoView()")
    page.shot("watched")


@pytest.mark.slow
@pytest.mark.skipif(
    None in BROWSER, reason="browser missing: apt-get install chromium chromium-driver"
)
def test_browser_ends_the_run_with_its_page(page, pair, long_film, monkeypatch):
    model, passes, stopped = pair[0], [], Event()
    predict = model.predict

    def slow(**inputs: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        # Long enough that the closed page, and not the end of the video, ends the run.
        stopped.wait(0.5)
        return predict(**inputs)

    monkeypatch.setattr(model, "predict", slow)
    stop = watch.Watched.stop
    monkeypatch.setattr(
        watch.Watched,
        "stop",
        lambda seen: seen.status == "watching" and (stop(seen), stopped.set()),
    )
    page.open(1280, 900)
    page.turn_to("Watch")
    page.upload(long_film, "watch-clip")
    page.until("document.querySelector('#watch-video video')?.readyState > 1")
    page.write("watch-texts", TEXTS)
    page.press("#watch")
    page.until("document.querySelector('.timeline polygon')")
    assert not stopped.is_set()
    page.driver.get("about:blank")
    assert stopped.wait(HANG_SECONDS)
    assert 0 < len(passes) < 297  # windows of the whole video
