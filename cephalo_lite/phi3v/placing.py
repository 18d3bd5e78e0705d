"""Which image token belongs to which picture."""

from __future__ import annotations

import torch


def place_images(
    input_ids: torch.Tensor, is_image: torch.Tensor, pictures: list[torch.Tensor]
) -> torch.Tensor:
    """The features of all image tokens, in the order of the text.

    With the placeholder id, pictures come in the order in which the rows use them (the processor
    sorts them so). With the negative ids of the 2024 processor, -n is picture n of its row, in any
    order and as often as it is named; the pictures of a row follow those of the row before.

    Args:
        input_ids: (B, T).
        is_image: (B, T), true at image tokens.
        pictures: one tensor (tokens, D) per picture.

    Returns:
        (image tokens, D), row by row.

    Raises:
        ValueError: the pictures and the image tokens do not match.
    """
    tags = input_ids.clamp(max=0).neg()  # (B, T): n for picture n, 0 for text and placeholder
    if tags.any():
        pictures = _named(tags.tolist(), pictures)
    wanted, given = int(is_image.sum()), sum(len(picture) for picture in pictures)
    if wanted != given:
        raise ValueError(
            f"The prompt has room for {wanted} image tokens, the {len(pictures)} pictures fill "
            f"{given}. Name each picture once more or less (<|image_1|>, <|image_2|>, ...), or "
            "check that config.image_token_id is the id of <|image|> in the tokenizer."
        )
    return torch.cat(pictures)


def _named(rows: list[list[int]], pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures in the order in which tags 1, 2, ... of each row name them."""
    ordered, first = [], 0
    for tags in rows:
        used = sorted(set(tags) - {0})
        if used and (used[-1] != len(used) or first + used[-1] > len(pictures)):
            raise ValueError(
                f"A prompt names the pictures {used}, but pictures are numbered from 1 without "
                f"gaps and {len(pictures) - first} are left for it."
            )
        position = 0
        while position < len(tags):
            if not tags[position]:
                position += 1
                continue
            picture = pictures[first + tags[position] - 1]
            if tags[position : position + len(picture)] != [tags[position]] * len(picture):
                raise ValueError(
                    f"The prompt gives picture {tags[position]} fewer than its {len(picture)} "
                    "image tokens."
                )
            ordered.append(picture)
            position += len(picture)
        first += len(used)
    return ordered
