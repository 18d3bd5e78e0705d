"""Reading an answer while it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..loading import stop_ids
from ..phi3v import Phi3VProcessor
from .prompts import Message, make_prompt
from .sampling import Sampling, check_length, generate


def stream(
    model,
    processor: Phi3VProcessor,
    question: str | Sequence[Message],
    images: Any = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    **sampling: Any,
) -> Iterator[str]:
    """Ask one question and get the answer piece by piece; joined, they are the text of `ask`.

    The model writes in a thread of its own, from the first piece that is asked for. It stops when
    the iterator is closed or forgotten; an error in the thread is raised here.

    Args:
        model: dense or a mixture.
        processor: of the model.
        question: as in `ask`, one question.
        images: None, a picture or a list of pictures.
        system: what the model is told before all else.
        max_new_tokens: at most so many are written.
        sampling: fields of `Sampling`.

    Yields:
        Pieces of text, about one per token.

    Raises:
        ValueError: as in `ask`, at once.

    Example:
        >>> for piece in stream(model, processor, "What is shown?", picture):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    check_length(max_new_tokens)
    how = Sampling(**sampling)
    prompt, pictures = make_prompt(processor, question, images, system)
    inputs = processor(text=prompt, images=pictures or None)
    return _pieces(model, processor, inputs, max_new_tokens, how)


class _Words(TextIteratorStreamer):
    """Each token's text once its characters are whole, without the marks that end answers."""

    def __init__(self, processor: Phi3VProcessor, stops: list[int]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = stops

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        token = int(value.flatten()[-1])
        if token in self.stops:
            return
        self.token_cache.append(token)
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            self.on_finalized_text(text[self.print_len :])
            self.print_len = len(text)


class _Closed(StoppingCriteria):
    """Stops the generation once nobody reads on."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def _pieces(model, processor, inputs, max_new_tokens: int, how: Sampling) -> Iterator[str]:
    words, closed = _Words(processor, stop_ids(model, processor)), _Closed()
    failed: list[BaseException] = []

    def write() -> None:
        try:
            generate(
                model,
                processor,
                inputs,
                max_new_tokens,
                how,
                streamer=words,
                stopping_criteria=StoppingCriteriaList([closed]),
            )
        except BaseException as error:  # whatever it is, the reader must learn of it
            failed.append(error)
            words.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=write, name="cephalo-stream", daemon=True)
    thread.start()
    try:
        begun, space = False, ""
        for piece in words:
            text = space + (piece if begun else piece.lstrip())
            space = text[
                len(text.rstrip()) :
            ]  # kept until more follows: an answer has none at its end
            text = text.rstrip()
            if text:
                begun = True
                yield text
    finally:
        closed.event.set()
        thread.join()
    if failed:
        raise failed[0]
