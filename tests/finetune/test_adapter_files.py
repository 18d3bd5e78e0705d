"""Adapters saved, loaded and merged: exact, complete, and loud where they are not."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhimoeForCausalLM

from cephalo_lite.finetune import add_adapters, load_adapters, merge_adapters, save_adapters
from cephalo_lite.finetune.merging import random_probe

ALL = {
    "dense": ("attention", "mlp"),
    "moe": ("attention", "experts", "router"),
    "vision_moe": ("vision", "projector", "attention", "experts", "gates"),
}


@pytest.fixture
def make(make_dense, make_moe, make_vision_moe):
    makers = {"dense": make_dense, "moe": make_moe, "vision_moe": make_vision_moe}
    return lambda kind: makers[kind]()


@torch.no_grad()
def logits(model):
    return model.eval()(**random_probe(getattr(model, "get_base_model", lambda: model)())).logits


@pytest.mark.parametrize("kind", list(ALL))
def test_save_load_and_merge_are_exact(make, wake, tmp_path, kind):
    model = wake(add_adapters(make(kind), ALL[kind], r=4)[0])
    before, plain = logits(model), logits(make(kind))
    assert (before - plain).abs().max() > 0.01  # the adapters do something
    save_adapters(model, tmp_path / "adapter")
    again, report = load_adapters(make(kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), before, rtol=1e-6, atol=1e-6)
    assert set(report.groups) == {"gates" if g == "router" else g for g in ALL[kind]}
    assert not any(p.requires_grad for p in again.parameters())
    merged, change = merge_adapters(again)
    assert change.change <= 1e-5 and change.dtype == torch.float32 and not change.quantized
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(make(kind))


def test_training_goes_on_with_loaded_adapters(make, wake, tmp_path):
    model = wake(add_adapters(make("dense"), "attention", r=4)[0])
    save_adapters(model, tmp_path / "adapter")
    half = make("dense").bfloat16()
    again, _ = load_adapters(half, tmp_path / "adapter", trainable=True)
    trained = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert again.training and len(trained) == 8
    assert {p.dtype for p in trained.values()} == {torch.float32}  # rounding would stop learning
    assert all(p.equal(model.get_parameter(name)) for name, p in trained.items())


def as_in_2024(folder, tensors: dict, model):
    """Write adapters as the old recipe's libraries did, with a LoRA on the gate."""
    generator = torch.Generator().manual_seed(1)
    old = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in tensors.items()}
    for layer in range(2):
        gate = f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
        old[f"{gate}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        old[f"{gate}.lora_B.weight"] = torch.randn(4, 4, generator=generator)
    save_file(old, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
    LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets).save_pretrained(folder)
    return old


def test_adapters_of_the_old_recipe_load_exactly(make, wake, tmp_path):
    model = wake(add_adapters(make("moe"), r=4, alpha=8)[0])
    save_adapters(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    folder = tmp_path / "old"
    folder.mkdir()
    old = as_in_2024(folder, tensors, model)
    loaded, report = load_adapters(make("moe"), folder)
    assert set(report.groups) == {"attention", "experts", "gates"}
    for layer in range(2):  # the reference: the gate's LoRA added by hand
        gate = f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
        with torch.no_grad():
            router = model.get_base_model().model.layers[layer].mlp.router
            router.weight += 2 * old[f"{gate}.lora_B.weight"] @ old[f"{gate}.lora_A.weight"]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    merge_adapters(loaded)


def test_experts_attach_to_the_stock_class(make, wake, phimoe_config, tmp_path):
    """PEFT loads the same adapter there as attention alone, and goes on."""
    model = wake(add_adapters(make("moe"), r=4)[0])
    save_adapters(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        silent = PeftModel.from_pretrained(PhimoeForCausalLM(phimoe_config()), tmp_path / "adapter")
    assert not any("experts" in n and "lora" in n for n, _ in silent.named_parameters())
    loaded, report = load_adapters(PhimoeForCausalLM(phimoe_config()), tmp_path / "adapter")
    assert report.groups["experts"].tensors == 48


def test_damaged_and_foreign_adapters_are_errors(make, wake, tmp_path):
    model = wake(add_adapters(make("dense"), ("attention", "mlp"), r=4)[0])
    folder = save_adapters(model, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(name for name in whole if name.endswith("lora_A.weight"))
    save_file({name: t for name, t in whole.items() if name != first}, file)
    with pytest.raises(ValueError, match="15 adapter tensors do not fill 16 places; without one"):
        load_adapters(make("dense"), folder)
    save_file({**whole, first: whole[first][:, :8].contiguous()}, file)
    with pytest.raises(ValueError, match="of another size"):
        load_adapters(make("dense"), folder)
    with pytest.raises(ValueError, match="16 of 16 adapter tensors have no place"):
        save_file({n.replace("layers.", "layers.1"): t for n, t in whole.items()}, file)
        load_adapters(make("dense"), folder)
    save_file(whole, folder / "other.safetensors")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks .*adapter_model.safetensors"):
        load_adapters(make("dense"), folder)
    dora = get_peft_model(make("dense"), LoraConfig(use_dora=True, target_modules=["o_proj"]))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="not plain LoRA"):
        load_adapters(make("dense"), tmp_path / "dora")


def test_saving_never_leaves_half_a_folder(make, monkeypatch, tmp_path):
    model, _ = add_adapters(make("dense"), "attention", r=4)
    folder = save_adapters(model, tmp_path / "adapter")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_adapters(model, folder)

    def stops(partial, **_):
        (partial / "half").write_text("")
        raise OSError("the disk is full")

    monkeypatch.setattr(model, "save_pretrained", stops)
    with pytest.raises(OSError, match="full"):
        save_adapters(model, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(TypeError, match="no adapters"):
        save_adapters(make("dense"), tmp_path / "none")


def test_merging_is_proven(make, wake, tmp_path):
    """A layer that PEFT merges wrongly is noticed."""
    model = wake(add_adapters(make("dense"), "attention", r=4)[0])
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    true = layer.get_delta_weight
    layer.get_delta_weight = lambda adapter: 0.9 * true(adapter)
    with pytest.raises(RuntimeError, match="Merging changed the logits"):
        merge_adapters(model)
    with pytest.raises(TypeError, match="no adapters to merge"):
        merge_adapters(make("dense"))


def test_the_merged_mixture_is_the_stock_class_bit_for_bit(make, wake, tmp_path):
    model = wake(add_adapters(make("moe"), ALL["moe"], r=4)[0])
    merged, _ = merge_adapters(model)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(stock) is PhimoeForCausalLM
    torch.testing.assert_close(logits(stock), logits(merged), rtol=1e-5, atol=1e-5)
    experts = merged.model.layers[1].mlp.experts
    fused = stock.model.layers[1].mlp.experts
    assert fused.down_proj[2].equal(experts[2].w2.weight)
    assert fused.gate_up_proj[2].equal(torch.cat([experts[2].w1.weight, experts[2].w3.weight]))


def test_merging_into_four_bits_warns(make_moe, tokenizer, tmp_path):
    from cephalo_lite.quantize import load_4bit

    make_moe().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_4bit(tmp_path, dtype=torch.float32, progress=False)[0]
    model, _ = add_adapters(loaded, r=4)
    with pytest.warns(UserWarning, match="rounds every sum to 4 bits again"):
        _, report = merge_adapters(model)
    assert report.quantized


def test_adapters_of_a_mixture_in_bfloat16(make_vision_moe, wake, tmp_path):
    """Saved and loaded bit by bit; merged to within the rounding of bfloat16."""
    groups = ("vision", "projector", "attention", "experts", "gates")
    model = wake(add_adapters(make_vision_moe().bfloat16(), groups, r=4)[0]).eval()
    save_adapters(model, tmp_path / "adapter")
    again, _ = load_adapters(make_vision_moe().bfloat16(), tmp_path / "adapter")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    layer = again.get_base_model().model.layers[1]
    linear, gate = layer.mlp.experts[1].down_proj, layer.mlp.gating_layer.gate
    want = linear.base_layer.weight.float() + linear.get_delta_weight("default").float()
    trained = gate.modules_to_save["default"].weight.clone()
    merged, report = merge_adapters(again)
    assert report.dtype == torch.bfloat16
    layer = merged.model.layers[1]
    weight = layer.mlp.experts[1].down_proj.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), want, rtol=2**-7, atol=2**-8)
    assert layer.mlp.gating_layer.gate.weight.equal(trained)
