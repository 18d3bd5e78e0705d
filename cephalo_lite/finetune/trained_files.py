"""What was trained of a model without adapters, as one file of a checkpoint.

A checkpoint of gates is then as small as the gates, not as large as the model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

TRAINED = "trained.safetensors"


def save_trained(model: nn.Module, folder: str | Path) -> Path:
    """Write the parameters that require gradients, under their names in memory.

    Args:
        model: some of it is trained.
        folder: is made where it is not there.

    Returns:
        The file.
    """
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / TRAINED, metadata={"format": "pt"})
    return Path(folder) / TRAINED


@torch.no_grad()
def load_trained(model: nn.Module, folder: str | Path) -> list[str]:
    """Put what `save_trained` wrote into the model that it is of.

    Args:
        model: is changed in place; each tensor keeps the dtype that it has in the model.
        folder: a checkpoint of a training of some groups, such as the gates.

    Returns:
        The names of the tensors.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: a tensor has no place in the model, or one of another shape.
    """
    file = Path(folder) / TRAINED
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {TRAINED}: it is no checkpoint of groups that were trained."
        )
    tensors, places = load_file(file), dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in places or places[name].shape != tensor.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} of {file} has no place in this "
                f"{type(model).__name__}: load the model that was trained."
            )
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    return list(tensors)
