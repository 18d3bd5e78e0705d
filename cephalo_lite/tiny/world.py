"""The small world: pictures with known answers in three domains, for training and judging.

Each domain knows some things that are *held back*: structures, digits, subjects and symbols that a
base model trained with ``knowledge="base"`` never meets, and that an expert learns later with
``knowledge="all"``. Questions are worded alike for both. Train and test draw from disjoint
material: other handwritten digits, other parts of a photograph, other formulas, other random
micrographs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

DOMAINS = ("materials", "general", "latex")  # of the experts
UNSEEN = ("signs",)  # no model of the tiny family was trained on it
SPLITS = ("train", "test")
KNOWLEDGE = ("all", "base", "held_back")
SEED_STRIDE = 1_000_000  # make_samples(seed=s) uses the sample seeds s * SEED_STRIDE + 0, 1, ...


@dataclass(frozen=True)
class Turn:
    """One question about a picture and its answer."""

    question: str
    answer: str
    kind: str  # structure, fraction, description, digit, place, ...


@dataclass(frozen=True)
class Sample:
    """One picture with its questions and answers."""

    domain: str  # one of DOMAINS or UNSEEN
    image: PIL.Image.Image  # RGB; 112x112, or 224x56 (width x height) for latex
    turns: tuple[Turn, ...]  # one to three
    held_back: bool  # whether the answers need knowledge that the base was never shown
    name: str  # "domain-split-knowledge-seed", the arguments that make it again

    def messages(self) -> list[dict]:
        """The conversation as transformers-style messages, the image in the first user turn.

        Returns:
            Alternating user and assistant messages; each content is a list of parts,
            ``{"type": "image"}`` (a placeholder; the picture is `image`) or
            ``{"type": "text", "text": ...}``.
        """
        messages: list[dict] = []
        for turn in self.turns:
            picture = [] if messages else [{"type": "image"}]
            question, answer = ({"type": "text", "text": t} for t in (turn.question, turn.answer))
            messages.append({"role": "user", "content": [*picture, question]})
            messages.append({"role": "assistant", "content": [answer]})
        return messages


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise ValueError(f"Unknown {what} {value!r}: choose one of {names}.")


def _generator(*key: object) -> np.random.Generator:
    """A random generator that depends on all parts of the key, the same in every process."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def make_sample(domain: str, split: str = "train", seed: int = 0, knowledge: str = "all") -> Sample:
    """Makes one picture with its questions and answers; the same arguments give the same sample.

    Args:
        domain: "materials", "general" or "latex"; or "signs", which no tiny model has seen.
        split: "train" or "test".
        seed: any integer.
        knowledge: "base" (nothing held back), "held_back" (only samples that need held-back
            knowledge) or "all" (about half of each).

    Returns:
        The sample.

    Raises:
        ValueError: unknown domain, split or knowledge.
    """
    _check("domain", domain, DOMAINS + UNSEEN)
    _check("split", split, SPLITS)
    _check("knowledge", knowledge, KNOWLEDGE)
    from . import formulas, general, materials, signs

    makers = {"materials": materials, "general": general, "latex": formulas, "signs": signs}
    draw = makers[domain].draw
    rng = _generator(domain, split, knowledge, int(seed))
    held_back = rng.random() < 0.5 if knowledge == "all" else knowledge == "held_back"
    image, turns = draw(rng, split, held_back)
    name = f"{domain}-{split}-{knowledge}-{int(seed)}"
    return Sample(domain, image, tuple(Turn(*turn) for turn in turns), held_back, name)


def make_samples(
    domain: str,
    count: int,
    split: str = "train",
    seed: int = 0,
    knowledge: str = "all",
    progress: bool = False,
) -> list[Sample]:
    """Makes several samples; different seeds share none.

    Args:
        domain: as in `make_sample`.
        count: number of samples, at most 1,000,000.
        split: "train" or "test".
        seed: any integer.
        knowledge: "base", "held_back" or "all", see `make_sample`.
        progress: whether to show a progress bar.

    Returns:
        The samples; a longer list with the same seed starts with a shorter one.

    Raises:
        ValueError: unknown domain, split or knowledge, or a count out of range.

    Example:
        >>> samples = make_samples("general", 8, split="test", seed=1)
        >>> samples[0].turns[0].question  # doctest: +SKIP
        'What is shown?'
    """
    if not 0 <= count <= SEED_STRIDE:
        raise ValueError(f"count is {count}: give a number from 0 to {SEED_STRIDE:,}.")
    from tqdm.auto import trange

    first = int(seed) * SEED_STRIDE
    return [
        make_sample(domain, split, first + index, knowledge)
        for index in trange(count, desc=f"{domain} ({split})", disable=not progress)
    ]


def vocabulary_corpus(count: int, seed: int = 0) -> Iterator[str]:
    """Yields questions and answers of all domains, to train a tokenizer on.

    Args:
        count: number of training samples to read, the domains in turn.
        seed: any integer.

    Yields:
        One question or one answer at a time.
    """
    for index in range(count):
        domain = DOMAINS[index % len(DOMAINS)]
        for turn in make_sample(domain, "train", int(seed) * SEED_STRIDE + index, "all").turns:
            yield turn.question
            yield turn.answer
