"""A conversation answers as if each turn were asked afresh, and reads only what is new."""

import pytest
import torch

from cephalo_lite.chat import Chat, ask
from cephalo_lite.phi3v.labels import answer_labels

NEW = 10


def afresh(model, processor, chat):
    """The last answer of a chat, asked once more with nothing but its messages."""
    return ask(model, processor, chat.messages[:-1], chat.images or None, max_new_tokens=NEW)


@pytest.fixture(params=["dense", "mixture"])
def model(request):
    return request.getfixturevalue(request.param)


def test_four_turns_with_pictures_at_any_of_them(model, processor, pictures):
    chat = Chat(model, processor, system="You are a helpful assistant.")
    turns = [
        ("Hello", None),
        ("What is shown?", pictures[0]),
        ("And in these two?", pictures[1:]),
        ("Compare <|image_3|> with <|image_1|>.", None),
    ]
    said = []
    for text, images in turns:
        answer = chat.say(text, images, max_new_tokens=NEW)
        assert answer.text == afresh(model, processor, chat).text
        said.append(answer.text)
    assert len(set(said)) == 4
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 4]
    assert chat.messages[3]["content"] == "<|image_1|>\nWhat is shown?"
    assert chat.messages[5]["content"] == "<|image_2|>\n<|image_3|>\nAnd in these two?"
    assert [m["content"] for m in chat.messages[2::2]] == said and chat.images == pictures


def test_only_new_tokens_are_read(model, processor, pictures, count_read):
    chat = Chat(model, processor)
    read = count_read(model)
    held, last = [], 0  # ids in the cache; length of the last prompt
    for text, images in [
        ("What is shown?", pictures[0]),
        ("Why?", None),
        ("And this?", pictures[1]),
    ]:
        del read[:]
        answer = chat.say(text, images, max_new_tokens=NEW)
        prompt = processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
        ids = processor(images=chat.images, text=prompt)["input_ids"][0].tolist()
        pairs = zip(held, ids, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(held))
        assert same >= last  # all of the earlier prompt, at least
        assert read == [len(ids) - same] + [1] * (answer.tokens - 1)
        held, last = chat._read.ids.tolist(), len(ids)


def test_an_answer_that_reads_otherwise_than_it_was_written(model, processor):
    """Random models write tokens that the tokenizer would never choose: the cache must be cut."""
    chat = Chat(model, processor)
    chat.say("Hello", max_new_tokens=NEW)
    held = chat._read.ids
    answer = chat.say("Why?", max_new_tokens=NEW)
    now = chat._read.ids[: len(held)]
    assert not torch.equal(held, now)
    assert answer.text == afresh(model, processor, chat).text


def test_messages_may_be_rewritten(dense, processor, pictures):
    chat = Chat(dense, processor)
    chat.say("What is shown?", pictures[0], max_new_tokens=NEW)
    chat.say("Why?", max_new_tokens=NEW)
    chat.messages[1]["content"] = "A honeycomb of fibres."
    answer = chat.say("How dense is it?", max_new_tokens=NEW)
    assert answer.text == afresh(dense, processor, chat).text
    chat.images[0] = pictures[0].transpose(0)  # mirrored: same tokens, another picture
    answer = chat.say("How dense is it?", max_new_tokens=NEW)
    assert answer.text == afresh(dense, processor, chat).text
    chat.messages = chat.messages[:2]
    assert chat.say("Why?", max_new_tokens=NEW).text == afresh(dense, processor, chat).text


def test_reset_begins_anew(dense, processor, pictures, count_read):
    chat = Chat(dense, processor, system="Be brief.")
    first = chat.say("What is shown?", pictures[0], max_new_tokens=NEW)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}] and chat.images == []
    read = count_read(dense)
    assert chat.say("What is shown?", pictures[0], max_new_tokens=NEW).text == first.text
    assert read[0] > 20


def test_a_failed_turn_changes_nothing(dense, processor, pictures):
    chat = Chat(dense, processor)
    chat.say("What is shown?", pictures[0], max_new_tokens=NEW)
    before = [dict(message) for message in chat.messages]
    with pytest.raises(ValueError, match=r"names the pictures \[1\], and 2"):
        chat.say("What of <|image_1|>?", pictures[1])
    with pytest.raises(ValueError, match="empty"):
        chat.say("  ")
    with pytest.raises(ValueError, match="max_position_embeddings"):
        chat.say("Why? " * 600)  # fails inside the model, when the cache is already lent to it
    assert chat.messages == before and chat.images == pictures[:1]
    assert chat.say("Why?", max_new_tokens=NEW).text == afresh(dense, processor, chat).text


@pytest.mark.parametrize("new", [4, 30])
def test_beyond_the_short_position_factors(make_model, processor, new):
    """The text outgrows the short factors and shrinks again: no keys of the other kind are used."""
    scaling = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    model = make_model(
        rope_scaling=scaling, original_max_position_embeddings=48, max_position_embeddings=512
    )
    chat = Chat(model, processor)
    for text in ("Hello", "Which structure is this?", "Why?", "How dense is it?"):
        answer = chat.say(text, max_new_tokens=new)
        again = ask(model, processor, chat.messages[:-1], max_new_tokens=new)
        assert answer.text == again.text
    assert len(chat._read.ids) > 48
    chat.messages = chat.messages[:2]
    answer = chat.say("Why?", max_new_tokens=4)
    assert answer.text == ask(model, processor, chat.messages[:-1], max_new_tokens=4).text


def test_a_sliding_window_that_has_lost_its_past(make_model, processor):
    model = make_model(sliding_window=16)
    chat = Chat(model, processor)
    for text in ("Hello", "Which structure is this?", "Why?"):
        answer = chat.say(text, max_new_tokens=NEW)
        assert answer.text == afresh(model, processor, chat).text


def test_a_trace_of_a_turn_is_what_it_read(mixture, processor, pictures, count_read):
    chat = Chat(mixture, processor)
    chat.say("What is shown?", pictures[0], max_new_tokens=NEW)
    read = count_read(mixture)
    answer = chat.say("And this?", pictures[1], max_new_tokens=NEW, trace=True)
    routing = answer.routing
    assert len(routing) == sum(read)
    assert len(routing.pictures) == 1 and routing.kinds.count("image") == routing.pictures[0].tokens
    assert routing.kinds[-1] == "answer" and routing.kinds[-answer.tokens] == "prompt"
    whole = chat._read.ids.tolist()  # with the end of the answer before, which is read anew
    labels = answer_labels(whole, processor.tokenizer)[-len(routing) :]
    assert [kind == "answer" for kind in routing.kinds] == [label >= 0 for label in labels]
    assert routing.kinds[0] == "answer"
    assert routing.plot_picture()[0].images
