"""One file of a checkpoint in 4 bits: quantised, written, read back, and only then named."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..shards import CHUNK_BYTES, DTYPE_NAMES, TensorInfo, TensorReader, pack_header, sync
from .packing import pack
from .sizes import is_packed

TEMPORARY = ".writing-"  # how the names of unfinished files begin


def write_shard(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    reader: TensorReader,
    device: str | torch.device,
) -> str:
    """Quantise or copy tensors into one file; it gets its name when it has been read back.

    Args:
        file: to be written.
        tensors: published name → where it lies.
        reader: reads them.
        device: where matrices are quantised.

    Returns:
        Its SHA-256.

    Raises:
        ValueError: a tensor cannot be quantised.
        OSError: what was written does not read back.
    """
    content: dict[str, torch.Tensor | TensorInfo] = {}
    for name, tensor in tensors.items():
        if is_packed(name, len(tensor.shape)):
            stem = name.removesuffix("weight")
            packed = pack(tensor, reader, device)
            content |= {stem + part: value for part, value in packed.items()}
        else:
            content[name] = tensor
    # Wide numbers first: each then starts at a multiple of its own size, as readers need it.
    order = sorted(content, key=lambda name: (-_width(content[name]), name))
    entries = [(name, *_described(content[name])) for name in order]
    written, temporary = hashlib.sha256(), file.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    with open(temporary, "xb") as out:
        for chunk in _chunks(pack_header(entries), [content[name] for name in order], reader):
            written.update(chunk)
            out.write(chunk)
    sync(temporary)
    if sha256(temporary) != written.hexdigest():
        raise OSError(f"{file.name} reads back with other bytes than were written: check the disk.")
    os.replace(temporary, file)
    return written.hexdigest()


def _chunks(
    header: bytes, content: Sequence[torch.Tensor | TensorInfo], reader: TensorReader
) -> Iterator[bytes | memoryview]:
    """The file's bytes in order, a little at a time."""
    yield header
    for tensor in content:
        if isinstance(tensor, TensorInfo):
            for offset in range(0, tensor.nbytes, CHUNK_BYTES):
                chunk = memoryview(bytearray(min(CHUNK_BYTES, tensor.nbytes - offset)))
                reader.read_into(tensor, offset, chunk)
                yield chunk
        else:
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _width(tensor: torch.Tensor | TensorInfo) -> int:
    """Bytes per number."""
    if isinstance(tensor, TensorInfo):
        return tensor.nbytes // max(tensor.numel, 1)
    return tensor.element_size()


def _described(tensor: torch.Tensor | TensorInfo) -> tuple[str, tuple[int, ...], int]:
    """Safetensors' dtype, shape and number of bytes."""
    if isinstance(tensor, TensorInfo):
        return tensor.dtype, tensor.shape, tensor.nbytes
    names = DTYPE_NAMES | {torch.uint8: "U8"}
    return names[tensor.dtype], tuple(tensor.shape), tensor.nbytes


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
