"""Charts: a domain that no member of the tiny family was trained on, kept for fine-tuning.

Bars, lines and pies on light paper, with questions about what is largest or smallest, how many
there are, and where a line goes. Heights, colours and places are drawn anew for every picture;
train and test draw from different seeds.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .digits import COLOURS

SIZE = 112  # pixels, square
SCALE = 3  # drawn larger and shrunk, so that edges are smooth
INKS = {name: colour for name, colour in COLOURS.items() if name != "white"}
LINES = {
    "it rises": (0.1, 0.9),
    "it falls": (0.9, 0.1),
    "it rises, then falls": (0.15, 0.9, 0.15),
    "it falls, then rises": (0.85, 0.1, 0.85),
}
STEP = 0.16  # of the paper: two bars differ by so much at least


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws a chart of bars, a line or a pie.

    Args:
        rng: source of all randomness.
        split: is not used: no material is shared.
        held_back: is not used: nothing of charts is known before.

    Returns:
        A 112x112 RGB picture and its turns, a list of (question, answer, kind).
    """
    paper = tuple(int(value) for value in rng.uniform(225, 255, 3))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), paper)
    part = (_bars, _line, _pie)[rng.integers(3)]
    turns = part(ImageDraw.Draw(image), rng)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), turns


def _spread(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """Numbers in random order that differ by STEP at least."""
    free = high - low - STEP * (count - 1)
    values = low + STEP * np.arange(count) + np.sort(rng.uniform(0, free, count))
    return rng.permutation(values)


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(INKS))[:count]]


def _box(*corners: float) -> list[float]:
    """Shares of the paper as pixels."""
    return [corner * SIZE * SCALE for corner in corners]


def _bars(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    count = int(rng.integers(2, 5))
    heights, names = _spread(rng, count, 0.15, 0.85), _colours(rng, count)
    width = 0.84 / count
    for place, (height, name) in enumerate(zip(heights, names, strict=True)):
        left = 0.08 + place * width
        pen.rectangle(_box(left + 0.02, 0.94 - height, left + width - 0.02, 0.94), INKS[name])
    pen.line(_box(0.06, 0.94, 0.94, 0.94), (40, 40, 40), 2 * SCALE)
    turns = [
        ("Which bar is the tallest?", names[int(heights.argmax())], "tallest"),
        ("Which bar is the shortest?", names[int(heights.argmin())], "shortest"),
        ("How many bars are there?", str(count), "bars"),
    ]
    return [turns[i] for i in rng.permutation(3)[:2]]


def _line(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    name = list(LINES)[rng.integers(len(LINES))]
    knots = np.asarray(LINES[name]) + rng.uniform(-0.08, 0.08, len(LINES[name]))
    middle = [0.0, float(rng.uniform(0.35, 0.65)), 1.0] if len(knots) == 3 else [0.0, 1.0]
    across = np.linspace(0, 1, 24)
    up = np.interp(across, middle, knots) + rng.normal(0, 0.015, 24)
    (colour,) = _colours(rng, 1)
    points = [(0.08 + 0.84 * x, 0.94 - 0.84 * y) for x, y in zip(across, up, strict=True)]
    pen.line(_box(0.06, 0.04, 0.06, 0.94), (40, 40, 40), SCALE)
    pen.line(_box(0.06, 0.94, 0.94, 0.94), (40, 40, 40), SCALE)
    pen.line([tuple(_box(*point)) for point in points], INKS[colour], 4 * SCALE, joint="curve")
    return [("How does the line go?", name, "line")]


def _pie(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    count = int(rng.integers(2, 5))
    shares, names = _spread(rng, count, 0.2, 1.0), _colours(rng, count)
    edges = rng.uniform(0, 360) + 360 * np.concatenate([[0], np.cumsum(shares / shares.sum())])
    for begin, end, name in zip(edges[:-1], edges[1:], names, strict=True):
        pen.pieslice(_box(0.1, 0.1, 0.9, 0.9), float(begin), float(end), INKS[name])
    turns = [
        ("Which slice is the largest?", names[int(shares.argmax())], "slice"),
        ("How many slices are there?", str(count), "slices"),
    ]
    return [turns[i] for i in rng.permutation(2)[:2]]
