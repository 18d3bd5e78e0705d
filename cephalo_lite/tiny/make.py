"""Make the tiny family anew: `python -m cephalo_lite.tiny.make` (at most 40 minutes on two cores).

Steps: sample the world, train a tokenizer, train the base (`knowledge="base"`), fine-tune three
experts from it (`knowledge="all"` of one domain each, MLPs only), judge them all on held-out
pictures, write four complete checkpoints in the released format and a model card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..phi3v import Phi3VForCausalLM, Phi3VProcessor
from . import WEIGHTS
from .card import model_card
from .data import prepare, words_to_copy
from .family import tiny_config, tiny_processor
from .judge import accuracy
from .training import start_tower, train, train_expert, train_eyes
from .world import DOMAINS, make_samples

SHARES = {"materials": 1, "general": 3, "latex": 3}  # of the base's samples


@dataclass
class Plan:
    """How much of what; the defaults make the shipped family."""

    seed: int = 0
    corpus: int = 3000  # samples whose words the tokenizer is trained on
    eyes_samples: int = 1000  # per domain
    eyes_pages: int = 12_000  # alphabet pages
    eyes_steps: int = 3000
    base_samples: int = 2000  # times the domain's share: reading needs more practice than looking
    base_steps: int = 2000
    words_samples: int = 700  # per domain, copied without their pictures
    words_steps: int = 700  # second part of the base's training: pictures and words to copy
    expert_samples: int = 3000
    expert_steps: dict[str, int] = field(
        default_factory=lambda: {"materials": 400, "general": 600, "latex": 1100}
    )
    batch_size: int = 32
    eyes_lr: float = 2e-3
    base_lr: float = 2e-3
    words_lr: float = 1.5e-3
    expert_lr: float = 1.5e-3
    away: dict[str, float] = field(  # share of an expert's tokens that take the base's MLP
        default_factory=lambda: {"materials": 0.15, "general": 0.15, "latex": 0.10}
    )
    judged: int = 300  # held-out samples per domain

    @classmethod
    def quick(cls) -> Plan:
        """A few steps of everything, to see that it runs."""
        return cls(
            corpus=90,
            eyes_samples=8,
            eyes_pages=8,
            eyes_steps=2,
            base_samples=8,
            base_steps=3,
            words_samples=2,
            words_steps=2,
            expert_samples=8,
            expert_steps=dict.fromkeys(DOMAINS, 2),
            batch_size=4,
            judged=2,
        )


def make_family(output: Path, plan: Plan, progress: bool = True) -> dict:
    """Train, judge and write the family.

    Args:
        output: folder of the four checkpoints; replaced as a whole when all is done.
        plan: how much of what.
        progress: show progress bars.

    Returns:
        Accuracy per member and domain, minutes, and the plan.
    """
    torch.manual_seed(plan.seed)
    began = time.perf_counter()
    processor = tiny_processor(plan.seed, plan.corpus)
    base = make_base(processor, plan, progress)
    family = {"base": base}
    for domain in DOMAINS:
        samples = make_samples(domain, plan.expert_samples, "train", plan.seed + 1, "all", progress)
        family[domain] = train_expert(
            base,
            prepare(samples, processor),
            processor,
            share=plan.away[domain],
            steps=plan.expert_steps[domain],
            batch_size=plan.batch_size,
            lr=plan.expert_lr,
            seed=plan.seed + 1,
            description=f"expert: {domain}",
            progress=progress,
        )
    family = {
        name: model.to(torch.bfloat16).float() for name, model in family.items()
    }  # as shipped
    minutes = (time.perf_counter() - began) / 60
    report = {
        "plan": asdict(plan),
        "minutes": round(minutes, 1),
        **judge_family(family, processor, plan),
    }
    write_family(output, family, processor, report)
    return report


def make_base(processor: Phi3VProcessor, plan: Plan, progress: bool) -> Phi3VForCausalLM:
    """The base: first eyes that have seen all, then a model told of what is not held back.

    The tower is frozen once it sees, as CLIP is in many a vision-language model: trained on, it
    forgets shapes that the base is not told about.
    """
    model = Phi3VForCausalLM(tiny_config(processor))
    how = {"batch_size": plan.batch_size, "seed": plan.seed, "progress": progress}
    shown = [
        make_samples(d, plan.eyes_samples, "train", plan.seed + 3, "all", progress) for d in DOMAINS
    ]
    rows = prepare([sample for samples in shown for sample in samples], processor)
    start_tower(model, rows[:: max(1, len(rows) // 600)], processor)
    train_eyes(
        model, rows, processor, plan.eyes_steps, lr=plan.eyes_lr, page_count=plan.eyes_pages, **how
    )
    model.model.vision_embed_tokens.img_processor.requires_grad_(False)
    told = [
        make_samples(domain, plan.base_samples * share, "train", plan.seed, "base", progress)
        for domain, share in SHARES.items()
    ]
    rows = prepare([sample for samples in told for sample in samples], processor)
    train(model, rows, processor, plan.base_steps, lr=plan.base_lr, description="base", **how)
    rows = second_part(rows, processor, plan, progress)
    train(
        model, rows, processor, plan.words_steps, lr=plan.words_lr, description="base, words", **how
    )
    return model.requires_grad_(True)


def second_part(rows: list, processor: Phi3VProcessor, plan: Plan, progress: bool) -> list:
    """The base's last lessons: fewer formulas, new general pictures, held-back words alone."""
    kept = [row for row in rows if row.domain != "latex"] + [
        row for row in rows if row.domain == "latex"
    ][::3]
    fresh = make_samples("general", 2 * plan.base_samples, "train", plan.seed + 4, "base", progress)
    told = [
        make_samples(d, plan.words_samples, "train", plan.seed + 5, "held_back", progress)
        for d in DOMAINS
    ]
    words = words_to_copy([sample for samples in told for sample in samples], processor)
    return kept + prepare(fresh, processor) + words


def judge_family(family: dict, processor: Phi3VProcessor, plan: Plan) -> dict:
    """Accuracy of every member in every domain, and of old against new knowledge."""
    samples = [
        s for d in DOMAINS for s in make_samples(d, plan.judged, "test", plan.seed + 7, "all")
    ]
    accuracies = {name: accuracy(model, processor, samples) for name, model in family.items()}
    knowledge = {
        name: accuracy(model, processor, samples, by="knowledge") for name, model in family.items()
    }
    return {
        "judged_per_domain": plan.judged,
        "accuracy": accuracies,
        "accuracy_by_knowledge": knowledge,
    }


def write_family(output: Path, family: dict, processor: Phi3VProcessor, report: dict) -> None:
    """Write all members beside the target, then put them in its place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        for name, model in family.items():
            model.to(torch.bfloat16).save_pretrained(partial / name)
            processor.save_pretrained(partial / name)
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
        prog="python -m cephalo_lite.tiny.make", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="folder of the four checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--silent", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    plan = Plan.quick() if options.quick else Plan()
    plan.seed = options.seed
    report = make_family(options.output, plan, progress=not options.silent)
    print(model_card(report))


if __name__ == "__main__":
    main()
