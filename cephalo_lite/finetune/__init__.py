"""Fine-tuning: what is trained and what is not, adapters, recipes, and their training.

What needs the packages of the extra `train` is imported when it is first asked for.
"""

from ..later import later
from .groups import GROUPS, Count, FreezeReport, freeze, parameter_groups, unfreeze

ELSEWHERE = {
    "adapter_files": ("load_adapters", "save_adapters"),
    "adapters": ("ADAPTABLE", "AdapterReport", "adapter_report", "add_adapters"),
    "collator": ("AnswerCollator",),
    "conversations": ("Conversation", "conversation_of"),
    "merging": ("MergeReport", "merge_adapters"),
    "recipes": (
        "RECIPES", "Recipe", "moe_adapters", "moe_full", "moe_gates", "phi35_mini",
        "phi35_mini_code", "phi35_moe", "vision_adapters",
    ),
    "report": ("SFTReport",),
    "router_watch": ("RouterRecord", "RouterWatch"),
    "supervised": ("sft",),
    "text_data": ("guanaco_messages", "instruction_messages", "load_rows", "split_rows"),
    "tokenizing": ("BadRow", "BadRowsError", "Tokenized", "tokenize_rows"),
    "trained_files": ("load_trained", "save_trained"),
    "trainer": ("AnswerTrainer", "make_trainer"),
    "unfusing": ("fuse", "unfuse"),
}  # fmt: skip
__getattr__, __dir__ = later(__name__, ELSEWHERE, globals())

__all__ = [
    "GROUPS", "Count", "FreezeReport", "freeze", "parameter_groups", "unfreeze",
    *(name for names in ELSEWHERE.values() for name in names),
]  # fmt: skip
