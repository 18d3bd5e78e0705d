"""One look per expert in every plot: a colour, and a shape for those who see fewer colours."""

from __future__ import annotations

from typing import NamedTuple

KNOWN = {"materials": "#0F8B8D", "general": "#D9772B", "latex": "#6C4FB3"}
FREE = ("#0F8B8D", "#D9772B", "#6C4FB3", "#C99A1B", "#2F6DB5", "#B0416F", "#5B7F2B", "#6B6B6B")
MARKERS = "os^Dv*Ph"
UNDERLINES = ("solid", "dashed", "dotted", "double")  # names of CSS
INK, FAINT = "#22303A", "#7A868E"


class Look(NamedTuple):
    """How an expert is drawn."""

    colour: str  # "#rrggbb"
    marker: str  # of matplotlib
    underline: str  # of CSS


def looks(expert_names: list[str]) -> list[Look]:
    """A look for each expert: the project's own colours by name, free ones for all others."""
    taken = [KNOWN[name.lower()] for name in expert_names if name.lower() in KNOWN]
    free = [colour for colour in FREE if colour not in taken] or list(FREE)
    result, used = [], 0
    for number, name in enumerate(expert_names):
        colour = KNOWN.get(name.lower())
        if colour is None:
            colour, used = free[used % len(free)], used + 1
        marker = MARKERS[number % len(MARKERS)]
        result.append(Look(colour, marker, UNDERLINES[number % len(UNDERLINES)]))
    return result


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """A colour mixed with white, as numbers in 0..1: 0 is white, 1 the colour itself."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(1 - strength * (1 - channel) for channel in channels)


def ink_on(shade: tuple[float, float, float]) -> str:
    """The colour of writing that is easier to read on a shade (contrast as in WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.077 else INK
