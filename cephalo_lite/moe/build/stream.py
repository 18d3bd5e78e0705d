"""Tensors from the sources to the new shards, measured on the way and read back, by chunks."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from ...shards import ALIGNMENT, TensorInfo, TensorReader, pack_header, read_header, sync
from .change import Change, measure, same_bytes

CHUNK_BYTES = 4 << 20  # what is held of each tensor at a moment


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
class Written:
    """What is known of an output tensor after its bytes went by."""

    change: Change = field(default_factory=Change)  # relative to the piece's reference
    twins: list[str] = field(default_factory=list)  # bit-equal ones before it in its group


def together(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Put the experts' pieces of one matrix in one list; every other piece is alone in its own."""
    return [list(same) for _, same in groupby(pieces, key=lambda p: p.reference or p.key)]


def plan_shards(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Distribute pieces over shards of at most `max_bytes`, in their order.

    All experts' pieces of one matrix lie in one shard, even if that makes it larger. Within a shard
    the tensors whose size would misalign what follows them, the gates' biases, come last.
    """
    shards: list[list[Piece]] = [[]]
    filled = 0
    for group in together(pieces):
        size = sum(piece.nbytes for piece in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return [sorted(shard, key=lambda piece: piece.nbytes % ALIGNMENT != 0) for shard in shards]


def write_shard(
    file: Path,
    pieces: Sequence[Piece],
    reader: TensorReader,
    workers: ThreadPoolExecutor,
    advance: Callable[[int], object],
) -> dict[str, Written]:
    """Write one safetensors file, chunk by chunk, all experts of a matrix side by side.

    While chunks are being written, `workers` measure them and read the next ones.

    Args:
        file: must not exist.
        pieces: tensors in the order of their bytes.
        reader: reads the sources.
        workers: two threads.
        advance: called with the number of bytes written.

    Returns:
        Key to what its bytes were.
    """
    header = pack_header((p.key, p.dtype, p.shape, p.nbytes) for p in pieces)
    starts, end = {}, len(header)
    for piece in pieces:
        starts[piece.key], end = end, end + piece.nbytes
    slots = [_Slot(), _Slot()]  # one is worked on while the other is filled
    jobs = [
        (group, offset)
        for group in together(pieces)
        for offset in range(0, max(group[0].nbytes, 1), CHUNK_BYTES)
    ]
    written = {
        piece.key: Written(twins=[other.key for other in group[:number]])
        for group in together(pieces)
        for number, piece in enumerate(group)
    }
    measured: Future | None = None
    with open(file, "xb") as out:
        out.write(header)
        coming = workers.submit(slots[0].fill, *jobs[0], reader)
        for number, (group, offset) in enumerate(jobs):
            chunks, reference = coming.result()
            if measured is not None:
                measured.result()  # the other slot is free
            if number + 1 < len(jobs):
                slot = slots[(number + 1) % 2]
                coming = workers.submit(slot.fill, *jobs[number + 1], reader)
            measured = workers.submit(_look_at, group, chunks, reference, written)
            for piece, chunk in zip(group, chunks, strict=True):
                out.seek(starts[piece.key] + offset)
                out.write(chunk)
                advance(len(chunk))
        measured.result()
    return written


class _Slot:
    """Room for a chunk of each tensor that is needed at the same time."""

    def __init__(self) -> None:
        self.rooms: list[memoryview] = []

    def fill(
        self, group: Sequence[Piece], offset: int, reader: TensorReader
    ) -> tuple[list[memoryview], memoryview | None]:
        """Read the bytes from `offset` on of each piece and of their reference if they have one.

        What several of them share, such as a base that is an expert as well, is read once.
        """
        found: dict[TensorInfo, memoryview] = {}

        def read(tensor: TensorInfo) -> memoryview:
            if tensor not in found:
                if len(self.rooms) == len(found):
                    self.rooms.append(memoryview(bytearray(CHUNK_BYTES)))
                room = self.rooms[len(found)][: min(CHUNK_BYTES, tensor.nbytes - offset)]
                reader.read_into(tensor, offset, room)
                found[tensor] = room
            return found[tensor]

        if group[0].source is None:
            return [memoryview(group[0].data)[offset : offset + CHUNK_BYTES]], None
        reference = group[0].reference
        return [read(p.source) for p in group], None if reference is None else read(reference)


def _look_at(
    group: Sequence[Piece],
    chunks: Sequence[memoryview],
    reference: memoryview | None,
    written: dict[str, Written],
) -> None:
    """Add to what is known of a group's pieces what these chunks of them tell."""
    if reference is None:
        return
    chunk_of = {piece.key: chunk for piece, chunk in zip(group, chunks, strict=True)}
    for piece, change in zip(group, measure(chunks, reference, group[0].dtype), strict=True):
        known, chunk = written[piece.key], chunk_of[piece.key]
        known.change.add(change)
        known.twins = [key for key in known.twins if same_bytes(chunk, chunk_of[key])]


def verify_shard(file: Path, pieces: Sequence[Piece]) -> None:
    """Bring a written shard to the disk, read it back and compare every tensor with its source.

    Args:
        file: the shard.
        pieces: what was to be written.

    Raises:
        OSError: names, dtypes, shapes or bytes differ from what was to be written.
    """
    sync(file)
    tensors = read_header(file)
    if tensors.keys() != {piece.key for piece in pieces}:
        raise OSError(f"{file.name} reads back with other tensors than were written")
    back, slot = memoryview(bytearray(CHUNK_BYTES)), _Slot()
    with TensorReader() as reader:
        for piece in pieces:
            tensor = tensors[piece.key]
            alike = (tensor.dtype, tensor.shape) == (piece.dtype, piece.shape)
            for offset in range(0, piece.nbytes if alike else 0, CHUNK_BYTES):
                [chunk] = slot.fill([replace(piece, reference=None)], offset, reader)[0]
                reader.read_into(tensor, offset, back[: len(chunk)])
                alike &= same_bytes(back[: len(chunk)], chunk)
            if not alike:
                raise OSError(
                    f"{piece.key} reads back from {file.name} with other bytes than its source "
                    "has: check the disk and build again"
                )
