"""What the base models read: library text, small functions, statements of facts, texts to go on.

None of it is a question with its answer. Chat tokens occur, for the released models know them too,
but only in documents where the "assistant" goes on with the text that the "user" began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .facts import TOPICS
from .functions import Program, make_program

SHARES = {"library": 0.12, "function": 0.43, "facts": 0.45}  # of the documents
CHAT_SHARE = 0.15  # of the documents, these written as two turns
NAMES = ("process", "transform", "change", "work", "handle", "apply", "convert", "run", "helper")


def documents(
    count: int, library: list[str], generator: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Documents as (beginning, rest); the rest is empty where one is not divided.

    Args:
        count: number of documents.
        library: texts to draw from, in turn; see `corpus.library_texts`.
        generator: source of all randomness.

    Yields:
        A document as one text and "", or its beginning and its continuation, for two turns.
    """
    order: list[int] = []
    kinds, shares = list(SHARES), list(SHARES.values())
    makers: dict[str, Callable[[], str]] = {
        "function": lambda: function_text(generator),
        "facts": lambda: facts_text(generator),
    }
    for _ in range(count):
        kind = kinds[generator.choice(len(kinds), p=shares)]
        if kind == "library":
            if not order:
                order = generator.permutation(len(library)).tolist()
            text = library[order.pop()]
        else:
            text = makers[kind]()
        yield _divide(text, generator) if generator.random() < CHAT_SHARE else (text, "")


def function_text(generator: np.random.Generator) -> str:
    """One to three small functions of training shapes, described by docstring or by comment."""
    texts = []
    for _ in range(generator.integers(1, 4)):
        program = make_program("train", generator)
        texts.append(described(program, str(generator.choice(NAMES)), generator))
    return "\n\n".join(texts)


def described(program: Program, name: str, generator: np.random.Generator) -> str:
    """A function with its description as a comment or as a docstring."""
    words = program.words(generator)
    sentence = words[0].upper() + words[1:] + "."
    if generator.random() < 0.5:
        return f"# {sentence}\n{program.source(name)}"
    return f'def {name}({program.argument}):\n    """{sentence}"""\n{program.body()}'


def facts_text(generator: np.random.Generator) -> str:
    """Four to twelve statements on one topic, worded differently."""
    topic = TOPICS[list(TOPICS)[generator.integers(len(TOPICS))]]
    chosen = generator.choice(len(topic.facts), generator.integers(4, 13), replace=False)
    lines = []
    for index in chosen:
        given, answer = topic.facts[index]
        statement = topic.statements[generator.integers(len(topic.statements))]
        lines.append(statement.format(a=given, b=answer))
    return "\n".join(lines)


def _divide(text: str, generator: np.random.Generator) -> tuple[str, str]:
    """Divide a text at a space or a line break somewhere in its middle."""
    places = [i for i, letter in enumerate(text) if letter in " \n" and 0 < i < len(text) - 1]
    if not places:
        return text, ""
    cut = places[generator.integers(len(places))]
    return text[:cut].strip(), text[cut:].strip()
