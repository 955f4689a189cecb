"""One measurement, and the parts that every kind of benchmark shares.

A [`Benchmark`] is an entry of a benchmark file such as `benchmarks.yaml`. A [`Task`] is one model
on one benchmark. A [`Kind`] defines how benchmarks of one kind are measured; every module of
`eval/tasks` has one.

Shapes: R rows, D embedding size.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from eval.embed import EMBEDDING, Predictions, Reader, embed_texts, predict_rows
from eval.embedding_store import EmbeddingStore
from eval.likelihood import PAPER, LikelihoodReader, normalized, unconditional
from eval.results import Score, TaskResult, interval_facts, portable
from eval.sources import Source
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel, VLJEPATokenModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import BadRow, RowFields, media_of, read_rows
from processing.stream_store import StreamStore


def usable_rows(
    origin: Path | Source, row_fields: RowFields | None = None
) -> tuple[list[dict], list[BadRow]]:
    """Read the rows of a source, or of a JSONL file as [`read_rows`] does.

    Args:
        row_fields: the fields of a file's rows; a source knows its own.

    Raises: `ValueError` if there is not a single good row.
    """
    if isinstance(origin, Source):
        return origin.read()
    rows, bad = read_rows(origin, row_fields)
    if not rows:
        raise ValueError(f"{origin}: no usable row. The first reason: {bad[0]}")
    return rows, bad


def origin_facts(origin: Path | Source, rows: list[dict], prefix: str = "") -> dict[str, str]:
    """Return the facts about the origin of rows, for the protocol.

    Args:
        rows: the good rows of a source, of which the hash is taken; a file is hashed itself.
        prefix: beginning of the names of the facts, such as "train_".
    """
    if isinstance(origin, Source):
        facts = {**origin.facts(), "rows_sha256": origin.digest(rows)}
    else:
        facts = {"rows_file": portable(origin), "rows_sha256": sha256(origin)}
    return {f"{prefix}{name}": value for name, value in facts.items()}


def one_row_per_clip(rows: list[dict]) -> list[dict]:
    """Return one row about each clip: the last one, in the order of the clips."""
    return list({media_of(row): row for row in rows}.values())


def sha256(path: Path) -> str:
    """Return the first 12 hexadecimal digits: enough to see that two runs read the same rows."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def texts_sha256(texts: list[str]) -> str:
    """Return the first 12 hexadecimal digits for a list of candidate texts, in any order."""
    return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A benchmark in the paper's tables, or in those of another work: the block `paper`.

    Attributes:
        name (`str`): its name there. A result has this name only if `pool` items were measured.
        table (`str`, *optional*): where its numbers are.
        pool (`int`, *optional*): number of items; `None` if it is not stated.
        unit (`str`, *optional*): word for the items, such as "questions".
        metric (`str`): which score the numbers are.
        scores (`dict[str, float]`): percentages by the name of the model.
        parts (`dict[str, dict[str, float]]`): percentages of parts, such as those of question
            types, by the names of the part and of the model.
        open (`str`): facts that the paper does not state.
        choice (`str`): the choices made here.
        terms (`str`): how to get the data, and their terms.
    """

    name: str
    metric: str
    table: str | None = None
    pool: int | None = None
    unit: str | None = None
    scores: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)
    open: str = ""
    choice: str = ""
    terms: str = ""

    @classmethod
    def from_mapping(cls, name: str, mapping: Any) -> "Paper":
        """Build the block of an entry.

        Raises: `ValueError` for a key that is unknown, missing or of a wrong type.
        """
        known = {item.name: item for item in fields(cls)}
        if not isinstance(mapping, dict):
            raise ValueError(f"{name}: paper is {mapping!r}; give keys and values")
        if unknown := mapping.keys() - known.keys():
            raise ValueError(f"{name}: paper has no {', '.join(map(str, unknown))}, but {[*known]}")
        if missing := {"name", "metric"} - mapping.keys():
            raise ValueError(f"{name}: paper needs {', '.join(sorted(missing))}")
        for key, value in mapping.items():
            if not isinstance(value, known[key].type) or isinstance(value, bool):
                raise ValueError(f"{name}: paper: {key} is {value!r}, must be {known[key].type}")
        paper = cls(**mapping)
        for part, scores in {"": paper.scores, **paper.parts}.items():
            for model, score in scores.items() if isinstance(scores, dict) else [(part, scores)]:
                is_number = isinstance(score, int | float) and not isinstance(score, bool)
                if not is_number or not math.isfinite(score):
                    raise ValueError(f"{name}: paper: {part} {model} is {score!r}, not a number")
        if paper.pool is not None and paper.pool < 1:
            raise ValueError(f"{name}: paper: pool is {paper.pool}, must be 1 or more")
        if paper.pool is None and not paper.open:
            raise ValueError(f"{name}: paper: pool is missing, and `open` gives no reason")
        return paper


@dataclass(frozen=True)
class Benchmark:
    """One entry of a benchmark file: the keys that all kinds share.

    A kind with keys of its own adds them in a subclass.

    Attributes:
        media (`bool`): the rows are about images or videos, not about texts only. No key.
        required (`tuple[str, ...]`): fields that each row must have. No key.
        roles (`dict[str, str]`): the kinds of further fields of a row, as [`RowFields`] lists
            them; `source.columns` maps them by these names. No key.
        counts (`str`): the items of the pool: "rows", distinct "clips", or "streams". No key.
        name (`str`): the entry's name.
        task (`str`): the name of its kind.
        rows (`Path`, *optional*): JSONL file, as [`read_rows`] reads it.
        description (`str`): a sentence about the data and the purpose.
        query (`str`, *optional*): replaces the queries of the rows.
        num_frames (`int`, *optional*): frames per video; the processor's by default.
        source (`Source`, *optional*): published data, in place of `rows`.
        paper (`Paper`, *optional*): this benchmark in the paper's tables.
        prompt (`str`, *optional*): name in `config.prompts` of the query of rows that ask none, if
            the benchmark has no `query`; `None` for a kind whose rows ask.
    """

    media: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("target",)
    roles: ClassVar[dict[str, str]] = {}
    counts: ClassVar[Literal["rows", "clips", "streams"]] = "rows"

    name: str
    task: str
    rows: Path | None
    description: str
    query: str | None = None
    num_frames: int | None = None
    source: Source | None = field(default=None, kw_only=True)
    paper: Paper | None = field(default=None, kw_only=True)
    prompt: str | None = field(default=None, kw_only=True)

    @classmethod
    def row_fields(cls) -> RowFields:
        """Return the fields of the rows of this kind."""
        return RowFields(media=cls.media, required=cls.required, roles=cls.roles)

    @property
    def origin(self) -> Path | Source:
        """The file or the source of the rows."""
        return self.rows if self.source is None else self.source

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Read the good rows, with this benchmark's query if it has one, and the bad rows.

        Raises: `ValueError` when no row is good.
        """
        rows, bad = usable_rows(self.origin, self.row_fields())
        if self.query is not None:
            rows = [row | {"query": self.query} for row in rows]
        return rows, bad

    def bad_row(self, row: dict, reason: str) -> BadRow:
        """Return a row that is valid but of no use for this kind."""
        where = self.origin.label() if isinstance(self.origin, Source) else str(self.origin)
        return BadRow(where, row["line"], reason)

    def check_one_query(self, rows: list[dict]) -> None:
        """Raise `ValueError` if the rows ask different queries: a clip has one embedding here."""
        if len({row["query"] for row in rows}) > 1:
            raise ValueError(f"{self.name}: {self.task} asks one query; give it as `query`")


@dataclass(frozen=True)
class Task:
    """One model on one benchmark, with the options of the measurement.

    Attributes:
        model ([`VLJEPAModel`], [`VLJEPAForConditionalGeneration`] or [`VLJEPATokenModel`])
        processor ([`VLJEPAProcessor`])
        benchmark ([`Benchmark`])
        batch_size (`int`, *optional*, defaults to 64): clips or texts per forward pass.
        ablation (`str`, *optional*, defaults to `"none"`): see [`predict_rows`].
        limit (`int`, *optional*): measure on the first `limit` rows only.
        features (`FeatureStore` or `StreamStore`, *optional*): visual tokens to read in place of
            clips or streams; opened for this model by the kind's `features`.
        store (`EmbeddingStore`, *optional*): embeddings to read and to add to.
        likelihood (`str`, *optional*): form of the likelihoods that rank texts, of a model that
            predicts tokens; a name in `LIKELIHOODS`. By default the paper's, and for a hybrid its
            embeddings.
        likelihood_from (`str`, *optional*): why it is this form, for the protocol. By default
            `--likelihood` if `likelihood` is given, and else that it is the paper's.
    """

    model: VLJEPAModel | VLJEPAForConditionalGeneration | VLJEPATokenModel
    processor: VLJEPAProcessor
    benchmark: Benchmark
    _: KW_ONLY
    batch_size: int = 64
    ablation: str = "none"
    limit: int | None = None
    features: FeatureStore | StreamStore | None = None
    store: EmbeddingStore | None = None
    likelihood: str | None = None
    likelihood_from: str | None = None

    @property
    def predicts_tokens(self) -> bool:
        """True for a model that scores and generates texts token by token."""
        return isinstance(self.model, VLJEPATokenModel)

    @property
    def scoring(self) -> str | None:
        """The form of the likelihoods that rank texts; `None` if embeddings do."""
        if not self.predicts_tokens:
            return None
        if self.model.config.predicts_embeddings:
            return self.likelihood
        return self.likelihood or PAPER

    @property
    def vljepa(self) -> VLJEPAModel:
        """The model without its Y-Decoder."""
        has_decoder = isinstance(self.model, VLJEPAForConditionalGeneration)
        return self.model.vljepa if has_decoder else self.model

    @property
    def writer(self) -> VLJEPAForConditionalGeneration:
        """The model with its Y-Decoder.

        Raises: `ValueError` for a model without one.
        """
        if not isinstance(self.model, VLJEPAForConditionalGeneration):
            raise ValueError(
                f"{self.benchmark.name}: {self.benchmark.task} needs a Y-Decoder, and this model "
                "has none. Train one with `python -m training.train_decoder`."
            )
        return self.model

    @property
    def query(self) -> str | None:
        """Query of rows that ask none: the benchmark's, or the model's for this kind."""
        benchmark = self.benchmark
        if benchmark.query is not None or benchmark.prompt is None:
            return benchmark.query
        return self.model.config.prompts[benchmark.prompt]

    def query_source(self, queries: list[str]) -> str:
        """Return the origin of these queries, for the protocol."""
        if self.benchmark.query is not None:
            return "the benchmark"
        if self.query not in queries:
            return "the rows"
        own = f"the model's {self.benchmark.prompt} prompt"
        return own if len(set(queries)) == 1 else f"the rows and {own}"

    @cached_property
    def _loaded(self) -> tuple[list[dict], list[BadRow], dict[str, str]]:
        rows, bad = self.benchmark.load()
        # Before the model's query is filled in: rows of two models are the same rows.
        facts = origin_facts(self.benchmark.origin, rows)
        if self.query is not None:
            rows = [row if row["query"] else row | {"query": self.query} for row in rows]
        return rows, bad, facts

    def all_rows(self) -> list[dict]:
        """Return every good row of the benchmark."""
        return self._loaded[0]

    def rows(self) -> list[dict]:
        """Return the rows to measure on: the good ones, at most `limit`."""
        return self.all_rows()[: self.limit]

    def predict(
        self,
        rows: list[dict],
        *,
        num_frames: int | None = None,
        states: str | None = None,
        reader: Reader = EMBEDDING,
    ) -> Predictions:
        """Predict the answer's embedding for each row; see [`predict_rows`].

        Args:
            num_frames (*optional*): frames per video, in place of the benchmark's.
        """
        return predict_rows(
            self.vljepa,
            self.processor,
            rows,
            num_frames=num_frames or self.benchmark.num_frames,
            batch_size=self.batch_size,
            ablation=self.ablation,
            features=self.features,
            states=states,
            store=self.store,
            reader=reader,
        )

    def likelihoods(self, rows: list[dict], texts: list[str]) -> tuple[Predictions, torch.Tensor]:
        """Return the rows whose clip was read, and the log-likelihood of each text, `(R, C)`.

        It has the form `scoring`.
        """
        reader = LikelihoodReader(tuple(texts), self.batch_size)
        predictions = self.predict(rows, reader=reader)
        lengths = (self.processor.text_labels(texts) >= 0).sum(dim=1)  # (C,)
        prior = None
        if self.scoring == "ratio":
            # A grey image has other likelihoods than a grey video.
            frames = [self.frames_of(row) for row in predictions.rows]
            given = (self.vljepa, self.processor, reader, predictions.queries)
            priors = {count: unconditional(*given, count) for count in set(frames)}
            prior = torch.stack([priors[count] for count in frames])  # (R, C)
        return predictions, normalized(predictions.embeds, lengths, prior, self.scoring)

    def frames_of(self, row: dict) -> int:
        """Return the number of frames in which the clip of a row is read."""
        if "image" in row:
            return 1
        return self.benchmark.num_frames or self.processor.video_processor.num_frames

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed texts with the Y-Encoder: unit vectors `(len(texts), D)`."""
        options = {"batch_size": self.batch_size, "store": self.store}
        return embed_texts(self.vljepa, self.processor, texts, **options)

    def result(
        self,
        predictions: Predictions,
        protocol: dict[str, str | int | float],
        scores: dict[str, Score],
        *,
        cluster: str = "clip",
        left_out: dict[int, str] | None = None,
        **others: Any,
    ) -> TaskResult:
        """Return the result with the protocol that every kind states, and the rows left out.

        Args:
            protocol: the kind's own facts; the shared ones follow them.
            cluster: the rows that form a cluster of the intervals.
            left_out (*optional*): reasons of rows that were left out, by line, next to those whose
                clip is broken.
            others: further fields of [`TaskResult`].
        """
        rows = predictions.rows
        is_clips = self.benchmark.counts == "clips"
        measured = len({media_of(row) for row in rows}) if is_clips else len(rows)
        others = self.pool_facts(measured) | others
        return TaskResult(
            name=self.benchmark.name,
            task=self.benchmark.task,
            description=self.benchmark.description,
            protocol=protocol
            | self._shared_protocol(predictions)
            | interval_facts(scores.values(), cluster),
            scores=scores,
            skipped=self._skipped_rows(predictions, left_out or {}),
            **others,
        )

    def pool_facts(self, measured: int) -> dict[str, Any]:
        """Return the paper's block, and how many items were measured of how many: fields of
        [`TaskResult`]; {} if the benchmark is not in the paper."""
        benchmark = self.benchmark
        if benchmark.paper is None:
            return {}
        paper = asdict(benchmark.paper)
        paper["unit"] = benchmark.paper.unit or benchmark.counts
        return {"paper": paper, "pool": measured, "pool_expected": benchmark.paper.pool}

    def _shared_protocol(self, predictions: Predictions) -> dict[str, str | int | float]:
        rows, queries = predictions.rows, predictions.queries
        limit = {"limit": "none" if self.limit is None else self.limit}
        if not self.benchmark.media:
            return self._loaded[2] | limit
        moved = sum(row["query"] != query for row, query in zip(rows, queries, strict=True))
        video_processor = self.processor.video_processor
        num_frames = self.benchmark.num_frames or video_processor.num_frames
        frames = sorted({1 if "image" in row else num_frames for row in rows})
        crop = video_processor.crop_size
        distinct = len(set(queries))
        return self._loaded[2] | {
            "media": len({media_of(row) for row in rows}),
            "frames": ", ".join(map(str, frames)),
            "pixels": f"{crop['height']}x{crop['width']}",
            "prompt": queries[0] if distinct == 1 else f"{distinct} distinct queries",
            "prompt_from": self.query_source(queries),
            "ablation": self.ablation,
            "queries_changed_by_ablation": moved,
            **limit,
        }

    def _skipped_rows(self, predictions: Predictions, left_out: dict[int, str]) -> list[str]:
        """Return line number and reason of every row left out, with paths relative to its file."""
        rows, bad, _ = self._loaded
        broken, origin = predictions.broken, self.benchmark.origin
        reasons = {(row.line, row.reason): None for row in bad} | dict.fromkeys(left_out.items())
        if broken:
            found = [(row["line"], broken.get(media_of(row))) for row in rows]
            reasons |= {each: None for each in found if each[1] is not None}
        if isinstance(origin, Source):
            name, folder = origin.label(), os.path.abspath(origin.folder)
        else:
            name, folder = origin.name, os.path.abspath(origin.parent)
        return [f"{name}:{line}: {relative(reason, folder)}" for line, reason in sorted(reasons)]


def relative(text: str, folder: str) -> str:
    """Make the paths in a message relative to a folder: it then reads the same on any machine."""
    for up, parent in enumerate((Path(folder), *Path(folder).parents[:-1])):
        text = text.replace(f"{parent}{os.sep}", f"..{os.sep}" * up)
    return text


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of benchmark. Every module of `eval/tasks` defines one as `KIND`.

    Attributes:
        name (`str`): the value of the key `task` in a benchmark file.
        benchmark (`type[Benchmark]`): its fields are the keys of an entry. A field without a
            default is required; a `Path` must be an existing file.
        evaluate (`Callable`): measures a [`Task`].
        needs_decoder (`bool`): a model without a Y-Decoder cannot be measured.
        hub_tasks (`dict[str, str]`): the Hub's names of the task on an `"image"` and on a
            `"video"`, for the model card.
        examples (`str`): how the report shows the examples. `"answers"`: a clip with its ranked
            answers. `"clips"`: a text with its ranked clips. `"captions"`: a clip with captions
            and their CIDEr. `"texts"`: a text with a positive and a negative one. `"states"`: the
            first and the last frame of a clip with its ranked clips.
        features (`type`): what reads the visual tokens of its media from a feature store.
        by_tokens (`bool`): a model that predicts tokens alone can be measured, by the likelihood
            of texts or by generated texts.
    """

    name: str
    benchmark: type[Benchmark]
    evaluate: Callable[[Task], TaskResult]
    needs_decoder: bool
    hub_tasks: dict[str, str]
    examples: Literal["answers", "clips", "captions", "texts", "states"]
    features: type[FeatureStore] | type[StreamStore] = FeatureStore
    by_tokens: bool = False


__all__ = [
    "Benchmark",
    "Kind",
    "Paper",
    "Task",
    "one_row_per_clip",
    "origin_facts",
    "relative",
    "sha256",
    "texts_sha256",
    "usable_rows",
]
