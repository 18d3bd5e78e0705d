"""What `build_moe` refuses before it writes a byte; what an interrupted build leaves: nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cephalo_lite.moe.build import build_moe

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sources(make_dense):
    return make_dense("base"), [make_dense("bone", 0.1, 1), make_dense("silk", 0.1, 2)]


def refuse(error, match, base, experts, target, **settings):
    """The call raises, and neither the target nor anything else appears beside it."""
    target.parent.mkdir(exist_ok=True)
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(error, match=match):
        build_moe(base, experts, target, progress=False, **settings)
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token is 0, .* from 1 to 2"),
        ({"experts_per_token": 3}, "experts_per_token is 3, .* from 1 to 2"),
        ({"experts_per_token": 1.0}, "experts_per_token is 1.0, expected a whole number"),
        ({"router": "best"}, "router is 'best', expected one of 'cephalo', 'renormalised'"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [0, 3]}, r"layers: \[3\] not in the model, which has layers 0 to 2"),
        ({"layers": [-1]}, r"layers: \[-1\] not in the model"),
        ({"layers": [1, 1, 2]}, r"layers: \[1\] named more than once"),
        ({"max_shard_gb": 0}, "max_shard_gb is 0"),
        ({"gate_dtype": "int8"}, "gate_dtype: 'int8' is not one of float64, float32"),
        ({"gates": []}, "gates: 0 given, 3 MoE layers"),
        ({"gates": [{"weight": torch.zeros(2, 64)}] * 3}, "gates of layer 0: keys"),
        (
            {"gates": [{"gate.weight": torch.zeros(3, 64), "gate.bias": torch.zeros(2)}] * 3},
            r"gates of layer 0: gate.weight has shape \(3, 64\), expected \(2, 64\)",
        ),
        (
            {
                "gates": [
                    {"gate.weight": torch.zeros(2, 64), "gate.bias": torch.full((2,), torch.nan)}
                ]
                * 3
            },
            "gates of layer 0: gate.bias has NaN",
        ),
    ],
)
def test_settings(sources, tmp_path, settings, message):
    refuse(ValueError, message, *sources, tmp_path / "out" / "moe", **settings)


def test_number_of_experts(sources, tmp_path):
    base, experts = sources
    target = tmp_path / "out" / "moe"
    refuse(ValueError, "at least 2 experts, got 1", base, experts[:1], target)
    refuse(ValueError, "experts is one path", base, str(experts[0]), target)


def test_gates_of_other_layers(sources, tmp_path):
    gate = {"layers.0.gate.weight": torch.zeros(2, 64), "layers.0.gate.bias": torch.zeros(2)}
    save_file(gate, tmp_path / "gates.safetensors")
    target = tmp_path / "out" / "moe"
    message = r"MoE layers \[0, 1\]: missing \['layers.1.gate.bias'"
    gates = tmp_path / "gates.safetensors"
    refuse(ValueError, message, *sources, target, layers=[0, 1], gates=gates)
    gates = tmp_path / "none.safetensors"
    refuse(FileNotFoundError, "gates: no file .*none", *sources, target, gates=gates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"num_attention_heads": 8}}, "expert 'odd': num_attention_heads is 8, but 4"),
        ({"config": {"vocab_size": 400}}, "vocab_size is 400, but 384 in base"),
        ({"config": {"intermediate_size": 64}}, r"gate_up_proj.weight has shape \[256, 64\], but"),
        ({"config": {"num_hidden_layers": 4}}, "lacks .* among them model.layers.3"),
        ({"config": {"rope_theta": 5e5}}, "rotary position settings"),
        ({"config": {"rope_scaling": None}}, "rotary position settings"),
        ({"tensors": {"lm_head.weight": None}}, "lacks 1 tensors, among them lm_head.weight"),
        ({"tensors": {"lm_head.weight": torch.zeros(400, 64)}}, r"lm_head.weight has shape \[400"),
        ({"tensors": {"model.extra": torch.zeros(1)}}, r"not expected \['model.extra'\]"),
        (
            {"tensors": {"model.layers.2.mlp.down_proj.weight": torch.zeros(64, 128).half()}},
            "model.layers.2.mlp.down_proj.weight is F16, but F32 in base",
        ),
        (
            {"tensors": {"model.layers.2.mlp.down_proj.weight": torch.zeros(64, 128).char()}},
            "expert 'odd': model.layers.2.mlp.down_proj.weight is I8: a quantised checkpoint",
        ),
    ],
)
def test_an_expert_of_another_architecture(sources, make_dense, tmp_path, change, message):
    base, experts = sources
    odd = make_dense("odd", **change)
    refuse(ValueError, message, base, [*experts, odd], tmp_path / "out" / "moe")


def test_one_rope_under_two_names_is_one_rope(sources, make_dense, tmp_path):
    base, experts = sources
    scaling = json.loads((base / "config.json").read_text())["rope_scaling"]
    scaling["type"] = "longrope"
    experts[1] = make_dense("renamed", 0.1, 3, config={"rope_scaling": scaling})
    build_moe(base, experts, tmp_path / "moe", progress=False)


def test_another_vocabulary(make_dense, tmp_path):
    base = make_dense("base", tokenizer=True)
    experts = [make_dense("bone", 0.1, 1, tokenizer=True), make_dense("silk", 0.1, 2)]
    build_moe(base, experts, tmp_path / "moe", progress=False)
    file = experts[0] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"][-1]["id"] += 1
    file.write_text(json.dumps(tokenizer))
    target = tmp_path / "out" / "moe"
    token = tokenizer["added_tokens"][-1]["content"].replace("|", r"\|")
    refuse(ValueError, f"expert 'bone': its vocabulary .* token '{token}'", base, experts, target)


def test_checkpoints_that_are_no_dense_phi3_vision(sources, make_dense, golden_plain, tmp_path):
    base, experts = sources
    target = tmp_path / "out" / "moe"
    build_moe(base, experts, tmp_path / "moe", progress=False)
    mixture = [experts[0], tmp_path / "moe"]
    refuse(ValueError, "expert 'moe': .* is a mixture of experts already", base, mixture, target)
    vision = dict.fromkeys(key for key in golden_plain if "vision" in key)
    text = make_dense("text", tensors=vision)
    refuse(ValueError, "base: .* is a text-only checkpoint", text, experts, target)
    (text / "config.json").unlink()
    refuse(FileNotFoundError, "base: .* has no config.json", text, experts, target)
    refuse(FileNotFoundError, "no checkpoint folder", tmp_path / "nowhere", experts, target)


def test_weights_that_cannot_be_read(sources, make_dense, tmp_path):
    base, experts = sources
    target = tmp_path / "out" / "moe"
    sharded = make_dense("sharded", shards=3)
    shard = sharded / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-4])
    refuse(ValueError, "00002-of-00003.safetensors is truncated", sharded, experts, target)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refuse(ValueError, "truncated or no safetensors file", sharded, experts, target)
    shutil.copy(sharded / "model-00001-of-00003.safetensors", shard)
    refuse(
        ValueError, "places .* in model-00002-of-00003.safetensors, which", sharded, experts, target
    )
    shard.unlink()
    refuse(FileNotFoundError, "lacks 1 of its 3 shards: model-00002", sharded, experts, target)
    (sharded / INDEX).unlink()
    refuse(FileNotFoundError, "add the index file", sharded, experts, target)
    (experts[1] / "model.safetensors").rename(experts[1] / "pytorch_model.bin")
    message = r"silk has its weights as a pickle \(pytorch_model.bin\).* convert it to safetensors"
    refuse(FileNotFoundError, message, base, experts, target)
    (experts[1] / "adapter_config.json").write_text("{}")
    refuse(FileNotFoundError, "PEFT adapter, no full model: merge it", base, experts, target)


def test_disk_space(sources, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    target = tmp_path / "out" / "moe"
    message = "the model takes 0.001 GB and .* shall stay free, but"
    refuse(OSError, message, *sources, target, reserve_bytes=2 * free)


def test_target(sources, tmp_path, read_weights):
    base, experts = sources
    refuse(ValueError, "lie in each other", base, experts, base)
    refuse(ValueError, "lie in each other", base, experts, experts[1] / "moe")
    refuse(ValueError, "lie in each other", base, experts, tmp_path, overwrite=True)
    target = tmp_path / "moe"
    target.mkdir()
    build_moe(base, experts, target, progress=False)  # an empty folder is no obstacle
    first = read_weights(target)
    refuse(FileExistsError, "exists: choose another name", base, experts, target)
    build_moe(base, experts[::-1], target, progress=False, overwrite=True)
    second = read_weights(target)
    key = "model.model.layers.0.mlp.experts.{}.down_proj.weight"
    assert torch.equal(first[key.format(0)], second[key.format(1)])
    assert not torch.equal(first[key.format(0)], second[key.format(0)])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "bone", "silk", "moe"}
    (target / "config.json").unlink()
    refuse(FileExistsError, "holds no model", base, experts, target, overwrite=True)


INTERRUPTED = """
import os, resource, signal, sys
from cephalo_lite.moe.build import build_moe

how, base, bone, silk, target = sys.argv[1:]

def hook(event, arguments):
    second = event == "open" and "model-00002" in str(arguments[0]) and "x" in str(arguments[1])
    if how == "kill while writing" and second:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill before renaming" and event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "ctrl-c" and second:
        raise KeyboardInterrupt

sys.addaudithook(hook)
if how == "disk full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
build_moe(base, [bone, silk], target, max_shard_gb=0.0004, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("how", "existing", "code", "message"),
    [
        ("kill while writing", False, -9, ""),
        ("kill before renaming", False, -9, ""),
        ("kill before renaming", True, -9, ""),
        ("ctrl-c", False, None, "KeyboardInterrupt"),
        ("disk full", True, 1, "File too large"),
    ],
)
def test_interrupted_build(sources, tmp_path, read_weights, how, existing, code, message):
    """A real process ends inside the build: the target is as before, the next build succeeds."""
    base, experts = sources
    target = tmp_path / "out" / "moe"
    if existing:
        build_moe(base, experts, target, seed=7, progress=False)
        before = read_weights(target)
        script = INTERRUPTED.replace("progress=False", "progress=False, overwrite=True")
    else:
        target.parent.mkdir()
        script = INTERRUPTED
    command = [sys.executable, "-c", script, how, base, *experts, target]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and (code is None or done.returncode == code), done.stderr
    assert message in done.stderr
    left = {path.name for path in target.parent.iterdir()}
    assert target.exists() == existing
    if existing:
        assert all(torch.equal(t, before[key]) for key, t in read_weights(target).items())
        left.remove("moe")
    if how.startswith("kill"):  # a partial folder under another name, which does not disturb
        assert len(left) == 1 and left.pop().startswith(".moe.partial-")
    else:
        assert not left
    build_moe(base, experts, target, overwrite=existing, progress=False)
    assert len(read_weights(target)) == 82 - 6 + 2 * 6 + 2 * 3
