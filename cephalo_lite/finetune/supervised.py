"""Supervised fine-tuning: a model learns the answers in rows, and what came of it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel

from .adapters import adapter_report, add_adapters, without_rename_warnings
from .callbacks import JUDGED, Judge, ask_judge
from .checkpoints import checkpoints, remove_partial, step_of
from .exact_gates import exact_gates
from .groups import freeze, parameter_groups, unfreeze
from .recipes import Recipe
from .report import SFTReport, series
from .router_watch import RouterRecord
from .stopping import StopOnRequest, stops_on_interrupt
from .tokenizing import Reader, Tokenized, sees, tokenize_rows
from .trainer import BALANCE, ROUTER_Z, ROUTING, AnswerTrainer, make_trainer, release

logger = logging.getLogger(__name__)
NOTE = "training.json"  # lies beside the checkpoints and says what they are of


def sft(
    model: PreTrainedModel | PeftModel,
    tokenizer: Reader,
    train_rows: Iterable[Mapping[str, Any]],
    eval_rows: Iterable[Mapping[str, Any]],
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = True,
    progress: bool = True,
    skip_bad: bool = False,
    judge: Judge | None = None,
) -> tuple[PreTrainedModel | PeftModel, SFTReport]:
    """Fine-tune a model on the answers in rows of text, of pictures, or of both.

    Args:
        model: a Phi-3, Phi-3.5-MoE, Phi-3-Vision or a mixture of these, in 4 bits or not. It gets
            the recipe's adapters, unless it has some: then these are trained further. Without
            adapters in the recipe it is changed itself.
        tokenizer: its tokenizer, with a chat template; of a model that sees, its processor.
        train_rows: see `conversation_of`: a list, a `datasets.Dataset` or an `IterableDataset`,
            which is read as the training goes and needs the recipe's `max_steps`.
        eval_rows: rows that are held out; see `split_rows`.
        recipe: every number of the run; see `RECIPES`.
        output_dir: gets a checkpoint at every evaluation.
        resume: go on from the last checkpoint in `output_dir`, if there is one; False deletes what
            checkpoints are there and starts anew.
        progress: show progress bars.
        skip_bad: leave rows out that cannot be learnt (the report names them), rather than stop.
        judge: a function that asks the model (in eval mode) and gives numbers by name, such as the
            share of exact answers; it is called before, at every evaluation, and after.

    Returns:
        The model as it was trained, in eval mode, and what came of it. With adapters on experts the
        mixture has its experts one by one; after merging, `fuse` puts them together.

    Raises:
        ValueError: a group of the recipe matches nothing, rows that cannot be learnt
            (`BadRowsError`), a model in 4 bits that does not pass `preflight`, or checkpoints in
            `output_dir` of another training.
        KeyboardInterrupt: Ctrl-C; it says which checkpoint was written.

    Example:
        >>> train, held_out = split_rows(load_rows("rows.jsonl"))  # doctest: +SKIP
        >>> model, report = sft(  # doctest: +SKIP
        ...     model, processor, train, held_out, moe_adapters, "runs/moe"
        ... )
        >>> print(report.table())  # doctest: +SKIP
    """
    _check(model, tokenizer, train_rows, recipe)
    train = tokenize_rows(train_rows, tokenizer, recipe.max_length, skip_bad, progress)
    held_out = tokenize_rows(eval_rows, tokenizer, recipe.max_length, skip_bad, progress)
    if train.cut or train.dropped:
        logger.warning("%d rows were cut and %d dropped (max_length)", train.cut, train.dropped)
    if train.bad or held_out.bad:
        logger.warning("%d rows to train on and %d held out were skipped, as they cannot be learnt",
                       len(train.bad), len(held_out.bad))  # fmt: skip
    streamed = isinstance(train.dataset, IterableDataset)
    rows = None if streamed else len(train.dataset)
    with PartialState(cpu=model.device.type == "cpu").main_process_first():
        checkpoint = _last_checkpoint(Path(output_dir), recipe, rows, resume)
    model = _prepare(model, recipe)
    before = ask_judge(judge, model) if judge else {}
    try:
        with exact_gates(model):
            trainer = make_trainer(
                model,
                tokenizer,
                train.dataset,
                held_out.dataset,
                recipe,
                output_dir,
                progress,
                judge,
            )
            eval_before, seconds = _train(trainer, checkpoint)
            history = list(trainer.state.log_history)
        with without_rename_warnings():
            eval_after = trainer.evaluate()["eval_loss"]
    finally:
        release(model)
    report = _report(trainer, history, train)
    report.resumed_at = step_of(checkpoint) if checkpoint else 0
    report.eval_before, report.eval_after = eval_before, eval_after
    report.rows, report.seconds = rows, seconds
    if judge:
        report.judged.insert(0, (report.resumed_at, before))
        report.judged.append((report.steps, ask_judge(judge, model)))
    return model, report


def _check(model, tokenizer, train_rows, recipe: Recipe) -> None:
    """Raise a ValueError where these do not fit each other."""
    seeing = "vision" in parameter_groups(model)
    if seeing != sees(tokenizer):
        needed = "processor" if seeing else "tokenizer"
        raise ValueError(f"{type(model).__name__} needs its {needed}, not a {type(tokenizer)}.")
    if recipe.packing and seeing:
        raise ValueError("packing puts rows of text together: set it to False for pictures.")
    if isinstance(train_rows, IterableDataset) and recipe.max_steps < 1:
        raise ValueError("How many rows are streamed is not known: set max_steps in the recipe.")
    if isinstance(model, PeftModel) and recipe.whole:
        raise ValueError(
            "The model has adapters, and the recipe trains without: merge them (merge_adapters)."
        )


def _prepare(model: PreTrainedModel | PeftModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The model with what the recipe trains; in 4 bits checked."""
    if recipe.whole == ("all",):
        unfreeze(model)
    elif recipe.whole:
        freeze(model, recipe.whole)
    elif not isinstance(model, PeftModel):
        model, _ = add_adapters(
            model, recipe.groups, recipe.r, recipe.alpha, recipe.dropout, recipe.seed
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "is_loaded_in_4bit", False):
        from ..quantize import preflight

        preflight(model)
    return model


def _train(trainer: AnswerTrainer, checkpoint: Path | None) -> tuple[float, float]:
    """Loss of the held-out rows before, and seconds of training."""
    stop = StopOnRequest()
    trainer.add_callback(stop)
    with without_rename_warnings():
        before = trainer.evaluate()["eval_loss"]
        trainer.state.log_history.clear()
        began = time.perf_counter()
        with stops_on_interrupt(stop):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        folder = Path(trainer.args.output_dir)
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the "
            f"checkpoint is {folder / f'checkpoint-{trainer.state.global_step}'}. Call sft again "
            "with the same arguments to go on from it."
        )
    return before, time.perf_counter() - began


def _report(trainer: AnswerTrainer, history: list[dict[str, Any]], train: Tokenized) -> SFTReport:
    """What the trainer's log tells."""
    model = trainer.model
    trained = {
        group: sum(p.numel() for _, p in members if p.requires_grad)
        for group, members in parameter_groups(model).items()
    }
    return SFTReport(
        adapters=adapter_report(model) if isinstance(model, PeftModel) else None,
        trained={group: count for group, count in trained.items() if count},
        steps=trainer.state.global_step,
        resumed_at=0,
        eval_before=0.0,
        eval_after=0.0,
        losses=series(history, "loss"),
        eval_losses=series(history, "eval_loss"),
        balance_losses=series(history, BALANCE),
        z_losses=series(history, ROUTER_Z),
        routing=[RouterRecord(e["step"], **e[ROUTING]) for e in history if ROUTING in e],
        judged=[(entry["step"], entry[JUDGED]) for entry in history if JUDGED in entry],
        cut=train.cut,
        dropped=train.dropped,
        bad=train.bad,
    )


def _last_checkpoint(folder: Path, recipe: Recipe, rows: int | None, resume: bool) -> Path | None:
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
    if not note.is_file() or note.read_text("utf-8") != this:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(this, "utf-8")
    return found[-1] if resume and found else None
