"""Two processes, by DDP, FSDP2, and FSDP2 with experts apart, learn what one learns."""

import pytest
import torch
from packaging.version import Version

from cephalo_lite import load
from cephalo_lite.finetune import distributed

STEPS = {
    "accumulation": 1, "dropout": 0.0, "max_steps": 4, "eval_steps": 4, "optimizer": "sgd",
    "balance": 0.0, "router_z": 0.0, "group_by_length": False, "learning_rate": 0.05, "warmup": 0.0,
}  # fmt: skip
ENGINES = {"ddp": None, "fsdp": {}, "experts": {"ep_size": 2}}
OLD = Version(distributed.TRANSFORMERS) < Version(distributed.EXPERTS_APART)
APART = pytest.param("experts", marks=pytest.mark.skipif(OLD, reason="refused: see below"))


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """One process, batches of four: what two with batches of two each see together."""
    ended = start(kind="mixture", recipe="moe_full", numbers=STEPS | {"batch": 4},
                  out=str(tmp_path_factory.mktemp("alone")))  # fmt: skip
    assert ended.codes == [0], ended.log
    return ended


@pytest.mark.parametrize("engine", ["ddp", "fsdp", APART])
def test_two_processes_learn_what_one_does(engine, start, alone, tmp_path):
    sharded = {} if ENGINES[engine] is None else {"sharded": ENGINES[engine]}
    pair = start(2, kind="mixture", recipe="moe_full", numbers=STEPS, out=str(tmp_path), **sharded)
    assert pair.codes == [0, 0], pair.log
    for said, weights in zip(pair.said, pair.weights, strict=True):
        assert said["processes"] == 2 and said["difference"] == 0
        assert said["share"] == pytest.approx(0.5 if sharded else 1, abs=0.01)
        for key in ("losses", "eval_losses"):
            assert said[key] == pytest.approx(alone.said[0][key], rel=1e-5)
        assert weights.keys() == alone.weights[0].keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone.weights[0][name], rtol=1e-4, atol=1e-6)
    saved = dict(load(tmp_path / "checkpoint-4")[0].named_parameters())  # a released folder
    for name, tensor in alone.weights[0].items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_sharded_training_does_not_go_on(start, tmp_path):
    """transformers saves no optimizer of it; a run without one would be another training."""
    orders = {"kind": "mixture", "recipe": "moe_gates", "out": str(tmp_path), "numbers": STEPS}
    first = start(2, **orders, sharded={"bf16": True})
    assert first.codes == [0, 0], first.log
    again = start(2, **orders, sharded={"bf16": True})
    assert set(again.codes) == {1} and "and not the optimizer: load the weights" in again.log


def test_releases_that_train_experts_apart_otherwise_are_refused(monkeypatch):
    """With transformers 5.20 to 5.22 the second loss is 0.02 % away, and no error is raised."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "TRANSFORMERS", "5.22.2")
    with pytest.raises(RuntimeError, match="needs transformers 5.23 .* learn something else"):
        distributed.load_sharded("anything", ep_size=2)
