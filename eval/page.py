"""HTML pages in one file, with their pictures inside."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from PIL import Image

FRAME_HEIGHT = 96  # pixels


def render(template: Path, filters: dict[str, Callable], **values: object) -> str:
    """Fill a template, which can include `page_style.css`; all texts are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)


def strip(frames: np.ndarray) -> str:
    """Return frames `(T, H, W, 3)`, uint8, side by side in one picture, as a data URI."""
    image = Image.fromarray(np.concatenate(list(frames), axis=1))
    image = image.resize((round(image.width * FRAME_HEIGHT / image.height), FRAME_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data_uri("image/jpeg", buffer)


def png(figure: Figure) -> str:
    """Return a figure as a data URI, with equal bytes for equal figures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return _data_uri("image/png", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


__all__ = ["png", "render", "strip"]
