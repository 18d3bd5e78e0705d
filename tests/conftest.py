"""What all tests share: the original code's golden tensors, and small seeded models."""

# ruff: noqa: E402  (the environment is set before anything reads it)

import importlib.util
import json
import os
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from cephalo_lite import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_meta() -> dict:
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="session")
def golden_case():
    """A function that reads the tensors of a golden case, such as "plain_text_only"."""
    return lambda name: load_file(GOLDEN / "cases" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny_tower() -> dict:
    """The golden models' CLIP tower; their config.json does not hold it."""
    return json.loads((GOLDEN / "clip_tiny_config.json").read_text())


@pytest.fixture(scope="session")
def load_golden(tiny_tower):
    """A function that loads the golden dense model anew; 359 is its `<|image|>`."""
    return lambda **options: Phi3VForCausalLM.from_pretrained(
        GOLDEN / "plain", vision_config=tiny_tower, image_token_id=359, **options
    )


@pytest.fixture(scope="session")
def golden_model(load_golden) -> Phi3VForCausalLM:
    """The golden dense model; tests leave it as it is."""
    return load_golden()


@pytest.fixture(scope="session")
def golden_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="session")
def golden_processor(golden_tokenizer) -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4), golden_tokenizer)


@pytest.fixture(scope="session")
def synth():
    """The function that rebuilds the golden pictures: synth(width, height, mode, kind)."""
    spec = importlib.util.spec_from_file_location("golden_synth", GOLDEN / "synth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.synth


@pytest.fixture(scope="session")
def small_processor(golden_tokenizer) -> Phi3VProcessor:
    """The golden tokenizer, with crops of 28 pixels: a square picture is 27 tokens."""
    return Phi3VProcessor(
        Phi3VImageProcessor(num_crops=4, crop_size=28, num_img_tokens=4), golden_tokenizer
    )


@pytest.fixture(scope="session")
def make_small():
    """A function that makes a small seeded model; fields change its configuration."""

    def make(seed: int = 0, **fields) -> Phi3VForCausalLM:
        settings = {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 5.0, 9.0],
            },
            "pad_token_id": 0,
            "image_token_id": 359,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "hidden_act": "quick_gelu",
            },
        }
        torch.manual_seed(seed)
        model = Phi3VForCausalLM._from_config(Phi3VConfig(**settings | fields)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # wide enough that every token and every picture changes the logits
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.25 if "vision" in name else 0.15, generator=generator)
                    if "embed_tokens" in name or name.endswith("GN"):
                        weight.mul_(4)
        return model

    return make


@pytest.fixture(scope="session")
def small_model(make_small) -> Phi3VForCausalLM:
    """A small seeded model; tests leave it as it is."""
    return make_small()
