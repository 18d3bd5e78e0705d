"""One matrix on the disk → its NF4 form, a few rows at a time."""

from __future__ import annotations

import math

import torch

from ..shards import CHUNK_BYTES, TORCH_DTYPES, TensorInfo, TensorReader
from .sizes import BLOCK, SCALES


def pack(
    matrix: TensorInfo, reader: TensorReader, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Quantise a matrix while it is read; bit for bit what quantising it as a whole gives.

    Blocks of 64 weights are independent of one another, so 16 MB of rows are enough at a time. Only
    the second quantisation, that of the scales, needs them all: one float for 64 weights.

    Args:
        matrix: where it lies; 2-D, in float32, float16 or bfloat16.
        reader: reads it.
        device: where it is quantised.

    Returns:
        What bitsandbytes writes for a `Linear4bit`, on the CPU: "weight" (numel / 2, 1) and
        "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4", ...

    Raises:
        ValueError: it is no matrix, or in a dtype that cannot be quantised.

    Source: `quantize_4bit` of bitsandbytes.
    """
    from bitsandbytes import functional

    dtype = TORCH_DTYPES.get(matrix.dtype)
    if len(matrix.shape) != 2 or dtype in (None, torch.float64):
        raise ValueError(
            f"a tensor of shape {list(matrix.shape)} and dtype {matrix.dtype} in {matrix.file} "
            "cannot be quantised: give the checkpoint as it was published, in bfloat16, float16 or "
            "float32."
        )
    rows, columns = matrix.shape
    row_bytes = columns * dtype.itemsize
    step = BLOCK // math.gcd(columns, BLOCK)  # rows that end at the end of a block
    chunk = max(1, CHUNK_BYTES // (row_bytes * step)) * step
    buffer = bytearray(min(chunk, rows) * row_bytes)
    packed, scales = [], []
    for first in range(0, rows, chunk):
        view = memoryview(buffer)[: min(chunk, rows - first) * row_bytes]
        reader.read_into(matrix, first * row_bytes, view)
        part = torch.frombuffer(view, dtype=dtype).view(-1, columns).to(device)
        four_bits, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
        packed.append(four_bits.cpu())
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=SCALES)
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(matrix.shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    beside = {f"weight.{name}": t.cpu() for name, t in state.as_dict(packed=True).items()}
    return {"weight": torch.cat(packed), **beside}
