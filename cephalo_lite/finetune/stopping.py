"""Ctrl-C ends a training after the step that it is in, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StopOnRequest(TrainerCallback):
    """Saves and stops where `requested` is set; with several processes, where it is in any."""

    def __init__(self):
        self.requested = False

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = control.should_training_stop = True


@contextmanager
def stops_on_interrupt(stop: StopOnRequest) -> Iterator[None]:
    """Within this context the first Ctrl-C is a request to stop, the next an interrupt as ever.

    Outside the main thread, which alone may handle signals, nothing changes.
    """

    def handle(number, frame):
        stop.requested = True
        signal.signal(signal.SIGINT, before)
        logger.warning("Stopping after this step, with a checkpoint; interrupt again to stop now.")

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
