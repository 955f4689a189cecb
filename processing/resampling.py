"""Resizing of a frame of which only a crop is needed, computed from the source pixels of the crop.

A frame that is far longer than wide, such as 65,000 x 1 pixels, becomes gigabytes when its short
edge is enlarged, and the crop then discards nearly all of them.

Shapes: H and W pixels of the source, h and w after the crop.
"""

import math

import torch


def resized_size(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """Return height and width with this shortest edge; the long edge is rounded down."""
    if height <= width:
        return shortest_edge, int(shortest_edge * width / height)
    return int(shortest_edge * height / width), shortest_edge


def crop_of_resized(
    frame: torch.Tensor,
    new: tuple[int, int],
    top_left: tuple[int, int],
    crop: tuple[int, int],
    mode: str,
) -> torch.Tensor:
    """Return a crop of the resized frame, (..., H, W) uint8 -> (..., h, w) uint8.

    The result is that of `F.interpolate(..., size=new, antialias=True)` and a crop, up to one grey
    level.

    Args:
        new: height and width of the whole frame after resizing.
        top_left: row and column where the crop begins in the resized frame.
        crop: h and w.
        mode: "bilinear" or "bicubic".
    """
    top, down = filter_weights(frame.shape[-2], new[0], top_left[0], crop[0], mode)
    left, across = filter_weights(frame.shape[-1], new[1], top_left[1], crop[1], mode)
    window = frame[..., top : top + down.shape[1], left : left + across.shape[1]]
    # torch's uint8 kernel rounds after each of the two directions too.
    window = rounded(window.double() @ across.T)  # (..., window rows, w)
    return rounded(down @ window).to(torch.uint8)


def rounded(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels + 0.5).floor_().clamp_(0, 255)


def filter_weights(
    size: int, new_size: int, first: int, count: int, mode: str
) -> tuple[int, torch.Tensor]:
    """Return the weights of source pixels for `count` resized pixels in one direction.

    Args:
        size, new_size: source pixels and resized pixels in this direction.
        first: index of the first of the `count` resized pixels.

    Returns: index of the first source pixel with a weight, and the weights, float64
        `(count, n)`, which sum to one over the n source pixels.
    """
    scale = size / new_size
    # Enlarging interpolates between neighbours; shrinking widens the filter against aliasing.
    stretch = max(scale, 1.0)
    reach = stretch * (2 if mode == "bicubic" else 1)
    centres = scale * (torch.arange(first, first + count, dtype=torch.float64) + 0.5)
    start = max(int(centres[0].item() - reach), 0)
    end = min(int(centres[-1].item() + reach) + 1, size)
    pixels = torch.arange(start, end, dtype=torch.float64) + 0.5
    distance = (pixels - centres[:, None]).abs() / stretch
    if mode == "bicubic":  # Keys' kernel with a = -0.5, as torch's antialiased one
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = near.where(distance <= 1, far.where(distance < 2, 0.0))
    else:
        weights = (1 - distance).clamp_(min=0)
    weights /= weights.sum(dim=1, keepdim=True)
    # torch's uint8 kernel has 16-bit weights: the largest, times a power of two, is below 2**15.
    # Exact weights would differ from it by two grey levels in a few pixels.
    largest = 1.0 if scale <= 1 else weights.max().item()
    unit = 2.0 ** min(math.ceil(math.log2((2**15 - 0.5) / largest)) - 1, 22)
    return start, (weights * unit).round_() / unit


__all__ = ["crop_of_resized", "resized_size"]
