r"""Short formulas on paper: typeset by matplotlib's mathtext, answered by their LaTeX source.

A small grammar joins letters, digits, superscripts and subscripts by + - and =. Greek letters
are held back. Each formula has exactly one spelling: braces
around every script, and a space only between a macro and a letter that follows it (``\alpha x``).
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 224, 56  # pixels
QUESTIONS = ("Write it as LaTeX.", "What is the LaTeX source?", "Transcribe the formula.")
FONTS = ("cm", "stix")
LETTERS = tuple("abcknxyz")
DIGITS = tuple("123456789")
GREEK = ("\\alpha", "\\beta", "\\gamma", "\\lambda", "\\pi")
HELD_BACK = GREEK


def join(*parts: str) -> str:
    r"""Joins pieces of source, with a space only where a macro would swallow a letter.

    Example:
        >>> join("\\alpha", "x"), join("\\alpha", "+", "x")
        ('\\alpha x', '\\alpha+x')
    """
    source = ""
    for part in parts:
        macro = source.rpartition("\\")[2] if "\\" in source else ""
        source += " " * (macro.isalpha() and part[:1].isalpha()) + part
    return source


def split_of(source: str) -> str:
    """The split a formula belongs to, by a hash of its source: one in five is for test."""
    return "test" if blake2b(source.encode(), digest_size=4).digest()[0] % 5 == 0 else "train"


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def _letter(rng: np.random.Generator, held_back: bool) -> str:
    return _pick(rng, GREEK if held_back and rng.random() < 0.45 else LETTERS)


def _atom(rng: np.random.Generator, held_back: bool) -> str:
    return _pick(rng, DIGITS) if rng.random() < 0.3 else _letter(rng, held_back)


def _scripted(rng: np.random.Generator, held_back: bool) -> tuple[str, int]:
    """A letter, perhaps with a superscript or subscript, or a digit; and its visible symbols."""
    form = rng.random()
    if form < 0.4:
        return _atom(rng, held_back), 1
    mark = "^" if form < 0.7 else "_"
    script = _pick(rng, DIGITS) if rng.random() < 0.6 else _pick(rng, LETTERS)
    return f"{_letter(rng, held_back)}{mark}{{{script}}}", 2


def _term(rng: np.random.Generator, held_back: bool) -> tuple[str, int]:
    """One summand of a formula and its number of visible symbols."""
    form = rng.random()
    if form > 0.8:  # a product: a coefficient or letter, then a letter
        return join(_atom(rng, held_back), _letter(rng, held_back)), 2
    return _scripted(rng, held_back)


def make_source(rng: np.random.Generator, split: str, held_back: bool) -> str:
    """Draws the source of a formula of 3-6 visible symbols.

    Args:
        rng: source of all randomness.
        split: "train" or "test"; only formulas of this split are drawn.
        held_back: whether the formula holds at least one of `HELD_BACK`, or none.

    Returns:
        LaTeX source in its one spelling, without dollar signs.
    """
    while True:
        first, symbols = _term(rng, held_back)
        parts = [first]
        signs = ["+", "-", "="]
        while symbols < 6 and len(parts) < 5 and (len(parts) == 1 or rng.random() < 0.35):
            sign = signs[rng.integers(len(signs))]
            if sign == "=":  # once only
                signs.remove("=")
            term, more = _term(rng, held_back)
            parts += [sign, term]
            symbols += 1 + more
        source = join(*parts)
        complete = 3 <= symbols <= 6 and any(m in source for m in HELD_BACK) == held_back
        if complete and split_of(source) == split:
            return source


@cache
def _font(family: str):
    from matplotlib.font_manager import FontProperties

    return FontProperties(math_fontfamily=family, size=34)


@cache
def _parser():
    from matplotlib.mathtext import MathTextParser

    return MathTextParser("agg")


def typeset(source: str, font: str = "cm") -> np.ndarray:
    """Typesets a formula with matplotlib, cropped to its ink.

    Args:
        source: LaTeX source without dollar signs.
        font: one of `FONTS`, mathtext's font sets.

    Returns:
        Coverage by ink, (height, width) uint8, 0 for bare paper.
    """
    raster = _parser().parse(f"${source}$", 72, _font(font))
    ink = np.asarray(raster.image)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws a formula as large as the paper allows, in dark ink, with some play in size and place.

    Args:
        rng: source of all randomness.
        split: "train" or "test"; no formula occurs in both.
        held_back: whether the formula holds a held-back symbol.

    Returns:
        A 224x56 RGB picture and its one turn, a list of (question, answer, kind).
    """
    source = make_source(rng, split, held_back)
    ink = Image.fromarray(typeset(source, _pick(rng, FONTS)))
    scale = rng.uniform(0.92, 1) * min((WIDTH - 12) / ink.width, (HEIGHT - 6) / ink.height)
    size = max(1, round(ink.width * scale)), max(1, round(ink.height * scale))
    ink = ink.resize(size, Image.Resampling.BICUBIC)
    left = int(rng.integers(3, 9))
    top = int(np.clip((HEIGHT - ink.height) // 2 + rng.integers(-2, 3), 0, HEIGHT - ink.height))
    colour = tuple(int(c) for c in rng.integers(0, 60, 3))
    page = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    page.paste(colour, (left, top), ink)
    return page, [(_pick(rng, QUESTIONS), source, "formula")]
