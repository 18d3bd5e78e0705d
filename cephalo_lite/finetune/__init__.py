"""Fine-tuning: what is trained and what is not."""

from .groups import GROUPS, Count, FreezeReport, freeze, parameter_groups, unfreeze

__all__ = ["GROUPS", "Count", "FreezeReport", "freeze", "parameter_groups", "unfreeze"]
