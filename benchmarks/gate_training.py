"""Fitting the gates of 32 layers: all at once, against one layer after the other as in 2024.

    python -m benchmarks.gate_training

Both take the same number of steps on the same inputs. The 2024 recipe has one vector per expert;
ours has every token of the samples. Where inputs are few, the loop's time is the overhead of its
many small calls, and all at once it is gone. Where they are many, most of the time goes into
products with the inputs, which both have to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import medians, parser, prepare, report, side_by_side, spread
from cephalo_lite.moe.gates.fit import fit_gates
from cephalo_lite.moe.gates.inputs import GateInputs

EXPERTS = 3
LAYERS = 32
LOOP, AT_ONCE = "layer after layer", "all layers at once"
SHAPES = {  # case: (inputs N, width D)
    "one vector per expert, D = 512": (EXPERTS, 512),
    "one vector per expert, D = 3072": (EXPERTS, 3072),
    "600 tokens, D = 512": (600, 512),
    "600 tokens, D = 3072": (600, 3072),
}
COLUMNS = ("inputs of the gates", "ms/step, layer after layer", "ms/step, all at once", "ratio")


def make_inputs(layers: int, count: int, width: int, seed: int = 0) -> GateInputs:
    """Random gate inputs (layers, count, width) around a mean per expert."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.arange(count) % EXPERTS
    means = torch.randn(layers, EXPERTS, width, generator=generator)
    hidden = torch.randn(layers, count, width, generator=generator).add_(
        means[:, expert], alpha=0.1
    )
    none = torch.zeros_like(expert)
    return GateInputs(hidden, expert, none, none)


def layer_after_layer(inputs: GateInputs, steps: int, lr: float = 1e-4) -> list[nn.Linear]:
    """The published loop: per layer a fresh linear gate, Adam, cross-entropy."""
    gates = []
    for hidden in inputs.hidden:
        gate = nn.Linear(hidden.shape[1], EXPERTS)
        optimizer = torch.optim.Adam(gate.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(gate(hidden), inputs.expert)
            loss.backward()
            optimizer.step()
        gates.append(gate)
    return gates


def contestants(layers: int, count: int, width: int, steps: int) -> dict[str, Callable]:
    """Both ways, on the same inputs; ours also looks at held-out tokens, a quarter as many."""
    inputs = make_inputs(layers, count, width)
    held_out = make_inputs(layers, max(EXPERTS, count // 4), width, seed=1)
    return {
        LOOP: lambda: layer_after_layer(inputs, steps),
        AT_ONCE: lambda: fit_gates(
            inputs, held_out, EXPERTS, steps, patience=steps, progress=False
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure all shapes and write gate_training.json."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=200, help="steps of both")
    options = prepare(made.parse_args(arguments))
    layers, steps, shapes = LAYERS, options.steps, SHAPES
    if options.quick:
        layers, steps = 2, 5
        shapes = {"one vector per expert, D = 64": (EXPERTS, 64), "60 tokens, D = 64": (60, 64)}
    rows, runs = [], {}
    for title, (count, width) in shapes.items():
        functions = contestants(layers, count, width, steps)
        seconds = side_by_side(functions, options.repetitions, 0.0, title, options.silent)
        middle = {name: 1000 * time / steps for name, time in medians(seconds).items()}
        ratio = middle[LOOP] / middle[AT_ONCE]
        rows.append([title, middle[LOOP], middle[AT_ONCE], ratio])
        runs[title] = {
            name: {"seconds": times, "spread": spread(times), "steps": steps}
            for name, times in seconds.items()
        }
    note = (
        f"{layers} layers, {EXPERTS} experts, {steps} steps each, float32; all at once includes "
        "the measuring of mean, spread and curvature and a look at held-out tokens every 5 steps"
    )
    report("gate_training", options, COLUMNS, rows, runs, note)


if __name__ == "__main__":
    main()
