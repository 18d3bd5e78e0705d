"""Fitting a linear gate per layer to recorded gate inputs, all layers in one batched product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import trange

from .gate_inputs import GateInputs
from .gate_space import Tokens, curvature, smaller_space

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
    from zero, with the step that the data's curvature allows, as if the inputs were standardised
    per layer and feature (see `gate_space`). Each layer keeps its gate of the step where its own
    held-out loss was lowest; stopping early is what keeps gates of few samples from learning them
    by heart.

    Args:
        inputs: N tokens to fit to; every expert weighs the same, however many tokens it has.
        held_out: tokens to stop at.
        experts: number of experts E.
        steps: at most so many.
        weight_decay: pull towards zero, divided by N, so that it matters with few tokens and hardly
            with many.
        patience: stop when no layer has improved for so many steps.
        device: where to compute; needs 4 * L * N * D bytes there, and a little more.
        seed: of the vector that the curvature is measured with.
        progress: show a progress bar.

    Returns:
        The gates, on the CPU, with losses per step.

    Raises:
        ValueError: an expert has no token.
    """
    train, test = Tokens(inputs, experts, device), Tokens(held_out, experts, device)
    space = smaller_space(train, test)
    rate = 1.5 / curvature(space, seed).clamp(min=1.0)  # (L, 1, 1); 2 would be the limit
    shrink = 1 - 1.5 * weight_decay / len(inputs.expert)
    point = ahead = space.start  # (L, E, D) or (L, E, N); the gradient is taken ahead
    bias = bias_ahead = torch.zeros(len(point), 1, experts, device=device)
    kept = [point.clone(), bias.clone()]
    best = torch.full((len(point),), float("inf"), device=device)
    best_steps, train_losses, held_out_losses = [0] * len(point), [], []
    for step in (bar := trange(1, steps + 1, desc="gates", disable=not progress, leave=False)):
        loss, slope = train.loss(space.logits(ahead, bias_ahead))  # (L,), (L, N, E)
        total = slope.sum(dim=1, keepdim=True)  # (L, 1, E)
        momentum = step / (step + 3)
        before, bias_before = point, bias
        point = torch.addcmul(ahead * shrink, rate, space.gradient(slope, total), value=-1)
        bias = bias_ahead - 1.5 * total
        ahead = torch.lerp(before, point, 1 + momentum)  # beyond the new point
        bias_ahead = torch.lerp(bias_before, bias, 1 + momentum)
        train_losses.append(loss.mean().item())
        if step % HELD_OUT_EVERY and step < steps:
            continue
        held, _ = test.loss(space.logits(point, bias, held_out=True))  # (L,)
        better = held < best - IMPROVED
        best = torch.where(better, held, best)
        kept[0][better], kept[1][better] = point[better], bias[better]
        for layer in better.nonzero()[:, 0].tolist():
            best_steps[layer] = step
        held_out_losses.append(held.mean().item())
        bar.set_postfix(held_out=f"{held_out_losses[-1]:.3f}", refresh=False)
        if step - max(best_steps) >= patience:
            break
    weight, bias = (tensor.cpu() for tensor in space.folded(*kept))
    gates = [{"gate.weight": w, "gate.bias": b[0]} for w, b in zip(weight, bias, strict=True)]
    return GateFit(gates, train_losses, held_out_losses, best_steps)
