"""Selective decoding: how few texts describe a stream (paper, section 4.6).

A stream is embedded window by window. Only some embeddings are decoded, and each annotation is
paired with the text decoded nearest to it in time; the score is the CIDEr of the pairs. Ways of
choosing the embeddings are compared at equal numbers of decodes:

- uniform: at equal intervals. `uniform + pool` decodes the average of each interval.
- selective: the middle of each segment that `WardSegmenter` finds. `selective + pool` decodes the
  segment's average.
- online: the middle or the average of each segment that `OnlineSegmenter` closes while the stream
  runs.
- oracle: at the time of each annotation, which no model knows. `oracle + pool` decodes the average
  from halfway to the annotation before until halfway to the next. The oracle shows what choosing
  could gain; it is not an upper bound where single windows are uncertain.

The budgets run from 2 to 0.01 decodes per second, as in the paper's figure 4. The online segmenter
takes thresholds instead of a number of segments: for each budget they are chosen on the validation
streams. Its decodes never match the budget exactly, so it is compared with an equal number of
offline segments in each stream.

The paper claims that 2.85 times fewer decodes keep the CIDEr of the reference, which is uniform
decoding at 2.5 times the annotation rate (1 Hz against 0.35 Hz, with annotations at 0.4 Hz). Here
the factor that keeps the CIDEr is also chosen on the validation streams. Averages help uniform
decoding too, so pooled choices are compared with both references.

Shapes: S windows of a stream, N decodes of a stream, A annotations of all streams, D embedding
size.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from eval.annotated_streams import AnnotatedStream, EmbeddedStream, embed_streams, read_streams
from eval.intervals import difference_interval
from eval.items import Items
from eval.metrics import HIGHEST_CIDER, cider, exact_match
from eval.results import Example, Score, TaskResult, evenly_spaced, interval_facts, portable
from eval.task import Benchmark, Kind, Task, relative, sha256
from eval.tasks.captioning import write
from modeling_vljepa import VLJEPAForConditionalGeneration
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, Segment, WardSegmenter, as_unit
from processing import Excerpt, VLJEPAProcessor
from processing.rows import BadRow
from processing.stream_store import StreamStore

BUDGETS = (2.0, 1.0, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02, 0.01)  # decodes per second
REFERENCE_DENSITY = 2.5  # decodes per annotation
CLAIM = 2.85  # times fewer than the reference
FEWER = np.geomspace(1, 16, 49)  # factors tried on the validation streams
TOLERANCE = 0.5  # seconds by which a boundary may be off
# Settings of the online segmenter, all combinations of which are tried on the validation streams.
ONLINE = {
    "window": (2, 4, 8),
    "smoothing": (0.5, 1.0),
    "patience": (1, 3),
    "drift_threshold": tuple(np.geomspace(0.01, 1.2, 13).round(4).tolist()),
    "decode_from": ("midpoint", "mean"),
}


# -- which embeddings to decode ------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The embeddings of a stream that are decoded.

    Attributes:
        times (`np.ndarray` of shape `(N,)`): seconds, ascending.
        embeds (`np.ndarray` of shape `(N, D)`): float32.
        bounds (`np.ndarray` of shape `(N - 1,)`): seconds, where the part of the stream that one
            embedding represents ends and the next one's begins.
    """

    times: np.ndarray
    embeds: np.ndarray
    bounds: np.ndarray


def count_of(rate: float, stream: EmbeddedStream) -> int:
    """Return the decodes that a budget of `rate` per second allows, at least one."""
    return max(1, min(round(rate * stream.end_time), len(stream.times)))


def uniform(stream: EmbeddedStream, count: int, *, pool: bool = False) -> Choice:
    """Choose `count` moments, each in the middle of one of `count` equal intervals."""
    edges = np.linspace(0, stream.end_time, count + 1)
    return at(stream, (edges[:-1] + edges[1:]) / 2, edges[1:-1], pool=pool)


def at(stream: EmbeddedStream, times: np.ndarray, bounds: np.ndarray, *, pool: bool) -> Choice:
    """Choose the embedding nearest to each of `times` `(N,)`, or with `pool` the average of the
    embeddings between the `bounds` `(N - 1,)`."""
    nearest = np.abs(stream.times - times[:, None]).argmin(axis=1)  # (N,)
    embeds = stream.embeds[nearest]  # (N, D)
    if pool:
        parts = np.searchsorted(bounds, stream.times, side="right")  # (S,)
        for index in range(len(times)):
            # A part shorter than a window's stride can be empty: it keeps the nearest embedding.
            if (inside := parts == index).any():
                embeds[index] = as_unit(stream.embeds[inside].mean(axis=0))
    return Choice(times, embeds.astype(np.float32), bounds)


def of_segments(stream: EmbeddedStream, segments: list[Segment]) -> Choice:
    middles = [(segment.start + segment.end - 1) // 2 for segment in segments]
    return Choice(
        stream.times[middles],
        np.stack([segment.embedding.numpy() for segment in segments]),
        np.array([segment.start_time for segment in segments[1:]]),
    )


def selective(stream: EmbeddedStream, count: int, *, pool: bool = False) -> Choice:
    segmenter = WardSegmenter(count, decode_from="mean" if pool else "midpoint")
    return of_segments(stream, segmenter.segment(stream.embeds, stream.times, stream.end_time))


def online(stream: EmbeddedStream, settings: dict[str, float | str]) -> Choice:
    segmenter = OnlineSegmenter(**settings)
    return of_segments(stream, segmenter.segment(stream.embeds, stream.times, stream.end_time))


def oracle(stream: EmbeddedStream, *, pool: bool = False) -> Choice:
    times = stream.annotated.times
    return at(stream, times, boundaries(stream), pool=pool)


# (a way of choosing, the reference it is compared with)
PAIRS = (
    ("selective", "uniform"),
    ("selective + pool", "uniform"),
    ("selective + pool", "uniform + pool"),
)
METHODS: dict[str, Callable[[EmbeddedStream, int], Choice]] = {
    "uniform": uniform,
    "uniform + pool": partial(uniform, pool=True),
    "selective": selective,
    "selective + pool": partial(selective, pool=True),
}


# -- scoring a choice ----------------------------------------------------------------------


class Captions:
    """The texts of embeddings. Each embedding is decoded once, also if many choices contain it."""

    def __init__(
        self,
        model: VLJEPAForConditionalGeneration,
        processor: VLJEPAProcessor,
        query: str,
        batch_size: int,
    ):
        self.model, self.processor, self.query = model, processor, query
        self.batch_size = batch_size
        self.texts: dict[bytes, str] = {}

    def decode(self, choices: Iterable[Choice]) -> None:
        """Decode the embeddings that were not decoded before."""
        new = {row.tobytes(): row for choice in choices for row in choice.embeds}
        new = {key: row for key, row in new.items() if key not in self.texts}
        if new:
            embeds = torch.from_numpy(np.stack(list(new.values())))  # (N, D)
            queries, previous = [self.query] * len(new), [""] * len(new)
            size = {"batch_size": self.batch_size}
            texts = write(self.model, self.processor, embeds, queries, previous, **size)
            self.texts |= dict(zip(new, texts, strict=True))

    def nearest(self, choice: Choice, times: np.ndarray) -> list[str]:
        """Return the text decoded nearest to each time; of two equally near, the earlier."""
        nearest = np.abs(choice.times - times[:, None]).argmin(axis=1)
        return [self.texts[choice.embeds[index].tobytes()] for index in nearest]


@dataclass(frozen=True)
class Outcome:
    """The scores of one way of choosing, on all streams.

    Attributes:
        captions (`list[str]` of length A)
        cider (`np.ndarray` of shape `(A,)`)
        rate (`float`): decodes per second.
        f1 (`float`): F1 of the boundaries.
    """

    captions: list[str]
    cider: np.ndarray
    rate: float
    f1: float

    @property
    def mean(self) -> float:
        return float(self.cider.mean())


class Judge:
    """Scores of choices on one set of streams."""

    def __init__(self, streams: list[EmbeddedStream], captions: Captions):
        self.streams, self.captions = streams, captions
        self.references = [[text] for stream in streams for text in stream.annotated.texts]
        self.seconds = sum(stream.end_time for stream in streams)
        self.annotation_rate = len(self.references) / self.seconds
        self.stream_of = np.repeat(
            np.arange(len(streams)), [len(stream.annotated.texts) for stream in streams]
        )  # (A,)
        self.outcomes: dict[tuple[str, float], Outcome] = {}

    def score(self, choices: list[Choice]) -> Outcome:
        """Decode and score one choice for each stream."""
        self.captions.decode(choices)
        pairs = list(zip(self.streams, choices, strict=True))
        written = [
            text
            for stream, choice in pairs
            for text in self.captions.nearest(choice, stream.annotated.times)
        ]
        decodes = sum(len(choice.times) for choice in choices)
        return Outcome(
            written,
            cider(written, self.references).numpy(),
            decodes / self.seconds,
            boundary_f1([(choice.bounds, boundaries(stream)) for stream, choice in pairs]),
        )

    def at_rate(self, method: str, rate: float) -> Outcome:
        """Score a way of choosing at a budget; once, since several comparisons need the same."""
        if (method, rate) not in self.outcomes:
            choices = [METHODS[method](stream, count_of(rate, stream)) for stream in self.streams]
            self.outcomes[method, rate] = self.score(choices)
        return self.outcomes[method, rate]

    def online(self, settings: dict[str, float | str]) -> tuple[Outcome, Outcome]:
        """Score the online segmenter, and the same number of offline segments of each stream."""
        choices = [online(stream, settings) for stream in self.streams]
        pool = settings["decode_from"] == "mean"
        offline = [
            selective(stream, len(choice.times), pool=pool)
            for stream, choice in zip(self.streams, choices, strict=True)
        ]
        return self.score(choices), self.score(offline)

    def items(self, outcomes: dict[str, Outcome]) -> Items:
        """Return the annotations with the CIDEr of each outcome, by the metric's name."""
        moments = [
            (stream.annotated.video, time, text)
            for stream in self.streams
            for time, text in zip(stream.annotated.times, stream.annotated.texts, strict=True)
        ]
        return Items(
            clips=[[{"video": video}] for video, _, _ in moments],
            texts=[[repr(float(time)), text] for _, time, text in moments],
            clusters=self.stream_of,
            scores={metric: outcome.cider for metric, outcome in outcomes.items()},
            predictions=[],  # every budget has others
        )


def boundaries(stream: EmbeddedStream) -> np.ndarray:
    """Return the times halfway between neighbouring annotations.

    An annotation has a moment and no duration, so the true boundary is not known better.
    """
    times = stream.annotated.times
    return (times[:-1] + times[1:]) / 2


def boundary_f1(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the F1 of pairs of found and true boundaries, all streams together.

    A boundary matches at most one other, at most `TOLERANCE` seconds away.
    """
    hits = sum(matches(found.tolist(), true.tolist()) for found, true in pairs)
    total = sum(len(found) + len(true) for found, true in pairs)
    return 2 * hits / total if total else 1.0


def matches(found: list[float], true: list[float]) -> int:
    """Return the largest number of pairs within `TOLERANCE` of two ascending lists.

    Matching each found time with the earliest true one in reach is optimal: that one would not
    serve a later found time better.
    """
    hits, remaining = 0, iter(true)
    candidate = next(remaining, None)
    for time in found:
        while candidate is not None and candidate < time - TOLERANCE:
            candidate = next(remaining, None)
        if candidate is not None and candidate <= time + TOLERANCE:
            hits += 1
            candidate = next(remaining, None)
    return hits


# -- chosen on the validation streams ------------------------------------------------------


def enough(judge: Judge, method: str, reference: str) -> float:
    """Return the largest factor tried by which fewer decodes keep the reference's CIDEr.

    Returns: 0 if not even the reference's own number of decodes keeps it.
    """
    rate = REFERENCE_DENSITY * judge.annotation_rate
    wanted = judge.at_rate(reference, rate).mean
    good = [
        fewer
        for fewer in tqdm(FEWER.tolist(), f"{method}, as good as {reference}")
        if judge.at_rate(method, rate / fewer).mean >= wanted
    ]
    return max(good, default=0.0)


def thresholds(judge: Judge, budgets: Sequence[float]) -> list[dict[str, float | str]]:
    """Return for each budget the online settings of best CIDEr among those within the budget; if
    no settings are, those of fewest decodes."""
    tried = []
    for values in tqdm(list(product(*ONLINE.values())), "thresholds"):
        settings = dict(zip(ONLINE, values, strict=True))
        # The same change for both criteria: where a window's two halves differ by a cosine of
        # 1 - d, its variance is d / 2.
        settings["variance_threshold"] = settings["drift_threshold"] / 2
        choices = [online(stream, settings) for stream in judge.streams]
        tried.append((judge.score(choices), settings))
    chosen = []
    for budget in budgets:
        within = [each for each in tried if each[0].rate <= budget]
        best = max(within, key=lambda each: each[0].mean, default=None)
        chosen.append((best or min(tried, key=lambda each: each[0].rate))[1])
    return chosen


# -- measured on the test streams ----------------------------------------------------------


def measure(
    judge: Judge, budgets: Sequence[float], settings: Sequence[dict[str, float | str]]
) -> tuple[dict[str, Score], dict[str, list[tuple[float, float]]], Items]:
    """Return the CIDEr of every way of choosing at each budget, each way's curve, and the items of
    selective decoding.

    Annotations of one stream are not independent, so a stream is a cluster.
    """
    oracles = {
        name: judge.score([oracle(stream, pool=pool) for stream in judge.streams]).mean
        for name, pool in (("oracle", False), ("oracle + pool", True))
    }
    scores, selected = {}, {}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in (*METHODS, "online")}
    for budget, chosen in zip(tqdm(budgets, "budgets"), settings, strict=True):
        outcomes = {name: judge.at_rate(name, budget) for name in METHODS}
        outcomes["online"], offline = judge.online(chosen)
        for name, outcome in outcomes.items():
            curves[name].append((round(outcome.rate, 4), round(outcome.mean, 4)))
        shown = outcomes.pop("selective")
        others = {name: outcome.mean for name, outcome in outcomes.items()}
        others |= {"offline, as many as online": offline.mean, **oracles}
        metric = f"CIDEr at {budget:.3g} Hz"
        scores[metric] = Score.of(shown.cider, judge.stream_of, others, HIGHEST_CIDER)
        selected[metric] = shown
    return scores, curves, judge.items(selected)


def compare(judge: Judge, method: str, reference: str, fewer: float) -> dict[str, float]:
    """Compare a way of choosing with its reference, at the paper's factor and at the factor `fewer`
    that was chosen on the validation streams."""
    rate = REFERENCE_DENSITY * judge.annotation_rate
    wanted = judge.at_rate(reference, rate)
    numbers = {"reference CIDEr": wanted.mean}
    for name, times in (("claimed", CLAIM), ("chosen", fewer)):
        numbers[f"{name} fewer"] = times
        if times:
            found = judge.at_rate(method, rate / times)
            difference = found.cider - wanted.cider
            numbers[f"{name} difference"] = float(difference.mean())
            largest = max(found.cider.max(), wanted.cider.max())
            interval = difference_interval(difference, judge.stream_of, largest)
            numbers |= {f"{name} low": interval.low, f"{name} high": interval.high}
    return {name: round(value, 4) for name, value in numbers.items()}


def boundary_scores(judge: Judge) -> dict[str, float]:
    """Return the F1 of the boundaries, with one segment per annotation."""
    counts = [len(stream.annotated.times) for stream in judge.streams]
    pairs = list(zip(judge.streams, counts, strict=True))
    return {
        f"boundary F1, {name}": round(judge.score([METHODS[name](*each) for each in pairs]).f1, 4)
        for name in ("uniform", "selective")
    }


# -- the task ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StreamingBenchmark(Benchmark):
    """A benchmark of annotated streams: `rows` is a file for [`read_streams`].

    Attributes:
        validation_rows (`Path`): streams to choose thresholds on, not those of `rows`.
        fps (`float`, *optional*): frames to keep per second; all by default.
        stride (`int`, *optional*, defaults to 1): frames between the beginnings of two windows.
    """

    counts: ClassVar[str] = "streams"
    prompt: str | None = "caption"

    validation_rows: Path
    fps: float | int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.source is not None:
            raise ValueError(
                f"{self.name}: {self.task} takes no source: write its streams as JSONL, and name "
                "the file as rows (docs/streaming.md)"
            )

    def load(self) -> tuple[list[AnnotatedStream], list[BadRow]]:
        """Read the streams, and the lines that are not streams."""
        return read_streams(self.rows)


def evaluate(task: Task) -> TaskResult:
    """Embed the streams, choose, decode and compare.

    Raises: `ValueError` for a model without a Y-Decoder and for an ablation, `FeatureError` for
        streams that are not in the feature store.
    """
    check(task)
    benchmark = task.benchmark

    # 1. Embed each window once. Both files are read first: a bad one stops before the long work.
    test_file = (benchmark.rows, *benchmark.load())
    validation_file = (benchmark.validation_rows, *read_streams(benchmark.validation_rows))
    captions = Captions(task.writer, task.processor, task.query, task.batch_size)
    test, left_out = judge_of(task, captions, *test_file)
    validation, left_out_validation = judge_of(task, captions, *validation_file)

    # 2. Choose on the validation streams
    fewer = {pair: enough(validation, *pair) for pair in PAIRS}
    rate = REFERENCE_DENSITY * test.annotation_rate
    budgets = sorted({*BUDGETS, rate, rate / CLAIM}, reverse=True)
    settings = thresholds(validation, budgets)

    # 3. Measure on the test streams
    scores, curves, items = measure(test, budgets, settings)
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol=protocol_of(task, test) | interval_facts(scores.values(), "stream"),
        scores=scores,
        numbers={"reference rate": round(rate, 4), **boundary_scores(test)},
        comparisons={" against ".join(pair): compare(test, *pair, fewer[pair]) for pair in PAIRS},
        curves=curves,
        skipped=left_out + left_out_validation,
        examples=examples(test, rate),
        items=[items],
        **task.pool_facts(len(test.streams)),
    )


def check(task: Task) -> None:
    """Raise `ValueError` for a model, options or files that cannot be measured here."""
    name, benchmark = task.benchmark.name, task.benchmark
    if task.writer.config.decoder_reads_previous:
        raise ValueError(
            f"{name}: this decoder reads the text before, and here texts are decoded independently "
            "of each other. Take one without decoder_reads_previous."
        )
    if task.ablation != "none":
        raise ValueError(f"{name}: streams are read window by window, without --ablation.")
    if task.limit is not None and task.limit < 1:
        raise ValueError(f"{name}: limit is {task.limit}: give at least 1 stream.")
    if sha256(benchmark.rows) == sha256(benchmark.validation_rows):
        raise ValueError(
            f"{name}: rows and validation_rows are the same streams, so thresholds would be chosen "
            "on the test streams. Divide them into two files."
        )


def judge_of(
    task: Task,
    captions: Captions,
    path: Path,
    annotated: list[AnnotatedStream],
    bad: list[BadRow],
) -> tuple[Judge, list[str]]:
    """Embed the streams of a file; return their judge, and the lines that were left out.

    Raises: `ValueError` if all annotations are equal. CIDEr weighs words by how few annotations
        contain them: every choice would score 0, and every factor would seem to be enough.
    """
    streams, left_out = embed_streams(task, annotated[: task.limit])
    judge = Judge(streams, captions)
    if len({text for [text] in judge.references}) < 2:
        raise ValueError(f"{path}: all annotations are the same text. Give at least two texts.")
    lines = [f"{path.name}:{row.line}: {row.reason}" for row in bad]
    reasons = [relative(reason, os.path.abspath(path.parent)) for reason in left_out]
    return judge, lines + [f"{path.name}, {reason}" for reason in reasons]


def protocol_of(task: Task, test: Judge) -> dict[str, str | int | float]:
    """Return the facts about the streams that a reader of the scores must know."""
    benchmark = task.benchmark
    return {
        "rows_file": portable(benchmark.rows),
        "rows_sha256": sha256(benchmark.rows),
        "validation_rows_file": portable(benchmark.validation_rows),
        "validation_rows_sha256": sha256(benchmark.validation_rows),
        "streams": len(test.streams),
        "seconds": round(test.seconds, 1),
        "annotations": len(test.references),
        "annotations_per_second": round(test.annotation_rate, 4),
        "fps": benchmark.fps or "the video's",
        "frames": benchmark.num_frames or task.processor.video_processor.num_frames,
        "stride": benchmark.stride,
        "prompt": task.query,
        "prompt_from": task.query_source([task.query]),
        "claim": f"{CLAIM} times fewer than {REFERENCE_DENSITY} per annotation",
        "boundary_tolerance_seconds": TOLERANCE,
        "decoding": "greedy",
        "limit": "none" if task.limit is None else task.limit,
    }


def examples(judge: Judge, rate: float) -> list[Example]:
    """Return twelve annotated moments with their texts at the paper's factor."""
    outcomes = {
        "selective": judge.at_rate("selective", rate / CLAIM),
        "uniform reference": judge.at_rate("uniform", rate),
        "oracle": judge.score([oracle(stream) for stream in judge.streams]),
    }
    moments = [
        (stream, time, text)
        for stream in judge.streams
        for time, text in zip(stream.annotated.times, stream.annotated.texts, strict=True)
    ]
    shown = []
    for index in evenly_spaced(list(range(len(moments))), 12):
        stream, time, truth = moments[index]
        written = {name: outcome.captions[index] for name, outcome in outcomes.items()}
        # An annotation after the end of its video is shown with the end.
        start, end = max(min(time, stream.end_time) - 1, 0.0), min(time + 1, stream.end_time)
        shown.append(
            Example(
                media=Excerpt(stream.annotated.video, start, end),
                query=f"{time:.1f} s: {written['selective']}",
                truth=[truth],
                ranked=[
                    (f"{name}: {text}", float(outcomes[name].cider[index]))
                    for name, text in written.items()
                ],
                rank=1 if exact_match(written["selective"], truth) else 2,
            )
        )
    return shown


KIND = Kind(
    name="streaming",
    benchmark=StreamingBenchmark,
    evaluate=evaluate,
    needs_decoder=True,
    hub_tasks=dict.fromkeys(("image", "video"), "video-text-to-text"),
    examples="captions",
    features=StreamStore,
)

__all__ = ["KIND", "StreamingBenchmark", "evaluate"]
