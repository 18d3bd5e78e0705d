"""A released checkpoint → the same in 4 bits, file to file, in little memory.

Nothing is instantiated. Names stay the published ones, so the result loads with `load_4bit`, and
as any bitsandbytes checkpoint in releases of transformers that keep experts as separate modules.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..exporting import released_rope
from ..moe.build.checks import check_disk_space, check_target
from ..moe.build.files import COPIED_FILES, copy_side_file, write_json
from ..moe.build.sources import resolve_folder
from ..shards import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    TensorReader,
    read_checkpoint,
    read_header,
    sync,
)
from .loading import model_kind, nf4_config, read_config
from .shard_file import TEMPORARY, sha256, write_shard
from .sizes import is_packed, nf4_bytes

STATE_FILE = "conversion.json"  # what is done; in the end, the report


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_4bit` wrote."""

    target: Path
    shards: dict[str, str]  # file name → SHA-256
    packed: int  # matrices in 4 bits
    kept: int  # tensors copied bit by bit
    source_bytes: int
    nbytes: int
    resumed: int  # shards that an earlier run had finished
    seconds: float  # of this run


def convert_4bit(
    source: str | Path,
    target: str | Path,
    device: str | torch.device = "cpu",
    max_shard_gb: float = 1.0,
    reserve_bytes: int = 64 << 20,
    progress: bool = True,
) -> ConversionReport:
    """Convert a checkpoint to NF4 with double quantisation, experts included.

    It is written to a folder beside `target` and renamed when it is complete. If it is stopped,
    call it again: shards that were finished, and whose checksums still hold, are kept. At most one
    shard of the result and 0.2 GB more are in memory.

    Args:
        source: a Phi-3, Phi-3.5-MoE, Phi-3-Vision or mixture of these: a folder or a hub id.
        target: the new checkpoint's folder; must not exist.
        device: where matrices are quantised.
        max_shard_gb: largest size of a file, in 10^9 bytes; a single larger tensor gets its own.
        reserve_bytes: bytes of the disk that shall stay free.
        progress: show a progress bar, which counts the bytes read.

    Returns:
        The report; the checksums also lie in the new folder, in conversion.json.

    Raises:
        ValueError: another kind of model, one quantised already, or experts in one tensor.
        FileNotFoundError: the source, its weights or one of its shards is missing.
        FileExistsError: something is at `target`, or an unfinished conversion of something else
            beside it.
        OSError: too little disk space, or what was written does not read back.

    Example:
        >>> convert_4bit("microsoft/Phi-3.5-MoE-instruct", "phi-3.5-moe-nf4")  # doctest: +SKIP
        >>> model, tokenizer = load_4bit("phi-3.5-moe-nf4")  # doctest: +SKIP
    """
    begin = time.perf_counter()
    folder, target = resolve_folder(source), Path(target)
    published = read_config(folder)
    model_kind(published, folder)
    if "quantization_config" in published:
        raise ValueError(f"{folder} is in 4 bits already: load it with load_4bit.")
    tensors = read_checkpoint(folder)
    check_target(target, [folder], overwrite=False)
    plan = plan_shards(tensors, int(max_shard_gb * 1e9))
    partial = target.resolve().parent / f".{target.name}.partial-4bit"
    check_disk_space(target, sum(_size(n, t) for n, t in tensors.items()), reserve_bytes)
    done = _open_partial(partial, _fingerprint(plan, tensors))
    resumed = 0
    total = sum(tensor.nbytes for tensor in tensors.values())
    with (
        TensorReader() as reader,
        tqdm(total=total, unit="B", unit_scale=True, desc="4 bits", disable=not progress) as bar,
    ):
        for file, names in plan.items():
            if (partial / file).is_file() and done["shards"].get(file) == sha256(partial / file):
                resumed += 1
            else:
                part = {name: tensors[name] for name in names}
                done["shards"][file] = write_shard(partial / file, part, reader, device)
                _save(partial / STATE_FILE, done)
            bar.update(sum(tensors[name].nbytes for name in names))
    _write_side_files(partial, folder, published, list(plan))
    for file in sorted(partial.iterdir()):
        if file.name.startswith(TEMPORARY):  # of runs that were killed
            file.unlink()
        else:
            sync(file)
    nbytes = sum((partial / file).stat().st_size for file in plan)
    if target.is_dir():  # an empty one
        target.rmdir()
    os.rename(partial, target)
    sync(target.resolve().parent)
    packed = sum(is_packed(name, len(tensor.shape)) for name, tensor in tensors.items())
    return ConversionReport(
        target=target,
        shards=done["shards"],
        packed=packed,
        kept=len(tensors) - packed,
        source_bytes=total,
        nbytes=nbytes,
        resumed=resumed,
        seconds=time.perf_counter() - begin,
    )


def plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, list[str]]:
    """File names of the result → names of the source's tensors that go there, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _size(name, tensor)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards)}


def _size(name: str, tensor: TensorInfo) -> int:
    return nf4_bytes(tensor.numel) if is_packed(name, len(tensor.shape)) else tensor.nbytes


def _fingerprint(plan: Mapping[str, list[str]], tensors: Mapping[str, TensorInfo]) -> str:
    """Equal for the same plan over source files that were not changed since."""
    files = sorted({tensor.file for tensor in tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([plan, stats]).encode()).hexdigest()


def _open_partial(partial: Path, fingerprint: str) -> dict:
    """Make the folder for an unfinished conversion, or read what is done in it."""
    partial.mkdir(parents=True, exist_ok=True)
    if (partial / STATE_FILE).is_file():
        done = json.loads((partial / STATE_FILE).read_text("utf-8"))
        if done["plan"] != fingerprint:
            raise FileExistsError(
                f"{partial} holds an unfinished conversion with another source or max_shard_gb: "
                "delete it, or convert with what it was begun with."
            )
        return done
    done = {"plan": fingerprint, "shards": {}}
    _save(partial / STATE_FILE, done)
    return done


def _save(file: Path, done: dict) -> None:
    """Write beside and rename: whoever is killed here leaves the old state or the new one."""
    temporary = file.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    write_json(temporary, done)
    os.replace(temporary, file)


def _write_side_files(partial: Path, source: Path, published: dict, shards: list[str]) -> None:
    dtype = getattr(torch, published.get("dtype") or published.get("torch_dtype") or "bfloat16")
    config = {key: value for key, value in published.items() if key != "auto_map"}
    config |= released_rope(config, published["model_type"])
    config["quantization_config"] = nf4_config(dtype).to_dict()
    write_json(partial / "config.json", config)
    if len(shards) > 1:
        headers = {file: read_header(partial / file) for file in shards}
        sizes = [tensor.nbytes for header in headers.values() for tensor in header.values()]
        weight_map = {name: file for file, header in headers.items() for name in header}
        write_json(
            partial / INDEX_FILE,
            {
                "metadata": {"total_size": sum(sizes)},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )
    for pattern in COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            copy_side_file(file, partial / file.name)
