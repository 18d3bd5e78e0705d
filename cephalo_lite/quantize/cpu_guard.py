"""Keep bitsandbytes from repacking weights on CPUs with AVX512-BF16.

On such a CPU a `Linear4bit` in eval mode changes its packed weight in place at the first forward
whose input needs no gradient, into a layout that only inference can read, and rounds the scales on
the way. A later training step then fails ("a view of a leaf Variable ..."), or, where the layer has
no bias, returns an output without a gradient. An evaluation during training is enough.

Source: `Linear4bit.forward` and `matmul_4bit` of bitsandbytes 0.50.
"""

from __future__ import annotations

from torch import nn


def guard_cpu(model: nn.Module) -> int:
    """Let no 4-bit layer of a model be repacked.

    Args:
        model: any model; on a GPU nothing changes.

    Returns:
        Number of layers that would have been repacked on this machine.

    Raises:
        ValueError: a layer is repacked already; its scales were rounded, so it must be loaded anew.
    """
    spoilt = repacked_layers(model)
    if spoilt:
        raise ValueError(
            f"{len(spoilt)} 4-bit layers were repacked for inference on this CPU, such as "
            f"{spoilt[0]}: they cannot be trained any more. Load the model again with load_4bit."
        )
    exposed = exposed_layers(model)
    for name in exposed:
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    return len(exposed)


def exposed_layers(model: nn.Module) -> list[str]:
    """Names of the 4-bit layers that the next evaluation on a CPU would repack."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "support_avx512bf16_for_cpu", False)
    ]


def repacked_layers(model: nn.Module) -> list[str]:
    """Names of the 4-bit layers that an evaluation has repacked."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(
            getattr(getattr(module, "weight", None), "quant_state", None),
            "packing_format_for_cpu",
            False,
        )
    ]
