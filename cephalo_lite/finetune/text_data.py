"""Rows of text as chats, and chats as tokens of which only the answers are learnt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..phi3v.labels import IGNORED, answer_labels

Message = dict[str, str]  # "role" and "content"
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Tokenized:
    """Rows as a trainer reads them, and what became of the others."""

    dataset: Dataset  # columns input_ids and labels
    cut: int  # rows longer than max_length, which lost their end
    dropped: int  # rows of which no answer was left


def load_rows(source: str | Path, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a dataset on the hub or of a JSON Lines file.

    Args:
        source: a file that ends in `.jsonl`, or the name of a dataset, whose "train" split is read.
        count: so many rows at most, drawn with the seed; None is all, in their order.
        seed: of the draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no rows, or the rows are of no known kind (see `messages_of`).
    """
    if str(source).endswith(".jsonl"):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"{source} does not exist: pass a JSON Lines file, a row a line."
            )
        rows = load_dataset("json", data_files=str(source), split="train")
    else:
        rows = load_dataset(str(source), split="train")
    if count is not None and count < len(rows):
        rows = rows.shuffle(seed).select(range(count))
    found = rows.to_list()
    if not found:
        raise ValueError(f"{source} holds no rows.")
    messages_of(found[0])
    return found


def split_rows(rows: Sequence, held_out: float = 0.1, seed: int = 0) -> tuple[list, list]:
    """Rows to train on and rows to judge by, both in a seeded order.

    Args:
        rows: two or more.
        held_out: share of the second part; each part has one row at least.
        seed: the same seed splits the same rows alike.

    Raises:
        ValueError: too few rows, or a share that is none.
    """
    if len(rows) < 2 or not 0 < held_out < 1:
        raise ValueError(f"{len(rows)} rows cannot be split with held_out={held_out}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(rows) - 1, max(1, round(held_out * len(rows))))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The chat of a row of any kind that is known here.

    Args:
        row: with `messages`; with `instruction`, `output` and by choice `input` (any case); or with
            a `text` in guanaco's style.

    Raises:
        ValueError: the row is of none of these kinds.
    """
    fields = {key.lower() for key in row}
    if "messages" in row:
        return list(row["messages"])
    if {"instruction", "output"} <= fields:
        return instruction_messages(row)
    if "text" in row:
        return guanaco_messages(row["text"])
    raise ValueError(
        f"A row has the fields {', '.join(row)}; it needs messages, or instruction and output, or "
        "text in guanaco's style."
    )


def instruction_messages(row: Mapping[str, str]) -> list[Message]:
    """A chat of an Instruction / Input / Output row; the answer is the output and nothing else."""
    fields = {key.lower(): value for key, value in row.items()}
    question = fields["instruction"].strip()
    if (fields.get("input") or "").strip():
        question = f"{question}\nInput: {fields['input'].strip()}"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": fields["output"].strip()},
    ]


def instruction_messages_2024(row: Mapping[str, str]) -> list[Message]:
    """The same row as the recipe of 2024 had it: its target tells the question once more.

    A model that learns this says everything twice. Kept to compare with; see
    `instruction_messages`.
    """
    question, answer = instruction_messages(row)
    told = f"### Instruction:\n{question['content']}\n\n### Output:\n{answer['content']}"
    return [question, {"role": "assistant", "content": told}]


def guanaco_messages(text: str) -> list[Message]:
    """A chat of text with `### Human:` and `### Assistant:` before the turns.

    Args:
        text: a row of such as timdettmers/openassistant-guanaco.

    Raises:
        ValueError: there is no turn, or no answer, in the text.
    """
    parts = re.split(r"(?:^|\n?\s*)###\s*(Human|Assistant):", text)
    messages = [
        {"role": SPEAKERS[speaker], "content": turn.strip()}
        for speaker, turn in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if parts[0].strip() or not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"No turns of '### Human:' and '### Assistant:' in {text[:60]!r}.")
    return messages


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Tokenized:
    """Chats as token ids and labels; of all turns the assistant's and their `<|end|>` are learnt.

    Args:
        rows: see `messages_of`.
        tokenizer: has a chat template in Phi-3's format.
        max_length: tokens; a longer row loses its end, and is dropped where no answer is left.

    Returns:
        The rows, with the numbers of those cut and dropped.

    Raises:
        ValueError: a row of no known kind, a tokenizer that does not write Phi-3's chats, or no row
            with an answer.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: take that of an instruct model.")
    kept: dict[str, list] = {"input_ids": [], "labels": []}
    cut = dropped = 0
    for row in rows:
        messages = messages_of(row)
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        labels = answer_labels(ids, tokenizer)
        if all(label == IGNORED for label in labels):
            raise ValueError(
                f"No answer was found in the row {messages}: it has no assistant's turn, or "
                "the tokenizer's chat template is not Phi-3's (<|assistant|> ... <|end|>)."
            )
        cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORED for label in labels):
            dropped += 1
            continue
        kept["input_ids"].append(ids)
        kept["labels"].append(labels)
    if not kept["input_ids"]:
        raise ValueError(f"No row has an answer within max_length={max_length} tokens.")
    return Tokenized(Dataset.from_dict(kept), cut, dropped)
