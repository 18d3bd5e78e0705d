"""A run that was killed and goes on ends as one that was not: losses, weights, checkpoints."""

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
    assert_same(whole, again)
    assert (whole.said[0]["resumed_at"], again.said[0]["resumed_at"]) == (0, 3)
    for run in ("whole", "killed"):  # the last two are kept
        found = sorted(path.name for path in (tmp_path / run).glob("*checkpoint-*"))
        assert found == ["checkpoint-6", "checkpoint-7"]


def test_a_checkpoint_that_was_not_finished_is_none(start, tmp_path):
    """Killed within a file of the second checkpoint, the next run goes on from the first."""
    orders = {"kind": "phi3", "recipe": "phi35_mini", "numbers": {"groups": ["attention"]}}
    whole = start(**orders, out=str(tmp_path / "whole"))
    killed = start(**orders, out=str(tmp_path / "killed"), die_while_saving=2)
    assert killed.codes == [-9], killed.log
    names = {path.name for path in (tmp_path / "killed").glob("*checkpoint-*")}
    assert names == {"checkpoint-3", ".checkpoint-6.partial"}
    torn = tmp_path / "killed" / ".checkpoint-6.partial" / "checkpoint-6"
    assert (torn / "adapter_model.safetensors").is_file()
    again = start(**orders, out=str(tmp_path / "killed"))
    assert_same(whole, again)
    assert again.said[0]["resumed_at"] == 3 and not torn.exists()


def test_a_full_disk_leaves_the_last_checkpoint(start, tmp_path):
    orders = {"kind": "mixture", "recipe": "moe_full", "out": str(tmp_path), "numbers": {}}
    assert start(**orders, die_at=8).codes == [-9]
    good = {path: path.read_bytes() for path in (tmp_path / "checkpoint-3").iterdir()}
    for file in ("model.safetensors", "optimizer.pt"):  # written by two libraries
        size = (tmp_path / "checkpoint-3" / file).stat().st_size
        full = start(**orders, fill_disk=size - 1000)
        assert full.codes == [1] and not full.said
        last = full.log.strip().splitlines()[-1]
        assert last.startswith("OSError: ") and "checkpoint-6 could not be written" in last
        assert "make room" in last and "checkpoint-3 is whole" in last
        assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-3"}
        assert {path: path.read_bytes() for path in good} == good


def test_another_number_of_processes_does_not_go_on(start, tmp_path):
    """Its batches and random numbers would be others."""
    orders = {"kind": "phi3", "recipe": "phi35_mini", "out": str(tmp_path), "numbers": {}}
    assert start(**orders, die_at=8).codes == [-9]
    pair = start(2, **orders)
    assert 1 in pair.codes and "was written by 1 processes and this run has 2" in pair.log
