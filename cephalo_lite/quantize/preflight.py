"""What must hold before a 4-bit model is trained, checked instead of hoped.

Each of these happens without a word in the stock path: experts that stay in bfloat16, targets that
match nothing, adapter tensors that attach to nothing, weights cast up to float32, a model without
anything to train, layers that bitsandbytes repacked for inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .cpu_guard import exposed_layers, repacked_layers
from .sizes import is_4bit, is_packed, quantisation_tensors, unpacked_numel

ADAPTER_FILE = "adapter_model.safetensors"


class PreflightError(ValueError):
    """A 4-bit model is not what it is taken for; the message names all that is wrong."""


class Row(NamedTuple):
    """How much there is of one kind of weights."""

    tensors: int
    weights: int  # unpacked
    nbytes: int  # as stored


@dataclass(frozen=True)
class PreflightReport:
    """What a 4-bit model is made of, after all checks passed."""

    kinds: dict[str, Row]  # "4 bits", "kept" (in half precision), "adapters"
    targets: dict[str, int]  # what adapters were asked for → layers that have one
    trainable: Row

    @property
    def packed_share(self) -> float:
        """Share of the base model's weights that are in 4 bits."""
        packed, kept = self.kinds["4 bits"].weights, self.kinds["kept"].weights
        return packed / (packed + kept)

    def table(self) -> str:
        """The counts as aligned text."""
        lines = [f"{'':<12}{'tensors':>9}{'weights':>16}{'MB':>12}"]
        for name, row in [*self.kinds.items(), ("trainable", self.trainable)]:
            lines.append(f"{name:<12}{row.tensors:>9,}{row.weights:>16,}{row.nbytes / 1e6:>12,.3f}")
        lines += [f"target {name}: {count:,} layers" for name, count in self.targets.items()]
        return "\n".join(lines)


def preflight(model: nn.Module, adapters: str | Path | None = None) -> PreflightReport:
    """Check a 4-bit model that is about to be trained.

    Args:
        model: from `load_4bit`, with adapters or with groups that were unfrozen.
        adapters: folder of the adapter that was loaded into the model, if one was: each of its
            tensors must be in the model.

    Returns:
        What the model is made of.

    Raises:
        PreflightError: large weights are not quantised, were cast up or repacked, a target matched
            nothing, adapter tensors did not attach, or there is nothing to train. All that is wrong
            is named, with its size.

    Example:
        >>> model, tokenizer = load_4bit("microsoft/Phi-3.5-MoE-instruct")  # doctest: +SKIP
        >>> model = get_peft_model(model, LoraConfig(target_modules=["w1"]))  # doctest: +SKIP
        >>> print(preflight(model).table())  # doctest: +SKIP
    """
    targets = _targets(model)
    problems = weight_problems(model)
    problems += [
        f"the target {target!r} matched no layer, so nothing of it would be trained. Its name must "
        f"be that of a layer of this model: {', '.join(_layer_names(model))}."
        for target, layers in targets.items()
        if not layers
    ]
    if adapters is not None:
        problems += _unattached(model, Path(adapters))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append(
            "nothing is trainable. Add adapters (peft.get_peft_model), load them with "
            "is_trainable=True, or unfreeze a group."
        )
    if problems:
        raise PreflightError(_told(problems))
    return PreflightReport(_kinds(model), targets, _trainable(model))


def check_weights(model: nn.Module) -> None:
    """The part of `preflight` that is about the base model.

    Raises:
        PreflightError: weights are not quantised, cast up or repacked.
    """
    problems = weight_problems(model)
    if problems:
        raise PreflightError(_told(problems))


def weight_problems(model: nn.Module) -> list[str]:
    """What is wrong with the weights of a model that should be in 4 bits; empty if all is well."""
    base = [(n, p) for n, p in model.named_parameters() if not is_adapter(n)]
    problems = []
    left = [(n, p) for n, p in base if is_packed(n, p.ndim) and not is_4bit(p)]
    if left:
        wanted = sum(unpacked_numel(p) for n, p in base if is_packed(n, p.ndim) or is_4bit(p))
        share = sum(p.numel() for _, p in left) / wanted
        problems.append(
            f"{share:.1%} of the weights that belong in 4 bits are not quantised: {_sized(left)}. "
            "Load the model with cephalo_lite.quantize.load_4bit, which quantises experts as well."
        )
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    wide = [
        (name, parameter)
        for name, parameter in base
        if isinstance(dtype, torch.dtype)
        and parameter.is_floating_point()
        and parameter.element_size() > dtype.itemsize
        and not parameter.requires_grad  # what is trained may be wider
    ]
    if wide:
        problems.append(
            f"frozen weights were cast up from {str(dtype).removeprefix('torch.')}: "
            f"{_sized(wide)}. Do not call prepare_model_for_kbit_training: it casts every weight "
            "that is not packed."
        )
    on_cpu = any(parameter.device.type == "cpu" for _, parameter in base)
    packed_for_cpu = [*repacked_layers(model), *(exposed_layers(model) if on_cpu else ())]
    if packed_for_cpu:
        problems.append(
            f"bitsandbytes repacks {len(packed_for_cpu)} layers when the model is evaluated on "
            f"this CPU, such as {packed_for_cpu[0]}; then they cannot be trained. Load the model "
            "with load_4bit, or call cephalo_lite.quantize.guard_cpu before the first evaluation."
        )
    return problems


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a copy that is trained in its place, is one of PEFT's."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _targets(model: nn.Module) -> dict[str, int]:
    """What the adapters' configurations ask for → how many layers have such an adapter."""
    adapted = [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A")]
    found = {}
    for config in getattr(model, "peft_config", {}).values():
        modules = getattr(config, "target_modules", None) or ()
        for target in () if isinstance(modules, str) else sorted(modules):
            found[target] = sum(f".{name}".endswith(f".{target}") for name, _ in adapted)
        for target in getattr(config, "target_parameters", None) or ():
            last = target.rpartition(".")[2]
            found[target] = sum(getattr(m, "parameter_name", None) == last for _, m in adapted)
    return found


def _layer_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers that can have an adapter."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = (name.removesuffix(".base_layer") for name in layers if not is_adapter(name))
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head", "router"})


def _unattached(model: nn.Module, folder: Path) -> list[str]:
    """Tensors of a saved adapter that the model does not hold, by its own names or published ones.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_FILE}: pass the folder of an adapter.")
    if not hasattr(model, "peft_config"):
        return [f"the model has no adapters, so nothing of {folder} is in it."]
    rules = get_model_conversion_mapping(model.get_base_model())
    here = get_peft_model_state_dict(model)
    absent, other, size = [], [], 0
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        for saved in file.keys():
            name = saved
            for rule in rules:
                name, _ = rule.rename_source_key(name)
            tensor, own = file.get_tensor(saved), here.get(name)
            if own is not None and own.shape == tensor.shape:
                if torch.equal(own.cpu(), tensor.to(own.dtype)):
                    continue
                other.append(saved)
            else:
                absent.append(saved)
            size += tensor.nbytes
    if not size:
        return []
    return [
        f"{len(absent) + len(other)} tensors ({_megabytes(size)}) of the adapter in {folder} are "
        f"not in the model, such as {(absent + other)[0]} ({len(absent)} have no place, "
        f"{len(other)} other values). Load it with PeftModel.from_pretrained on a model from "
        "load_4bit."
    ]


def _kinds(model: nn.Module) -> dict[str, Row]:
    kinds: dict[str, list[nn.Parameter]] = {"4 bits": [], "kept": [], "adapters": []}
    for name, parameter in model.named_parameters():
        kind = "adapters" if is_adapter(name) else "4 bits" if is_4bit(parameter) else "kept"
        kinds[kind].append(parameter)
    return {kind: _row(parameters) for kind, parameters in kinds.items()}


def _trainable(model: nn.Module) -> Row:
    return _row(parameter for parameter in model.parameters() if parameter.requires_grad)


def _row(parameters: Iterable[nn.Parameter]) -> Row:
    parameters = list(parameters)
    return Row(len(parameters), sum(map(unpacked_numel, parameters)), sum(map(_nbytes, parameters)))


def _nbytes(parameter: nn.Parameter) -> int:
    return parameter.nbytes + sum(tensor.nbytes for tensor in quantisation_tensors(parameter))


def _sized(named: list[tuple[str, nn.Parameter]]) -> str:
    """The largest by name and size, and the sum."""
    named = sorted(named, key=lambda item: -item[1].nbytes)
    first = [
        f"{name} ({str(p.dtype).removeprefix('torch.')}, {_megabytes(p.nbytes)})"
        for name, p in named[:3]
    ]
    rest = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{', '.join(first)}{rest}, {_megabytes(sum(p.nbytes for _, p in named))} in all"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.3f} MB"


def _told(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"This is no 4-bit model that is ready: {problems[0]}"
    return "This is no 4-bit model that is ready:\n" + "\n".join(f"- {p}" for p in problems)
