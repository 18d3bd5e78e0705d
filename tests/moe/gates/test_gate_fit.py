"""The batched fit of the gates: equal to a plain loop, near the optimum, stopped in time."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from cephalo_lite.moe.gates.fit import (
    HELD_OUT_EVERY,
    _curvature,
    _standard,
    _Tokens,
    fit_gates,
)
from cephalo_lite.moe.gates.inputs import GateInputs

QUIET = {"progress": False}


def make_inputs(
    counts, width=24, layers=3, seed=0, apart=1.0, spread=1.5, offset=2.0
) -> GateInputs:
    """Tokens around a mean per expert, in features of unlike scale and far from zero.

    The means of the last two experts differ by a tenth of what they differ from the first.
    """
    fixed = torch.Generator().manual_seed(99)
    scale = torch.exp(spread * torch.randn(layers, 1, width, generator=fixed))
    means = torch.randn(layers, len(counts), width, generator=fixed)
    means[:, 2:] = means[:, 1:2] + 0.1 * means[:, 2:]
    centre = offset * torch.randn(layers, 1, width, generator=fixed)
    expert = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    noise = torch.randn(layers, len(expert), width, generator=torch.Generator().manual_seed(seed))
    hidden = (centre + apart * means[:, expert] + 0.3 * noise) * scale
    none = torch.zeros_like(expert)
    return GateInputs(hidden, expert, none, none)


def accuracy(gates, inputs) -> list[float]:
    return [
        (hidden @ gate["gate.weight"].T + gate["gate.bias"])
        .argmax(-1).eq(inputs.expert).float().mean().item()
        for gate, hidden in zip(gates, inputs.hidden, strict=True)
    ]  # fmt: skip


def plain_fit(hidden, expert, steps, decay, top) -> tuple[nn.Linear, list[float]]:
    """One layer, written out: standardise, autograd, accelerated gradient; then unstandardise."""
    hidden, experts = hidden.double(), int(expert.max()) + 1
    weight = 1 / (experts * torch.bincount(expert)[expert].double())
    mean = weight @ hidden
    variance = weight @ (hidden - mean) ** 2
    deviation = (variance + 1e-6 * variance.mean()).sqrt()
    inputs = (hidden - mean) / deviation
    gate = nn.Linear(hidden.shape[1], experts).double()
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    rates, losses = {"weight": 1.5 / top, "bias": 1.5}, []
    last = {name: parameter.detach().clone() for name, parameter in gate.named_parameters()}
    for step in range(1, steps + 1):
        losses_of_tokens = nn.functional.cross_entropy(gate(inputs), expert, reduction="none")
        loss = (losses_of_tokens * weight).sum()
        gate.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in gate.named_parameters():
                shrink = 1 - 1.5 * decay / len(expert) if name == "weight" else 1
                new = parameter * shrink - rates[name] * parameter.grad
                parameter.copy_(new + step / (step + 3) * (new - last[name]))
                last[name] = new
    with torch.no_grad():
        gate.weight.copy_(last["weight"] / deviation)
        gate.bias.copy_(last["bias"] - gate.weight @ mean)
    return gate, losses


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_all_layers_at_once_equal_a_loop_over_layers(steps):
    inputs = make_inputs([50, 20, 90])
    fit = fit_gates(inputs, inputs, 3, steps, weight_decay=2.0, **QUIET)
    losses = torch.zeros(steps, dtype=torch.float64)
    for layer, (gate, top) in enumerate(zip(fit.gates, curvatures(inputs), strict=True)):
        hidden, best = inputs.hidden[layer], fit.best_steps[layer]
        _, own = plain_fit(hidden, inputs.expert, steps, 2.0, top)
        plain, _ = plain_fit(hidden, inputs.expert, best, 2.0, top)
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(
                gate[f"gate.{name}"].double(), weight.detach(), rtol=1e-4, atol=1e-5
            )
        losses += torch.tensor(own) / 3
    assert len(fit.train_losses) == steps and min(fit.best_steps) >= steps // 2
    torch.testing.assert_close(torch.tensor(fit.train_losses).double(), losses, rtol=1e-5, atol=0)


def curvatures(inputs) -> torch.Tensor:
    tokens = _Tokens(inputs, 3, "cpu")
    return _curvature(tokens, *_standard(tokens), seed=0).flatten().double()


def test_curvature_is_the_largest_eigenvalue():
    """An estimate from below; at 2/3 of the true value the steps would begin to be too long."""
    inputs = make_inputs([50, 20, 90], apart=0.0)  # no direction stands out
    tokens = _Tokens(inputs, 3, "cpu")
    mean, scale = _standard(tokens)
    standard = (inputs.hidden - mean) * scale
    covariance = (standard * tokens.weight).mT @ standard
    variances = covariance.diagonal(dim1=1, dim2=2)
    assert variances.max() < 1.001 and variances.median() > 0.99
    ratio = curvatures(inputs) / torch.linalg.eigvalsh(covariance)[:, -1]
    assert ratio.max() < 1.001 and ratio.min() > 0.9


def test_near_the_best_that_a_linear_gate_can_do():
    """Two almost parallel directions, unlike scales: as good as a solver run to convergence."""
    train, test = make_inputs([200] * 3, seed=1), make_inputs([400] * 3, seed=2)
    fit = fit_gates(train, test, 3, **QUIET)
    for layer, share in enumerate(accuracy(fit.gates, test)):
        mean, deviation = train.hidden[layer].mean(0), train.hidden[layer].std(0)
        given = [((x.hidden[layer] - mean) / deviation).numpy() for x in (train, test)]
        solver = LogisticRegression(C=1.0, max_iter=2000).fit(given[0], train.expert.numpy())
        assert share > solver.score(given[1], test.expert.numpy()) - 0.01
        assert share > 0.8  # 0.67 would be told by the first direction alone


def test_more_features_than_tokens():
    """In wide models a fixed rate would make the first steps far too long."""
    train, test = make_inputs([40] * 3, 1024, 2, 1, 0.5), make_inputs([100] * 3, 1024, 2, 2, 0.5)
    fit = fit_gates(train, test, 3, **QUIET)
    assert min(accuracy(fit.gates, test)) > 0.9
    assert min(fit.held_out_losses) < 0.4
    assert all(loss < 1.2 for loss in fit.held_out_losses)  # ln 3 = 1.10 at the start


def test_each_layer_keeps_its_best_gate():
    """Trained by heart where experts are noise, so held-out loss rises: the early gate is kept."""
    train, test = make_inputs([30] * 3, seed=1), make_inputs([300] * 3, seed=2)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    train.hidden[1] = train.hidden[1, shuffled]
    fit = fit_gates(train, test, 3, steps=400, weight_decay=0.0, patience=400, **QUIET)
    assert fit.best_steps[1] <= HELD_OUT_EVERY < fit.best_steps[0] < 400
    short = fit_gates(train, test, 3, fit.best_steps[0], weight_decay=0.0, **QUIET)
    assert short.gates[0]["gate.weight"].equal(fit.gates[0]["gate.weight"])
    assert short.gates[1]["gate.bias"].equal(fit.gates[1]["gate.bias"])


def test_stops_when_nothing_improves():
    train, test = make_inputs([30] * 3, seed=1), make_inputs([300] * 3, seed=2)
    fit = fit_gates(train, test, 3, steps=2000, weight_decay=0.0, patience=30, **QUIET)
    assert max(fit.best_steps) + 30 == len(fit.train_losses) < 2000
    assert len(fit.held_out_losses) == len(fit.train_losses) // HELD_OUT_EVERY


def test_rare_experts_count_as_much_as_frequent_ones():
    train, test = make_inputs([600, 30, 30], apart=0.15, seed=1), make_inputs([300] * 3, apart=0.15)
    fit = fit_gates(train, test, 3, **QUIET)
    for gate, hidden in zip(fit.gates, test.hidden, strict=True):
        chosen = (hidden @ gate["gate.weight"].T + gate["gate.bias"]).argmax(-1)
        assert torch.bincount(chosen, minlength=3)[0] < 450  # of 300 tokens that are its own


def test_inputs_stay_as_they_are_and_same_seed_same_gates():
    inputs = make_inputs([30, 40, 50])
    before = inputs.hidden.clone()
    first, again = (fit_gates(inputs, inputs, 3, 20, seed=5, **QUIET) for _ in range(2))
    assert inputs.hidden.equal(before)
    for one, other in zip(first.gates, again.gates, strict=True):
        assert one["gate.weight"].equal(other["gate.weight"])


def test_constant_features_and_equal_tokens():
    inputs = make_inputs([10, 10, 10])
    inputs.hidden[..., 0] = 7.0
    inputs.hidden[1] = 0.0
    fit = fit_gates(inputs, inputs, 3, 20, **QUIET)
    assert all(t.isfinite().all() for gate in fit.gates for t in gate.values())


def test_an_expert_without_tokens_is_refused():
    inputs = make_inputs([10, 10, 10])
    with pytest.raises(ValueError, match=r"\[10, 10, 10, 0\]"):
        fit_gates(inputs, inputs, 4, **QUIET)


def test_fewer_tokens_than_features_give_the_same_fit():
    """They are fitted in their span; repeated, so that they are many, in the space of features."""
    few = make_inputs([4, 5, 3], width=60)
    many = GateInputs(few.hidden.repeat(1, 4, 1), few.expert.repeat(4), few.kind, few.sample)
    how = {"experts": 3, "steps": 3000, "patience": 3000, **QUIET}
    held_out = make_inputs([6, 6, 6], width=60, seed=1)
    in_span = fit_gates(few, few, weight_decay=0.5, **how)
    in_features = fit_gates(many, few, weight_decay=2.0, **how)
    for one, other in zip(in_span.gates, in_features.gates, strict=True):
        for name, tensor in one.items():
            largest = other[name].abs().max().item()
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-2 * largest)
    assert min(accuracy(in_span.gates, held_out)) > 0.6
