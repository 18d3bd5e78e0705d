"""Experts on a CPU: weights times columns of tokens, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable

COLUMNS = 8  # tokens that a CPU multiplies at once


def in_columns(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Each expert on the tokens that chose it, as the columns of a matrix.

    Weights times columns of tokens is what a linear layer computes of rows of tokens, and on a CPU
    it is faster, twice for a few dozen tokens: the product is shared out over the rows of the
    weights, of which there are thousands. Full groups of 8 columns are faster still, so an expert's
    first token is repeated, with weight 0.

    The derivative is written out below, in columns as well. Every expert's gradient is computed in
    its place in the gradient of the fused weights; autograd would compute it elsewhere and copy it.

    Args:
        experts: a module with `gate_up_proj` (E, 2F, D), `down_proj` (E, D, F) and `act_fn`.
        hidden_states: (N, D).
        top_k_index: (N, K) numbers of the chosen experts; E counts for nothing.
        top_k_weights: (N, K).

    Returns:
        (N, D) weighted sums.
    """
    pairs = [torch.where(top_k_index == expert) for expert in range(experts.num_experts)]
    weights = top_k_weights.to(hidden_states.dtype)
    matrices = experts.gate_up_proj, experts.down_proj
    return _Columns.apply(hidden_states, weights, *matrices, pairs, experts.act_fn)


class _Columns(torch.autograd.Function):
    """Gradients of `in_columns` with respect to its first four arguments.

    Of one expert's n tokens x (D, n) with weights w (n,), an output y = w · W_d a (D, n) is
    computed from a = act(g) u (F, n), g = W_g x and u = W_u x. Kept for the way back are g and u.
    An expert without tokens needs no case of its own: products over no columns are zeros.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        act_fn: Callable,
    ) -> torch.Tensor:
        """Outputs (N, D) of tokens (N, D)."""
        learns = any(ctx.needs_input_grad)
        kept: list[torch.Tensor] = []
        out = torch.zeros_like(hidden)
        for expert, (tokens, slots) in enumerate(pairs):
            tokens, w = _filled(tokens, weights[tokens, slots])
            x = hidden[tokens].T  # (D, n)
            w_g, w_u = gate_up[expert].chunk(2)  # (F, D) each
            g, u = w_g @ x, w_u @ x  # (F, n) each
            a = act_fn(g)  # may be g itself, which is kept
            a = a * u if learns else a.mul_(u)
            out.index_add_(0, tokens, (down[expert] @ a).mul_(w).T)
            if learns:
                kept += (g, u)
        ctx.save_for_backward(hidden, weights, gate_up, down, *kept)
        ctx.pairs, ctx.act_fn = pairs, act_fn
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of those arguments that need one, from that of the output (N, D)."""
        hidden, weights, gate_up, down, *kept = ctx.saved_tensors
        for_hidden, for_weights, for_gate_up, for_down = ctx.needs_input_grad[:4]
        d_hidden = torch.zeros_like(hidden) if for_hidden else None
        d_weights = torch.zeros_like(weights) if for_weights else None
        d_gate_up = torch.empty_like(gate_up) if for_gate_up else None
        d_down = torch.empty_like(down) if for_down else None
        for expert, (chosen, slots) in enumerate(ctx.pairs):
            tokens, w = _filled(chosen, weights[chosen, slots])
            g, u = kept[2 * expert].detach().requires_grad_(), kept[2 * expert + 1]  # (F, n) each
            with torch.enable_grad():
                act = ctx.act_fn(g)
            a = act.detach() * u
            d_y = d_out[tokens].T  # (D, n)
            d_a = down[expert].T @ d_y  # (F, n), not yet weighted
            if for_weights:
                d_weights[chosen, slots] = (a * d_a).sum(dim=0)[: len(chosen)]
            if for_down:
                torch.mm(d_y * w, a.T, out=d_down[expert])
            d_a *= w
            (d_g,) = torch.autograd.grad(act, g, d_a * u)
            d_u = d_a.mul_(act.detach())
            if for_gate_up:
                x, (d_w_g, d_w_u) = hidden[tokens], d_gate_up[expert].chunk(2)
                torch.mm(d_g, x, out=d_w_g)
                torch.mm(d_u, x, out=d_w_u)
            if for_hidden:
                w_g, w_u = gate_up[expert].chunk(2)
                d_hidden.index_add_(0, tokens, torch.addmm(w_g.T @ d_g, w_u.T, d_u).T)
        return d_hidden, d_weights, d_gate_up, d_down, None, None


def _filled(tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat the first token, with weight 0, until there are full groups of columns."""
    spare = -len(tokens) % COLUMNS
    return torch.cat([tokens, tokens[:1].expand(spare)]), nn.functional.pad(weights, (0, spare))
