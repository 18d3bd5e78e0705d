"""Pages of single symbols at known places, on which the tiny tower learns to see shapes.

A released tower (CLIP) has seen millions of pictures before any language model is attached to it.
The tiny one learns from these pages instead: each patch must say which symbol it lies on. Pages
show every shape of the world, held-back ones too, but no names and no LaTeX: what a shape is
*called* is left to the language model.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image

from .digits import COLOURS, _strokes, digit_indices
from .formulas import DIGITS, FONTS, GREEK, LETTERS, typeset

SIZE = 112  # pixels
TYPED = (*LETTERS, *DIGITS, *GREEK, "+", "-", "=")
CLASSES = 1 + len(TYPED) + 10  # bare paper, typeset symbols, handwritten digits


@cache
def _typed() -> list[list[Image.Image]]:
    """Ink of each symbol of TYPED in each font."""
    return [[Image.fromarray(typeset(symbol, font)) for font in FONTS] for symbol in TYPED]


def page(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One page: typeset symbols on paper, or handwritten digits on a dark ground.

    Returns:
        Pixels (112, 112, 3) uint8, and for each pixel the number of its symbol (112, 112), 0 on
        bare ground.
    """
    by_hand = rng.random() < 0.4
    ground = rng.uniform(10, 75, 3) if by_hand else np.full(3, 255.0)
    canvas = np.broadcast_to(ground, (SIZE, SIZE, 3)).astype(np.float32)
    where = np.zeros((SIZE, SIZE), dtype=np.int64)
    scale = rng.uniform(0.55, 1.9)
    for _ in range(12):
        if by_hand:
            digit = int(rng.integers(10))
            stroke = _strokes()[0][rng.choice(digit_indices("train", digit))]
            number, side = 1 + len(TYPED) + digit, int(rng.integers(36, 48))
            ink = Image.fromarray(stroke).resize((side, side), Image.Resampling.BICUBIC)
            ink = ink.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
            alpha = np.clip(np.asarray(ink) * 1.35 - 0.12, 0, 1)
            colour = np.asarray(list(COLOURS.values())[rng.integers(len(COLOURS))]) * rng.uniform(
                0.86, 1
            )
        else:
            symbol = int(rng.integers(len(TYPED)))
            ink = _typed()[symbol][rng.integers(len(FONTS))]
            own = scale * (rng.uniform(0.6, 0.8) if rng.random() < 0.3 else rng.uniform(0.9, 1.1))
            size = [max(2, min(100, round(length * own))) for length in ink.size]
            alpha = np.asarray(ink.resize(size, Image.Resampling.BICUBIC)) / 255.0
            number, colour = 1 + symbol, rng.integers(0, 60, 3)
        height, width = alpha.shape
        top, left = int(rng.integers(0, SIZE - height + 1)), int(rng.integers(0, SIZE - width + 1))
        box = (slice(top, top + height), slice(left, left + width))
        if where[box].any():
            continue
        where[box] = number
        canvas[box] += alpha[..., None] * (colour - canvas[box])
    if by_hand:
        canvas += rng.uniform(1, 6) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), where


def pages(count: int, patch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages (count, 3, 112, 112) uint8 and the symbol at each patch's middle (count, patches)."""
    rng = np.random.default_rng(seed)
    drawn = [page(rng) for _ in range(count)]
    pixels = (
        torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    )
    middle = slice(patch // 2, None, patch)
    return pixels, torch.from_numpy(np.stack([where[middle, middle].ravel() for _, where in drawn]))
