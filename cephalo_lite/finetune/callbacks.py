"""What is seen of a training while it runs: a bar of its steps, and what a judge says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging as transformers_logging

Judge = Callable[[PreTrainedModel], dict[str, float]]
JUDGED = "judged"  # in logs


class Judged(TrainerCallback):
    """Asks the judge at every evaluation but the last, after which the model is done anyway."""

    def __init__(self, judge: Judge):
        self.judge = judge

    def on_evaluate(self, args, state, control, model=None, **kwargs):  # noqa: D102
        if 0 < state.global_step < state.max_steps:
            told = {"step": state.global_step, JUDGED: ask_judge(self.judge, model)}
            state.log_history.append(told)  # and so in the checkpoint


def ask_judge(judge: Judge, model: PreTrainedModel | PeftModel) -> dict[str, float]:
    """The judge's numbers; the training's random numbers and the model's mode stay as they are."""
    training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        told = judge(model.eval())
    model.train(training)
    return {name: float(value) for name, value in told.items()}


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
def bars(shown: bool) -> Iterator[None]:
    """Within this context the bars of `datasets` and transformers are shown, or not."""
    before = (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())
    if not shown:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if not before[0]:
            datasets.enable_progress_bars()
        if before[1]:
            transformers_logging.enable_progress_bar()
