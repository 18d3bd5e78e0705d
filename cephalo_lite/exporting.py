"""A folder for other runtimes: released names, released architecture, and what each one drops.

| runtime | Phi-3.5-mini | Phi-3.5-MoE | Phi-3-Vision | its mixture |
| --- | --- | --- | --- | --- |
| transformers, as it is | yes | yes | with cephalo_lite | with cephalo_lite |
| vLLM 0.32 | yes | without the head's bias | own class, not tried | no |
| llama.cpp (GGUF) | yes, exact | no: another network | no | no |

Measured on tiny random models: vLLM 0.32 leaves `lm_head.bias` out, so that log-probabilities
differ by up to 0.16; llama.cpp computes Phi-3.5-MoE with RMSNorm for LayerNorm and another routing
(up to 0.90, and one token in eight is another one), and Phi-3.5-mini exactly.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from .finetune.folders import new_folder
from .moe.build.files import write_json
from .shards import read_checkpoint

# Model type → the name that the released config.json has and other runtimes look for.
ARCHITECTURES = {
    "phi3": "Phi3ForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "phi3_v": "Phi3VForCausalLM",
    "phi3_v_moe": "Phi3VForCausalLMMoE",
}
OUTSIDE_LAYERS = r"model\.embed_tokens\.weight|model\.norm\.(weight|bias)|lm_head\.(weight|bias)"
NORMS = r"(input|post_attention)_layernorm\.(weight|bias)"
LAYOUTS = {  # names in the released files of the text models
    "phi3": r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj\.weight|"
    rf"mlp\.(gate_up|down)_proj\.weight|{NORMS})|{OUTSIDE_LAYERS}",
    "phimoe": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj\.(weight|bias)|"
    rf"block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight|{NORMS})|{OUTSIDE_LAYERS}",
}
LONG_ROPE = {  # what the released `rope_scaling` holds: these and its type, no more, no less
    "phi3": ("short_factor", "long_factor"),
    "phimoe": (
        "short_factor", "long_factor", "short_mscale", "long_mscale",
        "original_max_position_embeddings",
    ),
}  # fmt: skip


@dataclass
class ExportReport:
    """What lies in an exported folder."""

    folder: Path
    architecture: str  # as config.json names it
    tensors: int
    parameters: int
    nbytes: int  # of the weights
    warnings: list[str] = field(default_factory=list)  # what a runtime drops or cannot do


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    overwrite: bool = False,
    max_shard_gb: float = 4.0,
) -> ExportReport:
    """Write a model as the released ones are, for stock transformers, vLLM and others.

    Args:
        model: without adapters (`merge_adapters`) and not quantised; experts fused or one by one.
        tokenizer: its tokenizer, or processor.
        folder: gets its name when all is written and checked.
        overwrite: replace a folder that is there.
        max_shard_gb: largest size of a file in 10^9 bytes.

    Returns:
        What was written; its warnings are given as Python warnings as well.

    Raises:
        ValueError: the model has adapters, is quantised, or is of another kind.
        FileExistsError: something is at `folder`.
        RuntimeError: names or the number of weights on the disk are not as released.
    """
    kind = _check(model)
    with new_folder(folder, overwrite) as partial:
        model.save_pretrained(partial, max_shard_size=int(max_shard_gb * 1e9))
        tokenizer.save_pretrained(partial)
        _copy_sentencepiece(tokenizer, partial)
        _write_config(partial / "config.json", kind)
        tensors = read_checkpoint(partial)
        _check_names(tensors, model, kind)
    report = ExportReport(
        folder=Path(folder),
        architecture=ARCHITECTURES[kind],
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        warnings=_what_is_lost(model, kind),
    )
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


def gguf_command(folder: str | Path, llama_cpp: str | Path, outfile: str | Path) -> list[str]:
    """The command that turns an exported dense Phi-3 into GGUF with llama.cpp's own converter.

    Args:
        folder: an exported model with `tokenizer.model`, which the converter reads.
        llama_cpp: the folder of llama.cpp's sources.
        outfile: the GGUF file to write.

    Returns:
        Arguments for `subprocess.run`; print them with `shlex.join`.

    Raises:
        ValueError: the model is no dense Phi-3: llama.cpp computes another network, or none.
        FileNotFoundError: the folder has no config.json or no tokenizer.model.
    """
    folder = Path(folder)
    kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    if kind != "phi3":
        raise ValueError(
            f"{folder} is a {kind}. GGUF is for the dense phi3 only: llama.cpp's graph of Phi-3.5-"
            "MoE is not the same network, and it has none for the vision models."
        )
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.model, which llama.cpp's converter reads: copy it from the "
            "released model."
        )
    script = Path(llama_cpp) / "convert_hf_to_gguf.py"
    return ["python", str(script), str(folder), "--outtype", "f16", "--outfile", str(outfile)]


def _check(model: nn.Module) -> str:
    """The model's type; raises ValueError for what cannot be exported."""
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters: merge them first (merge_adapters).")
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            "The model is quantised. Export the unquantised one: load it, load_adapters, "
            "merge_adapters, export. A folder in 4 bits is made by convert_4bit."
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"A {kind} cannot be exported; {', '.join(ARCHITECTURES)} can.")
    return kind


def _write_config(file: Path, kind: str) -> None:
    """Name the architecture as released, and say the positions in the released words as well."""
    fields = json.loads(file.read_text("utf-8"))
    fields["architectures"] = [ARCHITECTURES[kind]]
    fields.pop("auto_map", None)  # points to remote code
    fields |= released_rope(fields, kind)
    write_json(file, fields)


def released_rope(fields: dict, kind: str) -> dict:
    """Positions in the words of the released config.json.

    transformers 4 reads `rope_theta` and `rope_scaling`, and takes defaults where they are missing;
    transformers 5 writes neither.

    Args:
        fields: a config.json.
        kind: its model type.

    Returns:
        The two fields, or none where there are no `rope_parameters`.
    """
    rope = fields.get("rope_parameters")
    if not rope:
        return {}
    scaling = None
    if rope["rope_type"] == "longrope":
        scaling = {"type": "longrope", **{name: rope[name] for name in LONG_ROPE[kind]}}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _copy_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """Copy tokenizer.model from where the tokenizer came from, if it is there: GGUF needs it."""
    source = getattr(getattr(tokenizer, "tokenizer", tokenizer), "name_or_path", "") or ""
    file = Path(source) / "tokenizer.model"
    if not file.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        file = Path(try_to_load_from_cache(source, "tokenizer.model") or file)
    if source and file.is_file() and not (folder / file.name).exists():
        shutil.copyfile(file, folder / file.name)


def _check_names(tensors: dict, model: nn.Module, kind: str) -> None:
    wrong = [name for name in tensors if not re.fullmatch(LAYOUTS.get(kind, ".*"), name)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors have no released name, such as {wrong[0]}.")
    written = sum(tensor.numel for tensor in tensors.values())
    held = sum(parameter.numel() for parameter in model.parameters())
    if written != held:
        raise RuntimeError(f"{written:,} parameters were written, the model has {held:,}.")


def _what_is_lost(model: nn.Module, kind: str) -> list[str]:
    """What to know before another runtime is trusted with this model."""
    lost = []
    if kind == "phimoe":
        bias = getattr(model.lm_head, "bias", None)
        if bias is not None and bias.detach().abs().max() > 0:
            lost.append(
                "vLLM 0.32 leaves lm_head.bias out (here up to "
                f"{bias.detach().abs().max().item():.3g}), so its answers differ. Compare before "
                "use, or serve with cephalo-serve."
            )
        lost.append(
            "llama.cpp computes another network for Phi-3.5-MoE (RMSNorm, another routing): no "
            "GGUF of it is faithful."
        )
    if kind == "phi3_v_moe":
        lost.append("vLLM and llama.cpp have no such mixture: serve it with cephalo-serve.")
    return lost
