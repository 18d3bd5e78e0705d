"""Adapters: the names of the 2024 recipe, saved and loaded, merged and read by the stock class."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PhimoeForCausalLM

from cephalo_lite.quantize import PreflightError, SequentialPhimoeForCausalLM, preflight

TARGETS = ("q_proj", "w1", "w2", "w3")


@pytest.fixture
def adapter(load, adapt, tmp_path):
    """Folder of an adapter, and the model that wrote it."""
    model = adapt(load("phimoe"), *TARGETS)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def in_old_names(folder, target):
    """The same adapter as a recipe of 2024 saved it."""
    target.mkdir()
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("old", [False, True])
def test_adapters_load_exactly(load, adapter, text_ids, tmp_path, old):
    folder, trained = adapter
    folder = in_old_names(folder, tmp_path / "old") if old else folder
    again = PeftModel.from_pretrained(load("phimoe"), folder, is_trainable=True)
    report = preflight(again, adapters=folder)
    assert report.kinds["adapters"].tensors == 2 * 2 * (1 + 3 * 4)
    for (name, one), (_, two) in zip(
        trained.named_parameters(), again.named_parameters(), strict=True
    ):
        if "lora_" in name:
            assert one.equal(two), name
    with torch.no_grad():
        torch.testing.assert_close(again(text_ids).logits, trained(text_ids).logits)


def test_on_stock_fused_experts_it_loads_without_the_experts(make_folder, adapter, tmp_path):
    """The trap: no error and no tensor of an expert; preflight counts what is not there."""
    old = in_old_names(adapter[0], tmp_path / "old")
    stock = PhimoeForCausalLM.from_pretrained(make_folder("phimoe"))
    loaded = PeftModel.from_pretrained(stock, old, is_trainable=True)
    names = [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert names and not any("experts" in name for name in names)
    with pytest.raises(PreflightError) as told:
        preflight(loaded, adapters=old)
    assert "48 tensors" in str(told.value) and "experts.0.w1.lora_A" in str(told.value)
    assert "target 'w1' matched no layer" in str(told.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_reload_in_the_stock_class_bit_by_bit(
    make_folder, adapter, fuse, text_ids, tmp_path, dtype
):
    base = SequentialPhimoeForCausalLM.from_pretrained(make_folder("phimoe"), dtype=dtype)
    adapted = PeftModel.from_pretrained(base, adapter[0]).eval()
    with torch.no_grad():
        unmerged = adapted(text_ids).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    stock = PhimoeForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    want = fuse(dict(merged.named_parameters()))
    assert stock.state_dict().keys() == want.keys()
    assert all(tensor.equal(want[name]) for name, tensor in stock.state_dict().items())
    if dtype == torch.float32:  # bfloat16 rounds, and tokens at the edge change their experts
        with torch.no_grad():
            off = (stock(text_ids).logits - unmerged).abs().max()
        assert off <= 1e-5 * unmerged.abs().max()
