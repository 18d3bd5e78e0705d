"""The configuration of a Phi-3-Vision mixture of experts."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from ..phi3v.configuration import Phi3VConfig

DENSE_ONLY = ("architectures", "auto_map", "model_type", "transformers_version")


@strict
class Phi3VMoeConfig(Phi3VConfig):
    """A `Phi3VConfig` with experts; `k` and `num_expert_models` are the published names.

    Args (beyond those of `Phi3VConfig`):
        k: experts that a token passes through (`num_experts_per_tok`).
        num_expert_models: experts per layer (`num_experts`, `num_local_experts`).
        use_embeddings_in_router: published, and without effect there and here.
        router: how scores become weights: "cephalo" (published) or "renormalised".
        moe_layers: layers that have experts; None is all of them.
        expert_names: what to call the experts in tables and plots.
        router_aux_loss_coef: weight of the load-balance loss in the loss; 0 leaves it out.
        output_router_logits: return the routers' scores and the load-balance loss with every call.

    Source: config.json of lamm-mit/Cephalo-Phi-3-MoE-vision-128k-3x4b-beta.
    """

    model_type = "phi3_v_moe"
    attribute_map = {
        "num_experts_per_tok": "k",
        "num_experts": "num_expert_models",
        "num_local_experts": "num_expert_models",
    }
    base_model_ep_plan = {  # transformers' words for: each process has whole experts of its own
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    k: int = 1
    num_expert_models: int = 2
    use_embeddings_in_router: bool = False
    router: str = "cephalo"
    moe_layers: list[int] | None = None
    expert_names: list[str] | None = None
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        from .routing import ROUTERS

        if not 1 <= self.k <= self.num_expert_models:
            raise ValueError(
                f"k={self.k} experts per token, but num_expert_models={self.num_expert_models}: "
                "choose 1 <= k <= num_expert_models."
            )
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is not one of {', '.join(sorted(ROUTERS))}.")
        if self.expert_names is None:
            self.expert_names = [f"expert {number}" for number in range(self.num_expert_models)]
        if len(self.expert_names) != self.num_expert_models:
            raise ValueError(
                f"{len(self.expert_names)} expert_names for {self.num_expert_models} experts."
            )
        if self.moe_layers is not None and not self.moe_layers:
            raise ValueError("moe_layers is empty: name at least one layer, or None for all.")
        wrong = set(self.moe_layers or []) - set(range(self.num_hidden_layers))
        if wrong:
            raise ValueError(
                f"moe_layers {sorted(wrong)}: the model has layers 0..{self.num_hidden_layers - 1}."
            )
        self.output_router_logits = self.output_router_logits or self.router_aux_loss_coef > 0
        super().__post_init__(**kwargs)

    @classmethod
    def from_dense(
        cls, config: Phi3VConfig, num_experts: int, experts_per_token: int = 1, **fields: Any
    ) -> Phi3VMoeConfig:
        """The configuration of a mixture whose every part but the experts is like `config`."""
        dense = {key: value for key, value in config.to_dict().items() if key not in DENSE_ONLY}
        return cls(**dense, num_expert_models=num_experts, k=experts_per_token, **fields)

    @property
    def mixed_layers(self) -> list[int]:
        """Layers that have experts, in order."""
        return sorted(set(self.moe_layers or range(self.num_hidden_layers)))
