"""Conversations to prompts: transformers-style parts and the plain style of 2024."""

import base64
import io

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast


def message(role: str, *parts) -> dict:
    """A message in parts: strings are text, all else pictures; None is one given elsewhere."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image"} if part is None else {"type": "image", "image": part})
    return {"role": role, "content": content}


def test_parts(small_processor):
    chat = [message("user", None, "What is shown?")]
    text = small_processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n"


def test_plain_style_is_that_of_the_published_template(small_processor, golden):
    """The golden tokenizer carries the published template, for strings only."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(golden / "tokenizer")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<|image_1|>\nWhat is shown?"},
        {"role": "assistant", "content": "A disk."},
        {"role": "user", "content": "Of what colour?"},
        {"role": "assistant", "content": "Red."},
    ]
    for length in range(1, 6):
        for prompted in (False, True):
            want = tokenizer.apply_chat_template(
                turns[:length], tokenize=False, add_generation_prompt=prompted
            )
            assert (
                small_processor.apply_chat_template(turns[:length], add_generation_prompt=prompted)
                == want
            )


def test_pictures_of_several_turns_are_numbered_on(small_processor):
    chat = [
        message("system", "Be brief."),
        message("user", None, None, "Compare."),
        message("assistant", "They differ."),
        message("user", "And this? ", None),
    ]
    assert small_processor.apply_chat_template(chat) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\n<|image_2|>\nCompare.<|end|>\n"
        "<|assistant|>\nThey differ.<|end|>\n<|user|>\nAnd this? <|image_3|>\n<|end|>\n"
    )


def test_strings_and_parts_mixed(small_processor):
    chat = [message("user", None, "Hi"), {"role": "assistant", "content": "Hello."}]
    assert small_processor.apply_chat_template(chat).endswith("<|assistant|>\nHello.<|end|>\n")


def test_every_form_of_a_picture_in_a_message(synth, small_processor, tmp_path):
    picture = synth(60, 40)
    path = tmp_path / "picture.png"
    picture.save(path)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    want = small_processor(picture, "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n")
    parts = [
        {"type": "image", "image": picture},
        {"type": "image", "image": np.array(picture)},
        {"type": "image", "image": torch.from_numpy(np.array(picture)).permute(2, 0, 1)},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "url": uri},
        {"type": "image", "image": uri},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
        {"type": "image", "base64": uri.split(",")[1]},
    ]
    for part in parts:
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
        got = small_processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert got.keys() == want.keys()
        assert all(got[key].equal(want[key]) for key in want), part


def test_batch_of_conversations(synth, small_processor):
    """Conversations with and without pictures, padded."""
    chats = [[message("user", "Hi")], [message("user", synth(60, 40), "What is shown?")]]
    out = small_processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert out["attention_mask"].sum(-1).tolist() == [
        small_processor(text="<|user|>\nHi<|end|>\n")["input_ids"].shape[1],
        out["input_ids"].shape[1],
    ]
    assert len(out["pixel_values"]) == 1


def test_labels_through_the_template(synth, small_processor):
    chat = [message("user", synth(60, 40), "What is shown?"), message("assistant", "A disk.")]
    out = small_processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_labels": True},
    )
    learnt = out["labels"][out["labels"] != -100]
    assert small_processor.tokenizer.decode(learnt).replace(" ", "") == "Adisk.<|end|>"


def test_the_last_message_is_continued(small_processor):
    chat = [message("user", "Hi"), message("assistant", "Hello, my")]
    text = small_processor.apply_chat_template(chat, continue_final_message=True)
    assert text == "<|user|>\nHi<|end|>\n<|assistant|>\nHello, my"


def test_other_parts_are_refused(small_processor):
    chat = [{"role": "user", "content": [{"type": "video", "path": "film.mp4"}]}]
    with pytest.raises(Exception, match="reads text and image parts, not video"):
        small_processor.apply_chat_template(chat)
