"""Adapters on the disk: saved whole, and loaded so that every tensor has its place.

PEFT leaves tensors that it cannot place behind without an error. An adapter of 2024 on Phi-3.5-MoE,
whose experts were named otherwise, so loads as attention alone. Here names of then are understood,
and a tensor without a place is an error.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from .adapters import AdapterReport, attach, is_adapter, lora_config, module_of, why_not
from .folders import new_folder
from .groups import group_of
from .unfusing import unfuse

WEIGHTS = "adapter_model.safetensors"
LORA = r"\.lora_[AB]\.weight$"
PREFIX = "base_model.model."
# Names of 2024 → names here: transformers 4's Phi-3.5-MoE, and the published vision models.
RENAMED = (
    (r"\.block_sparse_moe\.gate\.", ".mlp.router."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"^model\.model\.", "model."),
    (r"\.img_processor\.vision_model\.", ".img_processor."),
)


def save_adapters(model: PeftModel, folder: str | Path, overwrite: bool = False) -> Path:
    """Write the adapters of a model: PEFT's two files, weights as safetensors.

    Args:
        model: has adapters.
        folder: gets its name when all is written.
        overwrite: replace a folder that is there.

    Returns:
        The folder.

    Raises:
        TypeError: the model has no adapters.
        FileExistsError: something is at `folder`.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"{type(model).__name__} has no adapters to save.")
    with new_folder(folder, overwrite) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
    return Path(folder)


def load_adapters(
    model: nn.Module, folder: str | Path, trainable: bool = False
) -> tuple[PeftModel, AdapterReport]:
    """Put saved adapters on their model.

    Args:
        model: what the adapters were trained on, in 4 bits or not. For adapters on fused experts it
            is taken apart first (`unfuse`), where it is.
        folder: what `save_adapters`, PEFT or a training checkpoint wrote; adapters of 2024 too. A
            LoRA on a gate, as the old recipe made, becomes a gate of its own.
        trainable: train them further; else they are frozen and the model is in eval mode.

    Returns:
        The model with adapters, and what has them. On a model in 4 bits LoRA computes in the dtype
        that it was saved in, as it was trained; elsewhere in float32, as merging does.

    Raises:
        FileNotFoundError: the folder holds no adapters as safetensors.
        ValueError: an adapter tensor has no place in the model, a place has no tensor, or it is no
            plain LoRA.
    """
    saved, tensors = read_adapters(folder)
    if any(group_of(name) == "experts" for name in tensors):
        model = unfuse(model)
    _check_places(model, tensors)
    tensors = _gates_as_copies(model, tensors, saved)
    lora = {module_of(name) for name in tensors if ".lora_" in name}
    copies = {name.rpartition(".")[0] for name in tensors if ".lora_" not in name}
    config = lora_config(model, lora, copies, saved.r, saved.lora_alpha, saved.lora_dropout)
    config.use_rslora = saved.use_rslora
    config.rank_pattern, config.alpha_pattern = saved.rank_pattern, saved.alpha_pattern
    config.inference_mode = not trainable
    adapted, report = attach(model, config)
    # After attaching, where PEFT would warn of a base that lies elsewhere now.
    adapted.peft_config["default"].base_model_name_or_path = saved.base_model_name_or_path
    _fill(adapted, tensors)
    return adapted.train(trainable), report


def read_adapters(folder: str | Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Read the files of adapters.

    Args:
        folder: see `load_adapters`.

    Returns:
        PEFT's configuration, and tensors by their name in a model without adapters, such as
        `model.layers.0.mlp.experts.3.w1.lora_A.weight`.

    Raises:
        FileNotFoundError: the folder holds no adapters as safetensors.
        ValueError: they are no plain LoRA.
    """
    folder = Path(folder).expanduser()
    if not (folder / WEIGHTS).is_file() or not (folder / "adapter_config.json").is_file():
        pickled = " (a pickle such as adapter_model.bin can run code and is not read)"
        raise FileNotFoundError(f"{folder} lacks adapter_config.json or {WEIGHTS}{pickled}.")
    config = PeftConfig.from_pretrained(str(folder))
    tensors = {_name_here(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    strange = [name for name in tensors if ".lora_" in name and not re.search(LORA, name)]
    if not isinstance(config, LoraConfig) or config.use_dora or strange:
        raise ValueError(f"{folder} holds {config.peft_type} of a kind that is not plain LoRA.")
    return config, tensors


def _name_here(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _check_places(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError where a tensor has no module that it can adapt."""
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    owner = {n: module_of(n) if ".lora_" in n else n.rpartition(".")[0] for n in tensors}
    lost = [name for name in tensors if owner[name] not in modules]
    if lost:
        reason = ""
        if group_of(lost[0]) == "experts":
            reason = " " + why_not(model, "experts")
        raise ValueError(
            f"{len(lost)} of {len(tensors)} adapter tensors have no place in this "
            f"{type(model).__name__}, such as {lost[0]}.{reason}"
        )


@torch.no_grad()
def _gates_as_copies(
    model: nn.Module, tensors: dict[str, torch.Tensor], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """Add a LoRA on a gate to the gate: it is small, and its module is more than its matrix."""
    gates = {module_of(n) for n in tensors if ".lora_" in n and group_of(n) == "gates"}
    kept = {name: tensor for name, tensor in tensors.items() if module_of(name) not in gates}
    for gate in gates:
        down, up = (tensors[f"{gate}.lora_{side}.weight"].float() for side in "AB")
        rank = len(down)
        scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        for name, parameter in model.get_submodule(gate).named_parameters():
            kept[f"{gate}.{name}"] = parameter.detach().cpu().clone()
        weight = kept[f"{gate}.weight"]
        kept[f"{gate}.weight"] = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return kept


def _fill(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors to the adapters, each of which must get one of its own shape."""
    packed = bool(getattr(model.get_base_model(), "is_loaded_in_4bit", False))
    places = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    state = {}
    for name, tensor in tensors.items():
        place = _place_of(name)
        if place in places:
            like = places[place]
            as_saved = packed and ".lora_" in name
            state[place] = tensor.to(like.device, None if as_saved else like.dtype)
    if state.keys() != places.keys() or len(state) != len(tensors):
        lacking = sorted(places.keys() - state.keys())
        raise ValueError(
            f"{len(tensors)} adapter tensors do not fill {len(places)} places; without one are "
            f"{', '.join(lacking[:3]) or 'none'}."
        )
    try:
        model.load_state_dict(state, strict=False, assign=True)  # assign: in the state's dtype
    except RuntimeError as error:
        raise ValueError(f"The adapters are for a model of another size: {error}") from error


def _place_of(name: str) -> str:
    """The name of an adapter's tensor in a model with adapters."""
    if ".lora_" in name:
        return PREFIX + name.replace(".weight", ".default.weight")
    owner, _, leaf = name.rpartition(".")
    return f"{PREFIX}{owner}.modules_to_save.default.{leaf}"
