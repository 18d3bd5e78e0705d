"""What a training step keeps besides weights and gradients, estimated layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

LOGIT_BYTES = 12  # per logit: half precision and float32, and the gradients of both


class Adapted(NamedTuple):
    """Layers of one shape in a decoder layer that have an adapter."""

    inputs: int  # width of what they read
    per_token: float  # how many of them a token passes through


def activation_bytes(
    config: PretrainedConfig,
    adapted: Sequence[Adapted],
    rank: int,
    sequence: int,
    batch: int,
    dtype: torch.dtype,
) -> int:
    """Estimate a step's activations with gradient checkpointing.

    Kept all along are the inputs of the layers. On top of them comes the larger of two moments: the
    loss, whose logits exist in several forms, or the backward pass of one layer, which holds what
    that layer saved and one unpacked matrix. Tensors are counted in the code of the models, with
    dropout before the adapters; the largest ones are compared with measurements in the tests.

    Args:
        config: of the model.
        adapted: the adapted layers of one decoder layer.
        rank: r of the adapters.
        sequence: tokens T.
        batch: sequences B.
        dtype: of activations.

    Returns:
        Bytes.
    """
    tokens, size = sequence * batch, dtype.itemsize
    width, inner = config.hidden_size, config.intermediate_size  # D, F
    chosen = experts_per_token(config)
    # Per token: an adapter saves its dropped-out input, the mask of that, and its inner activation.
    saved = sum((2 * each.inputs + rank) * each.per_token for each in adapted)
    saved += attention_numbers(config)
    saved += 2 * width  # what the two norms read
    saved += 3 * inner * chosen  # gate, its activation, up
    if config.model_type == "phimoe":
        saved += 3 * width  # two jitters, and what the router reads
    else:
        saved += 4 * width  # RMS norms compute in float32
    if chosen > 1 or config.model_type != "phi3":
        saved += chosen * width  # the experts' outputs before they are weighted
    layer = int(tokens * size * saved) + size * width * inner  # and one unpacked matrix
    loss = LOGIT_BYTES * tokens * config.vocab_size
    return config.num_hidden_layers * tokens * width * size + max(layer, loss)


def attention_numbers(config: PretrainedConfig) -> int:
    """Numbers per token that attention saves: queries, keys and values, and their result."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    repeated = 2 * queries if keys < queries else 0  # keys and values, once per query head
    return 2 * queries + 2 * keys + repeated


def experts_per_token(config: PretrainedConfig) -> int:
    """K; of Phi-3.5-MoE always 2, as its router was written; of a dense model 1."""
    if config.model_type == "phimoe":
        return 2
    return getattr(config, "k", 1) if config.model_type == "phi3_v_moe" else 1
