"""A session embeds windows like clips, within bounded memory."""

import math
import tracemalloc
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, Segment
from modeling_vljepa.pipelines.stream_session import Memory, StreamEncoder, StreamSession
from processing.frame_stream import FrameStream
from processing.windows import windows
from tests import tiny
from tests.tiny import TOWER, noise, tiny_processor

PROCESSOR = tiny_processor()
# Random weights tell scenes apart under a short query only.
tiny_model = partial(tiny.tiny_model, prompts={"caption": ""})
QUERY = "what is the dog doing ?"
TOWERS = {"vision_config": {"model_type": "dinov2", **TOWER}}


def scenes(lengths: list[int], height: int = 40, width: int = 48) -> list[tuple[float, np.ndarray]]:
    """Return still pictures of noise, each for a number of frames, at two frames a second."""
    random = np.random.default_rng(0)
    stills = [random.integers(0, 256, (height, width, 3), np.uint8) for _ in lengths]
    frames = [still for still, length in zip(stills, lengths, strict=True) for _ in range(length)]
    return [(index / 2, frame) for index, frame in enumerate(frames)]


def cut(source, size: int = 4, stride: int = 2):
    return windows(FrameStream(source), PROCESSOR.video_processor, size=size, stride=stride)


def moving(count: int = 13) -> list[tuple[float, np.ndarray]]:
    return [(index / 2, noise(40, 48, 3) // (index + 1)) for index in range(count)]


def assert_same_embeddings(found, expected) -> None:
    """Compare windows or segments by their embeddings."""
    found, expected = (torch.stack([e.embedding for e in each]) for each in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture
def counted(monkeypatch):
    """Maker of a tiny model and a list of the frames that its X-Encoder is given per call."""

    def make(**changes):
        model, calls = tiny_model(**changes), []
        encode = model.x_encoder.forward

        def forward(pixels):
            calls.append(pixels.shape[0] * pixels.shape[1])
            return encode(pixels)

        monkeypatch.setattr(model.x_encoder, "forward", forward)
        return model, calls

    return make


# -- embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, TOWERS], ids=["vjepa2", "dinov2"])
@pytest.mark.parametrize("query", [None, QUERY])
def test_encoder_embeds_a_window_like_a_clip(changes, query):
    model = tiny_model(**changes, prompts={"caption": "what is it ?"})  # asked by default
    found = list(StreamEncoder(model, PROCESSOR, query).stream(cut(moving()), batch_size=3))
    assert [(each.start_time, each.end_time, each.time) for each in found] == [
        (start, start + 1.5, start + 0.75) for start in (0, 1, 2, 3, 4, 4.5)
    ]
    tokens = PROCESSOR(text=["what is it ?" if query is None else query])
    with torch.no_grad():
        for each, window in zip(found, cut(moving()), strict=True):
            expected = model.predict(window.pixel_values[None], **tokens)[0]
            torch.testing.assert_close(each.embedding, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0].embedding, found[1].embedding, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 6, 100])
def test_encoder_with_image_tower_encodes_every_frame_once(counted, batch_size):
    model, calls = counted(**TOWERS)
    encoder = StreamEncoder(model, PROCESSOR)
    list(encoder.stream(cut(moving(30)), batch_size))
    assert sum(calls) == 30
    assert len(encoder.seen) <= 4 + 2 * (batch_size - 1)


def test_encoder_shares_no_frames_between_streams():
    encoder = StreamEncoder(tiny_model(**TOWERS), PROCESSOR)
    other = [(time, 255 - frame) for time, frame in moving()]
    found = [list(encoder.stream(cut(source))) for source in (moving(), other)]
    fresh = list(StreamEncoder(encoder.model, PROCESSOR).stream(cut(other)))
    assert_same_embeddings(found[1], fresh)
    assert not torch.allclose(found[0][0].embedding, fresh[0].embedding, atol=1e-4)


def test_encoder_with_v_jepa_2_encodes_a_frame_once_per_window(counted):
    """The tokens of a frame depend on the other frames of the window."""
    model, calls = counted()
    found = list(StreamEncoder(model, PROCESSOR).stream(cut(moving(12)), batch_size=2))
    assert sum(calls) == len(found) * 4 == 20
    shared = [each.visual_embeds.unflatten(0, (2, -1)) for each in found[:2]]  # two tubelets
    assert (shared[0][1] - shared[1][0]).abs().max() > 1e-2

    tower = tiny_model(**TOWERS)  # positive control
    found = list(StreamEncoder(tower, PROCESSOR).stream(cut(moving(12))))
    shared = [each.visual_embeds.unflatten(0, (2, -1)) for each in found[:2]]
    assert torch.equal(shared[0][1], shared[1][0])


# -- segments ------------------------------------------------------------------------------


def quick(**changes) -> OnlineSegmenter:
    """Return a segmenter for short scenes: a random model embeds noise at least 0.1 apart."""
    settings = {"variance_threshold": 0.03, "drift_threshold": 0.05, "window": 4}
    return OnlineSegmenter(**settings | changes)


def test_session_turns_scenes_into_segments():
    model = tiny_model()
    session = StreamSession(model, PROCESSOR, query=QUERY, segmenter=quick())
    segments = list(session.run(cut(scenes([40, 30, 50]))))
    assert len(segments) == 3
    assert segments[0].start_time == 0 and segments[-1].end_time == 59.5
    for one, two in zip(segments, segments[1:], strict=False):
        assert (one.end, one.end_time) == (two.start, two.start_time)
    # Within one window of the true boundary.
    assert segments[0].end_time == pytest.approx(20, abs=1.5)
    assert segments[1].end_time == pytest.approx(35, abs=1.5)
    assert all(0.98 < each.confidence <= 1 for each in segments)
    assert all(each.text is None for each in segments) and session.decodes == 0
    [still] = StreamSession(model, PROCESSOR, segmenter=quick()).run(cut(scenes([60])))
    assert (still.start_time, still.end_time) == (0, 29.5)


def test_session_decodes_one_text_per_segment():
    given = []

    def decode(embeds: torch.Tensor) -> list[str]:
        given.append(embeds)
        return [f"text {len(given)}"]

    session = StreamSession(tiny_model(), PROCESSOR, segmenter=quick(), decode=decode)
    segments = list(session.run(cut(scenes([40, 30, 50]))))
    assert [each.text for each in segments] == ["text 1", "text 2", "text 3"]
    assert session.decodes == 3 and session.segments == segments
    for embeds, segment in zip(given, segments, strict=True):
        assert torch.equal(embeds, segment.embedding[None])


def test_session_yields_a_segment_as_soon_as_it_is_closed():
    frames = scenes([40, 60])
    taken = []

    def source():
        for item in frames:
            taken.append(item)
            yield item

    session = StreamSession(tiny_model(), PROCESSOR, segmenter=quick())
    first = next(session.run(cut(source())))
    # At most `window + patience` steps of two frames after the change.
    assert 40 < len(taken) <= 40 + 4 + 2 * 7
    assert first.end_time == pytest.approx(20, abs=1.5)


def test_session_of_an_empty_stream_has_no_segment():
    session = StreamSession(tiny_model(), PROCESSOR)
    assert list(session.run(cut([]))) == []
    with pytest.raises(ValueError, match="has seen no window: run it first"):
        session.ask(["a cat"])
    with pytest.raises(ValueError, match="max_segments is 3"):
        StreamSession(tiny_model(), PROCESSOR, max_segments=3)


def test_session_uses_bounded_memory_for_an_hour():
    """Only a few of 1,800 frames are in memory at once."""
    alive, most = weakref.WeakSet(), 0

    def hour():
        nonlocal most
        random = np.random.default_rng(0)
        for second in range(0, 3600, 2):
            if second % 304 == 0:  # every window of 8 s sees one still only
                still = random.integers(0, 256, (36, 36, 3), np.uint8)
            frame = still.copy()
            alive.add(frame.view(Watched))
            most = max(most, len(alive))
            yield second, frame.view(Watched)

    class Watched(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    session = StreamSession(
        tiny_model(), PROCESSOR, segmenter=quick(), batch_size=4, max_segments=4
    )
    held, ends = [], []
    tracemalloc.start()
    for segment in session.run(cut(hour(), size=4, stride=4)):
        held.append(tracemalloc.get_traced_memory()[0])
        ends.append(segment.end_time)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ends[-1] == 3598 and len(ends) == 12
    assert most <= 4
    assert len(session.segments) == 4 and len(session.tokens.items) == 0
    assert peak < 4_000_000 < 1800 * 36 * 36 * 3
    assert held[-1] - held[5] < 200_000


# -- memory and questions ------------------------------------------------------------------


def watched(**settings) -> StreamSession:
    session = StreamSession(tiny_model(), PROCESSOR, segmenter=quick(), **settings)
    list(session.run(cut(scenes([40, 30, 50]))))
    return session


@torch.no_grad()
def test_session_ask_ranks_candidates_by_cosine():
    session, candidates = watched(query=QUERY), ["a cat", "a dog that barks", "red"]
    found = session.ask(candidates)
    targets = session.encoder.model.encode_target(**PROCESSOR(targets=candidates))
    cosines = targets @ torch.stack([each.embedding for each in session.segments]).T
    for answer in found:
        text = candidates.index(answer["text"])
        assert answer["score"] == pytest.approx(cosines[text].max().item(), abs=1e-6)
        segment = session.segments[cosines[text].argmax()]
        assert (answer["start_time"], answer["end_time"]) == (segment.start_time, segment.end_time)
    scores = [answer["score"] for answer in found]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    for wrong in ([], "a cat"):
        with pytest.raises(ValueError, match="candidates"):
            session.ask(wrong)


@torch.no_grad()
def test_session_ask_with_a_query_reads_the_stored_tokens():
    session, candidates, other = watched(query=QUERY), ["a cat", "red"], "what color is it ?"
    found = session.ask(candidates, query=other)
    model = session.encoder.model
    targets = model.encode_target(**PROCESSOR(targets=candidates))
    middles = torch.stack([memory.visual_embeds for memory in session.memories])
    tokens = PROCESSOR(text=[other] * 3)
    cosines = targets @ model.predict(visual_embeds=middles, **tokens).T
    best = {text: cosines[index].max().item() for index, text in enumerate(candidates)}
    assert {each["text"]: each["score"] for each in found} == pytest.approx(best, abs=1e-5)
    same = {each["text"]: each["score"] for each in session.ask(candidates)}
    assert any(abs(best[text] - same[text]) > 1e-4 for text in candidates)  # positive control
    # The scenes are still, so every window of a segment has the same tokens.
    asked = session.ask(candidates, query=QUERY)
    assert {each["text"]: each["score"] for each in asked} == pytest.approx(same, abs=1e-4)


def test_session_stores_tokens_of_a_window_near_the_middle():
    """A new picture at every step and a decode at every twelfth give many short segments."""
    random = np.random.default_rng(0)
    frames = [(i, random.integers(0, 256, (36, 36, 3), np.uint8)) for i in range(150)]
    model = tiny_model()
    session = StreamSession(
        model,
        PROCESSOR,
        segmenter=quick(decodes_per_second=1 / 12, patience=1),
        batch_size=8,
    )
    segments = list(session.run(cut(frames, size=2, stride=1)))
    found = list(StreamEncoder(model, PROCESSOR).stream(cut(frames, size=2, stride=1), 8))
    assert len(segments) > 8
    for memory in session.memories:
        apart = [(memory.visual_embeds - each.visual_embeds).abs().max() for each in found]
        middle = (memory.segment.start + memory.segment.end - 1) / 2
        assert abs(int(np.argmin(apart)) - middle) <= 5 and min(apart) < 1e-4


@pytest.mark.parametrize("lengths", [[60, 8, 40], [20, 6, 6, 50]])
def test_session_stores_tokens_of_the_segment_itself(lengths):
    """Also for a segment that is closed soon after it was opened."""
    # torch 2.9 and 2.13 draw different weights from one seed; these thresholds suit both.
    segmenter = quick(window=8, patience=4, variance_threshold=0.01, drift_threshold=0.02)
    session = StreamSession(tiny_model(**TOWERS), PROCESSOR, segmenter=segmenter, batch_size=5)
    embedded = list(session.encoder.stream(cut(scenes(lengths)), 5))
    for window in embedded:
        session.push(window)
    session.close()
    assert len(session.memories) == len(lengths)
    for memory in session.memories:
        own = embedded[memory.segment.start : memory.segment.end]
        assert any(torch.equal(memory.visual_embeds, window.visual_embeds) for window in own)
        # The tokens of one window are in memory, not those of its batch.
        tokens = memory.visual_embeds
        assert tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()


def test_session_rejects_a_second_stream():
    session = watched()
    with pytest.raises(ValueError, match="has ended: make another StreamSession"):
        list(session.run(cut(scenes([8]))))


def test_session_ask_includes_the_open_segment():
    session = StreamSession(tiny_model(), PROCESSOR, segmenter=quick())
    running = session.run(cut(scenes([40, 30, 50])))
    next(running)
    ends = {each["end_time"] for each in session.ask(["a cat", "red", "a dog", "the door opens"])}
    assert session.segmenter.open_segment() is not None
    for query in (None, QUERY):
        alone = StreamSession(tiny_model(), PROCESSOR, segmenter=OnlineSegmenter(max_decodes=1))
        alone_running = alone.run(cut(scenes([20])))
        assert len(list(alone_running)) == 1 and alone.ask(["a cat"], query)
    assert ends <= {session.segments[0].end_time, session.segmenter.time}


def test_session_merges_old_neighbours_beyond_max_segments():
    """Six segments are closed and four are stored."""
    kept = StreamSession(tiny_model(), PROCESSOR, segmenter=quick(), max_segments=4)
    lengths = [30, 30, 40, 30, 30, 30]
    closed = list(kept.run(cut(scenes(lengths))))
    assert len(closed) == 6 and len(kept.segments) == 4
    assert kept.segments[-2:] == closed[-2:]
    bounds = [(each.start, each.end) for each in kept.segments]
    assert bounds[0][0] == 0 and bounds[-1][1] == closed[-1].end
    assert all(one[1] == two[0] for one, two in zip(bounds, bounds[1:], strict=False))
    assert set(sum(bounds, ())) < set(sum([(e.start, e.end) for e in closed], ()))
    # A merged segment's mean is that of all its embeddings.
    total = sum((e.end - e.start) * e.mean for e in closed)
    merged = sum((e.end - e.start) * e.mean for e in kept.segments)
    torch.testing.assert_close(total, merged)


def test_session_merges_the_nearest_neighbours_of_the_older_half():
    """Newer neighbours are nearer to each other, but are not merged."""

    def memory(start: int, end: int, angle: float) -> Memory:
        unit = torch.tensor([math.cos(angle), math.sin(angle)])
        segment = Segment(start, end, start / 2, end / 2, unit, unit, text=f"{angle}")
        return Memory(segment, torch.full((2, 3), angle))

    angles = [0.0, 0.5, 0.7, 1.5, 1.5, 1.5]
    memories = [memory(3 * i, 3 * i + 3, angle) for i, angle in enumerate(angles)]
    StreamSession.merge_nearest(memories)
    assert [each.segment.text for each in memories] == ["0.0", "0.5", "1.5", "1.5", "1.5"]
    merged = memories[1].segment
    assert (merged.start, merged.end, merged.start_time, merged.end_time) == (3, 9, 1.5, 4.5)
    expected = (memory(0, 1, 0.5).segment.mean + memory(0, 1, 0.7).segment.mean) / 2
    torch.testing.assert_close(merged.mean, expected)
    # Length counts: one step is nearer to its neighbours than three are.
    uneven = [memory(0, 9, 0.0), memory(9, 18, 0.4), memory(18, 19, 0.9), memory(19, 28, 2.0)]
    StreamSession.merge_nearest(uneven)
    assert [each.segment.end for each in uneven] == [9, 19, 28]
    assert uneven[1].segment.text == "0.4" and (uneven[1].visual_embeds == 0.4).all()
