"""The routers' losses and records, against sums by hand."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.finetune import RouterRecord, RouterWatch, add_adapters
from cephalo_lite.finetune.router_watch import by_depth
from cephalo_lite.moe import routers


@pytest.fixture
def mixture(make_small):
    model = Phi3VMoeForCausalLM.from_experts(make_small(), [make_small(1), make_small(2)], 1)
    with torch.no_grad():
        for router in routers(model):
            router.gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    return model


@pytest.fixture
def batch():
    ids = torch.randint(3, 350, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def watched(model, batch):
    watch = RouterWatch(model)
    with watch.watching():
        out = model(**batch, output_router_logits=True)
    return watch, out, watch.losses(batch["attention_mask"])


def test_losses_are_those_of_the_papers_per_layer_without_padding(mixture, batch):
    watch, out, (balance, z) = watched(mixture, batch)
    keep = batch["attention_mask"].flatten().bool()
    layers = [logits[keep].float() for logits in out.router_logits]
    want = [load_balancing_loss_func((logits,), 2, 1) for logits in layers]  # of one layer each
    torch.testing.assert_close(balance, torch.stack(want).mean(), rtol=1e-5, atol=1e-6)
    by_hand = torch.stack([logits.exp().sum(dim=1).log().pow(2).mean() for logits in layers])
    torch.testing.assert_close(z, by_hand.mean(), rtol=1e-5, atol=1e-6)
    seen = watch.read()
    assert seen["layers"] == [0, 1] and watch.read() is None
    for layer, logits in enumerate(layers):
        share = (logits.argmax(dim=1) == 1).float().mean().item()
        assert seen["load"][layer] == pytest.approx([1 - share, share], abs=1e-4)
        p = logits.softmax(dim=1)
        entropy = -(p * p.log()).sum(dim=1).mean().item() / math.log(2)
        assert seen["entropy"][layer] == pytest.approx(entropy, abs=1e-4)


def test_of_all_layers_together_one_sided_layers_look_balanced(mixture, batch):
    """Why per layer: each layer uses one expert alone, the one that the other does not use."""
    with torch.no_grad():
        for number, router in enumerate(routers(mixture)):
            router.gate.weight.zero_()
            router.gate.bias.copy_(torch.tensor([9.0, -9.0]) * (-1) ** number)
    watch, out, (balance, _) = watched(mixture, batch)
    together = load_balancing_loss_func(out.router_logits, 2, 1, batch["attention_mask"])
    assert together.item() == pytest.approx(1, abs=1e-3)
    assert balance.item() == pytest.approx(2, abs=1e-3)
    record = RouterRecord(1, **watch.read())
    assert record.dead == [(0, 1), (1, 0)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_gates_and_are_the_same_with_checkpointing(
    mixture, batch, checkpointing
):
    gates = [router.gate.weight for router in routers(mixture)]
    _, _, (balance, z) = watched(mixture, batch)
    want = torch.autograd.grad(balance + z, gates)
    if checkpointing:
        mixture.gradient_checkpointing_enable()
        mixture.enable_input_require_grads()
    mixture.train()
    watch, out, (balance, z) = watched(mixture, batch)
    (balance + z + 0 * out.logits.sum()).backward()
    for gate, gradient in zip(gates, want, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gate.grad, gradient, rtol=1e-4, atol=1e-6)
    assert not watch._seen  # nothing more is kept while going backward, and no hook stays
    hooks = [len(router._forward_hooks) for router in routers(mixture)]
    watched(mixture, batch)
    assert [len(router._forward_hooks) for router in routers(mixture)] == hooks


def test_routers_of_phi35_moe_and_copies_that_are_trained(make_moe, batch):
    model, _ = add_adapters(make_moe(), ("attention", "router"), r=2)
    watch, out, _ = watched(model, {key: value.clamp(max=300) for key, value in batch.items()})
    seen = watch.read()
    assert watch.layers == [0, 1] and len(seen["load"][0]) == 4
    assert [sum(row) for row in seen["load"]] == pytest.approx([1, 1], abs=1e-4)


def test_numbers_to_log_by_depth():
    seen = {
        "layers": [0, 1, 2, 3], "load": [[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.5, 0.5]],
        "entropy": [0.0, 1.0, 0.5, 0.7], "balance": [2.0, 1.0, 1.0, 1.0], "z": [1.0] * 4,
    }  # fmt: skip
    numbers = by_depth(seen)
    assert {name.split("/")[1] for name in numbers} == {"first", "middle", "last"}
    assert numbers["router/first/dead"] == 1 and numbers["router/first/max_load"] == 1.0
    assert numbers["router/middle/entropy"] == pytest.approx(0.75)
    two = {name: value[:2] for name, value in seen.items()}
    assert {name.split("/")[1] for name in by_depth(two)} == {"first", "last"}
