"""What `generate` must know about pictures, long positions and the end of an answer."""

from __future__ import annotations

from typing import Any

import torch

RELEASED_VOCABULARY = 32064
RELEASED_STOPS = [2, 32000, 32007]  # </s>, <|endoftext|>, <|end|>: published files name only the first


class Phi3VGeneration:
    """Mix-in before `GenerationMixin` for the dense model and the mixture."""

    def _prepare_generation_config(self, generation_config, **kwargs):
        config, rest = super()._prepare_generation_config(generation_config, **kwargs)
        if config.eos_token_id in (2, [2]) and self.config.vocab_size == RELEASED_VOCABULARY:
            config.eos_token_id = list(RELEASED_STOPS)
        return config, rest

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        pixel_values=None,
        image_sizes=None,
        **kwargs,
    ) -> dict[str, Any]:
        """Pass pictures on with the tokens that show them, and only then.

        A cache filled with the short position factors is of no use once the text outgrows
        `original_max_position_embeddings`: it is dropped and the text read again with the long ones.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The text has grown to {input_ids.shape[1]} tokens; the model reads at most "
                f"{self.config.max_position_embeddings} (max_position_embeddings)."
            )
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if cached and self._outgrows_cache(input_ids, attention_mask, int(cached)):
            past_key_values, next_sequence_length, cached = None, None, 0
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        unread = inputs.get("input_ids")
        if pixel_values is None or unread is None or unread.shape[1] == 1:
            return inputs
        if self._is_image(unread).any():
            seen = self._pictures_in(input_ids[:, : input_ids.shape[1] - unread.shape[1]], image_sizes)
            if seen and len(input_ids) > 1:
                raise ValueError("A cache that holds pictures can be continued for one row only.")
            inputs["pixel_values"], inputs["image_sizes"] = pixel_values[seen:], image_sizes[seen:]
        return inputs

    def _is_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids < 0) | (input_ids == self.config.image_token_id)

    def _outgrows_cache(self, input_ids, attention_mask, cached: int) -> bool:
        limit = self.config.original_max_position_embeddings
        if self.config.rope_parameters["rope_type"] != "longrope" or input_ids.shape[1] <= limit:
            return False
        if attention_mask is None or attention_mask.ndim != 2:
            return cached <= limit
        longest = int(attention_mask.sum(-1).max())
        return longest > limit and longest - (input_ids.shape[1] - cached) <= limit

    def _tokens_of(self, image_sizes: torch.Tensor) -> list[int]:
        """Image tokens of each picture."""
        size = self.config.vision_config.image_size
        per_crop = self.config.image_tokens_per_crop
        side = int(per_crop**0.5)
        grids = [(int(h) // size, int(w) // size) for h, w in image_sizes.tolist()]
        return [(h * w + 1) * per_crop + 1 + (h + 1) * side for h, w in grids]

    def _pictures_in(self, input_ids: torch.Tensor, image_sizes: torch.Tensor) -> int:
        """How many of the first pictures these ids show whole."""
        if (input_ids < 0).any():  # 2024 ids name their picture
            return int(-input_ids.min())
        left, shown = int(self._is_image(input_ids).sum()), 0
        for tokens in self._tokens_of(image_sizes):
            left -= tokens
            shown += left >= 0
        return shown

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeat each row for its beams, with all the pictures of that row."""
        pixels = model_kwargs.pop("pixel_values", None)
        sizes = model_kwargs.pop("image_sizes", None)
        rows = input_ids
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            if expand_size > 1:
                order, first = [], 0
                for row in rows:
                    count = self._pictures_in(row[None], sizes[first:])
                    order += list(range(first, first + count)) * expand_size
                    first += count
                pixels, sizes = pixels[order], sizes[order]
            model_kwargs.update(pixel_values=pixels, image_sizes=sizes)
        return input_ids, model_kwargs
