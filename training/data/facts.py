"""Facts about rows and their media, without a model: repeats, leaks, the share of pairs in a batch
that have one target, and the headers of files."""

import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modeling_vljepa.losses import Matches
from processing.containers import open_video, stated_end
from processing.images import open_image
from processing.media import Limits, name_of, open_file
from processing.rows import clip_key, media_file
from training.data.dataset import text_id

_WORD = re.compile(r"\w+")


# -- rows ------------------------------------------------------------------------------------


def count_repeats(keys: Iterable[Hashable]) -> int:
    """Count the keys that occurred before."""
    return sum(count - 1 for count in Counter(keys).values())


def repeated_rows(rows: list[dict]) -> int:
    """Count the rows with the clip, the query and the target of an earlier row."""
    return count_repeats((clip_key(row), row["query"], row["target"]) for row in rows)


def words(text: str) -> str:
    """Return a text's words in lower case between spaces.

    So a search for one text within another finds whole words only: " cat " is not in " category ".
    """
    return " ".join(["", *_WORD.findall(text.casefold()), ""])


def leaks(rows: list[dict]) -> list[dict]:
    """Return the rows whose query contains their target.

    "Red or blue?" has to contain it. In other rows, a model can copy the answer from the query.
    """
    return [
        row
        for row in rows
        if (target := words(row["target"])).strip() and target in words(row["query"])
    ]


@dataclass(frozen=True)
class Sharing:
    """Expected share of a batch's rows that have a target or a group in common.

    Attributes:
        batch: rows of a batch, at most the rows of the source.
        pairs: share of the pairs of rows that match, so they are not each other's negatives.
        rows: share of the rows that have at least one matching row in their batch.
        chance_loss: loss of a model that knows nothing; ln(batch) if no rows match.
    """

    batch: int
    pairs: float
    rows: float
    chance_loss: float


def sharing(rows: list[dict], batch: int) -> Sharing | None:
    """Return the expected values for batches drawn at random without replacement, or `None` for
    fewer than two rows."""
    total, batch = len(rows), min(batch, len(rows))
    if batch < 2:
        return None
    groups = [row.get("group_id") for row in rows]
    matches = Matches(
        target_ids=torch.tensor([text_id(row["target"]) for row in rows]),
        group_ids=torch.tensor(
            [
                -1 - index if group is None else text_id(str(group))
                for index, group in enumerate(groups)
            ]
        ),
        negative_ids=None,
        first_row=0,
    )
    alike = matches.counts.double() - 1  # (rows,): other rows that match each row
    unlike = total - 1 - alike
    # Probability that none of the other batch - 1 rows matches:
    # C(unlike, batch - 1) / C(total - 1, batch - 1), as logarithms because the factorials overflow.
    log_alone = torch.lgamma(unlike + 1) - torch.lgamma((unlike - batch + 2).clamp(min=1))
    log_alone = log_alone - math.lgamma(total) + math.lgamma(total - batch + 1)
    alone = torch.where(unlike >= batch - 1, log_alone.exp(), 0.0)
    negatives = (batch - 1) * unlike / (total - 1)  # expected number
    return Sharing(
        batch=batch,
        pairs=(alike.mean() / (total - 1)).item(),
        rows=(1 - alone).clamp(min=0).mean().item(),  # rounding can give -1e-16
        chance_loss=negatives.log1p().mean().item(),
    )


# -- media -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Facts in a file's header; `None` if the header lacks them.

    Attributes:
        width, height: stored size in pixels, before any rotation.
        frames: their number in a video.
        seconds: when a video ends, as a player counts.
    """

    width: int
    height: int
    frames: int | None = None
    seconds: float | None = None


def read_header(row: dict) -> Header:
    """Read the header of a row's file, or of one frame of a folder, without decoding it.

    Raises:
        Exception: the file is missing or broken: `OSError`, `ValueError` or any error of PIL and
            FFmpeg.
    """
    media = media_file(row)
    if isinstance(media, str) and os.path.isdir(media):
        # Training skips hidden files, too.
        paths = sorted(path for path in Path(media).iterdir() if not path.name.startswith("."))
        if not paths:
            raise ValueError("an empty folder")
        return replace(_image_header(str(paths[0])), frames=len(paths))
    return _image_header(media) if "image" in row else _video_header(media)


def clip_seconds(row: dict, header: Header) -> float | None:
    """Return the seconds of a row's clip: the whole video, or the part from `start` to `end` as
    far as the video reaches. `None` if the header has no length."""
    if header.seconds is None:
        return None
    return max(min(row.get("end", math.inf), header.seconds) - row.get("start", 0.0), 0.0)


def _image_header(media: str | bytes) -> Header:
    with open_file(media) as file, open_image(file) as image:
        return Header(*image.size)


def _video_header(media: str | bytes) -> Header:
    with open_video(media, Limits(name_of(media))) as stream:
        context = stream.codec_context
        return Header(context.width, context.height, stream.frames or None, stated_end(stream))
