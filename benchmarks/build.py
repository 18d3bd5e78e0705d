"""Building a mixture of 3 experts at released size, against copying the bytes it consists of.

    python -m benchmarks.build --folder /a/disk/with/65/GB/free

The experts are synthetic shards of random numbers. The first of them is the base as well. Both,
building and copying, end when the bytes are on the disk, and neither finds its sources in memory.
Each runs in a process of its own, whose peak memory is read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.common import medians, parser, prepare, report, spread

EXPERTS = 3
SHARD_BYTES = 4 << 30
COLUMNS = (
    "experts",
    "GB written",
    "building, s",
    "building, not read back, s",
    "copying, s",
    "building / copying",
    "not read back / copying",
    "peak memory, GB",
)
NOTE = (
    "Building measures how far each expert is from the base, looks for equal ones, and by default "
    "reads its result back and compares it, tensor by tensor; copying does nothing of it. Peak "
    "memory is that of the whole process, torch included"
)
QUICK = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
RELEASED = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32}


def config_at(scale: float, quick: bool):
    """A released configuration with a share of its layers and vocabulary.

    Args:
        scale: 1 for the released size.
        quick: narrow layers as well.
    """
    from cephalo_lite import Phi3VConfig

    return Phi3VConfig(
        **(QUICK if quick else RELEASED),
        num_hidden_layers=max(1, round(32 * scale)),
        vocab_size=max(64, round(32064 * scale)),
        image_token_id=63,
        pad_token_id=0,
    )


def write_expert(folder: Path, config, seed: int, silent: bool) -> None:
    """Write a dense checkpoint of random bfloat16 numbers shard by shard, no model in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    from cephalo_lite import Phi3VForCausalLM
    from cephalo_lite.shards import INDEX_FILE, pack_header

    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    published = revert_weight_conversion(model, model.state_dict())
    shards: list[list[tuple]] = [[]]
    for key, tensor in published.items():
        entry = (key, "BF16", tuple(tensor.shape), 2 * tensor.numel())
        if shards[-1] and sum(one[3] for one in shards[-1]) + entry[3] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(8 << 20, generator=generator).mul_(0.02).bfloat16()
    block = memoryview(block.view(torch.uint8).numpy())
    folder.mkdir()
    weight_map = {}
    total = sum(entry[3] for shard in shards for entry in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=silent) as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open(folder / name, "wb") as file:
                file.write(pack_header(shard))
                for key, _, _, left in shard:
                    weight_map[key] = name
                    while left:
                        left -= (size := file.write(block[: min(left, len(block))]))
                        bar.update(size)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def forget(folder: Path) -> None:
    """Bring a folder to the disk and, where the system allows, drop it from memory."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDWR)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def build(experts: list[Path], target: Path, verify: bool) -> tuple[float, float]:
    """Seconds and peak bytes of building."""
    from cephalo_lite.moe.build import build_moe

    warnings.simplefilter("ignore")  # random experts differ in everything, and it would say so
    start = time.perf_counter()
    build_moe(experts[0], experts, target, verify=verify, progress=False)
    return time.perf_counter() - start, peak_memory()


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak bytes of copying a folder to the disk."""
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start, peak_memory()


def peak_memory() -> float:
    """Most bytes that this process had in memory at once; not a number where no one says."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def apart(function, *arguments) -> tuple[float, float]:
    """Run a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: list[str] | None = None) -> None:
    """Measure and write build.json."""
    made = parser(__doc__.splitlines()[0], repetitions=1)
    made.add_argument("--scale", type=float, default=1.0, help="share of layers and vocabulary")
    made.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    options = prepare(made.parse_args(arguments))
    config = config_at(0.05 if options.quick else options.scale, options.quick)
    ways = ("building", "building, not read back", "copying")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="build-benchmark-") as place:
        folder = Path(place)
        experts = [folder / f"expert-{number}" for number in range(EXPERTS)]
        for number, expert in enumerate(experts):
            write_expert(expert, config, number, options.silent)
        built, copied = folder / "built", folder / "copied"
        for _ in tqdm(range(options.repetitions), desc="build and copy", disable=options.silent):
            measured = {}
            for way, verify in zip(ways[:2], (True, False), strict=True):
                shutil.rmtree(built, ignore_errors=True)
                for expert in experts:
                    forget(expert)
                measured[way] = apart(build, experts, built, verify)
            forget(built)
            measured["copying"] = apart(copy, built, copied)
            for name, (time_taken, peak) in measured.items():
                seconds[name].append(time_taken)
                peaks[name].append(peak)
            written = sum(file.stat().st_size for file in copied.iterdir())
            shutil.rmtree(built)
            shutil.rmtree(copied)
    middle = medians(seconds)
    title = f"{EXPERTS} of {config.num_hidden_layers} layers"
    ratios = [middle[way] / middle["copying"] for way in ways[:2]]
    rows = [[title, written / 1e9, *middle.values(), *ratios, max(peaks["building"]) / 1e9]]
    runs = {
        name: {"seconds": seconds[name], "spread": spread(seconds[name]), "peak_bytes": peaks[name]}
        for name in seconds
    }
    report("build", options, COLUMNS, rows, runs, NOTE)


if __name__ == "__main__":
    main()
