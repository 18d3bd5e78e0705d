"""Routers: weights, the straight-through gradient, selecting an expert, the load-balance loss."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.moe import ROUTERS, routers, select_expert

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

NAMES = sorted(ROUTERS)


def make_router(name: str, k: int, experts: int = 3, width: int = 5):
    router = ROUTERS[name](SimpleNamespace(k=k, hidden_size=width, num_expert_models=experts))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router, torch.randn(7, width, generator=generator)


def test_weights_of_each_router():
    """Probabilities 0.5, 0.3, 0.2 and two experts: softmax(0.5, 0.3), or 5/8 and 3/8."""
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log()
    for name, want in {
        "cephalo": torch.tensor([0.5, 0.3]).softmax(0),
        "renormalised": torch.tensor([0.625, 0.375]),
    }.items():
        router, _ = make_router(name, k=2, width=3)
        with torch.no_grad():
            router.gate.weight.copy_(torch.eye(3))
            router.gate.bias.zero_()
            out = router(logits)
        assert out.chosen.tolist() == [[1, 0]]
        torch.testing.assert_close(out.probs, torch.tensor([[0.3, 0.5, 0.2]]))
        torch.testing.assert_close(out.weights[0], want)


@pytest.mark.parametrize("name", NAMES)
def test_weights_sum_to_one_and_probabilities_are_float32(name):
    router, hidden = make_router(name, k=2)
    out = router.bfloat16()(hidden.bfloat16())
    assert out.logits.dtype == torch.bfloat16 and out.probs.dtype == torch.float32
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(7))
    assert out.chosen.shape == (7, 2) and out.logits.shape == (7, 3)


@pytest.mark.parametrize("name", NAMES)
def test_straight_through_gives_the_gradient_of_the_chosen_probability(name):
    """By hand: d p_c / d logit_e = p_c (1{e = c} - p_e), and a logit's derivative is the token."""
    router, hidden = make_router(name, k=1)
    factors = torch.linspace(-1, 2, 7)  # how much the loss wants of each token's weight
    out = router(hidden)
    assert out.weights.eq(1).all()  # forward nothing changes
    (out.weights[:, 0] * factors).sum().backward()
    probs, chosen = out.probs.detach(), out.chosen[:, 0]
    picked = probs.gather(1, chosen[:, None])  # (N, 1)
    by_logit = factors[:, None] * picked * (torch.nn.functional.one_hot(chosen, 3) - probs)
    torch.testing.assert_close(router.gate.weight.grad, by_logit.T @ hidden)
    torch.testing.assert_close(router.gate.bias.grad, by_logit.sum(0))
    assert router.gate.weight.grad.abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_without_straight_through_one_expert_teaches_the_gate_nothing(name):
    router, hidden = make_router(name, k=1)
    router.straight_through = False
    router(hidden).weights.square().sum().backward()
    assert router.gate.weight.grad.abs().max() <= 1e-7  # what rounding leaves of v / v


def test_gate_gradients_in_the_model_and_a_step_that_helps(make_mixture, text_ids):
    """k=1: with the 2024 weighting exactly zero; straight through it is not, and a step helps."""

    def loss_and_gradient(straight: bool):
        for router in routers(model):
            router.straight_through = straight
        model.zero_grad()
        out = model(text_ids, labels=answers)
        out.loss.backward()
        return out, [router.gate.weight.grad.clone() for router in routers(model)]

    model = make_mixture()
    with torch.no_grad(), select_expert(model, 0):  # what expert 0 would say is what is wanted
        best = model(text_ids).logits.argmax(-1)
    answers = torch.cat([text_ids[:, :1], best[:, :-1]], dim=1)
    plain, zero = loss_and_gradient(False)
    ours, gradients = loss_and_gradient(True)
    torch.testing.assert_close(ours.logits, plain.logits, **CLOSE)
    assert all(grad.eq(0).all() for grad in zero)
    assert all(grad.abs().max() > 1e-4 for grad in gradients)
    with torch.no_grad():
        for router, grad in zip(routers(model), gradients, strict=True):
            router.gate.weight -= 2.0 * grad
        assert model(text_ids, labels=answers).loss < ours.loss - 0.01


def test_select_expert_is_the_dense_expert(make_small, text_ids):
    base = make_small()
    experts = [make_small(number) for number in (1, 2)]
    model = Phi3VMoeForCausalLM.from_experts(base, experts, 2)
    with torch.no_grad():
        routed = model(text_ids).logits
        for number, expert in enumerate(experts):
            dense = make_small()
            for own, other in zip(dense.model.layers, expert.model.layers, strict=True):
                own.mlp = other.mlp
            want = dense(text_ids).logits
            with select_expert(model, number):
                torch.testing.assert_close(model(text_ids).logits, want, rtol=1e-5, atol=1e-5)
            assert (routed - want).abs().max() > 0.1
        torch.testing.assert_close(model(text_ids).logits, routed, **CLOSE)  # the routing is back


def test_select_expert_is_undone_after_an_error_and_checks_its_number(make_mixture):
    model = make_mixture()
    with pytest.raises(KeyError), select_expert(model, 1):
        assert {router.selected for router in routers(model)} == {1}
        raise KeyError
    assert {router.selected for router in routers(model)} == {None}
    with pytest.raises(ValueError, match=r"Expert 3: the model has experts 0\.\.2"):
        with select_expert(model, 3):
            pass


def test_a_dense_model_has_no_routers(small_model):
    with pytest.raises(ValueError, match="not a mixture"):
        routers(small_model)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_load_balance_loss(make_mixture, text_ids, k, side):
    """E times the sum over experts of (share of tokens that chose it) * (mean probability)."""
    model, mask = make_mixture(k=k), torch.ones_like(text_ids)
    if side:
        mask[1, :9] = 0
        mask = mask if side == "left" else mask.flip(1)
    out = model(text_ids, attention_mask=mask, labels=text_ids, output_router_logits=True)
    counts, sums, rows = [0] * 3, [0.0] * 3, 0
    for logits in out.router_logits:  # (B * T, E) per layer
        for scores, real in zip(logits, mask.flatten(), strict=True):
            if real:
                probs = scores.detach().softmax(0)
                rows += 1
                for expert in range(3):
                    sums[expert] += float(probs[expert])
                    counts[expert] += expert in probs.topk(k).indices
    want = 3 * sum(count / rows * total / rows for count, total in zip(counts, sums, strict=True))
    assert out.aux_loss.item() == pytest.approx(want, rel=1e-5)
    theirs = load_balancing_loss_func(out.router_logits, 3, k, mask)
    torch.testing.assert_close(out.aux_loss, theirs)


def test_load_balance_loss_is_added_by_its_coefficient(make_mixture, text_ids):
    model = make_mixture()
    assert model(text_ids, labels=text_ids).router_logits is None
    plain = model(text_ids, labels=text_ids).loss
    model = make_mixture(router_aux_loss_coef=0.5)
    out = model(text_ids, labels=text_ids)
    assert len(out.router_logits) == 2
    torch.testing.assert_close(out.loss, plain + 0.5 * out.aux_loss)
    out.aux_loss.backward()
    assert routers(model)[0].gate.weight.grad.abs().max() > 0


def test_load_balance_loss_with_a_cache(make_mixture, text_ids):
    """With a cache, the mask covers more than what is routed."""
    model, mask = make_mixture(), torch.ones_like(text_ids)
    mask[0, 17:] = 0
    with torch.no_grad():
        cache = model(text_ids[:, :14], attention_mask=mask[:, :14], use_cache=True).past_key_values
        out = model(
            text_ids[:, 14:],
            attention_mask=mask,
            past_key_values=cache,
            output_router_logits=True,
        )
    want = load_balancing_loss_func(out.router_logits, 3, 1, mask[:, 14:])
    torch.testing.assert_close(out.aux_loss, want)
