"""Pictures from SVG drawings, and altered views of them that stay true to their texts.

A view is scaled, turned and recoloured at random. Its colours stay if a text names a colour or a
flag. It is not turned if a text names a direction or a time, because the hands of a clock would
show another one.
"""

import io
import random
import re

import resvg_py
from PIL import Image, ImageEnhance

COLORS = """
    amber beige black blonde blue bronze brown color colored colour coloured cyan dark flag gold
    golden gray green grey indigo light magenta maroon orange pink purple rainbow red silver teal
    turquoise violet white yellow
"""
DIRECTIONS = """
    anticlockwise arrow back backhand backward backwards bottom clock clockwise counterclockwise
    curving diagonal down downward downwards downwind east facing forward front horizontal
    inverted left leftward leftwards lower north o'clock reverse right rightward rightwards rotated
    side sideways slanted south thirty tilted time top turn turned up upper upright upside upward
    upwards vertical west
"""
SCALES = (0.6, 1.0)
DEGREES = 20
HUE = 10  # of 256, to either side
FACTORS = (0.7, 1.3)  # of saturation, contrast and brightness


def mentions(text: str, words: str) -> bool:
    """Return whether a text contains one of the words."""
    return bool(set(re.findall(r"[a-z']+", text.lower())) & set(words.split()))


def paint(svg: str, size: int) -> Image.Image:
    """Return a square picture of `size` pixels with transparency."""
    # Fonts differ between machines, and the sets draw their letters.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def moved(svg: str, rng: random.Random, turn: bool) -> str:
    """Return a drawing that is smaller, at another position, and turned."""
    head, rest = svg.split(">", 1)
    left, top, side, _ = map(float, re.search(r'viewBox="([^"]*)"', head)[1].split())
    scale = rng.uniform(*SCALES)
    room = side * (1 - scale) / 2
    angle = rng.uniform(-DEGREES, DEGREES) if turn else 0.0
    x = left + side / 2 + rng.uniform(-room, room)
    y = top + side / 2 + rng.uniform(-room, room)
    # SVG applies the last of them first.
    steps = (
        f"translate({x:.3f} {y:.3f}) rotate({angle:.2f}) scale({scale:.3f}) "
        f"translate({-left - side / 2} {-top - side / 2})"
    )
    body = rest.removesuffix("</svg>")
    return f'{head}><g transform="{steps}">{body}</g></svg>'


def recolored(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Return a picture of other hue, saturation, contrast and brightness, equally transparent."""
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    shift = rng.randint(-HUE, HUE)
    hue = hue.point(lambda each: (each + shift) % 256)
    color = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    for enhance in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness):
        color = enhance(color).enhance(rng.uniform(*FACTORS))
    color.putalpha(picture.getchannel("A"))
    return color


def picture_of(svg: str, size: int) -> Image.Image:
    """Return a drawing as a picture `size` x `size` on white."""
    return on_white(paint(svg, size))


def view_of(svg: str, text: str, size: int, seed: str) -> Image.Image:
    """Return an altered view of a drawing.

    Args:
        text: all texts about it.
        seed: equal seeds give equal views.
    """
    rng = random.Random(seed)
    picture = paint(moved(svg, rng, turn=not mentions(text, DIRECTIONS)), size)
    if not mentions(text, COLORS):
        picture = recolored(picture, rng)
    return on_white(picture)


__all__ = ["picture_of", "view_of"]
