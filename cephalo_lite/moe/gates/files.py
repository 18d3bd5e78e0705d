"""Gates out of a model and into it, in memory and as safetensors."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..routing import routers

NAMES = ("gate.weight", "gate.bias")


def get_gates(model) -> list[dict[str, torch.Tensor]]:
    """Weights and biases of all gates.

    Args:
        model: a mixture.

    Returns:
        {"gate.weight" (E, D), "gate.bias" (E,)} per mixed layer; copies.
    """
    return [
        {f"gate.{name}": value.detach().clone() for name, value in router.gate.state_dict().items()}
        for router in routers(model)
    ]


@torch.no_grad()
def set_gates(model, gates: Sequence[dict[str, torch.Tensor]]) -> None:
    """Give a mixture these gates; on an error it keeps all of its own.

    Args:
        model: a mixture.
        gates: one dict per mixed layer, as `get_gates` returns.

    Raises:
        ValueError: another number of layers, a tensor missing, not finite, or of another shape.
    """
    found = routers(model)
    if len(gates) != len(found):
        raise ValueError(f"{len(gates)} gates for {len(found)} mixed layers.")
    pairs = []
    for number, (router, gate) in enumerate(zip(found, gates, strict=True)):
        if set(gate) != set(NAMES):
            raise ValueError(f"Gate {number} has {sorted(gate)}, and should have {sorted(NAMES)}.")
        for name in NAMES:
            own, given = getattr(router.gate, name.removeprefix("gate.")), gate[name]
            if given.shape != own.shape:
                raise ValueError(
                    f"Gate {number}: {name} is {tuple(given.shape)}, the model's "
                    f"{tuple(own.shape)} (experts, hidden size)."
                )
            if not torch.isfinite(given).all():
                raise ValueError(f"Gate {number}: {name} has NaN or infinite values.")
            pairs.append((own, given))
    for own, given in pairs:
        own.copy_(given.to(own.device, own.dtype))


def save_gates(model, path: str | Path) -> Path:
    """Write the gates of a model as safetensors (`layers.N.gate.weight`, `layers.N.gate.bias`).

    Args:
        model: a mixture.
        path: the file; it is written beside and renamed, so it is whole or not there.

    Returns:
        The path.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{layer}.{name}": value.contiguous().cpu()
        for layer, gate in zip(model.config.mixed_layers, get_gates(model), strict=True)
        for name, value in gate.items()
    }
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    names = json.dumps(list(model.config.expert_names))
    try:
        save_file(tensors, partial, metadata={"format": "pt", "experts": names})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_gates(model, path: str | Path) -> None:
    """Give a model the gates that `save_gates` wrote; warn if they were for experts of other names.

    Args:
        model: a mixture.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no safetensors file, or gates of other layers or shapes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads((file.metadata() or {}).get("experts", "null"))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    layers = model.config.mixed_layers
    wanted = {f"layers.{layer}.{name}" for layer in layers for name in NAMES}
    if set(tensors) != wanted:
        differ = ", ".join(sorted(set(tensors) ^ wanted)[:4])
        raise ValueError(f"{path} does not hold the gates of this model: {differ} differ.")
    set_gates(model, [{n: tensors[f"layers.{layer}.{n}"] for n in NAMES} for layer in layers])
    if names is not None and names != list(model.config.expert_names):
        warnings.warn(
            f"{path} was written for the experts {names}, and this model's are "
            f"{list(model.config.expert_names)}: are they the same, in the same order?",
            stacklevel=2,
        )
