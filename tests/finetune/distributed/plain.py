"""One process that makes a trainer of transformers' own, and says what it knows of the others."""

# ruff: noqa: E402  (the environment is set before anything reads it)

import json
import os
from pathlib import Path

ORDERS = globals()["ORDERS"]
os.environ.update(ORDERS["environment"])
RANK = os.environ["RANK"]
os.dup2(os.open(f"{ORDERS['log']}.{RANK}", os.O_WRONLY | os.O_CREAT), 2)

from torch import nn
from transformers import Trainer, TrainingArguments

from cephalo_lite.finetune.distributed import TrainsTogether


class CheckedTrainer(TrainsTogether, Trainer):
    """What a reader writes who wants no recipe."""


settings = TrainingArguments(ORDERS["out"], report_to="none", **ORDERS["settings"])
kind = CheckedTrainer if ORDERS["checked"] else Trainer
trainer = kind(nn.Linear(2, 2), settings)
said = {"rank": trainer.args.process_index, "of": trainer.args.world_size}
Path(f"{ORDERS['report']}.{RANK}.json").write_text(json.dumps(said), "utf-8")
