"""Write rows and clips of the demonstration data."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_clip(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Write frames `(H, W, 3)` as mp4."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        # x264's output depends on the number of threads: one gives the same file everywhere.
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
