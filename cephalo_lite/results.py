"""Measured runs on disk: where they ran, and tables a person can read."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "bitsandbytes", "peft", "trl")


def machine() -> dict[str, Any]:
    """What a measurement must be read with: processor, cores, GPU, date and versions."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "machine": {
            "processor": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "date": date.today().isoformat(),
        "versions": versions,
    }


def write_results(path: Path, result: dict[str, Any]) -> Path:
    """Write a result as JSON, beside its final name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def table_text(table: dict[str, list]) -> str:
    """A table {"columns": [...], "rows": [[...]]} in aligned plain text."""
    lines = [[str(cell) for cell in row] for row in (table["columns"], *table["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
