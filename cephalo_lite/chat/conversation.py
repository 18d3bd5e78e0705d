"""A conversation: several turns, pictures at any of them, and nothing read twice."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from ..loading import stop_ids
from ..moe.trace import tracing
from ..phi3v import Phi3VProcessor
from ..phi3v.processing import TAG
from .ask import Answer
from .cache import ReadSoFar
from .prompts import Message, check_tags, listed, render, with_tags
from .sampling import Sampling, check_length, generate, read_answer


class Chat:
    """A conversation with a model about pictures.

    Attributes:
        messages: what was said, as `{"role": ..., "content": text with tags}`. It may be changed
            between turns; what is read again is found by itself.
        images: the pictures; `<|image_1|>` is the first of them.

    Example:
        >>> chat = Chat(model, processor)  # doctest: +SKIP
        >>> chat.say("What is shown?", images=micrograph).text  # doctest: +SKIP
        >>> chat.say("Which of the two is denser?", images=other).text  # doctest: +SKIP
    """

    def __init__(self, model, processor: Phi3VProcessor, system: str | None = None):
        self.model, self.processor, self.system = model, processor, system
        self._read = ReadSoFar()
        self.reset()

    def reset(self) -> None:
        """Begin anew; the system text stays."""
        self.messages: list[Message] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.images: list[Any] = []
        self._read.forget()

    def say(
        self,
        text: str,
        images: Any = None,
        max_new_tokens: int = 128,
        trace: bool = False,
        **sampling: Any,
    ) -> Answer:
        """Say something and get the answer; only what is new is read by the model.

        Args:
            text: what the user says. Without tags the new pictures are put before it; with tags it
                names every new picture by its number in the conversation, and older ones where it
                likes.
            images: None, a picture or a list of new pictures.
            max_new_tokens: at most so many are written.
            trace: record the routing of a mixture for the tokens that are read in this turn.
            sampling: fields of `Sampling`.

        Raises:
            ValueError: as in `ask`; the conversation is then as it was before.
        """
        check_length(max_new_tokens)
        how = Sampling(**sampling)
        start = time.perf_counter()
        new = listed(images)
        pictures = [*self.images, *new]
        said = {"role": "user", "content": with_tags(text, len(new), before=len(self.images))}
        prompt = check_tags(render(self.processor, [*self.messages, said]), pictures)
        inputs = self.processor(text=prompt, images=pictures or None)
        known = self._read.reusable(
            inputs, self.model.config, self.processor.image_processor.num_tokens
        )
        cache = self._read.take(known)
        stops = stop_ids(self.model, self.processor)
        with tracing(self.model, self.processor, stops) if trace else nullcontext() as record:
            out = generate(
                self.model, self.processor, inputs, max_new_tokens, how, past_key_values=cache
            )
        length = inputs["input_ids"].shape[1]
        answer, tokens = read_answer(out.sequences[0, length:].tolist(), stops, self.processor)
        routing = record.trace(before=inputs["input_ids"][0].tolist()) if trace else None
        self._read.remember(out.past_key_values, out.sequences[0], inputs)
        kept = TAG.sub("", answer)  # an answer names no pictures, whatever it says
        self.messages += [said, {"role": "assistant", "content": kept}]
        self.images = pictures
        return Answer(answer, tokens, time.perf_counter() - start, routing)
