"""The recipes: every number of a fine-tuning run, in one table.

They are the QLoRA recipes of 2024 for Phi-3.5 with what silently failed put right: the experts have
adapters, Phi-3.5-mini's matrices go by their fused names, and only answers are learnt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; change a number with `dataclasses.replace`."""

    groups: tuple[str, ...]  # what gets adapters, see `add_adapters`
    r: int = 16  # rank
    alpha: int = 16  # adapters count alpha / r times
    dropout: float = 0.05  # of the adapters' inputs
    learning_rate: float = 1e-4
    schedule: str = "linear"  # of the learning rate, down to 0
    warmup: float = 0.1  # share of the steps in which it rises from 0
    optimizer: str = "paged_adamw_8bit"  # name of transformers
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # the 2024 default of the trainer
    batch: int = 4  # rows at once
    accumulation: int = 8  # batches per step
    epochs: float = 1.0
    max_steps: int = -1  # steps instead of epochs, if positive
    max_length: int = 512  # tokens per row; longer rows are cut at their end
    packing: bool = False  # several rows, kept apart, in one of max_length
    group_by_length: bool = False  # rows of like length in a batch, so that little is padding
    balance: float = 0.0  # weight of the load-balance loss of a mixture, as published
    eval_steps: int = 25  # steps between evaluations; checkpoints are written there as well
    checkpointing: bool = True  # compute activations twice rather than keep them
    held_out: float = 0.1  # share of the rows that `split_rows` holds out
    seed: int = 0  # of the split, the adapters and the order


phi35_moe = Recipe(groups=("attention", "experts"))  # add "router" to train the routers too
phi35_mini = Recipe(groups=("attention", "mlp"))
phi35_mini_code = Recipe(groups=("attention", "mlp"), group_by_length=True)

RECIPES = {
    "phi35_moe": phi35_moe,
    "phi35_mini": phi35_mini,
    "phi35_mini_code": phi35_mini_code,
}
