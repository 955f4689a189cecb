"""One measurement, and the parts that every kind of benchmark shares.

A [`Benchmark`] is an entry of a benchmark file such as `benchmarks.yaml`. A [`Task`] is one model
on one benchmark. A [`Kind`] defines how benchmarks of one kind are measured; every module of
`eval/tasks` has one.

Shapes: R rows, D embedding size.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from eval.embed import Predictions, embed_texts, predict_rows
from eval.embedding_store import EmbeddingStore
from eval.results import Score, TaskResult, interval_facts, portable
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import BadRow, media_of, read_rows
from processing.stream_store import StreamStore


def usable_rows(path: Path) -> tuple[list[dict], list[BadRow]]:
    """Read rows as [`read_rows`] does.

    Raises: `ValueError` for a file without a single good row.
    """
    rows, bad = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no usable row. The first reason: {bad[0]}")
    return rows, bad


def one_row_per_clip(rows: list[dict]) -> list[dict]:
    """Return one row about each clip: the last one, in the order of the clips."""
    return list({media_of(row): row for row in rows}.values())


def sha256(path: Path) -> str:
    """Return the first 12 hexadecimal digits: enough to see that two runs read the same rows."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def texts_sha256(texts: list[str]) -> str:
    """Return the first 12 hexadecimal digits for a list of candidate texts, in any order."""
    return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Benchmark:
    """One entry of a benchmark file: the keys that all kinds share.

    A kind with keys of its own adds them in a subclass.

    Attributes:
        prompt (`str`, *optional*): name in `config.prompts` of the query of rows that ask none, if
            the benchmark has no `query`; `None` for a kind whose rows ask. No key of an entry.
        name (`str`): the entry's name.
        task (`str`): the name of its kind.
        rows (`Path`): JSONL file, as [`read_rows`] reads it.
        description (`str`): a sentence about the data and the purpose.
        query (`str`, *optional*): replaces the queries of the rows.
        num_frames (`int`, *optional*): frames per video; the processor's by default.
    """

    prompt: ClassVar[str | None] = None

    name: str
    task: str
    rows: Path
    description: str
    query: str | None = None
    num_frames: int | None = None

    def load(self) -> tuple[list[dict], list[BadRow]]:
        """Read the good rows, with this benchmark's query if it has one, and the bad rows.

        Raises: `ValueError` when no row is good.
        """
        rows, bad = usable_rows(self.rows)
        if self.query is not None:
            rows = [row | {"query": self.query} for row in rows]
        return rows, bad

    def check_one_query(self, rows: list[dict]) -> None:
        """Raise `ValueError` if the rows ask different queries: a clip has one embedding here."""
        if len({row["query"] for row in rows}) > 1:
            raise ValueError(f"{self.name}: {self.task} asks one query; give it as `query`")


@dataclass(frozen=True)
class Task:
    """One model on one benchmark, with the options of the measurement.

    Attributes:
        model ([`VLJEPAModel`] or [`VLJEPAForConditionalGeneration`])
        processor ([`VLJEPAProcessor`])
        benchmark ([`Benchmark`])
        batch_size (`int`, *optional*, defaults to 64): clips or texts per forward pass.
        ablation (`str`, *optional*, defaults to `"none"`): see [`predict_rows`].
        limit (`int`, *optional*): measure on the first `limit` rows only.
        features (`FeatureStore` or `StreamStore`, *optional*): visual tokens to read in place of
            clips or streams; opened for this model by the kind's `features`.
        store (`EmbeddingStore`, *optional*): embeddings to read and to add to.
    """

    model: VLJEPAModel | VLJEPAForConditionalGeneration
    processor: VLJEPAProcessor
    benchmark: Benchmark
    _: KW_ONLY
    batch_size: int = 64
    ablation: str = "none"
    limit: int | None = None
    features: FeatureStore | StreamStore | None = None
    store: EmbeddingStore | None = None

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
    def _loaded(self) -> tuple[list[dict], list[BadRow]]:
        rows, bad = self.benchmark.load()
        if self.query is not None:
            rows = [row if row["query"] else row | {"query": self.query} for row in rows]
        return rows, bad

    def all_rows(self) -> list[dict]:
        """Return every good row of the benchmark."""
        return self._loaded[0]

    def rows(self) -> list[dict]:
        """Return the rows to measure on: the good ones, at most `limit`."""
        return self.all_rows()[: self.limit]

    def predict(self, rows: list[dict], *, states: str | None = None) -> Predictions:
        """Predict the answer's embedding for each row; see [`predict_rows`]."""
        return predict_rows(
            self.vljepa,
            self.processor,
            rows,
            num_frames=self.benchmark.num_frames,
            batch_size=self.batch_size,
            ablation=self.ablation,
            features=self.features,
            states=states,
            store=self.store,
        )

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
        **others: Any,
    ) -> TaskResult:
        """Return the result with the protocol that every kind states, and the rows left out.

        Args:
            protocol: the kind's own facts; the shared ones follow them.
            cluster: the rows that form a cluster of the intervals.
            others: further fields of [`TaskResult`].
        """
        return TaskResult(
            name=self.benchmark.name,
            task=self.benchmark.task,
            description=self.benchmark.description,
            protocol=protocol
            | self._shared_protocol(predictions)
            | interval_facts(scores.values(), cluster),
            scores=scores,
            skipped=self._skipped_rows(predictions),
            **others,
        )

    def _shared_protocol(self, predictions: Predictions) -> dict[str, str | int | float]:
        rows, queries = predictions.rows, predictions.queries
        moved = sum(row["query"] != query for row, query in zip(rows, queries, strict=True))
        video_processor = self.processor.video_processor
        num_frames = self.benchmark.num_frames or video_processor.num_frames
        frames = sorted({1 if "image" in row else num_frames for row in rows})
        crop = video_processor.crop_size
        distinct = len(set(queries))
        return {
            "rows_file": portable(self.benchmark.rows),
            "rows_sha256": sha256(self.benchmark.rows),
            "media": len({media_of(row) for row in rows}),
            "frames": ", ".join(map(str, frames)),
            "pixels": f"{crop['height']}x{crop['width']}",
            "prompt": queries[0] if distinct == 1 else f"{distinct} distinct queries",
            "prompt_from": self.query_source(queries),
            "ablation": self.ablation,
            "queries_changed_by_ablation": moved,
            "limit": "none" if self.limit is None else self.limit,
        }

    def _skipped_rows(self, predictions: Predictions) -> list[str]:
        """Return line number and reason of every row left out, with paths relative to its file."""
        rows, bad = self._loaded
        broken, path = predictions.broken, self.benchmark.rows
        reasons = {row.line: row.reason for row in bad}
        reasons |= {row["line"]: broken[media_of(row)] for row in rows if media_of(row) in broken}
        folder = os.path.abspath(path.parent)
        return [
            f"{path.name}:{line}: {_relative(reasons[line], folder)}" for line in sorted(reasons)
        ]


def _relative(text: str, folder: str) -> str:
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
            and their CIDEr.
        features (`type`): what reads the visual tokens of its media from a feature store.
    """

    name: str
    benchmark: type[Benchmark]
    evaluate: Callable[[Task], TaskResult]
    needs_decoder: bool
    hub_tasks: dict[str, str]
    examples: Literal["answers", "clips", "captions"]
    features: type[FeatureStore] | type[StreamStore] = FeatureStore


__all__ = ["Benchmark", "Kind", "Task", "one_row_per_clip", "sha256", "texts_sha256", "usable_rows"]
