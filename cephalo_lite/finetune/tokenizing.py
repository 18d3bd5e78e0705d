"""Conversations as tokens of which only the answers are learnt; bad rows are named."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as ListOf
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..phi3v import Phi3VProcessor
from ..phi3v.labels import IGNORED, answer_labels
from ..phi3v.processing import TAG
from .conversations import Conversation, conversation_of

SHOWN = 10  # bad rows that an error names
Reader = PreTrainedTokenizerBase | Phi3VProcessor


class BadRow(NamedTuple):
    """A row that cannot be learnt."""

    number: int  # in the order of the rows, from 0
    reason: str


class BadRowsError(ValueError):
    """Rows cannot be learnt; `rows` has all of them."""

    def __init__(self, rows: Sequence[BadRow], total: int | None):
        self.rows = list(rows)
        named = [f"- row {number}: {reason}" for number, reason in self.rows[:SHOWN]]
        more = [f"- and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        of = "" if total is None else f" of {total}"
        head = f"{len(rows)}{of} rows cannot be learnt; correct them, or leave them out with "
        super().__init__("\n".join([f"{head}skip_bad=True:", *named, *more]))


@dataclass
class Tokenized:
    """Rows as a trainer reads them, and what became of the others.

    The dataset has the columns input_ids, labels and length; where the model sees, also `images`,
    the pictures in the order of their tokens, which are read when a row is.
    """

    dataset: Dataset | IterableDataset
    cut: int = 0  # rows longer than max_length, which lost their end
    dropped: int = 0  # rows of which no answer was left
    bad: list[BadRow] = field(default_factory=list)  # rows that were skipped


class Row(NamedTuple):
    """A conversation as tokens."""

    input_ids: list[int]
    labels: list[int]  # -100 but for the answers
    shown: list[int]  # numbers of the pictures from 0, in the order of their tokens
    cut: bool  # whether the end is lost


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Reader,
    max_length: int,
    skip_bad: bool = False,
    progress: bool = False,
) -> Tokenized:
    """Chats as token ids and labels; of all turns the assistant's and their `<|end|>` are learnt.

    Every picture is opened once to count its tokens, so that damaged ones are found before the
    training. A `datasets.IterableDataset` is read as the training goes: its bad rows, cuts and
    losses are counted while it is read.

    Args:
        rows: see `conversation_of`: a list, a `Dataset` or an `IterableDataset`.
        tokenizer: has a chat template in Phi-3's format; for models that see, the processor.
        max_length: tokens, those of pictures included; a longer row loses its end, from the start
            of the first picture that is not whole, and is dropped where no answer is left.
        skip_bad: leave bad rows out, rather than stop.
        progress: show a bar.

    Returns:
        The rows, with the numbers of those cut and dropped, and what was wrong with bad ones.

    Raises:
        ValueError: a tokenizer that does not write Phi-3's chats, or no row with an answer.
        BadRowsError: rows that cannot be learnt; a ValueError.
    """
    if not sees(tokenizer) and tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: take that of an instruct model.")
    if isinstance(rows, IterableDataset):
        return _streamed(rows, tokenizer, max_length, skip_bad)
    rows = rows if isinstance(rows, Dataset) else list(rows)
    result, kept, numbers = Tokenized(Dataset.from_dict({})), [], []
    bar = tqdm(range(len(rows)), desc="reading rows", disable=not progress, leave=False)
    for number in bar:
        row = _take(rows, number, tokenizer, max_length, result)
        if row is not None:
            kept.append(row)
            numbers.append(number)
    if result.bad and not skip_bad:
        raise BadRowsError(result.bad, len(rows))
    if not kept:
        raise ValueError(f"No row has an answer within max_length={max_length} tokens.")
    columns = {
        "input_ids": [row.input_ids for row in kept],
        "labels": [row.labels for row in kept],
        "length": [len(row.input_ids) for row in kept],
    }
    if not sees(tokenizer):
        result.dataset = Dataset.from_dict(columns)
        return result
    numbered = {"row": numbers, "shown": [row.shown for row in kept]}
    integers = {name: ListOf(Value("int64")) for name in ("input_ids", "labels", "shown")}
    features = Features(integers | {"length": Value("int64"), "row": Value("int64")})
    dataset = Dataset.from_dict(columns | numbered, features)
    result.dataset = dataset.with_transform(_ShowPictures(rows))
    return result


def encode(conversation: Conversation, reader: Reader, max_length: int) -> Row:
    """A conversation as tokens, cut to `max_length`.

    Args:
        conversation: what is said and shown.
        reader: tokenizer or processor.
        max_length: see `tokenize_rows`.

    Raises:
        ValueError: a picture cannot be read, there are pictures but no processor, or no label.
    """
    if not sees(reader):
        if conversation.pictures:
            raise ValueError("There are pictures, but the model reads text alone.")
        ids = reader.apply_chat_template(conversation.messages, return_dict=True)["input_ids"]
        shown, spans = [], []
    else:
        text = reader.apply_chat_template(conversation.messages, tokenize=False)
        count = reader.image_processor.calc_num_image_tokens
        tokens = [count(picture)[0] for picture in conversation.pictures]
        ids = reader.encode_prompt(text, tokens, add_special_tokens=True)
        shown = [int(number) - 1 for number in TAG.findall(text)] if tokens else []
        spans = _spans(ids, [tokens[number] for number in shown], reader.image_token_id)
    labels = answer_labels(ids, reader.tokenizer if sees(reader) else reader)
    if all(label == IGNORED for label in labels):
        raise ValueError(
            f"No answer was found in {conversation.messages}: the chat template is not Phi-3's "
            "(<|assistant|> ... <|end|>)."
        )
    end = min([max_length, *(start for start, stop in spans if stop > max_length)])
    whole = [number for number, (_, stop) in zip(shown, spans, strict=True) if stop <= end]
    return Row(ids[:end], labels[:end], whole, len(ids) > end)


def sees(reader: Reader) -> bool:
    """Whether what is read may have pictures: a processor, not a tokenizer."""
    return isinstance(reader, Phi3VProcessor)


def _spans(ids: list[int], counts: list[int], image_id: int) -> list[tuple[int, int]]:
    """Where the tokens of each picture begin and end."""
    spans, position = [], 0
    for count in counts:
        start = ids.index(image_id, position)
        position = start + count
        spans.append((start, position))
    return spans


def _take(rows, number: int, reader: Reader, max_length: int, result: Tokenized) -> Row | None:
    """One row as tokens; counted where it is cut, or None where it is dropped or bad."""
    try:
        row = encode(conversation_of(rows[number]), reader, max_length)
    except Exception as error:  # decoders of damaged pictures raise almost anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        result.bad.append(BadRow(number, f"{kind}{error}"))
        return None
    result.cut += row.cut
    if all(label == IGNORED for label in row.labels):
        result.dropped += 1
        return None
    return row


class _ShowPictures:
    """Adds the pictures of rows when they are read, so that none is in memory for long."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "row" not in batch:  # one column was asked for
            return batch
        batch = dict(batch)
        numbers, shown = batch.pop("row"), batch.pop("shown")
        pictures = [conversation_of(self.rows[number]).pictures for number in numbers]
        batch["images"] = [
            [own[number] for number in order] for own, order in zip(pictures, shown, strict=True)
        ]
        return batch

    def __deepcopy__(self, memo) -> _ShowPictures:
        return copy.copy(self)  # `datasets` copies with every view; the rows are only read


def _streamed(rows: IterableDataset, reader: Reader, max_length: int, skip_bad: bool) -> Tokenized:
    """Rows that are tokenized when they are read."""
    result, seen = Tokenized(rows), 0

    def read() -> Iterator[dict[str, Any]]:
        nonlocal seen
        # Undecoded: an error in a picture is then its row's, and does not end the stream
        for number, row in enumerate(rows.decode(False) if rows.features else rows):
            again = number < seen  # of another epoch: counted already
            one = _take(
                {number: row}, number, reader, max_length, Tokenized(rows) if again else result
            )
            seen = max(seen, number + 1)
            if result.bad and not skip_bad:
                raise BadRowsError(result.bad, None)
            if one is not None:
                columns = {"input_ids": one.input_ids, "labels": one.labels}
                if sees(reader):
                    pictures = conversation_of(row).pictures
                    columns["images"] = [pictures[number] for number in one.shown]
                yield columns | {"length": len(one.input_ids)}

    result.dataset = IterableDataset.from_generator(read)
    return result
