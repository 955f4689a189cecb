"""Captioning: the predicted embedding put into words by the Y-Decoder.

What the words are worth is seen beside three other captions of the same clips:

- true text: the decoder's, from the Y-Encoder's embedding of the true text. An upper bound; what
  is missing there is lost by the decoder, and what lies between it and the score by the prediction.
- nearest caption: the training caption nearest to the predicted embedding. Retrieval, which needs
  no decoder.
- unconditional: the decoder's, from the mean embedding of the training captions. A lower bound;
  what is usually said.

Shapes: R clips, U distinct training captions, D embedding size.
"""

from functools import partial

import torch
from tqdm import tqdm

from eval.benchmarks import Benchmark, sha256, usable_rows
from eval.embed import batches, embed_texts, predict_rows
from eval.metrics import cider, exact_match, mean_interval, token_f1
from eval.results import Example, Score, TaskResult, common_protocol, portable, skipped_rows, spread
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel, decode_texts
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import media_of


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
    """The likeliest text of each embedding `(R, D)`, for a decoder that may read what was asked and
    what was said before; with one beam, the greedy one."""
    texts = []
    for places in tqdm(list(batches(range(len(embeds)), batch_size)), desc="decoding"):
        asked, said = ([each[place] for place in places] for each in (queries, previous))
        texts += decode_texts(
            model, processor, embeds[places], queries=asked, previous=said, num_beams=num_beams
        )
    return texts


def score_captions(captions: list[str], references: list[list[str]]) -> dict[str, torch.Tensor]:
    """Each metric of each caption `(R,)`; of several references the best counts, but in CIDEr."""
    pairs = list(zip(captions, references, strict=True))
    exact = [max(exact_match(caption, text) for text in texts) for caption, texts in pairs]
    overlap = [max(token_f1(caption, text) for text in texts) for caption, texts in pairs]
    return {
        "CIDEr": cider(captions, references),
        "exact match": torch.tensor(exact, dtype=torch.float64),
        "token F1": torch.tensor(overlap, dtype=torch.float64),
    }


def difference(scored: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """How much better each metric is than the other captions', with its 95 % interval. It is taken
    clip by clip, so it can be told from 0 where the intervals of the two means overlap."""
    numbers = {}
    for metric, values in scored.items():
        better = values - other[metric]  # (R,)
        low, high = mean_interval(better)
        numbers |= {metric: better.mean().item(), f"{metric} low": low, f"{metric} high": high}
    return {name: round(number, 4) for name, number in numbers.items()}


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
    """Write a caption for each file; the targets of its rows are its references.

    Raises: `ValueError` for a model without a Y-Decoder, or when the rows ask different queries.
    """
    if not isinstance(model, VLJEPAForConditionalGeneration):
        raise ValueError(
            f"{benchmark.name}: captioning needs a Y-Decoder, and this model has none. Train one "
            "with `python -m training.train_decoder`."
        )
    all_rows, bad = benchmark.load()
    asked = all_rows[:limit]
    if len({row["query"] for row in asked}) > 1:
        raise ValueError(f"{benchmark.name}: captioning asks one query, give it as `query`")
    one_per_file = list({media_of(row): row for row in asked}.values())
    predictions = predict_rows(
        model.vljepa,
        processor,
        one_per_file,
        num_frames=benchmark.num_frames,
        batch_size=batch_size,
        ablation=ablation,
        features=features,
    )
    targets = {media_of(row): [] for row in predictions.rows}
    for row in asked:
        targets.get(media_of(row), []).append(row["target"])
    references = list(targets.values())

    true_embeds = embed_texts(
        model.vljepa, processor, [texts[0] for texts in references], batch_size=batch_size
    )  # (R, D)
    train_texts = sorted({row["target"] for row in usable_rows(benchmark.train_rows)[0]})
    train_embeds = embed_texts(model.vljepa, processor, train_texts, batch_size=batch_size)
    nearest = (predictions.embeds @ train_embeds.T).argmax(dim=1)  # (R,)
    mean = train_embeds.mean(dim=0, keepdim=True)  # (1, D)

    previous = [row.get("previous", "") for row in predictions.rows]
    tell = partial(write, model, processor, batch_size=batch_size, num_beams=benchmark.num_beams)
    written = tell(predictions.embeds, predictions.queries, previous)
    captions = {
        "true text": tell(true_embeds, predictions.queries, previous),
        "nearest caption": [train_texts[place] for place in nearest.tolist()],
        "unconditional": tell(mean, predictions.queries[:1], [""]) * len(references),
    }
    scored = score_captions(written, references)
    beside = {name: score_captions(texts, references) for name, texts in captions.items()}
    scores = {
        metric: Score.of_mean(
            values, {name: others[metric].mean().item() for name, others in beside.items()}
        )
        for metric, values in scored.items()
    }
    known = set(train_texts)
    cosines = (predictions.embeds * true_embeds).sum(dim=1)  # (R,)
    protocol = {
        "clips": len(references),
        "references_per_clip": round(sum(map(len, references)) / len(references), 4),
        "clips_with_a_training_caption": sum(not known.isdisjoint(texts) for texts in references),
        "train_rows_file": portable(benchmark.train_rows),
        "train_rows_sha256": sha256(benchmark.train_rows),
        "training_captions": len(train_texts),
        "mean_cosine_to_the_true_text": round(cosines.mean().item(), 4),
        "beams": benchmark.num_beams,
        "decoder_reads_query": str(model.config.decoder_reads_query).lower(),
        "decoder_reads_previous": str(model.config.decoder_reads_previous).lower(),
    }
    common = common_protocol(benchmark, processor, predictions, ablation=ablation, limit=limit)
    return TaskResult(
        name=benchmark.name,
        task=benchmark.task,
        description=benchmark.description,
        protocol=protocol | common,
        scores=scores,
        comparisons={f"written against {k}": difference(scored, v) for k, v in beside.items()},
        skipped=skipped_rows(benchmark, all_rows, bad, predictions.broken),
        examples=examples(list(targets), references, {"written": written, **captions}),
    )


def examples(
    files: list[str], references: list[list[str]], captions: dict[str, list[str]]
) -> list[Example]:
    """Six clips captioned to the letter and six not, with the other columns' captions."""
    scored = {name: score_captions(texts, references) for name, texts in captions.items()}
    exact = scored["written"]["exact match"].tolist()
    right = [place for place, hit in enumerate(exact) if hit]
    wrong = [place for place, hit in enumerate(exact) if not hit]
    return [
        Example(
            media=files[place],
            query=captions["written"][place],
            truth=references[place],
            ranked=[
                (f"{name}: {texts[place]}", scored[name]["CIDEr"][place].item())
                for name, texts in captions.items()
            ],
            rank=1 if exact[place] else 2,
        )
        for place in spread(right, 6) + spread(wrong, 6)
    ]


__all__ = ["evaluate", "score_captions"]
