"""Small models on the disk, and processes to train them in."""

import json
import multiprocessing
import multiprocessing.connection
import runpy
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cephalo_lite import Phi3VMoeForCausalLM

SCRIPT = Path(__file__).parent / "train.py"
# What all processes import is imported once, by a server that they are forked from.
HEAVY = ["cephalo_lite.finetune.supervised", "cephalo_lite.quantize", "trl.trainer.sft_trainer"]


@dataclass
class Ended:
    """What came of some processes."""

    codes: list[int]  # of exit; -9 is SIGKILL
    log: str
    said: list[dict]  # per process; empty where it did not come to its end
    weights: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def models(tmp_path_factory, make_dense, make_moe, make_small, tokenizer, small_processor) -> Path:
    """A folder with the small models `phi3`, `phimoe` and `mixture` (4 experts, 2 per token)."""
    folder = tmp_path_factory.mktemp("models")
    make_dense().save_pretrained(folder / "phi3")
    make_moe().save_pretrained(folder / "phimoe")
    tokenizer.save_pretrained(folder / "phimoe")
    experts = [make_small(seed) for seed in range(4)]
    mixture = Phi3VMoeForCausalLM.from_experts(experts[0], experts, 2)
    with torch.no_grad():  # sure enough that rounding does not send a token elsewhere
        for name, weight in mixture.named_parameters():
            if "gating_layer" in name:
                weight.mul_(20)
    mixture.save_pretrained(folder / "mixture")
    small_processor.save_pretrained(folder / "mixture")
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory, models):
    """A function that runs `train.py` in processes of its own, as torchrun would."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(HEAVY)

    def start(processes: int = 1, script: Path = SCRIPT, environment=(), **orders) -> Ended:
        folder = tmp_path_factory.mktemp("report")
        orders |= {"models": str(models), "report": str(folder / "of"), "log": str(folder / "log")}
        shared = {"HF_HUB_OFFLINE": "1", **dict(environment)}
        if processes > 1:
            shared |= {
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
            }  # fmt: skip
        started = []
        for rank in map(str, range(processes)):
            place = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            given = {"ORDERS": orders | {"environment": shared | place}}
            started.append(
                server.Process(target=runpy.run_path, args=(str(script), given, "__main__"))
            )
            started[-1].start()
        _wait(started)
        return Ended(
            [process.exitcode for process in started],
            "\n".join(file.read_text("utf-8") for file in sorted(folder.glob("log.*"))),
            [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))],
            [load_file(file) for file in sorted(folder.glob("*.safetensors"))],
        )

    return start


def _wait(processes, seconds: float = 120) -> None:
    """Until all have ended; where one ends badly the others would wait for it for ever."""
    waiting = list(processes)
    while waiting:
        ended = multiprocessing.connection.wait([p.sentinel for p in waiting], seconds)
        for process in processes:
            process.join(0)
        waiting = [process for process in processes if process.exitcode is None]
        if not ended or any(process.exitcode for process in processes):
            for process in waiting:
                process.join(5)
                process.kill()
                process.join()
            return


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
