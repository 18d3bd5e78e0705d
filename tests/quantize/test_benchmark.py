"""The benchmark runs small, from end to end, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quantize_layer", "--quick", "--silent"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layer, conversion = (
        json.loads((tmp_path / f"quantize_{name}.json").read_text())
        for name in ("layer", "convert")
    )
    for result in (layer, conversion):
        assert result["quick"] is True and result["note"]
        for row in result["table"]["rows"]:
            assert len(row) == len(result["table"]["columns"])
            assert all(cell is None or cell > 0 for cell in row[1:])
        assert all(len(r["seconds"]) == result["repetitions"] for r in result["runs"].values())
    stored = {row[0]: row[1] for row in layer["table"]["rows"]}
    assert stored["ours, 4 bits + LoRA"] < stored["frozen bfloat16, no LoRA"]
    assert len(stored) == 4
