"""Several processes that train one model: checked, where engines would train several in silence.

What was seen of transformers 5.23, accelerate 1.14 and two processes on a CPU, without any error:

- `torchrun` without `use_cpu=True` makes two trainings, each of rank 0 of 1, in one folder;
- `evaluate()` before `train()` makes accelerate take the model for wrapped, and no process learns
  of the others' gradients; of a sharded model the optimizer holds copies, see `scatter`;
- FSDP as accelerate offers it becomes DDP, so every process holds all of the model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import DistributedConfig, PreTrainedModel
from transformers import __version__ as TRANSFORMERS
from transformers.distributed.fsdp import is_fsdp_managed_module

from ..loading import load

EXPERTS_APART = "5.23"  # before this transformers, experts that are apart learn something else


class TrainsTogether:
    """Mix-in before `transformers.Trainer`: all processes train one model, or an error says why.

    Example:
        >>> class MyTrainer(TrainsTogether, Trainer):  # doctest: +SKIP
        ...     pass
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_processes(self.args.world_size)
        if is_sharded(self.model):
            check_trainable(self.model, self.args.optim.value)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # What an evaluation leaves behind: see above
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        scatter(self.model)
        model, loader = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        sharding = bool(self.args.fsdp) or _is_set("ACCELERATE_USE_FSDP")
        check_wrapped(model, self.args.world_size, sharding)
        return model, loader


def check_processes(known: int, started: int | None = None) -> None:
    """Check that a trainer knows of all processes.

    Args:
        known: what it takes their number for, `trainer.args.world_size`.
        started: how many were started; None is what the launcher says (`WORLD_SIZE`).

    Raises:
        RuntimeError: the numbers differ.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if started is None else started
    if started != known:
        raise RuntimeError(
            f"{started} processes were to be started, and the trainer knows of {known}: each would "
            "train a model of its own. On a CPU pass use_cpu=True to the training's arguments and "
            "start with torchrun --nproc-per-node N; `accelerate launch --cpu` starts one process "
            "whatever --num_processes says."
        )


def check_wrapped(model: nn.Module, processes: int, sharding: bool = False) -> None:
    """Check that something brings the gradients of all processes together.

    Args:
        model: as the trainer calls it, `trainer.model_wrapped`.
        processes: their number.
        sharding: whether the weights were asked to be spread over them.

    Raises:
        RuntimeError: nothing does, or the model is whole in each process though it should not be.
    """
    if processes < 2:
        return
    if sharding and isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "FSDP was asked for, and accelerate made DDP of it: each process holds the whole model "
            "(so it is on every CPU). Load the model with load_sharded instead."
        )
    engine = type(model).__module__.partition(".")[0] == "deepspeed"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (engine or isinstance(model, DistributedDataParallel) or is_fsdp_managed_module(base)):
        raise RuntimeError(
            f"{processes} processes, but the {type(model).__name__} is neither in DDP nor sharded: "
            "each process would train a model of its own. Train with TrainsTogether, or call "
            "train() before evaluate()."
        )


def check_trainable(model: nn.Module, optimizer: str) -> None:
    """Check that what is asked of a sharded model can be done.

    Args:
        model: from `load_sharded`, with adapters or not.
        optimizer: its name in transformers.

    Raises:
        ValueError: an optimizer that cannot step parts of tensors, or gates as copies.
    """
    if "8bit" in optimizer or "paged" in optimizer or "bnb" in optimizer:
        raise ValueError(
            f"{optimizer} does not know tensors that are spread over processes: take adamw_torch."
        )
    if any(".modules_to_save." in name for name, _ in model.named_parameters()):
        raise ValueError(
            "A sharded model's gates cannot be trained as copies beside adapters: adapt other "
            "groups, or train the gates alone (moe_gates)."
        )


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over processes. Sizes are in bytes, of parameters."""

    processes: int
    whole: int  # of the model
    mine: int  # of what this process holds

    @property
    def share(self) -> float:
        """The part of the model that this process holds."""
        return self.mine / self.whole


def load_sharded(
    path_or_id: str | Path,
    fsdp_size: int | None = None,
    ep_size: int = 1,
    bf16: bool = False,
    **options,
) -> tuple[PreTrainedModel, object, Sharding]:
    """Load a model of which each process holds a part (FSDP2, experts apart by choice).

    Start the script with `torchrun --nproc-per-node N`.

    Args:
        path_or_id: see `load`.
        fsdp_size: processes that share the model; None is all of them.
        ep_size: processes that share the experts, each with whole experts of its own; it divides
            `fsdp_size` and the number of experts. 1 shares them like everything else.
        bf16: compute in bfloat16. The weights, the sums of gradients and the steps are float32 in
            any case.
        options: further options of `load`, but no dtype.

    Returns:
        The model, its processor, and how it is spread.

    Raises:
        RuntimeError: one process, this process holds more than its part, or experts apart with a
            release of transformers that trains them otherwise than one process would.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes < 2:
        raise RuntimeError("One process holds all of a model: start several by torchrun, or load.")
    if ep_size > 1 and Version(TRANSFORMERS) < Version(EXPERTS_APART):
        raise RuntimeError(
            f"ep_size={ep_size} needs transformers {EXPERTS_APART} (and Python 3.11): with "
            f"{TRANSFORMERS} experts that are apart learn something else than whole ones, without "
            "an error. Leave ep_size at 1."
        )
    config = DistributedConfig(
        fsdp_size=fsdp_size or processes, ep_size=ep_size, fsdp_mixed_precision=bf16
    )
    model, processor = load(path_or_id, torch.float32, distributed_config=config, **options)
    spread = sharding(model)
    if not is_fsdp_managed_module(model) or spread.share > 1.1 / config.fsdp_size:
        raise RuntimeError(
            f"This process holds {spread.share:.0%} of the model, not a part of "
            f"{config.fsdp_size}: transformers did not shard it."
        )
    use_in_every_process(model)
    return model, processor, spread


def sharding(model: nn.Module) -> Sharding:
    """How much of a model's parameters is in this process between two steps."""
    scatter(model)
    whole = mine = 0
    for parameter in model.parameters():
        whole += parameter.numel() * parameter.element_size()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        mine += local.numel() * local.element_size()
    together = torch.distributed.is_initialized()
    return Sharding(torch.distributed.get_world_size() if together else 1, whole, mine)


def scatter(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left gathered of a model.

    FSDP2 keeps the head, the last norm and the vision tower whole after an evaluation. An optimizer
    that is made then holds these copies, and those parts of the model never learn.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, with adapters or not, came from `load_sharded`."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


def use_in_every_process(model: PreTrainedModel) -> None:
    """Give the vision tower a gradient, of zeros, in batches without pictures as well.

    FSDP2 adds up the gradients that each process has. Where one has rows of text and another has
    pictures they are not of the same tensors, and the processes wait for each other or break off.

    Args:
        model: a sharded model; one without pictures stays as it is.
    """
    seeing = getattr(model.base_model, "vision_embed_tokens", None)
    if seeing is None:
        return

    tower = seeing.img_processor
    unused = (tower.encoder.layers[-1], tower.post_layernorm)  # by pictures as well

    def touch(module, args, embedded: torch.Tensor) -> torch.Tensor:
        skipped = {p for part in unused for p in part.parameters()}
        learnt = [p for p in seeing.parameters() if p.requires_grad and p not in skipped]
        if not (torch.is_grad_enabled() and learnt):
            return embedded
        return embedded + 0 * sum(p.flatten()[0] for p in learnt).to(embedded.dtype)

    model.get_input_embeddings().register_forward_hook(touch)


@torch.no_grad()
def difference(model: nn.Module) -> float:
    """Greatest difference of any parameter between the processes; 0 where all hold the same.

    Args:
        model: its parameters that are spread over processes are left out. Call it in all of them.
    """
    worst = 0.0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) or not parameter.is_floating_point():
            continue
        high, low = parameter.detach().clone(), parameter.detach().clone()
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
        worst = max(worst, float((high - low).abs().max()))
    return worst


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
