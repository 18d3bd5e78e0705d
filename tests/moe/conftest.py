"""Golden checkpoints on the disk, changed by seeded noise, and mixtures in memory."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.moe import routers

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


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory):
    """A function that gives the golden mixture's folder for k = 1 or 2, of equal weights."""
    folders: dict[int, Path] = {}

    def folder(k: int) -> Path:
        if k not in folders:
            folders[k] = tmp_path_factory.mktemp(f"moe_k{k}")
            for file in (GOLDEN / f"moe_k{k}").iterdir():
                shutil.copy(file, folders[k])
            shutil.copy(GOLDEN / "moe" / "model.safetensors", folders[k])
        return folders[k]

    return folder


@pytest.fixture(scope="session")
def load_moe(moe_folder, tiny_tower):
    """A function that loads the golden mixture anew."""

    def load(k: int = 1, **options) -> Phi3VMoeForCausalLM:
        fixed = {"vision_config": tiny_tower, "image_token_id": 359}
        return Phi3VMoeForCausalLM.from_pretrained(moe_folder(k), **fixed | options)

    return load


@pytest.fixture(scope="session")
def golden_mixture(load_moe):
    """A function that gives the golden mixture for k = 1 or 2; tests leave it as it is."""
    return functools.cache(load_moe)


@pytest.fixture(scope="session")
def make_mixture(make_small):
    """A function that makes a small seeded mixture of models that differ in their MLPs.

    Its gates are wide enough that every expert gets tokens.
    """

    def make(experts: int = 3, k: int = 1, same: bool = False, **fields) -> Phi3VMoeForCausalLM:
        base = make_small()
        sources = [base if same else make_small(1 + number) for number in range(experts)]
        model = Phi3VMoeForCausalLM.from_experts(base, sources, k, **fields)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for router in routers(model):
                router.gate.weight.normal_(0, 0.5, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def text_ids() -> torch.Tensor:
    """Two rows of 24 seeded ids of the golden vocabulary, without special tokens or pictures."""
    return torch.randint(3, 340, (2, 24), generator=torch.Generator().manual_seed(11))
