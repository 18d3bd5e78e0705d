"""The small files of a new mixture: configuration, index, tokenizer, processor; no code."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...shards import INDEX_FILE, read_header
from .report import BuildReport
from .sources import DenseCheckpoint
from .stream import Piece

COPIED_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "LICENSE*",
)


def moe_config(base_config: dict, report: BuildReport) -> dict:
    """Make the mixture's config.json: the base's fields and those of the published Cephalo models.

    `router`, `expert_names` and, where not all layers are MoE layers, `moe_layers` are additions of
    ours.

    Args:
        base_config: the base's config.json.
        report: names, router and layers of the build.
    """
    config = {k: v for k, v in base_config.items() if k not in ("auto_map", "_name_or_path")}
    config |= {
        "architectures": ["Phi3VForCausalLMMoE"],
        "model_type": "phi3_v_moe",
        "k": report.experts_per_token,
        "num_expert_models": len(report.expert_names),
        "use_embeddings_in_router": False,
        "router": report.router,
        "expert_names": report.expert_names,
    }
    if len(report.layers) < base_config["num_hidden_layers"]:
        config["moe_layers"] = report.layers
    return config


def write_side_files(
    folder: Path, base: DenseCheckpoint, report: BuildReport, pieces: Sequence[Piece]
) -> None:
    """Write configuration and index, and copy tokenizer and processor files from the base.

    Args:
        folder: holds the shards already.
        base: whose files are copied; `auto_map` entries, which point to remote code, are dropped.
        report: names, router, layers and shards of the build.
        pieces: all tensors.
    """
    write_json(folder / "config.json", moe_config(base.config, report))
    if len(report.shards) > 1:
        weight_map = {key: name for name in report.shards for key in read_header(folder / name)}
        metadata = {
            "total_size": sum(piece.nbytes for piece in pieces),
            "total_parameters": report.total_parameters,
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    for pattern in COPIED_FILES:
        for file in sorted(base.folder.glob(pattern)):
            copy_side_file(file, folder / file.name)


def copy_side_file(file: Path, target: Path) -> None:
    """Copy a small file of a checkpoint, without what would lead to remote code."""
    if file.suffix == ".json":
        content = json.loads(file.read_text("utf-8"))
        if isinstance(content, dict) and content.pop("auto_map", None):
            write_json(target, content)
            return
    shutil.copyfile(file, target)


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", "utf-8")
