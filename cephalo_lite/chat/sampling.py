"""How the next token is chosen, and one way to generate for all who ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..loading import pad_id, stop_ids
from ..phi3v import Phi3VProcessor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; by default it is always the most likely one."""

    temperature: float = 0.0  # 0 takes the most likely token; higher is bolder
    top_p: float = 1.0  # draw from the most likely tokens that have this much probability together
    top_k: int = 0  # draw from this many tokens at most; 0 is all
    repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
    seed: int | None = (
        None  # the same seed draws the same tokens; None goes on in torch's random stream
    )

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature}: it must be 0 (most likely token) or more."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must be above 0 and at most 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: it must be 0 (all tokens) or more.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: it must be above 0.")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "top_p and top_k choose among drawn tokens: set temperature above 0 as well."
            )

    def settings(self) -> dict[str, Any]:
        """The same for transformers' `GenerationConfig`."""
        draw = {
            "do_sample": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 50,
        }  # unused when greedy
        if self.temperature:
            draw = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            draw["top_k"] = self.top_k
        return {**draw, "repetition_penalty": self.repetition_penalty, "num_beams": 1}

    @contextmanager
    def random(self, device: torch.device) -> Iterator[None]:
        """Draw from the seed inside, and leave torch's random numbers outside as they were."""
        if self.seed is None or not self.temperature:
            yield
            return
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            yield


@contextmanager
def answering(model) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def generate(
    model,
    processor: Phi3VProcessor,
    inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    **more: Any,
):
    """Let the model write.

    Args:
        model: dense or a mixture.
        processor: knows where answers end.
        inputs: what the processor made, padded at the left; on any device.
        max_new_tokens: at most so many per row.
        sampling: how tokens are chosen.
        more: passed on to `generate`: a streamer, stopping criteria, a cache.

    Returns:
        Transformers' output with `sequences` (B, T + new) and `past_key_values`.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, processor),
        pad_token_id=pad_id(model, processor),
        use_cache=True,
        return_dict_in_generate=True,
        **sampling.settings(),
    )
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    with answering(model), sampling.random(model.device):
        return model.generate(**inputs, generation_config=config, **more)


def check_length(max_new_tokens: int) -> None:
    """Raise ValueError where nothing could be written."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: allow at least one token.")


def read_answer(ids: list[int], stops: list[int], processor: Phi3VProcessor) -> tuple[str, int]:
    """Text and number of tokens of an answer; what follows its first stop is filling.

    Args:
        ids: generated ids of one row.
        stops: ids that end an answer.
        processor: its tokenizer reads them.
    """
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text = processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text.strip(), len(ids) if end is None else end + 1
