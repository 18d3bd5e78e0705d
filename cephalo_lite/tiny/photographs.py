"""Real photographs that ship inside scikit-image and scikit-learn, cropped at random.

Nothing is downloaded. Train and test crops come from disjoint parts of each photograph, chosen by
hand so that each part still shows its subject. About a third of the subjects are held back.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 112  # pixels, square
MARGIN = 4  # pixels kept free around each part, so that no resizing filter reaches the other one
QUESTIONS = ("What is shown?", "What is in the picture?", "What do you see?")


class Photograph(NamedTuple):
    """One photograph and its two parts, boxes as (left, top, right, bottom) in shares of it."""

    file: str  # "package/path inside it"
    train: tuple[float, float, float, float]
    test: tuple[float, float, float, float]
    held_back: bool = False


def _beside(file: str, cut: float, left=0.0, top=0.0, right=1.0, bottom=1.0, held_back=False):
    """A photograph cut by an upright line at `cut`: train on its left, test on its right."""
    return Photograph(file, (left, top, cut, bottom), (cut, top, right, bottom), held_back)


def _stacked(file: str, cut: float, left=0.0, top=0.0, right=1.0, bottom=1.0, held_back=False):
    """A photograph cut by a level line at `cut`: train above it, test below it."""
    return Photograph(file, (left, top, right, cut), (left, cut, right, bottom), held_back)


PHOTOGRAPHS = {
    "an astronaut": Photograph(
        "skimage/data/astronaut.png", (0.05, 0.0, 0.5, 1.0), (0.5, 0.28, 0.95, 1.0)
    ),
    "a brick wall": _beside("skimage/data/brick.png", 0.6),
    "a cup of coffee": _beside("skimage/data/coffee.png", 0.50, 0.14, 0.05, 0.86, 0.95),
    "a flower": _beside("sklearn/datasets/images/flower.jpg", 0.50, 0.24, 0.1, 0.76, 0.78),
    "galaxies": _beside("skimage/data/hubble_deep_field.jpg", 0.6),
    "grass": _beside("skimage/data/grass.png", 0.6),
    "gravel": _beside("skimage/data/gravel.png", 0.6),
    "a horse": _beside("skimage/data/horse.png", 0.52, top=0.05, bottom=0.95),
    "the moon": _stacked("skimage/data/moon.png", 0.5, left=0.1, right=0.95),
    "a pagoda": _beside("sklearn/datasets/images/china.jpg", 0.40, 0.10, 0.05, 0.70, 0.85),
    "a printed page": _beside("skimage/data/page.png", 0.6),
    "a tissue section": _beside("skimage/data/ihc.png", 0.55),
    "a cat": _beside("skimage/data/chelsea.png", 0.48, 0.05, 0.0, 0.92, held_back=True),
    "coins": _beside("skimage/data/coins.png", 0.58, held_back=True),
    "handwriting": _beside("skimage/data/text.png", 0.58, held_back=True),
    "a motorcycle": _beside("skimage/data/motorcycle_left.png", 0.52, 0, 0.1, held_back=True),
    "a retina": _beside("skimage/data/retina.jpg", 0.52, 0.02, 0.02, 0.98, 0.98, held_back=True),
    "a rocket": _stacked("skimage/data/rocket.jpg", 0.52, 0.30, 0.1, 0.60, 1.0, held_back=True),
}


@cache
def _load(file: str) -> Image.Image:
    """Opens a photograph of an installed package without importing the package.

    Raises:
        FileNotFoundError: the package is missing or does not carry the file.
    """
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    path = Path(spec.origin).parent / inside if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"The photograph {file!r} is not installed. Install scikit-image>=0.25 and "
            "scikit-learn, which carry it: pip install scikit-image scikit-learn"
        )
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    scale = min(1.0, 640 / max(photo.size))  # finer detail is lost at 112 pixels anyway
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), reducing_gap=3)


def region(subject: str, split: str) -> tuple[int, int, int, int]:
    """The part of a photograph that a split may use, (left, top, right, bottom) in pixels."""
    photo = PHOTOGRAPHS[subject]
    width, height = _load(photo.file).size
    left, top, right, bottom = photo.test if split == "test" else photo.train
    return (
        round(left * width) + MARGIN,
        round(top * height) + MARGIN,
        round(right * width) - MARGIN,
        round(bottom * height) - MARGIN,
    )


def crop_box(rng: np.random.Generator, subject: str, split: str) -> tuple[int, int, int, int]:
    """Draws a square of 70-100 % of the shorter side, inside the split's part."""
    left, top, right, bottom = region(subject, split)
    shorter = min(right - left, bottom - top)
    side = int(shorter * rng.uniform(0.7, 1.0))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    return x, y, x + side, y + side


def draw(rng: np.random.Generator, split: str, held_back: bool):
    """Draws one crop of a photograph, mirrored and brightened or darkened at random.

    Args:
        rng: source of all randomness.
        split: "train" or "test"; decides which part of the photograph may be used.
        held_back: whether to draw a held-back subject or one of the others.

    Returns:
        A 112x112 RGB picture and its one turn, a list of (question, answer, kind).
    """
    subjects = [name for name, photo in PHOTOGRAPHS.items() if photo.held_back == held_back]
    subject = subjects[rng.integers(len(subjects))]
    box = crop_box(rng, subject, split)
    photo = _load(PHOTOGRAPHS[subject].file)
    image = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = rng.uniform(0.8, 1.2), rng.uniform(-15, 15)
    image = image.point([int(min(255, max(0, gain * v + shift))) for v in range(256)] * 3)
    return image, [(QUESTIONS[rng.integers(len(QUESTIONS))], subject, "photograph")]
