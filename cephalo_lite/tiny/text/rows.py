"""Instruction rows to fine-tune on: Python functions to write, and questions to answer.

Rows for training and rows for test are made from different facts and from different program
shapes (see `functions` and `facts`).
"""

from __future__ import annotations

import numpy as np

from .facts import TOPICS, facts_of
from .functions import SPLITS, make_program, make_values

OPENINGS = ("Write a function that takes a list of {}: {}.", "Given a list of {}, {}.")


def code_rows(count: int, split: str = "train", seed: int = 0) -> list[dict[str, str]]:
    """Functions to write.

    Args:
        count: number of rows.
        split: "train" or "test".
        seed: the same seed makes the same rows.

    Returns:
        Rows with `instruction`, `input` (an example call), `output` (the source of `solve`), and,
        to judge an answer by, `call` (another call) and `expected` (the `repr` of its result).

    Raises:
        ValueError: there is no such split.
    """
    generator = _generator(split, seed, 0)
    rows = []
    for _ in range(count):
        program = make_program(split, generator)
        opening = OPENINGS[generator.integers(len(OPENINGS))]
        shown, judged = (make_values(program.argument, generator) for _ in range(2))
        rows.append(
            {
                "instruction": opening.format(program.argument, program.words(generator)),
                "input": f"solve({shown})",
                "output": program.source(),
                "call": f"solve({judged})",
                "expected": repr(program.run(judged)),
            }
        )
    return rows


def chat_rows(count: int, split: str = "train", seed: int = 0) -> list[dict]:
    """Conversations of one to three questions on one topic, with exact answers.

    Args:
        count: number of conversations.
        split: "train" or "test".
        seed: the same seed makes the same rows.

    Returns:
        Rows with `messages` (alternating "user" and "assistant" turns) and `topic`.

    Raises:
        ValueError: there is no such split.
    """
    generator = _generator(split, seed, 1)
    rows, names = [], list(TOPICS)
    for number in range(count):
        name = names[number % len(names)]
        topic, facts = TOPICS[name], facts_of(name, split)
        turns = min(int(generator.integers(1, 4)), len(facts))
        messages = []
        for turn, index in enumerate(generator.choice(len(facts), turns, replace=False)):
            given, known = facts[index]
            first = topic.questions[generator.integers(len(topic.questions))]
            question = (topic.follow_up if turn else first).format(a=given)
            answer = topic.answer.format(a=given, b=known)
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        rows.append({"messages": messages, "topic": name})
    return rows


def _generator(split: str, seed: int, kind: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    return np.random.default_rng((seed, kind, SPLITS.index(split)))
