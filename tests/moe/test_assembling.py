"""Mixtures of models in memory: sources untouched, what goes where, dtypes, refusals."""

import pytest
import torch

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.moe import routers
from cephalo_lite.moe.build import gates as build_gates

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def storage(model) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_stay_as_they_are(make_small, dtype):
    sources = [make_small(seed).to(dtype) for seed in range(3)]
    states = [{key: t.clone() for key, t in model.state_dict().items()} for model in sources]
    configs = [model.config.to_dict() for model in sources]
    model = Phi3VMoeForCausalLM.from_experts(sources[0], sources, 2)
    assert all(not storage(model) & storage(source) for source in sources)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.generation_config.max_length = 3
    model.config.rms_norm_eps = 1.0
    for source, state, config in zip(sources, states, configs, strict=True):
        now = source.state_dict()
        assert now.keys() == state.keys()
        assert all(now[key].equal(tensor) for key, tensor in state.items())
        assert source.config.to_dict() == config
        assert source.generation_config.max_length != 3
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_what_comes_from_where(make_small):
    base, experts = make_small(0), [make_small(1), make_small(2)]
    model = Phi3VMoeForCausalLM.from_experts(base, experts)
    mixed = model.state_dict()
    for key, tensor in base.state_dict().items():
        if ".mlp." in key and "vision" not in key:
            name = key.removesuffix(".weight").replace(".mlp.", ".mlp.experts.")
            for number, expert in enumerate(experts):
                assert mixed[name][number].equal(expert.state_dict()[key]), key
        else:
            assert mixed[key].equal(tensor), key
    assert all(not parameter.is_meta for parameter in model.parameters())
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert not model.training


def test_gates_are_seeded_and_those_of_build_moe(make_small):
    base = make_small()
    one, same, other = (
        Phi3VMoeForCausalLM.from_experts(base, [base] * 3, seed=seed) for seed in (5, 5, 6)
    )
    built = build_gates.random_gates([0, 1], 3, base.config.hidden_size, 5)
    for layer, router in enumerate(routers(one)):
        assert router.gate.weight.equal(built[layer]["gate.weight"])
        assert router.gate.weight.equal(routers(same)[layer].gate.weight)
        assert not router.gate.weight.equal(routers(other)[layer].gate.weight)
        assert router.gate.bias.eq(0).all()


def test_fields_reach_the_configuration(make_small):
    base = make_small()
    model = Phi3VMoeForCausalLM.from_experts(
        base, [base, base], 2, router="renormalised", moe_layers=[1], expert_names=["a", "b"]
    )
    config = model.config
    assert (config.k, config.router, config.moe_layers) == (2, "renormalised", [1])
    assert config.expert_names == ["a", "b"]
    assert len(routers(model)) == 1
    assert model.model.layers[0].mlp.gate_up_proj.weight.equal(
        base.model.layers[0].mlp.gate_up_proj.weight
    )


def test_tied_embeddings_stay_tied(make_small, text_ids, tmp_path):
    base = make_small(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = Phi3VMoeForCausalLM.from_experts(base, [base, base])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is not base.lm_head.weight
    model.save_pretrained(tmp_path)
    again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(again(text_ids).logits, model(text_ids).logits, **CLOSE)


def test_attention_of_the_base_is_kept(load_golden):
    base = load_golden(attn_implementation="eager")
    model = Phi3VMoeForCausalLM.from_experts(base, [base])
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_one_expert_is_that_model(make_small, text_ids):
    base = make_small()
    model = Phi3VMoeForCausalLM.from_experts(base, [base])
    torch.testing.assert_close(model(text_ids).logits, base(text_ids).logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(make_small):
    base = make_small()
    with pytest.raises(ValueError, match="at least one expert"):
        Phi3VMoeForCausalLM.from_experts(base, [])
    with pytest.raises(ValueError, match=r"Expert 1 has \(80, 32\) for .*layers\.0.*the base \(96"):
        Phi3VMoeForCausalLM.from_experts(base, [base, make_small(intermediate_size=40)])
    with pytest.raises(ValueError, match=r"Expert 0 has nothing for .*layers\.1"):
        Phi3VMoeForCausalLM.from_experts(base, [make_small(num_hidden_layers=1)])
    with pytest.raises(ValueError, match="k=3 experts per token"):
        Phi3VMoeForCausalLM.from_experts(base, [base, base], 3)
