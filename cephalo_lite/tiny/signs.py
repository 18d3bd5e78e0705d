"""Signs: a domain that no member of the tiny family was trained on, kept for fine-tuning.

One large sign on a pale plate, of any colour, size and place and somewhat turned. The questions ask
what it is, for its colour, and how many corners it has.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from .digits import COLOURS

SIZE = 112  # pixels, square
SCALE = 3  # drawn larger and shrunk, so that edges are smooth
INKS = {name: colour for name, colour in COLOURS.items() if name != "white"}
CORNERS = {"circle": 0, "ring": 0, "triangle": 3, "square": 4, "star": 10, "cross": 12}
RING = 0.55  # of a ring's radius is empty


def outline(name: str) -> list[tuple[float, float]]:
    """Corners of a sign around (0, 0), at most 1 from it, y downwards."""
    if name == "cross":
        arm, end = 0.34, 0.94
        quarter = [(arm, -end), (arm, -arm), (end, -arm)]
        return [
            (x * c - y * s, x * s + y * c)
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for x, y in quarter
        ]
    count = CORNERS[name]
    first = -math.pi / 4 if name == "square" else -math.pi / 2
    reach = [1.0, 0.42] if name == "star" else [1.0]
    return [
        (
            reach[i % len(reach)] * math.cos(first + 2 * math.pi * i / count),
            reach[i % len(reach)] * math.sin(first + 2 * math.pi * i / count),
        )
        for i in range(count)
    ]


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws one sign.

    Args:
        rng: source of all randomness.
        split: is not used: no material is shared.
        held_back: is not used: nothing of signs is known before.

    Returns:
        A 112x112 RGB picture and two turns, a list of (question, answer, kind).
    """
    name = list(CORNERS)[rng.integers(len(CORNERS))]
    colour = list(INKS)[rng.integers(len(INKS))]
    plate = tuple(int(value) for value in rng.uniform(220, 255, 3))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), plate)
    radius = rng.uniform(0.26, 0.42)
    x, y = rng.uniform(radius + 0.03, 0.97 - radius, 2)
    _paint(
        ImageDraw.Draw(image), name, (x, y), radius, rng.uniform(-0.15, 0.15), INKS[colour], plate
    )
    image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image) + rng.uniform(1, 5) * rng.standard_normal((SIZE, SIZE, 3))
    turns = [
        ("Which sign is it?", f"a {name}", "sign"),
        ("What colour is the sign?", colour, "ink"),
        ("How many corners are there?", str(CORNERS[name]), "corners"),
    ]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image, [turns[i] for i in rng.permutation(3)[:2]]


def _paint(pen, name, middle, radius, turn, ink, plate) -> None:
    """Paint a sign; middle and radius are shares of the plate, the turn is in radians."""
    (x, y), unit = middle, SIZE * SCALE

    def disc(reach: float, colour) -> None:
        pen.ellipse([unit * v for v in (x - reach, y - reach, x + reach, y + reach)], colour)

    if not CORNERS[name]:
        disc(radius, ink)
        if name == "ring":
            disc(RING * radius, plate)
        return
    cos, sin = math.cos(turn), math.sin(turn)
    corners = [
        (unit * (x + radius * (a * cos - b * sin)), unit * (y + radius * (a * sin + b * cos)))
        for a, b in outline(name)
    ]
    pen.polygon(corners, ink)
