"""A very small dense model and a mixture with random weights, which answer with some variety."""

import numpy as np
import pytest
import torch
from PIL import Image

import cephalo_lite as cl
from cephalo_lite.tiny.tokenizer import make_tokenizer

TEXTS = [
    "What is shown in this picture?",
    "Which structure is this? A honeycomb of fibres.",
    "How dense is it? The solid fraction is 0.42.",
    "You are a helpful assistant. Answer in a few words.",
]


@pytest.fixture(scope="session")
def processor():
    pictures = cl.Phi3VImageProcessor(num_crops=2, crop_size=56, num_img_tokens=4)
    return cl.Phi3VProcessor(pictures, make_tokenizer(TEXTS, vocab_size=320))


def config(processor, **changes):
    ids = processor.tokenizer.convert_tokens_to_ids
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "initializer_factor": 8.0,
    }
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": [ids("<|end|>"), ids("<|endoftext|>")],
        "pad_token_id": ids("<|endoftext|>"),
        "vocab_size": len(processor.tokenizer),
        "image_token_id": processor.image_token_id,
        "vision_config": tower,
    }
    return cl.Phi3VConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def make_model(processor):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        model = cl.Phi3VForCausalLM(config(processor, **changes)).eval()
        ends = model.model.vision_embed_tokens
        torch.nn.init.normal_(ends.sub_GN)
        torch.nn.init.normal_(ends.glb_GN)
        return model

    return make


@pytest.fixture(scope="session")
def dense(make_model):
    return make_model()


@pytest.fixture(scope="session")
def mixture(make_model):
    experts = [make_model(seed) for seed in (0, 1, 2)]
    names = ["materials", "general", "latex"]
    model = cl.Phi3VMoeForCausalLM.from_experts(experts[0], experts, expert_names=names)
    generator = torch.Generator().manual_seed(0)
    for router in cl.moe.routers(model):
        weight = router.gate.weight
        weight.data = torch.randn(weight.shape, generator=generator)
    return model


def picture(seed, width=60, height=30):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def pictures():
    return [picture(0), picture(1, 40, 70), picture(2, 50, 50)]


@pytest.fixture
def count_read():
    """Counts the tokens that a model reads, call by call."""
    hooks = []

    def watch(model):
        read = []
        layer = model.model.layers[0]
        hooks.append(
            layer.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
        )
        return read

    yield watch
    for hook in hooks:
        hook.remove()
