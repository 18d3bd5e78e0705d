"""Adapters on 4-bit experts learn what they would on stock fused experts, and keep no weights."""

import pytest
import torch
from torch.func import functional_call
from transformers import PhimoeForCausalLM

from cephalo_lite.quantize import SequentialPhimoeForCausalLM

TARGETS = ("q_proj", "o_proj", "w1", "w2", "w3")


def test_gradients_equal_those_through_stock_fused_experts(
    load, make_folder, unpacked, fuse, adapt, text_ids
):
    """Reference: the fused class on dequantised weights + B A, differentiated by autograd."""
    model = adapt(load("phimoe"), *TARGETS)
    base = {n: w for n, w in unpacked(model).items() if "lora_" not in n}
    base = {
        n.replace("base_model.model.", "").replace("base_layer.", ""): w for n, w in base.items()
    }
    factors = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    merged = dict(base)
    for name, a in factors.items():
        if ".lora_A." in name:
            own = name.replace("base_model.model.", "").replace("lora_A.default.", "")
            merged[own] = base[own] + 2.0 * factors[name.replace("lora_A", "lora_B")] @ a
    reference = PhimoeForCausalLM.from_pretrained(make_folder("phimoe")).eval()
    want = functional_call(reference, fuse(merged), (text_ids,)).logits
    want.sin().sum().backward()
    got = model(text_ids).logits
    got.sin().sum().backward()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    compared = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if parameter.grad is None:  # an expert without tokens; the reference has zeros
                assert factors[name].grad.abs().max() == 0
                continue
            off = (parameter.grad - factors[name].grad).norm() / factors[name].grad.norm()
            assert off <= 1e-5, (name, float(off))
            compared += 1
    assert compared > 40  # of 56: most experts have tokens


def saved_shapes(model, ids) -> set[tuple]:
    """Shapes of all floating tensors that a forward pass saves for the backward pass."""
    shapes = set()

    def pack(tensor):
        if tensor.is_floating_point():
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids).logits.sum()
    return shapes


def test_no_unpacked_weight_is_kept_for_the_backward_pass(load, make_folder, adapt, text_ids):
    ids = text_ids[:1, :13]  # no activation has a weight's shape
    weights = {(128, 64), (64, 128), (64, 64), (32, 64), (64, 32)}
    plain = SequentialPhimoeForCausalLM.from_pretrained(make_folder("phimoe")).eval()
    assert saved_shapes(adapt(plain, *TARGETS), ids) & weights  # the test sees them where they are
    assert not saved_shapes(adapt(load("phimoe"), *TARGETS), ids) & weights


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(load, adapt, text_ids, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapt(load("phimoe"), *TARGETS).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)  # routers and their inputs are jittered in training
        model(text_ids, labels=text_ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-4, atol=1e-6, msg=name)
