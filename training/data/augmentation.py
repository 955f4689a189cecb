"""Random changes of a clip's frames, the same for all of them.

Shapes: T frames, h and w pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from training.arguments import AugmentArguments


def shifted(frames: torch.Tensor, share: float, generator: np.random.Generator) -> torch.Tensor:
    """Shift frames `(T, 3, h, w)` by whole pixels, up to a share of their size to each side."""
    height, width = frames.shape[-2:]
    down, right = int(height * share), int(width * share)
    padded = F.pad(frames.float(), (right, right, down, down), mode="replicate")
    top, left = generator.integers((2 * down + 1, 2 * right + 1)).tolist()
    return padded[..., top : top + height, left : left + width]


def turned(
    frames: torch.Tensor, settings: AugmentArguments, generator: np.random.Generator
) -> torch.Tensor:
    """Scale, rotate and shift frames `(T, 3, h, w)` in one bilinear interpolation."""
    height, width = frames.shape[-2:]
    least, greatest = settings.scale
    scale = generator.uniform(least, greatest)
    angle = math.radians(generator.uniform(-settings.rotation, settings.rotation))
    x, y = generator.uniform(-settings.shift, settings.shift, 2).tolist()
    # From the output to the input, whose coordinates run from -1 to 1 in height and width: without
    # the ratios, a frame that is not square would be sheared.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    rows = [[cos, -sin * height / width, 2 * x], [sin * width / height, cos, 2 * y]]
    grid = F.affine_grid(torch.tensor([rows]), [1, 3, height, width], align_corners=False)
    # As one image of 3 T channels: all frames move alike.
    moved = F.grid_sample(
        frames.float().flatten(0, 1)[None], grid, padding_mode="border", align_corners=False
    )
    return moved[0].unflatten(0, (-1, 3))


def recoloured(frames: torch.Tensor, share: float, generator: np.random.Generator) -> torch.Tensor:
    """Change colours of frames `(T, 3, h, w)` in 0 ... 255, by up to a share of each.

    Saturation, contrast, brightness, and by half of the share, the balance of red, green and blue.
    """
    saturation, contrast, brightness = generator.uniform(1 - share, 1 + share, 3).tolist()
    balance = generator.uniform(1 - share / 2, 1 + share / 2, 3)
    grey = frames.mean(dim=1, keepdim=True)  # (T, 1, h, w)
    mean = grey.mean()
    # Each is a straight line through a fixed point, so they combine to one.
    gain = torch.tensor(balance * brightness, dtype=torch.float32).view(3, 1, 1)
    own = frames * (contrast * saturation) + grey * (contrast * (1 - saturation))
    return (own + mean * (1 - contrast)) * gain


def augment(
    frames: torch.Tensor, seed: tuple[int, ...], settings: AugmentArguments
) -> torch.Tensor:
    """Return frames `(T, 3, h, w)`, uint8, changed at random and all alike.

    Uncovered pixels repeat the edge.

    Args:
        seed: equal seeds give equal changes.
    """
    generator, changed = np.random.default_rng(seed), frames
    if settings.mirror and generator.random() < 0.5:
        changed = changed.flip(-1)
    if settings.turns:
        changed = turned(changed, settings, generator)
    elif settings.shift:
        changed = shifted(changed, settings.shift, generator)
    if settings.colour:
        changed = recoloured(changed.float(), settings.colour, generator).clamp(0, 255)
    return changed if changed is frames else changed.round().to(frames.dtype)


__all__ = ["augment"]
