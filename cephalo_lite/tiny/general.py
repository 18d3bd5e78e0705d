"""The general domain: half scenes of handwritten digits, half photographs."""

from __future__ import annotations

import numpy as np

from . import digits, photographs


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws a digit scene or a photograph, each half of the time.

    Args:
        rng: source of all randomness.
        split: "train" or "test".
        held_back: whether the answers need held-back digits or subjects.

    Returns:
        A 112x112 RGB picture and its turns, a list of (question, answer, kind).
    """
    part = digits if rng.random() < 0.5 else photographs
    return part.draw(rng, split, held_back)
