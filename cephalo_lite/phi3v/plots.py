"""Pictures of what the processor does: how a picture is cut, and what becomes of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .image_processing import load_picture
from .token_kinds import token_kinds

INK, FAINT, VISION = "#22303A", "#7A868E", "#2F6DB5"
COLOURS = {
    "padding": "#F4F5F6",
    "mark": "#E3E6EA",
    "text": "#FFFFFF",
    "answer": "#D5EEE0",
    "detail": "#8FB4DE",
    "overview": "#C6DAF0",
    "line end": "#2F6DB5",
    "separator": "#C99A1B",
}
PICTURE_PARTS = ("detail", "overview", "line end", "separator")
ADVANCE = 10 * 0.602 / 72  # inches of a character of DejaVu Sans Mono at 10 points
LINE = 0.27  # inches of a line
MEANING = {"mark": "mark of the chat", "answer": "has a label", "text": "text"}


def plot_crops(image_processor, picture: Any, num_crops: int | None = None):
    """A picture as it comes, resized and padded with the cuts drawn in, and its overview.

    Args:
        image_processor: a `Phi3VImageProcessor`.
        picture: anything that `load_picture` opens.
        num_crops: instead of the processor's own.

    Returns:
        The three matplotlib axes: as given, detail, overview.
    """
    import matplotlib.pyplot as plt

    picture = load_picture(picture)
    padded = image_processor.hd_transform(picture, num_crops)
    width, height = image_processor.hd_size(*picture.size, num_crops)
    size, per_crop = image_processor.crop_size, image_processor.num_img_tokens
    columns, rows = padded.width // size, padded.height // size
    overview = _overview(image_processor, picture, num_crops)
    sides = [picture.width / picture.height, padded.width / padded.height, 1.0]
    high = min(2.6, 8.4 / sum(sides))  # inches
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(high * sum(sides) + 0.6, high + 0.75),
        width_ratios=sides,
        layout="constrained",
    )
    tokens = image_processor.num_tokens(rows, columns)
    titles = (
        f"given: {picture.width} x {picture.height}",
        f"resized to {width} x {height},\npadded to {padded.width} x {padded.height}",
        f"overview:\n{size} x {size}",
    )
    for ax, shown, title in zip(axes, (picture, padded, overview), titles, strict=True):
        ax.imshow(np.asarray(shown), extent=(0, shown.width, shown.height, 0))
        ax.set_title(title, size=9, color=INK, loc="left")
        ax.set(xticks=[], yticks=[])
        ax.set_anchor("N")
        ax.spines[:].set_color("#C9D0D6")
    for row in range(rows):
        for column in range(columns):
            _frame(axes[1], column * size, row * size, size, row * columns + column + 1, per_crop)
    _frame(axes[2], 0, 0, size, 0, per_crop)
    side = round(per_crop**0.5)
    figure.suptitle(
        f"{rows} x {columns} crops and the overview: {rows * columns + 1} x {per_crop} tokens\n"
        f"+ {(rows + 1) * side} line ends + 1 separator = {tokens} image tokens",
        size=10,
        color=INK,
    )
    return tuple(axes)


def _overview(image_processor, picture: Image.Image, num_crops: int | None) -> Image.Image:
    """The global crop as the model gets it."""
    crop = image_processor.preprocess(picture, num_crops)["pixel_values"][0, 0].permute(1, 2, 0)
    pixels = crop.numpy() * image_processor.image_std + image_processor.image_mean  # (s, s, 3)
    return Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))


def _frame(ax, left: float, top: float, size: int, number: int, tokens: int) -> None:
    """The border of a crop, with its number in pixel_values and its tokens."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((left, top), size, size, fill=False, edgecolor=VISION, lw=2))
    ax.text(
        left + size / 2,
        top + 0.95 * size,
        f"crop {number}: {tokens}",
        ha="center",
        va="bottom",
        size=8,
        color="white",
        bbox={"boxstyle": "round,pad=0.25", "facecolor": VISION, "edgecolor": "none"},
    )


def plot_prompt(
    processor, inputs: Mapping[str, Any], row: int = 0, width: int = 76, order: str = "sub_glb"
):
    """A prompt token by token, coloured by kind; each picture as the grid its tokens come from.

    Args:
        processor: the `Phi3VProcessor` that made the inputs.
        inputs: input_ids, and image_sizes with pictures; tokens with labels stand out.
        row: of the batch.
        width: characters of a line.
        order: `hd_transform_order` of the model.

    Returns:
        The matplotlib axes.
    """
    import matplotlib.pyplot as plt

    ids, kinds = inputs["input_ids"][row].tolist(), token_kinds(processor, inputs, row, order)
    boxes: list[Box] = []
    x, y = 0.0, 1.6  # below the legend
    runs = groupby(range(len(ids)), key=lambda i: kinds[i] in PICTURE_PARTS)
    for is_picture, run in runs:
        positions = list(run)
        if is_picture:
            y += (x > 0) + 0.1
            caption = f"{len(positions)} image tokens, positions {positions[0]} to {positions[-1]}"
            boxes.append(Box(0, y, len(caption), 1, None, caption, FAINT))
            boxes += _grid([kinds[i] for i in positions], y + 1)
            x, y = 0.0, max(box.y + box.height for box in boxes) + 0.2
            continue
        for i in positions:
            text = "·" if kinds[i] == "padding" else processor.tokenizer.decode([ids[i]])
            shown = text.replace("\n", "↵") or "▁"
            if x and x + len(shown) > width:
                x, y = 0.0, y + 1
            colour = FAINT if kinds[i] in ("mark", "padding") else INK
            boxes.append(Box(x, y, len(shown), 1, COLOURS[kinds[i]], shown, colour))
            x += len(shown)
            if "\n" in text:
                x, y = 0.0, y + 1
    return _draw(_legend(kinds) + boxes, plt)


class Box(NamedTuple):
    """One token, or a word of the legend, in units of a character and a line."""

    x: float
    y: float
    width: float
    height: float
    fill: str | None
    text: str = ""
    ink: str = INK


def _grid(kinds: list[str], top: float) -> list[Box]:
    """The tokens of pictures as they lie: detail, separator and overview beside each other."""
    parts = [list(run) for _, run in groupby(kinds, key=lambda kind: kind == "separator")]
    lines = max(part.count("line end") for part in parts)
    high = min(0.56, 10 / lines)  # a tall picture is drawn smaller
    wide = high * LINE / ADVANCE  # so that tokens are squares
    boxes, left = [], 0.0
    for part in parts:
        column = row = right = 0
        for kind in part:
            boxes.append(Box(left + column * wide, top + row * high, wide, high, COLOURS[kind]))
            right, column = max(right, column + 1), column + 1
            if kind == "line end":
                row, column = row + 1, 0
        left += (right + 0.5) * wide
    return boxes


def _legend(kinds: list[str]) -> list[Box]:
    boxes, x = [], 0.0
    for kind, colour in COLOURS.items():
        if kind in kinds:
            text = f" {MEANING.get(kind, kind)} "
            ink = "white" if kind == "line end" else INK
            boxes.append(Box(x, 0, len(text), 1, colour, text, ink))
            x += len(text) + 1
    return boxes


def _draw(boxes: list[Box], plt):
    from matplotlib.patches import Rectangle

    width = max(box.x + box.width for box in boxes)
    height = max(box.y + box.height for box in boxes)
    figure = plt.figure(figsize=(ADVANCE * (width + 2), LINE * (height + 0.6)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-1, width + 1)
    ax.set_ylim(height + 0.3, -0.3)
    ax.set_axis_off()
    for box in boxes:
        if box.fill:
            edge = "white" if not box.text else "#C9D0D6"
            place = (box.x, box.y + 0.06 * bool(box.text))
            high = box.height - 0.12 * bool(box.text)
            ax.add_patch(
                Rectangle(place, box.width, high, facecolor=box.fill, edgecolor=edge, lw=0.7)
            )
        ax.text(
            box.x,
            box.y + box.height / 2,
            box.text,
            family="monospace",
            size=10,
            va="center_baseline",
            parse_math=False,
            color=box.ink,
        )
    return ax
