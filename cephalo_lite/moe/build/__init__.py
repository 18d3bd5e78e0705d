"""From checkpoints of several dense models to the checkpoint of one mixture, file to file."""

from .builder import build_moe
from .report import BuildReport

__all__ = ["BuildReport", "build_moe"]
