"""Perception Encoder a second time, from the published description, without the product's code.

It computes with weights under the names of the published files, such as
`transformer.resblocks.0.attn.in_proj_weight`. Pairs of channels are rotated as complex numbers,
positions are interpolated point by point, and heads attend one by one.
"""

import math

import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear

Weights = dict[str, torch.Tensor]

# Parts of the image tower that a test can leave out one by one. "axes" exchanges row and column,
# "offset" counts them from 0, "norm", "pre-norm" and "scales" leave a norm or the scales out.
VISION_PARTS = (
    "rotation",
    "pairs",
    "axes",
    "offset",
    "positions",
    "interpolation",
    "class position",
    "pre-norm",
    "norm",
    "scales",
    "gelu",
)
POOLING_PARTS = ("pooling", "pooling mlp", "projection")
TEXT_PARTS = ("causal", "positions", "norm", "gelu", "projection", "last token")


class Random:
    """Random tensors, large enough for each part to change the features."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def norm(self, name: str, width: int) -> Weights:
        return {f"{name}.weight": 1 + self(width) / 5, f"{name}.bias": self(width) / 5}

    def linear(self, name: str, outputs: int, inputs: int) -> Weights:
        weight = self(outputs, inputs) / math.sqrt(inputs)
        return {f"{name}.weight": weight, f"{name}.bias": self(outputs) / 10}

    def attention(self, name: str, width: int) -> Weights:
        fused = self.linear("fused", 3 * width, width)
        return {
            f"{name}.in_proj_weight": fused["fused.weight"],
            f"{name}.in_proj_bias": fused["fused.bias"],
            **self.linear(f"{name}.out_proj", width, width),
        }

    def layers(self, width: int, depth: int, mlp: int, *, scales: bool) -> Weights:
        weights = {}
        for i in range(depth):
            name = f"transformer.resblocks.{i}"
            weights |= self.norm(f"{name}.ln_1", width) | self.norm(f"{name}.ln_2", width)
            weights |= self.attention(f"{name}.attn", width)
            weights |= self.linear(f"{name}.mlp.c_fc", mlp, width)
            weights |= self.linear(f"{name}.mlp.c_proj", width, mlp)
            if scales:
                weights[f"{name}.ls_1.gamma"] = self(width)
                weights[f"{name}.ls_2.gamma"] = self(width)
        return weights


def random_vision(
    width: int,
    depth: int,
    mlp: int,
    *,
    patch: int = 14,
    side: int = 3,
    class_token: bool = True,
    scales: bool = False,
    final_norm: bool = True,
    pooled: int | None = 24,
    seed: int = 0,
) -> Weights:
    """Return an image tower in the names and shapes of a published file.

    Args:
        side: edge of the grid of the table of positions.
        pooled: width of the pooled feature; `None` for a tower without pooling.
    """
    random = Random(seed)
    weights = {"conv1.weight": random(width, 3, patch, patch) / patch}
    if class_token:
        weights["class_embedding"] = random(width)
    weights["positional_embedding"] = random(class_token + side**2, width)
    weights |= random.norm("ln_pre", width)
    weights |= random.layers(width, depth, mlp, scales=scales)
    if final_norm:
        weights |= random.norm("ln_post", width)
    if pooled is not None:
        weights["attn_pool.probe"] = random(1, 1, width)
        weights |= random.attention("attn_pool.attn", width)
        weights |= random.norm("attn_pool.layernorm", width)
        weights |= random.linear("attn_pool.mlp.c_fc", 4 * width, width)
        weights |= random.linear("attn_pool.mlp.c_proj", width, 4 * width)
        weights["proj"] = random(width, pooled) / math.sqrt(width)
    return weights


def random_text(
    width: int, depth: int, *, context: int, vocabulary: int, output: int, seed: int = 1
) -> Weights:
    """Return a text tower in the names and shapes of a published file."""
    random = Random(seed)
    return {
        "token_embedding.weight": random(vocabulary, width),
        "positional_embedding": random(context, width),
        **random.layers(width, depth, 4 * width, scales=False),
        **random.norm("ln_final", width),
        "text_projection": random(width, output) / math.sqrt(width),
    }


# -- parts that both towers have -----------------------------------------------------------


def norm(weights: Weights, name: str, states: torch.Tensor) -> torch.Tensor:
    shape = states.shape[-1:]
    return layer_norm(states, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def mlp(weights: Weights, name: str, states: torch.Tensor, without: frozenset) -> torch.Tensor:
    inner = linear(states, weights[f"{name}.c_fc.weight"], weights[f"{name}.c_fc.bias"])
    inner = inner * (1.702 * inner).sigmoid() if "gelu" in without else gelu(inner)
    return linear(inner, weights[f"{name}.c_proj.weight"], weights[f"{name}.c_proj.bias"])


def attend(
    weights: Weights,
    name: str,
    queries: torch.Tensor,
    states: torch.Tensor,
    heads: int,
    *,
    turns: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attend from `(B, L, D)` to `(B, N, D)`, head by head.

    Args:
        turns: complex `(N, d / 2)`, a factor for each pair of channels of a head.
    """
    weight, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    width = states.shape[-1]
    projected = []
    for part, source in enumerate((queries, states, states)):
        rows = slice(part * width, (part + 1) * width)
        projected.append(linear(source, weight[rows], bias[rows]))
    mixed = []
    for query, key, value in zip(*(each.chunk(heads, dim=-1) for each in projected), strict=True):
        if turns is not None:
            query, key = (
                torch.view_as_real(
                    torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) * turns
                ).flatten(-2)
                for each in (query, key)
            )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if causal:
            for row in range(scores.shape[-2]):
                scores[..., row, row + 1 :] = float("-inf")
        mixed.append(scores.softmax(dim=-1) @ value)
    out = f"{name}.out_proj"
    return linear(torch.cat(mixed, dim=-1), weights[f"{out}.weight"], weights[f"{out}.bias"])


def run_layers(
    weights: Weights,
    states: torch.Tensor,
    heads: int,
    without: frozenset,
    *,
    turns: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    depth = 1 + max(int(name.split(".")[2]) for name in weights if ".resblocks." in name)
    for i in range(depth):
        name = f"transformer.resblocks.{i}"
        first = second = torch.ones(())
        if f"{name}.ls_1.gamma" in weights and "scales" not in without:
            first, second = weights[f"{name}.ls_1.gamma"], weights[f"{name}.ls_2.gamma"]
        normed = norm(weights, f"{name}.ln_1", states)
        states = states + first * attend(
            weights, f"{name}.attn", normed, normed, heads, turns=turns, causal=causal
        )
        normed = norm(weights, f"{name}.ln_2", states)
        states = states + second * mlp(weights, f"{name}.mlp", normed, without)
    return states


# -- the image tower -----------------------------------------------------------------------


def turns_of(
    height: int, width: int, size: int, class_token: bool, without: frozenset
) -> torch.Tensor:
    """Return the factor of each token's pairs of channels, complex `(N, size / 2)`.

    The first half of the pairs turns with the column, the second with the row: pair k of n by
    position / 10000^(k / n). With a class token, positions begin at 1, and it is not turned.
    """
    pairs = size // 4
    first = 1 if class_token and "offset" not in without else 0
    angles = [[0.0] * 2 * pairs] if class_token else []
    for row in range(height):
        for column in range(width):
            places = (column + first, row + first)
            if "axes" in without:
                places = places[::-1]
            angles.append([x / 10000 ** (k / pairs) for x in places for k in range(pairs)])
    angles = torch.tensor(angles)
    return torch.polar(torch.ones_like(angles), angles)


def interpolate(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate `(side, side, D)` to `(height, width, D)`: bilinear between the centres of cells.

    Points outside of the outer centres have the value of the nearest one.
    """
    side = len(table)

    def near(index: int, count: int) -> tuple[int, int, float]:
        place = min(max((index + 0.5) * side / count - 0.5, 0.0), side - 1.0)
        low = int(place)
        return low, min(low + 1, side - 1), place - low

    rows = []
    for y in range(height):
        top, bottom, down = near(y, height)
        row = []
        for x in range(width):
            left, right, along = near(x, width)
            upper = table[top, left] * (1 - along) + table[top, right] * along
            lower = table[bottom, left] * (1 - along) + table[bottom, right] * along
            row.append(upper * (1 - down) + lower * down)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def encode_images(
    weights: Weights, images: torch.Tensor, heads: int, without: frozenset[str] = frozenset()
) -> torch.Tensor:
    """Encode `(B, C, H, W)` to `(B, N, D)`, the class token first."""
    kernel = weights["conv1.weight"]
    patches = conv2d(images, kernel, stride=kernel.shape[-1])
    height, width = patches.shape[2:]
    table = weights["positional_embedding"]
    class_token = "class_embedding" in weights
    if class_token:
        class_position, table = table[:1], table[1:]
    side = math.isqrt(len(table))
    grid = table.unflatten(0, (side, side))
    if "interpolation" in without:  # the nearest rows and columns of the table
        rows, columns = (torch.arange(n) * side // n for n in (height, width))
        positions = grid[rows][:, columns]
    else:
        positions = interpolate(grid, height, width)
    if "positions" in without:
        positions = torch.zeros_like(positions)
    states = patches.flatten(2).transpose(1, 2) + positions.flatten(0, 1)
    if class_token:
        first = weights["class_embedding"].expand(len(states), 1, -1)
        if "class position" not in without:
            first = first + class_position
        states = torch.cat([first, states], dim=1)
    if "pre-norm" not in without:
        states = norm(weights, "ln_pre", states)
    turns = turns_of(height, width, states.shape[-1] // heads, class_token, without)
    if "rotation" in without:
        turns = torch.ones_like(turns)
    if "pairs" in without:  # the angles in another order: column and row alternate
        turns = turns.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    states = run_layers(weights, states, heads, without, turns=turns)
    if "ln_post.weight" in weights and "norm" not in without:
        states = norm(weights, "ln_post", states)
    return states


def pool_images(
    weights: Weights, states: torch.Tensor, without: frozenset[str] = frozenset(), heads: int = 8
) -> torch.Tensor:
    """Pool the states `(B, N, D)` of an image tower to its feature `(B, output)`."""
    probe = weights["attn_pool.probe"].expand(len(states), -1, -1)
    pooled = attend(weights, "attn_pool.attn", probe, states, heads)
    if "pooling" in without:
        pooled = states.mean(dim=1, keepdim=True)
    if "pooling mlp" not in without:
        normed = norm(weights, "attn_pool.layernorm", pooled)
        pooled = pooled + mlp(weights, "attn_pool.mlp", normed, without)
    projection = weights["proj"]
    if "projection" in without:
        return pooled[:, 0, : projection.shape[1]]
    return pooled[:, 0] @ projection


# -- the text tower ------------------------------------------------------------------------


def encode_texts(
    weights: Weights, ids: torch.Tensor, heads: int, without: frozenset[str] = frozenset()
) -> torch.Tensor:
    """Encode `(B, L)` to features `(B, output)`, at the token with the highest id: the end token.

    Padding is not hidden: it comes after the end token, which sees no later token.
    """
    states = weights["token_embedding.weight"][ids]
    if "positions" not in without:
        states = states + weights["positional_embedding"][: ids.shape[1]]
    states = run_layers(weights, states, heads, without, causal="causal" not in without)
    if "norm" not in without:
        states = norm(weights, "ln_final", states)
    end = ids.argmax(dim=1)
    if "last token" in without:
        end = torch.zeros_like(end)
    pooled = states[torch.arange(len(ids)), end]
    projection = weights["text_projection"]
    return pooled[:, : projection.shape[1]] if "projection" in without else pooled @ projection
