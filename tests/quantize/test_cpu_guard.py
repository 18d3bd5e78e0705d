"""On CPUs with AVX512-BF16 an evaluation must not spoil a model that is being trained."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from cephalo_lite.quantize import PreflightError, guard_cpu, preflight


def packed_layers(model):
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def expose(model):
    """As bitsandbytes makes a model on such a CPU, whatever this one is."""
    for module in packed_layers(model):
        module.support_avx512bf16_for_cpu = True
    return model


@torch.no_grad()
def test_an_evaluation_repacks_the_weights(load, text_ids):
    """The trap: on this path the packed weight of every layer that ran is another one."""
    model = expose(load("phi3"))
    before = [module.weight.data.clone() for module in packed_layers(model)]
    model(text_ids)
    for module, weight in zip(packed_layers(model), before, strict=True):
        assert module.weight.quant_state.packing_format_for_cpu
        assert module.weight.shape != weight.shape
    with pytest.raises(ValueError, match="8 4-bit layers were repacked .* load_4bit"):
        guard_cpu(model)


def test_guarded_it_does_not(load, adapt, text_ids):
    model = expose(load("phi3"))
    before = [module.weight.data.clone() for module in packed_layers(model)]
    assert guard_cpu(model) == 8 and guard_cpu(model) == 0
    model = adapt(model, "qkv_proj", "down_proj")
    with torch.no_grad():
        want = model.eval()(text_ids).logits
    model.train()(text_ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for module, weight in zip(packed_layers(model), before, strict=True):
        assert module.weight.data.equal(weight)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(text_ids).logits, want)


def test_loading_guards_and_preflight_looks(load, adapt, text_ids):
    model = adapt(load("phi3"), "qkv_proj")
    assert not any(module.support_avx512bf16_for_cpu for module in packed_layers(model))
    preflight(model)
    with pytest.raises(PreflightError, match="repacks 8 layers when the model is evaluated"):
        preflight(expose(model))
    with torch.no_grad():
        model.eval()(text_ids)
    with pytest.raises(PreflightError, match="repacks .* layers .* cannot be trained"):
        preflight(model)


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_training_after_an_evaluation_fails_unguarded(load, text_ids):
    layer = next(iter(packed_layers(expose(load("phi3")))))
    hidden = torch.randn(3, layer.in_features)
    with torch.no_grad():
        layer.eval()(hidden)
    assert not layer.train()(hidden.requires_grad_()).requires_grad
