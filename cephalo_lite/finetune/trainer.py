"""TRL's trainer for a recipe: set up, watched, and taken off the model again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .adapters import without_rename_warnings
from .checkpoints import WholeCheckpoints
from .recipes import Recipe


class AnswerTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's trainer with whole checkpoints, whose held-out loss is that of the answers alone."""

    def prediction_step(self, *args, **kwargs):
        """One batch of held-out rows; TRL would add the load-balance loss to theirs."""
        balanced, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.aux_loss_enabled = balanced


@without_rename_warnings()
def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    recipe: Recipe,
    output_dir: str | Path,
    progress: bool = True,
) -> AnswerTrainer:
    """A trainer that learns the labels of tokenized rows.

    Args:
        model: has adapters.
        tokenizer: gives the padding; stays as it is.
        train: columns input_ids and labels.
        held_out: the same.
        recipe: every number.
        output_dir: gets the checkpoints.
        progress: show a bar of the steps.
    """
    name_experts(model.config)
    gates = {n: p.dtype for n, p in model.named_parameters() if ".modules_to_save." in n}
    with _bars_of_datasets(progress):
        trainer = AnswerTrainer(
            model=model,
            args=arguments(recipe, model, output_dir),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[StepBar()] if progress else [],
        )
    for name, dtype in gates.items():  # TRL casts all that is trained on 4 bits to bfloat16
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(recipe: Recipe, model: PeftModel, output_dir: str | Path) -> SFTConfig:
    """A recipe in the words of TRL 1.16."""
    mixture = hasattr(model.config, "output_router_logits")
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
        router_aux_loss_coef=recipe.balance if mixture else None,
        eval_strategy="steps",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.eval_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=False,  # no autocast: the weights' own dtype says how to compute
        use_cpu=model.device.type == "cpu",
        report_to="none",
        disable_tqdm=True,  # see StepBar
        dataset_kwargs={"skip_prepare_dataset": not recipe.packing},  # tokenized and cut already
    )


def name_experts(config: PreTrainedConfig) -> None:
    """Let TRL find the number of experts, which Phi-3.5-MoE's configuration has by another name.

    Without it the load-balance loss ends in `AttributeError: ... no attribute 'num_experts'`. The
    alias is the class's, so that no config.json gets a new field.
    """
    kind = type(config)
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        kind.attribute_map = {**kind.attribute_map, "num_experts": "num_local_experts"}


@without_rename_warnings()
def release(model: PeftModel) -> None:
    """Take off what the trainer has put on a model, so that it answers as before; eval mode."""
    model.eval()
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    base.__dict__.pop("forward", None)  # TRL's, whose head computes the loss as well


class StepBar(TrainerCallback):
    """A bar of the training steps with the last losses; the trainer's own writes a line a step."""

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tuning")
        self.shown = {}

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if hasattr(self, "bar"):
            losses = {key: logs[key] for key in ("loss", "eval_loss") if key in logs}
            self.shown |= {key: f"{float(loss):.3f}" for key, loss in losses.items()}
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.close()


@contextmanager
def _bars_of_datasets(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()
