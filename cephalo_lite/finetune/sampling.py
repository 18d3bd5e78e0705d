"""The order of rows: given by seed and epoch alone, so that a resumed run finds its place in it.

Transformers groups rows by length with the random numbers at hand when an epoch starts, which a
resumed run has not: it would see other batches, and of several processes each its own order. Plain
shuffling is seeded, but with several processes accelerate does not tell a resumed run's sampler
which epoch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochOrder(Sampler):
    """All rows in a random order per epoch, by choice with rows of like length in a batch."""

    def __init__(
        self,
        rows: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: list[int] | None = None,
        batch: int = 1,
    ):
        """Describe the order.

        Args:
            rows: how many there are.
            seed: the same seed gives the same order.
            epoch: tells the number of the epoch that begins.
            lengths: tokens of each row, to group them by; None shuffles.
            batch: rows that are to be of like length.
        """
        self.rows, self.seed, self.epoch = rows, seed, epoch
        self.lengths, self.batch = lengths, batch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


class SeededOrder:
    """Mix-in before `transformers.Trainer`: rows come in an `EpochOrder`."""

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            return EpochOrder(len(sampler), seed, self._epoch, sampler.lengths, sampler.batch_size)
        if isinstance(sampler, RandomSampler):
            return EpochOrder(len(sampler), seed, self._epoch)
        return sampler  # of a stream, or in the rows' own order

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)
