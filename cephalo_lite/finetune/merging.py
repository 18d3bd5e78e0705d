"""Adapters added to the weights that they adapt, with the proof that nothing else changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .groups import parameter_groups

EXACT = 1e-5  # largest change of float32 logits, relative to the largest logit


@dataclass(frozen=True)
class MergeReport:
    """What merging did to the logits of a probe."""

    change: float  # largest difference of a logit, divided by the largest logit
    dtype: torch.dtype  # of the logits
    quantized: bool  # whether sums were rounded to 4 bits again


def merge_adapters(
    model: PeftModel, probe: Mapping[str, Any] | None = None
) -> tuple[nn.Module, MergeReport]:
    """Add the adapters to their weights, which gives the plain model back.

    Merge into the weights that the 4-bit ones were made of: load the model unquantised, put the
    adapters on it (`load_adapters`) and merge there. Sums rounded to 4 bits again are far from what
    was trained (relative change of the logits 0.34 on a random model), and warned of.

    Args:
        model: has adapters; it is used up.
        probe: inputs of the model whose logits are compared; None makes seeded random ones, with a
            picture where the model sees.

    Returns:
        The model without adapters, in eval mode, and how much its logits changed.

    Raises:
        TypeError: the model has no adapters.
        RuntimeError: float32 logits differ by more than 1e-5.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"{type(model).__name__} has no adapters to merge.")
    quantized = bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False))
    if quantized:
        warnings.warn(
            "Merging into 4-bit weights rounds every sum to 4 bits again, which is not the model "
            "that was trained. Load the model unquantised, load_adapters, and merge there.",
            stacklevel=2,
        )
    model.eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # or the sums would have the rounding of bf16
    inputs = random_probe(model.get_base_model()) if probe is None else probe
    before = _logits(model, inputs)
    merged = model.merge_and_unload(safe_merge=True)
    if isinstance(getattr(merged, "peft_config", None), dict):
        del merged.peft_config  # PEFT leaves it there, and a later adapter would warn of it
    after = _logits(merged, inputs)
    largest = before.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    change = ((after.float() - before.float()).abs().max() / largest).item()
    if after.dtype == torch.float32 and not quantized and not change <= EXACT:
        raise RuntimeError(
            f"Merging changed the logits by {change:.1e} of the largest, more than {EXACT}: the "
            "adapters are of a kind that does not add up to weights."
        )
    return merged, MergeReport(change, after.dtype, quantized)


def random_probe(model: nn.Module, tokens: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded inputs: random text, after a random picture where the model has a vision tower.

    Args:
        model: a Phi-3, Phi-3.5-MoE, Phi-3-Vision or a mixture.
        tokens: of text, per row; two rows without a picture, one with it.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    sees = "vision" in parameter_groups(model)
    image_id = model.config.image_token_id if sees else None
    highest = model.config.vocab_size if image_id is None else image_id
    ids = torch.randint(3, highest, (1 if sees else 2, tokens), generator=generator)
    if not sees:
        return {"input_ids": ids.to(model.device)}
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 2, 3, side, side, generator=generator).to(model.device, model.dtype)
    sizes = torch.tensor([[side, side]])
    with torch.no_grad():
        seen = len(model.get_image_features(pixels, sizes)[0])
    ids = torch.cat([torch.full((1, seen), image_id), ids], dim=1)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels, "image_sizes": sizes}


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    return model(**inputs).logits
