"""A built mixture in use: equal experts are the dense model; memory while building is bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cephalo_lite.moe import Phi3VMoeForCausalLM
from cephalo_lite.moe.build import build_moe
from cephalo_lite.phi3v import Phi3VForCausalLM

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.filterwarnings("ignore:experts with:UserWarning")
@pytest.mark.parametrize(("k", "layers"), [(1, None), (2, [0, 2])])
def test_equal_experts_give_the_dense_logits(make_dense, tmp_path, k, layers):
    vision = json.loads((GOLDEN / "clip_tiny_config.json").read_text())
    base = make_dense("base", config={"vision_config": vision})
    build_moe(base, [base] * 3, tmp_path / "moe", k, "renormalised", layers, progress=False)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        dense = Phi3VForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
        mixture = Phi3VMoeForCausalLM.from_pretrained(tmp_path / "moe").eval()
        torch.testing.assert_close(mixture(input_ids=ids).logits, dense, rtol=1e-5, atol=1e-5)
    assert mixture.config.mixed_layers == (layers or [0, 1, 2])
    assert mixture.config.expert_names == ["base", "base-2", "base-3"]


MEMORY = """
import sys
from cephalo_lite.moe.build import build_moe

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)

before = peak()
build_moe(sys.argv[1], sys.argv[2:4], sys.argv[4], progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_tensors(make_dense, tmp_path):
    """Two tensors of 128 MB pass through; held are a few chunks of 4 MiB, and no memory map."""
    width, inner, rows = 64, 128, 500_000  # one embedding of 128 MB
    table = torch.zeros(rows, width)
    large = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    config = {"vocab_size": rows, "hidden_size": width, "intermediate_size": inner}
    base = make_dense("base", tensors=large, config=config)
    source = [sys.executable, "-c", MEMORY, base, base, base, tmp_path / "moe"]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(source, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "moe" / "model.safetensors").stat().st_size > 256e6
    assert int(done.stdout) * 1024 < 125e6
