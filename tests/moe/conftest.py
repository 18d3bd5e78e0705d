"""Dense golden checkpoints on the disk, changed by seeded noise, for the tests of building."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def golden_plain() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "plain" / "model.safetensors")


@pytest.fixture(scope="session")
def golden_moe() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "moe" / "model.safetensors")


@pytest.fixture
def make_dense(tmp_path, golden_plain):
    """A function that writes a dense checkpoint: the golden one with changes."""

    def make(
        name: str,
        noise: float = 0.0,
        seed: int = 0,
        where: str = ".mlp.",
        tensors: dict | None = None,
        config: dict | None = None,
        shards: int = 1,
        tokenizer: bool = False,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for key, tensor in golden_plain.items():
            weights[key] = tensor
            if noise and key.startswith("model.layers.") and where in key:
                change = torch.randn(tensor.shape, generator=generator)
                weights[key] = tensor + noise * change * tensor.norm() / change.norm()
        weights |= tensors or {}
        weights = {key: tensor for key, tensor in weights.items() if tensor is not None}
        fields = json.loads((GOLDEN / "plain" / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(fields))
        shutil.copy(GOLDEN / "plain" / "generation_config.json", folder)
        if tokenizer:
            for file in (GOLDEN / "tokenizer").iterdir():
                shutil.copy(file, folder)
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: weights[key] for key in list(weights)[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def read_weights():
    """A function that reads a checkpoint's tensors with the safetensors library."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            assert not weights.keys() & part.keys()
            weights |= part
        return weights

    return read
