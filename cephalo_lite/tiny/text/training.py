"""Pre-training of the tiny text models: next-token prediction on packed blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from tqdm.auto import trange
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..training import Schedule


def pack(
    documents: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, block: int
) -> torch.Tensor:
    """Documents one after another, cut into blocks.

    Args:
        documents: (text, "") or, as two turns, (beginning, rest); see `reading.documents`.
        tokenizer: writes the ids; each document ends with its `eos_token`.
        block: tokens in a block.

    Returns:
        Ids (blocks, block), int64; what does not fill a last block is left out.
    """
    texts = [
        f"<|user|>\n{first}<|end|>\n<|assistant|>\n{rest}<|end|>\n{tokenizer.eos_token}"
        if rest
        else first + tokenizer.eos_token
        for first, rest in documents
    ]
    ids = [token for line in tokenizer(texts)["input_ids"] for token in line]
    whole = len(ids) // block * block
    return torch.tensor(ids[:whole]).view(-1, block)


def pretrain(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    steps: int,
    batch_size: int = 8,
    lr: float = 3e-3,
    balance: float = 0.02,
    seed: int = 0,
    description: str = "pre-training",
    progress: bool = True,
) -> list[float]:
    """Train a whole model to predict the next token.

    Args:
        model: dense, or a mixture, whose load-balance loss is then added.
        blocks: ids (blocks, block), drawn in epochs, in a seeded random order.
        steps: optimiser steps.
        batch_size: blocks a step.
        lr: highest learning rate.
        balance: weight of the load-balance loss.
        seed: of the order, and of the noise in a mixture's routing.
        description: of the progress bar.
        progress: show a progress bar.

    Returns:
        The next-token loss of each step, in nats per token.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    mixture = hasattr(model.config, "num_local_experts")
    schedule = Schedule(model.parameters(), steps, lr)
    order: list[int] = []
    losses = []
    model.train()
    for _ in (bar := trange(steps, desc=description, disable=not progress)):
        while len(order) < batch_size:
            order += generator.permutation(len(blocks)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        batch = blocks[chosen]
        options = {"output_router_logits": True} if mixture else {}
        outputs = model(batch, labels=batch, use_cache=False, **options)
        loss = outputs.loss
        schedule.step(loss + balance * outputs.aux_loss if mixture else loss)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses
