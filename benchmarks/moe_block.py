"""One MoE block: ours against computing all experts, and against one dense MLP.

    python -m benchmarks.moe_block

Every token needs K of E experts, so E / K is the most that can be gained over computing all of
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from benchmarks.common import keep_memory, medians, parser, prepare, report, side_by_side, spread
from cephalo_lite.moe import MoeBlock, Phi3VMoeConfig

WAYS = ("cephalo", "eager", "grouped_mm", "batched_mm")
REFERENCE, DENSE = "all experts", "dense MLP"
COLUMNS = ("case", "all experts, ms", "dense MLP, ms", *(f"{way}, times faster" for way in WAYS))
NOTE = (
    "Float32 on the CPU unless said otherwise. Times faster: than computing all experts for every "
    "token; E/k is the limit. Backward includes the gradients of all weights and of the input. "
    "malloc keeps its memory here, so that what is timed is not the handing out of pages. "
    "batched_mm is left out (–) where it would copy the weights once per token"
)


class Case(NamedTuple):
    """What is timed: E experts, K of them per token, T tokens."""

    experts: int
    k: int
    tokens: int
    backward: bool
    device: str = "cpu"
    width: int = 1024  # D
    inner: int = 2816  # F

    @property
    def name(self) -> str:
        """As in the table."""
        what = "forward + backward" if self.backward else "forward"
        where = f", GPU, bfloat16, D={self.width} F={self.inner}" if self.device == "cuda" else ""
        return f"E={self.experts} k={self.k} T={self.tokens} {what}{where}"


class AllExperts(nn.Module):
    """The readable reference: every expert on every token, then the chosen ones, weighted."""

    def __init__(self, block: MoeBlock):
        super().__init__()
        self.router = block.gating_layer
        config, fused = block.experts.config, block.experts
        self.experts = nn.ModuleList(Phi3MLP(config) for _ in range(config.num_expert_models))
        with torch.no_grad():
            for number, expert in enumerate(self.experts):
                expert.gate_up_proj.weight.copy_(fused.gate_up_proj[number])
                expert.down_proj.weight.copy_(fused.down_proj[number])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens (N, D) in and out."""
        routed = self.router(hidden)
        outputs = torch.stack([expert(hidden) for expert in self.experts], dim=1)  # (N, E, D)
        index = routed.chosen[..., None].expand(-1, -1, hidden.shape[-1])  # (N, K, D)
        return (outputs.gather(1, index) * routed.weights[..., None].to(hidden.dtype)).sum(dim=1)


def cases(quick: bool) -> list[Case]:
    """All cases; those on a GPU need one."""
    sizes = {"width": 64, "inner": 96} if quick else {}
    found = [
        Case(experts, k, tokens, backward, **sizes)
        for tokens in (512, 1)
        for backward in (False, True)
        for experts, k in ((3, 1), (8, 2))
    ]
    on_gpu = {"device": "cuda", "width": 3072, "inner": 8192}
    return found + [Case(3, 1, tokens, False, **on_gpu) for tokens in (512, 1)]


def contestants(case: Case) -> dict:
    """Name → function to time; all that compute the mixture agree, which is checked here."""
    torch.manual_seed(0)
    config = Phi3VMoeConfig(
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_expert_models=case.experts,
        k=case.k,
        num_attention_heads=1,
        vocab_size=8,
        pad_token_id=0,
    )
    block = MoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02)
    dtype = torch.float32 if case.device == "cpu" else torch.bfloat16
    block = block.to(case.device, dtype)
    reference = AllExperts(block).to(case.device, dtype)
    dense = Phi3MLP(config).to(case.device, dtype)
    hidden = torch.randn(case.tokens, case.width).to(case.device, dtype)

    def in_way(way: str):
        def run(tokens: torch.Tensor) -> torch.Tensor:
            config._experts_implementation = way
            return block(tokens)

        return run

    ways = [way for way in WAYS if way != "batched_mm" or case.tokens * case.k <= case.experts]
    functions = {REFERENCE: reference, DENSE: dense} | {way: in_way(way) for way in ways}
    with torch.no_grad():
        want = reference(hidden)
        for way in ways:
            close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(functions[way](hidden), want, **close)
    learnt = [*block.parameters(), *reference.parameters(), *dense.parameters()]
    return {name: _timed(run, hidden, learnt, case.backward) for name, run in functions.items()}


def _timed(run, hidden: torch.Tensor, learnt: list, backward: bool):
    def forward() -> None:
        with torch.no_grad():
            run(hidden)

    def both() -> None:
        for parameter in learnt:
            parameter.grad = None
        run(hidden.detach().requires_grad_()).sum().backward()

    return both if backward else forward


def row(case: Case, seconds: dict[str, list[float]]) -> list:
    """A line of the table."""
    middle = medians(seconds)
    gains = [middle[REFERENCE] / middle[way] if way in middle else "–" for way in WAYS]
    return [case.name, 1e3 * middle[REFERENCE], 1e3 * middle[DENSE], *gains]


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases and write moe_block.json."""
    options = prepare(parser(__doc__.splitlines()[0]).parse_args(arguments))
    keep_memory()
    rows, runs = [], {}
    for case in cases(options.quick):
        if case.device == "cuda" and (options.quick or not torch.cuda.is_available()):
            rows.append([case.name] + [None] * (len(COLUMNS) - 1))
            continue
        seconds = side_by_side(
            contestants(case), options.repetitions, title=case.name, silent=options.silent
        )
        rows.append(row(case, seconds))
        runs[case.name] = {
            name: {"seconds": times, "spread": spread(times)} for name, times in seconds.items()
        }
    report("moe_block", options, COLUMNS, rows, runs, NOTE)


if __name__ == "__main__":
    main()
