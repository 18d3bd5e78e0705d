"""TRL's trainer for a recipe: set up, watched, and taken off the model again."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from .adapters import without_rename_warnings
from .callbacks import Judge, Judged, StepBar, bars
from .checkpoints import WholeCheckpoints
from .collator import AnswerCollator
from .distributed import TrainsTogether, is_sharded
from .recipes import Recipe
from .router_watch import RouterWatch, by_depth
from .sampling import SeededOrder
from .tokenizing import Reader, sees
from .trained_files import load_trained, save_trained

BALANCE, ROUTER_Z, ROUTING = "balance_loss", "z_loss", "routing"  # in logs


class AnswerTrainer(WholeCheckpoints, SeededOrder, TrainsTogether, SFTTrainer):
    """TRL's trainer with losses of the routers in training, and whole checkpoints of what learns.

    Its loss of held-out rows is that of their answers alone.
    """

    def __init__(self, *args, balance: float = 0.0, router_z: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.balance, self.router_z = balance, router_z
        self.watch = RouterWatch(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of the answers; in training with the routers' losses, per batch."""
        if return_outputs or not self.model.training or not self.watch.layers:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.watch.watching():
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        balance, z = self.watch.losses(inputs.get("attention_mask"))
        # With a number of items the trainer leaves it to the loss to average over accumulation
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        extra = self.balance * balance + self.router_z * z
        return loss + extra.to(loss.device) / steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and in training how the routers did since the last time."""
        seen = self.watch.read(self._sum) if self.model.training else None
        if seen is not None:
            logs |= {BALANCE: fmean(seen["balance"]), ROUTER_Z: fmean(seen["z"])}
            logs |= {**by_depth(seen), ROUTING: seen}
        super().log(logs, start_time)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.args.device), "sum")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapters or groups alone where these are trained; what an engine shards as ever."""
        if state_dict is not None or self.is_distributed_loading_by_transformers:
            super()._save(output_dir, state_dict)
        elif self.args.should_save and self._in_part:
            save_trained(self.model, output_dir or self.args.output_dir)
        elif self.args.should_save:
            with bars(False):
                # PEFT would look its base up, on the hub if need be, with each checkpoint
                options = {"save_embedding_layers": False} if self._adapts else {}
                self.model.save_pretrained(output_dir or self.args.output_dir, **options)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self._in_part:
            load_trained(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _adapts(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def _in_part(self) -> bool:
        """Whether groups of a model are trained, so that a checkpoint need not hold all of it."""
        if self._adapts or self.is_distributed_loading_by_transformers:
            return False
        return not all(parameter.requires_grad for parameter in self.model.parameters())


@without_rename_warnings()
def make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: Reader,
    train: datasets.Dataset | datasets.IterableDataset,
    held_out: datasets.Dataset,
    recipe: Recipe,
    output_dir: str | Path,
    progress: bool = True,
    judge: Judge | None = None,
) -> AnswerTrainer:
    """A trainer that learns the labels of tokenized rows.

    Args:
        model: what is trained of it requires gradients: adapters or groups.
        tokenizer: gives the padding; stays as it is. For a model that sees, its processor.
        train: what `tokenize_rows` made.
        held_out: the same.
        recipe: every number.
        output_dir: gets the checkpoints.
        progress: show a bar of the steps.
        judge: see `sft`.
    """
    before = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    routing = _router_fields(model.config)
    callbacks = [Judged(judge)] if judge else []
    with bars(progress):
        trainer = AnswerTrainer(
            model=model,
            args=arguments(recipe, model, output_dir),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=copy.deepcopy(tokenizer),
            data_collator=AnswerCollator(tokenizer) if sees(tokenizer) else None,
            callbacks=[*callbacks, StepBar()] if progress else callbacks,
            balance=recipe.balance,
            router_z=recipe.router_z,
        )
    for name, value in routing.items():  # TRL writes its own into the model's configuration
        setattr(model.config, name, value)
    exact = model.dtype == torch.float32
    for name, dtype in before.items():  # TRL casts all that is trained on 4 bits to bfloat16
        if exact or ".lora_" not in name:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(recipe: Recipe, model: PreTrainedModel, output_dir: str | Path) -> SFTConfig:
    """A recipe in the words of TRL 1.16."""
    return SFTConfig(
        output_dir=str(output_dir),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # a number below 1 is a share
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
        gradient_checkpointing=recipe.checkpointing,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        max_length=recipe.max_length,
        packing=recipe.packing,
        eval_packing=False,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        # ours instead, in each layer: see router_watch
        router_aux_loss_coef=0.0 if hasattr(model.config, "output_router_logits") else None,
        eval_strategy="steps",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.eval_steps,
        save_total_limit=2,
        save_only_model=is_sharded(model),  # transformers cannot save its optimizer
        logging_strategy="steps",
        logging_steps=1,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=False,  # no autocast: the weights' own dtype says how to compute
        use_cpu=model.device.type == "cpu",
        ddp_find_unused_parameters=True,  # rows without a picture leave the tower alone
        report_to="none",
        disable_tqdm=True,  # see StepBar
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": not recipe.packing},  # tokenized and cut already
    )


@without_rename_warnings()
def release(model: PreTrainedModel | PeftModel) -> None:
    """Take off what the trainer has put on a model, so that it answers as before; eval mode."""
    model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    base.__dict__.pop("forward", None)  # TRL's, whose head computes the loss as well


def _router_fields(config) -> dict[str, object]:
    names = ("output_router_logits", "router_aux_loss_coef")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
