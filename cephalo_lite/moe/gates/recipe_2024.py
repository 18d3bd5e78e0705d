"""The published way to train the gates, kept for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm, trange

from .inputs import Sample, encode, in_mode


@torch.no_grad()
def prompt_means(
    model, processor, samples: Sequence[Sample], progress: bool = False
) -> torch.Tensor:
    """Mean over the tokens of each mixed layer's input, under the gates at hand.

    Args:
        model: a mixture.
        processor: its processor.
        samples: (text or messages, pictures), here called prompts.
        progress: show a progress bar.

    Returns:
        (prompts, L, D) float32, on the CPU.
    """
    means = []
    with in_mode(model, training=False):
        for sample in tqdm(samples, desc="prompt means", disable=not progress, leave=False):
            inputs = encode(processor, [sample])
            inputs.pop("labels")
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            states = model.model(
                **inputs, use_cache=False, output_hidden_states=True
            ).hidden_states  # of layer n: its input
            means.append(
                torch.stack([states[n][0].mean(0).float().cpu() for n in model.config.mixed_layers])
            )
    return torch.stack(means)


def fit_means(
    means: torch.Tensor,
    steps: int,
    lr: float,
    seed: int = 0,
    progress: bool = False,
    start: Sequence[dict[str, torch.Tensor]] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """A fresh linear gate per layer, fitted to one vector per expert.

    Args:
        means: (E, L, D), the mean vector of each expert's prompts at each layer.
        steps: of Adam on these E vectors, layer by layer.
        lr: Adam's rate.
        seed: of the gates' start, torch's default initialisation of a linear layer.
        progress: show a progress bar.
        start: gates to start from instead, one per layer, in the form that is returned.

    Returns:
        Gates as `set_gates` takes them, and the mean loss of all layers before each step.
    """
    experts, layers, width = means.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = [nn.Linear(width, experts) for _ in range(layers)]
    if start is not None:
        for gate, given in zip(gates, start, strict=True):
            gate.load_state_dict({name.removeprefix("gate."): w for name, w in given.items()})
    target, losses = torch.arange(experts), []
    optimizers = [torch.optim.Adam(gate.parameters(), lr=lr) for gate in gates]
    for _ in trange(steps, desc="gates (2024)", disable=not progress, leave=False):
        total = 0.0
        for layer, (gate, optimizer) in enumerate(zip(gates, optimizers, strict=True)):
            loss = nn.functional.cross_entropy(gate(means[:, layer]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / layers)
    states = [gate.state_dict() for gate in gates]
    return [{f"gate.{name}": w.detach() for name, w in state.items()} for state in states], losses


def gates_as_in_2024(
    model,
    processor,
    samples_per_expert: Sequence[Sequence[Sample]],
    steps: int,
    lr: float,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Gates by the published procedure, in float32 and mended in one point.

    The original cuts the prompts of all experts into pieces as long as the first list, so with
    lists of unequal length it averages prompts of different experts; here each list has its own
    mean.

    Args:
        model: a mixture; its gates are used and not changed.
        processor: its processor.
        samples_per_expert: per expert a list of (text or messages, pictures).
        steps: see `fit_means`.
        lr: see `fit_means`.
        seed: see `fit_means`.
        progress: show progress bars.

    Returns:
        See `fit_means`.

    Source: train_gating_layer_params_from_hidden_states in moe_phi3_v.py of
    lamm-mit/Cephalo-Phi-3-Vision-MoE, measured.
    """
    means = [prompt_means(model, processor, own, progress).mean(0) for own in samples_per_expert]
    return fit_means(torch.stack(means), steps, lr, seed, progress)
