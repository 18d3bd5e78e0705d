"""Training the gates: which expert should see which token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .files import get_gates, load_gates, save_gates, set_gates
from .fit import fit_gates
from .inputs import KINDS, Sample, check_samples, check_source, collect_gate_inputs
from .language import train_on_answers
from .recipe_2024 import gates_as_in_2024
from .report import GateReport

RECIPES = ("tokens", "cephalo-2024")


def train_gates(
    model,
    processor,
    samples_per_expert: Sequence[Sequence[Sample]],
    recipe: str = "tokens",
    source: str = "own",
    steps: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.5,
    held_out: float = 0.2,
    patience: int = 100,
    tokens_per_sample: int | None = 64,
    language_steps: int = 0,
    language_lr: float = 5e-4,
    language_batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> GateReport:
    """Train the gates of a mixture, and leave everything else of it as it was.

    Every token of an expert's samples is a training example: its hidden state at the gate, and the
    number of the expert. All layers are fitted at once, in float32, on samples of which some are
    held out to judge by and to stop at. By choice the gates are then trained further on the
    language-model loss, with all other weights frozen.

    Args:
        model: a `Phi3VMoeForCausalLM`; its gates are changed in place.
        processor: its processor.
        samples_per_expert: per expert a list of (text or messages, pictures), any number each; two
            or more, so that one can be held out. Include the answers: gates must route them as
            well.
        recipe: "tokens" (this one) or "cephalo-2024", the published procedure: one mean vector per
            expert, taken from the layers' inputs under the present (random) gates.
        source: of "tokens", who computes what the gates are fitted on: "own" (each sample's own
            expert), "mixture" or the name of an expert; see `collect_gate_inputs`.
        steps: at most so many; by default 600, and for "cephalo-2024" its 1000 epochs.
        lr: Adam's rate for "cephalo-2024" (published: 1e-4); "tokens" measures its step from the
            data.
        weight_decay: of "tokens"; see `fit_gates`.
        held_out: share of each expert's samples that are only judged by, one sample at least.
        patience: of "tokens": stop when the held-out loss has not improved in any layer for so many
            steps. Each layer keeps its best gate.
        tokens_per_sample: see `collect_gate_inputs`.
        language_steps: further steps on the language-model loss; see `train_on_answers`.
        language_lr: rate at the first of these steps.
        language_batch: samples per such step.
        seed: of the split, the draws and the order.
        progress: show progress bars.

    Returns:
        A `GateReport`: held-out routing accuracy per layer and kind of token, losses, warnings.

    Raises:
        ValueError: unknown recipe or source, a list of samples missing or empty, a share that is
            none, or `language_steps` with samples that have no answers.

    Example:
        >>> report = train_gates(model, processor, [materials, general, latex])
        >>> print(report.table())
        >>> save_gates(model, "gates.safetensors")
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not one of {', '.join(map(repr, RECIPES))}.")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} is no share between 0 and 1.")
    check_samples(model, samples_per_expert)
    check_source(model, source)
    train, test = split_samples(samples_per_expert, held_out, seed)
    how = {"tokens_per_sample": tokens_per_sample, "seed": seed, "progress": progress}
    judged = collect_gate_inputs(model, processor, test, source="own", **how)
    report = GateReport(recipe, list(model.config.expert_names), list(model.config.mixed_layers))
    if recipe == "cephalo-2024":
        gates, report.train_losses = gates_as_in_2024(
            model, processor, train, steps or 1000, lr, seed, progress
        )
    else:
        inputs = collect_gate_inputs(model, processor, train, source=source, **how)
        fit = fit_gates(
            inputs,
            judged,
            len(train),
            steps or 600,
            weight_decay,
            patience,
            _roomy_device(model, inputs.hidden.nbytes + judged.hidden.nbytes),
            seed,
            progress,
        )
        gates, report.best_steps = fit.gates, fit.best_steps
        report.train_losses, report.held_out_losses = fit.train_losses, fit.held_out_losses
    set_gates(model, gates)
    if language_steps:
        report.language_losses = train_on_answers(
            model, processor, train, language_steps, language_lr, language_batch, seed, progress
        )
    report.judge(get_gates(model), judged)
    return report


def split_samples(
    samples_per_expert: Sequence[Sequence[Sample]], held_out: float, seed: int
) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Samples to train on and to judge by, per expert; an expert's only sample serves as both."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for samples in samples_per_expert:
        order = torch.randperm(len(samples), generator=generator).tolist()
        count = min(len(samples) - 1, max(1, round(held_out * len(samples))))
        test.append([samples[i] for i in order[:count]] or list(samples))
        train.append([samples[i] for i in order[count:]])
    return train, test


def _roomy_device(model, needed: int) -> torch.device:
    """The model's device if it has room for `needed` bytes and as much again, else the CPU."""
    if model.device.type == "cuda" and torch.cuda.mem_get_info(model.device)[0] > 2 * needed:
        return model.device
    return torch.device("cpu")


__all__ = [
    "KINDS",
    "RECIPES",
    "get_gates",
    "load_gates",
    "save_gates",
    "set_gates",
    "split_samples",
    "train_gates",
]
