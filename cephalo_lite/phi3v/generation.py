"""What `generate` must know about pictures, long positions and the end of an answer."""

from __future__ import annotations

from typing import Any

import torch

from .configuration import RELEASED_IMAGE_TOKEN

# </s>, <|endoftext|>, <|end|>: published files name only the first
RELEASED_STOPS = [2, 32000, 32007]


class Phi3VGeneration:
    """Mix-in before `GenerationMixin` for the dense model and the mixture."""

    def generate(self, inputs=None, *args, **kwargs):
        """As in transformers; padding on the right, where answers begin, is moved to the left."""
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        fits = ids is not None and mask is not None and mask.shape == ids.shape
        if fits and not mask[:, -1].all():
            order = mask.argsort(dim=-1, stable=True)
            kwargs.pop("input_ids", None)
            inputs, kwargs["attention_mask"] = ids.gather(1, order), mask.gather(1, order)
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        named = kwargs.get("eos_token_id") is not None  # whoever names a stop in the call means it
        config, rest = super()._prepare_generation_config(generation_config, **kwargs)
        image_token = self.config.image_token_id
        if config.eos_token_id in (2, [2]) and image_token == RELEASED_IMAGE_TOKEN and not named:
            config.eos_token_id = list(RELEASED_STOPS)
        if config.prompt_lookup_num_tokens is not None and image_token is not None:
            # guesses copied from the prompt must not show pictures
            config.suppress_tokens = [*(config.suppress_tokens or []), image_token]
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
        `original_max_position_embeddings`: it is dropped and the text read again with the long
        ones.
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
        if unread is None or unread.shape[1] == 1 or not self._is_image(unread).any():
            return inputs
        pictures = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        if is_first_iteration and (pixel_values is None or unread.shape == input_ids.shape):
            return inputs | pictures
        return inputs | self._unread(input_ids, unread, **pictures, strict=is_first_iteration)

    def _unread(self, input_ids, unread, pixel_values, image_sizes, strict) -> dict[str, Any]:
        """Inputs for the last ids of each row (`unread`); pictures before them are in the cache.

        Image tokens beyond the given pictures are an error if `strict`; else the model (or, in
        assisted generation, its assistant) has written them, and they are embedded like any other
        token.
        """
        sizes = image_sizes if image_sizes is not None else unread.new_zeros(0, 2)
        order, rooms, first = [], [], 0
        ids = unread.clone()
        for row, whole in enumerate(input_ids):
            read, tags = whole[: len(whole) - unread.shape[1]], unread[row].clamp(max=0).neg()
            total = self._pictures_in(whole[None], sizes[first:])
            shown = range(self._pictures_in(read[None], sizes[first:]), total)
            room = sum(self._tokens_of(sizes[first + shown.start : first + total]))
            if tags.any():  # 2024 ids may show any picture of the row: number those shown anew
                shown = [n - 1 for n in tags.unique().tolist() if 0 < n <= len(sizes) - first]
                room = int(tags.count_nonzero())
                for new, n in enumerate(shown, start=1):
                    ids[row, tags == n + 1] = -new
            order += [first + n for n in shown]
            rooms.append(room)
            first += total
        pictures = {"pixel_values": None, "image_sizes": None}
        if order:
            pictures = {"pixel_values": pixel_values[order], "image_sizes": sizes[order]}
        is_image = self._is_image(ids)
        written = is_image & (is_image.cumsum(-1) > torch.tensor(rooms, device=ids.device)[:, None])
        if strict or not written.any():
            return {"input_ids": ids, **pictures}
        embeds = self.model.embed(ids.masked_fill(written, 0), **pictures)
        embeds[written] = self.get_input_embeddings()(ids[written].clamp(min=0)).to(embeds.dtype)
        nothing = dict.fromkeys(("input_ids", "pixel_values", "image_sizes"))
        return {**nothing, "inputs_embeds": embeds}

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
        if pixels is not None and sizes is None:
            raise ValueError(
                "pixel_values came without image_sizes: pass both as the processor made them."
            )
        rows = input_ids
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
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
