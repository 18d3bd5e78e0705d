"""The fused experts: every way to compute them agrees with experts one by one, gradients too."""

import pytest
import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from cephalo_lite import Phi3VMoeConfig
from cephalo_lite.moe import MoeBlock
from cephalo_lite.moe.experts import experts_by_shape, in_columns, is_few, one_by_one

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
    """On a CPU: the loop for single tokens, columns for many, grouped products to learn."""
    from cephalo_lite.moe import experts as module

    taken = []
    ways = ("one_by_one", "in_columns", "grouped_mm_experts_forward", "batched_mm_experts_forward")
    for name in ways:
        real = getattr(module, name)
        spy = lambda *args, real=real, name=name: (taken.append(name), real(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    block, hidden = make_block(3, 1, 40)
    routed = block.gating_layer(hidden)
    for tokens, grad in ((40, False), (1, False), (40, True), (1, True)):
        with torch.set_grad_enabled(grad):
            index, weights = routed.chosen[:tokens], routed.weights[:tokens]
            experts_by_shape(block.experts, hidden[:tokens], index, weights)
    assert taken == ["in_columns", "one_by_one", "grouped_mm_experts_forward", "one_by_one"]


@pytest.mark.parametrize("tokens", [5, 8, 41])
@pytest.mark.parametrize("k", [1, 2])
def test_columns_that_fill_a_group_up_count_for_nothing(tokens, k):
    block, hidden = make_block(3, k, tokens)
    routed = block.gating_layer(hidden)
    tensors = [hidden.requires_grad_(), block.experts.gate_up_proj, block.experts.down_proj]
    found = []
    for way in (one_by_one, in_columns):
        weights = routed.weights.detach().requires_grad_()
        out = way(block.experts, hidden, routed.chosen, weights)
        found.append([out, *torch.autograd.grad((out**2).sum(), [*tensors, weights])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


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
