"""The text of a trace, coloured by expert: as HTML and as a figure."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

from .colours import FAINT, INK, looks, tint
from .record import RoutingTrace

MARK = re.compile(r"<(\|\w+\||s|/s|unk)>")
STRIPS = {
    "solid": "-",
    "dashed": (0, (3, 1.5)),
    "dotted": (0, (1, 1.2)),
    "double": (0, (6, 1, 1, 1)),
}


class Chip(NamedTuple):
    """A token, or all tokens of a picture, as drawn."""

    text: str
    kind: str  # "image", "prompt" or "answer"
    shares: list[float]  # of the experts, E
    strength: float  # how clearly the first of them leads, in 0..1

    @property
    def expert(self) -> int:
        """The number of the expert that did most."""
        return max(range(len(self.shares)), key=self.shares.__getitem__)


def pieces(line: list[int | None], tokenizer) -> list[str]:
    """The text that each token adds; "" for None (a picture) and while a character is incomplete.

    Args:
        line: token ids of one row.
        tokenizer: the tokenizer that made them.
    """
    texts, shown, context = [], "", []
    for token in line:
        if token is None:
            texts.append("")
            context, shown = [], ""
            continue
        context = [*context[-8:], token] if not shown.endswith("\ufffd") else [*context, token]
        before, now = tokenizer.decode(context[:-1]).rstrip("\ufffd"), tokenizer.decode(context)
        new = now[len(before) :] if now.startswith(before) else tokenizer.decode([token])
        texts.append("" if new.endswith("\ufffd") else new)
        shown = now
    return texts


def chips(trace: RoutingTrace, layer: int | None = None) -> list[Chip]:
    """The tokens of one row as chips, each picture as one.

    Args:
        trace: of one row, with texts.
        layer: number of a decoder layer; None takes all layers together.
    """
    if trace.pieces is None:
        raise ValueError("The trace has no texts: pass the processor to trace_routing or tracing.")
    expert, strength = trace.leading(layer)
    load = trace.load()  # (L, N, E)
    load = load.mean(dim=0) if layer is None else load[trace.layers.index(layer)]
    result = []
    runs = [index for index, kind in enumerate(trace.kinds) if kind != "image"]
    starts = {int((trace.positions == picture.start).nonzero()[0, 0]) for picture in trace.pictures}
    starts |= {
        i for i, k in enumerate(trace.kinds) if k == "image" and (not i or trace.kinds[i - 1] != k)
    }
    ends = sorted({*starts, *runs, len(trace)})
    for start in sorted(starts | set(runs)):
        if trace.kinds[start] != "image":
            shares = load[start].tolist()
            result.append(
                Chip(trace.pieces[start], trace.kinds[start], shares, float(strength[start]))
            )
            continue
        end = next(e for e in ends if e > start)
        shares = load[start:end].mean(dim=0)
        number = 1 + sum(chip.kind == "image" for chip in result)
        text = f" picture {number}: {end - start} tokens "
        result.append(Chip(text, "image", shares.tolist(), float(shares.max())))
    return result


def _tell(chip: Chip, names: list[str]) -> str:
    order = sorted(range(len(names)), key=lambda e: -chip.shares[e])
    return ", ".join(
        f"{names[e]} {100 * chip.shares[e]:.0f} %" for e in order if chip.shares[e] >= 0.005
    )


def text_html(trace: RoutingTrace, layer: int | None = None, row: int = 0) -> str:
    """The text as HTML: each token in the colour of its expert, the deeper the clearer.

    Pointing at a token tells the shares of all experts. In a notebook: `HTML(trace.text_html())`.

    Args:
        trace: with texts.
        layer: number of a decoder layer; None takes all layers together.
        row: of the batch.

    Raises:
        ValueError: the trace has no texts, the row is empty, or the layer has no experts.
    """
    style = looks(trace.expert_names)
    spans = []
    for name, look in zip(trace.expert_names, style, strict=True):
        spans.append(_span(html.escape(name), look, 0.45, "") + "&ensp;")
    spans.append("<br>")
    for chip in chips(trace.select(row=row), layer):
        text = html.escape(chip.text).replace("\n", "↵")
        tip = html.escape(_tell(chip, trace.expert_names), quote=True)
        if chip.kind == "image":
            spans.append(_bar(text, chip, style, tip))
        else:
            faint = f"color:{FAINT};" if MARK.fullmatch(chip.text) else ""
            bold = "font-weight:600;" if chip.kind == "answer" else ""
            spans.append(_span(text, style[chip.expert], 0.55 * chip.strength, tip, faint + bold))
        spans.append("<br>" * chip.text.count("\n"))
    return (
        f'<div style="background:#fff;color:{INK};padding:10px 14px;border-radius:8px;'
        'line-height:2;white-space:pre-wrap;font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px">'
        + "".join(spans)
        + "</div>"
    )


def _span(text: str, look, strength: float, tip: str, more: str = "") -> str:
    red, green, blue = (round(255 * channel) for channel in tint(look.colour, strength))
    title = f' title="{tip}"' if tip else ""
    return (
        f'<span{title} style="background:rgb({red},{green},{blue});'
        f'border-bottom:3px {look.underline} {look.colour};padding:1px 0;{more}">{text}</span>'
    )


def _bar(text: str, chip: Chip, style, tip: str) -> str:
    """A picture: a chip filled with the experts' shares, like a bar."""
    stops, reached = [], 0.0
    for share, look in zip(chip.shares, style, strict=True):
        red, green, blue = (round(255 * channel) for channel in tint(look.colour, 0.45))
        shade = f"rgb({red},{green},{blue})"
        stops.append(f"{shade} {100 * reached:.1f}%,{shade} {100 * (reached + share):.1f}%")
        reached += share
    fill = f"linear-gradient(90deg,{','.join(stops)})"
    look = f"background:{fill};border-radius:4px;padding:3px 0"
    return f'<span title="{tip}" style="{look}">{text}</span>'


def plot_text(trace: RoutingTrace, layer: int | None = None, row: int = 0, width: int = 90):
    """The text as a figure: each token on the colour of its expert, the deeper the clearer.

    Args:
        trace: with texts.
        layer: number of a decoder layer; None takes all layers together.
        row: of the batch.
        width: characters of a line.

    Returns:
        The matplotlib axes.

    Raises:
        ValueError: the trace has no texts, the row is empty, or the layer has no experts.
    """
    import matplotlib.pyplot as plt

    style = looks(trace.expert_names)
    cells, lines = _wrap(chips(trace.select(row=row), layer), width)
    legend, column = [], 0
    for number, name in enumerate(trace.expert_names):
        shares = [float(number == other) for other in range(len(style))]
        legend.append((-1.4, column, f" {name} ", Chip("", "prompt", shares, 0.8)))
        column += len(name) + 4
    width = max(column + len(text) for _, column, text, _ in [*cells, *legend])
    advance = 10 * 0.602 / 72  # inches of a character of DejaVu Sans Mono at 10 points
    figure = plt.figure(figsize=(advance * (width + 2), 0.27 * (lines + 1.9)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-1, width + 1)
    ax.set_ylim(lines - 0.3, -2.2)
    ax.set_axis_off()
    for line, column, text, chip in [*legend, *cells]:
        _draw(ax, line, column, text, chip, style)
    return ax


def _draw(ax, line: float, column: int, text: str, chip: Chip, style) -> None:
    """One chip on its place: shade, underline, writing."""
    from matplotlib.patches import Rectangle

    look, left = style[chip.expert], float(column)
    single = chip.kind != "image"
    parts = (
        [(1.0, tint(look.colour, 0.55 * chip.strength))]
        if single
        else [
            (share, tint(own.colour, 0.45)) for share, own in zip(chip.shares, style, strict=True)
        ]
    )
    for share, shade in parts:
        ax.add_patch(Rectangle((left, line - 0.42), share * len(text), 0.84, color=shade, lw=0))
        left += share * len(text)
    if single:
        ax.plot(
            [column + 0.12, column + len(text) - 0.12],
            [line + 0.42] * 2,
            color=look.colour,
            lw=2,
            ls=STRIPS[look.underline],
            solid_capstyle="butt",
            dash_capstyle="butt",
        )
    ax.text(
        column,
        line,
        text,
        family="monospace",
        size=10,
        va="center_baseline",
        parse_math=False,
        color=FAINT if MARK.fullmatch(chip.text) else INK,
        weight="bold" if chip.kind == "answer" else "normal",
    )


def _wrap(row: list[Chip], width: int) -> tuple[list[tuple[int, int, str, Chip]], int]:
    """(line, column, text, chip) of each chip, broken at `width`, and the number of lines."""
    cells, line, column = [], 0, 0
    for chip in row:
        for part in re.split(r"(\n)", chip.text):
            text = "↵" if part == "\n" else part
            while text:
                if column and column + len(text) > width:
                    line, column = line + 1, 0
                head, text = text[:width], text[width:]
                cells.append((line, column, head, chip))
                column += len(head)
            if part == "\n":
                line, column = line + 1, 0
    return cells, line + (column > 0)
