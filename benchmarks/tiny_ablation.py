"""What it does to an expert, and to its mixture, that it met neighbours while it learnt.

    python -m benchmarks.tiny_ablation

The LaTeX expert is trained anew from the shipped base, with a share of its tokens passing through
the base's MLPs, and joined with the other two shipped experts. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common import parser, prepare, report
from cephalo_lite import Phi3VForCausalLM, Phi3VMoeForCausalLM, load, train_gates
from cephalo_lite.demo import gate_samples
from cephalo_lite.tiny import DOMAINS, checkpoints, make_samples
from cephalo_lite.tiny.data import prepare as make_rows
from cephalo_lite.tiny.judge import accuracy
from cephalo_lite.tiny.make import Plan
from cephalo_lite.tiny.training import train_expert

DOMAIN = "latex"
SHARES = (0.0, 0.1, 0.3)
STEPS = 500
COLUMNS = (
    "tokens through the base's MLPs in training",
    "relative weight change",
    "expert alone",
    "mixture, untrained gates",
    "gates right (held-out tokens)",
    "mixture, trained gates",
)


@torch.no_grad()
def change(expert: Phi3VForCausalLM, base: Phi3VForCausalLM) -> float:
    """How far the MLPs are from the base's, relative to these, mean over layers."""
    pairs = zip(expert.model.layers, base.model.layers, strict=True)
    weights = [(one.mlp.gate_up_proj.weight, two.mlp.gate_up_proj.weight) for one, two in pairs]
    return float(sum((one - two).norm() / two.norm() for one, two in weights)) / len(weights)


def one_share(share: float, steps: int, judged: int, samples: int, silent: bool) -> list[str]:
    """A line of the table."""
    plan, folders = Plan(), checkpoints()
    base, processor = load(folders["base"])
    rows = make_samples(DOMAIN, min(plan.expert_samples, 4 * steps), "train", plan.seed + 1, "all")
    how = {"batch_size": plan.batch_size, "lr": plan.expert_lr, "seed": plan.seed + 1}
    torch.manual_seed(plan.seed)
    expert = train_expert(
        base,
        make_rows(rows, processor),
        processor,
        share=share,
        steps=steps,
        description=f"share {share:.0%}",
        progress=not silent,
        **how,
    )
    experts = [expert if name == DOMAIN else load(folders[name])[0] for name in DOMAINS]
    mixture = Phi3VMoeForCausalLM.from_experts(base, experts, expert_names=list(DOMAINS)).eval()
    test = make_samples(DOMAIN, judged, "test", 31)

    def judge(model) -> str:
        return f"{accuracy(model, processor, test)[DOMAIN]:.0%}"

    line = [f"{share:.0%}", f"{change(expert, base):.2f}", judge(expert), judge(mixture)]
    training: Sequence = [gate_samples(name, samples, 0) for name in DOMAINS]
    gates = train_gates(mixture, processor, training, progress=False)
    return [*line, f"{gates.mean_accuracy:.1%}", judge(mixture)]


def main(arguments: list[str] | None = None) -> None:
    """Train and judge for all shares and write tiny_ablation.json."""
    options = prepare(parser(__doc__.splitlines()[0], repetitions=1).parse_args(arguments))
    steps, judged, samples = (2, 2, 3) if options.quick else (STEPS, 200, 200)
    shares = SHARES[:2] if options.quick else SHARES
    rows = [one_share(share, steps, judged, samples, options.silent) for share in shares]
    note = (
        f"the {DOMAIN} expert trained for {steps} steps, fewer than the shipped one; {judged} "
        f"held-out {DOMAIN} pictures; gates trained on their inputs only; one seed"
    )
    report("tiny_ablation", options, COLUMNS, rows, {}, note)


if __name__ == "__main__":
    main()
