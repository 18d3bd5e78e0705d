"""The mixtures with experts that can be quantised and adapted: `SequentialExperts` in each layer.

Each is the maintained class with another module for the experts. Names on disk stay the published
ones, in both directions. Their rules are registered for these classes alone, so that the fused
classes, which share the model type, load as ever.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PhimoeConfig, PhimoeForCausalLM, PhimoeModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from ..moe import Phi3VMoeConfig, Phi3VMoeForCausalLM, Phi3VMoeModel
from ..moe.build.files import write_json
from ..moe.checkpoints import register_published_names
from .experts import PhimoeExpert, SequentialExperts


class SavesAsPublished:
    """Mix-in: config.json names the class whose layout this is, which everybody knows."""

    published_class: type

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As transformers' own; what it wrote loads in `published_class`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [self.published_class.__name__]
        file = Path(save_directory) / "config.json"
        if file.is_file():  # only the main process writes it
            fields = json.loads(file.read_text("utf-8"))
            fields["architectures"] = self.config.architectures
            write_json(file, fields)


class SequentialPhimoeModel(PhimoeModel):
    """Phi-3.5-MoE's decoder with its experts one by one."""

    def __init__(self, config: PhimoeConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp.experts = SequentialExperts(
                PhimoeExpert(config) for _ in range(config.num_local_experts)
            )
        self.post_init()


class SequentialPhimoeForCausalLM(SavesAsPublished, PhimoeForCausalLM):
    """Phi-3.5-MoE with its experts one by one.

    Example:
        >>> model = SequentialPhimoeForCausalLM.from_pretrained("microsoft/Phi-3.5-MoE-instruct")
    """

    published_class = PhimoeForCausalLM

    def __init__(self, config: PhimoeConfig):
        super().__init__(config)
        self.model = SequentialPhimoeModel(config)
        self.post_init()


class SequentialPhi3VMoeModel(Phi3VMoeModel):
    """The decoder of a Phi-3-Vision mixture with its experts one by one."""

    def __init__(self, config: Phi3VMoeConfig):
        super().__init__(config)
        for number in config.mixed_layers:
            self.layers[number].mlp.experts = SequentialExperts(
                Phi3MLP(config) for _ in range(config.num_expert_models)
            )
        self.post_init()


class SequentialPhi3VMoeForCausalLM(SavesAsPublished, Phi3VMoeForCausalLM):
    """A Phi-3-Vision mixture with its experts one by one."""

    published_class = Phi3VMoeForCausalLM
    model_class = SequentialPhi3VMoeModel


def register() -> None:
    """Teach transformers' checkpoint reader the published names of these classes, and PEFT with it.

    They are the rules of the fused class, but for those that stack the experts' matrices.
    """
    register_published_names()
    for model, decoder in (
        (SequentialPhimoeForCausalLM, SequentialPhimoeModel),
        (SequentialPhi3VMoeForCausalLM, SequentialPhi3VMoeModel),
    ):
        fused = get_checkpoint_conversion_mapping(model.config_class.model_type)
        rules = [rule for rule in fused if not any("experts" in p for p in rule.source_patterns)]
        register_checkpoint_conversion_mapping(model.__name__, rules, overwrite=True)
        # Inside the model its rules count already; without this the fused ones would count as well.
        register_checkpoint_conversion_mapping(decoder.__name__, [], overwrite=True)
