"""Adapters by group: what is matched, on every model, and that nothing is missed in silence."""

import peft
import pytest
import torch
from transformers import PhimoeForCausalLM

from cephalo_lite.finetune import add_adapters, parameter_groups
from cephalo_lite.finetune.adapters import is_adapter
from cephalo_lite.finetune.merging import random_probe
from cephalo_lite.quantize import SequentialPhimoeForCausalLM

D, F, KV, R = 32, 16, 16, 4  # hidden, an expert's inner width, keys and values, rank


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_phi35_mini_is_adapted_under_its_fused_names(make_dense):
    model, report = add_adapters(make_dense(), ("attention", "mlp"), r=R)
    wide = D + 2 * KV
    sizes = {"attention": (D + wide) + (D + D), "mlp": (D + 2 * 48) + (48 + D)}
    assert report.groups == {name: (4, 8, 2 * R * size) for name, size in sizes.items()}
    names = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert model.active_peft_config.target_modules == names
    assert all(is_adapter(name) for name in trained(model))


def test_the_recipes_list_of_2024_matches_a_third_and_says_nothing(make_dense):
    """Why groups: the seven names of the recipe, on PEFT as it is."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    old = peft.get_peft_model(make_dense(), peft.LoraConfig(r=R, target_modules=names))
    _, report = add_adapters(make_dense(), ("attention", "mlp"), r=R)
    reached = sum(p.numel() for n, p in old.named_parameters() if p.requires_grad)
    assert reached < 0.5 * report.total.parameters
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in trained(old))


def test_phi35_moe_gets_adapters_on_every_expert(make_moe):
    model, report = add_adapters(make_moe(), r=R)
    assert report.groups["experts"] == (2 * 4 * 3, 2 * 4 * 6, 2 * 4 * 3 * R * (D + F))
    assert report.groups["attention"].modules == 2 * 4
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    assert model.active_peft_config.target_modules == names
    assert report.model_parameters == sum(p.numel() for p in make_moe().parameters())


@pytest.mark.parametrize("name", ["router", "gates"])
def test_gates_are_trained_whole_where_they_are_named(make_moe, name):
    model, report = add_adapters(make_moe(), ("attention", name), r=R)
    assert report.groups["gates"] == (2, 2, 2 * 4 * D)
    gates = [n for n in trained(model) if "router" in n]
    assert len(gates) == 2 and all(".modules_to_save.default.weight" in n for n in gates)
    assert not add_adapters(make_moe(), ("attention",))[1].groups.keys() - {"attention"}


def test_every_group_of_a_vision_mixture(make_vision_moe):
    groups = ("vision", "projector", "attention", "experts", "gates")
    model, report = add_adapters(make_vision_moe(), groups, r=R)
    assert set(report.groups) == set(groups)
    assert report.groups["experts"].modules == 2 * 2 * 2
    assert report.groups["projector"].modules == 2
    assert report.groups["gates"] == (2, 4, 2 * 2 * (D + 1))
    model.train()
    inputs = random_probe(model.get_base_model())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learnt = {group: 0.0 for group in groups}
    for group, members in parameter_groups(model).items():
        for _, parameter in members:
            if parameter.requires_grad and parameter.grad is not None:
                learnt[group] += parameter.grad.abs().sum().item()
    assert all(learnt.values()), learnt


def test_only_the_groups_that_are_named_have_adapters(make_vision_moe):
    """The tower has an attention and MLPs as well; short names must not reach into it."""
    for groups in (["projector"], ["attention"], ["vision"], ["experts"]):
        model, report = add_adapters(make_vision_moe(), groups, r=R)
        assert list(report.groups) == groups
        found = {g for g, m in parameter_groups(model).items() if any(is_adapter(n) for n, _ in m)}
        assert found == set(groups)


def test_a_group_without_a_match_is_an_error_and_changes_nothing(make_dense, make_moe):
    dense = make_dense()
    before = trained(dense)
    with pytest.raises(ValueError, match="nothing in group 'experts'; it has attention, mlp"):
        add_adapters(dense)
    with pytest.raises(ValueError, match="'expert' is no group; choose from vision, projector"):
        add_adapters(dense, ("attention", "expert"))
    with pytest.raises(ValueError, match="'head' cannot have adapters"):
        add_adapters(dense, "head")
    with pytest.raises(ValueError, match="besides the gates"):
        add_adapters(make_moe(), "gates")
    assert trained(dense) == before
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(add_adapters(dense, "attention")[0], "mlp")


def test_fused_experts_are_taken_apart(phimoe_config):
    """PEFT on the stock class drops the recipe's w1, w2, w3 without a word."""
    stock = PhimoeForCausalLM(phimoe_config())
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
    old = peft.get_peft_model(stock, peft.LoraConfig(r=R, target_modules=names))
    assert not any("experts" in name for name in trained(old))
    model, report = add_adapters(PhimoeForCausalLM(phimoe_config()), r=R)
    assert report.groups["experts"].modules == 2 * 4 * 3
    assert type(model.get_base_model()) is SequentialPhimoeForCausalLM


def test_the_same_seed_makes_the_same_adapters(make_dense):
    states = []
    for seed in (5, 5, 6):
        model, _ = add_adapters(make_dense(), "attention", r=R, seed=seed)
        torch.rand(3)
        states.append(model.state_dict())
    lora = [name for name in states[0] if "lora_A" in name]
    assert all(states[0][name].equal(states[1][name]) for name in lora)
    assert not any(states[0][name].equal(states[2][name]) for name in lora)


def test_table(make_moe):
    _, report = add_adapters(make_moe(), ("attention", "experts", "router"), r=R)
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["group", "attention", "experts", "gates", "all"]
    assert lines[-1].split()[3] == f"{report.total.parameters:,}"
    assert len({len(line) for line in lines}) == 1
