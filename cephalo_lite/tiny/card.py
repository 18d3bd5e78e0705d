"""The model card of the tiny family, written from its report."""

from __future__ import annotations

CARD = """# The tiny family: a base and three experts

Four Phi-3-Vision models in the released checkpoint format, small enough to train on two CPU
cores: {eyes} steps for the tower, which stays as it is from then on, {steps} steps of {batch}
pictures for the base, {expert} steps for the experts (materials, general, latex).
{note}They exist so that every step of the tutorial can be run, and its outcome judged, on a
laptop. They know the small world of `cephalo_lite.tiny.world` and nothing else; do not use them
for anything but learning.

The base was never told some things: three micro-structures, three handwritten digits, a third of
the photographs, Greek letters. Its tower has seen them, as CLIP has seen everything, and it has
copied the words, as a language model has read everything; but never both together. Each expert is
the base with other MLPs: fine-tuned on all of one domain, while a share of the tokens ({away})
passes through the base's MLPs, so that it gets along with neighbours in a mixture. All else is
the base's, bit for bit.

Share of exact answers to {judged} held-out pictures per domain, one question each (in brackets:
pictures that need only what the base was shown / pictures that need what was held back):

| | materials | general | latex |
|---|---|---|---|
{rows}

Training and test pictures share no handwritten digit, no part of a photograph, no formula and no
random micrograph. Pictures: our own generators, scikit-learn's digits, photographs of scikit-learn
and scikit-image, matplotlib's mathtext. Weights: Apache-2.0. To make them anew:
`python -m cephalo_lite.tiny.make --seed {seed}`.
"""


def model_card(report: dict) -> str:
    """Markdown of the card.

    Args:
        report: as `make_family` returns it.
    """
    rows = []
    for name, by_domain in report["accuracy"].items():
        knows = report["accuracy_by_knowledge"][name]
        cells = [
            f"{value:.0%} ({knows.get(f'{domain} old', float('nan')):.0%} / "
            f"{knows.get(f'{domain} new', float('nan')):.0%})"
            for domain in ("materials", "general", "latex")
            for value in [by_domain[domain]]
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    plan = report["plan"]
    return CARD.format(
        eyes=plan["eyes_steps"],
        steps=plan["base_steps"] + plan["words_steps"],
        batch=plan["batch_size"],
        expert=", ".join(str(steps) for steps in plan["expert_steps"].values()),
        note=f"{report.get('note') or str(report['minutes']) + ' minutes in all.'} ",
        away=", ".join(f"{share:.0%}" for share in plan["away"].values()),
        judged=report["judged_per_domain"],
        rows="\n".join(rows),
        seed=plan["seed"],
    )
