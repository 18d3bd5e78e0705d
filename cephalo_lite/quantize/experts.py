"""The experts of a layer as modules of their own, one after another.

transformers 5 keeps all experts of a layer in two 3-D tensors. bitsandbytes quantises and PEFT
adapts `nn.Linear` and nothing else, so both leave fused experts alone without a word: 96 % of
Phi-3.5-MoE. Here each matrix is an `nn.Linear` again, under the name that it is published with.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN


class PhimoeExpert(nn.Module):
    """One expert of Phi-3.5-MoE, with the names of its published weights."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, inner, bias=False)  # gate
        self.w3 = nn.Linear(width, inner, bias=False)  # up
        self.w2 = nn.Linear(inner, width, bias=False)  # down
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens (n, D) in and out."""
        return self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))


class SequentialExperts(nn.ModuleList):
    """Experts that compute their tokens one after another; takes the place of fused experts.

    Experts without a token do not run, and get no gradient at all (`grad is None`; fused experts
    would get zeros). How many tokens each has is the only thing that the host waits for.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token through its chosen experts.

        Args:
            hidden_states: (N, D).
            top_k_index: (N, K) numbers of the chosen experts.
            top_k_weights: (N, K).

        Returns:
            (N, D) weighted sums, in the dtype of `hidden_states`.
        """
        chosen, each = top_k_index.flatten(), top_k_index.shape[1]  # (N * K,)
        order = chosen.argsort(stable=True)  # (N * K,) pairs of token and slot, by expert
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        inputs = hidden_states[order // each].split(counts)  # E times (n, D)
        outputs = torch.cat(
            [expert(tokens) for expert, tokens in zip(self, inputs, strict=True) if len(tokens)]
        )
        weights = top_k_weights.flatten()[order].to(hidden_states.dtype)
        pairs = outputs * weights[:, None]  # (N * K, D), by expert
        # Gathered back rather than added in place: the same result on every run, on a GPU too.
        return pairs[order.argsort()].unflatten(0, (-1, each)).sum(dim=1)
