"""Which weights are packed into 4 bits, and how many bytes they take.

NF4 (QLoRA, arXiv 2305.14314): blocks of 64 weights share an 8-bit scale, blocks of 256 scales share
a float32 one: 0.5 + 1/64 + 4/16384 = 0.51587 bytes a weight.
"""

from __future__ import annotations

import math

import torch
from torch import nn

# Parts of a dotted name whose weights stay in half precision. All are small, or are looked up
# rather than multiplied by; a router's rounding would send tokens to other experts; the vision
# tower and the projector are 2 % of a vision mixture, and every picture goes through them.
KEPT = frozenset(
    ("embed_tokens", "lm_head", "gate", "router", "gating_layer", "vision_embed_tokens")
)
# The same for transformers, which compares ends of names, and beginnings, but no middle parts.
SKIPPED = ("lm_head", "gate", "router", "gating_layer", "model.vision_embed_tokens")

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale of their own
TABLES = 4 * (16 + 256 + 1)  # the values that 4 and 8 bits stand for, and an offset, per matrix


def is_packed(name: str, ndim: int) -> bool:
    """Whether a weight belongs in 4 bits: a matrix, or a stack of them, that is not kept.

    Args:
        name: dotted name, published or in memory, of the model or of the model with adapters.
        ndim: dimensions of the unpacked weight.
    """
    return ndim >= 2 and not KEPT & set(name.split("."))


def nf4_bytes(numel: int) -> int:
    """Bytes that a matrix of `numel` weights takes in NF4 with double quantisation."""
    scales = math.ceil(numel / BLOCK)
    return math.ceil(numel / 2) + scales + 4 * math.ceil(scales / SCALES) + TABLES


def is_4bit(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds this parameter packed; told by name, without importing it."""
    return type(parameter).__name__ == "Params4bit"


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers take, what 4-bit weights need to unpack included.

    Storage that several tensors share counts once.
    """
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += quantisation_tensors(parameter)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def quantisation_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a packed weight; empty for a plain one."""
    state = getattr(parameter, "quant_state", None) if is_4bit(parameter) else None
    if state is None:
        return []
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def unpacked_numel(parameter: nn.Parameter) -> int:
    """Number of weights, also of a packed one, whose own `numel` counts bytes."""
    state = getattr(parameter, "quant_state", None) if is_4bit(parameter) else None
    return parameter.numel() if state is None else math.prod(state.shape)
