"""Rows and texts to points in the shared space, the same way for every task.

Shapes: B batch, T frames, h and w pixels, N visual tokens, Dx visual width, D embedding size.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from processing import MediaError, VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import Media, media_of

ABLATIONS = ("none", "grey", "shuffled_queries")
GREY = 127


@dataclass(frozen=True)
class Predictions:
    """What the model expects to be answered.

    Attributes:
        rows (`list[dict]` of length R): those given, without the ones whose file is broken.
        queries (`list[str]` of length R): what was asked, shuffled or not.
        embeds (`torch.FloatTensor` of shape `(R, D)`): Ŝ_Y, unit vectors, on the CPU.
        broken (`dict[Media, str]`): clip to reason, for every one that could not be read.
    """

    rows: list[dict]
    queries: list[str]
    embeds: torch.Tensor
    broken: dict[Media, str]


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def grey_frame(processor: VLJEPAProcessor) -> torch.Tensor:
    """A uniform mid-grey image, processed like any other: `(1, 1, 3, h, w)`."""
    return processor(images=[np.full((64, 64, 3), GREY, np.uint8)])["pixel_values_videos"]


def read_media(
    processor: VLJEPAProcessor, kind: str, media: Media, num_frames: int | None
) -> torch.Tensor:
    """One clip to pixels `(1, T, 3, h, w)`; an image has T = 1."""
    if kind == "image":
        return processor(images=[media])["pixel_values_videos"]
    return processor(videos=[media], num_frames=num_frames)["pixel_values_videos"]


def distinct_media(rows: list[dict], kind: str) -> dict[Media, dict]:
    """Every clip of a kind once, with a row about it."""
    return {media_of(row): row for row in rows if kind in row}


@torch.inference_mode()
def embed_media(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    rows: list[dict],
    *,
    broken: dict[Media, str],
    num_frames: int | None = None,
    batch_size: int = 64,
    grey: bool = False,
) -> Iterator[tuple[list[Media], torch.Tensor]]:
    """Take each distinct clip once through the X-Encoder, batch by batch.

    A generator, because the visual tokens of a whole benchmark would not fit into memory.

    Args:
        broken (`dict[Media, str]`): filled here with each clip that could not be read, and why.
        grey (`bool`, *optional*): every frame is replaced by a uniform grey one. The files are
            read all the same, so that the same rows are scored.

    Yields: clips, and their visual tokens `(B, N, Dx)`.
    """
    model.eval()
    clips = {kind: distinct_media(rows, kind) for kind in ("image", "video")}
    blank = grey_frame(processor) if grey else None
    with tqdm(total=sum(map(len, clips.values())), desc="media", unit="file") as progress:
        for kind, found in clips.items():  # apart, since a batch has one number of frames
            for some in batches(list(found), batch_size):
                pixels = {}
                for media in some:
                    try:
                        pixels[media] = read_media(processor, kind, media, num_frames)
                    except MediaError as error:
                        broken[media] = str(error)
                    progress.update()
                if pixels:
                    batch = torch.cat(list(pixels.values()))  # (B, T, 3, h, w)
                    if blank is not None:
                        batch = blank.expand_as(batch)
                    yield list(pixels), model.encode_video(batch.to(model.device, model.dtype))


def stored_media(
    model: VLJEPAModel, features: FeatureStore, rows: list[dict], *, batch_size: int = 64
) -> Iterator[tuple[list[Media], torch.Tensor]]:
    """`embed_media` from a feature store: nothing is decoded, and the X-Encoder does nothing.

    Raises: `FeatureError` for files that are not in the store or have changed since.
    """
    model.eval()
    features.check(rows)
    clips = {kind: distinct_media(rows, kind) for kind in ("image", "video")}
    with tqdm(total=sum(map(len, clips.values())), desc="features", unit="file") as progress:
        for found in clips.values():
            for some in batches(list(found), batch_size):
                tokens = torch.stack([features[found[media]] for media in some])  # (B, N, Dx)
                yield some, tokens.to(model.device, model.dtype)
                progress.update(len(some))


@torch.inference_mode()
def predict_rows(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    rows: list[dict],
    *,
    num_frames: int | None = None,
    batch_size: int = 64,
    ablation: str = "none",
    features: FeatureStore | None = None,
) -> Predictions:
    """Ŝ_Y of every row: what the model expects the answer to its query on its file to be.

    Args:
        ablation (`str`, *optional*, defaults to `"none"`): `"grey"` hides what there is to see,
            `"shuffled_queries"` asks each row the question of another one. A model that looks
            and reads gets worse by both.
        features (`FeatureStore`, *optional*): where the visual tokens are read in place of the
            files; opened for this model.

    Raises: `ValueError` for an unknown ablation, without rows, or when no file can be read;
        `FeatureError` for rows whose file is not in the store or has changed since.
    """
    if not rows:
        raise ValueError("there is no row to predict: a limit on them has to be 1 or more")
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation is {ablation!r}, must be one of {', '.join(ABLATIONS)}")
    if features is not None:
        if ablation == "grey":
            raise ValueError('the ablation "grey" hides pixels, and a feature store has none')
        features.check_frames(num_frames or processor.video_processor.num_frames)
    queries = [row["query"] for row in rows]
    if ablation == "shuffled_queries":
        random.Random(0).shuffle(queries)
    rows_of_file = defaultdict(list)
    for index, row in enumerate(rows):
        rows_of_file[media_of(row)].append(index)

    embeds: dict[int, torch.Tensor] = {}
    broken: dict[Media, str] = {}
    if features is None:
        media = embed_media(
            model,
            processor,
            rows,
            broken=broken,
            num_frames=num_frames,
            batch_size=batch_size,
            grey=ablation == "grey",
        )
    else:
        media = stored_media(model, features, rows, batch_size=batch_size)
    for paths, visual_embeds in media:
        asked = [(place, row) for place, path in enumerate(paths) for row in rows_of_file[path]]
        for some in batches(asked, batch_size):
            places, indices = zip(*some, strict=True)
            text = processor(text=[queries[index] for index in indices]).to(model.device)
            predicted = model.predict(visual_embeds=visual_embeds[list(places)], **text)  # (B, D)
            embeds.update(zip(indices, predicted.float().cpu(), strict=True))
    if not embeds:
        raise ValueError(f"no file could be read. The first reason: {next(iter(broken.values()))}")
    kept = sorted(embeds)
    return Predictions(
        rows=[rows[index] for index in kept],
        queries=[queries[index] for index in kept],
        embeds=torch.stack([embeds[index] for index in kept]),
        broken=broken,
    )


@torch.inference_mode()
def embed_texts(
    model: VLJEPAModel, processor: VLJEPAProcessor, texts: list[str], *, batch_size: int = 64
) -> torch.Tensor:
    """S_Y of every text, each distinct one embedded once: unit vectors `(len(texts), D)`, CPU."""
    model.eval()
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    embeds = []
    with tqdm(total=len(distinct), desc="texts", unit="text") as progress:
        for some in batches(list(distinct), batch_size):
            batch = processor(targets=some).to(model.device)
            embeds.append(model.encode_target(**batch).float().cpu())  # (B, D)
            progress.update(len(some))
    return torch.cat(embeds)[[distinct[text] for text in texts]]


__all__ = ["ABLATIONS", "Predictions", "embed_media", "embed_texts", "predict_rows"]
