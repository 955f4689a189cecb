"""What the sources need to write their part of the data."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_clip(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Frames `(H, W, 3)` as mp4. One thread, because x264's output depends on their number."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
