"""What each token of a prompt is: text, a mark of the chat, or which part of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .labels import IGNORED

KINDS = ("padding", "mark", "text", "answer", "detail", "overview", "line end", "separator")


def picture_kinds(rows: int, columns: int, side: int, order: str = "sub_glb") -> list[str]:
    """What each image token of a picture stands for, in the order of the prompt.

    Args:
        rows: of detailed crops.
        columns: of detailed crops.
        side: image tokens along the side of a crop.
        order: `hd_transform_order` of the model: "sub_glb" (detail first) or "glb_sub".

    Returns:
        As many of "detail", "line end", "separator" and "overview" as the picture has tokens.
    """
    detail = [*["detail"] * (columns * side), "line end"] * (rows * side)
    overview = [*["overview"] * side, "line end"] * side
    first, last = (detail, overview) if order == "sub_glb" else (overview, detail)
    return [*first, "separator", *last]


def token_kinds(
    processor, inputs: Mapping[str, Any], row: int = 0, order: str = "sub_glb"
) -> list[str]:
    """What each token of one row of a batch is.

    Args:
        processor: the `Phi3VProcessor` that made the inputs.
        inputs: its input_ids (B, T); image_sizes with pictures; labels, where they shall show.
        row: of the batch.
        order: `hd_transform_order` of the model.

    Returns:
        T entries of `KINDS`: "mark" is a special token such as `<|user|>`, "answer" a token that
        has a label, the last four are parts of a picture.

    Raises:
        ValueError: the image tokens are not those of the pictures.

    Example:
        >>> Counter(token_kinds(processor, inputs))["line end"]  # doctest: +SKIP
        8
    """
    rows = inputs["input_ids"].tolist()
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
    size, per_crop = processor.image_processor.crop_size, processor.image_processor.num_img_tokens
    side = round(per_crop**0.5)
    parts = [picture_kinds(h // size, w // size, side, order) for h, w in sizes]
    image_tokens = [kind for part in parts for kind in part]
    before = sum(_is_image(token, processor) for line in rows[:row] for token in line)
    total = sum(_is_image(token, processor) for line in rows for token in line)
    if total != len(image_tokens):
        raise ValueError(
            f"The prompts have {total} image tokens, the pictures {len(image_tokens)}: pass "
            "input_ids and image_sizes as one call of the processor made them."
        )
    own = iter(image_tokens[before:])
    marks = set(processor.tokenizer.all_special_ids)
    marks |= set(processor.tokenizer.get_added_vocab().values())
    kinds = []
    for column, token in enumerate(rows[row]):
        if _is_image(token, processor):
            kinds.append(next(own))
        elif "attention_mask" in inputs and not inputs["attention_mask"][row][column]:
            kinds.append("padding")
        elif "labels" in inputs and int(inputs["labels"][row][column]) != IGNORED:
            kinds.append("answer")
        else:
            kinds.append("mark" if token in marks else "text")
    return kinds


def _is_image(token: int, processor) -> bool:
    return token < 0 or token == processor.image_token_id
