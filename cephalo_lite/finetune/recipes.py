"""The recipes: every number of a fine-tuning run, in one table.

Those of text are the QLoRA recipes of 2024 for Phi-3.5 with what silently failed put right: the
experts have adapters, Phi-3.5-mini's matrices go by their fused names, and only answers are learnt.
Those of mixtures have the numbers of the 2024 README of Cephalo's, and train gates so that they
move: with one expert per token they did not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; change a number with `dataclasses.replace`.

    Raises:
        ValueError: neither or both of `groups` and `whole` name something.
    """

    groups: tuple[str, ...] = ()  # what gets adapters, see `add_adapters`
    whole: tuple[str, ...] = ()  # or what is trained itself, see `freeze`; ("all",): everything
    r: int = 16  # rank of adapters
    alpha: int = 16  # adapters count alpha / r times
    dropout: float = 0.05  # of the adapters' inputs
    learning_rate: float = 1e-4
    schedule: str = "linear"  # of the learning rate, down to 0
    warmup: float = 0.1  # share of the steps in which it rises from 0; from 1 on: steps
    optimizer: str = "paged_adamw_8bit"  # name of transformers
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # the 2024 default of the trainer
    batch: int = 4  # rows at once
    accumulation: int = 8  # batches per step
    epochs: float = 1.0
    max_steps: int = -1  # steps instead of epochs, if positive
    max_length: int = 512  # tokens per row, pictures included; longer rows are cut at their end
    packing: bool = False  # several rows of text, kept apart, in one of max_length
    group_by_length: bool = False  # rows of like length in a batch, so that little is padding
    balance: float = 0.0  # weight of the load-balance loss of a mixture's routers
    router_z: float = 0.0  # weight of the z-loss, which keeps the routers' scores small
    eval_steps: int = 25  # steps between evaluations; checkpoints are written there as well
    checkpointing: bool = True  # compute activations twice rather than keep them
    held_out: float = 0.1  # share of the rows that `split_rows` holds out
    seed: int = 0  # of the split, the adapters and the order

    def __post_init__(self):
        if bool(self.groups) == bool(self.whole):
            raise ValueError(
                "A recipe names either groups (which get adapters) or whole (which are trained "
                f"themselves), not groups={self.groups} and whole={self.whole}."
            )


phi35_moe = Recipe(groups=("attention", "experts"))  # add "router" to train the routers too
phi35_mini = Recipe(groups=("attention", "mlp"))
phi35_mini_code = Recipe(groups=("attention", "mlp"), group_by_length=True)

PICTURES = {  # a picture of 16 crops is up to 2,509 tokens
    "batch": 1, "accumulation": 4, "max_length": 4096, "group_by_length": True,
    "weight_decay": 0.01, "balance": 0.01, "router_z": 0.001,
}  # fmt: skip
moe_gates = Recipe(whole=("gates",), **PICTURES | {"learning_rate": 5e-4})
moe_adapters = Recipe(groups=("attention", "experts", "gates"), **PICTURES)
moe_full = Recipe(whole=("all",), **PICTURES | {"learning_rate": 1e-5})
vision_adapters = Recipe(
    groups=("attention", "mlp"), **PICTURES | {"balance": 0.0, "router_z": 0.0}
)  # for a dense model

RECIPES = {
    "phi35_moe": phi35_moe,
    "phi35_mini": phi35_mini,
    "phi35_mini_code": phi35_mini_code,
    "moe_gates": moe_gates,
    "moe_adapters": moe_adapters,
    "moe_full": moe_full,
    "vision_adapters": vision_adapters,
}
