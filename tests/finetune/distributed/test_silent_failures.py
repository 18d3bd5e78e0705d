"""What several processes do wrong without an error, and that here there is one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cephalo_lite.finetune.distributed import (
    check_processes,
    check_trainable,
    check_wrapped,
    load_sharded,
)

PLAIN = Path(__file__).parent / "plain.py"
RUN = {"kind": "phi3", "recipe": "phi35_mini", "numbers": {"max_steps": 2, "accumulation": 1}}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


@on_cpu
def test_each_process_takes_itself_for_the_only_one(start, tmp_path):
    """Without use_cpu; both would write to one folder."""
    orders = {"out": str(tmp_path), "settings": {}}
    silent = start(2, PLAIN, checked=False, **orders)
    assert silent.codes == [0, 0], silent.log
    assert silent.said == [{"rank": 0, "of": 1}] * 2
    checked = start(2, PLAIN, checked=True, **orders)
    assert set(checked.codes) == {1} and not checked.said
    assert "RuntimeError: 2 processes were to be started, and the trainer knows of 1" in checked.log
    told = start(2, PLAIN, checked=True, **orders | {"settings": {"use_cpu": True}})
    assert told.said == [{"rank": 0, "of": 2}, {"rank": 1, "of": 2}], told.log


def test_an_evaluation_before_training_leaves_each_process_alone(start, tmp_path):
    """`sft` evaluates first; accelerate then takes the model for wrapped, and wraps nothing."""
    silent = start(2, **RUN, out=str(tmp_path / "silent"), unchecked=True)
    assert silent.codes == [0, 0], silent.log
    assert silent.said[0]["difference"] > 1e-3
    together = start(2, **RUN, out=str(tmp_path / "together"))
    assert [said["difference"] for said in together.said] == [0, 0], together.log


def test_fsdp_of_accelerate_that_is_ddp(start, tmp_path):
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    ended = start(2, **RUN, out=str(tmp_path), environment=environment)
    assert set(ended.codes) == {1}
    assert "FSDP was asked for, and accelerate made DDP of it" in ended.log


def test_what_one_process_can_tell(monkeypatch, tmp_path):
    check_processes(1)
    with pytest.raises(RuntimeError, match="2 processes were to be started"):
        check_processes(1, started=2)  # `accelerate launch --cpu --num_processes 2`
    check_wrapped(nn.Linear(2, 2), 1)
    with pytest.raises(RuntimeError, match="neither in DDP nor sharded"):
        check_wrapped(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="paged_adamw_8bit does not know tensors"):
        check_trainable(nn.Linear(2, 2), "paged_adamw_8bit")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="start several by torchrun"):
        load_sharded(tmp_path)
