"""Selective decoding, measured on streams whose right scores are known."""

import dataclasses
import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from eval.annotated_streams import AnnotatedStream, EmbeddedStream, embed_streams, read_streams
from eval.benchmarks import load_benchmarks
from eval.compare import main as compare_evaluations
from eval.embedding_store import EmbeddingStore, facts_of
from eval.evaluate import main
from eval.intervals import mean_interval
from eval.metrics import wilson
from eval.report import text_tables, write_report
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import TASKS, captioning, selective_decoding
from eval.tasks.selective_decoding import (
    Captions,
    Choice,
    Judge,
    boundary_f1,
    boundary_scores,
    compare,
    count_of,
    enough,
    evaluate,
    matches,
    measure,
    online,
    oracle,
    selective,
    thresholds,
    uniform,
)
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.segmentation import as_unit
from processing import MediaError, VLJEPAProcessor
from processing.feature_store import FeatureError, made_with
from processing.stream_store import StreamStore
from tests.tiny import noise, tiny_model, tiny_processor, tiny_writer, write_clip, write_rows
from training.data.stream_writer import streams_of, write_stream

WORDS = ("red", "blue", "green", "grey", "purple", "ball", "box", "key", "door", "lamp", "cup")
TEXTS = [f"the agent went to the {a} {b} {c}" for a, b, c in combinations(WORDS, 3)]
STEP = 0.2


class Known(Captions):
    """A decoder for embeddings that are axes: each axis has its text."""

    def __init__(self):
        self.texts = {}

    def decode(self, choices) -> None:
        rows = [row for choice in choices for row in choice.embeds]
        self.texts |= {row.tobytes(): TEXTS[int(row.argmax())] for row in rows}


def stream(lengths: list[int], first: int = 0) -> EmbeddedStream:
    """Return a stream whose scenes have these numbers of windows, one axis and one annotation."""
    axes = np.repeat(np.arange(first, first + len(lengths)), lengths)
    times = STEP * (np.arange(len(axes)) + 0.5)
    ends = STEP * np.cumsum(lengths)
    middles = ends - STEP * np.array(lengths) / 2
    texts = TEXTS[first : first + len(lengths)]
    annotated = AnnotatedStream(1, "a.mp4", middles, texts)
    return EmbeddedStream(annotated, np.eye(len(TEXTS))[axes], times, float(ends[-1]))


@pytest.fixture(autouse=True)
def few_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = {"window": (2,), "smoothing": (1.0,), "patience": (1,), "decode_from": ("midpoint",)}
    tried["drift_threshold"] = (0.01, 0.1, 0.5, 1.2)
    monkeypatch.setattr(selective_decoding, "ONLINE", tried)


@pytest.fixture
def judge() -> Judge:
    """Return a judge of three streams of long and short scenes."""
    rng = np.random.default_rng(0)
    lengths = [rng.choice([3, 30], size=12, p=[0.7, 0.3]).tolist() for _ in range(3)]
    return Judge([stream(each, 12 * index) for index, each in enumerate(lengths)], Known())


# -- choosing ------------------------------------------------------------------------------


def test_uniform_chooses_the_middles_of_equal_intervals() -> None:
    choice = uniform(stream([4, 6, 10]), 4)
    assert choice.times.tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5])
    assert choice.bounds.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert choice.embeds.argmax(axis=1).tolist() == [0, 1, 2, 2]


def test_uniform_with_pool_averages_each_interval() -> None:
    given = stream([5, 5, 10])
    choice = uniform(given, 2, pool=True)
    expected = as_unit(np.stack([given.embeds[:10].mean(0), given.embeds[10:].mean(0)]))
    np.testing.assert_allclose(choice.embeds, expected, atol=1e-7)
    assert not np.allclose(choice.embeds, uniform(given, 2).embeds)


def test_uniform_with_pool_takes_the_nearest_window_for_an_empty_interval() -> None:
    given = stream([2, 2])
    assert uniform(given, 4, pool=True).embeds.argmax(axis=1).tolist() == [0, 0, 1, 1]
    pooled, single = uniform(given, 8, pool=True), uniform(given, 8)
    np.testing.assert_allclose(pooled.embeds, single.embeds, atol=1e-6)


def test_selective_finds_the_scenes_and_chooses_their_middles() -> None:
    choice = selective(stream([5, 3, 12]), 3)
    assert choice.embeds.argmax(axis=1).tolist() == [0, 1, 2]
    assert choice.times.tolist() == pytest.approx([0.5, 1.3, 2.7])
    assert choice.bounds.tolist() == pytest.approx([1.1, 1.7])


def test_online_chooses_the_segments_of_a_segmenter_pushed_step_by_step() -> None:
    settings = {"window": 2, "patience": 1, "smoothing": 1.0, "drift_threshold": 0.5}
    given = stream([10, 20, 10])
    segmenter = selective_decoding.OnlineSegmenter(**settings)
    pushed = [
        segment
        for embedding, time in zip(given.embeds, given.times, strict=True)
        for segment in segmenter.push(embedding, time)
    ]
    pushed += segmenter.close(given.end_time)
    choice = online(given, settings)
    assert len(choice.times) == len(pushed) == 3
    expected = np.stack([segment.embedding for segment in pushed])
    np.testing.assert_allclose(choice.embeds, expected, atol=1e-6)


@pytest.mark.parametrize(("rate", "count"), [(1.0, 4), (0.01, 1), (100.0, 20), (0.4, 2)])
def test_count_of_a_budget_is_between_one_and_every_window(rate: float, count: int) -> None:
    assert count_of(rate, stream([10, 10])) == count


# -- scoring -------------------------------------------------------------------------------


def test_judge_scores_right_texts_ten_and_others_less(judge: Judge) -> None:
    best = judge.score([oracle(each) for each in judge.streams])
    assert best.cider.tolist() == pytest.approx([10.0] * 36)
    assert best.captions == [text for [text] in judge.references]
    assert best.f1 == 1.0
    one = judge.score([uniform(each, 1) for each in judge.streams])
    assert 0 < one.mean < 5


def test_captions_nearest_returns_the_text_decoded_nearest_in_time() -> None:
    captions = Known()
    choice = Choice(np.array([1.0, 3.0]), np.eye(len(TEXTS), dtype=np.float32)[[4, 7]], np.zeros(1))
    captions.decode([choice])
    found = captions.nearest(choice, np.array([0.0, 1.9, 2.0, 2.1, 9.0]))
    assert found == [TEXTS[index] for index in (4, 4, 4, 7, 7)]


def test_oracle_with_pool_averages_from_halfway_to_halfway() -> None:
    given = stream([4, 4, 8])  # annotated at 0.4, 1.2 and 2.4 s: halfway are 0.8 and 1.8 s
    choice = oracle(given, pool=True)
    parts = given.embeds[:4], given.embeds[4:9], given.embeds[9:]
    expected = as_unit(np.stack([part.mean(axis=0) for part in parts]))
    np.testing.assert_allclose(choice.embeds, expected, atol=1e-7)
    assert choice.times.tolist() == oracle(given).times.tolist() == given.annotated.times.tolist()


def test_judge_rate_counts_every_decode(judge: Judge) -> None:
    outcome = judge.score([uniform(each, 5) for each in judge.streams])
    assert outcome.rate == pytest.approx(15 / sum(each.end_time for each in judge.streams))


def test_captions_decode_each_embedding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def write(model, processor, embeds, queries, previous, batch_size):
        decoded.append(len(embeds))
        return [str(index) for index in range(len(embeds))]

    monkeypatch.setattr(selective_decoding, "write", write)
    captions = Captions(None, None, "q", 4)
    given = stream([5, 5])
    captions.decode([uniform(given, 10), selective(given, 2)])
    captions.decode([uniform(given, 4)])
    assert decoded == [2]


def test_selective_with_one_decode_per_scene_is_perfect_and_uniform_is_not(judge: Judge) -> None:
    per_stream = [len(each.annotated.times) for each in judge.streams]
    pairs = list(zip(judge.streams, per_stream, strict=True))
    chosen = judge.score([selective(each, n) for each, n in pairs])
    assert chosen.cider.tolist() == pytest.approx([10.0] * 36)
    even = judge.score([uniform(each, n) for each, n in pairs])
    assert even.mean < 7
    # The boundary of a long and a short scene is not halfway between their annotations.
    assert even.f1 < chosen.f1 < 1


def test_enough_finds_that_fewer_decodes_keep_the_score_of_unequal_scenes(judge: Judge) -> None:
    """12 selective decodes are perfect, and the reference has 30: a factor of 2.5 is enough, or a
    larger one if the uniform decodes miss a scene."""
    fewer = enough(judge, "selective", "uniform")
    assert fewer >= 2.4
    reference = judge.at_rate("uniform", 2.5 * judge.annotation_rate)
    found = judge.at_rate("selective", 2.5 * judge.annotation_rate / fewer)
    assert found.mean >= reference.mean
    assert reference.mean < 10


def test_enough_finds_no_large_factor_for_windows_of_noise() -> None:
    rng = np.random.default_rng(0)
    given = stream([5] * 20)
    noisy = EmbeddedStream(
        given.annotated, as_unit(rng.normal(size=given.embeds.shape)), given.times, given.end_time
    )
    # The reference's score is low, so by chance a few fewer decodes can keep it.
    assert enough(Judge([noisy], Known()), "selective", "uniform") < 8


def test_thresholds_stay_within_the_budget_on_the_validation_streams(judge: Judge) -> None:
    budgets = [2.0, 0.6, 0.3]
    rates = []
    for budget, settings in zip(budgets, thresholds(judge, budgets), strict=True):
        outcome, offline = judge.online(settings)
        assert outcome.rate <= budget
        assert offline.rate == pytest.approx(outcome.rate)
        rates.append(outcome.mean)
    assert rates[0] == pytest.approx(10.0) and rates[2] < rates[0]


def test_thresholds_of_a_budget_below_all_settings_take_the_fewest_decodes(judge: Judge) -> None:
    settings = thresholds(judge, [1e-6])[0]
    assert judge.online(settings)[0].rate < 0.1


def test_judge_resamples_streams_and_not_annotations(judge: Judge) -> None:
    by_stream = np.repeat([0.0, 1.0, 2.0], 12)
    found = mean_interval(by_stream, judge.stream_of, 10.0)
    # In 1 of 9 draws, one stream is drawn thrice.
    assert (found.low, found.high, found.clusters) == (0.0, 2.0, 3)
    within = np.tile([0.0, 2.0], 18)  # the same variance, but within each stream
    found = mean_interval(within, judge.stream_of, 2.0)
    assert (found.low, found.high) == pytest.approx([2 * each for each in wilson(1.5, 3)])


def test_measure_scores_every_method_at_every_budget(judge: Judge) -> None:
    budgets = [1.0, 0.1]
    scores, curves, items = measure(judge, budgets, thresholds(judge, budgets))
    assert list(scores) == ["CIDEr at 1 Hz", "CIDEr at 0.1 Hz"]
    columns = ["uniform", "uniform + pool", "selective + pool", "online"]
    columns += ["offline, as many as online", "oracle", "oracle + pool"]
    for score in scores.values():
        assert list(score.baselines) == columns
        assert score.low <= score.value <= score.high
        assert score.baselines["oracle"] == pytest.approx(10.0)
        assert (score.n, score.clusters) == (36, 3)
    for metric, score in scores.items():
        assert items.scores[metric].mean() == pytest.approx(score.value)
    assert set(curves) == {*columns[:3], "selective", "online"}
    assert curves["selective"][0][1] == pytest.approx(scores["CIDEr at 1 Hz"].value, abs=1e-4)
    assert scores["CIDEr at 1 Hz"].value > scores["CIDEr at 0.1 Hz"].value


def test_compare_returns_differences_to_the_reference(judge: Judge) -> None:
    rate = 2.5 * judge.annotation_rate
    numbers = compare(judge, "selective", "uniform", fewer=2.0)
    same = judge.at_rate("uniform", rate)
    assert numbers["reference CIDEr"] == pytest.approx(same.mean, abs=1e-4)
    assert numbers["chosen difference"] == pytest.approx(10 - same.mean, abs=1e-4)
    assert numbers["chosen low"] <= numbers["chosen difference"] <= numbers["chosen high"]
    assert numbers["claimed fewer"] == 2.85
    assert "chosen low" not in compare(judge, "selective", "uniform", fewer=0.0)
    against_itself = compare(judge, "uniform", "uniform", fewer=1.0)
    assert against_itself["chosen difference"] == against_itself["chosen high"] == 0.0


def test_boundary_scores_use_one_segment_per_annotation(judge: Judge) -> None:
    found = boundary_scores(judge)
    pairs = [(each, len(each.annotated.times)) for each in judge.streams]
    assert found["boundary F1, selective"] == pytest.approx(
        judge.score([selective(*each) for each in pairs]).f1, abs=1e-4
    )
    assert found["boundary F1, selective"] > found["boundary F1, uniform"]


# -- boundaries ----------------------------------------------------------------------------


def test_boundary_f1_matches_once_and_within_the_tolerance() -> None:
    true = np.array([1.0, 2.0, 5.0])
    assert boundary_f1([(true, true)]) == 1.0
    assert boundary_f1([(true + 0.49, true)]) == 1.0
    assert boundary_f1([(true + 0.51, true)]) == pytest.approx(1 / 3)  # 1.51 is near 2.0
    assert boundary_f1([(np.array([1.0, 1.1, 1.2]), np.array([1.0]))]) == 0.5
    assert boundary_f1([(np.array([]), true)]) == 0.0
    assert boundary_f1([(np.array([]), np.array([]))]) == 1.0


def test_matches_equals_the_largest_matching_by_brute_force() -> None:
    def most(found: list[float], true: list[float]) -> int:
        if not found:
            return 0
        rest = most(found[1:], true)
        near = [index for index, time in enumerate(true) if abs(time - found[0]) <= 0.5]
        return max(
            [rest, *(1 + most(found[1:], true[:p] + true[p + 1 :]) for p in near)], default=rest
        )

    rng = np.random.default_rng(0)
    for _ in range(200):
        found = sorted(rng.uniform(0, 4, rng.integers(0, 6)).round(2).tolist())
        true = sorted(rng.uniform(0, 4, rng.integers(0, 6)).round(2).tolist())
        assert matches(found, true) == most(found, true), (found, true)


# -- files ---------------------------------------------------------------------------------


def test_read_streams_names_bad_lines(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", noise(5, 40, 40, 3))
    good = {"video": "a.mp4", "events": [{"time": 2, "text": "b"}, {"time": 1.0, "text": "a"}]}
    bad = {
        "b.mp4 is missing": {**good, "video": "b.mp4"},
        'must be an object with "video"': {"video": "a.mp4"},
        "a list with at least one": {**good, "events": []},
        "must be seconds": {**good, "events": [{"time": -1, "text": "a"}]},
        "must be seconds from 0": {**good, "events": [{"time": float("nan"), "text": "a"}]},
        "time is True": {**good, "events": [{"time": True, "text": "a"}]},
        "time is 1000": {**good, "events": [{"time": 10**400, "text": "a"}]},
        "text at 1": {**good, "events": [{"time": 1, "text": " "}]},
        "must be {": {**good, "events": [{"when": 1}]},
        "line 1 is about a.mp4 too": good,
    }
    lines = [json.dumps(row) for row in (good, *bad.values())] + ["{", ""]
    path = tmp_path / "streams.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    [found], left_out = read_streams(path)
    assert found.times.tolist() == [1.0, 2.0] and found.texts == ["a", "b"]
    assert [row.line for row in left_out] == list(range(2, 13))
    for reason, row in zip(bad, left_out, strict=False):
        assert reason in row.reason

    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no usable stream.*streams.jsonl:1"):
        read_streams(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write two streams and one without its file, and a validation stream."""
    events = [{"time": 0.5, "text": "go to the key"}, {"time": 1.5, "text": "open the door"}]
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", noise(20, 40, 40, 3))
    names = ("a", "missing", "b")
    rows = [{"video": f"{name}.mp4", "events": events} for name in names]
    write_rows(tmp_path / "streams.jsonl", rows)
    write_rows(tmp_path / "val.jsonl", rows[:1])
    (tmp_path / "streams.yaml").write_text(
        f"tiny:\n  task: streaming\n  description: Streams.\n  rows: {tmp_path}/streams.jsonl\n"
        f"  validation_rows: {tmp_path}/val.jsonl\n  num_frames: 4\n  query: describe\n"
    )
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the decoder: a tiny one never ends a text by itself."""

    def decode(model, processor, given, queries, previous, num_beams):
        return [TEXTS[int(row.argmax())] for row in given]

    monkeypatch.setattr(captioning, "decode_texts", decode)


def test_evaluate_measures_streams_and_rejects_an_ablation(data: Path, short: None, capsys) -> None:
    tiny_writer().save_pretrained(data / "model")
    tiny_processor().save_pretrained(data / "model")
    options = ["--model", str(data / "model"), "--benchmarks", str(data / "streams.yaml")]
    main([*options, "--tasks", "tiny"])
    saved = json.loads((data / "model/eval/results.json").read_text())["benchmarks"]["tiny"]
    assert saved["protocol"]["streams"] == 2 and saved["protocol"]["annotations"] == 4
    assert saved["skipped"] == ["streams.jsonl:2: video: the file missing.mp4 is missing"]
    assert set(saved["curves"]) == {
        "uniform", "uniform + pool", "selective", "selective + pool", "online"
    }  # fmt: skip
    found = compare_evaluations([str(data / "model"), str(data / "model/eval")])
    assert [(each.items, each.clusters, each.difference) for each in found] == [(4, 2, 0.0)] * 11
    report = (data / "model/eval/report.html").read_text(encoding="utf-8")
    assert "CIDEr over the time between decodes" in report and "missing.mp4" in report
    assert "CIDEr at 0.01 Hz" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without --ablation"):
        main([*options, "--tasks", "tiny", "--ablation", "grey"])


def test_evaluate_names_the_streams_left_out_of_either_file(data: Path, short: None) -> None:
    write_clip(data / "one.mp4", noise(1, 40, 40, 3))
    events = [{"time": 0.5, "text": "go to the key"}, {"time": 90, "text": "open the door"}]
    rows = [{"video": f"{name}.mp4", "events": events} for name in ("a", "one", "missing")]
    write_rows(data / "val.jsonl", rows)
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    result = evaluate(Task(tiny_writer(), tiny_processor(), benchmark))
    assert result.skipped == [  # no line has an absolute path
        "streams.jsonl:2: video: the file missing.mp4 is missing",
        "val.jsonl:3: video: the file missing.mp4 is missing",
        "val.jsonl, line 1: a.mp4 ends at 1.9 s, before 1 of its annotations, which are paired "
        "with its last text",
        "val.jsonl, line 2: one.mp4 has one frame, so it lasts no time",
    ]
    write_rows(data / "val.jsonl", rows[1:2])
    with pytest.raises(ValueError, match="no stream could be read.*one.mp4 has one frame"):
        evaluate(Task(tiny_writer(), tiny_processor(), benchmark))


def test_evaluate_rejects_streams_that_measure_nothing(data: Path, short: None) -> None:
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    parts = tiny_writer(), tiny_processor(), benchmark
    with pytest.raises(ValueError, match="limit is 0: give at least 1 stream"):
        evaluate(Task(*parts, limit=0))
    same = [{"time": time, "text": "go to the key"} for time in (0.5, 1.5)]
    write_rows(data / "val.jsonl", [{"video": "a.mp4", "events": same}])
    with pytest.raises(ValueError, match="val.jsonl: all annotations are the same text"):
        evaluate(Task(*parts))
    (data / "val.jsonl").write_bytes((data / "streams.jsonl").read_bytes())
    with pytest.raises(ValueError, match="rows and validation_rows are the same streams"):
        evaluate(Task(*parts))


def test_evaluate_gives_equal_streams_equal_results(data: Path, short: None) -> None:
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    model, processor = tiny_writer().eval(), tiny_processor()
    task = Task(model, processor, benchmark, batch_size=7)
    assert evaluate(task).as_json() == evaluate(task).as_json()


def test_embed_streams_does_not_depend_on_the_batch_size(data: Path) -> None:
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    model, processor = tiny_writer().eval(), tiny_processor()
    streams, _ = benchmark.load()
    (one, _), (many, _) = (
        embed_streams(Task(model, processor, benchmark, batch_size=size), streams)
        for size in (1, 7)
    )
    for first, again in zip(one, many, strict=True):
        np.testing.assert_allclose(first.embeds, again.embeds, atol=1e-6)
        assert first.times.tolist() == again.times.tolist()
        assert first.end_time == again.end_time


def test_embed_streams_with_a_store_embeds_nothing_twice(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has the times, too, and names a broken video again."""
    (data / "torn.mp4").write_bytes(b"no video")
    torn = json.loads((data / "val.jsonl").read_text()) | {"video": "torn.mp4"}
    with open(data / "streams.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(torn) + "\n")
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    model, processor = tiny_writer(), tiny_processor()
    streams, _ = benchmark.load()
    expected, reasons = embed_streams(Task(model, processor, benchmark), streams)
    facts = facts_of(model.vljepa, processor, "the weights")
    for encode in (VLJEPAModel.encode_video, None):  # a call of None would raise a TypeError
        monkeypatch.setattr(VLJEPAModel, "encode_video", encode)
        store = EmbeddingStore.open(data / "embeddings", facts)
        task = Task(model, processor, benchmark, store=store)
        found, left_out = embed_streams(task, streams)
        assert left_out == reasons and "torn.mp4: " in left_out[0]
        for each, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(each.embeds, wanted.embeds, atol=1e-6)
            assert each.times.tolist() == wanted.times.tolist()
            assert each.end_time == wanted.end_time


@pytest.fixture
def stored(data: Path) -> Path:
    """Store the streams in several parts each; the third of `streams.jsonl` is no video."""
    shutil.copy(data / "a.mp4", data / "b.mp4")
    (data / "torn.mp4").write_bytes(b"no video")
    torn = json.loads((data / "val.jsonl").read_text()) | {"video": "torn.mp4"}
    with open(data / "streams.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(torn) + "\n")
    model, processor, store = tiny_model(), tiny_processor(), data / "store"
    store.mkdir()
    (store / "plan.json").touch()
    facts = made_with(model, processor.video_processor, 8)
    options = {"dtype": "bfloat16", "batch_size": 3, "bf16": False, "part_bytes": 2000}
    counts = [
        write_stream(store, video, settings, facts, model.eval(), processor, **options)
        for video, settings in streams_of(data / "streams.yaml", ["tiny"], 8)
    ]
    assert counts == [17, 17, 0]
    # The videos have one content, so they share the files: a part for every three windows.
    assert len(list(store.glob("stream-*.safetensors"))) == 6
    return store


def test_embed_streams_from_a_feature_store_equals_live_ones(data: Path, stored: Path) -> None:
    """No frame is decoded, and the X-Encoder is not run."""
    model, processor = tiny_writer().eval(), tiny_processor()
    model.vljepa.load_state_dict(tiny_model().state_dict())
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    streams, _ = benchmark.load()
    expected, reasons = embed_streams(Task(model, processor, benchmark), streams)
    shutil.move(data / "a.mp4", data / "moved.mp4")
    (data / "a.mp4").symlink_to(data / "moved.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLJEPAModel, "encode_video", None)  # a call would raise a TypeError
        patch.setattr(VLJEPAProcessor, "watch", None)
        store = StreamStore.open(stored, model.vljepa, processor.video_processor)
        task = Task(model, processor, benchmark, features=store, batch_size=7)
        found, left_out = embed_streams(task, streams)
    assert left_out == reasons and "torn.mp4: " in left_out[0]
    for each, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(each.embeds, wanted.embeds, atol=5e-3)
        assert each.times.tolist() == wanted.times.tolist()
        assert each.end_time == wanted.end_time
    assert np.abs(found[0].embeds[0] - expected[0].embeds[9]).max() > 0.02  # positive control
    assert 0 < store.precision()["relative_error"]["mean"] < 4e-3


def test_stream_store_rejects_other_windows_models_and_videos(data: Path, stored: Path) -> None:
    model, processor = tiny_model(), tiny_processor()
    store = StreamStore.open(stored, model, processor.video_processor)
    video = str(data / "a.mp4")
    assert len(store.stream(video, stride=1, fps=None)) == 17
    with pytest.raises(FeatureError, match="a.mp4 is not in it.*stride 2, all frames.*--streams"):
        store.stream(video, stride=2, fps=None)
    with pytest.raises(FeatureError, match="windows of 2 frames.*4 frames per second"):
        other = StreamStore.open(stored, model, processor.video_processor, num_frames=2)
        other.stream(video, stride=1, fps=4)
    with pytest.raises(FeatureError, match="the X-Encoder has other weights"):
        other = StreamStore.open(stored, tiny_model(seed=1), processor.video_processor)
        other.stream(video, stride=1, fps=None)
    with pytest.raises(MediaError, match=r"torn\.mp4: "):
        store.stream(str(data / "torn.mp4"), stride=1, fps=None)
    write_clip(data / "a.mp4", 255 - noise(20, 40, 40, 3))
    with pytest.raises(FeatureError, match="a.mp4 is not in it, or has changed"):
        store.stream(video, stride=1, fps=None)
    with pytest.raises(FeatureError, match="there is no stored stream"):
        StreamStore.open(data, model, processor.video_processor)


def test_evaluate_opens_the_streams_of_a_feature_store(
    data: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_writer()
    model.vljepa.load_state_dict(tiny_model().state_dict())
    model.save_pretrained(data / "model")
    tiny_processor().save_pretrained(data / "model")

    def measured(task: Task) -> None:
        streams, _ = task.benchmark.load()
        found, _ = embed_streams(task, streams)
        raise InterruptedError(f"{task.features.folder}: {len(found)} streams")

    kind = dataclasses.replace(TASKS["streaming"], evaluate=measured)
    monkeypatch.setitem(TASKS, "streaming", kind)
    monkeypatch.setattr(VLJEPAModel, "encode_video", None)  # a call would raise a TypeError
    options = ["--model", str(data / "model"), "--benchmarks", str(data / "streams.yaml")]
    with pytest.raises(InterruptedError, match=f"{stored}: 2 streams"):
        main([*options, "--tasks", "tiny", "--features", str(stored)])


def test_evaluate_rejects_a_model_without_a_decoder_for_streams(data: Path) -> None:
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    with pytest.raises(ValueError, match="tiny: streaming needs a Y-Decoder"):
        evaluate(Task(tiny_model(), tiny_processor(), benchmark))


def test_evaluate_rejects_a_decoder_that_reads_the_text_before(data: Path) -> None:
    [benchmark] = load_benchmarks(data / "streams.yaml", ["tiny"])
    with pytest.raises(ValueError, match="tiny: this decoder reads the text before"):
        evaluate(Task(tiny_writer(decoder_reads_previous=True), tiny_processor(), benchmark))


def test_load_benchmarks_needs_validation_streams(data: Path) -> None:
    text = (data / "streams.yaml").read_text()
    (data / "streams.yaml").write_text(text.replace("validation_rows", "train_rows"))
    with pytest.raises(ValueError, match="streaming benchmark needs validation_rows"):
        load_benchmarks(data / "streams.yaml", ["tiny"])


def test_examples_show_the_end_of_a_video_for_an_annotation_after_it() -> None:
    late = stream([3, 3])
    late.annotated.times[-1] = late.end_time + 48
    found = selective_decoding.examples(Judge([late], Known()), 1.0)
    assert (found[-1].media.start, found[-1].media.end) == (late.end_time - 1, late.end_time)


def test_report_and_table_show_comparisons_and_curves(judge: Judge, tmp_path: Path) -> None:
    budgets = [1.0, 0.1]
    scores, curves, _ = measure(judge, budgets, thresholds(judge, budgets))
    result = TaskResult(
        name="tiny",
        task="streaming",
        description="Streams.",
        protocol={},
        scores=scores,
        numbers={"reference rate": 1.0},
        comparisons={"a against b": compare(judge, "selective", "uniform", 2.0)},
        curves=curves,
    )
    table = text_tables([result])
    assert (
        "a against b: reference CIDEr" in table
        and "claimed fewer 2.85" in table
        and "oracle" in table
    )
    write_report(tmp_path / "report.html", "m", [result], tmp_path / "none.json")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png") == 1
