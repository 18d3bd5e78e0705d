"""How the tiny family is trained: first the eyes, then the whole base, then an expert's MLPs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from tqdm.auto import trange

from ..phi3v import Phi3VForCausalLM, Phi3VProcessor
from .alphabet import CLASSES, pages
from .data import Row, batch, crops


def start_tower(model: Phi3VForCausalLM, rows: list[Row], processor: Phi3VProcessor) -> None:
    """Give an untrained tower a good start: whitened patch filters, 2-D sine position table."""
    tower = model.model.vision_embed_tokens.img_processor
    pixels, _ = crops([row.picture for row in rows], processor)
    size = tower.config.patch_size
    patches = pixels[:, 1].unfold(2, size, size).unfold(3, size, size)  # (n, 3, h, w, p, p)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)  # (n h w, 3 p p)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    width = tower.config.hidden_size
    best = vectors[:, -width:] * (values[-width:] + 0.1 * values[-width:].mean()).rsqrt()
    side = tower.config.image_size // size
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.copy_(0.3 * best.T.reshape(width, 3, size, size))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        waves = torch.exp(torch.arange(width // 4) * (-math.log(100.0) / (width // 4)))
        angles = [axis.reshape(-1, 1) * waves for axis in (y, x)]
        table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
        tower.embeddings.position_embedding.weight[1:].copy_(0.3 * table)


class Schedule:
    """AdamW with warm-up, cosine decay and clipping over a fixed number of steps."""

    def __init__(self, parameters, steps: int, lr: float, weight_decay: float = 0.05):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, foreach=True
        )
        warm = max(1, steps // 20)
        self.decay = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: min(
                (s + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))
            ),
        )

    def step(self, loss: torch.Tensor) -> None:
        """One step down."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.decay.step()


def train_eyes(
    model: Phi3VForCausalLM,
    rows: list[Row],
    processor: Phi3VProcessor,
    steps: int,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
    page_count: int = 6000,
) -> list[float]:
    """Teach the tower to see, before it is asked to speak.

    Two tasks at once: name the symbol that each patch of an alphabet page lies on (local detail),
    and tell from the mean of all patches which words the answers about a picture use (the whole).

    Returns:
        The loss of the first task, in nats per patch, for each step.
    """
    generator = np.random.default_rng(seed)
    embedding = model.model.vision_embed_tokens
    tower = embedding.img_processor.config
    drawn, symbols = pages(page_count, tower.patch_size, seed)
    words = torch.zeros(len(rows), model.config.vocab_size)
    for number, row in enumerate(rows):
        for _, labels in row.turns:
            words[number, [token for token in labels if token >= 0]] = 1
    seen = words.sum(0) > 0
    what, which = (
        nn.Linear(tower.hidden_size, CLASSES),
        nn.Linear(tower.hidden_size, int(seen.sum())),
    )
    trained = [*embedding.img_processor.parameters(), *what.parameters(), *which.parameters()]
    schedule = Schedule(trained, steps, lr)
    losses = []
    for _ in (bar := trange(steps, desc="eyes", disable=not progress)):
        leaves = generator.integers(len(drawn), size=batch_size)
        chosen = generator.integers(len(rows), size=batch_size // 2)
        paper, _ = crops([*drawn[leaves]], processor)
        world, _ = crops([rows[i].picture for i in chosen], processor)
        features = embedding.patch_features(
            torch.cat([paper[:, 1], world[:, 1]])
        )  # (n, patches, C)
        here, there = features.split([len(leaves), len(chosen)])
        local = nn.functional.cross_entropy(what(here).flatten(0, 1), symbols[leaves].flatten())
        guess = which(there.mean(1))
        whole = nn.functional.binary_cross_entropy_with_logits(guess, words[chosen][:, seen])
        schedule.step(local + 2 * whole)
        losses.append(local.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def train(
    model: Phi3VForCausalLM,
    rows: list[Row],
    processor: Phi3VProcessor,
    steps: int,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    description: str = "base",
    progress: bool = True,
    weight_decay: float = 0.05,
) -> list[float]:
    """Train what is trainable to answer; rows are drawn in epochs, in a seeded random order."""
    generator = np.random.default_rng(seed)
    schedule = Schedule(model.parameters(), steps, lr, weight_decay)
    order, losses = [], []
    model.train()
    for _ in (bar := trange(steps, desc=description, disable=not progress)):
        while len(order) < batch_size:
            order += generator.permutation(len(rows)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        loss = model(**batch([rows[i] for i in chosen], processor, generator), use_cache=False).loss
        schedule.step(loss)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


class Neighbourly(nn.Module):
    """An expert's MLP in training: some tokens take the base's MLP instead, as in a mixture.

    Args:
        mlp: the MLP to train.
        base: the base's MLP, frozen.
        share: of tokens that take the base's, drawn anew for each sequence between 0 and twice
            this.
    """

    def __init__(self, mlp: nn.Module, base: nn.Module, share: float):
        super().__init__()
        self.mlp, self.base, self.share = mlp, base.requires_grad_(False), share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D) in and out."""
        if not self.training or not self.share:
            return self.mlp(hidden)
        share = 2 * self.share * torch.rand(hidden.shape[0], 1, 1)
        away = torch.rand(*hidden.shape[:2], 1) < share  # (B, T, 1)
        return torch.where(away, self.base(hidden), self.mlp(hidden))


def train_expert(
    base: Phi3VForCausalLM, rows: list[Row], processor: Phi3VProcessor, share: float = 0.15, **how
) -> Phi3VForCausalLM:
    """A copy of the base whose MLPs have learnt a domain; all else is the base's, bit for bit."""
    import copy

    expert = copy.deepcopy(base).requires_grad_(False)
    for layer, original in zip(expert.model.layers, base.model.layers, strict=True):
        layer.mlp = Neighbourly(layer.mlp.requires_grad_(True), copy.deepcopy(original.mlp), share)
    train(expert, rows, processor, **how)
    for layer in expert.model.layers:
        layer.mlp = layer.mlp.mlp
    return expert.requires_grad_(True)
