"""A row as a conversation: who says what, which pictures are shown, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..phi3v.processing import TAG
from .text_data import Message, messages_of

PICTURES = ("images", "image", "file_names", "file_name")  # fields of a row, the first that is set
CARRIERS = ("image", "path", "url")  # where a part may hold its own picture
ROLES = ("system", "user", "assistant")
MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|image|>")


@dataclass(frozen=True)
class Conversation:
    """What a row says, ready for the chat template."""

    messages: list[Message]  # texts with tags, or parts; each picture has its place
    pictures: list[Any]  # in the order of their numbers; whatever `load_picture` opens


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    r"""Read a row and check that it can be learnt.

    Args:
        row: see `messages_of`; with pictures in `images`, `image`, `file_names` or `file_name`: one
            or a list of what `load_picture` opens, or what `datasets` has of an undecoded one.
            Messages place them by tags (`<|image_1|>`) or by image parts, in which they may also be
            themselves; where they do neither, all are shown before the first question.

    Raises:
        ValueError: the row is of no known kind, has no answer or an empty one, pictures and places
            do not match, or a text holds marks of the chat.
    """
    messages = [_read(message) for message in messages_of(row)]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("No answer was found: there is no assistant's turn.")
    if any(not _text(message).strip() for message in answers):
        raise ValueError("An answer is empty.")
    marks = [mark for message in messages for mark in MARKS if mark in _text(message)]
    if marks:
        raise ValueError(f"A text holds {marks[0]}, which is a mark of the chat.")
    return Conversation(*_place(messages, pictures_of(row)))


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """The pictures in a row's own fields, in order; those in its messages are not among them."""
    for field in PICTURES:
        value = row.get(field)
        if value is not None:
            return [_source(one) for one in (value if isinstance(value, list | tuple) else [value])]
    return []


def _source(picture: Any) -> Any:
    """What `load_picture` opens; `datasets` has an undecoded picture as its bytes or its path."""
    if isinstance(picture, Mapping):
        return picture.get("bytes") or picture.get("path")
    return picture


def _read(message: Mapping[str, Any]) -> Message:
    """A message in the form of the chat template, without the empty fields of a table."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"A message is by {role!r}; roles are {', '.join(ROLES)}.")
    if isinstance(content, str) or content is None:
        return {"role": role, "content": content or ""}
    parts = [{k: v for k, v in part.items() if v is not None} for part in content]
    for part in parts:
        if part.get("type") not in ("text", "image"):
            raise ValueError(f"A message part is {part.get('type')!r}; parts are text or image.")
    return {"role": role, "content": parts}


def _parts(messages: list[Message], kind: str) -> list[dict[str, Any]]:
    lists = (m["content"] for m in messages if not isinstance(m["content"], str))
    return [part for parts in lists for part in parts if part["type"] == kind]


def _text(message: Message) -> str:
    """What a message says, pictures left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part["type"] == "text")


def _place(messages: list[Message], given: list[Any]) -> tuple[list[Message], list[Any]]:
    """Messages in which each picture has its place, and all pictures by number."""
    tags = {int(number) for message in messages for number in TAG.findall(_text(message))}
    places = _parts(messages, "image")
    if places and tags:
        raise ValueError("Pictures are placed by tags and by image parts: use one way.")
    if places:
        left, shown = list(given), []
        for part in places:
            own = [_source(part[key]) for key in CARRIERS if key in part]
            if not own and not left:
                raise ValueError(f"{len(places)} image parts, but {len(given)} pictures.")
            shown.append(own[0] if own else left.pop(0))
        if left:
            raise ValueError(f"{len(places)} image parts, but {len(left)} more pictures.")
        return messages, shown
    if given and not tags:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ValueError("There are pictures, but nobody asks about them.")
        before = "".join(f"<|image_{number}|>\n" for number in range(1, len(given) + 1))
        content = before + _text(first)
        messages = [{**m, "content": content} if m is first else m for m in messages]
        return messages, given
    if tags != set(range(1, len(given) + 1)):
        raise ValueError(f"The texts name the pictures {sorted(tags)}, and {len(given)} are given.")
    return messages, given
