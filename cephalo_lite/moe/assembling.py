"""The weights of a mixture of models that are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .build.gates import random_gates

MLP_WEIGHTS = ("gate_up_proj", "down_proj")


def mixture_state(
    base_model: nn.Module, expert_models: Sequence[nn.Module], layers: Sequence[int], seed: int
) -> dict[str, torch.Tensor]:
    """Copy the weights of a base and of its experts' MLPs under the names of a mixture.

    Args:
        base_model: a `Phi3VForCausalLM`; gives all but the experts; also device and dtype.
        expert_models: E such models; their MLPs become (E, 2F, D) and (E, D, F).
        layers: numbers of the layers that get experts.
        seed: of the gates; `build_moe` draws the same ones from the same seed.

    Returns:
        Name to tensor; none shares memory with its source.

    Raises:
        ValueError: an expert has fewer layers than the base or other shapes.
    """
    base = base_model.state_dict()
    experts = [model.state_dict() for model in expert_models]
    fused: dict[str, torch.Tensor] = {}
    replaced: set[str] = set()
    for layer in layers:
        for name in MLP_WEIGHTS:
            key = f"model.layers.{layer}.mlp.{name}.weight"
            own, parts = base[key], [state.get(key) for state in experts]
            for number, part in enumerate(parts):
                if part is None or part.shape != own.shape:
                    found = "nothing" if part is None else tuple(part.shape)
                    raise ValueError(
                        f"Expert {number} has {found} for {key}, the base {tuple(own.shape)}."
                    )
            parts = [part.to(own.device, own.dtype) for part in parts]
            fused[f"model.layers.{layer}.mlp.experts.{name}"] = torch.stack(parts)
            replaced.add(key)
    width = base["model.embed_tokens.weight"].shape[1]
    gates = random_gates(layers, len(experts), width, seed)
    for layer, gate in zip(layers, gates, strict=True):
        prefix = f"model.layers.{layer}.mlp."
        like = fused[f"{prefix}experts.down_proj"]
        for name, tensor in gate.items():
            fused[f"{prefix}gating_layer.{name}"] = tensor.to(like.device, like.dtype)
    return {key: tensor.clone() for key, tensor in base.items() if key not in replaced} | fused
