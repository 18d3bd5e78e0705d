"""The shape of the tiny family: a Phi-3-Vision small enough to train on two CPU cores."""

from __future__ import annotations

from ..phi3v import Phi3VConfig, Phi3VImageProcessor, Phi3VProcessor
from .tokenizer import make_tokenizer
from .world import vocabulary_corpus

CROP, PATCH, NUM_CROPS = 112, 14, 2
TOWER = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "projection_dim": 96,
    "num_hidden_layers": 4,  # the last one is never computed, as in the released tower
    "num_attention_heads": 4,
    "image_size": CROP,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 2048,
    "initializer_range": 0.05,  # narrow layers start wider than the released 0.02
}


def tiny_processor(seed: int = 0, corpus_size: int = 3000) -> Phi3VProcessor:
    """A processor whose tokenizer was trained on the world's questions and answers."""
    tokenizer = make_tokenizer(vocabulary_corpus(corpus_size, seed))
    pictures = Phi3VImageProcessor(
        num_crops=NUM_CROPS, crop_size=CROP, num_img_tokens=(CROP // PATCH // 2) ** 2
    )
    return Phi3VProcessor(pictures, tokenizer)


def tiny_config(processor: Phi3VProcessor) -> Phi3VConfig:
    """The configuration of every member of the family, with this tokenizer's ids."""
    ids = processor.tokenizer.convert_tokens_to_ids
    return Phi3VConfig(
        **DECODER,
        vision_config=TOWER,
        vocab_size=len(processor.tokenizer),
        image_token_id=processor.image_token_id,
        bos_token_id=ids("<s>"),
        eos_token_id=[ids("<|end|>"), ids("<|endoftext|>")],
        pad_token_id=ids("<|endoftext|>"),
    )
