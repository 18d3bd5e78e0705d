"""Generated tokens per second: a mixture of 3 experts, 1 per token, against its dense base.

    python -m benchmarks.generation

Both read the same prompt with a picture and write the same number of tokens. Weights are random:
what is measured is speed.
"""

from __future__ import annotations

import torch

from benchmarks.common import medians, parser, prepare, report, side_by_side, spread
from cephalo_lite import (
    Phi3VConfig,
    Phi3VForCausalLM,
    Phi3VImageProcessor,
    Phi3VMoeForCausalLM,
    Phi3VProcessor,
)
from cephalo_lite.tiny.family import tiny_config, tiny_processor

EXPERTS = 3
DENSE, MIXTURE = "dense", "mixture"
PROMPT = (
    "<|user|>\n<|image_1|>\nWhat is shown, and how much of it is solid?<|end|>\n<|assistant|>\n"
)
COLUMNS = (
    "size",
    "parameters, dense",
    "parameters, mixture",
    "tokens/s, dense",
    "tokens/s, mixture",
    "mixture / dense",
)
NOTE = (
    "Mixture of 3 experts, 1 per token; random weights. One picture in the prompt, greedy, reading "
    "the prompt included. Float32 on the CPU, released shapes in bfloat16 on the GPU"
)
MIDDLE = {  # about 150 million parameters
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32064,
    "vision_config": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}
RELEASED = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}


def pair(size: str, device: str, dtype: torch.dtype):
    """A processor, a dense model of random weights, and a mixture of it with two others.

    Args:
        size: "tiny", "middle" or "released".
        device: where the models are.
        dtype: of their weights.
    """
    processor = tiny_processor(corpus_size=300)
    config = tiny_config(processor)
    if size != "tiny":
        fields = MIDDLE if size == "middle" else RELEASED
        ids = {"image_token_id": processor.image_token_id, "pad_token_id": 0, "eos_token_id": 2}
        config = Phi3VConfig(**fields, **ids)
        processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1), processor.tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        base = Phi3VForCausalLM._from_config(config, dtype=dtype).eval()
    mixture = Phi3VMoeForCausalLM.from_experts(base, [base] * EXPERTS)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():  # experts that differ, so that tokens go to all of them
        for layer in mixture.model.layers:
            for weight in layer.mlp.experts.parameters():
                noise = torch.randn(
                    weight.shape, generator=generator, device=weight.device, dtype=weight.dtype
                )
                weight.add_(noise, alpha=0.3 * config.initializer_range)
    return processor, base, mixture


def contestants(size: str, device: str, new_tokens: int) -> tuple[dict, dict[str, int]]:
    """Functions to time, and the models' parameters."""
    from PIL import Image

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    processor, base, mixture = pair(size, device, dtype)
    picture = Image.effect_noise((336, 336), 60).convert("RGB")
    inputs = {
        name: tensor.to(device)
        for name, tensor in processor(images=[picture], text=PROMPT, return_tensors="pt").items()
    }
    fixed = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def generate(model):
        return lambda: model.generate(**inputs, **fixed)

    models = {DENSE: base, MIXTURE: mixture}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {name: generate(model) for name, model in models.items()}, counts


def main(arguments: list[str] | None = None) -> None:
    """Measure all sizes and write generation.json."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--new-tokens", type=int, default=48, help="tokens to write")
    options = prepare(made.parse_args(arguments))
    new_tokens = 4 if options.quick else options.new_tokens
    sizes = [("tiny", "cpu")] if options.quick else [("tiny", "cpu"), ("middle", "cpu")]
    gpu = "released, GPU"
    rows, runs = [], {}
    if torch.cuda.is_available() and not options.quick:
        sizes.append(("released", "cuda"))
    for size, device in sizes:
        functions, counts = contestants(size, device, new_tokens)
        seconds = side_by_side(functions, options.repetitions, title=size, silent=options.silent)
        speed = {name: new_tokens / median for name, median in medians(seconds).items()}
        title = gpu if device == "cuda" else size
        ratio = speed[MIXTURE] / speed[DENSE]
        rows.append([title, counts[DENSE], counts[MIXTURE], speed[DENSE], speed[MIXTURE], ratio])
        runs[title] = {
            name: {"seconds": times, "spread": spread(times), "new_tokens": new_tokens}
            for name, times in seconds.items()
        }
    if gpu not in runs:
        rows.append([gpu] + [None] * (len(COLUMNS) - 1))
    report("generation", options, COLUMNS, rows, runs, NOTE)


if __name__ == "__main__":
    main()
