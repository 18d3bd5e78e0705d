"""The fused weights of a layer's experts, and which way of computing them fits device and shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from .columns import in_columns
from .configuration import Phi3VMoeConfig

LARGE = 1 << 20  # D x F of an expert from which on a CPU computes with columns of tokens
DEFAULT_EXPERTS = "cephalo"  # what models use when `experts_implementation` is not given


@use_experts_implementation
class Phi3VExperts(nn.Module):
    """The MLPs of all experts of a layer, as two tensors.

    `config._experts_implementation` chooses how they are computed: "cephalo" (the default, see
    `experts_by_shape`), "eager" (the loop below), or a way of transformers, such as "grouped_mm"
    or "batched_mm".
    """

    def __init__(self, config: Phi3VMoeConfig):
        super().__init__()
        self.num_experts = config.num_expert_models
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token through its chosen experts, one expert after another.

        Args:
            hidden_states: (N, D).
            top_k_index: (N, K) numbers of the chosen experts; where experts lie apart, E stands for
                one in another process and counts for nothing.
            top_k_weights: (N, K).

        Returns:
            (N, D) weighted sums.
        """
        return one_by_one(self, hidden_states, top_k_index, top_k_weights)


def one_by_one(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Each expert on the tokens that chose it; arguments as in `Phi3VExperts.forward`."""
    mlp, weights = _mlps(experts), top_k_weights.to(hidden_states.dtype)
    out = torch.zeros_like(hidden_states)  # (N, D)
    for expert in range(experts.num_experts):
        tokens, slots = torch.where(top_k_index == expert)  # (n,), (n,)
        if len(tokens):
            part = mlp(hidden_states[tokens], expert) * weights[tokens, slots, None]  # (n, D)
            out.index_add_(0, tokens, part)
    return out


def token_by_token(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Each token through its experts, for few tokens, which need no sorting; arguments as above."""
    mlp, weights = _mlps(experts), top_k_weights.to(hidden_states.dtype)
    outs = []
    for number, chosen in enumerate(top_k_index.tolist()):
        token, out = hidden_states[number : number + 1], None  # (1, D)
        for slot, expert in enumerate(chosen):
            if expert < experts.num_experts:  # else it is in another process
                part = mlp(token, expert) * weights[number, slot]
                out = part if out is None else out + part
        outs.append(torch.zeros_like(token) if out is None else out)
    return torch.cat(outs)


def _mlps(experts: nn.Module) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The experts as one function of tokens (n, D) and the number of an expert."""
    # unbind, not indexing: the gradient of the weights is then written once, not once per expert
    gate_up, down = experts.gate_up_proj.unbind(), experts.down_proj.unbind()

    def mlp(tokens: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = nn.functional.linear(tokens, gate_up[expert]).chunk(2, dim=-1)  # (n, F), (n, F)
        return nn.functional.linear(experts.act_fn(gate) * up, down[expert])  # (n, D)

    return mlp


def is_few(experts: nn.Module, top_k_index: torch.Tensor) -> bool:
    """Whether there are at most E pairs of token and expert, as when text is generated."""
    return 0 < top_k_index.numel() <= experts.num_experts


def is_large(experts: nn.Module) -> bool:
    """Whether one expert has so many weights that multiplying them is most of the work."""
    return experts.down_proj[0].numel() >= LARGE


def can_group(experts: nn.Module, dtype: torch.dtype) -> bool:
    """Whether torch's grouped products take these weights: rows of full 16 bytes, no float64."""
    widths = experts.down_proj.shape[1:]  # D, F
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def experts_by_shape(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute experts in the way that is fastest for device and number of tokens.

    On a CPU few tokens go one after another; for many, products with columns of tokens win where
    experts are large (`benchmarks/moe_block.py`). Elsewhere transformers' own rule holds:
    grouped products, and for the few tokens of a generation step batched ones, which copy the
    weights of each chosen expert.

    Args:
        experts: a module with `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F).
        hidden_states: (N, D).
        top_k_index: (N, K).
        top_k_weights: (N, K).

    Returns:
        (N, D).
    """
    few, on_cpu = is_few(experts, top_k_index), hidden_states.device.type == "cpu"
    if few and (not on_cpu or torch.compiler.is_compiling()):
        way = batched_mm_experts_forward
    elif few:
        way = token_by_token
    elif on_cpu and is_large(experts) and not _is_changed_by_torch():
        way = in_columns
    elif not can_group(experts, hidden_states.dtype):
        way = one_by_one
    else:
        way = grouped_mm_experts_forward
    return way(experts, hidden_states, top_k_index, top_k_weights)


def _is_changed_by_torch() -> bool:
    """Whether products will be compiled, or computed in another dtype than they are written in."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


class ChoosesExperts:
    """Mix-in for models whose experts are computed by `experts_by_shape` unless told otherwise."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for the decorator in the file of the model

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The way to compute experts; raises ValueError where the name is unknown."""
        return super().get_correct_experts_implementation(requested_experts or DEFAULT_EXPERTS)


ALL_EXPERTS_FUNCTIONS.register(DEFAULT_EXPERTS, experts_by_shape)
