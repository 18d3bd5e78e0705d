"""How far numbers lie from others, from their bytes, in little memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...shards import ALIGNMENT, TensorInfo, TensorReader

NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
SLICE = 1 << 16  # elements converted to float32 at once, so that they stay in the cache


@dataclass
class Change:
    """How far a tensor lies from its reference."""

    squared_change: float = 0.0  # sum of (tensor - reference)^2
    squared_reference: float = 0.0  # sum of reference^2
    equal: bool = True  # bit by bit

    def add(self, other: "Change", weight: float = 1.0) -> None:
        """Add another part's sums, each counted `weight` times."""
        self.squared_change += weight * other.squared_change
        self.squared_reference += weight * other.squared_reference
        self.equal &= other.equal

    @property
    def relative(self) -> float:
        """Frobenius norm of the change over that of the reference."""
        if self.squared_reference == 0.0:
            return 0.0 if self.squared_change == 0.0 else float("inf")
        return (self.squared_change / self.squared_reference) ** 0.5


def measure(values: Sequence[memoryview], reference: memoryview, dtype: str) -> list[Change]:
    """Compare runs of numbers with one more in float32, a cacheful at a time.

    In numpy, because PyTorch's own threads would compete with those that read and write.

    Args:
        values: each the bytes of n numbers.
        reference: bytes of n numbers.
        dtype: safetensors' name of their dtype.

    Returns:
        The change of each of the values.
    """
    totals = [Change() for _ in values]
    theirs = np.frombuffer(reference, dtype=NUMPY_DTYPES[dtype])  # (n,)
    ours = [np.frombuffer(chunk, dtype=NUMPY_DTYPES[dtype]) for chunk in values]  # (n,) each
    with np.errstate(all="ignore"):  # NaN and infinity are reported, not warned of here
        for begin in range(0, len(theirs), SLICE):
            b = theirs[begin : begin + SLICE]
            b_float = _float32(b, dtype)
            squared_reference = _squared(b_float)
            for total, numbers, chunk in zip(totals, ours, values, strict=True):
                if chunk is reference:
                    total.add(Change(0.0, squared_reference))
                    continue
                a = numbers[begin : begin + SLICE]
                squared = _squared(_float32(a, dtype) - b_float)
                # Equal bits differ by zero even where they stand for NaN; 0 and -0 are not equal.
                equal = not squared > 0 and np.array_equal(_bits(a), _bits(b))
                total.add(Change(0.0 if equal else squared, squared_reference, equal))
    return totals


def sample_change(tensor: TensorInfo, reference: TensorInfo, reader: TensorReader) -> Change:
    """Estimate how far two tensors lie apart: four stretches of 256 KiB, or all if small.

    Args:
        tensor: one tensor.
        reference: another of its shape and dtype.
        reader: reads both.

    Returns:
        The sums scaled to the whole tensor; `equal` of what was looked at.
    """
    stretch = 1 << 18
    if tensor.nbytes <= 4 * stretch:
        starts, length = [0], tensor.nbytes
    else:
        step = (tensor.nbytes - stretch) // 3 // ALIGNMENT * ALIGNMENT
        starts, length = [0, step, 2 * step, 3 * step], stretch
    total = Change()
    ours, theirs = memoryview(bytearray(length)), memoryview(bytearray(length))
    for start in starts:
        reader.read_into(tensor, start, ours)
        reader.read_into(reference, start, theirs)
        weight = tensor.nbytes / (length * len(starts))
        total.add(measure([ours], theirs, tensor.dtype)[0], weight)
    return total


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two runs of bytes are equal."""
    if one is other or len(one) != len(other):
        return one is other
    kind = "u8" if len(one) % 8 == 0 else "u1"
    return np.array_equal(np.frombuffer(one, kind), np.frombuffer(other, kind))


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _squared(values: np.ndarray) -> float:
    return float(np.einsum("i,i->", values, values))
