"""A small mixture with wide random gates, and a conversation about a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

import cephalo_lite as cl
from cephalo_lite.tiny.tokenizer import make_tokenizer

NAMES = ["materials", "general", "latex"]
LONG = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\nA honeycomb.<|end|>\n"
SHORT = "<|user|>\nWhy?<|end|>\n<|assistant|>\nFibres.<|end|>\n"


@pytest.fixture(scope="module")
def processor():
    pictures = cl.Phi3VImageProcessor(num_crops=2, crop_size=56, num_img_tokens=4)
    tokenizer = make_tokenizer(["What is shown? A honeycomb of fibres."], vocab_size=300)
    return cl.Phi3VProcessor(pictures, tokenizer)


@pytest.fixture(scope="module")
def make_mixture(processor):
    def make(k=1, moe_layers=None, router="cephalo", order="sub_glb"):
        torch.manual_seed(0)
        ids = processor.tokenizer.convert_tokens_to_ids
        config = cl.Phi3VMoeConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=512,
            original_max_position_embeddings=512,
            initializer_range=0.3,
            vocab_size=len(processor.tokenizer),
            image_token_id=processor.image_token_id,
            eos_token_id=[ids("<|end|>"), ids("<|endoftext|>")],
            pad_token_id=ids("<|endoftext|>"),
            embd_layer={"hd_transform_order": order},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            k=k,
            num_expert_models=3,
            expert_names=NAMES,
            moe_layers=moe_layers,
            router=router,
        )
        model = cl.Phi3VMoeForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if ".experts." in name or ".gate.weight" in name:
                torch.nn.init.normal_(weight, std=0.3 if ".experts." in name else 1)
        return model

    return make


@pytest.fixture(scope="module")
def model(make_mixture):
    return make_mixture()


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def long(processor, picture):
    return processor(images=picture, text=LONG)
