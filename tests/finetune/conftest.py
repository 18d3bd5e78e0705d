"""Very small random text models and a tokenizer in the format of Phi-3.5."""

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.finetune import sft
from cephalo_lite.quantize.models import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM
from cephalo_lite.tiny.text.tokenizer import make_tokenizer

TEXTS = [
    "Write a function that adds two numbers.",
    "def add(a, b):\n    return a + b",
    "Input: add(1, 2) gives 3. What is the capital of France? Paris is.",
    "Name a colour. Red. And another one? Blue, say.",
]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(TEXTS, vocab_size=340)


@pytest.fixture(scope="session")
def shape(tokenizer):
    """Fields that the text models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def make_dense(shape):
    """A function that makes a small seeded Phi-3."""

    def make(seed: int = 0) -> Phi3ForCausalLM:
        torch.manual_seed(seed)
        return Phi3ForCausalLM(Phi3Config(**shape, intermediate_size=48)).eval()

    return make


@pytest.fixture(scope="session")
def phimoe_config(shape):
    """A function that makes the configuration of a small Phi-3.5-MoE, with biases as released."""
    fields = {name: value for name, value in shape.items() if not name.startswith("original")}
    return lambda: PhimoeConfig(
        **fields,
        intermediate_size=16,
        num_local_experts=4,
        attention_bias=True,
        lm_head_bias=True,
        router_aux_loss_coef=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


@pytest.fixture(scope="session")
def make_moe(phimoe_config):
    """A function that makes a small seeded Phi-3.5-MoE, experts one by one."""

    def make(seed: int = 0) -> SequentialPhimoeForCausalLM:
        torch.manual_seed(seed)
        model = SequentialPhimoeForCausalLM(phimoe_config()).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and "norm" not in name:
                    parameter.normal_(0, 0.5, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def make_vision_moe(make_small):
    """A function that makes a small mixture of Phi-3-Vision models, experts one by one."""

    def make() -> SequentialPhi3VMoeForCausalLM:
        base = make_small()
        fused = Phi3VMoeForCausalLM.from_experts(base, [base, make_small(1)], 2)
        torch.manual_seed(0)
        model = SequentialPhi3VMoeForCausalLM(fused.config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.25 if "vision" in name else 0.15, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def wake():
    """A function that gives the zero halves of adapters seeded values, as training would."""

    def wake(model, seed: int = 3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(0, 0.1, generator=generator)
                elif ".modules_to_save." in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.1 * noise.to(parameter.dtype)
        return model

    return wake


@pytest.fixture
def make_mixture(make_small):
    """A function that makes a small mixture of two experts, fused."""

    def make(k: int = 1, dtype=torch.float32):
        experts = [make_small(1), make_small(2)]
        return Phi3VMoeForCausalLM.from_experts(make_small(), experts, k).to(dtype)

    return make


@pytest.fixture
def make_run(tmp_path):
    """A function that makes one that trains on the rows it was given, in a folder of this test."""

    def make(reader, rows, held_out):
        def run(model, recipe, train=rows, folder="run", **options):
            options = {"progress": False, **options}
            return sft(model, reader, train, held_out, recipe, tmp_path / folder, **options)

        return run

    return make
