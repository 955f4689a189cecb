"""Selective decoding: how few texts tell what happens in a stream (paper, section 4.6).

A stream is embedded window by window. Texts are decoded of some embeddings only, and each
annotation is paired with the text decoded nearest to it in time; the score is the CIDEr of the
pairs. What is compared is which embeddings are chosen, at equal numbers of them:

- uniform: at equal intervals. `uniform + pool` decodes the average of each interval.
- selective: the middle of each segment that `WardSegmenter` finds. `selective + pool` decodes the
  segment's average.
- online: the middle or the average of each segment that `OnlineSegmenter` closes while the stream
  runs.
- oracle: the stretches around the annotations, which nobody knows: at each annotation's time, or
  with `oracle + pool` the average from halfway to the one before until halfway to the next. It
  shows what could be gained by choosing, and is no bound where single windows are uncertain.

The budgets run from 2 to 0.01 decodes per second, as in the paper's figure 4. The online
segmenter has thresholds and no number of segments: they are chosen on the validation streams, for
each budget. Its decodes are never exactly the budget's, so it is judged beside the offline
segments of the same number in each stream.

The paper's claim is that of a reference, uniform decoding at 2.5 times the annotation rate, 2.85
times fewer decodes keep the CIDEr (1 Hz and 0.35 Hz, where annotations come at 0.4 Hz). How many
fewer are enough is chosen on the validation streams, too. Averages help uniform decoding as well,
so that pooled choices are compared with either reference.

Shapes: S windows of a stream, A annotations of all streams, D embedding size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.annotated_streams import EmbeddedStream, embed_streams, read_streams
from eval.benchmarks import Benchmark, sha256
from eval.metrics import cider, exact_match
from eval.results import Example, Score, TaskResult, portable, spread
from eval.tasks.captioning import write
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, Segment, WardSegmenter, as_unit
from processing import Excerpt, VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import BadRow

BUDGETS = (2.0, 1.0, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02, 0.01)  # decodes per second
REFERENCE_DENSITY = 2.5  # decodes per annotation
CLAIM = 2.85  # times fewer than the reference
FEWER = np.geomspace(1, 16, 49)  # what is tried on the validation streams
TOLERANCE = 0.5  # seconds by which a boundary may be off
RESAMPLES = 2000
# What is tried on the validation streams for each budget.
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
    """Embeddings of a stream that are decoded.

    Attributes:
        times (`np.ndarray` of shape `(N,)`): seconds, ascending.
        embeds (`np.ndarray` of shape `(N, D)`): float32.
        bounds (`np.ndarray` of shape `(N - 1,)`): seconds between what they stand for.
    """

    times: np.ndarray
    embeds: np.ndarray
    bounds: np.ndarray


def count_of(rate: float, stream: EmbeddedStream) -> int:
    """How many decodes a budget of `rate` per second allows, at least one."""
    return max(1, min(round(rate * stream.end_time), len(stream.times)))


def uniform(stream: EmbeddedStream, count: int, *, pool: bool = False) -> Choice:
    """`count` moments at equal intervals, each in the middle of its own."""
    edges = np.linspace(0, stream.end_time, count + 1)
    return at(stream, (edges[:-1] + edges[1:]) / 2, edges[1:-1], pool=pool)


def at(stream: EmbeddedStream, times: np.ndarray, bounds: np.ndarray, *, pool: bool) -> Choice:
    """The embedding nearest to each of `times` `(N,)`, or the average of what lies between
    `bounds` `(N - 1,)`."""
    places = np.abs(stream.times - times[:, None]).argmin(axis=1)
    embeds = stream.embeds[places]
    if pool:
        parts = np.searchsorted(bounds, stream.times, side="right")
        for place in range(len(times)):
            if (inside := parts == place).any():  # else the nearest one, as without pooling
                embeds[place] = as_unit(stream.embeds[inside].mean(axis=0))
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


# What is compared with which reference.
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


# -- what they are worth -------------------------------------------------------------------


class Captions:
    """Texts of embeddings, each decoded once however many choices it is part of."""

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
        """Decode what was not yet."""
        new = {row.tobytes(): row for choice in choices for row in choice.embeds}
        new = {key: row for key, row in new.items() if key not in self.texts}
        if new:
            embeds = torch.from_numpy(np.stack(list(new.values())))  # (N, D)
            asked, said = [self.query] * len(new), [""] * len(new)
            size = {"batch_size": self.batch_size}
            texts = write(self.model, self.processor, embeds, asked, said, **size)
            self.texts |= dict(zip(new, texts, strict=True))

    def nearest(self, choice: Choice, times: np.ndarray) -> list[str]:
        """The text decoded nearest to each time; of two equally near, the earlier."""
        places = np.abs(choice.times - times[:, None]).argmin(axis=1)
        return [self.texts[choice.embeds[place].tobytes()] for place in places]


@dataclass(frozen=True)
class Outcome:
    """A way of choosing, on all streams.

    Attributes:
        captions (`list[str]` of length A)
        cider (`np.ndarray` of shape `(A,)`)
        rate (`float`): decodes per second.
        f1 (`float`): of the boundaries.
    """

    captions: list[str]
    cider: np.ndarray
    rate: float
    f1: float

    @property
    def mean(self) -> float:
        return float(self.cider.mean())


class Judge:
    """Scores choices on one set of streams."""

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
        """A choice for each stream."""
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
        """A way of choosing at a budget, scored once: several comparisons have the same side."""
        if (method, rate) not in self.outcomes:
            choices = [METHODS[method](stream, count_of(rate, stream)) for stream in self.streams]
            self.outcomes[method, rate] = self.score(choices)
        return self.outcomes[method, rate]

    def online(self, settings: dict[str, float | str]) -> tuple[Outcome, Outcome]:
        """The online segmenter, and as many offline segments of each stream."""
        choices = [online(stream, settings) for stream in self.streams]
        pool = settings["decode_from"] == "mean"
        offline = [
            selective(stream, len(choice.times), pool=pool)
            for stream, choice in zip(self.streams, choices, strict=True)
        ]
        return self.score(choices), self.score(offline)

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """95 % of the mean of `(A,)` values, over streams drawn anew."""
        sums = np.bincount(self.stream_of, weights=values)
        counts = np.bincount(self.stream_of)
        drawn = np.random.default_rng(0).integers(
            len(self.streams), size=(RESAMPLES, len(self.streams))
        )
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def boundaries(stream: EmbeddedStream) -> np.ndarray:
    """Halfway between neighbouring annotations: they tell of moments, not of stretches."""
    times = stream.annotated.times
    return (times[:-1] + times[1:]) / 2


def boundary_f1(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """F1 of boundaries found and true, of all streams together; each may be matched once, to one
    that is at most `TOLERANCE` seconds away."""
    hits = sum(matches(found.tolist(), true.tolist()) for found, true in pairs)
    total = sum(len(found) + len(true) for found, true in pairs)
    return 2 * hits / total if total else 1.0


def matches(found: list[float], true: list[float]) -> int:
    """The most pairs that can be made of two ascending lists: the earliest first."""
    hits, places = 0, iter(true)
    place = next(places, None)
    for time in found:
        while place is not None and place < time - TOLERANCE:
            place = next(places, None)
        if place is not None and place <= time + TOLERANCE:
            hits += 1
            place = next(places, None)
    return hits


# -- what is chosen on the validation streams ----------------------------------------------


def enough(judge: Judge, method: str, reference: str) -> float:
    """How many times fewer decodes than the reference has keep its CIDEr: the most of those
    tried, 0 if not even as many do."""
    rate = REFERENCE_DENSITY * judge.annotation_rate
    wanted = judge.at_rate(reference, rate).mean
    kept = [
        fewer
        for fewer in tqdm(FEWER.tolist(), f"{method}, as good as {reference}")
        if judge.at_rate(method, rate / fewer).mean >= wanted
    ]
    return max(kept, default=0.0)


def thresholds(judge: Judge, budgets: Sequence[float]) -> list[dict[str, float | str]]:
    """For each budget the online settings of best CIDEr among those that keep to it; where none
    does, those of fewest decodes."""
    tried = []
    for values in tqdm(list(product(*ONLINE.values())), "thresholds"):
        settings = dict(zip(ONLINE, values, strict=True))
        # The variance of two equal halves a cosine of 1 - d apart is d / 2.
        settings["variance_threshold"] = settings["drift_threshold"] / 2
        choices = [online(stream, settings) for stream in judge.streams]
        tried.append((judge.score(choices), settings))
    chosen = []
    for budget in budgets:
        within = [each for each in tried if each[0].rate <= budget]
        best = max(within, key=lambda each: each[0].mean, default=None)
        chosen.append((best or min(tried, key=lambda each: each[0].rate))[1])
    return chosen


# -- what is measured on the test streams --------------------------------------------------


def measure(
    judge: Judge, budgets: Sequence[float], settings: Sequence[dict[str, float | str]]
) -> tuple[dict[str, Score], dict[str, list[tuple[float, float]]]]:
    """CIDEr at each budget of every way of choosing, and each way's curve."""
    best = {
        name: judge.score([oracle(stream, pool=pool) for stream in judge.streams]).mean
        for name, pool in (("oracle", False), ("oracle + pool", True))
    }
    scores = {}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in (*METHODS, "online")}
    for budget, chosen in zip(tqdm(budgets, "budgets"), settings, strict=True):
        outcomes = {name: judge.at_rate(name, budget) for name in METHODS}
        outcomes["online"], offline = judge.online(chosen)
        for name, outcome in outcomes.items():
            curves[name].append((round(outcome.rate, 4), round(outcome.mean, 4)))
        shown = outcomes.pop("selective")
        beside = {name: outcome.mean for name, outcome in outcomes.items()}
        beside |= {"offline, as many as online": offline.mean, **best}
        interval = judge.interval(shown.cider)
        scores[f"CIDEr at {budget:.3g} Hz"] = Score(shown.mean, *interval, len(shown.cider), beside)
    return scores, curves


def compare(judge: Judge, method: str, reference: str, fewer: float) -> dict[str, float]:
    """A way of choosing beside its reference, at the paper's claim and at what the validation
    streams promised."""
    rate = REFERENCE_DENSITY * judge.annotation_rate
    wanted = judge.at_rate(reference, rate)
    numbers = {"reference CIDEr": wanted.mean}
    for name, times in (("claimed", CLAIM), ("chosen", fewer)):
        numbers[f"{name} fewer"] = times
        if times:
            difference = judge.at_rate(method, rate / times).cider - wanted.cider
            numbers[f"{name} difference"] = float(difference.mean())
            low, high = judge.interval(difference)
            numbers |= {f"{name} low": low, f"{name} high": high}
    return {name: round(value, 4) for name, value in numbers.items()}


def boundary_scores(judge: Judge) -> dict[str, float]:
    """F1 with as many segments as annotations."""
    counts = [len(stream.annotated.times) for stream in judge.streams]
    pairs = list(zip(judge.streams, counts, strict=True))
    return {
        f"boundary F1, {name}": round(judge.score([METHODS[name](*each) for each in pairs]).f1, 4)
        for name in ("uniform", "selective")
    }


# -- the task ------------------------------------------------------------------------------


def evaluate(
    model: VLJEPAForConditionalGeneration | VLJEPAModel,
    processor: VLJEPAProcessor,
    benchmark: Benchmark,
    *,
    batch_size: int = 64,
    ablation: str = "none",
    limit: int | None = None,
    features: FeatureStore | None = None,
) -> TaskResult:
    """Embed the streams, choose, decode and compare.

    Raises: `ValueError` for a model without a Y-Decoder, for an ablation and for a feature store.
    """
    if not isinstance(model, VLJEPAForConditionalGeneration):
        raise ValueError(
            f"{benchmark.name}: streams are told by a Y-Decoder, and this model has none. Train "
            "one with `python -m training.train_decoder`."
        )
    if model.config.decoder_reads_previous:
        raise ValueError(
            f"{benchmark.name}: this decoder reads what was said before, and here texts are "
            "decoded apart from each other. Take one without decoder_reads_previous."
        )
    if ablation != "none" or features is not None:
        raise ValueError(
            f"{benchmark.name}: streams are read window by window, with neither --ablation nor "
            "--features."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"{benchmark.name}: limit is {limit}: give at least 1 stream.")

    check_files(benchmark)

    # 1. Embed: each window once
    annotated, bad = read_streams(benchmark.rows)
    chosen_on, bad_validation = read_streams(benchmark.validation_rows)
    embed = partial(embed_streams, model.vljepa, processor, batch_size=batch_size)
    streams, left_out = embed(annotated[:limit], benchmark)
    held_out, left_out_validation = embed(chosen_on[:limit], benchmark)
    captions = Captions(model, processor, benchmark.query or "", batch_size)
    test, validation = Judge(streams, captions), Judge(held_out, captions)
    for path, judge in ((benchmark.rows, test), (benchmark.validation_rows, validation)):
        check_references(path, judge.references)

    # 2. Choose on the validation streams
    fewer = {pair: enough(validation, *pair) for pair in PAIRS}
    rate = REFERENCE_DENSITY * test.annotation_rate
    budgets = sorted({*BUDGETS, rate, rate / CLAIM}, reverse=True)
    settings = thresholds(validation, budgets)

    # 3. Measure on the test streams
    scores, curves = measure(test, budgets, settings)
    comparisons = {" against ".join(pair): compare(test, *pair, fewer[pair]) for pair in PAIRS}
    protocol = {
        "rows_file": portable(benchmark.rows),
        "rows_sha256": sha256(benchmark.rows),
        "validation_rows_file": portable(benchmark.validation_rows),
        "validation_rows_sha256": sha256(benchmark.validation_rows),
        "streams": len(streams),
        "seconds": round(test.seconds, 1),
        "annotations": len(test.references),
        "annotations_per_second": round(test.annotation_rate, 4),
        "fps": benchmark.fps or "the video's",
        "frames": benchmark.num_frames or processor.video_processor.num_frames,
        "stride": benchmark.stride,
        "prompt": benchmark.query or "",
        "claim": f"{CLAIM} times fewer than {REFERENCE_DENSITY} per annotation",
        "boundary_tolerance_seconds": TOLERANCE,
        "interval": f"95 % over streams, {RESAMPLES} resamples",
        "decoding": "greedy",
        "limit": "none" if limit is None else limit,
    }
    skipped = [
        *left_out_lines(benchmark.rows, bad, left_out),
        *left_out_lines(benchmark.validation_rows, bad_validation, left_out_validation),
    ]
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol=protocol,
        scores=scores,
        numbers={"reference rate": round(rate, 4), **boundary_scores(test)},
        comparisons=comparisons,
        curves=curves,
        skipped=skipped,
        examples=examples(test, rate),
    )


def check_files(benchmark: Benchmark) -> None:
    if sha256(benchmark.rows) == sha256(benchmark.validation_rows):
        raise ValueError(
            f"{benchmark.name}: rows and validation_rows are the same streams. What is chosen on "
            "streams is not measured on them: divide them into two files."
        )


def check_references(path: Path, references: list[list[str]]) -> None:
    """CIDEr weighs words by how few annotations have them: where all are one, none counts, every
    choice scores 0 and seems to be enough."""
    if len({text for [text] in references}) < 2:
        raise ValueError(f"{path}: all annotations say the same. Give at least two texts.")


def left_out_lines(path: Path, bad: list[BadRow], left_out: list[str]) -> list[str]:
    """In words, what of a file was not measured on."""
    return [
        *(f"{path.name}:{row.line}: {row.reason}" for row in bad),
        *(f"{path.name}, {reason}" for reason in left_out),
    ]


def examples(judge: Judge, rate: float) -> list[Example]:
    """Twelve moments and what is told of them at the paper's claim."""
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
    for place in spread(list(range(len(moments))), 12):
        stream, time, truth = moments[place]
        written = {name: outcome.captions[place] for name, outcome in outcomes.items()}
        start, end = max(time - 1, 0.0), min(time + 1, stream.end_time)
        shown.append(
            Example(
                media=Excerpt(stream.annotated.video, start, end),
                query=f"{time:.1f} s: {written['selective']}",
                truth=[truth],
                ranked=[
                    (f"{name}: {text}", float(outcomes[name].cider[place]))
                    for name, text in written.items()
                ],
                rank=1 if exact_match(written["selective"], truth) else 2,
            )
        )
    return shown


__all__ = ["evaluate"]
