"""Make the tiny language models anew: `python -m cephalo_lite.tiny.text.make`.

It takes at most 15 minutes on two cores. Steps: read the standard library, train a tokenizer,
pre-train the dense model and the mixture on the same documents, judge them on held-out text, write
two complete checkpoints in the released format and a model card.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import MEMBERS, WEIGHTS
from .card import model_card
from .corpus import library_texts
from .family import make_model
from .judge import answer_chat, answer_code, complete_code, expert_shares, text_loss
from .reading import documents
from .rows import chat_rows, code_rows
from .tokenizer import make_tokenizer
from .training import pack, pretrain


@dataclass
class Plan:
    """How much of what; the defaults make the shipped models."""

    seed: int = 0
    library: int | None = None  # texts of the standard library; None is all of them
    corpus: int = 3000  # documents that the tokenizer is trained on
    documents: int = 36_000  # to read
    block: int = 256  # tokens
    batch_size: int = 8  # blocks a step
    steps: dict[str, int] = field(default_factory=lambda: {"phi3": 1800, "phimoe": 1800})
    lr: float = 3e-3
    balance: float = 0.02  # weight of the mixture's load-balance loss
    judged: int = 200  # held-out rows of each kind

    @classmethod
    def quick(cls) -> Plan:
        """A few steps of everything, to see that it runs."""
        return cls(
            library=200,
            corpus=200,
            documents=200,
            block=64,
            batch_size=4,
            steps=dict.fromkeys(MEMBERS, 2),
            judged=6,
        )


def make_models(output: Path, plan: Plan, progress: bool = True) -> dict:
    """Train, judge and write both models.

    Args:
        output: folder of the two checkpoints; replaced as a whole when all is done.
        plan: how much of what.
        progress: show progress bars.

    Returns:
        What each model can do before any fine-tuning, minutes of CPU time, and the plan.
    """
    began = time.process_time()
    texts = library_texts(plan.library)
    held_out, library = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    generator = np.random.default_rng(plan.seed)
    tokenizer = make_tokenizer(
        first + rest for first, rest in documents(plan.corpus, library, generator)
    )
    blocks = pack(documents(plan.documents, library, generator), tokenizer, plan.block)
    unread = pack([(text, "") for text in held_out[:400]], tokenizer, plan.block)
    report = {
        "plan": asdict(plan),
        "python": platform.python_version(),
        "tokens_read": {
            name: steps * plan.batch_size * plan.block for name, steps in plan.steps.items()
        },
        "models": {},
    }
    models = {}
    for name in MEMBERS:
        torch.manual_seed(plan.seed)
        model = make_model(name, tokenizer)
        pretrain(
            model,
            blocks,
            plan.steps[name],
            batch_size=plan.batch_size,
            lr=plan.lr,
            balance=plan.balance,
            seed=plan.seed,
            description=name,
            progress=progress,
        )
        models[name] = model.to(torch.bfloat16).float()  # judged as shipped
        report["models"][name] = judge(models[name], tokenizer, unread, plan, progress)
    report["cpu_minutes"] = round((time.process_time() - began) / 60, 1)
    write(output, models, tokenizer, report)
    return report


def judge(model, tokenizer, unread: torch.Tensor, plan: Plan, progress: bool) -> dict:
    """What a model can do before it is fine-tuned; `unread` are ids (blocks, tokens)."""
    seed = plan.seed + 7
    report = {
        "parameters": model.num_parameters(),
        "unread_library_loss": text_loss(model, unread),
        "functions_completed": complete_code(model, tokenizer, plan.judged, seed, progress).rate,
        "code_answered": answer_code(
            model, tokenizer, code_rows(plan.judged, "test", seed), progress
        ).rate,
        "chat_answered": answer_chat(
            model, tokenizer, chat_rows(plan.judged, "test", seed), progress
        ),
    }
    if hasattr(model.config, "num_local_experts"):
        shares = expert_shares(model, unread[:40])
        report["expert_shares"] = [[round(share, 4) for share in row] for row in shares.tolist()]
    return report


def write(output: Path, models: dict, tokenizer, report: dict) -> None:
    """Write both models beside the target, then put them in its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        for name, model in models.items():
            model.to(torch.bfloat16).save_pretrained(partial / name)
            tokenizer.save_pretrained(partial / name)
        (partial / "family.json").write_text(json.dumps(report, indent=1) + "\n")
        (partial / "README.md").write_text(model_card(report))
        partial.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cephalo_lite.tiny.text.make", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="folder of the two checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--silent", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    plan = Plan.quick() if options.quick else Plan()
    plan.seed = options.seed
    print(model_card(make_models(options.output, plan, progress=not options.silent)))


if __name__ == "__main__":
    main()
