"""Captioning: the Y-Decoder decodes the predicted embedding into a text.

Each score is shown with those of three other captions of the same clips:

- true text: decoded from the Y-Encoder's embedding of the true text. An upper bound: the decoder
  loses the rest up to a perfect score, and the prediction loses the rest up to this bound.
- nearest caption: the training caption nearest to the predicted embedding. This is retrieval,
  which needs no decoder.
- unconditional: decoded from the mean embedding of the training captions. A lower bound: the usual
  caption, without looking at the clip.

The last two need training captions, which a benchmark can lack.

A model that predicts tokens generates its captions. They are compared with the caption that it
generates of a grey clip (unconditional).

Shapes: R clips, U distinct training captions, D embedding size.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from eval.embed import Predictions, batches
from eval.intervals import difference_interval, numbered
from eval.items import Items
from eval.likelihood import TextReader, grey_clip
from eval.metrics import HIGHEST_CIDER, cider, exact_match, token_f1
from eval.results import Example, Score, TaskResult, evenly_spaced, portable
from eval.task import Benchmark, Kind, Task, one_row_per_clip, sha256, usable_rows
from modeling_vljepa import VLJEPAForConditionalGeneration, decode_texts
from processing import VLJEPAProcessor
from processing.rows import Media, media_of


@dataclass(frozen=True, kw_only=True)
class CaptioningBenchmark(Benchmark):
    """A captioning benchmark.

    Attributes:
        train_rows (`Path`, *optional*): JSONL file with the training captions, for the comparisons.
        num_beams (`int`, *optional*, defaults to 1): beams of the decoder's search.
    """

    counts: ClassVar[str] = "clips"
    prompt: str | None = "caption"

    train_rows: Path | None = None
    num_beams: int = 1

    def train_captions(self) -> list[str]:
        """Return the distinct training captions, sorted; [] if the benchmark has none."""
        if self.train_rows is None:
            return []
        rows, _ = usable_rows(self.train_rows)
        return sorted({row["target"] for row in rows})


def write(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    embeds: torch.Tensor,
    queries: list[str],
    previous: list[str],
    *,
    batch_size: int,
    num_beams: int = 1,
) -> list[str]:
    """Decode the likeliest text of each embedding `(R, D)`; with one beam, greedily.

    Args:
        queries, previous: R queries and previous texts, for a decoder that reads them.
    """
    texts = []
    for indices in tqdm(list(batches(range(len(embeds)), batch_size)), desc="decoding"):
        texts += decode_texts(
            model,
            processor,
            embeds[indices],
            queries=[queries[index] for index in indices],
            previous=[previous[index] for index in indices],
            num_beams=num_beams,
        )
    return texts


def score_captions(captions: list[str], references: list[list[str]]) -> dict[str, torch.Tensor]:
    """Return each metric of each caption `(R,)`.

    Of several references the best counts, except in CIDEr, which averages over them.
    """
    pairs = list(zip(captions, references, strict=True))
    exact = [max(exact_match(caption, text) for text in texts) for caption, texts in pairs]
    overlap = [max(token_f1(caption, text) for text in texts) for caption, texts in pairs]
    return {
        "CIDEr": cider(captions, references),
        "exact match": torch.tensor(exact, dtype=torch.float64),
        "token F1": torch.tensor(overlap, dtype=torch.float64),
    }


def difference(scored: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return how much each metric exceeds the other captions', with its 95 % interval.

    The difference is taken clip by clip: its interval can exclude 0 even where the intervals of
    the two means overlap. Clips are resampled.
    """
    numbers = {}
    for metric, values in scored.items():
        better = values - other[metric]  # (R,)
        largest = max(values.max().item(), other[metric].max().item())
        found = difference_interval(better.numpy(), np.arange(len(better)), largest)
        numbers |= {
            metric: better.mean().item(),
            f"{metric} low": found.low,
            f"{metric} high": found.high,
        }
    return {name: round(number, 4) for name, number in numbers.items()}


@dataclass(frozen=True)
class Captions:
    """The captions of R clips, and those they are compared with.

    Attributes:
        predictions ([`Predictions`]): of the clips that were read.
        written (`list[str]`): the model's.
        others (`dict[str, list[str]]`): R captions by the way of writing.
        facts (`dict`): how they were written, for the protocol.
    """

    predictions: Predictions
    written: list[str]
    others: dict[str, list[str]]
    facts: dict[str, str | int | float]


def decoded(task: Task, rows: list[dict], train_texts: list[str]) -> Captions:
    """Decode the predicted embedding of each clip.

    Args:
        rows: all rows, of which each clip has one or more.
        train_texts: the distinct training captions.
    """
    predictions = task.predict(one_row_per_clip(rows))
    references = references_of([media_of(row) for row in predictions.rows], rows)
    true_embeds = task.embed_texts([texts[0] for texts in references])  # (R, D)
    previous = [row.get("previous", "") for row in predictions.rows]
    decode = partial(
        write,
        task.writer,
        task.processor,
        batch_size=task.batch_size,
        num_beams=task.benchmark.num_beams,
    )
    written = decode(predictions.embeds, predictions.queries, previous)
    others = {"true text": decode(true_embeds, predictions.queries, previous)}
    if train_texts:
        train_embeds = task.embed_texts(train_texts)  # (U, D)
        nearest = (predictions.embeds @ train_embeds.T).argmax(dim=1)  # (R,)
        mean = train_embeds.mean(dim=0, keepdim=True)  # (1, D)
        others["nearest caption"] = [train_texts[index] for index in nearest.tolist()]
        others["unconditional"] = decode(mean, predictions.queries[:1], [""]) * len(written)
    cosines = (predictions.embeds * true_embeds).sum(dim=1)  # (R,)
    config = task.writer.config
    facts = {
        "mean_cosine_to_the_true_text": round(cosines.mean().item(), 4),
        "beams": task.benchmark.num_beams,
        "decoder_reads_query": str(config.decoder_reads_query).lower(),
        "decoder_reads_previous": str(config.decoder_reads_previous).lower(),
    }
    return Captions(predictions, written, others, facts)


def generated(task: Task, rows: list[dict]) -> Captions:
    """Generate the caption of each clip with a model that predicts tokens.

    The unconditional caption is that of a grey clip with as many frames.

    Args:
        rows: all rows, of which each clip has one or more.
    """
    model, processor = task.vljepa, task.processor
    reader = TextReader(task.benchmark.num_beams)
    predictions = task.predict(one_row_per_clip(rows), reader=reader)
    written = reader.decode(processor, predictions.embeds)
    frames = [task.frames_of(row) for row in predictions.rows]
    usual = {}  # by number of frames: a grey image can have another caption than a grey video
    for count in set(frames):
        grey = grey_clip(model, processor, count)
        tokens = reader.read(model, processor, grey, predictions.queries[:1])
        [usual[count]] = reader.decode(processor, tokens)
    others = {"unconditional": [usual[count] for count in frames]}
    facts = {"beams": task.benchmark.num_beams, "written_by": "the language model, token by token"}
    return Captions(predictions, written, others, facts)


def evaluate(task: Task) -> TaskResult:
    """Write a caption for each clip; the targets of its rows are its references.

    Raises: `ValueError` for a model that can write no text, or when the rows ask different queries.
    """
    if not task.predicts_tokens:
        _ = task.writer  # before the rows are read: without a decoder there is nothing to do
    rows = task.rows()
    task.benchmark.check_one_query(rows)
    train_texts = task.benchmark.train_captions()

    # 1. The captions, and those they are compared with
    captions = generated(task, rows) if task.predicts_tokens else decoded(task, rows, train_texts)
    predictions, written, others = captions.predictions, captions.written, captions.others
    clips = [media_of(row) for row in predictions.rows]
    references = references_of(clips, rows)  # R lists

    # 2. Their scores
    scored = score_captions(written, references)
    scored_others = {name: score_captions(texts, references) for name, texts in others.items()}
    clusters = numbered(clips)
    scores = {
        metric: Score.of(
            values,
            clusters,
            {name: other[metric].mean().item() for name, other in scored_others.items()},
            highest=HIGHEST_CIDER if metric == "CIDEr" else 1.0,
        )
        for metric, values in scored.items()
    }
    items = Items(
        clips=[[row] for row in predictions.rows],
        texts=references,
        clusters=clusters,
        scores=scored,
        predictions=written,
    )

    return task.result(
        predictions,
        protocol_of(task, references, train_texts) | captions.facts,
        scores,
        comparisons={
            f"written against {name}": difference(scored, other)
            for name, other in scored_others.items()
        },
        examples=examples(
            clips,
            references,
            {"written": written, **others},
            {"written": scored, **scored_others},
        ),
        items=[items],
    )


def references_of(clips: list[Media], rows: list[dict]) -> list[list[str]]:
    """Return the targets of each clip's rows; rows of other clips are ignored."""
    targets = {clip: [] for clip in clips}
    for row in rows:
        if media_of(row) in targets:
            targets[media_of(row)].append(row["target"])
    return list(targets.values())


def protocol_of(
    task: Task, references: list[list[str]], train_texts: list[str]
) -> dict[str, str | int | float]:
    """Return the facts about the references that a reader of the scores must know."""
    known = set(train_texts)
    facts = {
        "clips": len(references),
        "references_per_clip": round(sum(map(len, references)) / len(references), 4),
        "training_captions": len(train_texts),
    }
    if train_texts:
        facts |= {
            "clips_with_a_training_caption": sum(
                not known.isdisjoint(texts) for texts in references
            ),
            "train_rows_file": portable(task.benchmark.train_rows),
            "train_rows_sha256": sha256(task.benchmark.train_rows),
        }
    return facts


def examples(
    clips: list[Media],
    references: list[list[str]],
    captions: dict[str, list[str]],
    scored: dict[str, dict[str, torch.Tensor]],
) -> list[Example]:
    """Return six clips with an exact caption and six without, each with all captions.

    Args:
        captions, scored: R captions and their metrics, by the way of writing.
    """
    exact = scored["written"]["exact match"].tolist()
    right = [index for index, hit in enumerate(exact) if hit]
    wrong = [index for index, hit in enumerate(exact) if not hit]
    return [
        Example(
            media=clips[index],
            query=captions["written"][index],
            truth=references[index],
            ranked=[
                (f"{name}: {texts[index]}", scored[name]["CIDEr"][index].item())
                for name, texts in captions.items()
            ],
            rank=1 if exact[index] else 2,
        )
        for index in evenly_spaced(right, 6) + evenly_spaced(wrong, 6)
    ]


KIND = Kind(
    name="captioning",
    benchmark=CaptioningBenchmark,
    evaluate=evaluate,
    needs_decoder=True,
    by_tokens=True,
    hub_tasks={"image": "image-to-text", "video": "video-text-to-text"},
    examples="captions",
)

__all__ = ["KIND", "CaptioningBenchmark", "evaluate", "score_captions", "write"]
