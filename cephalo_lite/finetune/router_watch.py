"""Routers in training: what keeps them balanced and their scores small, and how they did.

Both losses are of each layer, and then averaged. transformers' own balance loss is of all layers'
tokens together, so that a layer which uses one expert alone and another which uses the other look
balanced.

Source: load-balance loss, arXiv 2101.03961 (1 where all experts are used alike); router z-loss,
arXiv 2202.08906.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from ..moe.routing import Router

THIRDS = ("first", "middle", "last")  # layers by their depth


@dataclass(frozen=True)
class RouterRecord:
    """How the routers did between two logs of a training."""

    step: int
    layers: list[int]  # L numbers
    load: list[list[float]]  # (L, E) share of the choices that each expert got
    entropy: list[float]  # (L,) mean of the probabilities' entropy, from 0 (sure) to 1 (uniform)
    balance: list[float]  # (L,) load-balance loss, 1 where all experts are used alike
    z: list[float]  # (L,) z-loss

    @property
    def dead(self) -> list[tuple[int, int]]:
        """(layer, expert) of the experts that no token was sent to."""
        rows = zip(self.layers, self.load, strict=True)
        return [(layer, e) for layer, row in rows for e, share in enumerate(row) if not share]


class RouterWatch:
    """Records what the routers of a model decide, where `watching` asks for it.

    Attributes:
        layers: numbers of the layers that have a router; empty for a model without.
    """

    def __init__(self, model: nn.Module):
        self._routers: list[tuple[int, nn.Module]] = []
        for name, module in model.named_modules():
            if isinstance(module, Router | PhimoeTopKRouter):
                layer = int(re.findall(r"\.layers\.(\d+)\.", f".{name}")[-1])
                self._routers.append((layer, module))
        # Where a copy of a router is trained there are two in a layer, of which one is called
        self.layers = sorted({layer for layer, _ in self._routers})
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context a forward pass is recorded; going backward must be outside.

        There activations may be computed once more, and routers decide again.
        """

        def keep(layer: int):
            def hook(module, args, output):
                self._seen[layer] = (output[0], output[-1])

            return hook

        hooks = [router.register_forward_hook(keep(layer)) for layer, router in self._routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def losses(self, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Balance loss and z-loss of the last pass, scalars, with gradients to the routers.

        Args:
            mask: (B, T), 0 where a token is padding; None counts all.
        """
        device = next(iter(self._seen.values()))[0].device
        keep = None if mask is None else mask.flatten().bool()
        parts = [self._of_layer(*self._seen[layer], keep) for layer in self.layers]
        stacked = {
            name: torch.stack([part[name].to(device) for part in parts]) for name in parts[0]
        }
        for name, value in stacked.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._seen.clear()
        return stacked["balance"].mean(), stacked["z"].mean()

    def _of_layer(
        self, logits: torch.Tensor, chosen: torch.Tensor, keep: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The losses of a layer, and sums over its tokens."""
        if keep is not None:
            logits, chosen = logits[keep.to(logits.device)], chosen[keep.to(chosen.device)]
        logits = logits.float()  # (N, E)
        log_probs = logits.log_softmax(dim=-1)
        probs = log_probs.exp()
        choices = torch.bincount(chosen.flatten(), minlength=logits.shape[1]).float()  # (E,)
        return {
            "balance": logits.shape[1] * (choices / choices.sum() * probs.mean(dim=0)).sum(),
            "z": logits.logsumexp(dim=-1).square().mean(),
            "choices": choices,
            "entropy": -(probs * log_probs).sum() / math.log(max(2, logits.shape[1])),
            "tokens": torch.tensor(float(len(logits)), device=logits.device),
            "passes": torch.ones((), device=logits.device),
        }

    def read(self, reduce=lambda tensor: tensor) -> dict[str, Any] | None:
        """What was seen since the last call, as JSON can hold it; None where nothing was.

        Args:
            reduce: adds a tensor up over all processes.

        Returns:
            The fields of a `RouterRecord` but the step.
        """
        if not self._sums:
            return None
        sums = {name: reduce(value.clone()) for name, value in self._sums.items()}
        self._sums = {}

        def told(tensor: torch.Tensor) -> list:
            return (tensor.double() * 1e5).round().div(1e5).tolist()

        return {
            "layers": list(self.layers),
            "load": told(sums["choices"] / sums["choices"].sum(dim=1, keepdim=True)),
            "entropy": told(sums["entropy"] / sums["tokens"]),
            "balance": told(sums["balance"] / sums["passes"]),
            "z": told(sums["z"] / sums["passes"]),
        }


def by_depth(seen: Mapping[str, Any]) -> dict[str, float]:
    """What `RouterWatch.read` gave as numbers to log, for the first, middle and last layers.

    Returns:
        `router/first/entropy`, ... of the mean over a third of the layers; `max_load` and `dead`
        are the greatest share of any expert there, and how many got no token.
    """
    numbers: dict[str, float] = {}
    for third, where in _thirds(len(seen["layers"])).items():
        load = [seen["load"][i] for i in where]
        numbers |= {
            f"router/{third}/{name}": fmean([seen[name][i] for i in where])
            for name in ("entropy", "balance", "z")
        }
        numbers[f"router/{third}/max_load"] = max(map(max, load))
        numbers[f"router/{third}/dead"] = sum(share == 0 for row in load for share in row)
    return numbers


def _thirds(count: int) -> dict[str, range]:
    edges = [round(count * part / 3) for part in range(4)]
    parts = {name: range(edges[i], edges[i + 1]) for i, name in enumerate(THIRDS)}
    return {name: part for name, part in parts.items() if part}
