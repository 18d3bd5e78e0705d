"""How well each way of gating answers, over several seeds, with the experts inside the package.

    python -m benchmarks.tiny_mixture

Every seed draws other training samples for the gates, other untrained gates and other held-out
pictures. Nothing is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from tqdm.auto import trange

from benchmarks.common import parser, prepare, report
from cephalo_lite import build_moe, get_gates, load, select_expert, set_gates, train_gates
from cephalo_lite.demo import gate_samples
from cephalo_lite.moe import routers
from cephalo_lite.presets import Preset, preset
from cephalo_lite.tiny import DOMAINS, make_samples
from cephalo_lite.tiny.judge import accuracy

Scores = dict[str, dict[str, float]]  # way → domain → accuracy


def one_seed(run: Preset, folder: Path, seed: int, judged: int, samples: int) -> Scores:
    """Accuracy per way and domain for one seed."""
    test = [s for d in DOMAINS for s in make_samples(d, judged, "test", 100 + seed)]
    training = [gate_samples(domain, samples, 200 + seed) for domain in run.experts]
    scores: Scores = {"base": accuracy(*load(run.base), test)}
    build_moe(run.base, run.experts, folder, seed=seed, overwrite=True, progress=False)
    model, processor = load(folder)
    for number, name in enumerate(run.experts):
        with select_expert(model, number):
            scores[f"{name} expert"] = accuracy(model, processor, test)
    scores["untrained gates"] = accuracy(model, processor, test)
    how = {"seed": seed, "progress": False}
    untrained = get_gates(model)
    train_gates(model, processor, training, recipe="cephalo-2024", **how)
    scores["2024 recipe"] = accuracy(model, processor, test)
    set_gates(model, untrained)
    how |= {"steps": run.gate_steps, "tokens_per_sample": run.tokens_per_sample}
    train_gates(model, processor, training, **how)
    scores["our gates"] = accuracy(model, processor, test)
    for router in routers(model):
        router.k = 2
    scores["our gates, k = 2"] = accuracy(model, processor, test)
    for router in routers(model):
        router.k = 1
    how |= {"language_steps": run.language_steps, "language_batch": run.language_batch}
    train_gates(model, processor, training, **how)
    scores["our gates, then answers"] = accuracy(model, processor, test)
    return scores


def table_rows(seeds: list[Scores]) -> list[list]:
    """Per way: mean and range per domain, and the share of the best single expert's accuracy."""
    alone = [f"{name} expert" for name in DOMAINS]
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for scores in seeds:
        for way, by_domain in scores.items():
            for domain in DOMAINS:
                values[way][domain].append(by_domain[domain])
    mean = {w: {d: statistics.mean(v[d]) for d in DOMAINS} for w, v in values.items()}
    best = {d: max(mean[way][d] for way in alone) or 1.0 for d in DOMAINS}
    rows = []
    for way, by_domain in values.items():
        cells = [
            f"{mean[way][d]:.0%} ({min(by_domain[d]):.0%} to {max(by_domain[d]):.0%})"
            for d in DOMAINS
        ]
        shares = [f"{mean[way][d] / best[d]:.0%}" for d in DOMAINS]
        rows.append([way, *cells, "" if way == "base" or way in alone else ", ".join(shares)])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Judge all ways for all seeds and write tiny_mixture.json."""
    made = parser(__doc__.splitlines()[0], repetitions=5)
    options = prepare(made.parse_args(arguments))
    judged, samples = (2, 3) if options.quick else (150, preset("tiny").gate_samples)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [
            one_seed(preset("tiny"), Path(folder) / "moe", seed, judged, samples)
            for seed in trange(options.repetitions, desc="seeds", disable=options.silent)
        ]
    columns = ("", *(f"{d} pictures" for d in DOMAINS), "of the best single expert")
    note = (
        f"{len(seeds)} seeds, {judged} held-out pictures per domain and seed, {samples} samples "
        "per expert for the gates; mean and range of exactly right answers; last column: per domain"
    )
    report("tiny_mixture", options, columns, table_rows(seeds), {"seeds": seeds}, note)


if __name__ == "__main__":
    main()
