"""Fitting a linear gate per layer to recorded gate inputs, all layers in one batched product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import trange

from .inputs import GateInputs

HELD_OUT_EVERY = 5  # steps between two looks at the held-out tokens
IMPROVED = 1e-5  # nats by which a layer's held-out loss must fall to count


@dataclass
class GateFit:
    """Fitted gates, and how the fit went."""

    gates: list[dict[str, torch.Tensor]]  # per layer "gate.weight" (E, D) and "gate.bias" (E,)
    train_losses: list[float]  # per step, mean over layers, nats per token
    held_out_losses: list[float]  # after every HELD_OUT_EVERY steps
    best_steps: list[int]  # per layer, the steps after which its gate was kept


def fit_gates(
    inputs: GateInputs,
    held_out: GateInputs,
    experts: int,
    steps: int = 600,
    weight_decay: float = 0.5,
    patience: int = 100,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> GateFit:
    """Fit softmax regressions from gate inputs to experts, one per layer, in float32.

    The problem is convex, so no learning rate is needed: Nesterov's accelerated gradient (1983)
    from zero, with the step that the data's curvature allows. It works as if the inputs were
    standardised per layer and feature; mean and spread are folded into weight and bias, so the
    inputs (the one large tensor) are never copied. Each layer keeps its gate of the step where its
    own held-out loss was lowest; stopping early is what keeps gates of few samples from learning
    them by heart.

    Args:
        inputs: N tokens to fit to; every expert weighs the same, however many tokens it has.
        held_out: tokens to stop at.
        experts: number of experts E.
        steps: at most so many.
        weight_decay: pull towards zero, divided by N, so that it matters with few tokens and hardly
            with many.
        patience: stop when no layer has improved for so many steps.
        device: where to compute; needs 4 * L * N * D bytes there.
        seed: of the vector that the curvature is measured with.
        progress: show a progress bar.

    Returns:
        The gates, on the CPU, with losses per step.

    Raises:
        ValueError: an expert has no token.
    """
    weight_decay = weight_decay / len(inputs.expert)
    train, test = _Tokens(inputs, experts, device), _Tokens(held_out, experts, device)
    mean, scale = _standard(train)  # (L, 1, D) both
    outer, basis = (mean, scale), None
    if 2 * train.hidden.shape[1] < train.hidden.shape[2]:
        basis = _into_span(train, test, mean, scale)  # (L, D, N)
        mean, scale = (f(train.hidden[:, :1]) for f in (torch.zeros_like, torch.ones_like))
    layers, _, width = train.hidden.shape
    rate = 1.5 / _curvature(train, mean, scale, seed)  # (L, 1, 1); 2 would be the limit
    weight = torch.zeros(layers, experts, width, device=device)  # of standardised inputs
    bias = torch.zeros(layers, 1, experts, device=device)
    ahead, bias_ahead = weight, bias  # where the gradient is taken
    kept = [weight.clone(), bias.clone()]
    best = torch.full((layers,), float("inf"), device=device)
    best_steps, train_losses, held_out_losses = [0] * layers, [], []

    def folded(weight, bias):
        """Weight and bias for the inputs as they are."""
        weight = weight * scale
        return weight, bias - mean @ weight.mT

    for step in (bar := trange(1, steps + 1, desc="gates", disable=not progress, leave=False)):
        loss, slope = train.loss(*folded(ahead, bias_ahead))  # (L,), (L, N, E)
        total = slope.sum(dim=1, keepdim=True)  # (L, 1, E)
        gradient = (slope.mT @ train.hidden - total.mT * mean) * scale  # (L, E, D)
        previous, bias_previous = weight, bias
        weight = ahead * (1 - 1.5 * weight_decay) - rate * gradient
        bias = bias_ahead - 1.5 * total
        momentum = step / (step + 3)
        ahead = weight + momentum * (weight - previous)
        bias_ahead = bias + momentum * (bias - bias_previous)
        train_losses.append(loss.mean().item())
        if step % HELD_OUT_EVERY and step < steps:
            continue
        held = test.loss(*folded(weight, bias), slope=False)[0]  # (L,)
        better = held < best - IMPROVED
        best = torch.where(better, held, best)
        kept[0][better], kept[1][better] = weight[better], bias[better]
        for layer in better.nonzero()[:, 0].tolist():
            best_steps[layer] = step
        held_out_losses.append(held.mean().item())
        bar.set_postfix(held_out=f"{held_out_losses[-1]:.3f}", refresh=False)
        if step - max(best_steps) >= patience:
            break
    weight, bias = kept
    if basis is not None:
        weight, (mean, scale) = weight @ basis.mT, outer
    weight, bias = (tensor.cpu() for tensor in folded(weight, bias))
    gates = [{"gate.weight": w, "gate.bias": b[0]} for w, b in zip(weight, bias, strict=True)]
    return GateFit(gates, train_losses, held_out_losses, best_steps)


class _Tokens:
    """Tokens, and what they count; weights (N, 1) sum to 1, to 1/E for every expert."""

    def __init__(self, inputs: GateInputs, experts: int, device):
        counts = torch.bincount(inputs.expert, minlength=experts)
        if (counts == 0).any() or len(counts) > experts:
            raise ValueError(f"Tokens per expert are {counts.tolist()}; all {experts} need some.")
        self.hidden = inputs.hidden.to(device).contiguous()  # (L, N, D)
        self.weight = (1 / (experts * counts[inputs.expert]))[:, None].to(device)  # (N, 1)
        self.target = nn.functional.one_hot(inputs.expert, experts).float().to(device)  # (N, E)

    def loss(self, weight, bias, slope: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross-entropy per layer (L,), and its derivative by the logits (L, N, E)."""
        logits = torch.baddbmm(bias, self.hidden, weight.mT)  # (L, N, E)
        logs = logits.log_softmax(dim=-1)
        loss = -(logs * (self.target * self.weight)).sum(dim=(1, 2))
        return loss, (logs.exp() - self.target) * self.weight if slope else None


def _standard(tokens: _Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation of each feature (L, 1, D); layer by layer, to save memory."""
    means, scales = [], []
    for hidden in tokens.hidden:
        mean = (hidden * tokens.weight).sum(dim=0, keepdim=True)  # (1, D)
        variance = ((hidden - mean).square_() * tokens.weight).sum(dim=0, keepdim=True)
        means.append(mean)
        scales.append((variance + 1e-6 * variance.mean() + 1e-12).rsqrt())
    return torch.stack(means), torch.stack(scales)


def _into_span(train: _Tokens, test: _Tokens, mean, scale) -> torch.Tensor:
    """Express fewer tokens than features in an orthonormal basis (L, D, N) of what they span.

    From zero, gradients never lead out of that span, and a rotation changes neither products nor
    lengths: the fit is the same, with N features instead of D.
    """
    basis, coordinates = torch.linalg.qr(((train.hidden - mean) * scale).mT)
    train.hidden = coordinates.mT.contiguous()  # (L, N, N)
    test.hidden = ((test.hidden - mean) * scale) @ basis
    return basis


def _curvature(tokens: _Tokens, mean, scale, seed: int, iterations: int = 15) -> torch.Tensor:
    """Largest eigenvalue (L, 1, 1) of the covariance of standardised inputs, by power iteration."""
    generator = torch.Generator().manual_seed(seed)
    layers, _, width = tokens.hidden.shape
    vector = torch.randn(layers, 1, width, generator=generator).to(mean.device)
    for _ in range(iterations):
        vector = vector / vector.norm(dim=2, keepdim=True).clamp(min=1e-12)
        along = vector * scale
        seen = (tokens.hidden @ along.mT - mean @ along.mT) * tokens.weight  # (L, N, 1)
        vector = (seen.mT @ tokens.hidden - seen.sum(dim=1, keepdim=True) * mean) * scale
    return vector.norm(dim=2, keepdim=True).clamp(min=1.0)
