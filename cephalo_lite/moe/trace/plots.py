"""Plots of a trace: layers x experts, and the patches of a picture by expert."""

from __future__ import annotations

import numpy as np
import torch

from .colours import FAINT, INK, ink_on, looks, tint
from .record import RoutingTrace


def plot_layers(trace: RoutingTrace, kind: str | None = None, row: int | None = None, ax=None):
    """Heat map of the share of tokens that each expert takes in each layer.

    Each expert has its own colour; the last column is its share over all layers. A cross marks an
    expert that no token of the layer chose.

    Args:
        trace: of a mixture.
        kind: "image", "prompt" or "answer"; None is all tokens.
        row: of the batch; None is all rows.
        ax: matplotlib axes to draw into; made if not given.

    Returns:
        The axes.

    Raises:
        ValueError: the trace has no such tokens.
    """
    part = trace.select(kind, row)
    shares = part.load().mean(dim=1).T  # (E, L)
    dead = part.load("choice").amax(dim=1).T == 0
    experts, layers = shares.shape
    if ax is None:
        import matplotlib.pyplot as plt

        size = (1.9 + 0.46 * (layers + 1.4), 1.15 + 0.46 * experts)
        _, ax = plt.subplots(figsize=(max(4.6, min(size[0], 13)), size[1]), layout="constrained")
    columns = torch.cat([shares, torch.zeros(experts, 1), shares.mean(dim=1, keepdim=True)], dim=1)
    fill = np.ones((experts, layers + 2, 3))
    small = ax.get_window_extent().width / ax.figure.dpi / (layers + 2) < 0.25
    for expert, look in enumerate(looks(part.expert_names)):
        for column, share in enumerate(columns[expert].tolist()):
            if column == layers:
                continue  # a gap before the column of all layers
            fill[expert, column] = tint(look.colour, share**0.7)  # small shares stay visible
            if column < layers and dead[expert, column]:
                ax.plot(column, expert, marker="x", color=FAINT, ms=5, mew=1)
            elif not small or column > layers:
                weight = "bold" if column > layers else "normal"
                ax.text(
                    column,
                    expert,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    size=8.5,
                    color=ink_on(fill[expert, column]),
                    weight=weight,
                )
    ax.imshow(fill, aspect="auto", interpolation="nearest")
    ax.hlines([edge - 0.5 for edge in range(1, experts)], -0.5, layers + 1.5, color="white", lw=2)
    ax.vlines([edge - 0.5 for edge in range(1, layers)], -0.5, experts - 0.5, color="white", lw=1)
    every = max(1, round(layers / 16))
    ticks = list(range(0, layers, every))
    ax.set_xticks([*ticks, layers + 1], [*(str(part.layers[t]) for t in ticks), "all"])
    ax.set_yticks(range(experts), part.expert_names)
    for label, look in zip(ax.get_yticklabels(), looks(part.expert_names), strict=True):
        label.set_color(look.colour)
        label.set_fontweight("bold")
    ax.set_xlim(-0.5, layers + 1.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("layer", color=INK)
    ax.set_title(
        f"Share of the {kind + ' ' if kind else ''}tokens in % ({len(part)} tokens)",
        loc="left",
        size=10,
        color=INK,
    )
    return ax


def plot_picture(trace: RoutingTrace, number: int = 1, layer: int | None = None, row: int = 0):
    """A picture as the model saw it, each patch in the colour and shape of its expert.

    Left the detailed crops, right the overview (the same picture once more as one crop). The narrow
    strip beside each holds the tokens that end its lines; the mark between the two is the
    separator. The deeper the colour, the clearer the expert leads.

    Args:
        trace: with at least one picture.
        number: of the picture in its row, from 1.
        layer: number of a decoder layer; None takes all layers together.
        row: of the batch.

    Returns:
        The two matplotlib axes: detail and overview.

    Raises:
        ValueError: there is no such picture, or the layer has no experts.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    own = [picture for picture in trace.pictures if picture.row == row]
    if not 1 <= number <= len(own):
        raise ValueError(f"Picture {number}: row {row} of the trace has {len(own)} pictures.")
    picture = own[number - 1]
    inside = (trace.rows == row) & (trace.positions >= picture.start)
    index = (inside & (trace.positions < picture.start + picture.tokens)).nonzero()[:, 0]
    expert, strength = (picture.lay_out(values[index]) for values in trace.leading(layer))
    style = looks(trace.expert_names)

    high, wide = picture.detail.shape[:2]
    scale = (
        3.6 / min(high, wide) if max(high, wide) < 2 * min(high, wide) else 6.4 / max(high, wide)
    )
    size = (scale * wide + 0.62 * 3.6 + 0.9, max(scale * high, 0.62 * 3.6) + 1.0)
    figure, axes = plt.subplots(
        1, 2, figsize=size, width_ratios=[scale * wide, 0.62 * 3.6], layout="constrained"
    )
    for ax, name in zip(axes, ("detail", "overview"), strict=True):
        _draw(ax, getattr(picture, name), getattr(expert, name), getattr(strength, name), style)
        ends = (getattr(expert, f"{name}_ends"), getattr(strength, f"{name}_ends"))
        _draw_ends(ax, getattr(picture, name), *ends, style)
        ax.set_title(name, loc="left", size=10, color=INK)
        ax.set_anchor("N")
    look = style[int(expert.separator)]
    axes[1].plot(
        -0.08,
        0.5,
        marker=look.marker,
        color=look.colour,
        ms=7,
        mec="white",
        transform=axes[1].transAxes,
        clip_on=False,
    )
    axes[1].text(
        -0.08,
        0.43,
        "separator",
        rotation=90,
        ha="center",
        va="top",
        size=7,
        color=FAINT,
        transform=axes[1].transAxes,
    )
    share = (
        trace.load()[:, index].mean(dim=(0, 1))
        if layer is None
        else (trace.load()[trace.layers.index(layer), index].mean(dim=0))
    )
    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker=look.marker,
            ms=9,
            color=look.colour,
            mec="white",
            label=f"{name}  {100 * part:.0f} %",
        )
        for name, look, part in zip(trace.expert_names, style, share.tolist(), strict=True)
    ]
    where = "all layers" if layer is None else f"layer {layer}"
    figure.legend(
        handles=handles,
        ncols=min(4, len(handles)),
        loc="outside lower center",
        frameon=False,
        title=f"tokens of the picture, {where}",
        title_fontsize=9,
        fontsize=9,
    )
    return tuple(axes)


def _draw(ax, picture: torch.Tensor, expert: torch.Tensor, strength: torch.Tensor, style) -> None:
    """A picture (H, W, 3) in grey under its patches' experts (rows, columns)."""
    high, wide = picture.shape[:2]
    rows, columns = expert.shape
    grey = picture.numpy() @ np.array([0.299, 0.587, 0.114]) / 255  # colours are the experts'
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, wide, high, 0))
    overlay = np.zeros((rows, columns, 4))
    for number, look in enumerate(style):
        overlay[(expert == number).numpy(), :3] = tint(look.colour, 1)
    overlay[..., 3] = 0.2 + 0.45 * strength.numpy()
    ax.imshow(overlay, extent=(0, wide, high, 0), interpolation="nearest")
    width, height = wide / columns, high / rows
    y, x = np.mgrid[0:rows, 0:columns]
    inches = ax.get_position().width * ax.figure.get_size_inches()[0] / columns
    for number, look in enumerate(style):
        own = (expert == number).numpy()
        ax.scatter(
            (x[own] + 0.5) * width,
            (y[own] + 0.5) * height,
            s=(72 * inches * 0.24) ** 2,
            marker=look.marker,
            color=look.colour,
            edgecolors="white",
            linewidths=0.6,
        )
    edges = (expert[:, 1:] != expert[:, :-1]).nonzero().tolist()
    for r, c in edges:
        ax.plot([(c + 1) * width] * 2, [r * height, (r + 1) * height], color="white", lw=1.4)
    for r, c in (expert[1:] != expert[:-1]).nonzero().tolist():
        ax.plot([c * width, (c + 1) * width], [(r + 1) * height] * 2, color="white", lw=1.4)
    ax.set_axis_off()


def _draw_ends(
    ax, picture: torch.Tensor, expert: torch.Tensor, strength: torch.Tensor, style
) -> None:
    """The tokens at the ends of the lines (rows,), as a strip beside the picture."""
    high, wide = picture.shape[:2]
    inch = wide / (ax.get_position().width * ax.figure.get_size_inches()[0])  # pixels
    step, left, width = high / len(expert), wide + 0.06 * inch, 0.14 * inch
    for line, (number, clear) in enumerate(zip(expert.tolist(), strength.tolist(), strict=True)):
        shade = tint(style[number].colour, 0.3 + 0.7 * clear)
        ax.add_patch(_box(left, line * step, width, step, shade))
    ax.text(
        left + width / 2, high + 0.05 * inch, "ends", ha="center", va="top", size=7, color=FAINT
    )
    ax.set_xlim(0, left + width)


def _box(x: float, y: float, width: float, height: float, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=1)
