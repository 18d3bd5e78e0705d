"""A run that was killed and goes on ends as one that was not: losses, weights, checkpoints."""

import json

import pytest
import torch

RUNS = {  # the kill comes in the second epoch, and the checkpoint is from its middle
    "4-bit": {
        "kind": "4-bit", "recipe": "phi35_moe", "die_at": 11,
        "numbers": {"groups": ["attention", "experts", "router"], "balance": 0.01,
                    "optimizer": "paged_adamw_8bit", "group_by_length": True},
    },
    "everything": {
        "kind": "mixture", "recipe": "moe_full", "die_at": 12,
        "numbers": {"learning_rate": 1e-3},
    },
    "gates": {"kind": "mixture", "recipe": "moe_gates", "die_at": 8, "numbers": {}},
    "two processes": {
        "processes": 2, "kind": "mixture", "recipe": "moe_adapters", "die_at": 5,
        "numbers": {"accumulation": 1},
    },
}  # fmt: skip


def assert_same(one, other):
    assert one.codes == [0] * len(one.codes) and other.codes == [0] * len(other.codes), other.log
    for ours, theirs in zip(one.said, other.said, strict=True):
        for key in ("losses", "eval_losses"):
            torch.testing.assert_close(
                torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=1e-6, atol=1e-6
            )
    first = one.weights[0]
    for weights in (*one.weights[1:], *other.weights):  # of all processes of both
        assert weights.keys() == first.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_exactly(name, start, tmp_path):
    orders = dict(RUNS[name])
    batch = orders.pop("die_at")
    whole = start(**orders, out=str(tmp_path / "whole"))
    killed = start(**orders, out=str(tmp_path / "killed"), die_at=batch)
    assert set(killed.codes) == {-9} and not killed.said, killed.log
    again = start(**orders, out=str(tmp_path / "killed"))
    print(whole.codes, whole.log[-3000:], [(s["losses"], s["difference"]) for s in whole.said])
    assert_same(whole, again)
    assert (whole.said[0]["resumed_at"], again.said[0]["resumed_at"]) == (0, 3)
