"""Fine-tuning: what is trained and what is not, adapters, recipes, and their training.

What needs the packages of the extra `train` is imported when it is first asked for.
"""

from importlib import import_module
from typing import Any

from .groups import GROUPS, Count, FreezeReport, freeze, parameter_groups, unfreeze

ELSEWHERE = {
    "adapter_files": ("load_adapters", "save_adapters"),
    "adapters": ("ADAPTABLE", "AdapterReport", "adapter_report", "add_adapters"),
    "merging": ("MergeReport", "merge_adapters"),
    "recipes": ("RECIPES", "Recipe", "phi35_mini", "phi35_mini_code", "phi35_moe"),
    "supervised": ("SFTReport", "sft"),
    "text_data": (
        "guanaco_messages",
        "instruction_messages",
        "load_rows",
        "split_rows",
        "tokenize_rows",
    ),
}
_FILES = {name: file for file, names in ELSEWHERE.items() for name in names}

__all__ = [
    "GROUPS", "Count", "FreezeReport", "freeze", "parameter_groups", "unfreeze", *_FILES,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FILES])
