"""What makes notebooks light: figures that take few kilobytes."""

from __future__ import annotations

import base64
import io
from typing import Any


def small_figures(colours: int = 96, dpi: int = 80) -> None:
    """Let the notebook that calls this store its figures with a palette, at about a third the size.

    Outside a notebook it does nothing but set the resolution.

    Args:
        colours: of a figure, at most 256.
        dpi: pixels per inch.
    """
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    plt.rcParams.update({"figure.dpi": dpi, "text.hinting": "none"})  # letters as wide as they say
    plt.close(plt.figure())  # the backend is set up now, so that it does not undo what follows
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        png = shell.display_formatter.formatters["image/png"]
        png.for_type(Figure, lambda figure: figure_png(figure, colours))


def figure_png(figure: Any, colours: int = 96) -> str:
    """A figure as PNG with a palette, base64.

    Args:
        figure: of matplotlib.
        colours: at most 256.

    Returns:
        Text, as notebooks store it.
    """
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", bbox_inches="tight", facecolor="white")
    picture = Image.open(raw).convert("RGB")
    # the widest spread of colours: the median cut would lose those of few pixels, as in a legend
    spread, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    picture = picture.quantize(colours, spread, kmeans=1, dither=dither)
    picture.save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()
