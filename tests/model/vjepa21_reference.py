"""V-JEPA 2.1's encoder a second time, from the published description, without the product's code.

It computes with weights under the names of the published files (`blocks.0.attn.qkv.weight`), and
rotates pairs of channels as complex numbers.
"""

import math

import torch
from torch.nn.functional import conv3d, gelu, layer_norm, linear

Weights = dict[str, torch.Tensor]

# The differences to V-JEPA 2, which a test can leave out one by one.
DIFFERENCES = ("rotation", "scaling", "stem", "modality", "norm")
LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


def random_weights(width: int, depth: int, mlp: int, *, norms: int = 4, seed: int = 0) -> Weights:
    """Return weights in the names and shapes of a published file, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = {
        "patch_embed.proj.weight": random(width, 3, 2, 16, 16) / 40,
        "patch_embed.proj.bias": random(width) / 10,
        "patch_embed_img.proj.weight": random(width, 3, 1, 16, 16) / 28,
        "patch_embed_img.proj.bias": random(width) / 10,
        "img_mod_embed": random(1, 1, width),
        "video_mod_embed": random(1, 1, width),
    }
    layers = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
    }
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            weights[f"blocks.{i}.{norm}.weight"] = 1 + random(width) / 10
            weights[f"blocks.{i}.{norm}.bias"] = random(width) / 10
        for name, shape in layers.items():
            weights[f"blocks.{i}.{name}.weight"] = random(*shape) * 1.5 / math.sqrt(shape[1])
            weights[f"blocks.{i}.{name}.bias"] = random(shape[0]) / 10
    for i in range(norms):
        weights[f"norms_block.{i}.weight"] = 1 + random(width) / 10
        weights[f"norms_block.{i}.bias"] = random(width) / 10
    return weights


def turn(states: torch.Tensor, places: list[float], *, repaired: bool) -> torch.Tensor:
    """Rotate pairs of the last axis of `(..., N, c)`: pair k by place / 10000^(k / pairs).

    Each of the N tokens has a place.
    """
    pairs = states.shape[-1] // 2
    angles = torch.tensor([[x / 10000 ** (k / pairs) for k in range(pairs)] for x in places])
    if repaired:
        complex_states = torch.view_as_complex(states.unflatten(-1, (pairs, 2)).contiguous())
        turned = complex_states * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)
    # V-JEPA 2: channel i has the angle of pair i modulo the number of pairs.
    out = torch.empty_like(states)
    for i in range(2 * pairs):
        other = -states[..., i + 1] if i % 2 == 0 else states[..., i - 1]
        angle = angles[:, i % pairs]
        out[..., i] = states[..., i] * angle.cos() + other * angle.sin()
    return out


def rotate_all(
    states: torch.Tensor, grid: tuple[int, int, int], without: frozenset[str]
) -> torch.Tensor:
    """Rotate `(B, A, N, d)`: a third of the channels for each of time, row and column."""
    part = states.shape[-1] // 3 // 2 * 2
    if not part:
        return states
    times, rows, columns = [], [], []
    for time in range(grid[0]):
        for row in range(grid[1]):
            for column in range(grid[2]):
                times.append(float(time))
                rows.append(float(row))
                columns.append(float(column))
    if "scaling" not in without:  # to the range of 16 rows and columns
        rows = [row * 15 / (grid[1] - 1) if row else 0.0 for row in rows]
        columns = [column * 15 / (grid[2] - 1) if column else 0.0 for column in columns]
    *turning, rest = states.split([part, part, part, states.shape[-1] - 3 * part], dim=-1)
    turned = [
        turn(channels, places, repaired="rotation" not in without)
        for channels, places in zip(turning, (times, rows, columns), strict=True)
    ]
    return torch.cat([*turned, rest], dim=-1)


def encode(
    weights: Weights,
    video: torch.Tensor,
    heads: int,
    *,
    hierarchical: bool = False,
    without: frozenset[str] = frozenset(),
) -> torch.Tensor:
    """Encode `(B, T, C, H, W)` to `(B, N, D)`, or to the four levels side by side.

    `without` names differences to V-JEPA 2 that are left out.
    """
    pixels = video.transpose(1, 2)
    is_image = pixels.shape[2] == 1
    stem = "patch_embed_img.proj" if is_image else "patch_embed.proj"
    if is_image and "stem" in without:
        stem, pixels = "patch_embed.proj", torch.cat([pixels, pixels], dim=2)
    kernel = weights[f"{stem}.weight"]
    patches = conv3d(pixels, kernel, weights[f"{stem}.bias"], stride=kernel.shape[2:])
    grid = patches.shape[2:]
    states = patches.flatten(2).transpose(1, 2)
    if "modality" not in without:
        states = states + weights["img_mod_embed" if is_image else "video_mod_embed"]

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        shape = states.shape[-1:]
        return layer_norm(states, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def dense(name: str, states: torch.Tensor) -> torch.Tensor:
        return linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    levels = []
    for i in range(depth):
        fused = dense(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", states))
        query, key, value = (
            each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in fused.chunk(3, dim=-1)
        )
        query, key = (rotate_all(each, grid, without) for each in (query, key))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        states = states + dense(f"blocks.{i}.attn.proj", mixed)
        inner = gelu(dense(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", states)))
        states = states + dense(f"blocks.{i}.mlp.fc2", inner)
        if hierarchical and i in LEVELS[depth]:
            levels.append(norm(f"norms_block.{len(levels)}", states))
    if hierarchical:
        return torch.cat(levels, dim=-1)
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("norms_block."))
    # Without the difference: the first of the norms, as a stock encoder has only one.
    return norm(f"norms_block.{0 if 'norm' in without else last}", states)
