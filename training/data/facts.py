"""What can be said of rows and their media without a model: repeats, leaks, how often a batch
shares a target, and what the headers of files tell."""

import io
import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import torch
from PIL import Image

from modeling_vljepa.losses import Matches
from processing.rows import clip_key, media_file
from training.data.dataset import text_id

_WORD = re.compile(r"\w+")


# -- rows ------------------------------------------------------------------------------------


def count_repeats(keys: Iterable[Hashable]) -> int:
    """How many of the keys stood there before."""
    return sum(count - 1 for count in Counter(keys).values())


def repeated_rows(rows: list[dict]) -> int:
    """Rows with the clip, the query and the target of an earlier one."""
    return count_repeats((clip_key(row), row["query"], row["target"]) for row in rows)


def words(text: str) -> str:
    """A text's words between spaces, so that one text is within another word for word."""
    return " ".join(["", *_WORD.findall(text.casefold()), ""])


def leaks(rows: list[dict]) -> list[dict]:
    """Rows whose query holds their target. "Red or blue?" has to; elsewhere a model can copy
    instead of looking."""
    return [
        row
        for row in rows
        if (target := words(row["target"])).strip() and target in words(row["query"])
    ]


@dataclass(frozen=True)
class Sharing:
    """How often rows that a batch draws from a source share a target or a group.

    Attributes:
        batch: rows of a batch; of a smaller source, its rows.
        pairs: share of pairs of rows, which are not each other's negatives.
        rows: share of rows that meet another such row in their batch.
        chance_loss: of a model that knows nothing, in such a batch; ln(batch) if nothing is shared.
    """

    batch: int
    pairs: float
    rows: float
    chance_loss: float


def sharing(rows: list[dict], batch: int) -> Sharing | None:
    """What to expect of batches drawn at random without replacement; of a single row, `None`."""
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
    alike = matches.counts.double() - 1  # other rows that share with each one
    unlike = total - 1 - alike
    # None of the other batch - 1 rows is alike: C(unlike, batch - 1) / C(total - 1, batch - 1).
    none = torch.lgamma(unlike + 1) - torch.lgamma((unlike - batch + 2).clamp(min=1))
    none = none - math.lgamma(total) + math.lgamma(total - batch + 1)
    alone = torch.where(unlike >= batch - 1, none.exp(), 0.0)
    negatives = (batch - 1) * unlike / (total - 1)
    return Sharing(
        batch=batch,
        pairs=(alike.mean() / (total - 1)).item(),
        rows=(1 - alone).clamp(min=0).mean().item(),  # or rounding would make it -0 %
        chance_loss=negatives.log1p().mean().item(),
    )


# -- media -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a file says of itself; `None` where it does not.

    Attributes:
        width, height: pixels, as they are stored.
        frames, seconds: of a video.
    """

    width: int
    height: int
    frames: int | None = None
    seconds: float | None = None


def read_header(row: dict) -> Header:
    """The header of a row's file, nothing decoded; of a folder of frames, one of theirs.

    Raises: `OSError`, `ValueError` or whatever PIL and FFmpeg do if there is none.
    """
    media = media_file(row)
    if isinstance(media, str) and os.path.isdir(media):
        # Hidden files are no frames to training, either.
        paths = sorted(path for path in Path(media).iterdir() if not path.name.startswith("."))
        if not paths:
            raise ValueError("an empty folder")
        return replace(_image_header(str(paths[0])), frames=len(paths))
    return _image_header(media) if "image" in row else _video_header(media)


def clip_seconds(row: dict, header: Header) -> float | None:
    """How long the row's clip is: what there is of the part that it asks for, or the whole video;
    `None` where the file does not say how long it is."""
    if header.seconds is None:
        return None
    return max(min(row.get("end", math.inf), header.seconds) - row.get("start", 0.0), 0.0)


def _opened(media: str | bytes) -> io.BufferedIOBase:
    return io.BytesIO(media) if isinstance(media, bytes) else open(media, "rb")


def _image_header(media: str | bytes) -> Header:
    with _opened(media) as file, Image.open(file) as image:
        return Header(*image.size)


def _video_header(media: str | bytes) -> Header:
    # Opened here, and no protocol: a playlist must not make FFmpeg open what it names.
    with _opened(media) as file, av.open(file, options={"protocol_whitelist": "none"}) as video:
        if not video.streams.video:
            raise ValueError("no video stream")
        stream = video.streams.video[0]
        seconds = None if video.duration is None else video.duration / av.time_base
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        context = stream.codec_context
        return Header(context.width, context.height, stream.frames or None, seconds)
