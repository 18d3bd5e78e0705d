"""Routers: from the hidden state of a token to the experts that see it, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init


class RouterOutput(NamedTuple):
    """What a router decides for N tokens."""

    logits: torch.Tensor  # (N, E) scores
    probs: torch.Tensor  # (N, E) their softmax, float32
    weights: torch.Tensor  # (N, K) of the chosen experts
    chosen: torch.Tensor  # (N, K) their numbers


class Router(nn.Module):
    """A linear gate with bias, softmax, top-k; subclasses say how probabilities become weights.

    With one expert per token the weight is 1, whatever the gate thinks, and no gradient would reach
    it. So the weight is passed *straight through*: forward it stays 1, backward it is the chosen
    probability.

    Attributes:
        straight_through: False restores the 2024 behaviour (with k=1 the gate learns nothing).
        selected: number of the expert that all tokens are sent to, or None to route; see
            `select_expert`.
    """

    init_std = 0.02

    def __init__(self, config):
        super().__init__()
        self.k = config.k
        self.gate = nn.Linear(config.hidden_size, config.num_expert_models)
        self.straight_through = True
        self.selected: int | None = None

    def weigh(self, values: torch.Tensor) -> torch.Tensor:
        """Weights (N, K) of the chosen experts from their probabilities (N, K)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Small random weights and no bias: at first no expert is preferred."""
        init.normal_(self.gate.weight, std=self.init_std)
        init.zeros_(self.gate.bias)

    def forward(self, hidden: torch.Tensor) -> RouterOutput:
        """Route N tokens of hidden states (N, D)."""
        logits = self.gate(hidden)  # (N, E)
        probs = logits.float().softmax(dim=-1)  # (N, E)
        if self.selected is not None:
            chosen = torch.full((len(hidden), self.k), self.selected, device=hidden.device)
            weights = torch.zeros_like(chosen, dtype=probs.dtype)
            weights[:, 0] = 1
            return RouterOutput(logits, probs, weights, chosen)
        values, chosen = probs.topk(self.k, dim=-1)  # (N, K), (N, K)
        weights = self.weigh(values)
        if self.k == 1 and self.straight_through and torch.is_grad_enabled():
            weights = weights.detach() + (values - values.detach())
        return RouterOutput(logits, probs, weights, chosen)


class CephaloRouter(Router):
    """The published weighting: softmax of the chosen *probabilities*.

    It flattens the mixture: two experts get weights between 0.27 and 0.73, however sure the gate
    is.
    Source: moe_phi3_v.py of lamm-mit/Cephalo-Phi-3-Vision-MoE, measured.
    """

    def weigh(self, values: torch.Tensor) -> torch.Tensor:
        """Softmax over the K chosen values."""
        return values.softmax(dim=-1)


class RenormalisedRouter(Router):
    """The chosen probabilities divided by their sum, as in Mixtral (arXiv 2401.04088)."""

    def weigh(self, values: torch.Tensor) -> torch.Tensor:
        """Each value divided by the sum of its row."""
        return values / values.sum(dim=-1, keepdim=True)


ROUTERS: dict[str, type[Router]] = {"cephalo": CephaloRouter, "renormalised": RenormalisedRouter}


def routers(model: nn.Module) -> list[Router]:
    """All routers of a model, first layer first.

    Raises:
        ValueError: the model has none.
    """
    found = [module for module in model.modules() if isinstance(module, Router)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no routers: it is not a mixture of experts.")
    return found


@contextmanager
def select_expert(model: nn.Module, expert: int | None) -> Iterator[None]:
    """Within this context every token passes through one expert, as in a dense model.

    Args:
        model: a mixture.
        expert: number of the expert; None leaves the routing to the gates.

    Raises:
        ValueError: there is no such expert.
    """
    found = routers(model)
    number = found[0].gate.out_features
    if expert is not None and not 0 <= expert < number:
        raise ValueError(f"Expert {expert}: the model has experts 0..{number - 1}.")
    before = [router.selected for router in found]
    try:
        for router in found:
            router.selected = expert
        yield
    finally:
        for router, selected in zip(found, before, strict=True):
            router.selected = selected
