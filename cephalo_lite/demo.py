"""The main job at tiny size, from experts to answers: `python -m cephalo_lite.demo`.

Loads three experts, builds the mixture, trains its gates, answers questions about held-out pictures
of each domain, prints one table, and writes it with a figure to `results/`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .loading import load
from .moe.build import build_moe
from .moe.gates import train_gates
from .moe.trace import trace_routing
from .presets import Preset, preset
from .results import machine, table_text, write_results
from .tiny import DOMAINS, make_samples
from .tiny.judge import accuracy


def run(chosen: Preset, judged: int, seed: int = 0, progress: bool = True) -> dict:
    """Build, train, ask and judge.

    Args:
        chosen: numbers of the size.
        judged: held-out pictures per domain.
        seed: of the gates, their samples and the held-out pictures.
        progress: show a progress bar.

    Returns:
        What `results/demo.json` holds: accuracy per model and domain, shares per domain and expert,
        seconds.
    """
    began = time.perf_counter()
    dtype = getattr(torch, chosen.dtype)
    test = [s for domain in DOMAINS for s in make_samples(domain, judged, "test", seed + 11)]
    rows: dict[str, dict[str, float]] = {}
    stages = tqdm(total=len(chosen.experts) + 4, desc="demo", disable=not progress)

    def judge(name: str, model, processor) -> None:
        rows[name] = accuracy(model, processor, test, chosen.answer_batch)
        stages.set_postfix_str(name)
        stages.update()

    for name, source in {"base": chosen.base, **chosen.experts}.items():
        judge(name if name == "base" else f"{name} expert", *load(source, dtype=dtype))
    target = chosen.output_dir / "demo-moe"
    report = build_moe(
        chosen.base, chosen.experts, target, seed=seed, overwrite=True, progress=False
    )
    model, processor = load(target, dtype=dtype)
    judge("MoE, untrained gates", model, processor)
    samples = [gate_samples(domain, chosen.gate_samples, seed) for domain in chosen.experts]
    gates = train_gates(
        model,
        processor,
        samples,
        steps=chosen.gate_steps,
        tokens_per_sample=chosen.tokens_per_sample,
        seed=seed,
        progress=False,
    )
    stages.update()
    judge("MoE, trained gates", model, processor)
    stages.close()
    shares = {domain: shares_of(model, processor, domain, seed) for domain in DOMAINS}
    return {
        "accuracy": rows,
        "shares": shares,
        "gate_accuracy": gates.mean_accuracy,
        "change": report.as_dict()["change"],
        "judged_per_domain": judged,
        "seconds": round(time.perf_counter() - began, 1),
    }


def gate_samples(domain: str, count: int, seed: int = 0) -> list[tuple]:
    """Training samples of a domain for the gates: (messages with answers, picture)."""
    return [
        (sample.messages(), sample.image)
        for sample in make_samples(domain, count, "train", seed + 2)
    ]


def shares_of(model, processor, domain: str, seed: int, count: int = 12) -> dict[str, float]:
    """Share of the tokens of held-out pictures, questions and answers that each expert sees."""
    samples = make_samples(domain, count, "test", seed + 11)
    texts = [processor.apply_chat_template(sample.messages()) for sample in samples]
    pictures = [[sample.image] for sample in samples]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="right")
    return trace_routing(model, inputs.to(model.device)).shares()


def table(result: dict) -> dict:
    """Columns and rows of the table that the demo prints and the README shows."""
    experts = list(next(iter(result["shares"].values())))
    rows = [
        [name, *(f"{by_domain[domain]:.0%}" for domain in DOMAINS), ""]
        for name, by_domain in result["accuracy"].items()
    ]
    for expert in experts:
        shares = [f"{result['shares'][domain][expert]:.0%}" for domain in DOMAINS]
        rows.append([f"tokens to the {expert} expert", *shares, ""])
    return {
        "columns": ["", *(f"{domain} pictures" for domain in DOMAINS)],
        "rows": [r[:-1] for r in rows],
    }


def figure(result: dict, path: Path) -> None:
    """Accuracy per domain as bars, and where the tokens go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    colors = {"materials": "#0F8B8D", "general": "#D9772B", "latex": "#6C4FB3"}
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.8), layout="constrained", gridspec_kw={"width_ratios": [3, 1.3]}
    )
    names = list(result["accuracy"])
    for number, domain in enumerate(DOMAINS):
        values = [100 * result["accuracy"][name][domain] for name in names]
        bars = left.bar(
            np.arange(len(names)) + 0.27 * (number - 1), values, 0.25, color=colors[domain]
        )
        left.bar_label(bars, fmt="%.0f", fontsize=8)
        bars.set_label(f"{domain} pictures")
    left.set(
        ylabel="right answers (%)", ylim=(0, 108), title="Held-out pictures, answers exactly right"
    )
    left.set_xticks(
        range(len(names)),
        [name.replace(", ", ",\n").replace(" expert", "\nexpert") for name in names],
    )
    left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    experts = list(next(iter(result["shares"].values())))
    grid = np.array(
        [[result["shares"][domain][expert] for expert in experts] for domain in DOMAINS]
    )
    right.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        right.text(
            x,
            y,
            f"{value:.0%}",
            ha="center",
            va="center",
            color="white" if value > 0.55 else "black",
        )
    right.set_xticks(range(len(experts)), [f"{expert}\nexpert" for expert in experts])
    right.set_yticks(range(len(DOMAINS)), [f"{domain}\npictures" for domain in DOMAINS])
    right.set_title("Where the tokens go")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cephalo_lite.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--size", default="tiny", choices=("tiny", "full"))
    parser.add_argument("--judged", type=int, help="held-out pictures per domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--silent", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    chosen = preset(options.size)
    judged = options.judged or chosen.judged_samples
    result = run(chosen, judged, options.seed, progress=not options.silent)
    shown = table(result)
    note = (
        f"{judged} held-out pictures per domain, one question each, the answer must be exactly "
        f"right; k = 1; measured at {chosen.size} size in {result['seconds']:.0f} s"
    )
    name = "demo" if options.size == "tiny" else f"demo_{options.size}"
    write_results(
        options.output / f"{name}.json", {"table": shown, "note": note, **machine(), **result}
    )
    figure(result, options.output / f"{name}.png")
    print(table_text(shown))
    print(
        f"\n{note}.\nWritten: {options.output / f'{name}.json'} "
        f"and {options.output / f'{name}.png'}"
    )


if __name__ == "__main__":
    main()
