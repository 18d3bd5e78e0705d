"""Several dense Phi-3-Vision checkpoints become one mixture of experts, file to file.

Attention, norms, embeddings, vision tower, projector and head are the base's; each expert gives its
MLPs. Nothing is instantiated: the bytes stream from the sources' safetensors to the new shards, in
the layout that the Cephalo checkpoints are published in
(https://huggingface.co/lamm-mit/Cephalo-Phi-3-MoE-vision-128k-3x4b-beta), without the outer
`lm_head.weight` that it carries but never uses.
"""

import logging
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ...shards import SINGLE_FILE, TensorReader, sync
from .checks import (
    check_disk_space,
    check_layers,
    check_routing,
    check_target,
    name_experts,
)
from .files import write_side_files
from .gates import gate_dtype_of, given_gates, random_gates
from .plan import measure_left_behind, plan_pieces, summarise
from .report import REPORT_FILE, BuildReport
from .sources import (
    check_same_architecture,
    check_same_vocabulary,
    open_dense,
)
from .stream import Piece, Written, plan_shards, write_shard

logger = logging.getLogger(__name__)


def build_moe(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    output_dir: str | Path,
    experts_per_token: int = 1,
    router: str = "cephalo",
    layers: Sequence[int] | None = None,
    gates: str | Path | Sequence[Mapping[str, torch.Tensor]] | None = None,
    seed: int = 0,
    max_shard_gb: float = 4.0,
    gate_dtype: torch.dtype | str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    reserve_bytes: int = 64 << 20,
    progress: bool = True,
) -> BuildReport:
    """Build a mixture of experts from dense Phi-3-Vision checkpoints.

    Everything is checked before the first byte is written. The model is written beside `output_dir`
    and renamed when it is complete, so a build that fails or is killed leaves nothing under the
    final name.

    Args:
        base: folder or hub id (`owner/name`, `owner/name@revision`) that gives all that is no MLP.
        experts: two or more of these, or a mapping from the experts' names to them. The base may be
            one of them, and one expert may stand there more than once (sparse upcycling).
        output_dir: the new checkpoint's folder.
        experts_per_token: how many experts K a token passes through.
        router: "cephalo" (softmax, top-k, softmax) or "renormalised" (softmax, top-k, divided by
            their sum).
        layers: numbers of the layers that become MoE layers; `None` for all. The others keep the
            base's MLP.
        gates: what the gates start with: a safetensors file with `layers.N.gate.weight` and
            `layers.N.gate.bias`, or per MoE layer `{"gate.weight": (E, D), "gate.bias": (E,)}`.
            `None` for zero biases and small random weights.
        seed: of the random gate weights.
        max_shard_gb: largest size of a file in 10^9 bytes; what is larger, a tensor or the
            experts' tensors of one matrix, gets a file of its own.
        gate_dtype: dtype of the gates; `None` for that of the base's MLPs, as in the published
            checkpoints.
        verify: read every shard back and compare each tensor with its source.
        overwrite: replace a model that is at `output_dir`, once the new one is complete.
        reserve_bytes: bytes of the disk that shall stay free.
        progress: show a progress bar.

    Returns:
        The report, which also lies in the new folder as build_report.json.

    Raises:
        ValueError: experts, layers, gates or settings that do not fit the base.
        FileNotFoundError: a source, its weights or one of its shards is missing.
        FileExistsError: something is at `output_dir`.
        OSError: too little disk space, or what was written does not read back.
    """
    begin = time.perf_counter()
    output_dir = Path(output_dir)
    named = name_experts(experts)
    check_routing(len(named), experts_per_token, router)
    if max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb is {max_shard_gb}, expected a positive number")
    dense = open_dense("base", base)
    sources = [open_dense(f"expert {name!r}", source) for name, source in named.items()]
    check_target(output_dir, [dense.folder, *(source.folder for source in sources)], overwrite)
    for source in sources:
        check_same_architecture(dense, source)
        check_same_vocabulary(dense, source)
    chosen = check_layers(layers, dense.config["num_hidden_layers"])
    width = dense.config["hidden_size"]
    if gates is None:
        start_gates = random_gates(chosen, len(named), width, seed)
    else:
        start_gates = given_gates(gates, chosen, len(named), width)
    dtype = gate_dtype_of(gate_dtype, dense.mlp(chosen[0], "down_proj").dtype)
    pieces = plan_pieces(dense, sources, chosen, start_gates, dtype)
    check_disk_space(output_dir, sum(piece.nbytes for piece in pieces), reserve_bytes)

    left_behind = [measure_left_behind(dense, source, chosen) for source in sources]
    report = BuildReport(
        output_dir=output_dir,
        base=str(base),
        expert_sources=[str(source) for source in named.values()],
        expert_names=list(named),
        experts_per_token=experts_per_token,
        router=router,
        layers=chosen,
        left_behind=left_behind,
        verified=verify,
    )
    partial = _make_partial(output_dir)
    try:
        written = _write_weights(partial, pieces, int(max_shard_gb * 1e9), verify, progress)
        summarise(report, dense, pieces, written)
        report.shards = sorted(file.name for file in partial.glob("*.safetensors"))
        write_side_files(partial, dense, report, pieces)
        report.seconds = time.perf_counter() - begin
        report.save(partial / REPORT_FILE)
        for file in [*partial.iterdir(), partial]:
            sync(file)
        _publish(partial, output_dir, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


def _make_partial(output_dir: Path) -> Path:
    """Make an empty folder beside the target, and say so where killed builds left theirs."""
    parent = output_dir.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}.partial-"
    for stale in sorted(p for p in parent.iterdir() if p.name.startswith(prefix)):
        logger.warning("%s is left from another build; delete it unless that still runs", stale)
    partial = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def _write_weights(
    partial: Path, pieces: Sequence[Piece], max_bytes: int, verify: bool, progress: bool
) -> dict[str, Written]:
    """Write all shards; each is brought to the disk while the next one is written."""
    shards = plan_shards(pieces, max_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    written: dict[str, Written] = {}
    total = sum(piece.nbytes for piece in pieces)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="build", disable=not progress) as bar,
        TensorReader() as reader,
        ThreadPoolExecutor(1) as syncer,
    ):
        on_disk = []
        for name, shard in zip(names, shards, strict=True):
            written |= write_shard(partial / name, shard, reader, bar.update, verify)
            on_disk.append(syncer.submit(sync, partial / name))
        for waiting in on_disk:
            waiting.result()
    return written


def _publish(partial: Path, output_dir: Path, overwrite: bool) -> None:
    """Give a complete build its final name; a model that it replaces stays until then."""
    parent = partial.parent
    target = parent / output_dir.name
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if overwrite and target.exists():
        old = parent / f".{target.name}.old-{secrets.token_hex(4)}"
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, target)
    sync(parent)
