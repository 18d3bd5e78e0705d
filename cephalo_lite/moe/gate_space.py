"""Two ways to write the same linear gates while they are fitted: by features, or by tokens.

Both speak of standardised inputs Z (N, D): mean 0 and spread 1 per layer and feature. A gate's
logits are Z Wᵀ + b. Steps along the gradient, from zero, never leave the span of the tokens: W = A Z
with A (E, N), and the logits are Z Zᵀ Aᵀ + b. With fewer tokens than features the table Z Zᵀ of inner
products is smaller than Z, and it is read once a step instead of twice.
"""

from __future__ import annotations

import torch
from torch import nn

from .gate_inputs import GateInputs


class Tokens:
    """Tokens on a device; weights (N, 1) sum to 1, to 1/E for every expert."""

    def __init__(self, inputs: GateInputs, experts: int, device: torch.device | str):
        counts = torch.bincount(inputs.expert, minlength=experts)
        if (counts == 0).any() or len(counts) > experts:
            raise ValueError(f"Tokens per expert are {counts.tolist()}; all {experts} need some.")
        self.hidden = inputs.hidden.to(device).contiguous()  # (L, N, D)
        self.weight = (1 / (experts * counts[inputs.expert]))[:, None].to(device)  # (N, 1)
        target = nn.functional.one_hot(inputs.expert, experts).to(device)
        self.goal = target * self.weight  # (N, E)

    def loss(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy per layer (L,), and its derivative by the logits (L, N, E)."""
        logs = logits.log_softmax(dim=-1)
        loss = -(logs * self.goal).sum(dim=(1, 2))
        return loss, logs.exp_().mul_(self.weight).sub_(self.goal)

    def standard(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and 1 / standard deviation of each feature (L, 1, D)."""
        means, scales = [], []
        for hidden in self.hidden:  # one by one, to save memory
            mean = self.weight.T @ hidden  # (1, D)
            variance = self.weight.T @ (hidden - mean).square_()
            means.append(mean)
            scales.append((variance + 1e-6 * variance.mean() + 1e-12).rsqrt())
        return torch.stack(means), torch.stack(scales)


class FeatureSpace:
    """Gates as weights of features, (L, E, D); mean and spread are folded in, nothing is copied."""

    def __init__(self, train: Tokens, test: Tokens):
        self.train, self.test = train, test
        self.mean, self.scale = train.standard()
        layers, _, self.size = train.hidden.shape
        self.start = torch.zeros(layers, train.goal.shape[1], self.size, device=train.hidden.device)

    def folded(self, point: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (L, E, D) and bias (L, 1, E) for the inputs as they are."""
        weight = point * self.scale
        return weight, bias - self.mean @ weight.mT

    def logits(self, point: torch.Tensor, bias: torch.Tensor, held_out: bool = False):
        """Logits (L, N, E) of all tokens."""
        weight, bias = self.folded(point, bias)
        hidden = self.test.hidden if held_out else self.train.hidden
        return torch.baddbmm(bias, hidden, weight.mT)

    def gradient(self, slope: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Derivative (L, E, D) from that by the logits and its sum over tokens (L, 1, E)."""
        pull = torch.baddbmm(total.mT * self.mean, slope.mT, self.train.hidden, beta=-1)
        return pull.mul_(self.scale)


class TokenSpace:
    """Gates as weights of tokens, (L, E, N), by the inner products of standardised tokens."""

    def __init__(self, train: Tokens, test: Tokens):
        self.train = train
        self.mean, self.scale = train.standard()
        products, others = [], []
        for layer, (mean, scale) in enumerate(zip(self.mean, self.scale, strict=True)):
            standard = (train.hidden[layer] - mean) * scale  # (N, D)
            products.append(standard @ standard.T)
            others.append((test.hidden[layer] - mean) * scale @ standard.T)
        self.products, self.others = torch.stack(products), torch.stack(others)
        layers, self.size, _ = self.products.shape
        self.start = torch.zeros(layers, train.goal.shape[1], self.size, device=train.hidden.device)

    def folded(self, point: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (L, E, D) and bias (L, 1, E) for the inputs as they are."""
        total = point.sum(dim=2, keepdim=True)  # (L, E, 1)
        weight = (point @ self.train.hidden - total * self.mean) * self.scale.square()
        return weight, bias - self.mean @ weight.mT

    def logits(self, point: torch.Tensor, bias: torch.Tensor, held_out: bool = False):
        """Logits (L, N, E) of all tokens."""
        return torch.baddbmm(bias, self.others if held_out else self.products, point.mT)

    def gradient(self, slope: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """What a step along the derivative by W (L, E, D) adds to A (L, E, N)."""
        return slope.mT


def smaller_space(train: Tokens, test: Tokens) -> FeatureSpace | TokenSpace:
    """The one whose tables take less reading per step."""
    _, count, width = train.hidden.shape
    return (TokenSpace if count < 1.5 * width else FeatureSpace)(train, test)


def curvature(
    space: FeatureSpace | TokenSpace, seed: int = 0, iterations: int = 10
) -> torch.Tensor:
    """Largest eigenvalue (L, 1, 1) of the covariance of standardised inputs, by power iteration.

    It comes out a little low, by a tenth or so where no direction stands out.
    """
    layers, device = len(space.start), space.start.device
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(layers, 1, space.size, generator=generator).to(device)
    none, value = torch.zeros(layers, 1, 1, device=device), None
    for _ in range(iterations):
        along = space.logits(vector, none)  # (L, N, 1)
        weighed = along * space.train.weight
        value = (along * weighed).sum(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        weighed = weighed / value
        vector = space.gradient(weighed, weighed.sum(dim=1, keepdim=True))
    return value
