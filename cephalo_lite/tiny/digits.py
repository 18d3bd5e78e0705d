"""Scenes of handwritten digits: real strokes of scikit-learn's `load_digits`, coloured and placed.

One to three different digits stand in different corners in different colours; the questions ask
which digit, where, in what colour, and how many. The digits 7, 8 and 9 are held back.

Source of the strokes: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 112  # pixels, square
HELD_BACK = (7, 8, 9)
COLOURS = {
    "red": (235, 50, 45),
    "green": (60, 205, 75),
    "blue": (70, 125, 255),
    "yellow": (250, 225, 50),
    "purple": (190, 85, 225),
    "white": (248, 248, 248),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {
    "digit": (
        "Which digit is {colour}?",
        "What is the {colour} digit?",
        "Which digit is at the {place}?",
    ),
    "place": ("Where is the {digit}?", "In which corner is the {digit}?"),
    "colour": ("What colour is the {digit}?", "Name the colour of the {digit}."),
    "count": ("How many digits are there?", "Count the digits."),
}


class Placed(NamedTuple):
    """One digit of a scene."""

    digit: int
    stroke: int  # index into `load_digits`
    place: str  # one of PLACES
    colour: str  # one of COLOURS


@cache
def _strokes() -> tuple[np.ndarray, np.ndarray]:
    """All strokes, (1797, 8, 8) float32 in 0-1, and their digits, (1797,) int."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target


@cache
def digit_indices(split: str, digit: int) -> tuple[int, ...]:
    """Which samples of `load_digits` a split may use for a digit: every fourth one is for test."""
    of_digit = np.flatnonzero(_strokes()[1] == digit)
    in_test = np.arange(len(of_digit)) % 4 == 3
    return tuple(int(i) for i in of_digit[in_test == (split == "test")])


def plan(rng: np.random.Generator, split: str, held_back: bool) -> list[Placed]:
    """Chooses one to three different digits, corners and colours; a held-back digit comes first."""
    # A held-back digit never stands alone: its place could be told without knowing the digit.
    count = int(rng.integers(2, 4)) if held_back else int(rng.integers(1, 4))
    known = [d for d in range(10) if d not in HELD_BACK]
    chosen = [int(d) for d in rng.choice(known, count, replace=False)]
    if held_back:
        chosen[0] = int(rng.choice(HELD_BACK))
    strokes = [int(rng.choice(digit_indices(split, digit))) for digit in chosen]
    places = [PLACES[p] for p in rng.permutation(4)[:count]]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    return [Placed(*facts) for facts in zip(chosen, strokes, places, colours, strict=True)]


def _paint(canvas: np.ndarray, item: Placed, rng: np.random.Generator) -> None:
    """Blends one enlarged stroke into its corner of the canvas, (SIZE, SIZE, 3) float, in place."""
    stroke, place = _strokes()[0][item.stroke], PLACES.index(item.place)
    side = int(rng.integers(40, 47))
    large = Image.fromarray(stroke).resize((side, side), Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(large) * 1.35 - 0.12, 0, 1)[..., None]  # (side, side, 1)
    top = int(rng.integers(3, 53 - side + 1)) + SIZE // 2 * (place // 2)
    left = int(rng.integers(3, 53 - side + 1)) + SIZE // 2 * (place % 2)
    ink = np.asarray(COLOURS[item.colour]) * rng.uniform(0.86, 1.0)
    patch = canvas[top : top + side, left : left + side]
    patch += alpha * (ink - patch)


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws one scene of one to three digits.

    Args:
        rng: source of all randomness.
        split: "train" or "test"; decides which strokes may be used.
        held_back: whether the scene holds one of the held-back digits and asks about it.

    Returns:
        A 112x112 RGB picture and two or three turns, a list of (question, answer, kind).
    """
    scene = plan(rng, split, held_back)
    ground = rng.uniform(10, 75, 3)  # dark, of any hue
    canvas = np.broadcast_to(ground, (SIZE, SIZE, 3)).astype(np.float32)
    for item in scene:
        _paint(canvas, item, rng)
    canvas += rng.uniform(1, 6) * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))

    kinds = ["digit", "place", "colour"] + ([] if held_back else ["count"])
    kinds = rng.permutation(kinds)[: int(rng.integers(2, 4))]
    turns = []
    for kind in kinds:
        facts = scene[0 if held_back else rng.integers(len(scene))]._asdict()
        wording = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
        answer = str(len(scene) if kind == "count" else facts[kind])
        turns.append((wording.format(**facts), answer, str(kind)))
    return image, turns
