"""The streaming caption pipeline equals its parts put together, and it ships with the model."""

import json
import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from modeling_vljepa import (
    OnlineSegmenter,
    StreamEncoder,
    VLJEPAForConditionalGeneration,
    decode_texts,
    stream,
)
from modeling_vljepa.pipelines.pipeline_vljepa import (
    VLJEPAStreamingCaptionPipeline,
)
from processing import FrameStream, MediaError, WindowStream, windows
from tests.pipelines.rounding import approximately, clear_choices
from tests.pipelines.test_stream_session import assert_same_embeddings, scenes
from tests.tiny import (
    noise,
    run_elsewhere,
    tiny_model,
    tiny_processor,
    tiny_writer,
    write_clip,
)
from training.hub.publishing import write_folder

PROCESSOR = tiny_processor()
QUERY = "what is the dog doing ?"
TEXTS = ["a cat", "red", "the door opens", "blue green"]
SHORT = {"max_new_tokens": 6}
# For short scenes: a random model embeds pictures of noise at least 0.1 apart.
QUICK = {"variance_threshold": 0.03, "drift_threshold": 0.05, "window": 4}


@pytest.fixture(scope="module")
def writer() -> VLJEPAStreamingCaptionPipeline:
    """Pipeline of a model with a Y-Decoder."""
    model = tiny_writer()
    return VLJEPAStreamingCaptionPipeline(model=model, processor=PROCESSOR, device="cpu")


@pytest.fixture(scope="module")
def chooser() -> VLJEPAStreamingCaptionPipeline:
    """Pipeline of a model without a Y-Decoder."""
    model = tiny_model()
    return VLJEPAStreamingCaptionPipeline(model=model, processor=PROCESSOR, device="cpu")


def spans(captions: list[dict]) -> list[tuple[float, float]]:
    return [(each["start"], each["end"]) for each in captions]


# -- embeddings ----------------------------------------------------------------------------


def test_stream_equals_windows_and_encoder_put_together(tmp_path):
    model = tiny_writer()
    path = write_clip(tmp_path / "clip.mp4", noise(23, 40, 48, 3))
    for source in (path, path.read_bytes()):
        found = list(stream(model, PROCESSOR, source, QUERY, 6, 5, fps=5, batch_size=2))
        frames = windows(FrameStream(path, fps=5), PROCESSOR.video_processor, size=6, stride=5)
        parts = list(StreamEncoder(model.vljepa, PROCESSOR, QUERY).stream(frames, 2))
        assert len(found) == len(parts) == 3
        assert_same_embeddings(found, parts)
        for one, two in zip(found, parts, strict=True):
            assert (one.start_time, one.end_time) == (two.start_time, two.end_time)
    assert [each.start_time for each in found] == pytest.approx([0.0, 1.0, 1.2])
    # The defaults: windows of `num_frames` frames, half of it as stride, all frames, no query.
    default = list(stream(model, PROCESSOR, path))
    explicit = list(stream(model, PROCESSOR, path, None, 4, 2, fps=None))
    assert [each.times for each in PROCESSOR.watch(path)] == [
        each.times for each in PROCESSOR.watch(path, window=4, stride=2)
    ]
    assert_same_embeddings(default, explicit)
    assert len(default) == len(explicit) == 11
    asked = list(stream(model, PROCESSOR, path, QUERY))  # positive control
    assert not torch.allclose(asked[0].embedding, default[0].embedding, atol=1e-4)


def test_stream_and_captions_use_bounded_memory(chooser):
    """Only a few of many frames and visual tokens are in memory at once."""
    frames_alive, embeds_alive, most = weakref.WeakSet(), weakref.WeakSet(), [0, 0]

    class Watched(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def endless():
        random = np.random.default_rng(0)
        for number in range(1600):
            if number % 400 == 0:
                still = random.integers(0, 256, (36, 36, 3), np.uint8)
            frame = still.copy().view(Watched)
            frames_alive.add(frame)
            most[0] = max(most[0], len(frames_alive))
            yield number / 2, frame

    count = 0
    for each in chooser.stream(endless(), None, 4, 4, batch_size=16):
        embeds_alive.add(each.visual_embeds)
        most[1] = max(most[1], len(embeds_alive))
        count += 1
    assert count == 400 and most[0] <= 4 and most[1] <= 17

    tracemalloc.start()
    held = []
    settings = {"batch_size": 16, "window": 4, "stride": 4, "segmenter_kwargs": QUICK}
    for _ in chooser(endless(), candidates=TEXTS, **settings):
        held.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 4 and most[0] <= 4
    assert peak < 4_000_000 < 1600 * 36 * 36 * 3
    assert held[-1] - held[0] < 200_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0: give at least 1 frame"),
        ({"window": 4, "stride": 5}, "stride is 5 and size 4"),
        ({"stride": 0}, "stride is 0 and size 4"),
        ({"fps": 0}, "fps is 0"),
    ],
)
def test_watch_rejects_bad_options_before_the_source_is_opened(options, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR.watch("gone.mp4", **options)


def test_watch_opens_addresses_only_if_the_caller_allows_it():
    with pytest.raises(MediaError, match="allow_urls=True"):
        PROCESSOR.watch("http://127.0.0.1/a.mp4")
    assert PROCESSOR.watch("http://127.0.0.1/a.mp4", allow_urls=True).frames.live


def test_watch_names_a_missing_file_when_it_is_read():
    assert PROCESSOR.watch("a.mp4", window=1).stride == 1
    with pytest.raises(MediaError, match="gone.mp4: no such file"):
        list(PROCESSOR.watch("gone.mp4"))


def test_stream_rejects_batches_of_no_windows():
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(stream(tiny_model(), PROCESSOR, scenes([3]), batch_size=0))


def test_watch_reports_frames_above_the_pixel_limit_as_broken():
    processor = tiny_processor()
    processor.video_processor.max_pixels = 40 * 48 - 1
    with processor.watch(scenes([9])) as watched:
        assert list(watched) == [] and watched.report.broken == 9
    assert isinstance(watched, WindowStream)


# -- captions ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_captions_are_the_decoded_segments_of_the_embeddings(writer, batch_size):
    source = scenes([40, 30, 50])
    settings = {"query": QUERY, "segmenter_kwargs": QUICK, "generate_kwargs": SHORT}
    captions = writer(source, batch_size=batch_size, **settings)
    found = list(captions)
    embedded = list(writer.stream(source, QUERY))
    times = [embedded[0].start_time, *(each.time for each in embedded[1:])]
    embeds = torch.stack([each.embedding for each in embedded])
    expected = OnlineSegmenter(**QUICK).segment(embeds, times, embedded[-1].end_time)
    assert spans(found) == [(each.start_time, each.end_time) for each in expected]
    assert len(found) == 3 and found[0]["start"] == 0 and found[-1]["end"] == 59.5
    confidences = [each["confidence"] for each in found]
    assert confidences == pytest.approx([each.confidence for each in expected], abs=1e-5)
    assert_same_embeddings(captions.session.segments, expected)
    # The embeddings that were decoded, not `expected`: their last bits depend on the batch size.
    texts = []
    for segment in captions.session.segments:
        embeds = segment.embedding[None]
        texts += decode_texts(writer.model, PROCESSOR, embeds, queries=[QUERY], **SHORT)
    assert [each["text"] for each in found] == texts
    assert len(set(texts)) > 1  # positive control
    assert all(each.keys() == {"start", "end", "text", "confidence"} for each in found)


def test_captions_with_candidates_are_the_nearest_ones(chooser, writer):
    source = scenes([40, 30, 50])
    settings = {"candidates": TEXTS, "segmenter_kwargs": QUICK}
    captions = chooser(source, **settings)
    found = list(captions)
    with torch.no_grad():
        targets = chooser.model.encode_target(**PROCESSOR(targets=TEXTS))
    embeds = torch.stack([each.embedding for each in captions.session.segments])
    scores, nearest = (embeds @ targets.T).topk(2)
    assert (scores[:, 0] - scores[:, 1]).min() > 1e-3  # rounding cannot change the nearest
    expected = [TEXTS[index] for index in nearest[:, 0]]
    assert [each["text"] for each in found] == expected and len(found) == 3
    # A decoder is not used, even if there is one.
    assert {each["text"] for each in writer(source, **settings)} <= set(TEXTS)
    # The query changes the embeddings.
    other = [list(chooser(source, query=query, **settings)) for query in (None, QUERY)]
    assert other[0] == approximately(found)
    assert abs(other[1][0]["confidence"] - found[0]["confidence"]) > 1e-4


def test_captions_pass_the_previous_text_to_the_decoder():
    model = tiny_writer(
        decoder_reads_query=True, decoder_reads_previous=True, prompts={"caption": "what ?"}
    )
    pipe = VLJEPAStreamingCaptionPipeline(model=model, processor=PROCESSOR, device="cpu")
    source = scenes([40, 30, 50])
    settings = {"segmenter_kwargs": QUICK, "generate_kwargs": SHORT}
    for query in (QUERY, None):
        captions = pipe(source, query=query, **settings)
        with clear_choices(model):
            found = [each["text"] for each in captions]
        previous, alone = [""], []
        for segment in captions.session.segments:
            asked = {"queries": [query or "what ?"], **SHORT}
            embeds = segment.embedding[None]
            alone += decode_texts(model, PROCESSOR, embeds, **asked)
            previous += decode_texts(model, PROCESSOR, embeds, previous=previous[-1:], **asked)
        assert found == previous[1:] and len(found) == 3
        assert found != alone  # positive control
        assert found == [each["text"] for each in pipe(source, query=query, **settings)]


def test_captions_arrive_and_questions_are_answered_while_the_stream_runs(chooser):
    taken = []

    def source():
        for item in scenes([40, 200]):
            taken.append(item)
            yield item

    with chooser(source(), candidates=TEXTS, segmenter_kwargs=QUICK) as captions:
        first = next(captions)
        assert 40 < len(taken) <= 40 + 4 + 2 * 7  # `window + patience` steps after the change
        assert captions.report.frames == len(taken)
        assert first["end"] == pytest.approx(20, abs=1.5)
        [best, *_] = captions.session.ask(TEXTS, query=QUERY)
        assert best["text"] in TEXTS and best["end_time"] <= len(taken) / 2
    assert list(captions) == [] and len(taken) < 240
    assert captions.session.ask(["a cat"])[0]["text"] == "a cat"


def test_caption_pipeline_takes_default_parameters_when_it_is_made(chooser):
    once = VLJEPAStreamingCaptionPipeline(
        model=chooser.model,
        processor=PROCESSOR,
        device="cpu",
        candidates=TEXTS,
        segmenter_kwargs=QUICK,
        stride=4,
        batch_size=2,
    )
    source = scenes([40, 30, 50])
    each_time = {"candidates": TEXTS, "segmenter_kwargs": QUICK, "batch_size": 2}
    for changes, same in (({}, {"stride": 4}), ({"stride": 2}, {})):
        expected = list(chooser(source, **same, **each_time))
        assert list(once(source, **changes)) == approximately(expected)
    assert once(source).session.batch_size == 2
    assert once(source, batch_size=5).session.batch_size == 5


@pytest.mark.parametrize(
    ("pipe", "options", "error", "message"),
    [
        ("chooser", {}, ValueError, r"candidates is missing, and .* no Y-Decoder .*train_decoder"),
        ("chooser", {"candidates": []}, ValueError, "candidates is empty"),
        ("chooser", {"candidates": "red"}, ValueError, "candidates is a str"),
        ("writer", {"query": 7}, ValueError, "query is a int"),
        ("writer", {"query": "\ud83d"}, ValueError, "query holds half a character"),
        ("chooser", {"candidates": ["a", "\ud83d"]}, ValueError, r"candidates\[1\] holds half"),
        ("writer", {"window": 0}, ValueError, "window is 0"),
        ("writer", {"segmenter_kwargs": {"patience": 0}}, ValueError, "patience is 0"),
        ("writer", {"segmenter_kwargs": {"patient": 1}}, TypeError, "'patient'"),
        ("writer", {"frames": 4}, TypeError, "'frames'"),
        ("writer", {"generate_kwargs": {"num_return_sequences": 2}}, ValueError, "has one text"),
        ("writer", {"generate_kwargs": {}, "candidates": ["a"]}, ValueError, "leave it out"),
    ],
)
def test_caption_pipeline_rejects_bad_options_before_reading(
    request, pipe, options, error, message
):
    with pytest.raises(error, match=message):
        request.getfixturevalue(pipe)(scenes([3]), **options)


def test_caption_pipeline_names_a_source_that_cannot_be_opened(writer, tmp_path):
    with pytest.raises(MediaError, match="allow_urls=True"):
        writer("rtsp://127.0.0.1/a")
    captions = writer(tmp_path / "gone.mp4")
    with pytest.raises(MediaError, match="gone.mp4: no such file"):
        next(captions)
    assert list(writer([])) == []


def test_caption_pipeline_rejects_batches_of_no_windows(chooser):
    with pytest.raises(ValueError, match="batch_size is 0: give a whole number of at least 1"):
        list(chooser(scenes([3]), candidates=TEXTS, batch_size=0))


@pytest.mark.parametrize("head", ["predictor_head", "y_head"])
def test_caption_pipeline_rejects_embeddings_that_are_not_finite(head):
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(head).projection.weight[0, 0] = torch.nan
    pipe = VLJEPAStreamingCaptionPipeline(model=model, processor=PROCESSOR, device="cpu")
    with pytest.raises(ValueError, match="embedding of this model is not finite"):
        list(pipe(scenes([3]), candidates=TEXTS))
    with pytest.raises(ValueError, match="embedding of this model is not finite"):
        pipe.session(candidates=TEXTS).encoder.embed_texts(TEXTS)
        list(pipe.stream(scenes([3])))


@pytest.mark.parametrize("batch_size", [float("nan"), 1.5, True])
def test_caption_pipeline_rejects_a_batch_size_that_is_no_whole_number(chooser, batch_size):
    with pytest.raises(ValueError, match="batch_size is .*: give a whole number of at least 1"):
        list(chooser(scenes([3]), candidates=TEXTS, batch_size=batch_size))


def test_session_ask_takes_a_generator_of_candidates(chooser):
    captions = chooser(scenes([3]), candidates=TEXTS)
    list(captions)
    expected = captions.session.ask(TEXTS)
    assert captions.session.ask(text for text in TEXTS) == approximately(expected)
    for candidates, message in (
        (None, "candidates is a NoneType"),
        ([], "candidates is empty"),
        ("red", "candidates is a str"),
        ([3], "candidates.0. is a int"),
        (["\ud83d"], "candidates.0. holds half a character"),
    ):
        with pytest.raises(ValueError, match=message):
            captions.session.ask(candidates)
    for query, message in ((3, "query is a int"), ("\ud83d", "query holds half a character")):
        with pytest.raises(ValueError, match=message):
            captions.session.ask(TEXTS, query=query)


# -- without this package ------------------------------------------------------------------


@pytest.mark.slow
def test_caption_pipeline_of_a_published_folder_runs_without_this_package(tmp_path):
    """The folder is published, then saved again by another pipeline that was loaded from it."""
    write_clip(tmp_path / "clip.mp4", np.stack([frame for _, frame in scenes([40, 30])]))
    trained = VLJEPAStreamingCaptionPipeline(model=tiny_writer(), processor=PROCESSOR)
    trained.save_pretrained(tmp_path / "trained")
    write_folder(tmp_path / "trained", tmp_path / "published", "me/tiny")
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "for caption in watch(enumerate(clip)):" in card  # a decoder needs no candidates
    settings = {"query": QUERY, "generate_kwargs": SHORT, "segmenter_kwargs": QUICK, "fps": 5}
    model = VLJEPAForConditionalGeneration.from_pretrained(tmp_path / "published")
    writer = VLJEPAStreamingCaptionPipeline(model=model, processor=PROCESSOR, device="cpu")
    with clear_choices(model):
        expected = list(writer(tmp_path / "clip.mp4", **settings))
    script = f"""
import json
from transformers import pipeline
found = []
for folder in ("published", "again"):
    watch = pipeline("streaming-caption", model=folder, trust_remote_code=True, device="cpu")
    assert type(watch).__module__.startswith("transformers_modules"), type(watch)
    captions = watch("clip.mp4", **{settings!r})
    found.append(list(captions))
    found.append([each["text"] for each in captions.session.ask({TEXTS!r})])
    if folder == "published":
        ask = "visual-question-answering"
        pipeline(ask, model=folder, trust_remote_code=True).save_pretrained("again")
print(json.dumps(found))
"""
    found = json.loads(run_elsewhere(script, tmp_path).splitlines()[-1])
    assert found[0] == approximately(expected) and len(expected) == 2
    assert found[2] == approximately(expected)
    assert found[1] == found[3] and sorted(found[1]) == sorted(TEXTS)
    published, again = (
        {path.name for path in (tmp_path / folder).glob("*.py")}
        for folder in ("published", "again")
    )
    assert published == again
