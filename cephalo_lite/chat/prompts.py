"""From a question, with pictures or without, to a prompt in Phi-3's chat format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..phi3v import Phi3VProcessor
from ..phi3v.processing import TAG

Message = dict[str, Any]  # {"role": "user", "content": text or list of parts}
WHOLE = re.compile(r"\s*(<s>)?\s*<\|(user|system|assistant)\|>")  # a prompt that has its roles
ANSWER = "<|assistant|>\n"
PICTURE_KEYS = ("image", "path", "url", "image_url", "base64")  # where a part may carry its picture


def listed(images: Any) -> list[Any]:
    """Pictures as a list: None is none, one picture is a list of one."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def make_prompt(
    processor: Phi3VProcessor,
    question: str | Sequence[Message],
    images: Any = None,
    system: str | None = None,
) -> tuple[str, list[Any]]:
    """The prompt of one question and its pictures.

    Args:
        processor: its chat template is used.
        question: a plain question, which all pictures are put before; a text with its own tags
            `<|image_1|>`, ...; a whole prompt with roles (`<|user|>...`); or messages.
        images: None, a picture, or a list of them, numbered from 1 in this order. Messages may
            carry their pictures in their parts instead.
        system: what the model is told before all else.

    Raises:
        ValueError: the question is empty, or pictures and tags do not fit.
    """
    pictures = listed(images)
    if not isinstance(question, str):
        messages, pictures = read_messages(question, pictures)
        if system is not None:
            if messages[0]["role"] == "system":
                raise ValueError("The messages begin with a system message: leave system out.")
            messages = [{"role": "system", "content": system}, *messages]
    elif WHOLE.match(question):
        if system is not None:
            raise ValueError("The prompt has its own roles: write the system text into it.")
        text = (
            question
            if question.rstrip().endswith(ANSWER.strip())
            else f"{question.rstrip()}\n{ANSWER}"
        )
        return check_tags(text, pictures), pictures
    else:
        messages = [{"role": "user", "content": with_tags(question, len(pictures))}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
    return check_tags(render(processor, messages), pictures), pictures


def render(processor: Phi3VProcessor, messages: Sequence[Message]) -> str:
    """Messages as text, ready for the assistant's answer."""
    return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def with_tags(question: str, count: int, before: int = 0) -> str:
    """A question with tags for `count` pictures before it, numbered after `before` earlier ones.

    A question that has tags stays as it is.

    Raises:
        ValueError: nothing is asked.
    """
    if not TAG.sub("", question).strip():
        raise ValueError("The question is empty: ask something, such as 'What is shown?'.")
    if TAG.search(question):
        return question
    return "".join(f"<|image_{before + number}|>\n" for number in range(1, count + 1)) + question


def check_tags(text: str, pictures: list[Any]) -> str:
    """The text, if it names each of the pictures and no others.

    Raises:
        ValueError: it does not.
    """
    named = sorted({int(number) for number in TAG.findall(text)})
    if named and not pictures:
        raise ValueError(
            f"The question names the pictures {named}, but none were given: pass images=[...]."
        )
    if named != list(range(1, len(pictures) + 1)):
        raise ValueError(
            f"The question names the pictures {named}, and {len(pictures)} were given. Name each "
            "once or more, numbered from 1: <|image_1|>, <|image_2|>, ...; or leave all tags out."
        )
    return text


def read_messages(
    messages: Sequence[Message], images: list[Any]
) -> tuple[list[Message], list[Any]]:
    """Messages whose contents are texts with tags, and their pictures in order.

    An image part shows the picture that it carries ("image", "path", "url", "image_url" or
    "base64"), or else the next of `images`. Contents may be texts with tags instead, which name
    `images` by number.

    Raises:
        ValueError: nothing is asked, roles or parts are wrong, or both ways to name pictures are
            mixed.
    """
    if not messages or messages[-1].get("role") not in ("user", "tool"):
        raise ValueError("Messages must end with what the user says: there is nothing to answer.")
    left, shown, read, tagged = list(images), [], [], False
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parts = [{"type": "text", "text": content}]
        else:
            parts = list(content or [])
        text = ""
        for part in parts:
            if part.get("type") == "text":
                text += part["text"]
                tagged |= bool(TAG.search(part["text"]))
                continue
            if part.get("type") not in ("image", "image_url"):
                raise ValueError(
                    f"A message part is {part.get('type')!r}; parts are 'text' or 'image'."
                )
            picture = _picture_of(part)
            if picture is None:
                if not left:
                    raise ValueError(
                        f"Image part {len(shown) + 1} has no picture: pass images=[...]."
                    )
                picture = left.pop(0)
            shown.append(picture)
            text += f"<|image_{len(shown)}|>\n"
        read.append({"role": message["role"], "content": text})
    if not TAG.sub("", read[-1]["content"]).strip():
        raise ValueError("The last message is empty: ask something, such as 'What is shown?'.")
    if shown and (tagged or left):
        why = "some are named by tags" if tagged else f"{len(left)} of the images are left over"
        raise ValueError(
            f"The messages show {len(shown)} pictures as parts, and {why}: use one way."
        )
    return read, shown or left


def _picture_of(part: Mapping[str, Any]) -> Any:
    """The picture that a part carries, or None."""
    for key in PICTURE_KEYS:
        value = part.get(key)
        if value is not None:
            if isinstance(value, Mapping):
                value = value.get("url")
            return f"data:image/png;base64,{value}" if key == "base64" else value
    return None
