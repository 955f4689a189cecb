"""Training data of a Y-Decoder: texts and their embeddings.

Shapes: B batch, N texts of a source, D embedding size, L tokens.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import PreTrainedConfig

from eval.embed import embed_texts, predict_rows
from modeling_vljepa import VLJEPAForConditionalGeneration
from processing import VLJEPAProcessor, bad_rows_report, read_rows
from training.arguments import RecipeError
from training.decoder.recipe import DecoderDataArguments, DecoderSource


def on_the_sphere(embeds: torch.Tensor, noise: float) -> torch.Tensor:
    """Add Gaussian noise of expected length `noise` to unit vectors `(…, D)`; normalise again."""
    # Divided by sqrt(D): the length of D standard normal numbers is about sqrt(D).
    moved = embeds + torch.randn_like(embeds) * noise / embeds.shape[-1] ** 0.5
    return F.normalize(moved, dim=-1)


class EmbeddedTexts(Dataset):
    """Texts with their embeddings and contexts.

    Args:
        embeds (`torch.FloatTensor` of shape `(N, D)`)
        contexts, texts (`list[str]` of length N)
        noise: see `DecoderDataArguments`; it is drawn again at every access.
    """

    def __init__(
        self, embeds: torch.Tensor, contexts: list[str], texts: list[str], noise: float = 0.0
    ):
        self.embeds, self.contexts, self.texts, self.noise = embeds, contexts, texts, noise

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        embeds = self.embeds[index]
        if self.noise:
            embeds = on_the_sphere(embeds, self.noise)
        return {"embeds": embeds, "context": self.contexts[index], "text": self.texts[index]}


class DecoderCollator:
    """Collator for [`VLJEPAForConditionalGeneration`]: embeddings, contexts and labels."""

    def __init__(self, processor: VLJEPAProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        contexts = self.processor(contexts=[sample["context"] for sample in samples])
        return {
            "predicted_embeds": torch.stack([sample["embeds"] for sample in samples]),  # (B, D)
            "labels": self.processor.text_labels([sample["text"] for sample in samples]),  # (B, L)
            **contexts,
        }


def read_source(source: DecoderSource, max_bad_share: float) -> list[dict]:
    """Read the usable rows of a source, with its query.

    Raises:
        RecipeError: the file cannot be read, or more than `max_bad_share` of its rows are
            unusable.
    """
    try:
        rows, bad = read_rows(source.rows)
        if bad:
            print(bad_rows_report(bad, len(rows) + len(bad), max_bad_share), flush=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source.rows}: {error}") from error
    return rows if source.query is None else [row | {"query": source.query} for row in rows]


def contexts_of(config: PreTrainedConfig, rows: Iterable[dict]) -> list[str]:
    return [config.decoder_context(row["query"], row.get("previous", "")) for row in rows]


def embedded_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    rows: list[dict],
    noise: float,
) -> EmbeddedTexts:
    """Embed each distinct pair of a text and a context with the Y-Encoder, once."""
    pairs = zip(contexts_of(model.config, rows), (row["target"] for row in rows), strict=True)
    contexts, texts = (list(part) for part in zip(*dict.fromkeys(pairs), strict=True))
    embeds = embed_texts(model.vljepa, processor, texts)
    return EmbeddedTexts(embeds, contexts, texts, noise)


def predicted_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    sources: list[list[dict]],
    noise: float = 0.0,
    max_bad_share: float = 0.0,
) -> list[Subset]:
    """Predict the embedding of every row's text from its clip and query.

    Returns: one dataset for each source.

    Raises:
        RecipeError: more than `max_bad_share` of a source's rows have a clip that cannot be read.
    """
    # All sources in one call: a clip that several of them ask about is read and encoded once.
    rows = [row | {"source": i} for i, source in enumerate(sources) for row in source]
    predictions = predict_rows(model.vljepa, processor, rows)
    for path, reason in predictions.broken.items():
        print(f"left out: {path}: {reason}", flush=True)
    indices = defaultdict(list)
    for index, row in enumerate(predictions.rows):
        indices[row["source"]].append(index)
    for i, source in enumerate(sources):
        unreadable = len(source) - len(indices[i])
        if unreadable > max_bad_share * len(source):
            raise RecipeError(
                f"source {i}: {unreadable} of {len(source)} rows have a file that cannot be read, "
                f"listed above; at most {max_bad_share:.1%} may. Replace these files, or raise "
                "data.max_bad_share."
            )
    contexts = contexts_of(model.config, predictions.rows)
    texts = [row["target"] for row in predictions.rows]
    whole = EmbeddedTexts(predictions.embeds, contexts, texts, noise)
    return [Subset(whole, indices[i]) for i in range(len(sources))]


def training_texts(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    arguments: DecoderDataArguments,
    sources: list[list[dict]],
) -> ConcatDataset:
    """Return the dataset of an epoch: all sources, repeated as their `repeat` requires.

    Args:
        sources: the rows of each source, as `read_source` returns them.
    """
    noise = arguments.noise
    kinds = []
    if arguments.embeddings != "predicted":
        kinds.append([embedded_texts(model, processor, rows, noise) for rows in sources])
    if arguments.embeddings != "text":
        kinds.append(predicted_texts(model, processor, sources, noise, arguments.max_bad_share))
    parts = []
    for source, *of_source in zip(arguments.sources, *kinds, strict=True):
        size = sum(map(len, of_source))
        print(f"{source.rows}: {size} embeddings, repeat {source.repeat}", flush=True)
        parts += of_source * source.repeat
    return ConcatDataset(parts)
