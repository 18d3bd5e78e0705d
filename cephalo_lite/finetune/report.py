"""What a fine-tuning did: losses, routers, answers, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .adapters import AdapterReport
from .router_watch import RouterRecord
from .tokenizing import BadRow

Series = list[tuple[int, float]]  # (step, value)


@dataclass
class SFTReport:
    """What a training did. Losses are in nats per answer token, the mean of the batches."""

    adapters: AdapterReport | None  # what has adapters; None where whole groups were trained
    trained: dict[str, int]  # group → parameters that were trained
    steps: int  # in all, those before a resumption included
    resumed_at: int  # step of the checkpoint that it went on from, or 0
    eval_before: float  # loss of the held-out rows
    eval_after: float
    losses: Series = field(default_factory=list)  # with the routers' losses
    eval_losses: Series = field(default_factory=list)  # of the held-out rows
    balance_losses: Series = field(default_factory=list)  # of a mixture; 1 is even use
    z_losses: Series = field(default_factory=list)  # of a mixture
    routing: list[RouterRecord] = field(default_factory=list)  # of a mixture, per layer
    judged: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # where there is one
    rows: int | None = 0  # trained on; None where they were streamed
    cut: int = 0  # of these, longer than max_length
    dropped: int = 0  # left out, as no answer was within max_length
    bad: list[BadRow] = field(default_factory=list)  # left out, as they cannot be learnt
    seconds: float = 0.0  # of training, evaluations included

    def table(self) -> str:
        """Before and after as aligned text."""
        what = "adapter" if self.adapters else "trained"
        rows = [
            ("", "before", "after"),
            ("held-out loss", f"{self.eval_before:.3f}", f"{self.eval_after:.3f}"),
            (f"{what} parameters", "0", f"{sum(self.trained.values()):,}"),
            ("steps", f"{self.resumed_at}", f"{self.steps}"),
        ]
        if self.judged:
            first, last = self.judged[0][1], self.judged[-1][1]
            rows += [(name, f"{first[name]:.3f}", f"{last[name]:.3f}") for name in last]
        return "\n".join(f"{name:<20}{one:>14}{two:>14}" for name, one, two in rows)


def series(history: Sequence[dict[str, Any]], key: str) -> Series:
    """The values of a key in a trainer's log, with their steps."""
    return [(entry["step"], float(entry[key])) for entry in history if key in entry]
