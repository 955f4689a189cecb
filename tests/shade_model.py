"""A model whose embeddings are given by hand, and clips that it tells apart by their brightness.

Scores of the paper's benchmarks can then be computed by hand.
"""

import io
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from eval.benchmarks import load_benchmarks
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import TASKS
from processing import VLJEPAProcessor
from tests.tiny import tiny_config, tiny_processor, write_clip

PAPER = Path(__file__).parents[1] / "eval/paper"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
DARKEST, STEP = 20, 24  # grey levels: ten clips differ by more than a codec changes them
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}


def write_media(path: Path, *clips: int) -> Path:
    """Write an image of a clip's brightness, or a video with 0.4 seconds of each clip.

    The content of a video is MP4, whatever the suffix: videos are read by their content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "video" if path.suffix.lower() in VIDEO_SUFFIXES else path.suffix.lower()
    path.write_bytes(media_bytes(kind, *clips))
    return path


@cache
def media_bytes(kind: str, *clips: int) -> bytes:
    """Return the content of a file: `kind` is "video", or the suffix of an image."""
    frames = np.full((4 * len(clips), 32, 32, 3), DARKEST, np.uint8)
    for part, clip in enumerate(clips):
        frames[4 * part : 4 * part + 4] += STEP * clip
    if kind == "video":
        with TemporaryDirectory() as folder:
            return write_clip(Path(folder) / "clip.mp4", frames).read_bytes()
    content = io.BytesIO()
    Image.fromarray(frames[0]).save(content, "PNG" if kind == ".png" else "JPEG")
    return content.getvalue()


class ShadeModel:
    """A model with given embeddings.

    Args:
        clips: embedding of each clip, by its number in [`write_media`]; normalised here.
        texts: embedding of each text; normalised here. A text that contains one of these, such as
            a label in its template, has the embedding of the longest one in it.
    """

    device, dtype = torch.device("cpu"), torch.float32
    y_encoder = y_head = torch.nn.Identity()  # in training mode, so no text is cached

    def __init__(self, clips: Sequence[Sequence[float]], texts: dict[str, Sequence[float]]):
        self.processor: VLJEPAProcessor = tiny_processor(num_frames=2)
        self.base_model, self.config = self, tiny_config()
        self.clips = torch.tensor(clips, dtype=torch.float32)
        width = self.clips.shape[1]
        self.texts = {  # padded to the clips' width
            _letters(text): torch.tensor([*found, *[0.0] * (width - len(found))], dtype=torch.float)
            for text, found in texts.items()
        }
        self.asked: list[str] = []

    def eval(self) -> None: ...

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Return the number of each clip as its one visual token: `(B, 1, 1)`."""
        grey = pixel_values_videos.mean(dim=(1, 3, 4)) * STD + MEAN  # (B, 3)
        return ((255 * grey.mean(dim=1) - DARKEST) / STEP)[:, None, None]

    def predict(
        self, visual_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        self.asked += self.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        numbers = visual_embeds[:, 0, 0]
        assert (numbers - numbers.round()).abs().max() < 0.2, f"mixed clips: {numbers.tolist()}"
        return F.normalize(self.clips[numbers.round().long()], dim=-1)

    def encode_target(
        self, target_input_ids: torch.Tensor, target_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        tokenizer = self.processor.target_tokenizer
        texts = tokenizer.batch_decode(target_input_ids, skip_special_tokens=True)
        return F.normalize(torch.stack([self.embed(text) for text in texts]), dim=-1)

    def embed(self, text: str) -> torch.Tensor:
        known = [each for each in self.texts if each in _letters(text)]
        assert known, f"no embedding is given for {text!r}"
        return self.texts[max(known, key=len)]


def _letters(text: str) -> str:
    """Return a text without its spaces, which a tokenizer may change."""
    return re.sub(r"\s", "", text)


def measure(
    group: str,
    name: str,
    data: Path,
    clips: Sequence[Sequence[float]],
    texts: dict[str, Sequence[float]],
) -> tuple[TaskResult, ShadeModel]:
    """Measure an entry of eval/paper/GROUP.yaml on the files in `data`."""
    [benchmark] = load_benchmarks(PAPER / f"{group}.yaml", [name], data)
    model = ShadeModel(clips, texts)
    result = TASKS[benchmark.task].evaluate(Task(model, model.processor, benchmark))
    return result, model
