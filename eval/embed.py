"""Embed rows and texts in the shared space, in the same way for every task.

Shapes: R rows, B batch, T frames, h and w pixels, N visual tokens, Dx visual width, D embedding
size.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.embedding import target_embeds
from processing import MediaError, VLJEPAProcessor
from processing.feature_store import FeatureStore
from processing.rows import Media, media_of

ABLATIONS = ("none", "grey", "shuffled_queries")
# Two frames of a clip, each repeated: which of the two each half of the frames shows.
STATES = {"both": (0, 1), "final": (1, 1)}
GREY = 127


@dataclass(frozen=True)
class Predictions:
    """The predicted embeddings of rows.

    Attributes:
        rows (`list[dict]` of length R): the given rows, without those whose clip is broken.
        queries (`list[str]` of length R): the query of each row, shuffled or not.
        embeds (`torch.FloatTensor` of shape `(R, D)`): Ŝ_Y, unit vectors, on the CPU.
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


def distinct_media(rows: list[dict], kind: str) -> dict[Media, dict]:
    """Return each clip of a kind once, with a row about it."""
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
    states: str | None = None,
) -> Iterator[tuple[list[Media], torch.Tensor]]:
    """Encode each distinct clip once with the X-Encoder, batch by batch.

    This is a generator: the visual tokens of a whole benchmark would not fit into memory.

    Args:
        broken (`dict[Media, str]`): filled here with each clip that could not be read, and why.
        grey (`bool`, *optional*): replace every frame by a uniform grey one. The files are still
            read, so that the same rows are scored.
        states (*optional*): see [`predict_rows`].

    Yields: clips, and their visual tokens `(B, N, Dx)`.
    """
    model.eval()
    clips = {kind: distinct_media(rows, kind) for kind in ("image", "video")}
    blank = grey_frame(processor) if grey else None
    with tqdm(total=sum(map(len, clips.values())), desc="media", unit="file") as progress:
        # Images and videos in separate batches, since they differ in their number of frames
        for kind, found in clips.items():
            for batch in batches(list(found), batch_size):
                pixels = {}
                for media in batch:
                    try:
                        pixels[media] = read_media(processor, kind, media, num_frames, states)
                    except MediaError as error:
                        broken[media] = str(error)
                    progress.update()
                if pixels:
                    videos = torch.cat(list(pixels.values()))  # (B, T, 3, h, w)
                    if blank is not None:
                        videos = blank.expand_as(videos)
                    yield list(pixels), model.encode_video(videos.to(model.device, model.dtype))


def stored_media(
    model: VLJEPAModel, features: FeatureStore, rows: list[dict], *, batch_size: int = 64
) -> Iterator[tuple[list[Media], torch.Tensor]]:
    """Yield what `embed_media` yields, from a feature store: no clip is decoded or encoded.

    Raises: `FeatureError` for clips that are not in the store or have changed since.
    """
    model.eval()
    features.check(rows)
    clips = {kind: distinct_media(rows, kind) for kind in ("image", "video")}
    with tqdm(total=sum(map(len, clips.values())), desc="features", unit="file") as progress:
        for found in clips.values():
            for batch in batches(list(found), batch_size):
                tokens = torch.stack([features[found[media]] for media in batch])  # (B, N, Dx)
                yield batch, tokens.to(model.device, model.dtype)
                progress.update(len(batch))


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
    states: str | None = None,
) -> Predictions:
    """Predict Ŝ_Y of every row: the embedding of the answer to its query on its clip.

    Args:
        ablation (`str`, *optional*, defaults to `"none"`): `"grey"` replaces every frame by a grey
            one, `"shuffled_queries"` asks each row the query of another row. Both make a model
            worse that uses the clip and the query.
        features (`FeatureStore`, *optional*): visual tokens to read in place of the clips; opened
            for this model.
        states (*optional*): in place of a video, encode two of its frames: the first and the last
            one, each repeated for half of the frames (`"both"`), or only the last one (`"final"`).
            A feature store has no such clips, so they are read from the files.

    Raises: `ValueError` for an unknown ablation, no rows, or when no clip can be read;
        `FeatureError` for rows whose clip is not in the store or has changed since.
    """
    check_options(processor, rows, num_frames, ablation, features)
    queries = [row["query"] for row in rows]
    if ablation == "shuffled_queries":
        random.Random(0).shuffle(queries)
    rows_of_clip = defaultdict(list)
    for index, row in enumerate(rows):
        rows_of_clip[media_of(row)].append(index)

    broken: dict[Media, str] = {}
    if features is not None and states is None:
        media = stored_media(model, features, rows, batch_size=batch_size)
    else:
        media = embed_media(
            model,
            processor,
            rows,
            broken=broken,
            num_frames=num_frames,
            batch_size=batch_size,
            grey=ablation == "grey",
            states=states,
        )
    embeds: dict[int, torch.Tensor] = {}
    for clips, visual_embeds in media:
        # A clip can have many rows, so they are batched anew: (clip of the batch, row)
        asked = [(clip, row) for clip, name in enumerate(clips) for row in rows_of_clip[name]]
        for batch in batches(asked, batch_size):
            clip_indices, row_indices = zip(*batch, strict=True)
            text = processor(text=[queries[index] for index in row_indices]).to(model.device)
            visual = visual_embeds[list(clip_indices)]
            predicted = model.predict(visual_embeds=visual, **text)  # (B, D)
            embeds.update(zip(row_indices, predicted.float().cpu(), strict=True))
    if not embeds:
        raise ValueError(f"no file could be read. The first reason: {next(iter(broken.values()))}")
    readable = sorted(embeds)  # images come first above; here the order of the rows again
    return Predictions(
        rows=[rows[index] for index in readable],
        queries=[queries[index] for index in readable],
        embeds=torch.stack([embeds[index] for index in readable]),
        broken=broken,
    )


@torch.inference_mode()
def embed_texts(
    model: VLJEPAModel, processor: VLJEPAProcessor, texts: list[str], *, batch_size: int = 64
) -> torch.Tensor:
    """Embed texts as S_Y: unit vectors `(len(texts), D)`, on the CPU.

    Texts that this model has embedded before are taken from the cache of the pipelines.
    """
    model.eval()
    with tqdm(total=len(texts), desc="texts", unit="text") as progress:
        return target_embeds(
            model, processor, texts, batch_size=batch_size, on_texts=progress.update
        )


__all__ = ["ABLATIONS", "Predictions", "batches", "embed_media", "embed_texts", "predict_rows"]
