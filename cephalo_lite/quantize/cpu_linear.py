"""4-bit matrices multiplied on a CPU: each is unpacked into the same memory as the one before.

bitsandbytes unpacks a matrix into new memory at every product. The operating system hands out
100 MB page by page, which takes longer than to unpack a matrix; so here the memory is kept. Small
matrices do not need new pages, and stay with bitsandbytes.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import nn

SMALLEST = 1 << 20  # weights of a matrix that is worth it
CHUNK = 1 << 18  # packed bytes unpacked at once: what is in between stays in the cache
_kept = threading.local()


class CpuLinear4bit(Linear4bit):
    """A `Linear4bit` that computes the same on a CPU, faster; elsewhere it is as any other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (..., in_features) → (..., out_features), in the dtype of `x`."""
        if x.device.type != "cpu" or not _regular(self.weight):
            return super().forward(x)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.weight, bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """Rows times a frozen 4-bit matrix, which is unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None):
        ctx.weight = weight
        return nn.functional.linear(x, unpack(weight, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        of_x = grad @ unpack(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def use_cpu_linear(model: nn.Module) -> int:
    """Make a model's large 4-bit layers on the CPU `CpuLinear4bit`, and return how many."""
    found = [
        module
        for module in model.modules()
        if type(module) is Linear4bit
        and module.weight.device.type == "cpu"
        and module.in_features * module.out_features >= SMALLEST
    ]
    for module in found:
        module.__class__ = CpuLinear4bit
    return len(found)


def unpack(weight: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a 4-bit matrix into memory that the next call uses again.

    Args:
        weight: bitsandbytes' `Params4bit` on a CPU.
        dtype: of the result, which is rounded from float32 as bitsandbytes does.

    Returns:
        (out_features, in_features); valid until the next call in this thread.
    """
    state, packed = weight.quant_state, weight.data.view(torch.uint8).flatten()
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    scales, pairs = scales.float()[:, None], _pairs(state.quant_type)
    out = _memory(2 * len(packed), dtype)
    for begin in range(0, len(packed), CHUNK):
        part = packed[begin : begin + CHUNK].int()
        blocks = slice(2 * begin // state.blocksize, 2 * (begin + len(part)) // state.blocksize)
        here = out[2 * begin : 2 * (begin + len(part))]
        if dtype == torch.float32:
            torch.index_select(pairs, 0, part, out=here.view(torch.int64))
            here.view(-1, state.blocksize).mul_(scales[blocks])
        else:
            exact = pairs.index_select(0, part).view(torch.float32).view(-1, state.blocksize)
            here.view(-1, state.blocksize).copy_(exact.mul_(scales[blocks]))
    return out.view(state.shape)


def forget_memory() -> None:
    """Give back the memory that this thread unpacks into; the next product takes new."""
    _kept.__dict__.clear()


def _memory(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for so many numbers, the same at every call; only a larger matrix needs a new one."""
    needed = numel * dtype.itemsize
    if getattr(_kept, "room", None) is None or len(_kept.room) < needed:
        _kept.room = None  # first, so that there are never two
        _kept.room = torch.empty(needed, dtype=torch.uint8)
    return _kept.room[:needed].view(dtype)


def _regular(weight: nn.Parameter) -> bool:
    """Whether a weight is packed as NF4 and FP4 matrices are: whole blocks, not repacked."""
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    whole = state.shape.numel() % state.blocksize == 0
    return whole and 2 * weight.numel() * weight.element_size() == state.shape.numel()


@lru_cache
def _pairs(quant_type: str) -> torch.Tensor:
    """Byte (256,) → the two float32 numbers that it stands for, as one int64."""
    code = functional.get_4bit_type(quant_type, device="cpu")  # (16,)
    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64)[:, 0]
