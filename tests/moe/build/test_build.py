"""What `build_moe` writes, and what it reports."""

import json
import math
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from cephalo_lite.moe.build import build_moe
from cephalo_lite.moe.build.report import BuildReport
from cephalo_lite.shards import TensorReader, read_header

MATRICES = ("gate_up_proj", "down_proj")
INDEX = "model.safetensors.index.json"


def expert_mlps(golden_moe, expert):
    """The MLPs of one golden expert under their dense names."""
    prefix = "model.model.layers.{}.mlp.experts.{}.{}.weight"
    return {
        f"model.layers.{layer}.mlp.{matrix}.weight": golden_moe[
            prefix.format(layer, expert, matrix)
        ]
        for layer in range(3)
        for matrix in MATRICES
    }


def golden_gates(golden_moe):
    gate = "model.model.layers.{}.mlp.gating_layer.{}"
    return [
        {part: golden_moe[gate.format(layer, part)] for part in ("gate.weight", "gate.bias")}
        for layer in range(3)
    ]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("max_shard_gb", [4.0, 0.0004])
def test_rebuilds_the_golden_mixture(make_dense, read_weights, golden_moe, tmp_path, max_shard_gb):
    experts = [
        make_dense(f"e{e}", tensors=expert_mlps(golden_moe, e), shards=1 + e) for e in range(3)
    ]
    with pytest.warns(UserWarning, match="base's own MLPs: e1"):
        report = build_moe(
            make_dense("base"),
            experts,
            tmp_path / "moe",
            gates=golden_gates(golden_moe),
            max_shard_gb=max_shard_gb,
            progress=False,
        )
    expected = {key: tensor for key, tensor in golden_moe.items() if key != "lm_head.weight"}
    assert_same(read_weights(tmp_path / "moe"), expected)
    assert report.verified and report.equal_to_base == ["e1"]
    assert (report.tensors_from_experts, report.tensors_from_base, report.tensors_new) == (
        18,
        76,
        6,
    )
    total = sum(tensor.numel() for tensor in expected.values())
    one = sum(tensor.numel() for tensor in expert_mlps(golden_moe, 0).values())
    assert (report.total_parameters, report.active_parameters) == (total, total - 2 * one)
    assert report.bytes_written == 4 * total
    if max_shard_gb == 4.0:
        assert report.shards == ["model.safetensors"]
        assert not (tmp_path / "moe" / INDEX).exists()
    else:
        index = json.loads((tmp_path / "moe" / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * total
        assert len(report.shards) > 2 and set(index["weight_map"].values()) == set(report.shards)
        for name in report.shards:
            part = load_file(tmp_path / "moe" / name)
            assert {k for k, shard in index["weight_map"].items() if shard == name} == set(part)
            matrices = {re.sub(r"experts\.\d+", "", key) for key in part}  # no experts apart
            assert sum(t.nbytes for t in part.values()) <= 400_000 or len(matrices) == 1


def test_configuration_and_side_files(make_dense, tmp_path):
    base = make_dense("base", config={"auto_map": {"AutoConfig": "code.Config"}}, tokenizer=True)
    (base / "preprocessor_config.json").write_text('{"num_crops": 4, "auto_map": {"a": "b.C"}}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("modeling.py", "training_args.bin", "trainer_state.json"):
        (base / name).write_text("x")
    experts = {"bone": make_dense("e0", 0.1, 1), "silk": make_dense("e1", 0.1, 2)}
    build_moe(base, experts, tmp_path / "moe", 2, "renormalised", progress=False)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    added = {
        "architectures": ["Phi3VForCausalLMMoE"],
        "model_type": "phi3_v_moe",
        "k": 2,
        "num_expert_models": 2,
        "use_embeddings_in_router": False,
        "router": "renormalised",
        "expert_names": ["bone", "silk"],
    }
    dense = json.loads((base / "config.json").read_text())
    dense.pop("auto_map")
    assert config == dense | added
    preprocessor = json.loads((tmp_path / "moe" / "preprocessor_config.json").read_text())
    assert preprocessor == {"num_crops": 4}
    assert {file.name for file in (tmp_path / "moe").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "build_report.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("preprocessor_config.json", "chat_template.jinja"),
    }
    same = (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == same


def test_some_layers_only(make_dense, read_weights, golden_plain, tmp_path):
    experts = [make_dense("e0", 0.1, 1), make_dense("e1", 0.1, 2)]
    base = make_dense("base")
    with pytest.warns(UserWarning, match="dense MLPs 0.10"):
        report = build_moe(base, experts, tmp_path / "moe", layers=[2, 0], progress=False)
    weights = read_weights(tmp_path / "moe")
    assert report.layers == [0, 2] and len(report.change[0]) == 2
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["moe_layers"] == [0, 2]
    for matrix in MATRICES:
        key = f"model.layers.1.mlp.{matrix}.weight"
        assert torch.equal(weights["model." + key], golden_plain[key])
    kinds = {"0": set(), "1": set(), "2": set()}
    for key in weights:
        if key.startswith("model.model.layers.") and ".mlp." in key:
            kinds[key.split(".")[3]].add(key.split(".")[5])
    mixed = {"experts", "gating_layer"}
    assert kinds == {"0": mixed, "1": set(MATRICES), "2": mixed}


def test_all_layers_named_is_the_published_layout(make_dense, tmp_path):
    experts = [make_dense("e0", 0.1, 1), make_dense("e1", 0.1, 2)]
    build_moe(make_dense("base"), experts, tmp_path / "moe", layers=range(3), progress=False)
    assert "moe_layers" not in json.loads((tmp_path / "moe" / "config.json").read_text())


def test_random_gates_are_seeded_and_small(make_dense, read_weights, tmp_path):
    base, experts = make_dense("base"), [make_dense("e0", 0.1, 1), make_dense("e1", 0.1, 2)]
    built = {}
    for name, seed, layers in [("a", 3, None), ("b", 3, [1]), ("c", 4, None)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_moe(base, experts, tmp_path / name, seed=seed, layers=layers, progress=False)
        built[name] = read_weights(tmp_path / name)
    key = "model.model.layers.1.mlp.gating_layer.gate."
    assert torch.equal(built["a"][key + "weight"], built["b"][key + "weight"])
    assert not torch.equal(built["a"][key + "weight"], built["c"][key + "weight"])
    assert not torch.equal(built["a"][key + "weight"], built["a"][key.replace("1", "0") + "weight"])
    assert built["a"][key + "weight"].std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(built["a"][key + "bias"], torch.zeros(2))


def test_gates_from_a_file(make_dense, read_weights, golden_moe, tmp_path):
    gates = golden_gates(golden_moe)
    named = {f"layers.{n}.{part}": t for n, gate in enumerate(gates) for part, t in gate.items()}
    save_file(named, tmp_path / "gates.safetensors")
    experts = [make_dense(f"e{e}", 0.1, e + 1) for e in range(3)]
    base = make_dense("base")
    build_moe(base, experts, tmp_path / "moe", gates=tmp_path / "gates.safetensors", progress=False)
    weights = read_weights(tmp_path / "moe")
    for number, gate in enumerate(gates):
        for part, tensor in gate.items():
            assert torch.equal(
                weights[f"model.model.layers.{number}.mlp.gating_layer.{part}"], tensor
            )


@pytest.mark.filterwarnings("ignore:experts with:UserWarning")
def test_bfloat16_shared_embedding_and_unnamed_tower(
    make_dense, read_weights, golden_plain, tmp_path
):
    """Read also what has the shared `wte`, or a tower without its `vision_model.` level."""
    half = {key: tensor.bfloat16() for key, tensor in golden_plain.items()}
    shared = {"model.vision_embed_tokens.wte.weight": half["model.embed_tokens.weight"].clone()}
    base = make_dense("base", tensors=half | shared)
    short = {
        key.replace("img_processor.vision_model.", "img_processor."): t for key, t in half.items()
    }
    gone = dict.fromkeys(golden_plain)
    experts = [make_dense("e0", tensors=gone | short), make_dense("e1", tensors=half)]
    for gate_dtype, expected in [(None, torch.bfloat16), ("float32", torch.float32)]:
        name = f"moe-{gate_dtype}"
        with pytest.warns(UserWarning, match="bit-equal MLPs: e0 = e1"):
            build_moe(base, experts, tmp_path / name, gate_dtype=gate_dtype, progress=False)
        weights = read_weights(tmp_path / name)
        assert "model.model.vision_embed_tokens.wte.weight" not in weights
        for key, tensor in half.items():
            if "model.layers" not in key or ".mlp." not in key:
                assert torch.equal(weights["model." + key], tensor)
        assert weights["model.model.layers.0.mlp.gating_layer.gate.weight"].dtype == expected


def test_report_measures_what_each_expert_changed(make_dense, tmp_path):
    base = make_dense("base")
    experts = {"near": make_dense("e0", 0.05, 1), "far": make_dense("e1", 0.4, 2)}
    experts["attention"] = make_dense("e2", 0.25, 3, where=".self_attn.")
    with pytest.warns(UserWarning) as caught:
        report = build_moe(base, experts, tmp_path / "moe", progress=False)
    for row, expected in zip(report.change, [0.05, 0.4, 0.0], strict=True):
        assert row == pytest.approx([expected] * 3, rel=1e-4)
    assert report.left_behind[2]["attention"] == pytest.approx(0.25, rel=1e-4)
    assert sum(report.left_behind[0].values()) == sum(report.left_behind[1].values()) == 0.0
    assert [str(w.message) for w in caught] == report.warnings
    assert report.equal_to_base == ["attention"] and report.identical_experts == []
    assert "attention 0.25" in report.warnings[1] and len(report.warnings) == 2
    table = report.table()
    assert "mean   0.0500  0.4000     0.0000" in table.splitlines()
    rows = [line for line in table.splitlines() if line[:5] in ("layer", "mean ", "0    ")]
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1
    assert BuildReport.load(tmp_path / "moe") == report
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:experts with the base:UserWarning")
def test_the_same_expert_twice(make_dense, tmp_path):
    base, expert = make_dense("base"), make_dense("bone", 0.1)
    with pytest.warns(UserWarning, match="bone = bone-2"):
        report = build_moe(base, [expert, base, str(expert)], tmp_path / "moe", progress=False)
    assert report.expert_names == ["bone", "base", "bone-2"]
    assert report.identical_experts == [("bone", "bone-2")] and report.equal_to_base == ["base"]


def test_an_expert_with_nan_is_reported(make_dense, golden_plain, tmp_path):
    key = "model.layers.1.mlp.down_proj.weight"
    broken = golden_plain[key].clone()
    broken[0, 0] = math.nan
    experts = [make_dense("good", 0.1), make_dense("bad", tensors={key: broken})]
    with pytest.warns(UserWarning, match="bad: NaN or infinite values at layer 1"):
        report = build_moe(make_dense("base"), experts, tmp_path / "moe", progress=False)
    assert report.as_dict()["change"][1] == [0.0, None, 0.0]


def test_plot(make_dense, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    experts = [make_dense("e0", 0.1, 1), make_dense("e1", 0.3, 2)]
    report = build_moe(make_dense("base"), experts, tmp_path / "moe", progress=False)
    lines = report.plot().get_lines()
    assert [line.get_label() for line in lines] == ["e0", "e1"]
    assert [list(line.get_ydata()) for line in lines] == report.change
    matplotlib.pyplot.close("all")


def test_verification_sees_one_wrong_bit(make_dense, tmp_path, monkeypatch):
    """A disk that returns something else than was written, once, in the last tensor but one."""
    real, seen = TensorReader.read_into, []

    def read_into(self, tensor, offset, view):
        real(self, tensor, offset, view)
        if ".partial-" in str(tensor.file):
            seen.append(tensor.nbytes)
            if len(seen) == 90:
                view[-1] ^= 1

    monkeypatch.setattr(TensorReader, "read_into", read_into)
    base, experts = make_dense("base"), [make_dense("e0", 0.1, 1), make_dense("e1", 0.1, 2)]
    with pytest.raises(OSError, match="model.* reads back from .* with other bytes than"):
        build_moe(base, experts, tmp_path / "moe", progress=False)
    assert not (tmp_path / "moe").exists() and not list(tmp_path.glob(".moe*"))
    build_moe(base, experts, tmp_path / "moe", progress=False)  # now without
    data = (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert len(seen) > 150 and sum(seen[90:]) > 0.98 * data  # all of it
    seen.clear()
    build_moe(base, experts, tmp_path / "unread", verify=False, progress=False)
    assert seen == []


def test_tensor_data_is_aligned(make_dense, tmp_path):
    experts = [make_dense("e0", 0.1, 1), make_dense("e1", 0.1, 2)]
    build_moe(make_dense("base"), experts, tmp_path / "moe", progress=False)
    for key, info in read_header(tmp_path / "moe" / "model.safetensors").items():
        assert info.start % 64 == 0 or key.endswith("gate.bias"), key
