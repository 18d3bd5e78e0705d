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

    While a chunk is being written, `workers` hash it, measure it, and read the next one.

    Args:
        file: must not exist.
        pieces: tensors in the order of their bytes.
        reader: reads the sources.
        workers: three threads.
        advance: called with the number of bytes written.

    Returns:
        Key to what its bytes were.
    """
    slots = [_Slot(), _Slot()]  # one is worked on while the other is filled
    chunks = [(p, offset) for p in pieces for offset in range(0, max(p.nbytes, 1), CHUNK_BYTES)]
    digests = {piece.key: hashlib.sha256() for piece in pieces}
    changes = {piece.key: Change() for piece in pieces}
    pending: list[Future] = []
    with open(file, "xb") as out:
        out.write(pack_header((p.key, p.dtype, p.shape, p.nbytes) for p in pieces))
        coming = workers.submit(slots[0].fill, *chunks[0], reader)
        for number, (piece, _) in enumerate(chunks):
            chunk, reference = coming.result()
            _finish(pending)  # the other slot is free
            if number + 1 < len(chunks):
                coming = workers.submit(slots[(number + 1) % 2].fill, *chunks[number + 1], reader)
            pending = [workers.submit(digests[piece.key].update, chunk)]
            if reference is not None:
                change = changes[piece.key]
                pending.append(workers.submit(_measure_into, change, chunk, reference, piece.dtype))
            out.write(chunk)
            advance(len(chunk))
        _finish(pending)
    return {key: Written(digests[key].hexdigest(), changes[key]) for key in digests}


class _Slot:
    """Room for a chunk, and for the same chunk of what it is measured against."""

    def __init__(self) -> None:
        self.chunk = memoryview(bytearray(CHUNK_BYTES))
        self.reference = memoryview(bytearray(CHUNK_BYTES))

    def fill(
        self, piece: Piece, offset: int, reader: TensorReader
    ) -> tuple[memoryview, memoryview | None]:
        """Read a piece's bytes from `offset` on, and its reference's if it has one."""
        if piece.source is None:
            return memoryview(piece.data)[offset : offset + CHUNK_BYTES], None
        length = min(CHUNK_BYTES, piece.nbytes - offset)
        reader.read_into(piece.source, offset, self.chunk[:length])
        if piece.reference is None:
            return self.chunk[:length], None
        if piece.reference == piece.source:  # the base is one of the experts
            return self.chunk[:length], self.chunk[:length]
        reader.read_into(piece.reference, offset, self.reference[:length])
        return self.chunk[:length], self.reference[:length]


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


def _measure_into(change: Change, values: memoryview, reference: memoryview, dtype: str) -> None:
    change.add(measure(values, reference, dtype))


def _finish(pending: list[Future]) -> None:
    for future in pending:
        future.result()


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _squared(values: np.ndarray) -> float:
    return float(np.einsum("i,i->", values, values))
