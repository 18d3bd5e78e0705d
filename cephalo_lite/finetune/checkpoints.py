"""Checkpoints of a training that are complete or not there, and that load as they were saved.

Transformers' trainer writes `checkpoint-N` in place: a run that is killed, or whose disk is full,
while it writes leaves a folder that the next run takes for good. It also reads weights by their
names in memory, while it writes them by their published names: of a mixture that is trained whole
hardly a tensor would be restored, with a warning only.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import rotate_checkpoints

RNG_STATES = "rng_state*.pth"  # one per process
PARTIAL = ".checkpoint-{step}.partial"


class WholeCheckpoints:
    """Mix-in before `transformers.Trainer` or a subclass: exact resumption from whole checkpoints.

    Example:
        >>> class MyTrainer(WholeCheckpoints, SeededOrder, Trainer):  # doctest: +SKIP
        ...     pass
    """

    _partial: Path | None = None  # written to at present

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint beside its place, and give it its name when all processes are done.

        Raises:
            OSError: it could not be written; older checkpoints are as they were.
        """
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        target, self._partial = folder / f"checkpoint-{step}", folder / PARTIAL.format(step=step)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._name(self._partial / target.name, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(_what_to_do(target, error)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(folder), limit, best)

    def _name(self, written: Path, target: Path) -> None:
        """Put a checkpoint in its place; the state in it must not name the place it came from."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(written / "trainer_state.json"))
        if target.exists():  # of a run before this one
            shutil.rmtree(target)
        os.rename(written, target)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Read weights as `from_pretrained` does, and keep the dtype of each parameter.

        Raises:
            ValueError: the model is spread over processes, and its optimizer was not saved.
        """
        model = self.model if model is None else model
        if self.is_distributed_loading_by_transformers:
            raise ValueError(
                f"{resume_from_checkpoint} has the weights of a model that was spread over "
                "processes, and not the optimizer: load the weights from there (load_sharded), "
                "and train in another output_dir."
            )
        if isinstance(model, PeftModel):
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            for name, parameter in model.named_parameters():  # PEFT makes halves float32
                parameter.data = parameter.data.to(dtypes[name])
        else:
            _restore(model, resume_from_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on with the random numbers of this process.

        Raises:
            ValueError: the checkpoint was written by another number of processes.
        """
        if checkpoint is not None:
            wrote, world = len(list(Path(checkpoint).glob(RNG_STATES))), self.args.world_size
            if wrote != world:
                raise ValueError(
                    f"{checkpoint} was written by {wrote} processes and this run has {world}: "
                    f"start {wrote}, or begin anew from its weights."
                )
        super()._load_rng_state(checkpoint)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a training's folder, oldest first; those half written do not count."""
    found = (path for path in Path(folder).glob("checkpoint-*") if path.is_dir())
    return sorted((path for path in found if re.search(r"-\d+$", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_partial(folder: str | Path) -> None:
    """Remove what a run that was killed had begun to write."""
    for partial in Path(folder).glob(PARTIAL.format(step="*")):
        shutil.rmtree(partial)


@torch.no_grad()
def _restore(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights of a checkpoint of the same class into a model, bit by bit."""
    # from_pretrained knows one dtype: the one that holds all of the model's without loss
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    saved = type(model).from_pretrained(folder, dtype=dtype, local_files_only=True).state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(saved[name])


def _what_to_do(target: Path, error: Exception) -> str:
    others = [path.name for path in checkpoints(target.parent) if path != target]
    good = f"{others[-1]} is whole, and a resumed run goes on from it" if others else "None is left"
    free = shutil.disk_usage(target.parent).free / 1e9
    return (
        f"{target} could not be written ({type(error).__name__}: {error}). {free:.3f} GB are free "
        f"there: if that is too little, make room. {good}."
    )
