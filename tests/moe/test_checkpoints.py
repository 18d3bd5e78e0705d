"""The published Cephalo layout: read, written, and the two heads kept apart."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import revert_weight_conversion

from cephalo_lite import Phi3VMoeConfig, Phi3VMoeForCausalLM
from cephalo_lite.moe.checkpoints import InnerHead, register_published_names

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

DEAD_HEAD = "lm_head.weight"


def expand(listed: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes, with one key for each number of a range such as {0..31}."""
    keys = {}
    for pattern, shape in listed.items():
        first, last = (int(n) for n in (re.findall(r"\{(\d+)\.\.(\d+)\}", pattern) or ["00"])[0])
        for number in range(first, last + 1):
            keys[re.sub(r"\{.*\}", str(number), pattern)] = tuple(shape)
    return keys


@pytest.mark.parametrize("k", [1, 2])
def test_round_trip_is_bit_equal(golden_mixture, golden_moe, read_weights, moe_folder, tmp_path, k):
    golden_mixture(k).save_pretrained(tmp_path)
    written = read_weights(tmp_path)
    assert written.keys() == golden_moe.keys() - {DEAD_HEAD}
    assert all(tensor.equal(golden_moe[key]) for key, tensor in written.items())
    published = json.loads((moe_folder(k) / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    own = {"architectures", "auto_map", "torch_dtype", "transformers_version"}
    changed = {key for key in published.keys() - own if ours.get(key) != published[key]}
    assert not changed


def test_what_is_saved_loads_by_the_auto_classes(golden_mixture, text_ids, tmp_path):
    golden_mixture(2).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Phi3VMoeConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(tmp_path)
        assert type(model) is Phi3VMoeForCausalLM
        with torch.no_grad():
            torch.testing.assert_close(
                model(text_ids).logits, golden_mixture(2)(text_ids).logits, **CLOSE
            )


def test_the_dead_head_is_dropped(golden_mixture, golden_moe):
    model = golden_mixture(1)
    assert model.lm_head.weight.equal(golden_moe["model.lm_head.weight"])
    assert not model.lm_head.weight.equal(golden_moe[DEAD_HEAD])


def test_without_our_mapping_the_heads_are_swapped(load_moe, golden_mixture, golden_moe, text_ids):
    """The trap: transformers' own rules take the dead random head and complain about nothing."""

    def is_ours(entry) -> bool:
        return any(isinstance(one, InnerHead) for one in getattr(entry, "operations", ()))

    mapping = get_checkpoint_conversion_mapping("phi3_v_moe")
    without = [entry for entry in mapping if not is_ours(entry)]
    assert len(without) == len(mapping) - 1
    try:
        register_checkpoint_conversion_mapping("phi3_v_moe", without, overwrite=True)
        swapped, info = load_moe(1, strict=False, output_loading_info=True)
    finally:
        register_published_names()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert swapped.lm_head.weight.equal(golden_moe[DEAD_HEAD])
    with torch.no_grad():
        off = swapped(text_ids).logits - golden_mixture(1)(text_ids).logits
        assert off.abs().max() > 1
        torch.testing.assert_close(
            load_moe(1)(text_ids).logits, golden_mixture(1)(text_ids).logits, **CLOSE
        )


def test_from_experts_writes_the_published_names(make_mixture, golden_moe, text_ids, tmp_path):
    model = make_mixture(experts=2)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    layer = "model.model.layers.1.mlp."
    assert {key for key in written if key.startswith(layer)} == {
        f"{layer}experts.{expert}.{name}.weight"
        for expert in range(2)
        for name in ("gate_up_proj", "down_proj")
    } | {f"{layer}gating_layer.gate.weight", f"{layer}gating_layer.gate.bias"}
    assert {key for key in written if "layers" not in key} == {
        key for key in golden_moe if "layers" not in key and key != DEAD_HEAD
    }
    again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
    for (name, one), (other, two) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other and one.equal(two), name
    with torch.no_grad():
        torch.testing.assert_close(again(text_ids).logits, model(text_ids).logits, **CLOSE)


def test_only_some_layers_are_mixed(make_mixture, text_ids, tmp_path):
    model = make_mixture(moe_layers=[1])
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert "model.model.layers.0.mlp.gate_up_proj.weight" in written
    assert "model.model.layers.1.mlp.experts.2.gate_up_proj.weight" in written
    assert not any("layers.0.mlp.experts" in key for key in written)
    again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
    assert again.config.mixed_layers == [1]
    with torch.no_grad():
        out = again(text_ids, output_router_logits=True)
        torch.testing.assert_close(out.logits, model(text_ids).logits, **CLOSE)
    assert len(out.router_logits) == 1


def test_sharded_round_trip(golden_mixture, golden_moe, read_weights, text_ids, load_moe, tmp_path):
    golden_mixture(1).save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    written = read_weights(tmp_path)
    assert written.keys() == golden_moe.keys() - {DEAD_HEAD}
    assert all(tensor.equal(golden_moe[key]) for key, tensor in written.items())
    with torch.no_grad():
        again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(
            again(text_ids).logits, golden_mixture(1)(text_ids).logits, **CLOSE
        )


def test_published_weights_may_carry_the_shared_embedding(
    golden_moe, text_ids, golden_mixture, tmp_path
):
    """Older files hold `wte`, which is `embed_tokens` once more."""
    golden_mixture(1).save_pretrained(tmp_path)
    prefix = "model.model."
    extra = {f"{prefix}vision_embed_tokens.wte.weight": golden_moe[f"{prefix}embed_tokens.weight"]}
    extra = {key: tensor.clone() for key, tensor in extra.items()}
    save_file(golden_moe | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            again(text_ids).logits, golden_mixture(1)(text_ids).logits, **CLOSE
        )


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model.model.layers.1.mlp.experts.2.down_proj.weight", "experts.down_proj"),
        ("model.model.layers.0.mlp.gating_layer.gate.bias", "gating_layer.gate.bias"),
        ("model.model.norm.weight", "norm.weight"),
    ],
)
def test_a_missing_weight_is_an_error(golden_mixture, golden_moe, tmp_path, drop, message):
    golden_mixture(1).save_pretrained(tmp_path)
    left = {key: tensor for key, tensor in golden_moe.items() if key != drop}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Phi3VMoeForCausalLM.from_pretrained(tmp_path)


def test_a_config_with_another_number_of_experts_is_an_error(golden_mixture, tmp_path):
    golden_mixture(1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = {"num_expert_models": 4, "expert_names": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match="experts"):
        Phi3VMoeForCausalLM.from_pretrained(tmp_path)


def test_keys_and_shapes_at_released_size(golden):
    released = json.loads((golden / "real_config_keys.json").read_text())
    published = expand(released["moe_3x"])
    assert len(published) == 786
    dead = published.pop(DEAD_HEAD)
    published = {key: shape for key, shape in published.items() if ".wte." not in key}
    config = Phi3VMoeConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        num_expert_models=3,
    )
    with torch.device("meta"):
        model = Phi3VMoeForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == released["moe_3x_params"] - math.prod(dead) == 8_978_754_656
    written = revert_weight_conversion(model, model.state_dict())
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == published
