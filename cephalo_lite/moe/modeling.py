"""Phi-3-Vision with experts: fused expert weights, the MoE block, and the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.output_capturing import OutputRecorder

from ..phi3v.modeling import Phi3VForCausalLM, Phi3VModel
from .configuration import Phi3VMoeConfig
from .routing import ROUTERS, Router


@use_experts_implementation
class Phi3VExperts(nn.Module):
    """The MLPs of all experts of a layer, as two tensors.

    `config._experts_implementation` chooses how they are computed ("eager" is the loop below; transformers
    adds "grouped_mm", "batched_mm" and others).
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
        """Each token through its chosen experts.

        Args:
            hidden_states: (N, D).
            top_k_index: (N, K) numbers of the chosen experts.
            top_k_weights: (N, K).

        Returns:
            (N, D) weighted sums.
        """
        tokens, chosen = top_k_index.shape
        order = top_k_index.flatten().argsort(stable=True)  # (N * K,) pairs, grouped by expert
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        grouped = hidden_states if tokens == 1 else hidden_states[order // chosen]  # (N * K, D)
        if tokens == 1 and chosen > 1:
            grouped = grouped.expand(chosen, -1)
        outputs = []
        for expert, part in enumerate(grouped.split(counts)):
            if len(part):
                gate, up = nn.functional.linear(part, self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append(nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert]))
        weights = top_k_weights.flatten()[order, None].to(hidden_states.dtype)
        out = torch.cat(outputs) * weights  # (N * K, D)
        if chosen == 1:
            return out if tokens == 1 else torch.empty_like(out).index_copy(0, order, out)
        pairs = torch.empty_like(out).index_copy(0, order, out)
        return pairs.view(tokens, chosen, -1).sum(dim=1)


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


class Phi3VMoeModel(Phi3VModel):
    """Phi-3-Vision's decoder with experts in `config.mixed_layers`."""

    config: Phi3VMoeConfig
    config_class = Phi3VMoeConfig
    _can_record_outputs = {**Phi3VModel._can_record_outputs, "router_logits": OutputRecorder(Router, index=0)}

    def __init__(self, config: Phi3VMoeConfig):
        super().__init__(config)
        for number in config.mixed_layers:
            self.layers[number].mlp = MoeBlock(config)
        self.post_init()


class Phi3VMoeForCausalLM(Phi3VForCausalLM):
    """The mixture of Phi-3-Vision experts; reads and writes the published Cephalo layout.

    Example:
        >>> model = Phi3VMoeForCausalLM.from_pretrained("lamm-mit/Cephalo-Phi-3-MoE-vision-128k-3x4b-beta")
        >>> model = Phi3VMoeForCausalLM.from_experts(base, [materials, general, latex])
    """

    config: Phi3VMoeConfig
    config_class = Phi3VMoeConfig
    model_class = Phi3VMoeModel

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3VExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                nn.init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, Router):
            module.reset_parameters()

    @classmethod
    def from_experts(
        cls,
        base_model: Phi3VForCausalLM,
        expert_models: Sequence[Phi3VForCausalLM],
        experts_per_token: int = 1,
        seed: int = 0,
        **fields,
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
        with torch.device("meta"):
            model = cls(config)
        state = {key: value.detach().clone() for key, value in base_model.state_dict().items()}
        for layer in config.mixed_layers:
            prefix = f"model.layers.{layer}.mlp."
            for name in ("gate_up_proj", "down_proj"):
                own = state.pop(f"{prefix}{name}.weight")
                parts = [expert.state_dict()[f"{prefix}{name}.weight"] for expert in expert_models]
                wrong = [tuple(part.shape) for part in parts if part.shape != own.shape]
                if wrong:
                    raise ValueError(f"{prefix}{name}: an expert has {wrong[0]}, the base {tuple(own.shape)}.")
                state[f"{prefix}experts.{name}"] = torch.stack([p.to(own.device, own.dtype) for p in parts])
        generator = torch.Generator().manual_seed(seed)
        for layer in config.mixed_layers:
            prefix, like = f"model.layers.{layer}.mlp.gating_layer.gate.", base_model.lm_head.weight
            shape = (config.num_expert_models, config.hidden_size)
            weight = torch.randn(shape, generator=generator) * Router.init_std
            state[f"{prefix}weight"] = weight.to(like.device, like.dtype)
            state[f"{prefix}bias"] = torch.zeros(shape[0], device=like.device, dtype=like.dtype)
        model.load_state_dict(state, assign=True)
        for name, buffer in base_model.named_buffers():  # position factors are not part of the weights
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.clone())
        model.generation_config = base_model.generation_config
        model.train(base_model.training)
        return model

    def _output(self, outputs, logits, loss, attention_mask) -> MoeCausalLMOutputWithPast:
        """Add the routers' scores and the load-balance loss, where `output_router_logits` asks for them."""
        scores, balance = getattr(outputs, "router_logits", None), None
        if scores:
            balance = load_balancing_loss_func(
                scores, self.config.num_expert_models, self.config.k, attention_mask
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
