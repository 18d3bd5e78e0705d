"""The embedded default: a small world of pictures and the models trained on it.

`checkpoints()` gives the folders of four complete Phi-3-Vision checkpoints in the released format:
a base and three experts fine-tuned from it. `make_samples` makes pictures with known answers.
"""

from __future__ import annotations

from pathlib import Path

from .world import DOMAINS, Sample, Turn, make_sample, make_samples

WEIGHTS = Path(__file__).parent / "weights"
MEMBERS = ("base", *DOMAINS)


def checkpoints() -> dict[str, Path]:
    """Folders of the tiny family: "base", "materials", "general", "latex".

    Raises:
        FileNotFoundError: the weights are not there; `python -m cephalo_lite.tiny.make` makes them.
    """
    folders = {name: WEIGHTS / name for name in MEMBERS}
    absent = [str(path) for path in folders.values() if not (path / "model.safetensors").exists()]
    if absent:
        raise FileNotFoundError(
            f"The tiny models are not in {', '.join(absent)}. They come with the package; to make "
            "them anew (40 minutes on two cores): python -m cephalo_lite.tiny.make"
        )
    return folders


__all__ = [
    "DOMAINS",
    "MEMBERS",
    "WEIGHTS",
    "Sample",
    "Turn",
    "checkpoints",
    "make_sample",
    "make_samples",
]
