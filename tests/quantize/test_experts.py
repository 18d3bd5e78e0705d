"""Experts one by one compute what fused experts do, and leave the fused classes alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhimoeForCausalLM

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.quantize import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM

PAIRS = {
    "phimoe": (PhimoeForCausalLM, SequentialPhimoeForCausalLM),
    "phi3_v_moe": (Phi3VMoeForCausalLM, SequentialPhi3VMoeForCausalLM),
}


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number."""
    assert (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize("kind", PAIRS)
def test_logits_and_gradients_equal_the_fused_class(make_folder, text_ids, kind):
    grads = []
    for cls in PAIRS[kind]:
        model = cls.from_pretrained(make_folder(kind), dtype=torch.float32)
        logits = model(text_ids).logits
        logits.sin().sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if "experts" not in n}
        grads.append({"logits": logits.detach()} | named)
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        if want is not None:
            close(grads[1][name], want)


@pytest.mark.parametrize("kind", PAIRS)
def test_one_token_and_an_expert_without_any(make_folder, text_ids, kind):
    fused, ours = (cls.from_pretrained(make_folder(kind)).eval() for cls in PAIRS[kind])
    with torch.no_grad():
        close(ours(text_ids[:1, :1]).logits, fused(text_ids[:1, :1]).logits)
    ours(text_ids[:1, :1]).logits.sum().backward()
    hit = [p.grad is not None for n, p in ours.named_parameters() if "layers.0.mlp.experts" in n]
    each = len(hit) // {"phimoe": 4, "phi3_v_moe": 2}[kind]
    assert sum(hit) == 2 * each  # two experts for the token; those without one have no gradient


@pytest.mark.parametrize("kind", PAIRS)
def test_names_on_the_disk_are_the_published_ones(make_folder, tmp_path, kind):
    fused, ours = PAIRS[kind]
    ours.from_pretrained(make_folder(kind)).save_pretrained(tmp_path)
    want, written = (load_file(f / "model.safetensors") for f in (make_folder(kind), tmp_path))
    assert written.keys() == want.keys()
    assert all(tensor.equal(want[name]) for name, tensor in written.items())
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == [fused.__name__]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is fused


def test_fused_classes_load_as_ever(make_folder, load, text_ids):
    """Nothing global changes: before, between and after, the stock class has its fused experts."""
    before = PhimoeForCausalLM.from_pretrained(make_folder("phimoe")).eval()
    load("phimoe")
    after, info = PhimoeForCausalLM.from_pretrained(make_folder("phimoe"), output_loading_info=True)
    assert not any(info.values())
    assert after.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 256, 64)
    for one, two in zip(before.parameters(), after.parameters(), strict=True):
        assert one.equal(two)


def test_a_failed_load_leaves_nothing_behind(make_folder):
    with pytest.raises(Exception, match="no_such_setting"):
        SequentialPhimoeForCausalLM.from_pretrained(make_folder("phimoe"), no_such_setting=1)
    model = PhimoeForCausalLM.from_pretrained(make_folder("phimoe"))
    assert hasattr(model.model.layers[0].mlp.experts, "gate_up_proj")
