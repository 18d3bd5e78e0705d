"""Asking a model: one question or a batch, with pictures or without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..loading import stop_ids
from ..moe.trace import RoutingTrace, tracing
from ..phi3v import Phi3VProcessor
from .prompts import Message, listed, make_prompt
from .sampling import Sampling, check_length, generate, read_answer


@dataclass
class Answer:
    """What a model answered."""

    text: str
    tokens: int  # written, the end mark included; as many as allowed where the answer was cut off
    seconds: float  # from the question to the whole answer; in a batch, of the whole batch
    routing: RoutingTrace | None = None  # which expert saw which token, where that was asked for

    def __str__(self) -> str:
        return self.text


def ask(
    model,
    processor: Phi3VProcessor,
    question: str | Sequence[Message] | Sequence[str] | Sequence[Sequence[Message]],
    images: Any = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    trace: bool = False,
    **sampling: Any,
) -> Answer | list[Answer]:
    r"""Ask a question about pictures, or a batch of questions.

    Args:
        model: dense or a mixture.
        processor: of the model.
        question: a plain question, which its pictures are put before; a text with its own tags
            (`<|image_1|>`); a whole prompt (`<|user|>\n...`); messages; or, for a batch, a list of
            these.
        images: None, a picture or a list of pictures: PIL, array, path, URL, data URI. For a batch
            a list with one such entry per question.
        system: what the model is told before all else.
        max_new_tokens: at most so many are written.
        trace: record the routing of a mixture for the tokens that are read, the answer's included.
        sampling: fields of `Sampling`: temperature, top_p, top_k, repetition_penalty, seed. Without
            them the most likely token is taken each time.

    Returns:
        The answer, or a list with one per question of a batch.

    Raises:
        ValueError: a question is empty, pictures and tags do not fit, nothing may be written, or a
            dense model was to be traced.

    Example:
        >>> ask(model, processor, "What is shown?", images="fibres.png").text  # doctest: +SKIP
        'aligned fibres'
        >>> ask(model, processor, ["What is shown?", "And here?"], images=[a, b])  # doctest: +SKIP
    """
    check_length(max_new_tokens)
    how = Sampling(**sampling)
    start = time.perf_counter()
    questions, pictures = _batch(question, images)
    prompts, shown = zip(
        *(make_prompt(processor, *pair, system) for pair in zip(questions, pictures, strict=True)),
        strict=True,
    )
    inputs = processor(
        text=list(prompts),
        images=list(shown) if any(shown) else None,
        padding=True,
        padding_side="left",
    )
    stops = stop_ids(model, processor)
    with tracing(model, processor, stops) if trace else nullcontext() as record:
        sequences = generate(model, processor, inputs, max_new_tokens, how).sequences
    length = inputs["input_ids"].shape[1]
    read = [read_answer(row, stops, processor) for row in sequences[:, length:].tolist()]
    routing = record.trace() if trace else None
    seconds = time.perf_counter() - start
    answers = [
        Answer(text, tokens, seconds, routing.select(row=row) if trace else None)
        for row, (text, tokens) in enumerate(read)
    ]
    return answers if _is_batch(question) else answers[0]


def _is_batch(question: Any) -> bool:
    """Whether this is a list of questions; a list of messages is one."""
    return not isinstance(question, str) and not (len(question) and isinstance(question[0], dict))


def _batch(question: Any, images: Any) -> tuple[list[Any], list[Any]]:
    """Questions, and the pictures of each."""
    if not _is_batch(question):
        return [question], [images]
    questions = list(question)
    if not questions:
        raise ValueError("The list of questions is empty.")
    if images is None:
        return questions, [None] * len(questions)
    if not isinstance(images, (list, tuple)) or len(images) != len(questions):
        given = f"{len(images)} entries" if isinstance(images, (list, tuple)) else "one picture"
        raise ValueError(
            f"{len(questions)} questions and {given} of images: pass a list with one entry per "
            "question (a picture, a list of pictures, or None)."
        )
    return questions, [listed(entry) for entry in images]
