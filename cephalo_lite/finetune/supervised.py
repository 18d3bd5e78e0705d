"""Supervised fine-tuning of text models: adapters that learn to answer, and what came of it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import AdapterReport, adapter_report, add_adapters, without_rename_warnings
from .checkpoints import checkpoints, remove_partial, step_of
from .recipes import Recipe
from .text_data import tokenize_rows
from .trainer import make_trainer, release

logger = logging.getLogger(__name__)
NOTE = "training.json"  # lies beside the checkpoints and says what they are of


@dataclass
class SFTReport:
    """What a training did. Losses are in nats per answer token, the mean of the batches."""

    adapters: AdapterReport  # what was trained
    steps: int  # in all, those before a resumption included
    resumed_at: int  # step of the checkpoint that it went on from, or 0
    eval_before: float  # loss of the held-out rows
    eval_after: float
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, with balance loss)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    balance_losses: list[tuple[int, float]] = field(default_factory=list)  # where asked for
    rows: int = 0  # trained on
    cut: int = 0  # of these, longer than max_length
    dropped: int = 0  # left out, as no answer was within max_length
    seconds: float = 0.0  # of training, evaluations included

    def table(self) -> str:
        """Before and after as aligned text."""
        trained = self.adapters.total.parameters
        rows = (
            ("", "before", "after"),
            ("held-out loss", f"{self.eval_before:.3f}", f"{self.eval_after:.3f}"),
            ("adapter parameters", "0", f"{trained:,}"),
            ("steps", f"{self.resumed_at}", f"{self.steps}"),
        )
        return "\n".join(f"{name:<20}{one:>14}{two:>14}" for name, one, two in rows)


def sft(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = True,
    progress: bool = True,
) -> tuple[PeftModel, SFTReport]:
    """Fine-tune a model's adapters on the answers in rows of text.

    Args:
        model: a Phi-3 or Phi-3.5-MoE, in 4 bits or not. It gets the recipe's adapters, unless it
            has some: then these are trained further.
        tokenizer: its tokenizer, with a chat template.
        train_rows: see `messages_of`.
        eval_rows: rows that are held out; see `split_rows`.
        recipe: every number of the run.
        output_dir: gets a checkpoint at every evaluation.
        resume: go on from the last checkpoint in `output_dir`, if there is one; False deletes what
            checkpoints are there and starts anew.
        progress: show a progress bar.

    Returns:
        The model with trained adapters, in eval mode, and the losses.

    Raises:
        ValueError: a group of the recipe matches nothing, rows without answers, a model in 4 bits
            that does not pass `preflight`, or checkpoints in `output_dir` of another training.

    Example:
        >>> train, held_out = split_rows(rows)  # doctest: +SKIP
        >>> model, report = sft(  # doctest: +SKIP
        ...     model, tokenizer, train, held_out, phi35_moe, "runs/moe"
        ... )
        >>> print(report.table())  # doctest: +SKIP
    """
    train = tokenize_rows(train_rows, tokenizer, recipe.max_length)
    held_out = tokenize_rows(eval_rows, tokenizer, recipe.max_length)
    if train.cut or train.dropped:
        logger.warning("%d rows were cut and %d dropped (max_length)", train.cut, train.dropped)
    checkpoint = _last_checkpoint(Path(output_dir), recipe, len(train.dataset), resume)
    if not isinstance(model, PeftModel):
        model, _ = add_adapters(
            model, recipe.groups, recipe.r, recipe.alpha, recipe.dropout, recipe.seed
        )
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        from ..quantize import preflight

        preflight(model)
    trainer = make_trainer(
        model, tokenizer, train.dataset, held_out.dataset, recipe, output_dir, progress
    )
    try:
        with without_rename_warnings():
            before = trainer.evaluate()["eval_loss"]
            trainer.state.log_history.clear()
            began = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds = time.perf_counter() - began
            history = list(trainer.state.log_history)
            after = trainer.evaluate()["eval_loss"]
    finally:
        release(model)

    def series(key: str) -> list[tuple[int, float]]:
        return [(entry["step"], float(entry[key])) for entry in history if key in entry]

    report = SFTReport(
        adapters=adapter_report(model),
        steps=trainer.state.global_step,
        resumed_at=step_of(checkpoint) if checkpoint else 0,
        eval_before=before,
        eval_after=after,
        losses=series("loss"),
        eval_losses=series("eval_loss"),
        balance_losses=series("aux_loss"),
        rows=len(train.dataset),
        cut=train.cut,
        dropped=train.dropped,
        seconds=seconds,
    )
    return model, report


def _last_checkpoint(folder: Path, recipe: Recipe, rows: int, resume: bool) -> Path | None:
    """The checkpoint to go on from; notes in the folder which training its checkpoints are of."""
    note = folder / NOTE
    this = json.dumps({"recipe": asdict(recipe), "rows": rows}, indent=2)
    remove_partial(folder)
    found = checkpoints(folder)
    if not resume:
        for checkpoint in found:
            shutil.rmtree(checkpoint)
    elif found and (not note.is_file() or note.read_text("utf-8") != this):
        raise ValueError(
            f"{folder} holds checkpoints of another recipe or of other rows: choose another "
            "output_dir, or resume=False to delete them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(this, "utf-8")
    return found[-1] if resume and found else None
