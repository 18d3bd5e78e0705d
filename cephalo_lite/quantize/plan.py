"""How much memory training adapters on a 4-bit model takes, counted before anything is loaded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .activations import Adapted, activation_bytes, experts_per_token
from .loading import CLASSES
from .sizes import is_packed, nf4_bytes

CUDA_BYTES = 10**9  # context, workspaces of the libraries: assumed
FREE = 0.05  # of the card, for fragmentation: assumed
SMALLEST_8BIT = 4096  # smaller tensors keep a 32-bit optimiser state (bitsandbytes)
OPTIMISER_BLOCK = 256  # numbers that share a scale in an 8-bit state
ALIASES = {"attention": "self_attn"}
PARTS = ("weights", "adapters", "gradients", "optimiser", "activations", "cuda")


@dataclass(frozen=True)
class PlanRow:
    """Bytes that one choice takes."""

    rank: int
    sequence: int  # tokens
    batch: int  # sequences per step
    trainable: int  # parameters of the adapters
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    cuda: int
    verdicts: dict[float, str]  # GiB of a card → "fits", or why not

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class MemoryPlan:
    """A row for each choice; `print(plan)` shows the table."""

    model_type: str
    targets: tuple[str, ...]
    rows: list[PlanRow]

    def fits(self, card_gb: float) -> list[PlanRow]:
        """The choices that fit a card of the plan."""
        return [row for row in self.rows if row.verdicts[card_gb] == "fits"]

    @property
    def text(self) -> str:
        """The table in 10^9 bytes, and below it what fits which card."""
        lines = [f"{self.model_type}, adapters on {', '.join(self.targets)}; GB = 10^9 bytes"]
        lines.append(f"{'rank':>5}{'batch':>7}{'tokens':>8}" + "".join(f"{p:>13}" for p in PARTS))
        lines[-1] += f"{'total':>10}"
        for row in self.rows:
            cells = "".join(f"{getattr(row, part) / 1e9:>13.3f}" for part in PARTS)
            lines.append(
                f"{row.rank:>5}{row.batch:>7}{row.sequence:>8}{cells}{row.total / 1e9:>10.3f}"
            )
        for row in self.rows:
            choice = f"rank {row.rank}, {row.batch} x {row.sequence} tokens"
            fitting = [f"{card:g}" for card, verdict in row.verdicts.items() if verdict == "fits"]
            if fitting:
                lines.append(f"{choice}: fits {', '.join(fitting)} GiB")
            lines += [
                f"{choice}: {card:g} GiB {verdict}"
                for card, verdict in row.verdicts.items()
                if verdict != "fits"
            ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text


def memory_plan(
    config: PretrainedConfig,
    card_gb: float | Sequence[float] = (24, 32, 40, 48, 80),
    rank: int | Sequence[int] = 16,
    targets: Sequence[str] = ("attention", "experts"),
    sequence: int | Sequence[int] = 512,
    batch: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryPlan:
    """Count what a training step of QLoRA takes, for each combination of the choices.

    The step is that of the recipes: the model from `load_4bit`, LoRA in `dtype`, gradient
    checkpointing per layer, 8-bit Adam. Weights, adapters, gradients and optimiser are counted
    tensor by tensor on the meta device; activations follow `activation_bytes`; for CUDA itself
    1 GB is assumed, and 5 % of the card is left free.

    Args:
        config: of the model: phi3, phimoe, phi3_v or phi3_v_moe. Pictures' own activations are not
            counted.
        card_gb: memory of one card or of several, in GiB as cards are sold.
        rank: r of the adapters; one or several.
        targets: what gets adapters: layers ("q_proj", "w1") or groups ("attention", "experts",
            "mlp").
        sequence: tokens of a sequence; one or several.
        batch: sequences of a step; one or several.
        dtype: of adapters, gradients, activations and all that is not in 4 bits.

    Raises:
        ValueError: another kind of model, or a target that matches none of its layers.

    Example:
        >>> config = AutoConfig.from_pretrained("microsoft/Phi-3.5-MoE-instruct")  # doctest: +SKIP
        >>> print(memory_plan(config, card_gb=(24, 48), rank=(8, 16)))  # doctest: +SKIP
    """
    model = skeleton(config)
    layers = adapted_layers(model, targets)
    busiest = _busiest(config, layers)
    weights = weight_bytes(model, dtype)
    rows = []
    for r, tokens, sequences in itertools.product(_all(rank), _all(sequence), _all(batch)):
        sizes = [r * width for m in layers.values() for width in (m.in_features, m.out_features)]
        numel = sum(sizes)
        parts = {
            "weights": weights,
            "adapters": numel * dtype.itemsize,
            "gradients": numel * dtype.itemsize,
            "optimiser": sum(map(optimiser_bytes, sizes)),
            "activations": activation_bytes(config, busiest, r, tokens, sequences, dtype),
            "cuda": CUDA_BYTES,
        }
        verdicts = {card: _verdict(parts, card) for card in _all(card_gb)}
        rows.append(PlanRow(r, tokens, sequences, numel, verdicts=verdicts, **parts))
    return MemoryPlan(config.model_type, tuple(targets), rows)


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model that `load_4bit` would make, without memory for its weights.

    Raises:
        ValueError: another kind of model.
    """
    if config.model_type not in CLASSES:
        raise ValueError(f"A plan is made for {', '.join(CLASSES)}, not for {config.model_type}.")
    with torch.device("meta"):
        return CLASSES[config.model_type](config)


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights when the large matrices are in 4 bits and the rest in `dtype`."""
    return sum(
        nf4_bytes(p.numel()) if is_packed(name, p.ndim) else p.numel() * dtype.itemsize
        for name, p in model.named_parameters()
    )


def adapted_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name.

    Raises:
        ValueError: a target matches none.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_packed(f"{name}.weight", 2)
    }
    for target in targets:
        if not any(ALIASES.get(target, target) in name.split(".") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"The target {target!r} matches no layer of this model: name layers "
                f"({', '.join(known)}) or groups (attention, mlp, experts) that it has."
            )
    wanted = {ALIASES.get(target, target) for target in targets}
    return {name: module for name, module in linear.items() if wanted & set(name.split("."))}


def optimiser_bytes(numel: int) -> int:
    """Bytes of 8-bit Adam's two states of one tensor, their scales included."""
    if numel < SMALLEST_8BIT:
        return 2 * 4 * numel
    return 2 * (numel + 4 * math.ceil(numel / OPTIMISER_BLOCK))


def _busiest(config: PretrainedConfig, layers: dict[str, nn.Linear]) -> list[Adapted]:
    """The adapted layers of the decoder layer where they read most."""
    share = experts_per_token(config) / getattr(config, "num_local_experts", 1)
    decoder: dict[str, list[Adapted]] = {}
    for name, module in layers.items():
        number = re.search(r"layers\.(\d+)\.", name)[1]
        per_token = share if "experts" in name.split(".") else 1.0
        decoder.setdefault(number, []).append(Adapted(module.in_features, per_token))
    return max(decoder.values(), key=lambda found: sum(a.inputs * a.per_token for a in found))


def _verdict(parts: dict[str, int], card_gb: float) -> str:
    room = card_gb * 2**30 * (1 - FREE)
    over = sum(parts.values()) - room
    if over <= 0:
        return "fits"
    largest = sorted(parts, key=parts.get, reverse=True)[:2]
    told = " and ".join(f"{part} take {parts[part] / 1e9:.1f}" for part in largest)
    return (
        f"does not, because {over / 1e9:.1f} GB are missing ({told} GB of {room / 1e9:.1f} usable)"
    )


def _all(choice: Any) -> tuple:
    return tuple(choice) if isinstance(choice, (list, tuple, range)) else (choice,)
