"""Every number that differs between "tiny" and "full", in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = ("tiny", "full")
ON_A_CPU = {"accumulation": 1, "optimizer": "adamw_torch", "checkpointing": False}  # of a recipe


@dataclass(frozen=True)
class Preset:
    """What a notebook or the demo runs with."""

    size: str  # "tiny" or "full"
    base: str  # folder or hub id of the model that gives attention, vision, embeddings and head
    experts: dict[str, str]  # domain → folder or hub id of the model that gives its MLPs
    dtype: str  # of the weights in memory
    num_crops: int  # most detailed crops of a picture
    gate_samples: int  # training samples per expert for the gates
    gate_steps: int  # of the fit on gate inputs
    tokens_per_sample: int  # tokens of a sample that the gates are fitted on
    language_steps: int  # further steps on the language-model loss
    language_batch: int  # samples per such step
    judged_samples: int  # held-out samples per domain in accuracy tables
    answer_batch: int  # prompts answered at once
    max_new_tokens: int  # longest answer
    text_models: dict[str, str]  # "mini" and "moe" → folder or hub id of the language models
    text_rows: dict[str, str | None]  # "chat" and "code" → hub id of rows; None: the embedded ones
    text_count: int  # rows that a language model is fine-tuned on
    text_judged: int  # held-out rows that are answered before and after
    text_training: dict[str, Any]  # numbers of the recipes that are replaced at this size
    picture_rows: str | None  # hub id of rows with pictures; None: the embedded signs
    picture_count: int  # rows with pictures that the mixture is fine-tuned on
    picture_old: int  # rows of each of the experts' domains that are mixed in
    picture_training: dict[str, Any]  # numbers of the recipes that are replaced at this size
    expert_training: dict[str, Any]  # what an expert of its own has otherwise
    picture_gates: dict[str, int]  # samples per expert, and tokens of each, for its mixture's gates
    output_dir: Path  # where checkpoints are written
    memory: str  # peak, in words, for the cost table
    machine: str  # what it is meant for

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows to fine-tune on, in one of the forms that `sft` reads.

        Args:
            kind: "chat" or "code" for language models, "pictures" for those that see.

        Raises:
            KeyError: there is no such kind.
        """
        sources = {**self.text_rows, "pictures": self.picture_rows}
        count = self.picture_count if kind == "pictures" else self.text_count
        if sources[kind] is not None:
            from .finetune.text_data import load_rows

            return list(load_rows(sources[kind], count))  # a `Dataset` where there are pictures
        if kind == "pictures":
            from .tiny import make_samples

            samples = make_samples("signs", count, "train")
            return [{"messages": s.messages(), "images": [s.image]} for s in samples]
        from .tiny import text

        return {"chat": text.chat_rows, "code": text.code_rows}[kind](count, "train")


def preset(size: str = "tiny") -> Preset:
    """The numbers of a size.

    Args:
        size: "tiny" (embedded models, any laptop) or "full" (released weights, one GPU of 40 GB or
            more).

    Raises:
        ValueError: there is no such size.
    """
    if size == "tiny":
        from . import tiny
        from .tiny import text

        folders = {name: str(path) for name, path in tiny.checkpoints().items()}
        return Preset(
            size="tiny",
            base=folders.pop("base"),
            experts=folders,
            dtype="float32",
            num_crops=2,
            gate_samples=200,
            gate_steps=600,
            tokens_per_sample=64,
            language_steps=40,
            language_batch=24,
            judged_samples=100,
            answer_batch=50,
            max_new_tokens=32,
            text_models=dict(
                zip(("mini", "moe"), map(str, text.checkpoints().values()), strict=True)
            ),
            text_rows={"chat": None, "code": None},
            text_count=1200,
            text_judged=80,
            text_training=ON_A_CPU
            | {
                "learning_rate": 5e-3,
                "batch": 12,
                "max_steps": 120,
                "eval_steps": 40,
            },
            picture_rows=None,
            picture_count=600,
            picture_old=300,
            picture_training=ON_A_CPU
            | {
                "learning_rate": 2e-3,
                "batch": 12,
                "max_steps": 160,
                "eval_steps": 80,
                "weight_decay": 0.0,
                "group_by_length": False,  # rows of like length would be rows of one domain
            },
            expert_training={
                "learning_rate": 1e-3,
                "batch": 16,
                "max_steps": 240,
                "eval_steps": 120,
            },
            picture_gates={"samples": 400, "tokens": 128},
            output_dir=Path("runs/tiny"),
            memory="1.5 GB",
            machine="two CPU cores",
        )
    if size == "full":
        return Preset(
            size="full",
            base="microsoft/Phi-3-vision-128k-instruct",
            experts={
                "materials": "lamm-mit/Cephalo-Phi-3-vision-128k-4b-beta",
                "general": "microsoft/Phi-3-vision-128k-instruct",
                "latex": "lamm-mit/Cephalo-LaTeX-Phi-3-vision-128k-4b-beta",
            },
            dtype="bfloat16",
            num_crops=4,
            gate_samples=48,
            gate_steps=600,
            tokens_per_sample=64,
            language_steps=40,
            language_batch=2,
            judged_samples=40,
            answer_batch=4,
            max_new_tokens=64,
            text_models={
                "mini": "microsoft/Phi-3.5-mini-instruct",
                "moe": "microsoft/Phi-3.5-MoE-instruct",
            },
            text_rows={
                "chat": "timdettmers/openassistant-guanaco",
                "code": "iamtarun/python_code_instructions_18k_alpaca",
            },
            text_count=5000,
            text_judged=40,
            text_training={},
            picture_rows="lamm-mit/Cephalo-Wikipedia-Materials",
            picture_count=2000,
            picture_old=200,
            picture_training={"max_steps": 300, "eval_steps": 100},
            expert_training={"learning_rate": 2e-5},
            picture_gates={"samples": 96, "tokens": 64},
            output_dir=Path("runs/full"),
            memory="about 22 GB of GPU memory for the mixture, by arithmetic",
            machine="one GPU with 40 GB or more",
        )
    raise ValueError(f"size={size!r} is not one of {', '.join(SIZES)}.")
