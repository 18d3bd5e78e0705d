"""Published checkpoints in and out: names of weights, and loads that are complete or fail."""

from __future__ import annotations

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def register_published_names() -> None:
    """Published keys keep CLIP's `vision_model.` level, which transformers 5 has dropped."""
    register_checkpoint_conversion_mapping("phi3_v", tower_renaming(), overwrite=True)


def tower_renaming() -> list[WeightRenaming]:
    """Renaming of the tower's keys, from disk to memory; transformers reverses it on saving."""
    return [WeightRenaming(r"img_processor\.vision_model\.", r"img_processor.")]


class StrictLoading:
    """Mix-in: `from_pretrained` raises where transformers would fill gaps with random weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, strict: bool = True, **kwargs):
        """Load a checkpoint folder or hub repository.

        Args:
            pretrained_model_name_or_path: the folder, or the name of the repository.
            *args: as in `transformers.PreTrainedModel.from_pretrained`.
            strict: raise on missing, unexpected or mismatched weights (default); False warns as
                transformers does.
            **kwargs: as in `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the checkpoint is text-only, a shard is missing or cut short, or weights are
                missing, left over or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if not strict:
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=wants_info, **kwargs
            )
        kwargs.setdefault("ignore_mismatched_sizes", True)  # so that they are all named below
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise ValueError(
                    f"{pretrained_model_name_or_path}: a safetensors file is damaged or incomplete "
                    f"({error}). Download it again."
                ) from error
            raise
        problems = cls._loading_problems(info)
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {problems}"
            )
        return (model, info) if wants_info else model

    @staticmethod
    def _loading_problems(info: dict) -> str:
        missing, left_over = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        mismatched = sorted(info["mismatched_keys"])
        vision = [key for key in missing if "vision_embed_tokens" in key]
        told = []
        if vision and not any(
            "vision_embed_tokens" in str(key) for key in [*left_over, *mismatched]
        ):
            told.append(
                f"it has none or only part of the vision weights ({len(vision)} missing); is it a "
                "text-only Phi-3, or is a shard missing?"
            )
        if missing:
            told.append(f"{len(missing)} weights are missing, such as {', '.join(missing[:3])}")
        if left_over:
            told.append(
                f"{len(left_over)} weights have no place, such as {', '.join(left_over[:3])}"
            )
        if mismatched:
            shapes = [
                f"{key} is {tuple(on_disk)}, not {tuple(here)}"
                for key, on_disk, here in mismatched[:3]
            ]
            told.append(
                f"{len(mismatched)} weights have another shape: {'; '.join(shapes)} (another "
                "vocabulary or another configuration)"
            )
        return "; ".join(told)
