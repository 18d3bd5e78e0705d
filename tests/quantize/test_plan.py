"""The plan: its figures for the released size, and what is really allocated at small size."""

import bitsandbytes
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PhimoeConfig

from benchmarks.common import peak_over
from cephalo_lite.quantize import memory_plan, nf4_bytes, stored_bytes

TARGETS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phimoe": ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"),
    "phi3_v": ("attention", "mlp"),
    "phi3_v_moe": ("attention", "experts"),
}


@pytest.fixture(scope="module")
def released() -> PhimoeConfig:
    """Phi-3.5-MoE as released."""
    return PhimoeConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=6400,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=16,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
    )


def test_the_released_size(released):
    plan = memory_plan(released, card_gb=(24, 32, 48), rank=(8, 16))
    small, large = plan.rows
    assert round(large.weights / 1e9, 1) == 22.0
    assert round(large.trainable / 1e6, 1) == 271.6
    assert large.total == pytest.approx(25.0e9, rel=0.01)
    assert small.verdicts[24] == "fits"
    assert large.verdicts[24].startswith("does not, because 0.") and "weights" in large.verdicts[24]
    assert plan.fits(32) == plan.rows and plan.fits(24) == [small]
    assert "fits 32, 48 GiB" in str(plan) and "24 GiB does not, because" in str(plan)


def test_more_of_anything_takes_more(released):
    one = memory_plan(released, rank=8).rows[0]
    for more in ({"rank": 16}, {"rank": 8, "sequence": 1024}, {"rank": 8, "batch": 4}):
        assert memory_plan(released, **{"rank": 8} | more).rows[0].total > one.total
    attention = memory_plan(released, rank=8, targets=("attention",)).rows[0]
    assert attention.adapters < 0.1 * one.adapters and attention.weights == one.weights


def test_bytes_per_weight():
    assert nf4_bytes(4096 * 6400) / (4096 * 6400) == pytest.approx(0.51587, rel=1e-4)


@pytest.mark.parametrize("kind", TARGETS)
def test_weights_adapters_and_optimiser_are_what_is_allocated(
    load, adapt, make_folder, text_ids, kind
):
    model = load(kind, torch.bfloat16)
    weights = stored_bytes(model)
    row = memory_plan(model.config, rank=4, targets=TARGETS[kind]).rows[0]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert abs(row.weights - (weights - buffers)) <= 0.01 * weights
    names = {"attention": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}
    names["experts"] = names["mlp"]
    layers = [name for target in TARGETS[kind] for name in names.get(target, (target,))]
    model = adapt(model, *layers)
    learnt = [p.data for p in model.parameters() if p.requires_grad]
    assert row.trainable == sum(p.numel() for p in learnt)
    assert row.adapters == row.gradients == sum(2 * p.numel() for p in learnt)
    learnt = [torch.nn.Parameter(p) for p in learnt]
    optimiser = bitsandbytes.optim.AdamW8bit(learnt)
    for parameter in learnt:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = [s for state in optimiser.state.values() for n, s in state.items() if "qmap" not in n]
    held = sum(s.nbytes for s in states if isinstance(s, torch.Tensor))
    assert row.optimiser == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_a_training_step_peaks_where_the_plan_says(load, adapt, kind):
    """Gradients and activations of one step with checkpointing, as the allocator sees them."""
    model = load(kind, torch.bfloat16)
    model = adapt(model, *TARGETS[kind], lora_dropout=0.05).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 340, (2, 128), generator=torch.Generator().manual_seed(2))

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()

    step()
    model.zero_grad()
    peak = peak_over(step)
    row = memory_plan(model.config, rank=4, targets=TARGETS[kind], sequence=128, batch=2).rows[0]
    resident = row.weights + row.adapters
    planned = resident + row.gradients + row.activations
    assert planned == pytest.approx(resident + peak, rel=0.1)


def test_a_target_that_matches_nothing(released):
    with pytest.raises(ValueError, match="'gate_proj' matches no layer .*k_proj, o_proj"):
        memory_plan(released, targets=("q_proj", "gate_proj"))


def test_another_kind_of_model(make_folder):
    with pytest.raises(ValueError, match="for phi3, phimoe, phi3_v, phi3_v_moe, not for llama"):
        memory_plan(LlamaConfig())
    config = AutoConfig.from_pretrained(make_folder("phi3"))
    assert memory_plan(config, targets=("attention", "mlp")).rows
