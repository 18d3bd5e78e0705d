"""The experts of one full-width Phi-3.5-MoE layer in 4 bits: training them, and converting them.

    python -m benchmarks.quantize_layer

Writes quantize_layer.json (time and memory of forward and backward, ours beside others) and
quantize_convert.json (how fast a checkpoint is converted, in how much memory). experts4bit-qlora
takes part where it can be imported; it needs nothing but torch and bitsandbytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PhimoeConfig, PhimoeForCausalLM
from transformers.models.phimoe.modeling_phimoe import PhimoeExperts
from transformers.utils import logging as transformers_logging

from benchmarks.build import apart, peak_memory
from benchmarks.common import medians, parser, peak_over, prepare, report, side_by_side, spread
from cephalo_lite.quantize import (
    SequentialPhimoeForCausalLM,
    convert_4bit,
    guard_cpu,
    stored_bytes,
    use_cpu_linear,
)
from cephalo_lite.quantize.cpu_linear import forget_memory

TOKENS, RANK = 512, 16
OURS, FROZEN = "ours, 4 bits + LoRA", "frozen bfloat16, no LoRA"
LIBRARY = "PEFT target_parameters on bitsandbytes' 4-bit parameters"
RIVAL = "experts4bit-qlora, 4 bits + LoRA"
COLUMNS = ("experts of one layer", "stored, MB", "peak over resident, MB", "forward + backward, s")
NOTE = (
    f"{TOKENS} tokens, top-2 of 16 experts, LoRA of rank {RANK}, on the CPU. Memory in bfloat16: "
    "peak is the bytes that live at once beyond those before the step, as torch's allocator counts "
    "them. Time in bfloat16 where the CPU computes in it, else in float32. PEFT's "
    "target_parameters: one first step, as it fails at the second; – where a package is not there"
)
CONVERT_COLUMNS = ("checkpoint of one layer", "read, GB", "written, GB", "MB/s", "peak memory, GB")
CONVERT_NOTE = (
    "From bfloat16 to NF4 with double quantisation, in a fresh process, written to the disk and "
    "read back; MB/s of what is read. Peak memory is of the whole process, torch included"
)


def config_at(quick: bool) -> PhimoeConfig:
    """One layer of Phi-3.5-MoE with a small vocabulary."""
    width, inner = (64, 128) if quick else (4096, 6400)
    return PhimoeConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=width // 16 if quick else 32,
        num_key_value_heads=width // 64 if quick else 8,
        num_local_experts=16,
        attention_bias=True,
        lm_head_bias=True,
    )


def write_layer(folder: Path, config: PhimoeConfig) -> None:
    """A checkpoint of one layer with seeded weights, in the released names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = PhimoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder)


def timed_dtype() -> torch.dtype:
    """What is computed in; a CPU without bfloat16 products would take a hundred times as long."""
    has_products = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_products else torch.float32


def contestants(source: Path, packed: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Name → experts that take (hidden, chosen, weights); all compute the same function."""
    stock = PhimoeForCausalLM.from_pretrained(source, dtype=dtype)
    fused = stock.model.layers[0].mlp.experts.requires_grad_(False)
    fused.config._experts_implementation = "eager"
    loaded = SequentialPhimoeForCausalLM.from_pretrained(
        packed, dtype=dtype, device_map={"": "cpu"}
    )
    guard_cpu(loaded)
    use_cpu_linear(loaded)
    ours = loaded.model.layers[0].mlp.experts.requires_grad_(False)
    for module in ours.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    ours.is_loaded_in_4bit = True  # what PEFT asks a model
    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["w1", "w2", "w3"])
    inject_adapter_in_model(adapter, ours)
    found = {FROZEN: fused, OURS: adapters_in(ours, dtype)}
    try:
        from experts4bit_qlora import Experts4bit, ExpertsLoRA
    except ImportError:
        return found
    base = Experts4bit.from_float(fused.gate_up_proj, fused.down_proj, activation=fused.act_fn)
    return found | {RIVAL: ExpertsLoRA(base, r=RANK, alpha=RANK, dtype=dtype)}


def library_route(fused: PhimoeExperts) -> nn.Module:
    """The same experts with what bitsandbytes and PEFT offer for fused tensors."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    names = ("gate_up_proj", "down_proj")
    for name in names:
        replace_parameter_4bit(fused, name, compress_statistics=True, quant_type="nf4")
    fused.config._experts_implementation = "grouped_mm"  # its fastest
    adapter = LoraConfig(
        r=RANK, target_modules=[], target_parameters=[f"experts.{name}" for name in names]
    )
    model = get_peft_model(nn.ModuleDict({"experts": fused}), adapter)
    return adapters_in(model.base_model.model, torch.bfloat16)


def adapters_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the adapters, as TRL does."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return module


def step_of(
    experts: nn.Module, config: PhimoeConfig, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A function that computes seeded tokens forward and backward, and returns the output."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=generator).to(dtype)
    scores = torch.rand(TOKENS, config.num_local_experts, generator=generator)
    weights, chosen = scores.topk(2)

    def step() -> torch.Tensor:
        for parameter in experts.parameters():
            parameter.grad = None
        out = experts(hidden.clone().requires_grad_(), chosen, weights.to(dtype))
        out.sum().backward()
        return out.detach()

    return step


def check_same(outputs: dict[str, torch.Tensor]) -> None:
    """All outputs are the frozen experts', but for the rounding to 4 bits."""
    want = outputs[FROZEN].float()
    for name, out in outputs.items():
        off = float((out.float() - want).norm() / want.norm())
        if not off < 0.3:
            raise RuntimeError(f"{name} computes something else: {off:.2f} away from {FROZEN}.")


def time_layer(options, source: Path, packed: Path, config: PhimoeConfig) -> None:
    """Table (a): write quantize_layer.json."""
    dtype = timed_dtype()
    modules = contestants(source, packed, dtype)
    steps = {name: step_of(module, config, dtype) for name, module in modules.items()}
    check_same({name: step() for name, step in steps.items()})
    seconds = side_by_side(steps, options.repetitions, 0, "one layer", options.silent)
    middle = medians(seconds)
    del modules, steps
    modules = contestants(source, packed, torch.bfloat16)
    rows = []
    for name, module in modules.items():
        step = step_of(module, config, torch.bfloat16)
        forget_memory()  # or what is kept of the timing would not be counted
        peak = peak_over(step, products=False)
        rows.append([name, stored_bytes(module) / 1e6, peak / 1e6, middle[name]])
    if RIVAL not in modules:
        rows.append([RIVAL, None, None, None])
    library = library_route(modules.pop(FROZEN))
    stored = stored_bytes(library) / 1e6
    peak = peak_over(step_of(library["experts"], config, torch.bfloat16), products=False) / 1e6
    library = library_route(contestants(source, packed, dtype)[FROZEN])["experts"]
    start = time.perf_counter()
    step_of(adapters_in(library, dtype), config, dtype)()
    rows.append([LIBRARY, stored, peak, time.perf_counter() - start])
    runs = {name: {"seconds": times, "spread": spread(times)} for name, times in seconds.items()}
    report("quantize_layer", options, COLUMNS, rows, runs, NOTE)


def convert(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak bytes of a conversion."""
    start = time.perf_counter()
    convert_4bit(source, target, progress=False)
    return time.perf_counter() - start, peak_memory()


def time_conversion(options, source: Path, folder: Path) -> Path:
    """Table (b): write quantize_convert.json; returns the converted folder."""
    seconds, peaks = [], []
    for number in range(options.repetitions):
        target = folder / f"packed-{number}"
        time_taken, peak = apart(convert, source, target)
        seconds.append(time_taken)
        peaks.append(peak)
    read, written = (
        sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e9
        for place in (source, target)
    )
    middle = medians({"": seconds})[""]
    title = f"16 experts, {config_title(source)}"
    rows = [[title, read, written, 1e3 * read / middle, max(peaks) / 1e9]]
    runs = {"seconds": seconds, "spread": spread(seconds), "peak_bytes": peaks}
    report("quantize_convert", options, CONVERT_COLUMNS, rows, {"conversion": runs}, CONVERT_NOTE)
    return target


def config_title(source: Path) -> str:
    """Width and inner width, as in the table."""
    config = PhimoeConfig.from_pretrained(source)
    return f"D={config.hidden_size} F={config.intermediate_size}"


def main(arguments: list[str] | None = None) -> None:
    """Measure and write quantize_layer.json and quantize_convert.json."""
    made = parser(__doc__.splitlines()[0], repetitions=7)
    made.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    options = prepare(made.parse_args(arguments))
    if options.silent:
        transformers_logging.disable_progress_bar()
    config = config_at(options.quick)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="quantize-benchmark-") as place:
        folder = Path(place)
        write_layer(folder / "layer", config)
        packed = time_conversion(options, folder / "layer", folder)
        time_layer(options, folder / "layer", packed, config)


if __name__ == "__main__":
    main()
