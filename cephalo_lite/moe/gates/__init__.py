"""Gates: how they are trained, judged, saved and loaded."""

from .files import get_gates, load_gates, save_gates, set_gates
from .report import GateReport
from .training import train_gates

__all__ = ["GateReport", "get_gates", "load_gates", "save_gates", "set_gates", "train_gates"]
