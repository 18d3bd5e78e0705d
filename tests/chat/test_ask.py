"""Questions with and without pictures, one by one and in batches, in all formats of 2024."""

import base64
import io

import pytest
import torch

from cephalo_lite.chat import Answer, Sampling, ask, stream
from cephalo_lite.chat.prompts import make_prompt

ONE = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n"
TURNS = (
    "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\nA honeycomb.<|end|>\n"
    "<|user|>\nHow dense is it?<|end|>\n<|assistant|>\n"
)


def by_hand(model, processor, prompt, images=None, new=12):
    """Greedy ids without any help: the whole text is read again for each token."""
    inputs = processor(images=images, text=prompt)
    ids, written = inputs.pop("input_ids"), []
    inputs.pop("attention_mask")
    ends = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    for _ in range(new):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1].argmax()
        written.append(int(token))
        if written[-1] in ends:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return written


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_the_answer_is_the_greedy_one(kind, request, processor, pictures):
    model = request.getfixturevalue(kind)
    answer = ask(model, processor, "What is shown?", pictures[0], max_new_tokens=12)
    ids = by_hand(model, processor, ONE, pictures[:1])
    assert isinstance(answer, Answer) and answer.routing is None
    assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer.tokens == len(ids) and answer.seconds > 0 and str(answer) == answer.text
    assert len(answer.text) > 5
    assert ask(model, processor, "What is shown?", pictures[1], max_new_tokens=12) != answer


def test_all_ways_to_ask_one_question_are_the_same(processor, pictures):
    picture = pictures[0]
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    code = base64.b64encode(stream.getvalue()).decode()
    text = {"type": "text", "text": "What is shown?"}
    ways = [
        ("What is shown?", picture),
        ("<|image_1|>\nWhat is shown?", [picture]),
        (ONE, [picture]),
        (ONE.removesuffix("<|assistant|>\n"), [picture]),
        ([{"role": "user", "content": "<|image_1|>\nWhat is shown?"}], picture),
        ([{"role": "user", "content": [{"type": "image"}, text]}], picture),
        ([{"role": "user", "content": [{"type": "image", "image": picture}, text]}], None),
        ([{"role": "user", "content": [{"type": "image", "base64": code}, text]}], None),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{code}"},
                        },
                        text,
                    ],
                }
            ],
            None,
        ),
    ]
    expected = processor(images=picture, text=ONE)
    for question, images in ways:
        prompt, shown = make_prompt(processor, question, images)
        assert prompt == ONE, question
        assert torch.equal(
            processor(images=shown, text=prompt)["pixel_values"], expected["pixel_values"]
        )


def test_turns_before_the_question(dense, processor, pictures):
    messages = [
        {"role": "user", "content": "<|image_1|>\nWhat is shown?"},
        {"role": "assistant", "content": "A honeycomb."},
        {"role": "user", "content": "How dense is it?"},
    ]
    assert make_prompt(processor, messages, pictures[0])[0] == TURNS
    answers = [
        ask(dense, processor, way, pictures[0], max_new_tokens=8) for way in (messages, TURNS)
    ]
    assert answers[0].text == answers[1].text
    ids = by_hand(dense, processor, TURNS, pictures[0], new=8)
    assert answers[0].text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_pictures_before_the_question_and_the_system_before_all(processor, pictures):
    prompt, shown = make_prompt(processor, "Compare.", pictures[:2], system="Be brief.")
    assert prompt == (
        "<|system|>\nBe brief.<|end|>\n"
        "<|user|>\n<|image_1|>\n<|image_2|>\nCompare.<|end|>\n<|assistant|>\n"
    )
    assert shown == pictures[:2]
    swapped, _ = make_prompt(processor, "<|image_2|> or <|image_1|>?", pictures[:2])
    assert swapped == "<|user|>\n<|image_2|> or <|image_1|>?<|end|>\n<|assistant|>\n"


def test_parts_take_their_own_pictures_and_then_those_given(processor, pictures):
    a, b, c = pictures
    parts = [
        {"type": "image"},
        {"type": "image", "image": b},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    prompt, shown = make_prompt(processor, [{"role": "user", "content": parts}], [a, c])
    assert shown == [a, b, c] and "<|image_1|>\n<|image_2|>\n<|image_3|>\n?" in prompt


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_batch_answers_as_each_question_alone(kind, request, processor, pictures):
    model = request.getfixturevalue(kind)
    questions = [
        "What is shown?",
        "Hello",
        "<|image_2|> against <|image_1|>: which is denser, and why?",
    ]
    images = [pictures[0], None, [pictures[1], pictures[2]]]
    batch = ask(model, processor, questions, images, max_new_tokens=10)
    alone = [
        ask(model, processor, question, own, max_new_tokens=10)
        for question, own in zip(questions, images, strict=True)
    ]
    assert [a.text for a in batch] == [a.text for a in alone]
    assert [a.tokens for a in batch] == [a.tokens for a in alone]
    assert len({a.text for a in batch}) == 3
    assert ask(model, processor, ["Hello"], max_new_tokens=10)[0].text == batch[1].text


def test_an_answer_ends_at_its_end_mark(make_model, processor):
    model = make_model()
    first = ask(model, processor, "Hello", max_new_tokens=6)
    ids = by_hand(model, processor, "<|user|>\nHello<|end|>\n<|assistant|>\n", new=6)
    assert first.tokens == 6
    stop = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():  # the third token now loses to the end mark
        model.lm_head.weight[stop] = 1.5 * model.lm_head.weight[ids[2]]
    model.generation_config.eos_token_id = None
    answer = ask(model, processor, "Hello", max_new_tokens=6)
    ids = by_hand(model, processor, "<|user|>\nHello<|end|>\n<|assistant|>\n", new=6)
    assert ids[-1] == stop and answer.tokens == len(ids) < 6
    assert "<|end|>" not in answer.text
    pair = ask(model, processor, ["Hello", "How dense is it?"], max_new_tokens=6)
    assert pair[0].text == answer.text and pair[0].tokens == answer.tokens


def test_sampling_is_drawn_from_its_seed(dense, processor):
    def draw(**how):
        return ask(dense, processor, "Hello", max_new_tokens=10, temperature=1.5, **how).text

    before = torch.get_rng_state()
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    greedy = ask(dense, processor, "Hello", max_new_tokens=10).text
    assert draw(seed=1) != greedy == draw(seed=1, top_k=1) == draw(seed=1, top_p=1e-6)
    torch.manual_seed(0)
    free = draw()
    assert draw() != free
    torch.manual_seed(0)
    assert draw() == free


def test_the_checkpoints_own_sampling_does_not_leak_in(make_model, processor, recwarn):
    model = make_model()
    plain = ask(model, processor, "Hello", max_new_tokens=8).text
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert {ask(model, processor, "Hello", max_new_tokens=8).text for _ in range(3)} == {plain}


def test_the_model_stays_as_it_was(make_model, processor, pictures, capsys):
    model = make_model(embd_pdrop=0.5)
    model.train()
    texts = {ask(model, processor, "Hello", pictures[0], max_new_tokens=6).text for _ in range(3)}
    assert len(texts) == 1 and model.training
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "question, images, options, message",
    [
        (" ", None, {}, "empty"),
        ("<|image_1|>\n", 1, {}, "empty"),
        ("<|image_1|>\nWhat?", None, {}, r"names the pictures \[1\], but none"),
        ("<|image_1|>\nWhat?", 2, {}, r"\[1\], and 2 were given"),
        ("<|image_2|>\nWhat?", 1, {}, r"\[2\], and 1 were given"),
        ("<|user|>\nWhat?<|end|>\n<|assistant|>\n", 1, {}, "and 1 were given"),
        ("<|user|>\nWhat?<|end|>\n", None, {"system": "Be brief."}, "its own roles"),
        ("What?", None, {"max_new_tokens": 0}, "at least one token"),
        ("What?", None, {"temperature": -1}, "temperature=-1"),
        ("What?", None, {"top_p": 0.5}, "temperature above 0"),
        ("What?", None, {"temperature": 1, "top_p": 0}, "top_p=0"),
        ("What?", None, {"trace": True}, "no routers"),
        ([], None, {}, "list of questions is empty"),
        (["What?", "Why?"], 1, {}, "2 questions and one picture"),
        ([{"role": "assistant", "content": "I see."}], None, {}, "nothing to answer"),
        ([{"role": "user", "content": [{"type": "image"}]}], 1, {}, "empty"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            None,
            {},
            "no picture",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, {}, "'audio'"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            2,
            {},
            "left over",
        ),
        ([{"role": "user", "content": "What?"}], 1, {}, "and 1 were given"),
    ],
)
def test_errors_say_what_is_wrong(question, images, options, message, dense, processor, pictures):
    images = pictures[0] if images == 1 else pictures[:images] if images else None
    with pytest.raises(ValueError, match=message):
        ask(dense, processor, question, images, **options)


def test_unknown_options_are_refused(dense, processor):
    with pytest.raises(TypeError, match="temprature"):
        ask(dense, processor, "What?", temprature=1.0)
    assert Sampling().settings()["do_sample"] is False


def test_a_trace_covers_prompt_and_answer(mixture, processor, pictures):
    answer = ask(mixture, processor, "What is shown?", pictures[0], max_new_tokens=8, trace=True)
    kinds = answer.routing.kinds
    inputs = processor(images=pictures[0], text=ONE)
    assert len(kinds) == inputs["input_ids"].shape[1] + answer.tokens - 1  # the last is not read
    assert kinds.count("image") == int((inputs["input_ids"] == processor.image_token_id).sum())
    assert kinds.count("answer") == answer.tokens - 1 and kinds[-1] == "answer"
    assert (
        answer.routing.ids[: inputs["input_ids"].shape[1]].tolist()
        == inputs["input_ids"][0].tolist()
    )


def test_a_traced_batch_gives_each_row_its_own(mixture, processor, pictures):
    questions = ["What is shown?", "How dense is it?"]
    batch = ask(mixture, processor, questions, [pictures[0], None], max_new_tokens=8, trace=True)
    for question, own, answer in zip(questions, [pictures[0], None], batch, strict=True):
        alone = ask(mixture, processor, question, own, max_new_tokens=8, trace=True)
        assert answer.text == alone.text
        assert answer.routing.ids.tolist() == alone.routing.ids.tolist()
        assert answer.routing.kinds == alone.routing.kinds
        assert torch.allclose(answer.routing.probs, alone.routing.probs, atol=1e-4)


def test_an_ordinary_token_may_be_the_end(make_model, processor):
    model = make_model()
    ids = by_hand(model, processor, "<|user|>\nHello<|end|>\n<|assistant|>\n", new=6)
    model.generation_config.eos_token_id = ids[3]
    answer = ask(model, processor, "Hello", max_new_tokens=6)
    end = ids.index(ids[3])
    assert answer.tokens == end + 1
    assert answer.text == processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    assert "".join(stream(model, processor, "Hello", max_new_tokens=6)) == answer.text
