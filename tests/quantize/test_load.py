"""Loading in 4 bits: what is packed, that the maths is the same, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3ForCausalLM, PhimoeForCausalLM
from transformers.utils import logging as transformers_logging

from cephalo_lite import Phi3VForCausalLM, Phi3VMoeForCausalLM, ask
from cephalo_lite.quantize import load_4bit

KINDS = ["phi3", "phimoe", "phi3_v", "phi3_v_moe"]
KEPT = ("embed_tokens", "lm_head", "router", "gating_layer", "vision_embed_tokens", "norm")


def copy_of(folder, target, **fields):
    """A copy of a checkpoint whose config.json has other fields; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_every_large_matrix_is_packed_and_nothing_else(load, kind):
    model = load(kind, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Params4bit":
            assert parameter.quant_state.quant_type == "nf4" and parameter.quant_state.nested
            assert not any(part in name for part in KEPT), name
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.ndim == 1 or any(part in name for part in KEPT), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    packed = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "quant_state")}
    attention = {"qkv_proj", "o_proj"} if kind != "phimoe" else {f"{n}_proj" for n in "qkvo"}
    mlp = {"gate_up_proj", "down_proj"} if kind != "phimoe" else {"w1", "w2", "w3"}
    assert packed == attention | mlp


def test_logits_equal_those_of_the_dequantised_model(load, make_folder, unpacked, fuse, text_ids):
    model = load("phimoe")
    reference = PhimoeForCausalLM.from_pretrained(make_folder("phimoe")).eval()
    reference.load_state_dict(fuse(unpacked(model)))
    with torch.no_grad():
        got, want = model(text_ids).logits, reference(text_ids).logits
        original = PhimoeForCausalLM.from_pretrained(make_folder("phimoe")).eval()(text_ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got - original).abs().max() > 1e-3 * want.abs().max()  # quantised at all


@pytest.mark.parametrize("kind", ["phi3", "phi3_v", "phi3_v_moe"])
def test_logits_of_the_others(load, make_folder, unpacked, text_ids, kind):
    model = load(kind)
    weights = unpacked(model)
    classes = {"phi3": Phi3ForCausalLM, "phi3_v": Phi3VForCausalLM}
    reference = classes.get(kind, Phi3VMoeForCausalLM).from_pretrained(make_folder(kind)).eval()
    if kind == "phi3_v_moe":
        for name in [n for n in reference.state_dict() if ".mlp.experts." in n]:
            stem, _, matrix = name.rpartition(".")
            parts = [weights.pop(f"{stem}.{e}.{matrix}.weight") for e in range(2)]
            weights[name] = torch.stack(parts)
    reference.load_state_dict(weights)
    with torch.no_grad():
        got, want = model(text_ids).logits, reference(text_ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_vision_mixture_in_4_bits_answers(make_folder, synth):
    model, processor = load_4bit(
        make_folder("phi3_v_moe"), dtype=torch.float32, device="cpu", progress=False
    )
    answer = ask(model, processor, "What is it?", images=synth(28, 28))
    assert isinstance(answer.text, str)


def test_a_mixture_of_2024_calls_itself_dense(make_folder, tmp_path):
    folder = copy_of(make_folder("phi3_v_moe"), tmp_path / "old", model_type="phi3_v")
    model, _ = load_4bit(folder, dtype=torch.float32, device="cpu", progress=False)
    assert type(model).__name__ == "SequentialPhi3VMoeForCausalLM"


@pytest.mark.parametrize("before", [True, False])
def test_the_progress_bar_is_as_it_was(make_folder, before):
    show = (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar)
    was = transformers_logging.is_progress_bar_enabled()
    try:
        show[before]()
        load_4bit(make_folder("phi3"), dtype=torch.float32, device="cpu", progress=not before)
        assert transformers_logging.is_progress_bar_enabled() is before
    finally:
        show[was]()


def test_refusals(make_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_4bit(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_4bit(tmp_path / "empty")
    other = copy_of(make_folder("phi3"), tmp_path / "other", model_type="llama")
    with pytest.raises(ValueError, match="is a llama; read here are phi3, phimoe"):
        load_4bit(other)
    int8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    eight = copy_of(make_folder("phi3"), tmp_path / "eight", quantization_config=int8)
    with pytest.raises(ValueError, match="quantised already, but not in NF4"):
        load_4bit(eight)


def test_missing_weights_are_named(make_folder, tmp_path):
    folder = copy_of(make_folder("phimoe"), tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as .*experts\.2\.w3"):
        load_4bit(folder, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_as_on_the_cpu(load, make_folder, text_ids):
    model, _ = load_4bit(make_folder("phimoe"), torch.float32, "cuda", progress=False)
    assert all(p.device.type == "cuda" for p in model.parameters())
    with torch.no_grad():
        got, want = model(text_ids.cuda()).logits.cpu(), load("phimoe")(text_ids).logits
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
