"""A training step on a picture: the mixture in three ways, against its dense base.

    python -m benchmarks.finetuning

A step is forward, backward and AdamW. Trained are the gates, adapters on attention and experts, or
everything; beside them the dense base, and the mixture with a block that computes all experts for
every token, which is what the 2024 code did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.common import medians, parser, peak_over, prepare, report, side_by_side, spread
from benchmarks.generation import pair
from benchmarks.moe_block import AllExperts
from cephalo_lite import add_adapters, freeze, unfreeze
from cephalo_lite.finetune import unfuse

RANK, ANSWER = 16, 256  # of adapters; tokens
DENSE = "dense, everything"
WAYS = (
    DENSE,
    "dense, adapters",
    "mixture, gates",
    "mixture, adapters",
    "mixture, everything",
    "all experts computed, everything",
)
COLUMNS = ("size", "what", "trained", "tokens/s", "times the dense one's", "peak, MB")
NOTE = (
    f"One picture and {ANSWER} answer tokens in a step of forward, backward and AdamW, no "
    "checkpointing. Mixture of 3 experts, 1 per token; adapters of rank 16 on attention and MLPs "
    "or experts. Peak: bytes that live at once beyond weights and optimiser, gradients included, "
    "as torch's allocator counts them. Float32 on the CPU, released shapes in bfloat16 on the GPU"
)


class AllExpertsBlock(nn.Module):
    """`AllExperts` in the place of a mixture's block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.reference = AllExperts(block)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, D) in and out."""
        return self.reference(hidden.flatten(0, 1)).view_as(hidden)


def inputs_of(processor, device: str) -> dict[str, torch.Tensor]:
    """A prompt with one picture, and an answer that alone is learnt."""
    from PIL import Image

    picture = Image.effect_noise((336, 336), 60).convert("RGB")
    prompt = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n"
    inputs = processor(images=[picture], text=prompt, return_tensors="pt")
    answer = torch.randint(3, 300, (1, ANSWER), generator=torch.Generator().manual_seed(0))
    prompt_ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt_ids, answer], dim=1)  # (1, T)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = torch.cat([torch.full_like(prompt_ids, -100), answer], dim=1)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def prepared(way: str, base: nn.Module, mixture: nn.Module) -> nn.Module:
    """The model of a contestant, with what it trains unfrozen."""
    model = base if way.startswith("dense") else mixture
    if way.startswith("all experts"):
        for layer in model.model.layers:
            layer.mlp = AllExpertsBlock(layer.mlp)
    if way.endswith("adapters"):
        groups = ("attention", "mlp" if model is base else "experts")
        return add_adapters(unfuse(model), groups, r=RANK)[0].train()
    if way.endswith("gates"):
        freeze(model, ("gates",))
    else:
        unfreeze(model)
    return model.train()


def contestants(size: str, device: str) -> Iterator[tuple[str, int, int, Callable[[], None]]]:
    """Name, trained parameters, tokens of a step, and the step.

    All are in memory at once; on a GPU what trains everything at released size is left out.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for way in WAYS:
        if device != "cpu" and way.endswith("everything"):
            continue
        processor, base, mixture = pair(size, device, dtype)
        model = prepared(way, base, mixture)
        del base, mixture
        inputs = inputs_of(processor, device)
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=1e-4)

        def step(model=model, inputs=inputs, optimizer=optimizer) -> None:
            model(**inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        yield way, sum(p.numel() for p in learnt), inputs["input_ids"].shape[1], step


def peak_of(step: Callable[[], None], device: str) -> float:
    """MB that a step takes beyond what is there between steps."""
    if device == "cpu":
        return peak_over(step) / 1e6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main(arguments: list[str] | None = None) -> None:
    """Measure all sizes and write finetuning.json."""
    options = prepare(parser(__doc__.splitlines()[0], repetitions=7).parse_args(arguments))
    sizes = [("tiny", "cpu")] if options.quick else [("tiny", "cpu"), ("middle", "cpu")]
    gpu = "released, GPU"
    if torch.cuda.is_available() and not options.quick:
        sizes.append(("released", "cuda"))
    rows, runs = [], {}
    for size, device in sizes:
        title = gpu if device == "cuda" else size
        found = list(contestants(size, device))
        steps = {way: step for way, _, _, step in found}
        seconds = side_by_side(steps, options.repetitions, title=title, silent=options.silent)
        speed = {way: tokens / medians(seconds)[way] for way, _, tokens, _ in found}
        for way, trained, _, step in found:
            ratio = speed[way] / speed[DENSE] if DENSE in speed else None
            rows.append([title, way, trained, speed[way], ratio, peak_of(step, device)])
        runs[title] = {
            way: {"seconds": times, "spread": spread(times)} for way, times in seconds.items()
        }
    if gpu not in runs:
        rows.append([gpu] + [None] * (len(COLUMNS) - 1))
    report("finetuning", options, COLUMNS, rows, runs, NOTE)


if __name__ == "__main__":
    main()
