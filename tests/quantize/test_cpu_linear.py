"""Large 4-bit layers on a CPU: bitsandbytes' numbers, in memory that is used again."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear4bit as Linear4bitWithLora
from torch import nn

from cephalo_lite.quantize import cpu_linear, load_4bit, use_cpu_linear
from cephalo_lite.quantize.cpu_linear import CpuLinear4bit, forget_memory, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_layer(rows=1024, columns=1024, kind="nf4", nested=True, bias=False, **options):
    """A packed layer of seeded weights."""
    torch.manual_seed(rows + columns)
    layer = Linear4bit(columns, rows, bias, quant_type=kind, compress_statistics=nested)
    weight = Params4bit(
        torch.randn(rows, columns), requires_grad=False, quant_type=kind,
        compress_statistics=nested, **options,
    )  # fmt: skip
    layer.weight = weight.to("cpu")
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"nested": False}, {"kind": "fp4"}, {"blocksize": 128}, {"rows": 1026, "columns": 96}],
)
def test_unpacked_bit_by_bit(dtype, options):
    weight = make_layer(**options).weight
    want = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if dtype != torch.float32:  # as the library does when it computes in this dtype
        state = copy.copy(weight.quant_state)
        state.dtype = dtype
        want = dequantize_4bit(weight.data, state)
    assert unpack(weight, dtype).equal(want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_bitsandbytes_own(dtype, bias):
    stock = make_layer(bias=bias)
    ours = copy.deepcopy(stock)
    assert use_cpu_linear(nn.ModuleList([ours, make_layer(64, 64)])) == 1
    assert type(ours) is CpuLinear4bit and isinstance(ours, Linear4bit)
    found = []
    for layer in (stock, ours):
        x = torch.randn(2, 3, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = layer(x.requires_grad_())
        (out.float() ** 2).sum().backward()
        found.append((out, x.grad))
    for theirs, own in zip(*found, strict=True):
        assert own.dtype == theirs.dtype == dtype
        torch.testing.assert_close(own, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_every_matrix_is_unpacked_into_the_same_memory():
    """And one that is needed twice, forward and backward, is not kept in between."""
    layers = [make_layer(), make_layer(2048, 1024), make_layer(1024, 2048)]
    forget_memory()
    use_cpu_linear(nn.ModuleList(layers))
    places = {unpack(layer.weight, torch.float32).data_ptr() for layer in layers[1:]}
    assert len(places) == 1
    x = torch.randn(4, 1024, requires_grad=True)
    out = layers[2](layers[1](layers[0](x)))
    whole = [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    want = x.detach().clone().requires_grad_()
    (want @ whole[0].T @ whole[1].T @ whole[2].T).sum().backward()
    out.sum().backward()
    torch.testing.assert_close(x.grad, want.grad, rtol=1e-4, atol=1e-2)


def test_what_is_packed_otherwise_stays_with_bitsandbytes():
    odd = make_layer(1040, 1025)  # its last block is not whole
    assert use_cpu_linear(nn.ModuleList([odd])) == 1
    x = torch.randn(2, 1025)
    whole = dequantize_4bit(odd.weight.data, odd.weight.quant_state)
    torch.testing.assert_close(odd(x), x @ whole.T, rtol=1e-4, atol=1e-3)


def test_it_is_saved_and_adapted_like_any_other():
    model = nn.ModuleDict({"w": make_layer()})
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_cpu_linear(model)
    got = model.state_dict()
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)
    model.is_loaded_in_4bit = True
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["w"]), model)
    assert isinstance(adapted["w"], Linear4bitWithLora)
    adapted["w"](torch.randn(3, 1024)).sum().backward()
    grads = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert grads == {"w.lora_A.default.weight", "w.lora_B.default.weight"}


@pytest.mark.parametrize("kind", ["phimoe", "phi3_v_moe"])
def test_a_model_that_is_loaded_computes_the_same(make_folder, text_ids, adapt, monkeypatch, kind):
    """Logits and the gradients of adapters, with every layer taken for a large one."""
    found = []
    for smallest in (cpu_linear.SMALLEST, 1):
        monkeypatch.setattr(cpu_linear, "SMALLEST", smallest)
        model, _ = load_4bit(make_folder(kind), torch.float32, device="cpu", progress=False)
        layers = [type(module) for module in model.modules() if isinstance(module, Linear4bit)]
        assert set(layers) == {Linear4bit if smallest > 1 else CpuLinear4bit} and len(layers) > 8
        model = adapt(model, "o_proj", "w2" if kind == "phimoe" else "down_proj")
        logits = model.train()(text_ids).logits
        logits.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": logits, **grads})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        if tensor is not None:
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)
