"""The configuration of Phi-3-Vision: Phi-3's fields, image fields, and the vision tower."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, Phi3Config

RELEASED_VISION_TOWER = {  # CLIP ViT-L/14-336, the tower of every released Phi-3-Vision
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
RELEASED_IMAGE_TOKEN = 32044
LONG_ROPE_NAMES = (
    "su",
    "longrope",
    "yarn",
)  # published names of position scaling by short and long factors


@strict
class Phi3VConfig(Phi3Config):
    """Configuration of a Phi-3-Vision model, with the fields that the published checkpoints carry.

    Args (beyond those of `transformers.Phi3Config`):
        vision_config: the CLIP tower, a dict or `CLIPVisionConfig`; None is ViT-L/14-336 as
            released. Pictures are cut into crops of `vision_config.image_size` pixels.
        img_processor: published description of the tower; only informative here.
        embd_layer: published description of the projector; `hd_transform_order` is
            "sub_glb" (released: the detailed crops come before the global one) or "glb_sub".
        image_token_id: id that stands for one image token in `input_ids`: that of `<|image|>` in
            the tokenizer; None is 32044, as released, or no such id in a smaller vocabulary.
        sliding_window: published as the number W of earlier tokens that a token sees beside itself.
            In memory it is what transformers' masks and caches count, W + 1 tokens with the token
            itself, or None where W leaves nothing out (the released 131072); `to_dict` writes W
            back.

    `rope_scaling` may carry the published types "su" and "yarn" or the newer name "longrope"; the
    name is kept, and `to_dict` writes `rope_theta` and `rope_scaling` back as they were published.

    Source: config.json of microsoft/Phi-3-vision-128k-instruct.
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    sliding_window: int | None = None
    eos_token_id: int | list[int] | None = 2
    vision_config: dict | CLIPVisionConfig | None = None
    img_processor: dict | None = None
    embd_layer: dict | str | None = None
    image_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.image_token_id is None and self.vocab_size > RELEASED_IMAGE_TOKEN:
            self.image_token_id = RELEASED_IMAGE_TOKEN
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**RELEASED_VISION_TOWER)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        tower = self.vision_config
        patches = tower.image_size // tower.patch_size
        if patches % 2:
            raise ValueError(
                f"vision_config: {tower.image_size} pixels make {patches} patches of "
                f"{tower.patch_size} a side; the 2x2 merge needs an even number."
            )
        if self.img_processor is None:
            self.img_processor = {
                "name": "clip_vision_model",
                "model_name": "openai/clip-vit-large-patch14-336",
                "image_dim_out": tower.hidden_size,
                "num_img_tokens": self.image_tokens_per_crop,
            }
        if not isinstance(self.embd_layer, dict):
            self.embd_layer = {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            }
        self._unlimited_window = (
            None  # a published window that leaves nothing out, to be written back
        )
        if self.sliding_window is not None:
            if self.sliding_window >= self.max_position_embeddings:
                self._unlimited_window, self.sliding_window = self.sliding_window, None
            else:
                self.sliding_window += 1
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Read a config.json but for its attention back end: the machine and the caller decide."""
        wishes = ("attn_implementation", "_attn_implementation")
        fields = {key: value for key, value in config_dict.items() if key not in wishes}
        return super().from_dict(fields, **kwargs)

    @property
    def image_tokens_per_crop(self) -> int:
        """Image tokens of one crop after the 2x2 merge: 144 for the released tower."""
        tower = self.vision_config
        return (tower.image_size // tower.patch_size // 2) ** 2

    @property
    def hd_transform_order(self) -> str:
        """Order of the parts of a picture: "sub_glb" or "glb_sub"."""
        return self.embd_layer.get("hd_transform_order", "sub_glb")

    def convert_rope_params_to_dict(self, **kwargs):
        """Read the published `rope_scaling`; transformers knows its types as one, "longrope"."""
        published = kwargs.get("rope_scaling") or self.rope_parameters
        if published:
            kind = published.get("type") or published.get("rope_type") or "default"
            scaling = {**published, "type": kind, "rope_type": kind}
            if kind in LONG_ROPE_NAMES:
                scaling["rope_type"] = "longrope"
                scaling["original_max_position_embeddings"] = self.original_max_position_embeddings
                ratio = self.max_position_embeddings / self.original_max_position_embeddings
                scaling["factor"] = ratio
                if kind == "yarn":  # same frequencies, another scale of cos and sin
                    scaling["attention_factor"] = 0.1 * math.log(ratio) + 1 if ratio > 1 else 1.0
            elif kind != "default":
                raise ValueError(f"rope_scaling: type {kind!r} is not one of {LONG_ROPE_NAMES}.")
            kwargs["rope_scaling"] = scaling
        return super().convert_rope_params_to_dict(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as published: `rope_theta`, `rope_scaling`, `sliding_window`."""
        out = super().to_dict()
        window = out.pop("_unlimited_window", None)
        out["sliding_window"] = window if self.sliding_window is None else self.sliding_window - 1
        rope = out.pop("rope_parameters", None) or {}
        out["rope_theta"] = rope.get("rope_theta", 10000.0)
        out["rope_scaling"] = None
        if rope.get("rope_type") == "longrope":
            factors = ("short_factor", "long_factor")
            name = rope.get("type", "longrope")
            out["rope_scaling"] = {"type": name, **{key: rope[key] for key in factors}}
        return out
