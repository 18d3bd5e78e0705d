"""The fused experts: every way to compute them agrees with experts one by one, gradients too."""

import pytest
import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from cephalo_lite import Phi3VMoeConfig
from cephalo_lite.moe import MoeBlock
from cephalo_lite.moe.columns import COLUMNS, in_columns
from cephalo_lite.moe.experts import experts_by_shape, is_few, one_by_one, token_by_token

WAYS = ["cephalo", "eager", "grouped_mm", "batched_mm"]


def reference(block: MoeBlock, tokens: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens, as dense MLPs; then those that were chosen, by weight."""
    config, routed = block.experts.config, block.gating_layer(tokens)
    outputs = []
    for number in range(config.num_expert_models):
        dense = Phi3MLP(config)
        del dense.gate_up_proj.weight, dense.down_proj.weight  # used with the block's own tensors
        dense.gate_up_proj.weight = block.experts.gate_up_proj[number]
        dense.down_proj.weight = block.experts.down_proj[number]
        outputs.append(dense(tokens))
    chosen = torch.stack(outputs, dim=1).gather(  # (N, K, D)
        1, routed.chosen[..., None].expand(-1, -1, tokens.shape[-1])
    )
    return (chosen * routed.weights[..., None]).sum(1)


def make_block(
    experts: int, k: int, tokens: int, width: int = 32, inner: int = 48
) -> tuple[MoeBlock, torch.Tensor]:
    """A seeded block, and tokens for it."""
    config = Phi3VMoeConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=1,
        num_expert_models=experts,
        k=k,
        vocab_size=8,
        pad_token_id=0,
    )
    block, generator = MoeBlock(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    config._experts_implementation = "cephalo"
    return block, torch.randn(tokens, width, generator=generator)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 1), (3, 2), (8, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_outputs_and_gradients_equal_the_reference(way, experts, k, tokens):
    block, hidden = make_block(experts, k, tokens)
    block.experts.config._experts_implementation = way
    with torch.no_grad():
        torch.testing.assert_close(block(hidden), reference(block, hidden), rtol=1e-5, atol=1e-6)
    wanted = [hidden.requires_grad_(), *block.parameters()]
    names = ["hidden", *(name for name, _ in block.named_parameters())]
    factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    ours = torch.autograd.grad((block(hidden) * factors).sum(), wanted)
    theirs = torch.autograd.grad((reference(block, hidden) * factors).sum(), wanted)
    for name, one, two in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, two, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_without_tokens_gets_a_zero_gradient(way):
    block, hidden = make_block(3, 1, 20)
    block.experts.config._experts_implementation = way
    with torch.no_grad():
        block.gating_layer.gate.bias[1] = -1e4
    block(hidden).sum().backward()
    by_expert = block.experts.down_proj.grad.flatten(1).abs().amax(1)
    assert by_expert[1] == 0 and by_expert[0] > 0 and by_expert[2] > 0


@pytest.mark.parametrize("way", ["cephalo", "eager", "grouped_mm"])
def test_no_tokens_at_all(way):
    block, _ = make_block(3, 2, 1)
    block.experts.config._experts_implementation = way
    with torch.no_grad():
        assert block(torch.zeros(0, 32)).shape == (0, 32)


def test_few_means_no_more_pairs_than_experts():
    block, _ = make_block(3, 1, 1)
    assert [is_few(block.experts, torch.zeros(n, 1)) for n in (0, 1, 3, 4)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_the_way_follows_the_shape(monkeypatch):
    """On a CPU: token by token for few, columns for many and large experts, else grouped."""
    from cephalo_lite.moe import experts as module

    taken = []
    grouped = "grouped_mm_experts_forward"
    ways = ("token_by_token", "one_by_one", "in_columns", grouped, "batched_mm_experts_forward")
    for name in ways:
        real = getattr(module, name)
        spy = lambda *args, real=real, name=name: (taken.append(name), real(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    block, hidden = make_block(3, 1, 40)
    routed = block.gating_layer(hidden)

    def compute(tokens: int = 40) -> torch.Tensor:
        index, weights = routed.chosen[:tokens], routed.weights[:tokens]
        return experts_by_shape(block.experts, hidden[:tokens], index, weights)

    compute(1)
    small = compute()
    monkeypatch.setattr(module, "LARGE", block.experts.down_proj[0].numel())
    torch.testing.assert_close(compute(), small)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compute().float(), small, rtol=0.05, atol=0.05)
    assert taken == ["token_by_token", grouped, "in_columns", grouped]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("tokens", [5, COLUMNS, 41])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("way", [in_columns, token_by_token])
def test_ways_give_what_the_loop_gives(way, k, tokens, elsewhere):
    """Outputs and all gradients, also where one of four experts is in another process.

    Columns that fill a group up count for nothing.
    """
    block, hidden = make_block(4 if elsewhere else 3, k, tokens)
    block, hidden = block.double(), hidden.double()
    routed, experts = block.gating_layer(hidden), block.experts
    if elsewhere:  # transformers gives it the number E and the weight 0
        experts.num_experts = 3
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:3].detach()))
        routed = routed._replace(weights=routed.weights.masked_fill(routed.chosen == 3, 0.0))
        assert (routed.chosen == 3).any()
    tensors = [hidden.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    found = []
    for one_way in (one_by_one, way):
        weights = routed.weights.detach().double().requires_grad_()
        out = one_way(experts, hidden, routed.chosen, weights)
        found.append([out, *torch.autograd.grad((out**2).sum(), [*tensors, weights])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.fixture
def nan_where_nothing_was_written():
    """Make torch fill memory that it hands out empty."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def column_inputs(experts: int = 3) -> tuple:
    """An MLP block's experts in float64, 11 tokens, choices that leave out the last, weights."""
    block, hidden = make_block(experts, 2, 11, width=6, inner=5)
    chosen = torch.arange(22).remainder(experts - 1).view(11, 2)
    weights = torch.rand(11, 2, dtype=torch.float64, requires_grad=True)
    return block.double().experts, hidden.double().requires_grad_(), chosen, weights


@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.Identity()])
def test_the_derivative_in_columns_is_that_of_small_steps(
    activation, nan_where_nothing_was_written
):
    """In float64, with an expert that no token chose; identity returns what it was given."""
    experts, hidden, chosen, weights = column_inputs()
    experts.act_fn = activation
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert torch.autograd.gradcheck(
        lambda *_: in_columns(experts, hidden, chosen, weights), (hidden, weights, gate_up, down)
    )
    in_columns(experts, hidden, chosen, weights).sum().backward()
    assert not gate_up.grad[-1].any() and not down.grad[-1].any()
    assert all(gate_up.grad[e].any() and down.grad[e].any() for e in range(2))


@pytest.mark.parametrize("learns", ["hidden", "weights", "gate_up_proj", "down_proj", None])
def test_only_what_learns_gets_a_gradient_in_columns(learns):
    experts, hidden, chosen, weights = column_inputs()
    want = dict(experts.named_parameters(), hidden=hidden, weights=weights)
    out = in_columns(experts, hidden, chosen, weights)
    full = dict(zip(want, torch.autograd.grad(out.sum(), want.values()), strict=True))
    for name, tensor in want.items():
        tensor.requires_grad_(name == learns)
    out = in_columns(experts, hidden, chosen, weights)
    assert out.requires_grad == (learns is not None)
    if learns:
        (found,) = torch.autograd.grad(out.sum(), [want[learns]])
        torch.testing.assert_close(found, full[learns], rtol=0, atol=0)


def test_checkpointing_frees_what_columns_keep():
    """What is kept for the way back goes through autograd's own hooks, and is computed again."""
    experts, hidden, chosen, weights = column_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        out = in_columns(experts, hidden, chosen, weights)
    assert kept.count(torch.Size([5, 16])) == 4  # gate and up of two experts, 11 tokens filled up
    again = torch.utils.checkpoint.checkpoint(
        in_columns, experts, hidden, chosen, weights, use_reentrant=False
    )
    for one, two in zip(
        torch.autograd.grad(out.sum(), [hidden, weights]),
        torch.autograd.grad(again.sum(), [hidden, weights]),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_widths_that_grouped_products_refuse():
    """Rows must be of full 16 bytes there; the default takes any width, and float64."""
    block, hidden = make_block(3, 2, 20, width=30, inner=21)
    block.experts.config._experts_implementation = "grouped_mm"
    with pytest.raises(RuntimeError, match="16 bytes"):
        block(hidden)
    block.experts.config._experts_implementation = "cephalo"
    torch.testing.assert_close(block(hidden), reference(block, hidden))
    block, hidden = block.double(), hidden.double()
    (ours,) = torch.autograd.grad(block(hidden).sum(), [block.experts.gate_up_proj])
    (want,) = torch.autograd.grad(reference(block, hidden).sum(), [block.experts.gate_up_proj])
    torch.testing.assert_close(ours, want)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_block_compiles_to_one_graph(tokens):
    block, hidden = make_block(3, 1, tokens)
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(hidden), block(hidden))


def test_models_use_it_unless_told_otherwise(make_mixture):
    model = make_mixture()
    assert model.config._experts_implementation == "cephalo"
    model.set_experts_implementation("grouped_mm")
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match='experts_implementation="fastest"` is not supported'):
        model.set_experts_implementation("fastest")


def test_dtypes_are_kept():
    block, hidden = make_block(3, 2, 10)
    want = block(hidden)
    for dtype in (torch.bfloat16, torch.float16):
        out = block.to(dtype)(hidden.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)


def test_it_is_a_module_of_two_tensors():
    block, _ = make_block(3, 1, 1)
    assert isinstance(block.experts, nn.Module)
    assert {name: tuple(p.shape) for name, p in block.experts.named_parameters()} == {
        "gate_up_proj": (3, 96, 32),
        "down_proj": (3, 32, 48),
    }
