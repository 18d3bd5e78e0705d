"""Small checkpoints of all four kinds on the disk, in their published layouts."""

from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.moe import routers
from cephalo_lite.quantize import convert_4bit, load_4bit

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tensors are tiny here: two threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def widen(model: torch.nn.Module, seed: int = 0):
    """Seeded weights, wide enough that every token matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, golden_tokenizer, small_processor, make_small):
    """A function that gives a checkpoint folder of a kind and dtype; tests only read it."""
    folders: dict[tuple, Path] = {}

    def mixture():
        model = Phi3VMoeForCausalLM.from_experts(make_small(), [make_small(1), make_small(2)], 2)
        with torch.no_grad():
            for router in routers(model):
                router.gate.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(7))
        return model

    makers = {
        "phi3": lambda: widen(Phi3ForCausalLM(Phi3Config(**SIZES))),
        "phimoe": lambda: widen(PhimoeForCausalLM(PhimoeConfig(**SIZES, **EXPERTS))),
        "phi3_v": make_small,
        "phi3_v_moe": mixture,
    }

    def folder(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in folders:
            folders[kind, dtype] = tmp_path_factory.mktemp(kind)
            makers[kind]().to(dtype).save_pretrained(folders[kind, dtype])
            reader = small_processor if "_v" in kind else golden_tokenizer
            reader.save_pretrained(folders[kind, dtype])
        return folders[kind, dtype]

    return folder


@pytest.fixture(scope="session")
def load(make_folder, tmp_path_factory):
    """A function that loads one of them in 4 bits, anew; quantised once, which takes the time."""
    packed: dict[tuple, Path] = {}

    def load(kind: str = "phimoe", dtype: torch.dtype = torch.float32):
        if (kind, dtype) not in packed:
            packed[kind, dtype] = tmp_path_factory.mktemp("packed") / kind
            convert_4bit(make_folder(kind, dtype), packed[kind, dtype], progress=False)
        return load_4bit(packed[kind, dtype], dtype=dtype, device="cpu", progress=False)[0]

    return load


@pytest.fixture(scope="session")
def text_ids() -> torch.Tensor:
    """Two rows of 20 seeded ids without special tokens."""
    return torch.randint(3, 340, (2, 20), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def unpacked():
    """A function that gives a model's weights by name, the packed ones dequantised."""
    from bitsandbytes.functional import dequantize_4bit

    def weights(model) -> dict[str, torch.Tensor]:
        return {
            name: dequantize_4bit(parameter.data, parameter.quant_state)
            if type(parameter).__name__ == "Params4bit"
            else parameter.detach()
            for name, parameter in model.named_parameters()
        }

    return weights


@pytest.fixture(scope="session")
def fuse():
    """A function that stacks the experts of Phi-3.5-MoE as the stock class has them."""

    def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
        for layer in range(SIZES["num_hidden_layers"]):
            stem = f"model.layers.{layer}.mlp.experts."
            parts = [
                [weights[f"{stem}{e}.{matrix}.weight"] for matrix in ("w1", "w3", "w2")]
                for e in range(EXPERTS["num_local_experts"])
            ]
            found[f"{stem}gate_up_proj"] = torch.stack([torch.cat(p[:2]) for p in parts])
            found[f"{stem}down_proj"] = torch.stack([p[2] for p in parts])
        return found

    return fused


@pytest.fixture
def adapt():
    """A function that puts seeded LoRA on a model, in its dtype, the second factors not zero."""
    from peft import LoraConfig, get_peft_model

    def adapted(model, *targets: str, r: int = 4, **options):
        config = LoraConfig(r=r, lora_alpha=8, target_modules=list(targets), **options)
        dtype = model.config.dtype
        model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1, generator=generator)
                    parameter.data = parameter.data.to(dtype)
        return model

    return adapted
