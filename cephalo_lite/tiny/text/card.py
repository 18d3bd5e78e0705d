"""The model card of the tiny language models, written from their report."""

from __future__ import annotations

from .facts import TOPICS

CARD = """# Two tiny language models: phi3 and phimoe

A dense `Phi3ForCausalLM` and a mixture `PhimoeForCausalLM` ({experts} experts, 2 per token) in the
released checkpoint format, made in {minutes} minutes of CPU time, all cores together. They exist
so that 4-bit loading, adapters on experts and fine-tuning can be run, and their outcome judged, on
a laptop. Do not use them for anything but learning.

They have read {tokens} million tokens: functions and docstrings of the standard library of Python
{python} (PSF licence), generated small functions with descriptions, and statements of facts. No
question was ever answered in what they read. Chat tokens occurred, but there the assistant goes on
with the text that the user began, and that is what these models do when they are asked. No
held-out program shape was read. Every fact was, but questions about a fifth of them are held out.

Before any fine-tuning, on {judged} held-out rows of each kind:

| | {names} |
|---|{rules}|
{rows}

Experts of phimoe that fewer than 2% of the chosen places of a layer go to: {dead}. The smallest
share is {least:.1%}, the largest {most:.1%}, {even:.1%} would be even.

Weights: Apache-2.0. To make them anew: `python -m cephalo_lite.tiny.text.make --seed {seed}`.
"""


def model_card(report: dict) -> str:
    """Markdown of the card.

    Args:
        report: as `make_models` returns it.
    """
    models, plan = report["models"], report["plan"]
    lines = {
        "parameters": lambda m: f"{m['parameters'] / 1e6:.2f} M",
        "loss on unread library text, nats per token": lambda m: f"{m['unread_library_loss']:.2f}",
        "functions completed from a comment that run right": lambda m: (
            f"{m['functions_completed']:.0%}"
        ),
        "functions asked for that run right": lambda m: f"{m['code_answered']:.0%}",
        "questions answered exactly": lambda m: f"{m['chat_answered']['all']:.0%}",
    }
    for topic in TOPICS:
        lines[f"... on {topic}"] = lambda m, topic=topic: f"{m['chat_answered'][topic]:.0%}"
    shares = models["phimoe"]["expert_shares"]
    every = [share for layer in shares for share in layer]
    tokens = max(report["tokens_read"].values()) / 1e6
    return CARD.format(
        experts=len(shares[0]),
        minutes=report["cpu_minutes"],
        tokens=f"{tokens:.1f}",
        python=report["python"],
        judged=plan["judged"],
        names=" | ".join(models),
        rules="|".join("---" for _ in models),
        rows="\n".join(
            f"| {text} | {' | '.join(show(model) for model in models.values())} |"
            for text, show in lines.items()
        ),
        dead=sum(share < 0.02 for share in every) or "none",
        least=min(every),
        most=max(every),
        even=1 / len(shares[0]),
        seed=plan["seed"],
    )
