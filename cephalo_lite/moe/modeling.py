"""Phi-3-Vision with experts: the MoE block, and the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.output_capturing import OutputRecorder

from ..phi3v.modeling import Phi3VForCausalLM, Phi3VModel
from .assembling import mixture_state
from .configuration import Phi3VMoeConfig
from .experts import ChoosesExperts, Phi3VExperts
from .routing import ROUTERS, Router


class MoeBlock(nn.Module):
    """A router and its experts, in the place of an MLP."""

    def __init__(self, config: Phi3VMoeConfig):
        super().__init__()
        self.gating_layer = ROUTERS[config.router](config)
        self.experts = Phi3VExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D) in and out."""
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        routed = self.gating_layer(tokens)
        out = self.experts(tokens, routed.chosen, routed.weights)
        return out.view_as(hidden_states)


class MoeWeights:
    """Mix-in: how untrained experts and gates start, in the model and in what wraps it."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3VExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, Router):
            module.reset_parameters()


class Phi3VMoeModel(MoeWeights, ChoosesExperts, Phi3VModel):
    """Phi-3-Vision's decoder with experts in `config.mixed_layers`."""

    config: Phi3VMoeConfig
    config_class = Phi3VMoeConfig
    _can_record_outputs = {
        **Phi3VModel._can_record_outputs,
        "router_logits": OutputRecorder(Router, index=0),
    }

    def __init__(self, config: Phi3VMoeConfig):
        super().__init__(config)
        for number in config.mixed_layers:
            self.layers[number].mlp = MoeBlock(config)
        self.post_init()


class Phi3VMoeForCausalLM(MoeWeights, ChoosesExperts, Phi3VForCausalLM):
    """The mixture of Phi-3-Vision experts; reads and writes the published Cephalo layout.

    Example:
        >>> name = "lamm-mit/Cephalo-Phi-3-MoE-vision-128k-3x4b-beta"
        >>> model = Phi3VMoeForCausalLM.from_pretrained(name)
        >>> model = Phi3VMoeForCausalLM.from_experts(base, [materials, general, latex])
    """

    config: Phi3VMoeConfig
    config_class = Phi3VMoeConfig
    model_class = Phi3VMoeModel

    @classmethod
    def from_experts(
        cls,
        base_model: Phi3VForCausalLM,
        expert_models: Sequence[Phi3VForCausalLM],
        experts_per_token: int = 1,
        seed: int = 0,
        **fields: Any,
    ) -> Phi3VMoeForCausalLM:
        """A mixture of models in memory; the sources are copied and stay as they are.

        Args:
            base_model: gives everything but the experts.
            expert_models: give their MLPs; at least one, repeats allowed.
            experts_per_token: k.
            seed: of the gates' small random weights.
            fields: further fields of `Phi3VMoeConfig`, such as router="renormalised".

        Raises:
            ValueError: an expert's MLPs do not fit the base.
        """
        if not expert_models:
            raise ValueError("from_experts needs at least one expert model.")
        config = cls.config_class.from_dense(
            base_model.config, len(expert_models), experts_per_token, **fields
        )
        config._attn_implementation = base_model.config._attn_implementation
        with torch.device("meta"):
            model = cls(config)
        state = mixture_state(base_model, expert_models, config.mixed_layers, seed)
        model.load_state_dict(state, assign=True)
        for name, buffer in base_model.named_buffers():  # position factors: in no state dict
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer.clone())
        model.tie_weights()
        model.generation_config = copy.deepcopy(base_model.generation_config)
        return model.train(base_model.training)

    def _output(self, outputs, logits, loss, attention_mask) -> MoeCausalLMOutputWithPast:
        """Add the routers' scores and the load-balance loss where `output_router_logits` asks."""
        scores, balance = getattr(outputs, "router_logits", None), None
        if scores:
            mask = attention_mask if getattr(attention_mask, "ndim", 0) == 2 else None
            if mask is not None:  # while generating it covers the cache as well
                mask = mask[:, -(len(scores[0]) // len(mask)) :]
            balance = load_balancing_loss_func(
                scores, self.config.num_expert_models, self.config.k, mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * balance.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=scores,
        )
