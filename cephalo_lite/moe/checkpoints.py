"""The published Cephalo layout: names of a mixture's weights on disk and in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from ..phi3v.checkpoints import tower_renaming

PARTS = "(embed_tokens|layers|norm|vision_embed_tokens)"


class InnerHead(ConversionOps):
    """Of the two heads on disk take the wrapped model's, and on saving write that one only.

    The published class wraps the dense model and has a random `lm_head.weight` of its own that is
    never used. It bears the name of our head; left to itself, transformers 5 swaps the two without
    a word.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """From {pattern on disk: [tensor]} to {name in memory: tensor}; the first pattern wins."""
        found = next(input_dict[pattern] for pattern in source_patterns if pattern in input_dict)
        return {target_patterns[0]: found[0] if isinstance(found, list) else found}

    @property
    def reverse_op(self) -> InnerHead:
        """Writing takes the first name too."""
        return InnerHead()


def register_published_names() -> None:
    """Map published keys (one more `model.` before all, experts one by one) to ours and back."""
    mapping = [
        WeightRenaming(r"^model\.model\.\1", rf"model\.{PARTS}"),
        *tower_renaming(),
        WeightConverter(
            [r"^model\.lm_head\.weight", r"^lm_head\.weight"],
            "lm_head.weight",
            operations=[InnerHead()],
        ),
        WeightConverter(
            ".experts.*.gate_up_proj.weight",
            ".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0)],
        ),
        WeightConverter(
            ".experts.*.down_proj.weight",
            ".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping("phi3_v_moe", mapping, overwrite=True)
