"""Visual tokens of a stream's windows, read from a feature store instead of computed.

    store/
      stream-NAME.json               the settings, the times of all windows, the windows per part
      stream-NAME-00000.safetensors  a part: the visual tokens of consecutive windows, stacked
      …

NAME is a hash of the video's content and of the windows' settings, so a moved or renamed video is
found, and a changed one is not. `python -m training.cache_features RECIPE --output DIR --streams
BENCHMARK` writes these files. The JSON file is written last: a stream without it is incomplete.

Shapes: S windows, B windows of a batch, N visual tokens, Dx visual width.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .feature_store import FeatureError, cure, differences, from_int8, made_with, read_facts
from .media import MediaError, name_of
from .rows import content_key
from .video_processing_vljepa import VLJEPAVideoProcessor


def stream_name(video: str, *, window: int, stride: int, fps: float | None) -> str:
    """Return the beginning of the names of a stream's files."""
    # `4` and `4.0` are one rate; the content stays the same after a move.
    settings = f"{content_key({'video': video})} {window} {stride} {fps and float(fps)}"
    return f"stream-{hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()}"


def part_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.safetensors"


@dataclass(frozen=True)
class StoredStream:
    """The windows of one stream.

    Attributes:
        folder, name: where its parts are.
        facts: content of its JSON file.
        dtype: dtype of the tokens.
    """

    folder: Path
    name: str
    facts: dict
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.facts["times"])

    @property
    def broken(self) -> int:
        """Number of frames that could not be decoded."""
        return self.facts["broken"]

    def batches(self, size: int) -> Iterator[tuple[list[tuple[float, float]], torch.Tensor]]:
        """Yield up to `size` windows: seconds of first and last frame, visual tokens `(B, N, Dx)`.

        A batch does not span two parts.
        """
        times = [tuple(each) for each in self.facts["times"]]
        before = 0
        for number, count in enumerate(self.facts["parts"]):
            with safe_open(part_path(self.folder, self.name, number), "pt") as file:
                for start in range(0, count, size):
                    chosen = slice(start, min(start + size, count))
                    tokens = file.get_slice("features")[chosen]
                    if self.facts["dtype"] == "int8":
                        tokens = from_int8(tokens, file.get_slice("scales")[chosen])
                    yield times[before:][chosen], tokens.to(self.dtype, copy=True)
            before += count


@dataclass(frozen=True)
class StreamStore:
    """Visual tokens of streams, by video and settings of the windows.

    Attributes:
        folder: folder of the store.
        made_with: the facts, other than the video, that the tokens depend on.
        dtype: dtype of the tokens that are returned.
    """

    folder: Path
    made_with: dict
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: PreTrainedModel,
        video_processor: VLJEPAVideoProcessor,
        *,
        num_frames: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "StreamStore":
        """Open the store in `folder` for this model.

        Args:
            num_frames: frames per window. Default: the video processor's.
            dtype: dtype of the returned tokens.
        Raises:
            FeatureError: it holds no stream.
        """
        folder = Path(folder)
        if not any(folder.glob("stream-*.json")):
            raise FeatureError(f"{folder}: there is no stored stream. {stream_cure(folder)}")
        facts = made_with(model, video_processor, num_frames or video_processor.num_frames)
        return cls(folder, facts, dtype)

    def precision(self) -> dict:
        """Return the dtypes in which streams are stored, and the relative error that they cause."""
        stored = [read_facts(path) for path in sorted(self.folder.glob("stream-*.json"))]
        errors = [facts["relative_error"] for facts in stored if facts["times"]]
        dtypes = sorted({facts["dtype"] for facts in stored})
        return {
            "dtype": ", ".join(dtypes),
            "relative_error": {
                "mean": sum(each["mean"] for each in errors) / max(len(errors), 1),
                "max": max((each["max"] for each in errors), default=0.0),
            },
        }

    def stream(self, video: str, *, stride: int, fps: float | None) -> StoredStream:
        """Return the windows of a video.

        Raises:
            FeatureError: they are not in the store, or were made with another model.
            MediaError: the video could not be read when the store was written.
        """
        window = self.made_with["num_frames"]
        name = stream_name(video, window=window, stride=stride, fps=fps)
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise FeatureError(
                f"{self.folder}: {video} is not in it, or has changed: windows of {window} frames, "
                f"stride {stride}, {fps or 'all'} frames per second. {stream_cure(self.folder)}"
            )
        facts = read_facts(path)
        if found := differences(facts["made_with"], self.made_with):
            raise FeatureError(
                f"{self.folder}: its streams are not those of this model and processor: "
                f"{'; '.join(found)}. {stream_cure(self.folder)}"
            )
        if facts["error"]:
            raise MediaError(f"{name_of(video)}: {facts['error']}")
        return StoredStream(self.folder, name, facts, self.dtype)


def stream_cure(folder: Path) -> str:
    """Return the last sentence of an error: how to store streams."""
    return f"{cure(folder)} --streams BENCHMARK"


__all__ = ["StoredStream", "StreamStore", "part_path", "stream_name"]
