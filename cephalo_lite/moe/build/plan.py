"""Which tensor of which source becomes which tensor of the mixture, and what the copies tell."""

import math
from collections.abc import Sequence

import torch

from ...shards import DTYPE_NAMES, TORCH_DTYPES, TensorReader
from .change import Change, sample_change
from .gates import GateList, gate_bytes
from .report import BuildReport
from .sources import MATRICES, DenseCheckpoint, mlp_key
from .stream import Piece, Written

LEFT_BEHIND_LIMIT = 0.05  # relative change outside the MLPs above which an expert may not be itself
GROUPS = {  # part of a published name: group, first match counts
    ".img_processor.": "vision",
    "model.vision_embed_tokens.": "projector",
    "model.embed_tokens.": "embeddings",
    ".self_attn.": "attention",
    ".mlp.": "dense MLPs",
    "norm.": "norms",
    "lm_head.": "head",
}


def expert_key(layer: int, expert: int, matrix: str) -> str:
    """Published name of an expert's matrix in a mixture."""
    return f"model.model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"


def gate_key(layer: int, part: str) -> str:
    """Published name of a gate's tensor; `part` is "gate.weight" or "gate.bias"."""
    return f"model.model.layers.{layer}.mlp.gating_layer.{part}"


def plan_pieces(
    base: DenseCheckpoint,
    experts: Sequence[DenseCheckpoint],
    layers: Sequence[int],
    gates: GateList,
    gate_dtype: torch.dtype,
) -> list[Piece]:
    """List the output's tensors in the order of a forward pass.

    Args:
        base: gives all that is no MLP, and the MLPs of the layers that stay dense.
        experts: give the MLPs of the MoE layers.
        layers: numbers of the MoE layers.
        gates: their gates.
        gate_dtype: dtype that the gates are written in.
    """
    pieces = []
    taken = {mlp_key(layer, matrix) for layer in layers for matrix in MATRICES}
    gate_of = dict(zip(layers, gates, strict=True))
    for key in sorted(base.tensors, key=_order):
        info = base.tensors[key]
        if key not in taken:
            pieces.append(Piece("model." + key, info.dtype, info.shape, info.nbytes, source=info))
            continue
        layer, matrix = int(key.split(".")[2]), key.split(".")[4]
        for number, expert in enumerate(experts):
            pieces.append(
                Piece(
                    expert_key(layer, number, matrix),
                    info.dtype,
                    info.shape,
                    info.nbytes,
                    source=expert.mlp(layer, matrix),
                    reference=info,
                )
            )
        for part, tensor in gate_of.pop(layer, {}).items():
            data = gate_bytes(tensor, gate_dtype)
            name, shape = DTYPE_NAMES[gate_dtype], tuple(tensor.shape)
            pieces.append(Piece(gate_key(layer, part), name, shape, len(data), data=data))
    return pieces


def measure_left_behind(
    base: DenseCheckpoint, expert: DenseCheckpoint, layers: Sequence[int]
) -> dict[str, float]:
    """Estimate what an expert changed outside the MLPs that are taken from it.

    Args:
        base: the base.
        expert: a checkpoint with the same tensors.
        layers: numbers of the MoE layers.

    Returns:
        Group of tensors to relative change; infinite where the dtypes differ.
    """
    taken = {mlp_key(layer, matrix) for layer in layers for matrix in MATRICES}
    groups: dict[str, Change] = {}
    with TensorReader() as reader:
        for key in sorted(base.tensors, key=_order):
            ours, theirs = base.tensors[key], expert.tensors[key]
            if key in taken:
                continue
            group = next((name for part, name in GROUPS.items() if part in key), "other")
            total = groups.setdefault(group, Change())
            if ours.dtype == theirs.dtype and ours.dtype in TORCH_DTYPES:
                if ours.nbytes and ours != theirs:
                    total.add(sample_change(theirs, ours, reader))
            else:
                total.add(Change(math.inf, 1.0, False))
    return {group: total.relative for group, total in groups.items()}


def summarise(
    report: BuildReport,
    base: DenseCheckpoint,
    pieces: Sequence[Piece],
    written: dict[str, Written],
) -> None:
    """Fill in what the written tensors tell: sizes, changes, equal experts, warnings."""
    names, layers = report.expert_names, report.layers
    firsts = []  # per expert: of each of its matrices, the first bit-equal one
    for expert, name in enumerate(names):
        keys = [[expert_key(layer, expert, m) for m in MATRICES] for layer in layers]
        changes = [Change() for _ in layers]
        for change, pair in zip(changes, keys, strict=True):
            for key in pair:
                change.add(written[key].change)
        report.change.append([change.relative for change in changes])
        firsts.append([(*written[key].twins, key)[0] for pair in keys for key in pair])
        if all(change.equal for change in changes):
            report.equal_to_base.append(name)
    report.identical_experts = [
        (names[a], names[b])
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if firsts[a] == firsts[b]
    ]
    parameters = [math.prod(piece.shape) for piece in pieces]
    taken = sum(base.mlp(layer, matrix).numel for layer in layers for matrix in MATRICES)
    report.bytes_written = sum(piece.nbytes for piece in pieces)
    report.total_parameters = sum(parameters)
    idle = len(names) - report.experts_per_token
    report.active_parameters = report.total_parameters - idle * taken
    report.tensors_new = sum(piece.source is None for piece in pieces)
    report.tensors_from_experts = sum(piece.reference is not None for piece in pieces)
    copied = len(pieces) - report.tensors_new
    report.tensors_from_base = copied - report.tensors_from_experts
    report.warnings = _warnings(report)


def _warnings(report: BuildReport) -> list[str]:
    found = []
    if report.identical_experts:
        pairs = ", ".join(f"{a} = {b}" for a, b in report.identical_experts)
        found.append(
            f"experts with bit-equal MLPs: {pairs}. Until they are trained apart, it makes no "
            "difference which of them the gate chooses"
        )
    if report.equal_to_base:
        found.append(f"experts with the base's own MLPs: {', '.join(report.equal_to_base)}")
    for name, row, groups in zip(
        report.expert_names, report.change, report.left_behind, strict=True
    ):
        if not all(map(math.isfinite, row)):
            bad = next(
                layer for layer, x in zip(report.layers, row, strict=True) if not math.isfinite(x)
            )
            found.append(f"expert {name}: NaN or infinite values at layer {bad}, in it or the base")
        large = {group: x for group, x in groups.items() if not x <= LEFT_BEHIND_LIMIT}
        if large:
            listed = ", ".join(f"{group} {x:.2f}" for group, x in large.items())
            found.append(
                f"expert {name} differs from the base outside the MLPs that are taken "
                f"(relative change: {listed}), which is left behind: it may answer differently"
            )
    return found


def _order(key: str) -> tuple:
    """Sort by place in a forward pass: embeddings, vision, layers by number, final norm, head."""
    if key.startswith("model.embed_tokens."):
        return 0, 0, key
    if key.startswith("model.vision_embed_tokens."):
        return 1, 0, key
    if key.startswith("model.layers."):
        return 2, int(key.split(".")[2]), key
    return (3 if key.startswith("model.norm.") else 4), 0, key
