"""Rows as a batch: padded at the right, with the pictures of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..phi3v import Phi3VProcessor
from ..phi3v.labels import IGNORED


class AnswerCollator:
    """Batches of what `tokenize_rows` made, for `Trainer` and for TRL's `SFTTrainer`.

    TRL's own collator for pictures writes other tokens than generation reads: it tokenizes without
    the `<s>` that Phi-3-Vision has after each picture, and needs a template that marks answers.

    Args:
        processor: cuts pictures into crops; a tokenizer will do for text alone.

    Example:
        >>> data = tokenize_rows(rows, processor, 1024)  # doctest: +SKIP
        >>> Trainer(  # doctest: +SKIP
        ...     model, args, train_dataset=data.dataset, data_collator=AnswerCollator(processor)
        ... )
    """

    def __init__(self, processor: Phi3VProcessor | PreTrainedTokenizerBase):
        self.processor = processor
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            rows: with input_ids, labels and, where there are pictures, images.

        Returns:
            input_ids, attention_mask and labels (B, T); with pictures pixel_values (pictures,
            crops + 1, 3, s, s) and image_sizes (pictures, 2).
        """
        length = max(len(row["input_ids"]) for row in rows)

        def fill(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (length - len(values))]

        batch = {
            "input_ids": torch.tensor([fill(row["input_ids"], self.pad) for row in rows]),
            "attention_mask": torch.tensor([fill([1] * len(r["input_ids"]), 0) for r in rows]),
            "labels": torch.tensor([fill(row["labels"], IGNORED) for row in rows]),
        }
        pictures = [picture for row in rows for picture in row.get("images") or ()]
        if pictures:
            cut = self.processor.image_processor(pictures, return_tensors="pt")
            batch |= {name: cut[name] for name in ("pixel_values", "image_sizes")}
        return batch
