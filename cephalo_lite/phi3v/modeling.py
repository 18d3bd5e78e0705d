"""Phi-3-Vision on transformers 5: Phi-3, a CLIP tower, and the image embedding between them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, CLIPVisionModel, GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel
from transformers.utils import can_return_tuple

from .checkpoints import StrictLoading
from .configuration import Phi3VConfig
from .generation import Phi3VGeneration
from .placing import place_images


class Phi3VImageEmbedding(nn.Module):
    """Crops → patch features → 2x2 merge → rows with line ends → projector → image tokens.

    Source: image_embedding_phi3_v.py of microsoft/Phi-3-vision-128k-instruct, measured.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.config = config
        width = 4 * config.vision_config.hidden_size
        config.vision_config._experts_implementation = (
            None  # a tower has no experts to choose a way for
        )
        self.img_processor = CLIPVisionModel._from_config(config.vision_config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))  # between the parts
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))  # at the end of each line
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def patch_features(self, crops: torch.Tensor) -> torch.Tensor:
        """Features (n, patches, C) of the tower's last layer but one, without the class token.

        The last layer and the final norm have weights in every checkpoint but are never computed.
        """
        tower = self.img_processor
        hidden = tower.pre_layrnorm(tower.embeddings(crops.to(self.dtype)))  # (n, 1 + patches, C)
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projector, in which pictures enter the tower."""
        return self.glb_GN.dtype

    def lines(self, blocks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Lay merged crops (rows * columns, S, S, 4C) on their grid, lines ended by `sub_GN`."""
        _, side, _, width = blocks.shape
        grid = blocks.reshape(rows, columns, side, side, width).permute(0, 2, 1, 3, 4)
        grid = grid.reshape(rows * side, columns * side, width)
        ends = self.sub_GN[0].expand(rows * side, 1, width)
        return torch.cat([grid, ends], dim=1).flatten(0, 1)  # (rows * S * (columns * S + 1), 4C)

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Image tokens of each picture.

        Args:
            pixel_values: (pictures, crops + 1, 3, s, s); crops that only pad are never computed.
            image_sizes: (pictures, 2) height and width in pixels, multiples of s.

        Returns:
            One tensor (tokens, D) per picture.
        """
        size = self.config.vision_config.image_size
        grids = [(int(h) // size, int(w) // size) for h, w in image_sizes.tolist()]
        counts = [1 + rows * columns for rows, columns in grids]
        if len(grids) != len(pixel_values) or max(counts) > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} do not hold the crops that image_sizes "
                f"{image_sizes.tolist()} speak of: pass both as the processor made them."
            )
        crops = torch.cat([image[:n] for image, n in zip(pixel_values, counts, strict=True)])
        features = self.patch_features(crops)  # (n, patches, C)
        side = size // self.config.vision_config.patch_size // 2
        blocks = features.reshape(len(crops), side, 2, side, 2, -1).transpose(2, 3).flatten(3)
        pictures = []
        for (rows, columns), part in zip(grids, blocks.split(counts), strict=True):
            overview, detail = self.lines(part[:1], 1, 1), self.lines(part[1:], rows, columns)
            parts = [detail, self.glb_GN[0], overview]
            pictures.append(
                torch.cat(parts if self.config.hd_transform_order == "sub_glb" else parts[::-1])
            )
        tokens = self.img_projection(torch.cat(pictures))
        return list(tokens.split([len(picture) for picture in pictures]))


class Phi3VModel(Phi3Model):
    """Phi-3's decoder, reading pictures where the prompt names them."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Phi3DecoderLayer", "Phi3VImageEmbedding"]

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Image tokens (tokens, D) of each picture; see `Phi3VImageEmbedding.forward`."""
        return self.vision_embed_tokens(pixel_values, image_sizes)

    def embed(self, input_ids, pixel_values=None, image_sizes=None) -> torch.Tensor:
        """Embeddings (B, T, D) of text and pictures; the caller's tensors stay as they are."""
        if torch.compiler.is_compiling() and pixel_values is None:
            return self.embed_tokens(input_ids)
        is_image = (input_ids < 0) | (input_ids == self.config.image_token_id)  # (B, T)
        if input_ids.shape[1] > 1 and int(input_ids.max()) >= self.config.vocab_size:
            raise ValueError(
                f"input_ids hold the id {int(input_ids.max())}, the model's vocabulary ends at "
                f"{self.config.vocab_size - 1}: the tokenizer is not this model's."
            )
        if pixel_values is None:
            if input_ids.shape[1] > 1 and is_image.any():
                raise ValueError(
                    f"input_ids hold {int(is_image.sum())} image tokens, but no pixel_values were "
                    "given: pass pixel_values and image_sizes along with input_ids."
                )
            return self.embed_tokens(input_ids)
        if image_sizes is None:
            raise ValueError(
                "pixel_values came without image_sizes: pass both as the processor made them."
            )
        text = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        pictures = self.get_image_features(pixel_values, image_sizes)
        tokens = place_images(input_ids, is_image, pictures)  # (image tokens, D)
        embeds = text.masked_scatter(is_image[..., None], tokens.to(text.device, text.dtype))
        return self.embed_dropout(embeds)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D); arguments as in `Phi3VForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)
        if inputs_embeds.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The prompt has {inputs_embeds.shape[1]} tokens; the model reads at most "
                f"{self.config.max_position_embeddings} (max_position_embeddings). Shorten the "
                "text, or process pictures with fewer crops (num_crops)."
            )
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class Phi3VPreTrainedModel(StrictLoading, Phi3PreTrainedModel):
    """What the dense and the mixture model share: loading, initialisation, what may be split."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = Phi3VModel._no_split_modules
    _keys_to_ignore_on_load_unexpected = [
        r"vision_embed_tokens\.wte\.weight$"
    ]  # embed_tokens again

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3VImageEmbedding):
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)


class Phi3VForCausalLM(Phi3VPreTrainedModel, Phi3VGeneration, GenerationMixin):
    r"""Phi-3-Vision with its language-model head; reads released checkpoints as they are.

    Example:
        >>> model = Phi3VForCausalLM.from_pretrained("microsoft/Phi-3-vision-128k-instruct")
        >>> inputs = processor(picture, "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n")
        >>> ids = model.generate(**inputs, max_new_tokens=64)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class = Phi3VModel

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Image tokens (tokens, D) of each picture."""
        return self.model.get_image_features(pixel_values, image_sizes)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: (B, T) text ids with `config.image_token_id` once per image token, or the
                negative ids of the 2024 processor (-n for a token of picture n of its row).
            attention_mask: (B, T), 0 where a row is padded, left or right.
            position_ids: (B, T); None counts from the length of the cache, padding included.
            past_key_values: any cache of transformers.
            inputs_embeds: (B, T, D) in the place of input_ids.
            pixel_values: (pictures, crops + 1, 3, s, s), the pictures of row 0 first, in the order
                of their image tokens.
            image_sizes: (pictures, 2) height and width in pixels.
            labels: (B, T) ids to predict, -100 where nothing is learnt.
            use_cache: return the cache, made anew where none is given.
            logits_to_keep: last n positions (or their indices) for which logits are computed; 0 is
                all.
            **kwargs: as in transformers, such as output_hidden_states.

        Raises:
            ValueError: image tokens and pictures do not match, or the prompt is too long.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        return self._output(outputs, logits, loss, attention_mask)

    def _output(self, outputs, logits, loss, attention_mask) -> CausalLMOutputWithPast:
        """Gather what `forward` returns; the mixture adds what its routers say."""
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
