"""Which expert saw which token: the record, its shares, entropies and table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from .picture import TracedPicture

KINDS = ("image", "prompt", "answer")


@dataclass
class RoutingTrace:
    """What the routers of a mixture decided for N tokens in L layers; padding is left out.

    A batch is one trace of all its rows' tokens; `select(row=0)` is the trace of one row. The last
    token of a generated answer is in no trace: it is written, but never read by a layer.

    Tokens with several experts count for each of them, by weight (`by="weight"`, the default) or
    equally (`by="choice"`), together 1 per token and layer. With one expert per token that is the
    same.
    """

    probs: torch.Tensor  # (L, N, E) float32, softmax of the routers' scores
    weights: torch.Tensor  # (L, N, K) float32, of the chosen experts
    chosen: torch.Tensor  # (L, N, K) numbers of the chosen experts
    ids: torch.Tensor  # (N,) token ids
    rows: torch.Tensor  # (N,) rows of the batch
    positions: torch.Tensor  # (N,) columns of the padded batch
    kinds: list[str]  # N entries of KINDS
    layers: list[int]  # numbers of the L decoder layers that have experts
    expert_names: list[str]  # E names
    pieces: list[str] | None = None  # N texts of the tokens, where a tokenizer was given
    pictures: list[TracedPicture] = field(default_factory=list)  # in the order of the text

    def __len__(self) -> int:
        return len(self.kinds)

    def select(self, kind: str | None = None, row: int | None = None) -> RoutingTrace:
        """The trace of some tokens.

        Args:
            kind: "image", "prompt" (text that is no answer) or "answer"; None is all.
            row: of the batch; None is all.

        Raises:
            ValueError: the kind is unknown, or there are no such tokens.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
        keep = torch.ones(len(self), dtype=torch.bool)
        if kind is not None:
            keep &= torch.tensor([own == kind for own in self.kinds], dtype=torch.bool)
        if row is not None:
            keep &= self.rows == row
        if not keep.any():
            where = "" if row is None else f" in row {row}"
            raise ValueError(f"The trace has no {kind or ''} tokens{where}.".replace("  ", " "))
        index = keep.nonzero()[:, 0]  # (n,)
        whole = kind in (None, "image")
        return replace(
            self,
            probs=self.probs[:, index],
            weights=self.weights[:, index],
            chosen=self.chosen[:, index],
            ids=self.ids[index],
            rows=self.rows[index],
            positions=self.positions[index],
            kinds=[self.kinds[i] for i in index],
            pieces=None if self.pieces is None else [self.pieces[i] for i in index],
            pictures=[p for p in self.pictures if whole and row in (None, p.row)],
        )

    def load(self, by: str = "weight") -> torch.Tensor:
        """What each expert takes of each token, (L, N, E); sums to 1 over the experts.

        Args:
            by: "weight" or "choice".
        """
        if by not in ("weight", "choice"):
            raise ValueError(f"by={by!r} is neither 'weight' nor 'choice'.")
        taken = self.weights if by == "weight" else torch.ones_like(self.weights)
        taken = taken / taken.sum(dim=-1, keepdim=True)
        return torch.zeros_like(self.probs).scatter_add(-1, self.chosen, taken)

    def shares_per_layer(
        self, kind: str | None = None, row: int | None = None, by: str = "weight"
    ) -> torch.Tensor:
        """Share of the tokens that each expert takes in each layer, (L, E)."""
        return self.select(kind, row).load(by).mean(dim=1)

    def shares(
        self, kind: str | None = None, row: int | None = None, by: str = "weight"
    ) -> dict[str, float]:
        """Share of all tokens and layers that each expert takes, by name; they sum to 1."""
        mean = self.shares_per_layer(kind, row, by).mean(dim=0)
        return dict(zip(self.expert_names, mean.tolist(), strict=True))

    def dead_experts(self) -> dict[str, list[int]]:
        """Experts that no token chose, each with the layers where that is so."""
        used = self.load("choice").amax(dim=1) > 0  # (L, E)
        dead = {
            name: [layer for layer, alive in zip(self.layers, column, strict=True) if not alive]
            for name, column in zip(self.expert_names, used.T.tolist(), strict=True)
        }
        return {name: layers for name, layers in dead.items() if layers}

    def entropy(self) -> torch.Tensor:
        """Mean entropy of the routers' probabilities per layer, (L,) nats: 0 sure, ln E not."""
        return torch.special.entr(self.probs).sum(dim=-1).mean(dim=-1)

    def leading(self, layer: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert that did most for each token, and how clearly.

        Args:
            layer: number of a decoder layer; None takes all layers together.

        Returns:
            (N,) numbers of the experts; (N,) their share of the token over the layers or, for one
            layer, the router's probability, both in 0..1.
        """
        if layer is None:
            strength, expert = self.load().mean(dim=0).max(dim=-1)
            return expert, strength
        if layer not in self.layers:
            raise ValueError(f"Layer {layer} has no experts; the layers {self.layers} have.")
        at = self.layers.index(layer)
        expert = self.load()[at].argmax(dim=-1)  # (N,)
        return expert, self.probs[at].gather(-1, expert[:, None])[:, 0]

    def table(self) -> str:
        """Shares by kind of token and by layer, with entropies, as plain text."""
        head = [*self.expert_names, "entropy"]
        lines = [
            f"{len(self)} tokens, {len(self.layers)} layers, {self.chosen.shape[-1]} of "
            f"{len(self.expert_names)} experts per token; entropy in nats, at most "
            f"{math.log(len(self.expert_names)):.2f}",
            "",
        ]
        rows = [["tokens", "", *head]]
        for kind in (None, *(kind for kind in KINDS if kind in self.kinds)):
            part = self.select(kind)
            rows.append([kind or "all", str(len(part)), *_percent(part.shares().values())])
            rows[-1].append(f"{part.entropy().mean():.2f}")
        lines += _align(rows) + [""]
        rows = [["layer", *head]]
        for number, shares, entropy in zip(
            self.layers, self.shares_per_layer().tolist(), self.entropy().tolist(), strict=True
        ):
            rows.append([str(number), *_percent(shares), f"{entropy:.2f}"])
        lines += _align(rows)
        for name, layers in self.dead_experts().items():
            lines.append(f"{name}: chosen by no token in layer {', '.join(map(str, layers))}")
        return "\n".join(lines)

    def plot_layers(self, kind: str | None = None, row: int | None = None, ax=None):
        """Heat map layers x experts; see `trace.plots.plot_layers`."""
        from .plots import plot_layers

        return plot_layers(self, kind, row, ax)

    def plot_picture(self, number: int = 1, layer: int | None = None, row: int = 0):
        """A picture as the model saw it under the experts of its patches; see `trace.plots`."""
        from .plots import plot_picture

        return plot_picture(self, number, layer, row)

    def plot_text(self, layer: int | None = None, row: int = 0, width: int = 90):
        """The text, each token in the colour of its expert; see `trace.text.plot_text`."""
        from .text import plot_text

        return plot_text(self, layer, row, width)

    def text_html(self, layer: int | None = None, row: int = 0) -> str:
        """The same as HTML, for a notebook or a page; see `trace.text.text_html`."""
        from .text import text_html

        return text_html(self, layer, row)


def _percent(shares) -> list[str]:
    return [f"{100 * share:.1f} %" for share in shares]


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
