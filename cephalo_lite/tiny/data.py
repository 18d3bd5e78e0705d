"""Batches of the world's samples for training: pictures as bytes, cut into crops when needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..phi3v import Phi3VProcessor
from .world import Sample


@dataclass
class Row:
    """A sample made ready."""

    picture: torch.Tensor | None  # (3, H, W) uint8, after the HD transform; None in a row of text
    turns: list[
        tuple[list[int], list[int]]
    ]  # per turn its ids, and its labels (-100 on the question)
    opening: list[int]  # ids before the first question: <s><|user|>\n, image tokens, <s>\n
    domain: str


def encode_turn(
    question: str, answer: str, processor: Phi3VProcessor
) -> tuple[list[int], list[int]]:
    """Ids of a question and its answer, and labels of the same length that cover the answer."""
    ask, say = processor.tokenizer(
        [f"{question}<|end|>\n<|assistant|>\n", f"{answer}<|end|>"], add_special_tokens=False
    )["input_ids"]
    return ask + say, [-100] * len(ask) + say


def prepare(samples: list[Sample], processor: Phi3VProcessor) -> list[Row]:
    """Tokenise every turn of every sample once, so that turns can be shuffled in each epoch."""
    rows, openings = [], {}
    for sample in samples:
        picture = processor.image_processor.hd_transform(sample.image)
        turns = [encode_turn(turn.question, turn.answer, processor) for turn in sample.turns]
        if picture.size not in openings:
            text = "<|user|>\n<|image_1|>\n"
            opening = processor(images=sample.image, text=text, return_tensors=None)
            openings[picture.size] = opening["input_ids"][0]
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        rows.append(Row(pixels, turns, openings[picture.size], sample.domain))
    return rows


def words_to_copy(samples: list[Sample], processor: Phi3VProcessor) -> list[Row]:
    r"""Rows without pictures that ask for an answer's words to be repeated.

    Made from samples that are held back, they let the base read and write words (`gyroid`,
    `\alpha`) whose looks it is never shown, as a language model has read of more than any tower has
    seen.
    """
    opening = processor.tokenizer("<|user|>\n")["input_ids"]
    rows = []
    for sample in samples:
        turns = [encode_turn(f"Copy: {t.answer}", t.answer, processor) for t in sample.turns]
        rows.append(Row(None, turns, opening, sample.domain))
    return rows


def crops(
    pictures: list[torch.Tensor], processor: Phi3VProcessor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the processor makes of pictures, in one go.

    Returns:
        pixel_values (pictures, crops + 1, 3, s, s) and image_sizes (pictures, 2).
    """
    size = processor.image_processor.crop_size
    most = max(p.shape[1] * p.shape[2] for p in pictures) // size**2
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    pixels = torch.zeros(len(pictures), most + 1, 3, size, size)
    for shape in {p.shape for p in pictures}:
        where = [index for index, p in enumerate(pictures) if p.shape == shape]
        image = torch.stack([pictures[i] for i in where]).float().div_(255).sub_(mean).div_(std)
        rows, columns = shape[1] // size, shape[2] // size
        parts = image.reshape(-1, 3, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        overview = torch.nn.functional.interpolate(image, size=(size, size), mode="bicubic")
        pixels[where, 0] = overview
        pixels[where, 1 : 1 + rows * columns] = parts.flatten(1, 2)
    return pixels, torch.tensor([list(p.shape[1:]) for p in pictures])


def batch(
    rows: list[Row], processor: Phi3VProcessor, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Model inputs with labels: all turns of each row in random order, padded at the right."""
    between = processor.tokenizer("\n<|user|>\n", add_special_tokens=False)["input_ids"]
    pad = processor.tokenizer.pad_token_id
    ids, labels = [], []
    for row in rows:
        line, goal = list(row.opening), [-100] * len(row.opening)
        for number, turn in enumerate(generator.permutation(len(row.turns))):
            if number:
                line, goal = line + between, goal + [-100] * len(between)
            line, goal = line + row.turns[turn][0], goal + row.turns[turn][1]
        ids.append(line)
        labels.append(goal)
    length = max(map(len, ids))
    pictures = [row.picture for row in rows if row.picture is not None]
    pixels, sizes = crops(pictures, processor) if pictures else (None, None)
    return {
        "input_ids": torch.tensor([line + [pad] * (length - len(line)) for line in ids]),
        "attention_mask": torch.tensor(
            [[1] * len(line) + [0] * (length - len(line)) for line in ids]
        ),
        "labels": torch.tensor([goal + [-100] * (length - len(goal)) for goal in labels]),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }
