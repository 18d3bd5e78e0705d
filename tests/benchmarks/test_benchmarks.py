"""Each benchmark runs small, and writes what the README's tables are made of."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import peak_over

ROOT = Path(__file__).parents[2]
NAMES = ["moe_block", "generation", "import_time", "build", "finetuning"]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs a benchmark's --quick in its own process and gives what it wrote."""
    folder = tmp_path_factory.mktemp("results")

    @functools.cache
    def quick(name: str) -> tuple[dict, Path]:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--silent"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--output", folder],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert [p.name for p in folder.iterdir() if p.name.endswith(".partial")] == []
        return json.loads((folder / f"{name}.json").read_text()), folder

    return quick


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(run, name):
    result, folder = run(name)
    columns, rows = result["table"]["columns"], result["table"]["rows"]
    assert rows and all(len(row) == len(columns) for row in rows)
    assert {"torch", "transformers", "python"} <= result["versions"].keys()
    assert result["machine"]["cores"] and result["date"] and result["repetitions"] >= 1
    assert result["quick"] is True and result["note"]
    measured = [row for row in rows if row[1] is not None]
    for row in measured:
        assert all(cell > 0 for cell in row[1:] if isinstance(cell, (int, float)))
    for runs in result["runs"].values():
        for one in [runs] if "seconds" in runs else runs.values():
            assert len(one["seconds"]) == result["repetitions"] and min(one["seconds"]) > 0
    text = script("readme_tables").table(name, folder)
    assert text.startswith(f"| {columns[0]} |") and text.count("\n|") == len(rows) + 1


def test_ratios_are_those_of_the_medians(run):
    from statistics import median

    result, _ = run("moe_block")
    columns, rows = result["table"]["columns"], result["table"]["rows"]
    way = columns.index("cephalo, times faster")
    for row in rows:
        if row[1] is None:  # there is no GPU, or it is not used in a quick run
            assert "GPU" in row[0] and set(row[1:]) == {None}
            continue
        runs = result["runs"][row[0]]
        middle = {name: median(one["seconds"]) for name, one in runs.items()}
        assert row[way] == pytest.approx(middle["all experts"] / middle["cephalo"])
        assert row[1] == pytest.approx(1e3 * middle["all experts"])
    assert {row[0].split(" forward")[0] for row in rows} == {
        "E=3 k=1 T=512", "E=8 k=2 T=512", "E=3 k=1 T=1", "E=8 k=2 T=1",
    }  # fmt: skip


def test_every_way_of_gating_is_judged_for_every_seed(run):
    result, folder = run("tiny_mixture")
    rows, seeds = result["table"]["rows"], result["runs"]["seeds"]
    assert len(seeds) == result["repetitions"] == 2
    assert [row[0] for row in rows] == list(seeds[0]) == list(seeds[1])
    assert {"base", "untrained gates", "2024 recipe", "our gates"} <= set(seeds[0])
    for way in ("base", "latex expert"):
        values = [one[way]["latex"] for one in seeds]
        assert dict((row[0], row[3]) for row in rows)[way].startswith(f"{sum(values) / 2:.0%} (")
    assert script("readme_tables").table("tiny_mixture", folder).count("gates") >= 4


def test_an_expert_is_trained_anew_for_every_share_of_neighbours(run):
    result, _ = run("tiny_ablation")
    assert [row[0] for row in result["table"]["rows"]] == ["0%", "10%"] and result["quick"]
    assert all(float(row[1]) > 0 and row[2].endswith("%") for row in result["table"]["rows"])


def test_turns_change_and_short_functions_are_repeated():
    common = script("common")
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = common.side_by_side(functions, 3, least_seconds=0, silent=True)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # a warm-up, then three rounds
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    calls.clear()
    common.side_by_side({"a": functions["a"]}, 1, least_seconds=0.001, silent=True)
    assert len(calls) > 10
    assert common.spread([1.0] * 9) == 0.0
    assert common.spread([0.9, 1.0, 1.1]) == pytest.approx(0.08)


def test_quick_runs_stay_away_from_the_measured_results():
    common = script("common")
    full = common.prepare(common.parser("x").parse_args([]))
    quick = common.prepare(common.parser("x").parse_args(["--quick"]))
    assert full.output == ROOT / "results" and full.repetitions >= 7
    assert quick.output != full.output and ROOT / "results" not in quick.output.parents


def test_memory_is_the_same_where_products_are_left_out():
    """Half precision can be measured so on a CPU that would take hours to compute in it."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    many = torch.nn.Parameter(torch.randn(3, 8, 16))

    def step(products: bool) -> int:
        layers.zero_grad()
        many.grad = None
        rows = torch.ones(3, 32, 64)
        found = []
        peak = peak_over(lambda: found.append((layers(rows) @ many).sum().backward()), products)
        assert many.grad is not None and many.grad.any() == products
        return peak

    step(True)
    assert step(False) == pytest.approx(step(True), rel=0.05) and step(True) > 3 * 32 * 256 * 4
