"""Rows with pictures to fine-tune on, and what the tests of it look at."""

import dataclasses

import torch
from PIL import Image

from cephalo_lite.finetune import Recipe, conversation_of, parameter_groups

COLOURS = ("red", "blue", "green", "white", "black", "gray")
SHORT = {
    "r": 4, "learning_rate": 1e-2, "optimizer": "adamw_torch", "batch": 3, "accumulation": 1,
    "max_steps": 4, "max_length": 128, "eval_steps": 2, "dropout": 0.0, "schedule": "constant",
    "warmup": 0.0,
}  # fmt: skip


def short(recipe, **changes) -> Recipe:
    return dataclasses.replace(recipe, **{**SHORT, **changes})


def make_rows(count: int) -> list[dict]:
    """Pictures of one colour, each third with two of them, and each fourth row without any."""
    rows = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        one = Image.new("RGB", (28 + 28 * (number % 2), 28), colour)
        if number % 4 == 3:
            rows.append({"query": f"Say {colour}.", "answer": colour})
        elif number % 3 == 2:
            rows.append({"images": [one, one], "query": "Both?", "answer": colour})
        else:
            rows.append({"image": one, "query": "Which colour?", "answer": f"It is {colour}."})
    return rows


TRAIN, HELD_OUT = make_rows(9), make_rows(14)[9:]


@torch.no_grad()
def loss_by_hand(model, rows, processor) -> float:
    """Cross entropy of the answers' tokens, row by row, by the processor's own labels."""
    total, count = 0.0, 0
    for row in rows:
        read = conversation_of(row)
        text = processor.apply_chat_template(read.messages)
        inputs = processor(images=[read.pictures], text=[text], return_labels=True)
        labels = inputs.pop("labels")[0, 1:]
        logits = model.eval()(**inputs).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels >= 0).sum().item()
    return total / count


def changed_groups(model, plain) -> set[str]:
    before = dict(plain.named_parameters())
    return {
        group
        for group, members in parameter_groups(model).items()
        if any(not parameter.equal(before[name]) for name, parameter in members)
    }
