"""The gates that a new mixture of experts starts with: seeded and random, or given."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...shards import DTYPE_NAMES, TORCH_DTYPES, TensorReader, read_header

GATE_STD = 0.02  # of the random weights
GateList = list[dict[str, torch.Tensor]]  # per MoE layer {"gate.weight": (E, D), "gate.bias": (E,)}


def random_gates(layers: Sequence[int], experts: int, hidden_size: int, seed: int) -> GateList:
    """Draw small gate weights; the biases are zero.

    Each layer has its own generator, so a layer's gate does not depend on which other layers are
    MoE layers.

    Args:
        layers: numbers of the MoE layers.
        experts: number of experts E.
        hidden_size: width D of the gate's input.
        seed: same seed, same gates.

    Returns:
        Per layer `{"gate.weight": (E, D), "gate.bias": (E,)}`, float32.
    """
    gates = []
    for layer in layers:
        generator = torch.Generator().manual_seed(seed * 100_003 + layer)
        weight = torch.randn(experts, hidden_size, generator=generator) * GATE_STD  # (E, D)
        gates.append({"gate.weight": weight, "gate.bias": torch.zeros(experts)})
    return gates


def given_gates(
    gates: str | Path | Sequence[Mapping[str, torch.Tensor]],
    layers: Sequence[int],
    experts: int,
    hidden_size: int,
) -> GateList:
    """Take gates from a file or a list and check that they fit.

    Args:
        gates: a safetensors file with `layers.N.gate.weight` and `layers.N.gate.bias` for every MoE
            layer N, or one mapping with `gate.weight` (E, D) and `gate.bias` (E,) per MoE layer, in
            the order of the layers.
        layers: numbers of the MoE layers.
        experts: number of experts E.
        hidden_size: width D of the gate's input.

    Returns:
        Per layer `{"gate.weight", "gate.bias"}` as given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: gates missing, left over, of another shape, or not finite.
    """
    if isinstance(gates, (str, Path)):
        gates = _load(Path(gates), layers)
    if len(gates) != len(layers):
        raise ValueError(f"gates: {len(gates)} given, {len(layers)} MoE layers need one each")
    shapes = {"gate.weight": (experts, hidden_size), "gate.bias": (experts,)}
    for layer, gate in zip(layers, gates, strict=True):
        if set(gate) != set(shapes):
            raise ValueError(
                f"gates of layer {layer}: keys {sorted(gate)}, expected {sorted(shapes)}"
            )
        for name, shape in shapes.items():
            if tuple(gate[name].shape) != shape:
                raise ValueError(
                    f"gates of layer {layer}: {name} has shape {tuple(gate[name].shape)}, "
                    f"expected {shape} (experts, hidden size)"
                )
            if not torch.isfinite(gate[name]).all():
                raise ValueError(f"gates of layer {layer}: {name} has NaN or infinite values")
    return [dict(gate) for gate in gates]


def gate_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Give a gate tensor as the bytes that stand in a safetensors file."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()


def gate_dtype_of(dtype: torch.dtype | str | None, model_dtype: str) -> torch.dtype:
    """Find the gates' dtype: what was asked for, else that of the model.

    Raises:
        ValueError: no floating dtype that safetensors and the build know.
    """
    if dtype is None:
        return TORCH_DTYPES[model_dtype]
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPE_NAMES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_NAMES)
        raise ValueError(f"gate_dtype: {dtype!r} is not one of {names}")
    return found


def _load(file: Path, layers: Sequence[int]) -> GateList:
    if not file.is_file():
        raise FileNotFoundError(f"gates: no file {file}")
    tensors = read_header(file)
    parts = ("gate.weight", "gate.bias")
    wanted = {f"layers.{layer}.{part}" for layer in layers for part in parts}
    if tensors.keys() != wanted:
        missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ValueError(
            f"gates: {file} does not fit the MoE layers {list(layers)}: "
            f"missing {missing[:3]}, not expected {extra[:3]}"
        )
    gates: GateList = [{} for _ in layers]
    with TensorReader() as reader:
        for gate, layer in zip(gates, layers, strict=True):
            for part in parts:
                info = tensors[f"layers.{layer}.{part}"]
                if info.dtype not in TORCH_DTYPES:
                    raise ValueError(f"gates: {file} holds {info.dtype}, expected floating numbers")
                data = bytearray(info.nbytes)
                reader.read_into(info, 0, memoryview(data))
                tensor = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype])
                gate[part] = tensor.reshape(info.shape)
    return gates
