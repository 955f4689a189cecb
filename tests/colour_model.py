"""A model whose embeddings are given by hand, so that its scores can be computed by hand."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from processing import VLJEPAProcessor
from tests.tiny import tiny_config

COLOURS = {
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def colour_bytes(colour: str) -> dict:
    """Return a PNG image of one colour, as `datasets` stores it."""
    content = io.BytesIO()
    Image.new("RGB", (40, 40), COLOURS[colour]).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def write_colour(path: Path, colour: str) -> Path:
    """Write an image of one colour, in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), COLOURS[colour]).save(path)
    return path


class HandModel:
    """A model with a table of texts and one of answers.

    Args:
        processor: the processor whose tokens it decodes.
        texts: a vector of each target text; it is normalised.
        answers: by colour of the image and query, a target text or a vector.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self,
        processor: VLJEPAProcessor,
        texts: dict[str, list[float]],
        answers: dict[tuple[str, str], str | list[float]] | None = None,
    ):
        self.processor, self.base_model, self.config = processor, self, tiny_config()
        # In evaluation mode, so that texts are cached.
        self.y_encoder = self.y_head = torch.nn.Identity().eval()
        self.texts, self.answers = texts, answers or {}
        self.encoded: list[str] = []  # texts that the Y-Encoder was asked for

    def eval(self) -> None: ...

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        return (pixel_values_videos.mean(dim=(1, 3, 4)) * STD + MEAN)[:, None]  # (B, 1, 3)

    def predict(
        self, visual_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        queries = self.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        palette = torch.tensor([*COLOURS.values()]) / 255  # (8, 3)
        nearest = torch.cdist(visual_embeds[:, 0], palette).argmin(dim=1)
        names = [[*COLOURS][index] for index in nearest.tolist()]
        found = [self.answers[key] for key in zip(names, queries, strict=True)]
        return self.vectors([self.texts[each] if isinstance(each, str) else each for each in found])

    def encode_target(
        self, target_input_ids: torch.Tensor, target_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        tokenizer = self.processor.target_tokenizer
        texts = tokenizer.batch_decode(target_input_ids, skip_special_tokens=True)
        self.encoded += texts
        return self.vectors([self.texts[text] for text in texts])

    @staticmethod
    def vectors(rows: list[list[float]]) -> torch.Tensor:
        return F.normalize(torch.tensor(rows), dim=-1)
