"""Parameters by group: complete, disjoint, counted, and what freezing does to training."""

import json

import pytest
import torch
from torch import nn

from cephalo_lite import Phi3VConfig, Phi3VForCausalLM, Phi3VMoeConfig, Phi3VMoeForCausalLM
from cephalo_lite.finetune import GROUPS, freeze, parameter_groups, unfreeze


@pytest.fixture
def mixture(make_small) -> Phi3VMoeForCausalLM:
    base = make_small()
    return Phi3VMoeForCausalLM.from_experts(base, [base, make_small(1)], 2)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 340, (2, 16), generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_parameter_is_in_exactly_one_group(mixture, small_model):
    for model in (mixture, small_model):
        groups = parameter_groups(model)
        names = [name for members in groups.values() for name, _ in members]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert list(groups) == [group for group in GROUPS if group in groups]
    assert set(GROUPS) - set(parameter_groups(mixture)) == {"mlp"}
    assert set(GROUPS) - set(parameter_groups(small_model)) == {"experts", "gates"}


def test_what_is_in_each_group(mixture):
    groups = {group: [n for n, _ in m] for group, m in parameter_groups(mixture).items()}
    tower = "model.vision_embed_tokens."
    assert groups["embeddings"] == ["model.embed_tokens.weight"]
    assert groups["head"] == ["lm_head.weight"]
    assert all(name.startswith(f"{tower}img_processor.") for name in groups["vision"])
    assert set(groups["projector"]) == {
        f"{tower}{name}"
        for name in (
            "glb_GN",
            "sub_GN",
            "img_projection.0.weight",
            "img_projection.0.bias",
            "img_projection.2.weight",
            "img_projection.2.bias",
        )
    }
    layers = [f"model.layers.{number}." for number in range(2)]
    for group, names in {
        "attention": ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight"),
        "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "gates": ("mlp.gating_layer.gate.weight", "mlp.gating_layer.gate.bias"),
    }.items():
        assert set(groups[group]) == {layer + name for layer in layers for name in names}
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    norms = {layer + name for layer in layers for name in names}
    assert set(groups["norms"]) == norms | {"model.norm.weight"}


def test_unmixed_layers_of_a_mixture_have_mlps(make_small):
    base = make_small()
    model = Phi3VMoeForCausalLM.from_experts(base, [base, base], moe_layers=[1])
    groups = parameter_groups(model)
    assert {name.split(".")[2] for name, _ in groups["mlp"]} == {"0"}
    assert {name.split(".")[2] for name, _ in groups["experts"]} == {"1"}


def test_released_sizes(golden):
    """Counted from the published keys and shapes, not from the code under test."""
    shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "vocab_size": 32064}
    with torch.device("meta"):
        dense = Phi3VForCausalLM(Phi3VConfig(**shape))
        mixture = Phi3VMoeForCausalLM(Phi3VMoeConfig(**shape, num_expert_models=3))
    report, mixed = unfreeze(dense), freeze(mixture)
    released = json.loads((golden / "real_config_keys.json").read_text())
    assert report.total[0].parameters == released["dense_params"] == 4_146_621_440
    assert report.frozen == {}
    assert report.trainable["mlp"] == (64, 32 * (16384 * 3072 + 3072 * 8192))
    assert report.trainable["head"] == (1, 32064 * 3072)
    assert mixed.trainable == {"gates": (64, 32 * (3072 * 3 + 3))}
    assert mixed.frozen["experts"] == (64, 3 * report.trainable["mlp"].parameters)


def test_only_what_is_left_out_of_freezing_is_trained(mixture, ids):
    report = freeze(mixture, except_groups=("gates", "norms"))
    assert trained(mixture) == {
        name for group in ("gates", "norms") for name, _ in parameter_groups(mixture)[group]
    }
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    mixture(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    changed = {name for name, p in mixture.named_parameters() if not p.equal(before[name])}
    assert changed == trained(mixture)
    assert report.trainable["norms"] == (5, 5 * 32)
    assert report.trainable["gates"] == (4, 2 * (2 * 32 + 2))
    assert set(report.trainable) == {"gates", "norms"}
    both = [part.parameters for part in report.total]
    assert sum(both) == sum(p.numel() for p in mixture.parameters())


def test_freezing_again_names_the_groups_anew(mixture):
    freeze(mixture, except_groups="experts")  # one name, as text
    assert all(".experts." in name for name in trained(mixture))
    assert freeze(mixture).trainable.keys() == {"gates"}
    assert all(".gating_layer." in name for name in trained(mixture))
    assert freeze(mixture, except_groups=()).trainable == {}
    assert not trained(mixture)
    assert unfreeze(mixture, ["head"]).trainable.keys() == {"head"}
    assert unfreeze(mixture, ["gates"]).trainable.keys() == {"head", "gates"}
    assert unfreeze(mixture).frozen == {}


@pytest.mark.parametrize("call", [freeze, unfreeze])
def test_unknown_and_empty_groups_raise_and_change_nothing(mixture, small_model, call):
    before = trained(mixture)
    with pytest.raises(ValueError, match="No group is called 'gate'; groups are vision, projector"):
        call(mixture, ["head", "gate"])
    with pytest.raises(ValueError, match="nothing in group 'mlp'; it has vision, .*experts"):
        call(mixture, ["mlp"])
    assert trained(mixture) == before
    with pytest.raises(ValueError, match="nothing in group 'gates'"):
        call(small_model, ["gates"])


def test_a_tied_head_is_in_the_embeddings(make_small):
    model = make_small(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tied to the embeddings"):
        freeze(model, ["head"])
    freeze(model, ["embeddings"])
    assert model.lm_head.weight.requires_grad


def test_adapters_are_in_the_group_of_what_they_adapt(mixture):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["qkv_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    groups = parameter_groups(peft.get_peft_model(mixture, config))
    lora = {g: [n for n, _ in m if "lora_" in n] for g, m in groups.items()}
    assert {group for group, names in lora.items() if names} == {"attention", "experts"}
    assert len(lora["attention"]) == len(lora["experts"]) == 4


def test_the_text_mixture_of_transformers_has_the_same_groups():
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        groups = parameter_groups(PhimoeForCausalLM(config))
    assert list(groups) == ["embeddings", "attention", "norms", "experts", "gates", "head"]
    assert [name for name, _ in groups["gates"]] == [
        f"model.layers.{number}.mlp.router.weight" for number in range(2)
    ]


def test_quantized_weights_cannot_be_trained(mixture):
    layer = mixture.model.layers[0].self_attn.o_proj
    layer.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized weights, such as .*o_proj.weight"):
        freeze(mixture, ["attention"])
    report = unfreeze(mixture)
    assert report.frozen == {"attention": (1, 64)}


def test_a_stranger_is_named(small_model):
    small = nn.ModuleDict({"lm_head": small_model.lm_head, "extra": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"extra\.weight belongs to none of the groups"):
        parameter_groups(small)


def test_table(mixture):
    lines = freeze(mixture).table().splitlines()
    assert lines[0].split() == ["group", "trainable", "tensors", "frozen", "tensors"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["gates"] == ["132", "4", "0", "0"]
    assert cells["head"] == ["0", "0", f"{384 * 32:,}", "1"]
    assert list(cells) == [group for group in GROUPS if group != "mlp"] + ["all"]
    assert len({len(line) for line in lines}) == 1
