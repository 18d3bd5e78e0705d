"""Experts taken apart and put together: the same model, in the same memory."""

import pytest
import torch
from transformers import PhimoeForCausalLM

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.finetune import add_adapters, fuse, merge_adapters, unfuse
from cephalo_lite.finetune.merging import random_probe
from cephalo_lite.quantize import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM


@pytest.fixture(params=["phi3_v_moe", "phimoe"])
def fused(request, make_small, phimoe_config):
    if request.param == "phi3_v_moe":
        return Phi3VMoeForCausalLM.from_experts(make_small(), [make_small(1), make_small(2)], 2)
    torch.manual_seed(0)
    return PhimoeForCausalLM(phimoe_config()).eval()


@torch.no_grad()
def logits(model):
    return model(**random_probe(model)).logits


def test_apart_and_together_is_the_same_model(fused):
    kind, want = type(fused), logits(fused)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    places = {tensor.untyped_storage().data_ptr() for tensor in fused.parameters()}
    apart = unfuse(fused)
    assert type(apart) in (SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM)
    assert {p.untyped_storage().data_ptr() for p in apart.parameters()} == places  # no copy
    torch.testing.assert_close(logits(apart), want, rtol=1e-5, atol=1e-5)
    assert unfuse(apart) is apart
    again = fuse(apart)
    assert type(again) is kind and fuse(again) is again
    after = again.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_what_is_saved_apart_loads_fused(fused, tmp_path):
    kind, want = type(fused), logits(fused)
    unfuse(fused).save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)


def test_adapters_on_fused_experts_merge_and_fuse(fused, wake):
    kind = type(fused)
    model, report = add_adapters(fused, ("experts", "gates"), r=2)
    assert report.groups.keys() == {"experts", "gates"}
    wake(model).eval()
    want = logits(model.get_base_model())
    merged, _ = merge_adapters(model)
    together = fuse(merged)
    assert type(together) is kind
    torch.testing.assert_close(logits(together), want, rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_takes_nothing_apart(fused):
    """The mixture's layers have no dense MLP: the second group is not there."""
    kind, want = type(fused), {name: tuple(t.shape) for name, t in fused.state_dict().items()}
    with pytest.raises(ValueError, match="nothing in group 'mlp'"):
        add_adapters(fused, ("experts", "mlp"), r=2)
    assert type(fused) is kind
    assert {name: tuple(t.shape) for name, t in fused.state_dict().items()} == want
    assert all(parameter.requires_grad for parameter in fused.parameters())
