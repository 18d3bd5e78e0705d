"""cephalo_lite: several Phi-3-Vision experts, one mixture that answers.

Names that need more packages (training, 4 bits) are imported when they are first asked for.
"""

from . import moe, phi3v
from .chat import Answer, Chat, Sampling, ask, stream
from .finetune import freeze, parameter_groups, unfreeze
from .later import later
from .loading import load
from .moe import Phi3VMoeConfig, Phi3VMoeForCausalLM, select_expert
from .moe.build import BuildReport, build_moe
from .moe.gates import get_gates, load_gates, save_gates, set_gates, train_gates
from .moe.trace import RoutingTrace, trace_routing, tracing
from .phi3v import (
    Phi3VConfig,
    Phi3VForCausalLM,
    Phi3VImageProcessor,
    Phi3VModel,
    Phi3VProcessor,
)
from .presets import Preset, preset

phi3v.register()
moe.register()

LATER = {
    "exporting": ("export",),
    "finetune": ("add_adapters", "load_adapters", "merge_adapters", "save_adapters", "sft"),
    "quantize": ("convert_4bit", "load_4bit", "memory_plan", "preflight"),
}
__getattr__, __dir__ = later(__name__, LATER, globals())

__version__ = "0.1.0"
__all__ = [
    *(name for names in LATER.values() for name in names),
    "Answer",
    "BuildReport",
    "Chat",
    "Phi3VConfig",
    "Phi3VForCausalLM",
    "Phi3VImageProcessor",
    "Phi3VModel",
    "Phi3VMoeConfig",
    "Phi3VMoeForCausalLM",
    "Phi3VProcessor",
    "Preset",
    "RoutingTrace",
    "Sampling",
    "ask",
    "build_moe",
    "freeze",
    "get_gates",
    "load",
    "load_gates",
    "parameter_groups",
    "preset",
    "save_gates",
    "select_expert",
    "set_gates",
    "stream",
    "trace_routing",
    "tracing",
    "train_gates",
    "unfreeze",
]
