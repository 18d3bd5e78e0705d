"""Experts in 4 bits: loading, converting, planning, and checks that refuse to lie."""

from .convert import ConversionReport, convert_4bit
from .cpu_guard import guard_cpu
from .cpu_linear import use_cpu_linear
from .experts import PhimoeExpert, SequentialExperts
from .loading import load_4bit, nf4_config
from .models import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM, register
from .plan import MemoryPlan, memory_plan
from .preflight import PreflightError, PreflightReport, preflight
from .sizes import nf4_bytes, stored_bytes

register()

__all__ = [
    "ConversionReport",
    "MemoryPlan",
    "PhimoeExpert",
    "PreflightError",
    "PreflightReport",
    "SequentialExperts",
    "SequentialPhi3VMoeForCausalLM",
    "SequentialPhimoeForCausalLM",
    "convert_4bit",
    "guard_cpu",
    "load_4bit",
    "memory_plan",
    "nf4_bytes",
    "nf4_config",
    "preflight",
    "register",
    "stored_bytes",
    "use_cpu_linear",
]
