"""Exported folders: released names, loaded bit for bit by transformers without this package."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

import cephalo_lite as cl
from cephalo_lite.exporting import export, gguf_command
from cephalo_lite.quantize.models import SequentialPhimoeForCausalLM
from cephalo_lite.shards import read_checkpoint
from cephalo_lite.tiny.text.tokenizer import make_tokenizer

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 5.0, 9.0]}
SHAPE = {
    "vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "original_max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["What is the capital of France? Paris."], vocab_size=340)


def dense() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    return Phi3ForCausalLM(Phi3Config(**SHAPE, rope_parameters=rope)).eval()


def mixture(bias: float = 0.5) -> SequentialPhimoeForCausalLM:
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, **FACTORS, "short_mscale": 1.2,
        "long_mscale": 1.3, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = PhimoeConfig(
        **SHAPE, num_local_experts=3, attention_bias=True, lm_head_bias=True, rope_parameters=rope
    )
    model = SequentialPhimoeForCausalLM(config).eval()
    if bias:
        torch.nn.init.normal_(model.lm_head.bias, std=bias)
    return model


STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    AutoTokenizer.from_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    logits = model(torch.arange(3, 99)[None]).logits.detach().contiguous()
    save_file({**state, "logits": logits}, folder + ".stock")
    print(type(model).__name__)
assert "cephalo_lite" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Exported models with what stock transformers read of them, in a process of its own."""
    models = {"dense": dense(), "mixture": mixture()}
    place = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in models.items():
            export(model, tokenizer, place / name, max_shard_gb=1e-4)
    code = [sys.executable, "-c", STOCK, *(str(place / name) for name in models)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [Phi3ForCausalLM.__name__, PhimoeForCausalLM.__name__]
    return {n: (m, place / n, load_file(place / f"{n}.stock")) for n, m in models.items()}


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_stock_transformers_loads_it_bit_for_bit(exported, name):
    model, folder, there = exported[name]
    assert len(list(folder.glob("*.safetensors"))) > 1
    here = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    for key, tensor in model.state_dict().items():
        assert here[key].equal(tensor), key
        found = re.search(r"(.*experts)\.(\d+)\.(w\d)", key)
        if found is None:
            assert there[key].equal(tensor), key
            continue
        experts, number, matrix = found.groups()  # stock transformers has them in two tensors
        fused = there[f"{experts}.{'down_proj' if matrix == 'w2' else 'gate_up_proj'}"]
        rows = {"w1": slice(0, 48), "w3": slice(48, 96), "w2": slice(None)}[matrix]
        assert fused[int(number)][rows].equal(tensor), key
    with torch.no_grad():
        logits = model(torch.arange(3, 99)[None]).logits
    torch.testing.assert_close(there["logits"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, architecture, scaling",
    [
        (dense, "Phi3ForCausalLM", {"type", "short_factor", "long_factor"}),
        (
            mixture,
            "PhiMoEForCausalLM",
            {"type", "short_factor", "long_factor", "short_mscale", "long_mscale"}
            | {"original_max_position_embeddings"},
        ),
    ],
)
def test_released_words(tokenizer, tmp_path, make, architecture, scaling):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export(make(), tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture] == [report.architecture]
    assert (config["rope_theta"], set(config["rope_scaling"])) == (10000.0, scaling)
    names = read_checkpoint(tmp_path / "out")
    assert len(names) == report.tensors
    if make is mixture:
        assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in names
        assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_what_a_runtime_drops_is_warned_of(tokenizer, tmp_path):
    with pytest.warns(UserWarning) as seen:
        report = export(mixture(), tokenizer, tmp_path / "a")
    told = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
    assert [text for text in told if text in report.warnings] == report.warnings
    assert re.search(r"vLLM 0.32 leaves lm_head.bias out \(here up to [\d.]+\)", report.warnings[0])
    assert "llama.cpp computes another network" in report.warnings[1]
    with pytest.warns(UserWarning, match="llama.cpp"):
        unbiased = export(mixture(bias=0), tokenizer, tmp_path / "b")
    assert not any("vLLM" in text for text in unbiased.warnings)
    assert export(dense(), tokenizer, tmp_path / "c").warnings == []


def test_a_vision_mixture_has_the_published_names(golden_processor, make_small, tmp_path):
    base = make_small()
    model = cl.Phi3VMoeForCausalLM.from_experts(base, [base, make_small(1)], 2)
    with pytest.warns(UserWarning, match="cephalo-serve"):
        report = export(model, golden_processor, tmp_path / "out")
    assert report.architecture == "Phi3VForCausalLMMoE"
    names = read_checkpoint(tmp_path / "out")
    assert "model.model.layers.0.mlp.experts.1.gate_up_proj.weight" in names
    again = cl.Phi3VMoeForCausalLM.from_pretrained(tmp_path / "out")
    assert all(t.equal(model.state_dict()[n]) for n, t in again.state_dict().items())


def test_gguf_is_for_the_dense_model_only(tokenizer, tmp_path):
    export(dense(), tokenizer, tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="has no tokenizer.model"):
        gguf_command(tmp_path / "dense", "llama.cpp", "x.gguf")
    # a tokenizer that came from a released folder brings its tokenizer.model along
    tokenizer.save_pretrained(tmp_path / "released")
    (tmp_path / "released" / "tokenizer.model").write_bytes(b"sentencepiece")
    released = type(tokenizer).from_pretrained(tmp_path / "released")
    export(dense(), released, tmp_path / "dense", overwrite=True)
    command = gguf_command(tmp_path / "dense", "llama.cpp", "x.gguf")
    assert command[1:3] == ["llama.cpp/convert_hf_to_gguf.py", str(tmp_path / "dense")]
    with pytest.warns(UserWarning):
        export(mixture(), released, tmp_path / "moe")
    with pytest.raises(ValueError, match="a phimoe. GGUF is for the dense phi3 only"):
        gguf_command(tmp_path / "moe", "llama.cpp", "x.gguf")


def test_what_cannot_be_exported(tokenizer, tmp_path):
    from cephalo_lite.finetune import add_adapters

    with pytest.raises(ValueError, match="merge_adapters"):
        export(add_adapters(dense(), "attention")[0], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be exported; phi3, phimoe"):
        export(torch.nn.Linear(2, 2), tokenizer, tmp_path / "out")
    quantised = dense()
    quantised.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="is quantised"):
        export(quantised, tokenizer, tmp_path / "out")
    model = dense()  # names that no released file has: nothing is left under the final name
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="2 tensors have no released name, such as .*extra"):
        export(model, tokenizer, tmp_path / "out")
    assert not any(tmp_path.iterdir())
