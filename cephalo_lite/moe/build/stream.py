"""Tensors from the sources to the new shards, measured and hashed on the way, chunk by chunk."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...shards import (
    ALIGNMENT,
    CHUNK_BYTES,
    TensorInfo,
    TensorReader,
    pack_header,
)

NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
SLICE = 1 << 17  # elements converted to float32 at once, so that they stay in the cache


@dataclass(frozen=True)
class Piece:
    """One tensor of the output: a bit copy of `source`, or new bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorInfo | None = None  # copied from here
    data: bytes = b""  # or these, where there is no source
    reference: TensorInfo | None = None  # what the copy is measured against: the base's matrix


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


@dataclass
class Written:
    """What is known of an output tensor after its bytes went by."""

    sha256: str  # of the bytes at the source
    change: Change  # relative to the piece's reference


def plan_shards(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Distribute pieces over shards of at most `max_bytes` (or one tensor), in their order.

    Within a shard the tensors whose size would misalign what follows them, the gates' biases, come
    last.
    """
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    return [sorted(shard, key=lambda piece: piece.nbytes % ALIGNMENT != 0) for shard in shards]


def write_shard(
    file: Path,
    pieces: Sequence[Piece],
    reader: TensorReader,
    workers: ThreadPoolExecutor,
    advance: Callable[[int], object],
) -> dict[str, Written]:
    """Write one safetensors file, chunk by chunk.

    While a chunk is being written, `workers` hash and measure it, and the next one is read.

    Args:
        file: must not exist.
        pieces: tensors in the order of their bytes.
        reader: reads the sources.
        workers: two threads.
        advance: called with the number of bytes written.

    Returns:
        Key to what its bytes were.
    """
    written = {}
    buffers = [_buffer(), _buffer()]  # one is worked on while the other is filled
    references = [_buffer(), _buffer()] if any(piece.reference for piece in pieces) else []
    with open(file, "xb") as out:
        out.write(pack_header((p.key, p.dtype, p.shape, p.nbytes) for p in pieces))
        for piece in pieces:
            digest, change = hashlib.sha256(), Change()
            if piece.source is None:
                digest.update(piece.data)
                out.write(piece.data)
                advance(piece.nbytes)
                written[piece.key] = Written(digest.hexdigest(), change)
                continue
            pending: list[Future] = []
            for number, offset in enumerate(range(0, piece.nbytes, CHUNK_BYTES)):
                length = min(CHUNK_BYTES, piece.nbytes - offset)
                chunk = buffers[number % 2][:length]
                reader.read_into(piece.source, offset, chunk)
                if piece.reference:
                    reference = references[number % 2][:length]
                    reader.read_into(piece.reference, offset, reference)
                _finish(pending, change)
                pending = [workers.submit(digest.update, chunk)]
                if piece.reference:
                    pending.append(workers.submit(measure, chunk, reference, piece.dtype))
                out.write(chunk)
                advance(length)
            _finish(pending, change)
            written[piece.key] = Written(digest.hexdigest(), change)
    return written


def measure(values: memoryview, reference: memoryview, dtype: str) -> Change:
    """Compare two runs of numbers in float32, a cacheful at a time.

    In numpy, because PyTorch's own threads would compete with those that read, hash and write.

    Args:
        values: bytes of n numbers.
        reference: bytes of n numbers.
        dtype: safetensors' name of their dtype.
    """
    total = Change()
    ours = np.frombuffer(values, dtype=NUMPY_DTYPES[dtype])  # (n,)
    theirs = np.frombuffer(reference, dtype=NUMPY_DTYPES[dtype])  # (n,)
    with np.errstate(all="ignore"):  # NaN and infinity are reported, not warned of here
        for begin in range(0, len(ours), SLICE):
            a, b = ours[begin : begin + SLICE], theirs[begin : begin + SLICE]
            equal = np.array_equal(_bits(a), _bits(b))
            b = _float32(b, dtype)
            # Equal bits differ by zero even where they stand for NaN.
            squared = 0.0 if equal else _squared(_float32(a, dtype) - b)
            total.add(Change(squared, _squared(b), equal))
    return total


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
        total.add(measure(ours, theirs, tensor.dtype), weight)
    return total


def _buffer() -> memoryview:
    return memoryview(bytearray(CHUNK_BYTES))


def _finish(pending: list[Future], change: Change) -> None:
    for future in pending:
        result = future.result()
        if isinstance(result, Change):
            change.add(result)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _squared(values: np.ndarray) -> float:
    return float(np.einsum("i,i->", values, values))
