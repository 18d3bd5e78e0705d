"""What a conversation has read already, so that the next turn need not read it again."""

from __future__ import annotations

from typing import Any

import torch


class ReadSoFar:
    """A cache, and the tokens and pictures that it holds.

    A longer prompt seldom extends the earlier ids exactly: an answer may be cut into other tokens
    when it is read than when it was written. What begins alike is kept, the rest is dropped.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Drop everything."""
        self.cache: Any = None
        self.ids = torch.zeros(0, dtype=torch.long)  # (T,)
        self.pixels = self.sizes = None

    def remember(self, cache: Any, sequence: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Keep what a call of `generate` left.

        Args:
            cache: its `past_key_values`.
            sequence: (T,) ids of prompt and answer; the last was written, but not read.
            inputs: of the prompt, with the pictures.
        """
        self.cache = cache
        self.ids = sequence[: cache.get_seq_length()].cpu()
        self.pixels, self.sizes = inputs.get("pixel_values"), inputs.get("image_sizes")

    def reusable(self, inputs: dict[str, torch.Tensor], config, image_tokens) -> int:
        """Tokens at the beginning of a new prompt (1, T) that the cache may stand for.

        At least one token is left to be read, and no picture is cut or taken for another.

        Args:
            inputs: of the new prompt.
            config: of the model.
            image_tokens: function that counts the tokens of a picture from its rows and columns of
                crops.
        """
        ids = inputs["input_ids"][0].cpu()
        if self.cache is None or self._other_positions(len(ids), config):
            return 0
        room = min(len(self.ids), len(ids) - 1)
        differs = (self.ids[:room] != ids[:room]).nonzero()
        same = int(differs[0]) if len(differs) else room
        if inputs.get("pixel_values") is None:
            return same
        places = (ids == config.image_token_id).nonzero()[:, 0].tolist()
        size, first = config.vision_config.image_size, 0
        for number, (height, width) in enumerate(inputs["image_sizes"].tolist()):
            tokens = image_tokens(height // size, width // size)
            start, end = places[first], places[first + tokens - 1] + 1
            first += tokens
            if end > same or not self._has(number, inputs):
                return min(same, start)
        return same

    def take(self, tokens: int) -> Any:
        """The cache of the first tokens; None where there is none, or it cannot be shortened."""
        cache, held = self.cache, len(self.ids)
        self.forget()  # generating changes the cache: it is valid again when remembered
        if cache is None or not tokens:
            return None
        if tokens < held:
            try:
                cache.crop(tokens - held)
            except (RuntimeError, NotImplementedError):  # a sliding window has lost its past
                return None
        return cache if cache.get_seq_length() == tokens else None

    def _has(self, number: int, inputs: dict[str, torch.Tensor]) -> bool:
        if self.pixels is None or number >= len(self.pixels):
            return False
        own, new = self.pixels[number], inputs["pixel_values"][number]
        return torch.equal(self.sizes[number], inputs["image_sizes"][number]) and torch.equal(
            own, new
        )

    def _other_positions(self, length: int, config) -> bool:
        """Whether the cache has long position factors, and the prompt needs short ones."""
        limit = config.original_max_position_embeddings
        longrope = config.rope_parameters["rope_type"] == "longrope"
        return longrope and len(self.ids) > limit >= length
