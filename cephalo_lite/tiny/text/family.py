"""The shapes of the tiny text models: small versions of Phi-3.5-mini and Phi-3.5-MoE."""

from __future__ import annotations

from transformers import (
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
)

from . import MEMBERS

SHARED = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.04,  # narrow layers start wider than the released 0.02
    "tie_word_embeddings": False,
}
PHI3 = {
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 1024,
}
PHIMOE = {
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_bias": True,  # this and the next as in the released Phi-3.5-MoE
    "lm_head_bias": True,
    "router_aux_loss_coef": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def make_model(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> Phi3ForCausalLM | PhimoeForCausalLM:
    """An untrained model for a tokenizer, in float32.

    Args:
        name: "phi3" (dense) or "phimoe" (8 experts, 2 per token).
        tokenizer: gives the size of the vocabulary and the ids that end an answer.

    Raises:
        ValueError: there is no such member.
    """
    if name not in MEMBERS:
        raise ValueError(f"No text model is called {name!r}; there are {', '.join(MEMBERS)}.")
    ids = tokenizer.convert_tokens_to_ids
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": ids("<s>"),
        "eos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    if name == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**SHARED, **PHI3, **tokens))
    else:
        model = PhimoeForCausalLM(PhimoeConfig(**SHARED, **PHIMOE, **tokens))
    stops = [ids("<|end|>"), ids("<|assistant|>"), ids("<|endoftext|>")]  # as the released ones
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"), eos_token_id=stops, pad_token_id=ids("<|endoftext|>")
    )
    return model
