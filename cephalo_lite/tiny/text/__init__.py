"""The embedded language models: a dense `phi3` and a mixture `phimoe`, and rows to tune them on.

They have read Python and statements of facts, and they go on with whatever text they are given.
They were never asked anything: answering is what fine-tuning teaches them.
"""

from __future__ import annotations

from pathlib import Path

from .rows import chat_rows, code_rows

WEIGHTS = Path(__file__).parent / "weights"
MEMBERS = ("phi3", "phimoe")


def checkpoints() -> dict[str, Path]:
    """Folders of the two language models: "phi3", "phimoe".

    Raises:
        FileNotFoundError: the weights are not there; `python -m cephalo_lite.tiny.text.make` makes
            them.
    """
    folders = {name: WEIGHTS / name for name in MEMBERS}
    absent = [str(path) for path in folders.values() if not (path / "model.safetensors").exists()]
    if absent:
        raise FileNotFoundError(
            f"The tiny language models are not in {', '.join(absent)}. They come with the package; "
            "to make them anew (15 minutes on two cores): python -m cephalo_lite.tiny.text.make"
        )
    return folders


__all__ = ["MEMBERS", "WEIGHTS", "chat_rows", "checkpoints", "code_rows"]
