"""Tensors from the sources to the new shards, measured on the way and read back, by chunks."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from itertools import groupby
from pathlib import Path

from ...shards import ALIGNMENT, TensorInfo, TensorReader, pack_header, read_header
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
    advance: Callable[[int], object],
    verify: bool = True,
) -> dict[str, Written]:
    """Write one safetensors file, chunk by chunk, all experts of a matrix side by side.

    While chunks are being written, other threads measure them, read those before them back and
    compare them with what came from the sources, and read the next ones.

    Args:
        file: must not exist.
        pieces: tensors in the order of their bytes.
        reader: reads the sources.
        advance: called with the number of bytes written.
        verify: read back, through the file's own header, as whoever loads it will.

    Returns:
        Key to what its bytes were.

    Raises:
        OSError: what was written does not read back, or there is no space left.
    """
    header = pack_header((p.key, p.dtype, p.shape, p.nbytes) for p in pieces)
    groups = together(pieces)
    jobs = [(g, at) for g in groups for at in range(0, max(g[0].nbytes, 1), CHUNK_BYTES)]
    written = {
        piece.key: Written(twins=[other.key for other in group[:number]])
        for group in groups
        for number, piece in enumerate(group)
    }
    slots = [_Slot(), _Slot(), _Slot()]  # to be filled, written, and read back at the same time
    with (
        open(file, "xb", buffering=0) as out,
        TensorReader() as back,
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as measuring,
        ThreadPoolExecutor(1) as checking,
    ):
        _write(out, header)
        out.truncate(len(header) + sum(piece.nbytes for piece in pieces))
        places = _read_places(file, pieces)
        coming = reading.submit(slots[0].fill, *jobs[0], reader)
        for number, (group, offset) in enumerate(jobs):
            chunks, reference = coming.result()
            if number + 1 < len(jobs):
                free = slots[(number + 1) % 3]
                free.wait()
                coming = reading.submit(free.fill, *jobs[number + 1], reader)
            slot = slots[number % 3]
            slot.work.append(measuring.submit(_look_at, group, chunks, reference, written))
            for piece, chunk in zip(group, chunks, strict=True):
                out.seek(places[piece.key].start + offset)
                _write(out, chunk)
                advance(len(chunk))
            if verify:
                check = (group, offset, chunks, places, back, slot.back)
                slot.work.append(checking.submit(_compare, *check))
        for slot in slots:
            slot.wait()
    return written


def _read_places(file: Path, pieces: Sequence[Piece]) -> dict[str, TensorInfo]:
    """Where a reader of the file will look for each piece."""
    places = read_header(file)
    wanted = {piece.key: (piece.dtype, piece.shape, piece.nbytes) for piece in pieces}
    found = {key: (place.dtype, place.shape, place.nbytes) for key, place in places.items()}
    if found != wanted:
        raise OSError(f"{file.name} reads back with other tensors than were written")
    return places


def _compare(
    group: Sequence[Piece],
    offset: int,
    chunks: Sequence[memoryview],
    places: Mapping[str, TensorInfo],
    reader: TensorReader,
    room: memoryview,
) -> None:
    """Read back what was written of a group, and compare it with what came from the sources."""
    for piece, chunk in zip(group, chunks, strict=True):
        back = room[: len(chunk)]
        reader.read_into(places[piece.key], offset, back)
        if not same_bytes(back, chunk):
            raise OSError(
                f"{piece.key} reads back from {places[piece.key].file.name} with other bytes than "
                "its source has: check the disk and build again"
            )


def _write(out: FileIO, data: bytes | memoryview) -> None:
    """Write all of it; one call may write a part."""
    data = memoryview(data)
    while len(data):
        data = data[out.write(data) :]


class _Slot:
    """Room for a chunk of each tensor that is needed at the same time."""

    def __init__(self) -> None:
        self.rooms: list[memoryview] = []
        self.back = memoryview(bytearray(CHUNK_BYTES))  # for what is read back
        self.work: list[Future] = []  # on what lies here

    def wait(self) -> None:
        """Wait until what lies here is no longer needed."""
        for future in self.work:
            future.result()
        self.work.clear()

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
