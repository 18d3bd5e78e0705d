"""What the training of the gates has come to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import combinations

import torch

from .fit import HELD_OUT_EVERY
from .inputs import KINDS, GateInputs

APART = 0.55  # of two experts' tokens so many must be on the right side; by guessing it is 0.5
MAX_CONDITION = 1e4


@dataclass
class GateReport:
    """Held-out routing accuracy, losses and warnings of one training of the gates."""

    recipe: str
    expert_names: list[str]
    layers: list[int]  # numbers of the mixed layers; all lists per layer are in this order
    accuracy: list[float] = field(default_factory=list)  # per layer, held-out tokens, in 0..1
    accuracy_by_kind: dict[str, list[float]] = field(default_factory=dict)  # image, prompt, answer
    apart: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # see `judge`
    condition: list[float] = field(default_factory=list)  # of the differences of gate rows
    train_losses: list[float] = field(default_factory=list)  # per step, nats per token
    held_out_losses: list[float] = field(default_factory=list)  # after every 5 steps
    best_steps: list[int] = field(
        default_factory=list
    )  # per layer, steps of the gate that was kept
    language_losses: list[float] = field(default_factory=list)  # nats per answer token
    warnings: list[str] = field(default_factory=list)

    @property
    def mean_accuracy(self) -> float:
        """Share of held-out tokens sent to their own expert, over all layers."""
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def mean_accuracy_by_kind(self) -> dict[str, float]:
        """The same for each kind of token that was seen."""
        return {kind: sum(v) / len(v) for kind, v in self.accuracy_by_kind.items()}

    def judge(self, gates: list[dict[str, torch.Tensor]], judged: GateInputs) -> None:
        """Measure gates on held-out tokens, and warn where they cannot tell experts apart.

        `apart` tells for every two experts which share of their tokens (both weighing the same) has
        the right one of the two ahead; `condition` is the condition number of the gate's rows
        without their mean, which is all that a softmax sees of them.

        Args:
            gates: per layer, as `get_gates` returns.
            judged: held-out gate inputs.
        """
        weight = torch.stack([gate["gate.weight"].float().cpu() for gate in gates])  # (L, E, D)
        bias = torch.stack([gate["gate.bias"].float().cpu() for gate in gates])[:, None]
        logits = torch.baddbmm(bias, judged.hidden, weight.mT)  # (L, N, E)
        right = (logits.argmax(-1) == judged.expert).float()  # (L, N)
        self.accuracy = right.mean(1).tolist()
        self.accuracy_by_kind = {
            kind: right[:, judged.kind == number].mean(1).tolist()
            for number, kind in enumerate(KINDS)
            if (judged.kind == number).any()
        }
        centred = weight - weight.mean(1, keepdim=True)
        values = torch.linalg.svdvals(centred)[:, :-1]  # E - 1 of them can differ from 0
        if values.shape[1]:
            self.condition = (values[:, 0] / values[:, -1].clamp(min=1e-12)).tolist()
        self.apart, self.warnings = {}, []
        for one, other in combinations(range(len(self.expert_names)), 2):
            ahead = logits[..., one] > logits[..., other]  # (L, N)
            shares = ahead[:, judged.expert == one].float().mean(1)
            shares = (shares + (~ahead)[:, judged.expert == other].float().mean(1)) / 2
            self.apart[self.expert_names[one], self.expert_names[other]] = shares.tolist()
        self._warn()

    def _warn(self) -> None:
        for (one, other), shares in self.apart.items():
            low = [n for n, share in zip(self.layers, shares, strict=True) if share < APART]
            if low:
                self.warnings.append(
                    f"The gates cannot tell {one!r} from {other!r} in layers {low}: of their "
                    f"held-out tokens at best {max(s for s in shares if s < APART):.0%} are on the "
                    "right side, 50% by guessing. Give samples that differ more, or more of them."
                )
        pairs = zip(self.layers, self.condition, strict=False)
        flat = [layer for layer, condition in pairs if condition > MAX_CONDITION]
        if flat:
            self.warnings.append(
                f"The gates of layers {flat} have rows that hardly differ (condition number up to "
                f"{max(self.condition):.3g}): they treat some experts alike."
            )
        for text in self.warnings:
            warnings.warn(text, stacklevel=4)

    def table(self) -> str:
        """Held-out accuracy per layer and kind of token, and their means, as plain text."""
        kinds = list(self.accuracy_by_kind)
        lines = [f"{'layer':>5}  {'all':>6}" + "".join(f"  {kind:>6}" for kind in kinds)]
        for row, layer in enumerate(self.layers):
            cells = "".join(f"  {self.accuracy_by_kind[kind][row]:6.1%}" for kind in kinds)
            lines.append(f"{layer:>5}  {self.accuracy[row]:6.1%}{cells}")
        cells = "".join(f"  {value:6.1%}" for value in self.mean_accuracy_by_kind.values())
        return "\n".join([*lines, f"{'mean':>5}  {self.mean_accuracy:6.1%}{cells}"])

    def plot(self, axes=None):
        """Losses of the fit, those on answers if there are any, and held-out accuracy per layer.

        Args:
            axes: two matplotlib axes, three with losses on answers, or None for a new figure.

        Returns:
            The figure.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            count = 3 if self.language_losses else 2
            _, axes = plt.subplots(1, count, figsize=(4.5 * count, 3), layout="constrained")
        left, *middle, right = axes
        left.plot(
            range(len(self.train_losses)), self.train_losses, label="training", color="#2F6DB5"
        )
        if self.held_out_losses:
            last, count = len(self.train_losses), len(self.held_out_losses)
            steps = [min(HELD_OUT_EVERY * (n + 1), last) for n in range(count)]
            left.plot(steps, self.held_out_losses, label="held out", color="#C99A1B")
        for axis in middle:
            axis.plot(self.language_losses, color="#2F6DB5")
            axis.set(xlabel="step", ylabel="loss (nats per answer token)", title="On answers")
        title = f"Recipe {self.recipe!r}"
        left.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        left.legend(frameon=False)
        styles = {"image": ("#2F6DB5", "s"), "prompt": ("#6B7280", "o"), "answer": ("#C99A1B", "D")}
        places = range(len(self.layers))
        for kind, values in self.accuracy_by_kind.items():
            color, marker = styles[kind]
            right.plot(places, values, marker=marker, color=color, label=f"{kind} tokens")
        chance = 1 / len(self.expert_names)
        right.axhline(chance, color="0.6", ls=":", lw=1)
        right.annotate("chance", (0, chance), color="0.4", va="bottom", fontsize=8)
        right.set(xlabel="layer", ylabel="routed to their own expert", ylim=(0, 1.03))
        some = places[:: max(1, len(places) // 8)]
        right.set(title="Held-out tokens", xticks=some, xticklabels=[self.layers[n] for n in some])
        right.legend(frameon=False, loc="lower right")
        return left.figure
