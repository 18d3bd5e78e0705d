"""Phi3VMoeConfig: published names, transformers' names, values that cannot be."""

import pytest

from cephalo_lite import Phi3VConfig, Phi3VMoeConfig

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "pad_token_id": 0,
}


def test_published_names_and_those_of_transformers():
    config = Phi3VMoeConfig(**SMALL, k=2, num_expert_models=5)
    assert config.num_experts_per_tok == 2
    assert config.num_experts == config.num_local_experts == 5
    assert Phi3VMoeConfig(**SMALL, num_experts_per_tok=2, num_experts=4).num_expert_models == 4
    saved = config.to_dict()
    assert (saved["k"], saved["num_expert_models"]) == (2, 5)
    assert not saved.keys() & {"num_experts", "num_local_experts", "num_experts_per_tok"}


def test_defaults_are_the_published_ones():
    config = Phi3VMoeConfig(**SMALL)
    assert (config.k, config.num_expert_models, config.router) == (1, 2, "cephalo")
    assert config.use_embeddings_in_router is False
    assert config.mixed_layers == [0, 1]
    assert config.expert_names == ["expert 0", "expert 1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 3, "num_expert_models": 2}, "k=3 experts per token, but num_expert_models=2"),
        ({"k": 0}, "1 <= k"),
        ({"router": "best"}, "router='best' is not one of cephalo, renormalised"),
        ({"moe_layers": [0, 2]}, r"moe_layers \[2\]: the model has layers 0\.\.1"),
        ({"moe_layers": [-1]}, r"moe_layers \[-1\]"),
        ({"moe_layers": []}, "moe_layers is empty"),
        ({"expert_names": ["one"]}, "1 expert_names for 2 experts"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Phi3VMoeConfig(**SMALL, **fields)


def test_survives_saving(tmp_path):
    config = Phi3VMoeConfig(
        **SMALL, k=2, num_expert_models=3, moe_layers=[1], router="renormalised",
        expert_names=["materials", "general", "LaTeX"], router_aux_loss_coef=0.01,
    )  # fmt: skip
    assert config.output_router_logits
    config.save_pretrained(tmp_path)
    again = Phi3VMoeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.mixed_layers == [1]


def test_from_dense_keeps_everything_else():
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    dense = Phi3VConfig(
        **SMALL, rope_scaling={"type": "su", **factors}, rope_theta=5e4, sliding_window=77,
        max_position_embeddings=512, original_max_position_embeddings=256, embd_pdrop=0.25,
    )  # fmt: skip
    before = dense.to_dict()
    config = Phi3VMoeConfig.from_dense(dense, 3, 2, router="renormalised")
    assert (config.k, config.num_expert_models, config.model_type) == (2, 3, "phi3_v_moe")
    own = {"model_type", "architectures", "transformers_version"}
    mixed = config.to_dict()
    assert {key for key in before.keys() - own if mixed.get(key) != before[key]} == set()
    assert dense.to_dict() == before
    config.rope_parameters["short_factor"][0] = 9.0
    assert dense.to_dict() == before  # nothing is shared
