"""Adapters by group: LoRA on the matrices of the groups that are named, counted, or an error.

PEFT takes what matches of a list of names and says nothing of what does not. Here a group stands
for all of its matrices, whatever the model calls them:

| model | attention | experts or mlp |
| --- | --- | --- |
| Phi-3, Phi-3-Vision | `qkv_proj`, `o_proj` | mlp: `gate_up_proj`, `down_proj` |
| Phi-3.5-MoE, experts one by one | `q_proj`, `k_proj`, `v_proj`, `o_proj` | `w1`, `w2`, `w3` |
| Phi-3-Vision mixture, experts one by one | `qkv_proj`, `o_proj` | `gate_up_proj`, `down_proj` |

Gates are so small that they are trained whole, as a copy that is saved with the adapters.

Source: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .groups import GROUPS, group_of, parameter_groups
from .unfusing import unfuse

ADAPTABLE = ("vision", "projector", "attention", "experts", "mlp", "gates")
ALIASES = {"router": "gates"}  # what the papers on Phi-3.5-MoE call them


class AdapterCount(NamedTuple):
    """What was adapted of a group."""

    modules: int  # matrices with an adapter
    tensors: int  # two per LoRA; a gate's own tensors
    parameters: int


@dataclass(frozen=True)
class AdapterReport:
    """What of a model has adapters, by group."""

    groups: dict[str, AdapterCount]
    rank: int
    model_parameters: int  # without adapters; 4-bit weights count as what they stand for

    @property
    def total(self) -> AdapterCount:
        """The sum over all groups."""
        return AdapterCount(*(sum(column) for column in zip(*self.groups.values(), strict=True)))

    def table(self) -> str:
        """The counts as aligned text, a group per line and their sum."""
        lines = [f"{'group':<12}{'matrices':>10}{'tensors':>10}{'parameters':>15}{'of model':>10}"]
        for name, count in [*self.groups.items(), ("all", self.total)]:
            share = count.parameters / self.model_parameters
            lines.append(
                f"{name:<12}{count.modules:>10,}{count.tensors:>10,}"
                f"{count.parameters:>15,}{share:>10.2%}"
            )
        return "\n".join(lines)


def add_adapters(
    model: nn.Module,
    groups: Iterable[str] = ("attention", "experts"),
    r: int = 16,
    alpha: int = 16,
    dropout: float = 0.05,
    seed: int = 0,
) -> tuple[PeftModel, AdapterReport]:
    """Freeze a model and put adapters on groups of its matrices.

    Args:
        model: a Phi-3, Phi-3.5-MoE, Phi-3-Vision or a mixture of these, in 4 bits or not. For
            adapters on fused experts it is taken apart first (`unfuse`), where it is.
        groups: some of "attention", "experts", "mlp", "vision", "projector" and "gates" (also
            called "router").
        r: rank of the adapters.
        alpha: adapters count `alpha / r` times.
        dropout: share of an adapter's inputs that is left out in training.
        seed: of the adapters' random halves; their other halves are zero.

    Returns:
        The model with adapters, which alone are trained, and what has them.

    Raises:
        ValueError: there is no such group, the model has nothing of it that can be adapted, or it
            has adapters already; the model is then left as it was.

    Example:
        >>> model, report = add_adapters(model, ("attention", "experts"), r=16)  # doctest: +SKIP
        >>> print(report.table())  # doctest: +SKIP
    """
    if isinstance(model, PeftModel):
        raise ValueError("The model has adapters already: merge them (merge_adapters) first.")
    chosen = [groups] if isinstance(groups, str) else list(groups)
    chosen = list(dict.fromkeys(ALIASES.get(group, group) for group in chosen))
    found = {group: _matrices(model, group) for group in chosen if group != "experts"}
    if "experts" in chosen:  # the last that may fail: then there are none to take apart
        model = unfuse(model)
        found["experts"] = _matrices(model, "experts")
    gates = found.pop("gates", [])
    matrices = [name for names in found.values() for name in names]
    if not matrices:
        raise ValueError("Name at least one group besides the gates; to train these alone: freeze.")
    return attach(model, lora_config(model, matrices, gates, r, alpha, dropout), seed)


def lora_config(
    model: nn.Module,
    matrices: Iterable[str],
    gates: Iterable[str],
    r: int,
    alpha: int,
    dropout: float,
) -> LoraConfig:
    """PEFT's configuration for exactly these modules, with short names where these say the same.

    Args:
        model: has the modules.
        matrices: full names of what gets LoRA.
        gates: full names of what is trained as a copy.
        r: rank.
        alpha: see `add_adapters`.
        dropout: see `add_adapters`.
    """
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_short_names(model, matrices),
        modules_to_save=_short_names(model, gates) or None,
        task_type="CAUSAL_LM",
    )


@contextmanager
def without_rename_warnings() -> Iterator[None]:
    """PEFT and TRL say "gradient checkpointing", and transformers 5.23 warns of it every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated"
        )
        yield


@without_rename_warnings()
def attach(model: nn.Module, config: LoraConfig, seed: int = 0) -> tuple[PeftModel, AdapterReport]:
    """Put the adapters of a configuration on a model; returns both as `add_adapters`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return adapted, adapter_report(adapted)


def adapter_report(model: PeftModel) -> AdapterReport:
    """Count the adapters of a model, trained or not, by group."""
    counts: dict[str, AdapterCount] = {}
    everything = 0
    for group, members in parameter_groups(model).items():
        tensors = [(name, tensor) for name, tensor in members if is_adapter(name)]
        everything += sum(_size(tensor) for name, tensor in members if not is_adapter(name))
        if tensors:
            modules = {module_of(name) for name, _ in tensors}
            sizes = [tensor.numel() for _, tensor in tensors]
            counts[group] = AdapterCount(len(modules), len(tensors), sum(sizes))
    return AdapterReport(counts, model.active_peft_config.r, everything)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name in a model with adapters."""
    return ".lora_" in name or ".modules_to_save." in name


def module_of(name: str) -> str:
    """The name of the module that an adapter's tensor belongs to."""
    return name.split(".lora_")[0].split(".modules_to_save.")[0]


def why_not(model: nn.Module, group: str) -> str:
    """Why nothing of a group can be adapted, and what to do."""
    present = parameter_groups(model)
    if group in present:
        return (
            f"The {group} of this {type(model).__name__} are fused tensors, which LoRA does not "
            "reach: load it with cephalo_lite.quantize, which has the experts one by one."
        )
    able = [name for name in ADAPTABLE if name in present]
    return f"The model has nothing in group {group!r}; it has {', '.join(able)}."


def _matrices(model: nn.Module, group: str) -> list[str]:
    """Full names of the matrices of a group; raises ValueError where there are none."""
    if group not in ADAPTABLE:
        known = ", ".join(ADAPTABLE)
        what = "cannot have adapters" if group in GROUPS else "is no group"
        raise ValueError(f"{group!r} {what}; choose from {known}.")
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    found = [name for name in linear if group_of(f"{name}.weight") == group]
    if not found:
        raise ValueError(why_not(model, group))
    return found


def _short_names(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Last parts of the names where these mean the same modules, else the full names."""
    modules = set(modules)
    for parts in (1, 2):
        short = {".".join(name.split(".")[-parts:]) for name in modules}
        meant = (name for name, _ in model.named_modules() if _ends(name, short))
        if set(meant) == modules:
            return sorted(short)
    return sorted(modules)


def _ends(name: str, endings: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[-n:]) in endings for n in (1, 2))


def _size(tensor: nn.Parameter) -> int:
    """Weights that a tensor stands for: packed 4-bit storage keeps the shape of its own."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else math.prod(state.shape)
