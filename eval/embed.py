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

from eval.features import FeatureStore, media_path
from modeling_vljepa import VLJEPAModel
from processing import MediaError, VLJEPAProcessor

ABLATIONS = ("none", "grey", "shuffled_queries")
GREY = 127


@dataclass(frozen=True)
class Predictions:
    """What the model expects to be answered.

    Attributes:
        rows (`list[dict]` of length R): those given, without the ones whose file is broken.
        queries (`list[str]` of length R): what was asked, shuffled or not.
        embeds (`torch.FloatTensor` of shape `(R, D)`): Ŝ_Y, unit vectors, on the CPU.
        broken (`dict[str, str]`): file to reason, for every file that could not be read.
    """

    rows: list[dict]
    queries: list[str]
    embeds: torch.Tensor
    broken: dict[str, str]


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def grey_frame(processor: VLJEPAProcessor) -> torch.Tensor:
    """A uniform mid-grey image, processed like any other: `(1, 1, 3, h, w)`."""
    return processor(images=[np.full((64, 64, 3), GREY, np.uint8)])["pixel_values_videos"]


def read_media(
    processor: VLJEPAProcessor, kind: str, path: str, num_frames: int | None
) -> torch.Tensor:
    """One file to pixels `(1, T, 3, h, w)`; an image has T = 1."""
    if kind == "image":
        return processor(images=[path])["pixel_values_videos"]
    return processor(videos=[path], num_frames=num_frames)["pixel_values_videos"]


def distinct_files(rows: list[dict]) -> list[tuple[str, str]]:
    """Kind and path of every file, once."""
    kinds = ("image", "video")
    return list(dict.fromkeys((kind, row[kind]) for row in rows for kind in kinds if kind in row))


@torch.inference_mode()
def embed_media(
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    rows: list[dict],
    *,
    broken: dict[str, str],
    num_frames: int | None = None,
    batch_size: int = 64,
    grey: bool = False,
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Take each distinct file once through the X-Encoder, batch by batch.

    A generator, because the visual tokens of a whole benchmark would not fit into memory.

    Args:
        broken (`dict[str, str]`): filled here with each file that could not be read, and why.
        grey (`bool`, *optional*): every frame is replaced by a uniform grey one. The files are
            read all the same, so that the same rows are scored.

    Yields: paths, and the visual tokens `(B, N, Dx)` of their files.
    """
    model.eval()
    files = distinct_files(rows)
    blank = grey_frame(processor) if grey else None
    with tqdm(total=len(files), desc="media", unit="file") as progress:
        for kind in ("image", "video"):  # apart, since a batch has one number of frames
            paths = [path for file_kind, path in files if file_kind == kind]
            for some in batches(paths, batch_size):
                pixels = {}
                for path in some:
                    try:
                        pixels[path] = read_media(processor, kind, path, num_frames)
                    except MediaError as error:
                        broken[path] = str(error)
                    progress.update()
                if pixels:
                    batch = torch.cat(list(pixels.values()))  # (B, T, 3, h, w)
                    if blank is not None:
                        batch = blank.expand_as(batch)
                    yield list(pixels), model.encode_video(batch.to(model.device, model.dtype))


def stored_media(
    model: VLJEPAModel, features: FeatureStore, rows: list[dict], *, batch_size: int = 64
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """`embed_media` from a feature store: nothing is decoded, and the X-Encoder does nothing.

    Raises: `FeatureError` for files that are not in the store or have changed since.
    """
    model.eval()
    features.check(rows)
    files = distinct_files(rows)
    with tqdm(total=len(files), desc="features", unit="file") as progress:
        for kind in ("image", "video"):
            paths = [path for file_kind, path in files if file_kind == kind]
            for some in batches(paths, batch_size):
                tokens = torch.stack([features[{kind: path}] for path in some])  # (B, N, Dx)
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

    Raises: `ValueError` for an unknown ablation, or when no file can be read; `FeatureError` for
        rows whose file is not in the store or has changed since.
    """
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
        rows_of_file[media_path(row)].append(index)

    embeds: dict[int, torch.Tensor] = {}
    broken: dict[str, str] = {}
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


__all__ = ["ABLATIONS", "Predictions", "embed_media", "embed_texts", "media_path", "predict_rows"]
