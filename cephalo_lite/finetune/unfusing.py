"""Fused experts taken apart, so that each matrix can have an adapter, and put together again.

LoRA reaches `nn.Linear` and no fused tensor. The classes of `cephalo_lite.quantize` have experts
one by one; here a model in memory becomes one of these, its weights where they were.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PhimoeForCausalLM, PhimoeModel
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.phimoe.modeling_phimoe import PhimoeExperts

from ..moe import Phi3VMoeForCausalLM, Phi3VMoeModel
from ..moe.experts import Phi3VExperts
from ..quantize import SequentialExperts, SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM
from ..quantize.experts import PhimoeExpert
from ..quantize.models import SequentialPhi3VMoeModel, SequentialPhimoeModel

FUSED = {
    Phi3VMoeForCausalLM: SequentialPhi3VMoeForCausalLM,
    Phi3VMoeModel: SequentialPhi3VMoeModel,
    PhimoeForCausalLM: SequentialPhimoeForCausalLM,
    PhimoeModel: SequentialPhimoeModel,
}
APART = {apart: fused for fused, apart in FUSED.items()}


def unfuse(model: nn.Module) -> nn.Module:
    """Give a mixture's experts matrices of their own, which are views of the fused ones.

    Args:
        model: a `Phi3VMoeForCausalLM` or `PhimoeForCausalLM`; is changed in place, and of the
            class with experts one by one then. Any other model stays as it is.

    Returns:
        The model.
    """
    if type(model) not in FUSED:
        return model
    for block in _blocks(model, Phi3VExperts | PhimoeExperts):
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        apart = []
        for number in range(len(gate_up)):
            with torch.device("meta"):
                fused_gate = isinstance(block.experts, Phi3VExperts)
                expert = (Phi3MLP if fused_gate else PhimoeExpert)(model.config)
            if fused_gate:
                weights = {"gate_up_proj": gate_up[number], "down_proj": down[number]}
            else:
                gate, up = gate_up[number].chunk(2)
                weights = {"w1": gate, "w3": up, "w2": down[number]}
            for name, weight in weights.items():
                own = nn.Parameter(weight.detach(), requires_grad=gate_up.requires_grad)
                getattr(expert, name).weight = own
            apart.append(expert)
        block.experts = SequentialExperts(apart).train(model.training)
    return _become(model, FUSED)


def fuse(model: nn.Module) -> nn.Module:
    """Put experts together again, which computes faster; the reverse of `unfuse`.

    Args:
        model: of a class with experts one by one, without adapters and not in 4 bits; is changed
            in place. Any other model stays as it is.

    Returns:
        The model.

    Raises:
        ValueError: the experts are in 4 bits.
    """
    if type(model) not in APART:
        return model
    for block in _blocks(model, SequentialExperts):
        experts = list(block.experts)
        if not all(p.is_floating_point() for p in block.experts.parameters()):
            raise ValueError("Experts in 4 bits cannot be fused: load the model unquantised.")
        with torch.device("meta"):
            kind = Phi3VExperts if isinstance(experts[0], Phi3MLP) else PhimoeExperts
            fused = kind(model.config)
        if kind is Phi3VExperts:
            gate_up = [expert.gate_up_proj.weight for expert in experts]
            down = [expert.down_proj.weight for expert in experts]
        else:
            gate_up = [torch.cat([expert.w1.weight, expert.w3.weight]) for expert in experts]
            down = [expert.w2.weight for expert in experts]
        learns = down[0].requires_grad
        fused.gate_up_proj = nn.Parameter(torch.stack(gate_up).detach(), requires_grad=learns)
        fused.down_proj = nn.Parameter(torch.stack(down).detach(), requires_grad=learns)
        block.experts = fused.train(model.training)
    return _become(model, APART)


def _blocks(model: nn.Module, kind) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), kind)]


def _become(model: nn.Module, classes: dict[type, type]) -> nn.Module:
    """The same object as one of the other class, by which checkpoints find their names."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model
