"""Rows of every kind as conversations, and what is wrong with the others."""

import pytest
from PIL import Image

from cephalo_lite.finetune import conversation_of

ONE, TWO = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))


def say(role, content):
    return {"role": role, "content": content}


def part(text):
    return {"type": "text", "text": text}


def test_query_and_answer_of_2024():
    for field in ("query", "question"):
        got = conversation_of({"image": ONE, field: "What is it?", "answer": "Glass."})
        assert got.messages == [
            say("user", "<|image_1|>\nWhat is it?"),
            say("assistant", "Glass."),
        ]
        assert got.pictures == [ONE]


def test_pictures_are_shown_where_tags_or_parts_say():
    chat = [say("user", "<|image_2|>, then <|image_1|>?"), say("assistant", "Yes.")]
    assert conversation_of({"images": [ONE, TWO], "messages": chat}).messages == chat
    parts = [
        say("user", [part("First"), {"type": "image", "image": TWO}, {"type": "image"}]),
        say("assistant", [part("Yes.")]),
    ]
    got = conversation_of({"images": [ONE], "messages": parts})
    assert got.pictures == [TWO, ONE]
    # A table of `datasets` has every field in every part, and undecoded pictures as bytes or path
    table = [
        say("user", [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]),
        say("assistant", [{"type": "text", "text": "This."}]),
    ]
    got = conversation_of({"image": {"bytes": b"png", "path": None}, "messages": table})
    assert got.messages[0]["content"] == [{"type": "image"}, part("What?")]
    assert got.pictures == [b"png"]
    untold = [say("system", "Be brief."), say("user", "What?"), say("assistant", "This.")]
    got = conversation_of({"images": [ONE, TWO], "messages": untold})
    assert got.messages[1]["content"] == "<|image_1|>\n<|image_2|>\nWhat?"
    assert untold[1]["content"] == "What?"  # the row stays as it is


def test_text_rows_are_conversations_without_pictures():
    for row in (
        {"query": "Red?", "answer": "Blue.", "image": None},
        {"messages": [say("user", "Red?"), say("assistant", "Blue.")], "images": []},
        {"instruction": "Red?", "output": "Blue.", "image": None},
        {"text": "### Human: Red?### Assistant: Blue."},
    ):
        got = conversation_of(row)
        assert got.messages == [say("user", "Red?"), say("assistant", "Blue.")]
        assert got.pictures == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": ONE, "query": "?", "answer": " "}, "answer is empty"),
        ({"image": ONE, "query": "?", "answer": None}, "it needs messages"),
        ({"messages": [say("user", "?")]}, "no assistant's turn"),
        ({"messages": [say("human", "?"), say("assistant", "!")]}, "by 'human'"),
        (
            {"images": [ONE, TWO], "query": "<|image_1|>?", "answer": "!"},
            r"name the pictures \[1\], and 2 are given",
        ),
        ({"query": "<|image_1|>?", "answer": "!"}, "and 0 are given"),
        (
            {"messages": [say("user", [{"type": "image"}, part("?")]), say("assistant", "!")]},
            "1 image parts, but 0 pictures",
        ),
        (
            {
                "images": [ONE, TWO],
                "messages": [say("user", [{"type": "image"}, part("?")]), say("assistant", "!")],
            },
            "1 image parts, but 1 more",
        ),
        (
            {
                "images": [ONE],
                "messages": [say("user", [{"type": "image"}, part("<|image_1|>")])]
                + [say("assistant", "!")],
            },
            "use one way",
        ),
        ({"messages": [say("user", [{"type": "video"}]), say("assistant", "!")]}, "'video'"),
        ({"query": "Say <|end|>", "answer": "!"}, "mark of the chat"),
        ({"query": "How many <|image|>?", "answer": "!"}, "mark of the chat"),
        ({"image": ONE, "messages": [say("assistant", "!")]}, "nobody asks"),
    ],
)
def test_what_cannot_be_learnt_is_said(row, reason):
    with pytest.raises(ValueError, match=reason):
        conversation_of(row)
