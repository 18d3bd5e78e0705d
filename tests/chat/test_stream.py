"""An answer in pieces: the same text, errors that arrive, and an end when nobody reads on."""

import threading

import pytest
import torch

from cephalo_lite.chat import ask, stream


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "cephalo-stream"]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "seed": 3}])
def test_the_pieces_are_the_answer(kind, how, request, processor, pictures):
    model = request.getfixturevalue(kind)
    for question, images in [("What is shown?", pictures[0]), ("Hello", None)]:
        pieces = list(stream(model, processor, question, images, max_new_tokens=40, **how))
        whole = ask(model, processor, question, images, max_new_tokens=40, **how).text
        assert "".join(pieces) == whole
        assert len(pieces) > 1 and all(pieces)
    assert not writers()


def test_the_end_mark_is_not_shown(make_model, processor):
    model = make_model()
    tokenizer = processor.tokenizer
    stop = tokenizer.convert_tokens_to_ids("<|end|>")
    inputs = processor(text="<|user|>\nHello<|end|>\n<|assistant|>\n")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -1]
    with torch.no_grad():
        model.lm_head.weight[stop] = 1.5 * model.lm_head.weight[ids]
    text = "".join(stream(model, processor, "Hello", max_new_tokens=30))
    answer = ask(model, processor, "Hello", max_new_tokens=30)
    assert text == answer.text and answer.tokens < 30


def test_closing_stops_the_model(dense, processor, count_read):
    read = count_read(dense)
    pieces = stream(dense, processor, "Hello", max_new_tokens=900)
    next(pieces)
    pieces.close()
    assert not writers() and 0 < len(read) < 800
    del read[:]
    stream(dense, processor, "Hello")  # never read: never written
    assert not read and not writers()


def test_an_error_in_the_thread_reaches_the_reader(dense, processor):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        list(stream(dense, processor, "Hello", max_new_tokens=5000))
    assert not writers()

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = dense.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream(dense, processor, "Hello"))
    finally:
        hook.remove()


def test_wrong_questions_fail_at_once(dense, processor, pictures):
    with pytest.raises(ValueError, match="empty"):
        stream(dense, processor, "")
    with pytest.raises(ValueError, match="names the pictures"):
        stream(dense, processor, "<|image_1|> and <|image_2|>?", pictures[0])
    with pytest.raises(ValueError, match="at least one token"):
        stream(dense, processor, "Hello", max_new_tokens=0)
