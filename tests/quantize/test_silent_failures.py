"""What goes wrong without a word in the stock path, reproduced; there loud, on ours impossible."""

import warnings

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Phi3ForCausalLM, PhimoeForCausalLM

from cephalo_lite.quantize import PreflightError, nf4_config, preflight, stored_bytes

RECIPE = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


@pytest.fixture
def stock(make_folder):
    """A function that loads Phi-3.5-MoE as the recipe of 2024 does."""

    def load(dtype=torch.bfloat16, **options):
        return PhimoeForCausalLM.from_pretrained(
            make_folder("phimoe", dtype), dtype=dtype, device_map={"": "cpu"}, **options
        )

    return load


def test_load_in_4bit_leaves_the_experts_as_they_were(stock, load, adapt):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = stock(quantization_config=nf4_config(torch.bfloat16))
    assert model.is_loaded_in_4bit
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    with pytest.raises(PreflightError) as told:
        preflight(adapt(model, "q_proj"))
    message = str(told.value)
    assert "of the weights that belong in 4 bits are not quantised" in message
    assert "experts.gate_up_proj (bfloat16, 0.131 MB)" in message
    assert "0.393 MB in all" in message and "load_4bit" in message
    ours = load("phimoe", torch.bfloat16)
    assert preflight(adapt(ours, *RECIPE)).kinds["4 bits"].tensors == 2 * (4 + 4 * 3)
    assert stored_bytes(load("phimoe", torch.bfloat16)) < 0.7 * stored_bytes(model)


def test_preparing_for_kbit_training_casts_up(stock, load, adapt):
    model = stock(quantization_config=nf4_config(torch.bfloat16))
    before = stored_bytes(model)
    prepare_model_for_kbit_training(model)
    assert stored_bytes(model) > 1.7 * before
    ours = prepare_model_for_kbit_training(load("phimoe", torch.bfloat16))
    with pytest.raises(PreflightError, match=r"cast up from bfloat16: .* \(float32, .*MB\)"):
        preflight(adapt(ours, *RECIPE))


def test_the_recipes_targets_match_no_expert(stock, load, adapt):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(stock(torch.float32), LoraConfig(target_modules=list(RECIPE)))
    assert not any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(PreflightError) as told:
        preflight(model)
    for target in ("w1", "w2", "w3"):
        assert f"the target {target!r} matched no layer" in str(told.value)
    report = preflight(adapt(load(), *RECIPE))
    assert report.targets == {**dict.fromkeys(RECIPE[:4], 2), **dict.fromkeys(RECIPE[4:], 2 * 4)}


def test_the_mini_recipe_matches_two_of_seven(load, adapt):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = adapt(load("phi3"), *names)  # PEFT says nothing
    with pytest.raises(PreflightError) as told:
        preflight(model)
    missed = [name for name in names if f"target {name!r}" in str(told.value)]
    assert missed == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert "down_proj, gate_up_proj, o_proj, qkv_proj" in str(told.value)
    fused = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert preflight(adapt(load("phi3"), *fused)).targets == dict.fromkeys(sorted(fused), 2)


def test_nothing_to_train(load, adapt):
    with pytest.raises(PreflightError, match="nothing is trainable"):
        preflight(load())
    model = adapt(load(), "w1")
    model.requires_grad_(False)
    with pytest.raises(PreflightError, match="nothing is trainable"):
        preflight(model)


def test_a_model_that_is_not_quantised_at_all(make_folder):
    model = Phi3ForCausalLM.from_pretrained(make_folder("phi3"))
    with pytest.raises(PreflightError, match=r"100\.0% of the weights that belong in 4 bits"):
        preflight(model)


@pytest.fixture
def parametrised(stock):
    """The library route: bitsandbytes' 4-bit parameters and PEFT's `target_parameters`."""
    model = stock(torch.float32).requires_grad_(False)
    names = []
    for number, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, True, "nf4")
            names.append(f"model.layers.{number}.mlp.experts.{name}")
    config = LoraConfig(r=4, target_modules=[], target_parameters=names)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def test_the_library_route_trains_half_and_then_fails(parametrised, load, adapt, text_ids):
    model = parametrised.eval()
    model(text_ids).logits.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert trained and len(without) >= len(trained)
    with pytest.raises(RuntimeError):
        model(text_ids).logits.sum().backward()
    ours = adapt(load(), "w1", "w2", "w3")
    for _ in range(2):
        ours.zero_grad()
        ours(text_ids).logits.sum().backward()
    grads = [p.grad for n, p in ours.named_parameters() if p.requires_grad]
    assert sum(g is not None and bool(g.abs().max() > 0) for g in grads) > len(grads) / 2


@torch.no_grad()
def test_the_library_route_drifts_and_does_not_merge(parametrised, load, adapt, text_ids):
    model = parametrised.eval()
    first, _, third = (model(text_ids).logits for _ in range(3))
    assert (third - first).norm() > 0.01 * first.norm()
    base = model.get_base_model().model.layers[0].mlp.experts
    packed = [p.clone() for n, p in base.named_parameters() if "lora_" not in n]
    merged = model.merge_and_unload().model.layers[0].mlp.experts
    after = [p for n, p in merged.named_parameters() if "lora_" not in n]
    assert all(one.equal(two) for one, two in zip(packed, after, strict=True))
    ours = adapt(load(), "w1", "w2", "w3")
    first, _, third = (ours(text_ids).logits for _ in range(3))
    torch.testing.assert_close(third, first)
    before = ours.get_base_model().model.layers[0].mlp.experts[0].w1.base_layer.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that merging into 4 bits rounds
        weight = ours.merge_and_unload().model.layers[0].mlp.experts[0].w1.weight
    assert not weight.data.equal(before.data)


def test_the_library_route_cannot_be_saved(parametrised, load, tmp_path):
    merged = parametrised.eval().merge_and_unload()
    with pytest.raises((ValueError, NotImplementedError)):
        merged.save_pretrained(tmp_path / "stock")
    load().save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()
