"""Where rows come from, and the chat that a row of any known kind is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

Message = dict[str, Any]  # "role" and "content": text, or a list of parts
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
IN_FILES = ("image", "images", "file_name", "file_names")  # fields that may hold paths of pictures
METADATA = "metadata.jsonl"  # of a folder of pictures, as `datasets` calls it


def load_rows(
    source: str | Path, count: int | None = None, seed: int = 0
) -> list[dict[str, Any]] | Dataset:
    """Rows of a dataset on the hub, of a JSON Lines file, or of a folder of pictures.

    Args:
        source: a file that ends in `.jsonl`; a folder with a `metadata.jsonl`; or the name of a
            dataset, whose "train" split is read. Paths of pictures in a file are relative to it.
        count: so many rows at most, drawn with the seed; None is all, in their order.
        seed: of the draw.

    Returns:
        A list; of a dataset that holds pictures a `Dataset`, which reads them when asked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no rows or a line that is no JSON, or the rows are of no known
            kind (see `messages_of`).
    """
    path = Path(source).expanduser()
    path = path / METADATA if path.is_dir() else path
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: pass a JSON Lines file, a row a line.")
        rows = Dataset.from_dict({"number": range(len(lines := _read_lines(path)))})
    else:
        rows, lines = load_dataset(str(source), split="train"), None
    if count is not None and count < len(rows):
        rows = rows.shuffle(seed).select(range(count))
    if lines is not None:
        found = [lines[number] for number in rows["number"]]
    else:
        found = rows if set(rows.column_names) & set(IN_FILES) else rows.to_list()
    if not len(found):
        raise ValueError(f"{source} holds no rows.")
    messages_of(found[0])
    return found


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, paths of pictures made whole."""
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {file} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} of {file} is no row: write {{...}}, a row a line.")
        rows.append(_placed(row, file.parent))
    return rows


def _placed(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row whose relative paths start from a folder; URLs and data URIs stay as they are."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(entry) for entry in value]
        if isinstance(value, str) and "://" not in value and not value.startswith("data:"):
            return str(folder / value)
        return value

    return {key: place(value) if key in IN_FILES else value for key, value in row.items()}


def split_rows(rows: Sequence, held_out: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Rows to train on and rows to judge by, both in a seeded order.

    Args:
        rows: two or more, a list or a `Dataset`; the parts are the same.
        held_out: share of the second part; each part has one row at least.
        seed: the same seed splits the same rows alike.

    Raises:
        ValueError: too few rows, or a share that is none.
    """
    if len(rows) < 2 or not 0 < held_out < 1:
        raise ValueError(f"{len(rows)} rows cannot be split with held_out={held_out}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(rows) - 1, max(1, round(held_out * len(rows))))

    def take(numbers: list[int]) -> Any:
        return rows.select(numbers) if isinstance(rows, Dataset) else [rows[i] for i in numbers]

    return take(order[count:]), take(order[:count])


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The chat of a row of any kind that is known here.

    Args:
        row: with `messages`; with `query` (or `question`) and `answer`; with `instruction`,
            `output` and by choice `input` (any case); or with a `text` in guanaco's style.
            Pictures are in fields of their own; see `conversation_of`.

    Raises:
        ValueError: the row is of none of these kinds.
    """
    present = {key for key, value in row.items() if value is not None}
    if "messages" in present:
        return list(row["messages"])
    asked = "query" if "query" in present else "question"
    if {asked, "answer"} <= present:
        return [
            {"role": "user", "content": row[asked]},
            {"role": "assistant", "content": row["answer"]},
        ]
    if {"instruction", "output"} <= {key.lower() for key in present}:
        return instruction_messages(row)
    if "text" in present:
        return guanaco_messages(row["text"])
    raise ValueError(
        f"A row has the fields {', '.join(row)}; it needs messages, or query and answer, or "
        "instruction and output, or text in guanaco's style."
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
