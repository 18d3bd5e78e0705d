"""Folders on the disk as released checkpoints have them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
CODE = {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}
PREPROCESSOR = {
    "auto_map": {**CODE, "AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor"},
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Phi3VImageProcessor",
    "num_crops": 16,
    "num_img_tokens": 144,
    "processor_class": "Phi3VProcessor",
    "transformers_version": "4.38.1",
}


@pytest.fixture
def released(tmp_path, golden, tiny_tower):
    """A function that writes the golden model as a released folder.

    Released folders have no `vision_config` and `image_token_id`; without them the tower is ViT-L
    and the vocabulary that of Phi-3. Further `fields` change config.json.
    """

    def make(name: str = "released", shards: int = 1, wte: bool = False, **fields) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((golden / "plain" / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        }
        config["vision_config"] = tiny_tower
        config["image_token_id"] = 359
        (folder / "config.json").write_text(json.dumps(config | fields))
        shutil.copy(golden / "plain" / "generation_config.json", folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        for file in ("tokenizer.json", "special_tokens_map.json"):
            shutil.copy(golden / "tokenizer" / file, folder)
        tokenizer = json.loads((golden / "tokenizer" / "tokenizer_config.json").read_text())
        tokenizer |= {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "processor_class": "Phi3VProcessor",
        }
        tokenizer |= {
            "auto_map": CODE,
            "add_bos_token": True,
            "add_eos_token": False,
            "sp_model_kwargs": {},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        weights = load_file(golden / "plain" / "model.safetensors")
        if wte:
            weights["model.vision_embed_tokens.wte.weight"] = weights[
                "model.embed_tokens.weight"
            ].clone()
        write_shards(folder, weights, shards)
        return folder

    return make


def write_shards(folder: Path, weights: dict, shards: int) -> None:
    """One model.safetensors, or several shards with their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )


@pytest.fixture
def read_weights():
    """A function that reads all tensors of a folder with the safetensors library."""

    def read(folder: Path) -> dict:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            assert not weights.keys() & part.keys()
            weights |= part
        return weights

    return read
