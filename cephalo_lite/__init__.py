"""cephalo_lite: several Phi-3-Vision experts, one mixture that answers."""

from . import moe, phi3v
from .moe import Phi3VMoeConfig, Phi3VMoeForCausalLM, select_expert
from .phi3v import (
    Phi3VConfig,
    Phi3VForCausalLM,
    Phi3VImageProcessor,
    Phi3VModel,
    Phi3VProcessor,
)

phi3v.register()
moe.register()

__version__ = "0.1.0"
__all__ = [
    "Phi3VConfig",
    "Phi3VForCausalLM",
    "Phi3VImageProcessor",
    "Phi3VModel",
    "Phi3VMoeConfig",
    "Phi3VMoeForCausalLM",
    "Phi3VProcessor",
    "select_expert",
]
