"""Labels that cover the assistant's turns only."""

from __future__ import annotations

IGNORED = -100  # the label that torch's cross entropy leaves out


def answer_labels(ids: list[int], tokenizer) -> list[int]:
    """Labels of one row: what the assistant says and the `<|end|>` after it; -100 elsewhere.

    The line break after `<|assistant|>` belongs to the prompt and is not learnt. A turn that breaks
    off (a prompt to be answered, or a row cut short) is covered as far as it goes.

    Args:
        ids: token ids of a chat in Phi-3's format.
        tokenizer: the tokenizer that made them.

    Returns:
        A list as long as `ids`.
    """
    opening, closing = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    labels = [IGNORED] * len(ids)
    position = 0
    while position < len(ids):
        if ids[position] != opening:
            position += 1
            continue
        position = _after_line_break(ids, position + 1, tokenizer)
        while position < len(ids) and ids[position] != opening:
            labels[position] = ids[position]
            position += 1
            if ids[position - 1] == closing:
                break
    return labels


def _after_line_break(ids: list[int], start: int, tokenizer) -> int:
    """Position after the line break that may follow `<|assistant|>`, and the '▁' before it."""
    for position in range(start, min(start + 3, len(ids))):
        text = tokenizer.decode(ids[position])
        if text == "\n":
            return position + 1
        if text.strip():
            break
    return start
