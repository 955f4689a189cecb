"""Embed rows and texts in the shared space, in the same way for every task.

A clip is decoded and encoded once for all queries about it. With an [`EmbeddingStore`], embeddings
that it has are not computed, and the processes of its team share the rest.

Shapes: R rows, B batch, T frames, h and w pixels, N visual tokens, Dx visual width, D embedding
size, n embeddings of a job.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.embedding_store import EmbeddingStore, PartWriter, key_of
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.embedding import (
    TEXTS_PER_TOKENIZATION,
    read_tokens,
    target_embeds,
)
from processing import MediaError, VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import Media, clip_key, content_key, media_of

ABLATIONS = ("none", "grey", "shuffled_queries")
# Two frames of a clip, each repeated: which of the two each half of the frames shows.
STATES = {"both": (0, 1), "final": (1, 1)}
GREY = 127
BATCHES_OF_TEXTS = 16  # that a part of the store holds


@dataclass(frozen=True)
class Predictions:
    """The predicted embeddings of rows.

    Attributes:
        rows (`list[dict]` of length R): the given rows, without those whose clip is broken.
        queries (`list[str]` of length R): the query of each row, shuffled or not.
        embeds (`torch.FloatTensor` of shape `(R, D)`): Ŝ_Y, unit vectors, on the CPU; or the
            vectors of another [`Reader`].
        broken (`dict[Media, str]`): each clip that could not be read, and the reason.
    """

    rows: list[dict]
    queries: list[str]
    embeds: torch.Tensor
    broken: dict[Media, str]


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def grey_frame(processor: VLJEPAProcessor) -> torch.Tensor:
    """Return a uniform mid-grey image, processed like any other: `(1, 1, 3, h, w)`."""
    return processor(images=[np.full((64, 64, 3), GREY, np.uint8)])["pixel_values_videos"]


def read_media(
    processor: VLJEPAProcessor,
    kind: str,
    media: Media,
    num_frames: int | None,
    states: str | None = None,
) -> torch.Tensor:
    """Read one clip to pixels `(1, T, 3, h, w)`; an image has T = 1.

    Args:
        states (*optional*): see [`predict_rows`].
    """
    if kind == "image":
        return processor(images=[media])["pixel_values_videos"]
    if states is not None:
        ends = processor(videos=[media], num_frames=2)["pixel_values_videos"]  # first, last
        total = num_frames or processor.video_processor.num_frames
        first, second = STATES[states]
        return ends[:, [first] * (total - total // 2) + [second] * (total // 2)]
    return processor(videos=[media], num_frames=num_frames)["pixel_values_videos"]


# -- jobs ----------------------------------------------------------------------------------


@dataclass
class Embedded:
    """The result of a job.

    Attributes:
        embeds (`dict[int, torch.FloatTensor]`): unit vectors `(D,)`, by number.
        broken (`dict[int, str]`): reasons of clips that could not be read, by the numbers of their
            queries.
        error (`str`, *optional*): the error that ended a job in another process.
    """

    embeds: dict[int, torch.Tensor] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Wanted:
    """One embedding to compute.

    Attributes:
        number (`int`): its number among all that are wanted.
        text (`str`): the query or the text.
        key (`bytes`): its key in the store; empty if it is not stored.
    """

    number: int
    text: str
    key: bytes


class Reader(Protocol):
    """A model's result for queries about clips: a vector for each. A frozen dataclass, so that it
    can be sent."""

    key: str
    """Part of the name of the vectors in the store; empty for Ŝ_Y."""

    def read(
        self,
        model: PreTrainedModel,
        processor: VLJEPAProcessor,
        visual_embeds: torch.Tensor,
        queries: list[str],
    ) -> torch.Tensor:
        """Return vectors `(B, n)` of B queries about clips `(B, N, Dx)`."""


@dataclass(frozen=True)
class EmbeddingReader:
    """The reader of Ŝ_Y."""

    key: str = ""

    def read(
        self,
        model: PreTrainedModel,
        processor: VLJEPAProcessor,
        visual_embeds: torch.Tensor,
        queries: list[str],
    ) -> torch.Tensor:
        """Predict the embedding of the answer to each query: unit vectors `(B, D)`."""
        text = processor(text=queries).to(model.device)
        return model.predict(visual_embeds=visual_embeds, **text)


EMBEDDING = EmbeddingReader()


class Job(Protocol):
    """Clips, texts or streams to embed; a frozen dataclass, so that it can be divided and sent."""

    items: list

    def run(self, model: VLJEPAModel, processor: VLJEPAProcessor, progress: tqdm) -> Embedded:
        """Embed every item, and store the embeddings after each batch."""


@dataclass(frozen=True)
class Clip:
    """A clip and the queries about it; `row` holds its kind, its file and its seconds."""

    row: dict
    queries: list[Wanted]


@dataclass(frozen=True)
class ClipJob:
    """Clips to embed: a share of those of one benchmark.

    Attributes:
        items (`list[Clip]`)
        num_frames (`int`, *optional*), batch_size (`int`), grey (`bool`), features, states,
            reader: see [`predict_rows`].
        writer ([`PartWriter`], *optional*): what stores the embeddings, batch by batch.
    """

    items: list[Clip]
    num_frames: int | None
    batch_size: int
    grey: bool
    features: FeatureStore | None
    states: str | None
    reader: Reader
    writer: PartWriter | None

    @torch.inference_mode()
    def run(self, model: VLJEPAModel, processor: VLJEPAProcessor, progress: tqdm) -> Embedded:
        """Predict the embedding of every query about every clip.

        Raises: `ValueError` that names a clip whose embedding is NaN or infinite.
        """
        model.eval()
        result = Embedded()
        for clips, visual_embeds in self._encoded(model, processor, result, progress):
            # A clip can have many queries, so they are batched anew: (clip of the batch, query)
            asked = [(index, each) for index, clip in enumerate(clips) for each in clip.queries]
            found = {}
            for batch in batches(asked, self.batch_size):
                indices, wanted = zip(*batch, strict=True)
                visual = visual_embeds[list(indices)]
                queries = [each.text for each in wanted]
                predicted = self.reader.read(model, processor, visual, queries)  # (B, D)
                predicted = predicted.float().cpu()
                check_finite([clip_key(clips[index].row) for index in indices], predicted)
                found |= dict(zip(wanted, predicted, strict=True))
            result.embeds |= store_found(found, self.writer)
        return result

    def _encoded(
        self,
        model: VLJEPAModel,
        processor: VLJEPAProcessor,
        result: Embedded,
        progress: tqdm,
    ) -> Iterator[tuple[list[Clip], torch.Tensor]]:
        """Yield batches of clips with their visual tokens `(B, N, Dx)`; note the broken clips.

        This is a generator: the visual tokens of a whole benchmark would not fit into memory.
        """
        blank = grey_frame(processor) if self.grey else None
        # Images and videos in separate batches, since they differ in their number of frames
        for kind in ("image", "video"):
            of_kind = [clip for clip in self.items if kind in clip.row]
            for batch in batches(of_kind, self.batch_size):
                if self.features is not None:
                    tokens = torch.stack([self.features[clip.row] for clip in batch])
                    advance(progress, len(batch))
                    yield batch, tokens.to(model.device, model.dtype)
                    continue
                readable, pixels = [], []
                for clip in batch:
                    try:
                        media = media_of(clip.row)
                        pixels.append(
                            read_media(processor, kind, media, self.num_frames, self.states)
                        )
                        readable.append(clip)
                    except MediaError as error:
                        result.broken |= {each.number: str(error) for each in clip.queries}
                    advance(progress, 1)
                if readable:
                    videos = torch.cat(pixels)  # (B, T, 3, h, w)
                    if blank is not None:
                        videos = blank.expand_as(videos)
                    yield readable, model.encode_video(videos.to(model.device, model.dtype))


@dataclass(frozen=True)
class TextJob:
    """Texts to embed with the Y-Encoder: a share of those of one benchmark."""

    items: list[Wanted]
    batch_size: int
    writer: PartWriter | None

    def run(self, model: VLJEPAModel, processor: VLJEPAProcessor, progress: tqdm) -> Embedded:
        """Embed every text.

        Raises: `ValueError` that names a text whose embedding is NaN or infinite.
        """
        model.eval()
        result = Embedded()
        for batch in batches(self.items, BATCHES_OF_TEXTS * self.batch_size):
            embeds = target_embeds(
                model,
                processor,
                [each.text for each in batch],
                batch_size=self.batch_size,
                on_texts=lambda count: advance(progress, count),
            )
            check_finite([f"the text {each.text!r:.80}" for each in batch], embeds)
            result.embeds |= store_found(dict(zip(batch, embeds, strict=True)), self.writer)
        return result


def check_finite(names: list[str], embeds: torch.Tensor) -> None:
    """Raise `ValueError` for an embedding with NaN or infinity: it would be ranked anywhere.

    Args:
        names: name of the clip or text of each embedding, for the message.
        embeds (`torch.FloatTensor` of shape `(B, D)`)
    """
    finite = embeds.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{names[finite.int().argmin()]}: its embedding holds NaN or infinity. The weights "
            "hold NaN, or they overflow in this dtype: load the model in float32, or replace the "
            "checkpoint."
        )


def store_found(
    found: dict[Wanted, torch.Tensor], writer: PartWriter | None
) -> dict[int, torch.Tensor]:
    """Store embeddings `(D,)`, and return them by number."""
    if writer is not None:
        writer.write({each.key: embed for each, embed in found.items()})
    # Copies: a view would keep its whole batch, and send it from another process.
    return {each.number: embed.clone() for each, embed in found.items()}


def advance(progress: tqdm, count: int) -> None:
    """Move the bar by the items of all processes, after `count` items of this one."""
    progress.update(min(count * progress.processes, progress.total - progress.n))


class Progress(tqdm):
    """A bar in process 0 with the work of all processes, and the time left for it.

    Args:
        processes: number of processes, which have equal shares.
    """

    def __init__(self, *args: object, processes: int = 1, **options: object):
        self.processes = processes
        super().__init__(*args, **options)


def run_job(
    job: Job,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    store: EmbeddingStore | None,
    *,
    found: int,
    desc: str,
    unit: str,
) -> Embedded:
    """Run a job, divided among the processes of the store's team.

    Args:
        found: number of clips or texts that the store has already, for the bar.

    Raises: `ValueError` for an error of any process.
    """
    if not job.items:
        return Embedded()
    team = None if store is None else store.team
    size = 1 if team is None else team.size
    bar = {"total": found + len(job.items), "initial": found, "desc": desc, "unit": unit}
    with Progress(processes=size, **bar) as progress:
        if team is None:
            return job.run(model, processor, progress)
        # Every process takes each size-th clip: neighbours, such as parts of one long video, take
        # equally long.
        own = team.share([_share(job, rank, size) for rank in range(size)])
        results = team.collect(own.run(model, processor, progress))
    whole = Embedded()
    for result in results:
        if result.error is not None:
            raise ValueError(result.error)
        whole.embeds |= result.embeds
        whole.broken |= result.broken
    return whole


def _share(job: Job, rank: int, size: int) -> Job:
    return replace(job, items=job.items[rank::size])


def work(model: VLJEPAModel, processor: VLJEPAProcessor, job: Job) -> Embedded:
    """Run a share in another process than the first, which reports its errors."""
    try:
        return job.run(model, processor, Progress(total=len(job.items), disable=True))
    except ValueError as error:
        return Embedded(error=str(error))


# -- rows ----------------------------------------------------------------------------------


def check_options(
    processor: VLJEPAProcessor,
    rows: list[dict],
    num_frames: int | None,
    ablation: str,
    features: FeatureStore | None,
) -> None:
    """Raise `ValueError` for an unknown ablation, no rows, or options that do not go together."""
    if not rows:
        raise ValueError("there is no row to predict: a limit on the rows must be 1 or more")
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation is {ablation!r}, must be one of {', '.join(ABLATIONS)}")
    if features is not None:
        if ablation == "grey":
            raise ValueError('the ablation "grey" hides pixels, and a feature store has none')
        features.check_frames(num_frames or processor.video_processor.num_frames)


def query_tokens(processor: VLJEPAProcessor, queries: list[str]) -> dict[str, bytes]:
    """Return the tokens of each query, which decide its embedding, as bytes."""
    found = {}
    for batch in batches(list(dict.fromkeys(queries)), TEXTS_PER_TOKENIZATION):
        read = processor(text=list(batch))
        mask = read["attention_mask"].bool()
        tokens = read["input_ids"][mask].split(mask.sum(dim=1).tolist())
        found |= {query: each.numpy().tobytes() for query, each in zip(batch, tokens, strict=True)}
    return found


def clip_keys(
    processor: VLJEPAProcessor,
    asked: dict[tuple[str, Media, str], dict],
    *,
    num_frames: int,
    grey: bool,
    features: FeatureStore | None,
    states: str | None,
    reader: Reader,
) -> list[bytes]:
    """Return the key of each query about a clip; empty if the clip cannot be read.

    Args:
        asked: a row about the clip, by kind, clip and query.
    """
    tokens = query_tokens(processor, [query for *_, query in asked])
    rows = {(kind, media): row for (kind, media, _), row in asked.items()}
    # Every file is read once for it, and its content is remembered for the names of items.
    contents = {
        clip: content_key(row) for clip, row in tqdm(rows.items(), "clip contents", delay=5)
    }
    # Stored features are rounded, so they give other embeddings than the clip itself.
    source = "grey" if grey else "clip"
    if features is not None:
        source = f"features {features.facts['dtype']} {features.facts['precision']}"
    if states is not None:
        source += f" {states} states"
    source += reader.key
    keys = []
    for kind, media, query in asked:
        frames = 1 if kind == "image" else num_frames
        known = contents[kind, media]
        keys.append(key_of(source, known, frames, tokens[query]) if known else b"")
    return keys


def predict_rows(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    rows: list[dict],
    *,
    num_frames: int | None = None,
    batch_size: int = 64,
    ablation: str = "none",
    features: FeatureStore | None = None,
    states: str | None = None,
    store: EmbeddingStore | None = None,
    reader: Reader = EMBEDDING,
) -> Predictions:
    """Predict Ŝ_Y of every row: the embedding of the answer to its query on its clip.

    Args:
        ablation (`str`, *optional*, defaults to `"none"`): `"grey"` replaces every frame by a grey
            one, `"shuffled_queries"` asks each row the query of another row. Both make a model
            worse that uses the clip and the query. The files are still read, so that the same rows
            are scored.
        features (`FeatureStore`, *optional*): visual tokens to read in place of the clips; opened
            for this model.
        states (*optional*): in place of a video, encode two of its frames: the first and the last
            one, each repeated for half of the frames (`"both"`), or only the last one (`"final"`).
            A store of features has no such clips, so they are read from the files.
        store (`EmbeddingStore`, *optional*): embeddings to read and to add to; opened for this
            model.
        reader (*optional*): computes other vectors in place of Ŝ_Y, such as likelihoods.

    Raises: `ValueError` for an unknown ablation, no rows, when no clip can be read, or for an
        embedding that is not finite; `FeatureError` for rows whose clip is not in the store of
        features or has changed since.
    """
    if states is not None:
        features = None
    check_options(processor, rows, num_frames, ablation, features)
    queries = [row["query"] for row in rows]
    if ablation == "shuffled_queries":
        random.Random(0).shuffle(queries)
    grey = ablation == "grey"

    # 1. Each query about each clip once, with a number
    # The kind belongs to a name: one GIF can be a video in one row and an image in another.
    names = [
        ("image" if "image" in row else "video", media_of(row), query)
        for row, query in zip(rows, queries, strict=True)
    ]
    asked = dict(zip(names, rows, strict=True))
    keys = [b""] * len(asked)
    embeds: dict[int, torch.Tensor] = {}
    if store is not None:
        frames = num_frames or processor.video_processor.num_frames
        options = {"num_frames": frames, "grey": grey, "features": features, "states": states}
        options["reader"] = reader
        keys = clip_keys(processor, asked, **options)
        embeds = {n: store.embeds[key] for n, key in enumerate(keys) if key in store.embeds}

    # 2. The missing ones, clip by clip. Copies of a file have one key and one embedding: of two
    # that are computed, rounding would decide which one is nearer to a text.
    first: dict[bytes, int] = {}
    own = [first.setdefault(key, number) if key else number for number, key in enumerate(keys)]
    clips: dict[tuple[str, Media], Clip] = {}
    for number, ((kind, media, query), row) in enumerate(asked.items()):
        if number == own[number] and number not in embeds:
            clip = clips.setdefault((kind, media), Clip(_without_texts(row), []))
            clip.queries.append(Wanted(number, query, keys[number]))
    if features is not None:
        features.check([clip.row for clip in clips.values()])
    job = ClipJob(
        list(clips.values()),
        num_frames=num_frames,
        batch_size=batch_size,
        grey=grey,
        features=features,
        states=states,
        reader=reader,
        writer=None if store is None else store.writer,
    )
    found = len({(kind, media) for kind, media, _ in asked}) - len(clips)
    result = run_job(job, model, processor, store, found=found, desc="media", unit="file")
    if store is not None:
        store.add({keys[number]: embed for number, embed in result.embeds.items()})
    embeds |= result.embeds
    embeds |= {number: embeds[same] for number, same in enumerate(own) if same in embeds}

    # 3. The rows whose clip was read, in their order
    broken = {
        media: result.broken[own[number]]
        for number, (_, media, _) in enumerate(asked)
        if own[number] in result.broken
    }
    if not embeds:
        raise ValueError(f"no file could be read. The first reason: {next(iter(broken.values()))}")
    numbers = {name: number for number, name in enumerate(asked)}
    readable = [index for index, name in enumerate(names) if numbers[name] in embeds]
    return Predictions(
        rows=[rows[index] for index in readable],
        queries=[queries[index] for index in readable],
        embeds=torch.stack([embeds[numbers[names[index]]] for index in readable]),
        broken=broken,
    )


def _without_texts(row: dict) -> dict:
    """Return the columns that name a row's clip: the others need not be sent to processes."""
    return {name: row[name] for name in ("image", "video", "start", "end") if name in row}


def embed_texts(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    texts: list[str],
    *,
    batch_size: int = 64,
    store: EmbeddingStore | None = None,
) -> torch.Tensor:
    """Embed texts as S_Y: unit vectors `(len(texts), D)`, on the CPU.

    Texts that this model has embedded before are taken from the store, or from the cache of the
    pipelines.

    Raises: `ValueError` for an embedding that is not finite.
    """
    distinct = list(dict.fromkeys(texts))
    keys = [b""] * len(distinct)
    embeds: dict[int, torch.Tensor] = {}
    if store is not None:
        keys = [key_of("text", tokens) for tokens, _ in read_tokens(processor, distinct)]
        embeds = {n: store.embeds[key] for n, key in enumerate(keys) if key in store.embeds}
    missing = [
        Wanted(number, text, keys[number])
        for number, text in enumerate(distinct)
        if number not in embeds
    ]
    job = TextJob(missing, batch_size, writer=None if store is None else store.writer)
    found = len(distinct) - len(missing)
    result = run_job(job, model, processor, store, found=found, desc="texts", unit="text")
    if store is not None:
        store.add({keys[number]: embed for number, embed in result.embeds.items()})
    embeds |= result.embeds
    numbers = {text: number for number, text in enumerate(distinct)}
    return torch.stack([embeds[numbers[text]] for text in texts])


__all__ = [
    "ABLATIONS",
    "EMBEDDING",
    "Embedded",
    "Job",
    "Predictions",
    "Reader",
    "Wanted",
    "advance",
    "batches",
    "embed_texts",
    "predict_rows",
    "query_tokens",
    "run_job",
    "store_found",
    "work",
]
