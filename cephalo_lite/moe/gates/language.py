"""Training the gates further on the language-model loss, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import trange

from ..routing import routers
from .inputs import Sample, encode, in_mode


@contextmanager
def only_gates_learn(model) -> Iterator[list[torch.nn.Parameter]]:
    """Within this context the gates are what requires gradients; afterwards all is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gates = [parameter for router in routers(model) for parameter in router.gate.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in gates:
            parameter.requires_grad_()
        yield gates
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for parameter in gates:
            parameter.grad = None


def train_on_answers(
    model,
    processor,
    samples_per_expert: Sequence[Sequence[Sample]],
    steps: int,
    lr: float = 5e-4,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train the gates alone to make the answers likely.

    With k=1 they learn by the straight-through weight (see `Router`). The gates are stepped in
    float32, whatever the model's dtype: in bfloat16 most small steps would be rounded away.

    Args:
        model: a mixture; its gates are changed in place.
        processor: its processor.
        samples_per_expert: per expert a list of (text or messages, pictures), with answers. Every
            expert is drawn from alike, however many samples it has.
        steps: of Adam.
        lr: rate at the first step, falling linearly to 0.
        batch_size: samples per step.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        Loss per step, nats per answer token.

    Raises:
        ValueError: samples without any answer.
    """
    pool = [sample for own in samples_per_expert for sample in own]
    chance = torch.tensor([1 / len(own) for own in samples_per_expert for _ in own])
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with only_gates_learn(model) as gates, in_mode(model, training=True):
        exact = [gate.detach().float().clone() for gate in gates]
        optimizer = torch.optim.Adam(exact, lr=lr)
        bar = trange(steps, desc="gates on answers", disable=not progress, leave=False)
        for step in bar:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            count = min(batch_size, len(pool))
            chosen = torch.multinomial(chance, count, generator=generator).tolist()
            inputs = encode(processor, [pool[number] for number in chosen])
            if not (inputs["labels"] >= 0).any():
                raise ValueError(
                    "Samples without answers: end them with an assistant turn, or leave "
                    "language_steps at 0."
                )
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            loss = model(**inputs, use_cache=False).loss
            model.zero_grad(set_to_none=True)
            loss.backward()
            for own, gate in zip(exact, gates, strict=True):
                own.grad = None if gate.grad is None else gate.grad.float()
            optimizer.step()
            with torch.no_grad():
                for own, gate in zip(exact, gates, strict=True):
                    gate.copy_(own)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses
