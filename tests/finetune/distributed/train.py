"""One process of a small training: run by the tests here, with orders, or by torchrun.

Orders come as the global `ORDERS` or, in JSON, as the first argument.
"""

# ruff: noqa: E402  (the environment is set before anything reads it)

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

ORDERS = globals().get("ORDERS") or json.loads(sys.argv[1])
os.environ.update(ORDERS.get("environment", {}))
RANK = int(os.environ.get("RANK", 0))
if "log" in ORDERS:
    os.dup2(os.open(f"{ORDERS['log']}.{RANK}", os.O_WRONLY | os.O_CREAT), 2)

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, Phi3ForCausalLM, Trainer

from cephalo_lite import load
from cephalo_lite.finetune import RECIPES, sft
from cephalo_lite.finetune.distributed import TrainsTogether, difference, load_sharded, sharding
from cephalo_lite.quantize import load_4bit

COLOURS = ("red", "blue", "green", "pink", "grey", "gold", "teal", "plum", "orange", "navy")
SHORT = {
    "r": 4, "learning_rate": 1e-2, "optimizer": "adamw_torch", "batch": 2, "accumulation": 2,
    "max_steps": 7, "max_length": 128, "eval_steps": 3, "dropout": 0.2,
}  # fmt: skip
TEXTS = [
    {"instruction": f"Name colour {number}." + " Please." * (number % 4), "output": colour}
    for number, colour in enumerate(COLOURS)
]
PICTURES = [  # two rows of three are text alone, so some batches are
    {"query": f"Colour {number}?" + " Say it." * (number % 4), "answer": colour}
    | ({"images": [Image.new("RGB", (28, 28), colour)]} if number % 3 == 0 else {})
    for number, colour in enumerate(COLOURS)
]


def prepare(kind: str, folder: Path):
    """Model, tokenizer or processor, and rows."""
    if kind == "phi3":
        tokenizer = AutoTokenizer.from_pretrained(folder / "phimoe")
        return Phi3ForCausalLM.from_pretrained(folder / "phi3"), tokenizer, TEXTS
    if kind == "4-bit":
        model, _ = load_4bit(folder / "phimoe", torch.float32, progress=False)
        return model, AutoTokenizer.from_pretrained(folder / "phimoe"), TEXTS
    if "sharded" in ORDERS:
        model, processor, _ = load_sharded(folder / "mixture", **ORDERS["sharded"])
        return model, processor, PICTURES
    return *load(folder / "mixture"), PICTURES


def die_at(batch: int) -> None:
    """SIGKILL after the backward pass of a batch, counted from 1."""
    left, step = [batch], Trainer.training_step

    def training_step(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer.training_step = training_step


def die_while_saving(checkpoint: int) -> None:
    """SIGKILL when half of the optimizer's file of a checkpoint, counted from 1, is written."""
    left, save = [checkpoint], torch.save

    def torch_save(what, file, *args, **kwargs):
        save(what, file, *args, **kwargs)
        if str(file).endswith("optimizer.pt"):
            left[0] -= 1
            if not left[0]:
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torch_save


def fill_disk(largest: int) -> None:
    """No file of this process may be larger than so many bytes, as if the disk were full then."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def main() -> None:
    """Train, and report losses, weights and what this process holds."""
    torch.set_num_threads(1)
    if ORDERS.get("unchecked"):  # as transformers' trainer does it
        del TrainsTogether._prepare_for_training
    for break_off in (die_at, die_while_saving, fill_disk):
        if break_off.__name__ in ORDERS:
            break_off(ORDERS[break_off.__name__])
    model, tokenizer, rows = prepare(ORDERS["kind"], Path(ORDERS["models"]))
    recipe = replace(RECIPES[ORDERS["recipe"]], **SHORT | ORDERS.get("numbers", {}))
    trained, report = sft(
        model, tokenizer, rows[:8], rows[8:], recipe, ORDERS["out"], progress=False
    )
    together = torch.distributed.is_initialized()
    spread = sharding(trained)
    said = {
        "losses": [loss for _, loss in report.losses],
        "eval_losses": [loss for _, loss in report.eval_losses],
        "resumed_at": report.resumed_at,
        "processes": spread.processes,
        "share": spread.share,
        "difference": difference(trained) if together else 0.0,
    }
    weights = {
        name: getattr(parameter, "full_tensor", parameter.detach)().detach().contiguous()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }
    save_file(weights, f"{ORDERS['report']}.{RANK}.safetensors")
    Path(f"{ORDERS['report']}.{RANK}.json").write_text(json.dumps(said), "utf-8")


main()
