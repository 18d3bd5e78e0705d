"""Gates that are trained are stepped in float32, whatever the rest of the model is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..moe.routing import Router


@contextmanager
def exact_gates(model: nn.Module) -> Iterator[None]:
    """Within this context trained gates are float32, and score in it; then they are as before.

    In bfloat16 a number has 8 bits: at the usual rates most steps of a weight would be rounded
    away (98 % of the larger ones never moved in 1,000 steps of 5e-5).

    Args:
        model: the gates that require gradients are changed; what has no such gates stays as it is.
    """
    changed, hooks = [], []
    for router in model.modules():
        if isinstance(router, Router):
            low = [p for p in router.parameters() if p.requires_grad and p.dtype != torch.float32]
            changed += [(parameter, parameter.dtype) for parameter in low]
            if low:
                hooks.append(router.register_forward_pre_hook(_in_float32))
    for parameter, _ in changed:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, dtype in changed:
            parameter.data = parameter.data.to(dtype)


def _in_float32(module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].float(),)
