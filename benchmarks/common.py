"""Timing side by side in one run, and results that say where they come from.

Contestants take turns, and who goes first changes every round, so that a machine that gets slower
or is shared slows all of them. Reported are medians; the single runs are kept in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cephalo_lite.results import machine, table_text, write_results

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "grouped_mm")  # torch's names of matrix products
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of malloc's parameters, see `man mallopt`
QUICK_OUTPUT = ROOT / "runs" / "quick"  # never among the measured results


def parser(description: str, repetitions: int = 9) -> argparse.ArgumentParser:
    """The options that all benchmarks share.

    Args:
        description: of the benchmark, for `--help`.
        repetitions: default of `--repetitions`.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="small shapes: only to see that it runs")
    made.add_argument("--repetitions", type=int, default=repetitions, help="rounds; 7 or more")
    made.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    made.add_argument("--output", type=Path, help="folder of the JSON file; default: results/")
    made.add_argument("--silent", action="store_true", help="no progress bar")
    return made


def prepare(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in defaults that depend on others, and set the number of threads."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.output is None:
        options.output = QUICK_OUTPUT if options.quick else ROOT / "results"
    if options.quick:
        options.repetitions = min(options.repetitions, 2)
    return options


def keep_memory() -> None:
    """Tell glibc's malloc to keep what is freed; elsewhere nothing happens.

    Otherwise every step gets new pages for its large tensors, and on a virtual machine the time of
    getting them can be a quarter of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def side_by_side(
    contestants: Mapping[str, Callable[[], Any]],
    repetitions: int,
    least_seconds: float = 0.02,
    title: str = "",
    silent: bool = False,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time functions in turns.

    Args:
        contestants: name → what to time.
        repetitions: rounds.
        least_seconds: a run repeats a short function until it should take this long, and its time
            is divided, and goes once untimed before that; 0 for functions that are long enough.
        title: of the progress bar.
        silent: no progress bar.
        warm_up: call each once before the first round.

    Returns:
        Name → seconds per call, one per round.
    """
    if warm_up:
        for run in contestants.values():
            run()
    calls = {name: _calls(run, least_seconds) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in tqdm(range(repetitions), desc=title, disable=silent):
            for name in order:
                if calls[name] > 1:  # find the own weights in the cache, not a neighbour's
                    contestants[name]()
                seconds[name].append(_time(contestants[name], calls[name]))
            order.append(order.pop(0))
    finally:
        if was_collecting:
            gc.enable()
    return seconds


def peak_over(step: Callable[[], object], products: bool = True) -> int:
    """Largest number of bytes that live at once on the CPU, beyond those before.

    Args:
        step: what is measured.
        products: False to leave matrix products uncomputed, which allocate nothing but their
            results; without them, half precision is measured in seconds on any CPU.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Uncomputed(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__.strip("_") not in PRODUCTS:
                return function(*args, **(kwargs or {}))
            shapes = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs or {}))
            return torch.zeros_like(function(*shapes[0], **shapes[1]), device="cpu")

    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        contextlib.nullcontext() if products else Uncomputed(),
    ):
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name → median."""
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def spread(runs: Sequence[float]) -> float:
    """Half the range of the middle runs (10 to 90 %), as a share of the median."""
    if len(runs) < 2:
        return 0.0
    tenths = statistics.quantiles(runs, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / 2 / statistics.median(runs)


def report(
    name: str,
    options: argparse.Namespace,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    runs: Mapping[str, Any],
    note: str,
) -> Path:
    """Write `name`.json and print its table.

    Args:
        name: of the file, without the suffix.
        options: what `prepare` returned.
        columns: headings.
        rows: text, numbers, or None for what was not measured.
        runs: the single measurements.
        note: one sentence for below the table.

    Returns:
        The file.
    """
    table = {"columns": list(columns), "rows": [list(row) for row in rows]}
    result = machine() | {
        "table": table,
        "repetitions": options.repetitions,
        "note": note,
        "quick": options.quick,
        "runs": dict(runs),
    }
    path = write_results(options.output / f"{name}.json", result)
    shown = [[f"{c:.3g}" if isinstance(c, float) else c for c in row] for row in table["rows"]]
    print(table_text({"columns": table["columns"], "rows": shown}))
    print(path)
    return path


def _calls(run: Callable[[], Any], least_seconds: float) -> int:
    """How many calls take about `least_seconds`."""
    if not least_seconds:
        return 1
    return max(1, math.ceil(least_seconds / max(_time(run, 1), 1e-7)))


def _time(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait()
    return (time.perf_counter() - start) / calls


def _wait() -> None:
    """Until a GPU, where there is one, has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
