"""Safetensors checkpoints as streams: where each tensor lies, and how shards are laid out.

The format is an 8-byte little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`
and the bytes of the tensors one after another (https://huggingface.co/docs/safetensors). Reading
the header alone tells where every tensor is, so copying needs a buffer, not a model; plain reads
instead of a memory map keep the peak resident memory at the size of that buffer.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CHUNK_BYTES = 16 << 20  # what is held of a tensor at any moment
ALIGNMENT = 64  # of the first tensor byte in a file
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a safetensors file."""

    file: Path  # the file that holds it
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    start: int  # position of its first byte in the file
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read where each tensor of one safetensors file lies.

    Args:
        file: a safetensors file.

    Returns:
        Name to `TensorInfo`, in the order of their bytes.

    Raises:
        ValueError: the file is truncated or no safetensors file.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{file} is truncated or no safetensors file: its header does not fit in its "
                f"{size} bytes. Download it again."
            )
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(
                f"{file} is truncated: {name} ends at byte {8 + length + end}, the file has "
                f"{size}. Download it again."
            )
        shape = tuple(entry["shape"])
        tensors[name] = TensorInfo(file, entry["dtype"], shape, 8 + length + begin, end - begin)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Read where each tensor of a checkpoint folder lies, in one file or in shards with an index.

    Args:
        folder: a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`.

    Returns:
        Name to `TensorInfo`.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard that the index names is missing.
        ValueError: a truncated file, or an index that does not fit its shards.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(_no_weights(folder))
    weight_map: dict[str, str] = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}. "
            "Download them again."
        )
    found = {name: read_header(folder / name) for name in shards}
    absent = [key for key, shard in weight_map.items() if key not in found[shard]]
    if absent:
        raise ValueError(
            f"{folder / INDEX_FILE} places {absent[0]!r} in {weight_map[absent[0]]}, which does "
            f"not hold it ({len(absent)} such keys). Index and shards are of different models."
        )
    return {key: found[shard][key] for key, shard in weight_map.items()}


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds a PEFT adapter, no full model: merge it into its base "
            "(merge_and_unload) and save that."
        )
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.bin.index.json")
    )
    if pickles:
        return (
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run code when it is "
            "opened and is not read here: convert it to safetensors (save_pretrained does)."
        )
    loose = sorted(p.name for p in folder.glob("*.safetensors"))
    if loose:
        return (
            f"{folder} has {loose[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}: "
            "add the index file of its shards."
        )
    return f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}: no weights to read."


class TensorReader:
    """Reads parts of tensors into given buffers; keeps the files open until closed."""

    def __init__(self) -> None:
        """Start with no file open."""
        self._files: dict[Path, object] = {}

    def __enter__(self) -> "TensorReader":
        """Enter a block at whose end all files are closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(self, tensor: TensorInfo, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of `tensor` from `offset` on.

        Raises:
            OSError: the file became shorter while it was read.
        """
        if tensor.file not in self._files:
            self._files[tensor.file] = open(tensor.file, "rb", buffering=0)
        file = self._files[tensor.file]
        file.seek(tensor.start + offset)
        filled = 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise OSError(f"{tensor.file} ended while it was read: it changed during the build")
            filled += count


def pack_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Make the head of a safetensors file for tensors that follow one another.

    Args:
        entries: (name, dtype, shape, number of bytes) per tensor, in the order of the data.

    Returns:
        Length and JSON header, padded so that the data starts at a multiple of 64 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in entries:
        offsets = [position, position + nbytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir():
        if os.name == "nt":  # Windows cannot open folders
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
