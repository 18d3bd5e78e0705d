"""Micrograph-like pictures of eight material structures, with a measured solid fraction.

Every structure is a scalar field in pixel units over a square picture; what lies above a level is
solid. The level is placed so that the solid fraction hits a target, the binary mask is measured,
and the answers follow from the mask and from the structure's scale or direction.

Sources of the shapes: gyroid sections follow Schoen's level-set approximation
``sin x cos y + sin y cos z + sin z cos x``; spinodal patterns are band-passed Gaussian random
fields (Cahn 1965); Bouligand structures show as rows of nested arches (Bouligand 1972).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 112  # pixels, square
QUESTIONS = {
    "structure": ("Which structure is this?", "What structure is shown?", "Name the structure."),
    "fraction": ("How much of it is solid?", "What is the solid fraction?", "How much is solid?"),
    "description": ("Describe it.", "Describe the structure.", "Describe what you see."),
}
TINTS = (  # darkest and brightest colour of each false-colour scale
    ((8, 8, 8), (250, 250, 250)),  # grey
    ((30, 16, 6), (250, 228, 190)),  # sepia
    ((4, 12, 48), (190, 232, 255)),  # blue
    ((4, 34, 14), (206, 250, 190)),  # green
)
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)  # (SIZE, SIZE) each


class Field(NamedTuple):
    """A structure before thresholding.

    Attributes:
        level: (SIZE, SIZE) float, pixels; the solid is where it exceeds a threshold.
        shade: (SIZE, SIZE) float about 0.75-1, or the scalar 1: brightness of the solid.
        attribute: "fine" or "coarse", or the direction "level", "upright" or "slanted".
    """

    level: np.ndarray
    shade: np.ndarray | float
    attribute: str


class Structure(NamedTuple):
    """How one kind of material is drawn and described."""

    draw: Callable[[np.random.Generator], Field]
    fractions: tuple[int, int]  # range of solid fractions, percent
    sentence: str  # description with one {attribute}
    held_back: bool


def _pitch(rng: np.random.Generator, fine: tuple[int, int], coarse: tuple[int, int]):
    """Draws a repeat distance in pixels that is clearly fine or clearly coarse."""
    if rng.random() < 0.5:
        return rng.uniform(*fine), "fine"
    return rng.uniform(*coarse), "coarse"


def _rotated(angle: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction (radians from level), with a random origin."""
    x, y = _X + rng.uniform(0, 200), _Y + rng.uniform(0, 200)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s, y * c - x * s


def _direction(rng: np.random.Generator) -> tuple[float, str]:
    """Draws an angle from level, in radians, that has a clear name."""
    kind = rng.integers(3)
    if kind == 2:
        return np.deg2rad(rng.choice((-1, 1)) * rng.uniform(32, 58)), "slanted"
    return np.deg2rad(rng.uniform(-9, 9) + 90 * kind), ("level", "upright")[kind]


def _cells(rng: np.random.Generator, pitch: float, jitter: float, radius_spread: float):
    """Nearest and second nearest of one random point per grid square (Worley 1996).

    Returns:
        Distance to the nearest and second nearest point less their radii (both (SIZE, SIZE)
        float, pixels) and the index of the nearest point, (SIZE, SIZE) int.
    """
    n = int(SIZE / pitch) + 4
    x, y = _X / pitch + 1 + rng.random(), _Y / pitch + 1 + rng.random()
    points = (rng.uniform(0.5 - jitter, 0.5 + jitter, (2, n * n))).astype(np.float32)
    radii = rng.uniform(-radius_spread, radius_spread, n * n).astype(np.float32)
    column, row = x.astype(np.int32), y.astype(np.int32)
    x, y = x - column, y - row
    first = np.full_like(x, 9.0)
    second, owner = first.copy(), np.zeros_like(column)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            index = (row + dy) * n + column + dx
            gap = np.hypot(points[0][index] + dx - x, points[1][index] + dy - y) - radii[index]
            nearer = gap < first
            second = np.minimum(second, np.maximum(first, gap))
            first = np.where(nearer, gap, first)
            owner = np.where(nearer, index, owner)
    return first * pitch, second * pitch, owner


def _foam(rng: np.random.Generator) -> Field:
    pitch, attribute = _pitch(rng, (11, 14), (24, 32))
    gap, _, _ = _cells(rng, pitch, 0.3, 0.16)
    return Field(gap, 1.0, attribute)


def _fibres(rng: np.random.Generator) -> Field:
    angle, attribute = _direction(rng)
    along, across = _rotated(angle, rng)
    pitch = rng.uniform(7, 15)
    wave = np.sin(along * np.float32(2 * np.pi / rng.uniform(70, 140)) + rng.uniform(0, 6))
    u = (across + rng.uniform(0.3, 1.8) * wave) / pitch + 64
    cell = np.floor(u).astype(np.int32)
    shift = rng.uniform(0.28, 0.72, 256).astype(np.float32)
    best, owner = np.full_like(u, 9.0), cell
    for step in (-1, 0, 1):
        gap = np.abs(cell + step + shift[(cell + step) % 256] - u)
        owner = np.where(gap < best, cell + step, owner)
        best = np.minimum(best, gap)
    shade = rng.uniform(0.72, 1, 256).astype(np.float32)[owner % 256]
    return Field(-best * pitch, shade * (1.05 - 0.5 * best), attribute)


def _honeycomb(rng: np.random.Generator) -> Field:
    pitch, attribute = _pitch(rng, (12, 15), (24, 32))
    u, v = _rotated(rng.uniform(0, np.pi), rng)
    tall = pitch * np.sqrt(3).astype(np.float32)

    def offset(du: float, dv: float):
        return (u + du) % pitch - pitch / 2, (v + dv) % tall - tall / 2

    (x, y), (x2, y2) = offset(0, 0), offset(pitch / 2, tall / 2)
    other = x2**2 + y2**2 < x**2 + y**2
    x, y = np.abs(np.where(other, x2, x)), np.abs(np.where(other, y2, y))
    return Field(np.maximum(x, 0.5 * x + np.float32(np.sqrt(0.75)) * y), 1.0, attribute)


def _bricks(rng: np.random.Generator) -> Field:
    angle, attribute = _direction(rng)
    along, across = _rotated(angle, rng)
    height = rng.uniform(11, 18)
    length = height * rng.uniform(2.2, 3.4)
    across = across + 10 * SIZE
    row = np.floor(across / height).astype(np.int32)
    start = (rng.uniform(-0.12, 0.12, 256) + 0.5 * (np.arange(256) % 2)).astype(np.float32)
    u = along / length + start[row % 256]
    brick = np.floor(u).astype(np.int32)
    from_end = np.minimum(u - brick, brick + 1 - u) * length
    from_side = np.minimum(across - row * height, (row + 1) * height - across)
    shade = rng.uniform(0.74, 1, (64, 64)).astype(np.float32)[row % 64, brick % 64]
    return Field(np.minimum(from_end, from_side), shade, attribute)


def _polycrystal(rng: np.random.Generator) -> Field:
    pitch, attribute = _pitch(rng, (13, 17), (28, 38))
    first, second, owner = _cells(rng, pitch, 0.45, 0.0)
    shade = rng.uniform(0.45, 1, owner.max() + 1).astype(np.float32)[owner]
    return Field((second - first) / 2, shade, attribute)


def _gyroid(rng: np.random.Generator) -> Field:
    pitch, attribute = _pitch(rng, (22, 27), (40, 52))
    u, v = _rotated(rng.uniform(0, np.pi), rng)
    tilt_u, tilt_v = rng.uniform(-0.12, 0.12, 2)
    k = np.float32(2 * np.pi / pitch)
    x, y = k * u, k * v
    z = tilt_u * x + tilt_v * y + rng.uniform(0, 2 * np.pi)
    wave = np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x)
    return Field(-np.abs(wave) / k, 1.0, attribute)


def _spinodal(rng: np.random.Generator) -> Field:
    pitch, attribute = _pitch(rng, (10, 13), (22, 30))
    noise = np.fft.rfft2(rng.standard_normal((SIZE, SIZE), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :])
    band = np.exp(-(((frequency * pitch - 1) / 0.16) ** 2))
    wave = np.fft.irfft2(noise * band, (SIZE, SIZE)).astype(np.float32)
    return Field(wave / wave.std() * pitch / 6, 1.0, attribute)


def _bouligand(rng: np.random.Generator) -> Field:
    angle, attribute = _direction(rng)
    along, across = _rotated(angle, rng)
    ply = rng.uniform(26, 40)
    pitch = rng.uniform(7, 12)
    arch = np.abs(np.sin(across * np.float32(np.pi / ply)))
    phase = (along + rng.uniform(0.6, 0.8) * ply * arch) * np.float32(2 * np.pi / pitch)
    return Field(np.sin(phase) * pitch / 6, 0.72 + 0.28 * arch, attribute)


STRUCTURES = {
    "porous foam": Structure(_foam, (40, 80), "A porous foam with {} pores.", False),
    "aligned fibres": Structure(_fibres, (30, 80), "Aligned fibres that run {}.", False),
    "honeycomb": Structure(_honeycomb, (20, 60), "A honeycomb with {} cells.", False),
    "brick and mortar": Structure(_bricks, (60, 90), "Brick and mortar in {} rows.", False),
    "polycrystal": Structure(_polycrystal, (70, 90), "A polycrystal with {} grains.", False),
    "gyroid": Structure(_gyroid, (30, 60), "A gyroid with {} channels.", True),
    "spinodal": Structure(_spinodal, (30, 70), "A spinodal pattern with {} domains.", True),
    "Bouligand": Structure(_bouligand, (30, 70), "A Bouligand structure with {} plies.", True),
}


def draw_material(
    rng: np.random.Generator, structure: str
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Draws one micrograph of a structure.

    Args:
        rng: source of all randomness.
        structure: a key of `STRUCTURES`.

    Returns:
        The picture, (112, 112, 3) uint8; the mask of the solid, (112, 112) bool; and the answers
        by kind ("structure", "fraction", "description").
    """
    spec = STRUCTURES[structure]
    field = spec.draw(rng)
    low, high = spec.fractions
    target = rng.integers(low // 10, high // 10 + 1) / 10 + rng.uniform(-0.035, 0.035)
    threshold = np.quantile(field.level, 1 - target)
    mask = field.level > threshold  # (SIZE, SIZE)
    answers = {
        "structure": structure,
        "fraction": f"about {fraction_percent(mask)} %",
        "description": spec.sentence.format(field.attribute),
    }

    soft = np.clip(0.5 + field.level - threshold, 0, 1)  # edges one pixel wide
    dark, bright = rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)
    grey = dark + soft * (bright * field.shade - dark)
    grey += rng.uniform(0.01, 0.05) * rng.standard_normal(grey.shape, dtype=np.float32)
    low_colour, high_colour = np.asarray(TINTS[rng.integers(len(TINTS))], dtype=np.float32)
    pixels = low_colour + np.clip(grey, 0, 1)[..., None] * (high_colour - low_colour)
    return pixels.astype(np.uint8), mask, answers


def fraction_percent(mask: np.ndarray) -> int:
    """Solid fraction of a boolean mask in percent, rounded to the nearest ten."""
    return int(np.floor(10 * mask.mean() + 0.5)) * 10


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws one sample of the materials domain.

    Args:
        rng: source of all randomness; `world` seeds it differently for each split.
        split: unused here, since train and test pictures share no random numbers.
        held_back: whether to draw a held-back structure or one of the others.

    Returns:
        A 112x112 RGB picture and its turns, a list of (question, answer, kind) in random order.
    """
    del split
    names = [name for name, spec in STRUCTURES.items() if spec.held_back == held_back]
    pixels, _, answers = draw_material(rng, names[rng.integers(len(names))])
    kinds = rng.permutation(list(QUESTIONS))
    turns = [
        (QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))], answers[kind], str(kind))
        for kind in kinds
    ]
    return Image.fromarray(pixels), turns
