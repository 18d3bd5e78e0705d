"""Rows as chats, chats as labels: the answer is learnt, the question is not, nothing twice."""

import copy

import pytest

from cephalo_lite.finetune import (
    guanaco_messages,
    instruction_messages,
    split_rows,
    tokenize_rows,
)
from cephalo_lite.finetune.text_data import instruction_messages_2024, messages_of

ROW = {
    "Instruction": "Write a function that adds two numbers.",
    "Input": "add(1, 2)",
    "Output": "def add(a, b):\n    return a + b",
}


def learnt(tokenized, tokenizer, number: int = 0) -> str:
    """The text that the labels of a row cover."""
    labels = tokenized.dataset[number]["labels"]
    return tokenizer.decode([label for label in labels if label != -100])


def test_the_target_of_a_row_is_its_output_and_nothing_else(tokenizer):
    got = tokenize_rows([ROW], tokenizer, 256)
    assert learnt(got, tokenizer) == ROW["Output"] + "<|end|>"
    text = tokenizer.decode(got.dataset[0]["input_ids"])
    assert text.count(ROW["Instruction"]) == text.count(ROW["Input"]) == 1
    assert text == (
        "<|user|>\nWrite a function that adds two numbers.\nInput: add(1, 2)<|end|>\n"
        "<|assistant|>\ndef add(a, b):\n    return a + b<|end|>\n<|endoftext|>"
    )


def test_the_recipe_of_2024_teaches_to_say_the_question_again(tokenizer):
    row = {"messages": instruction_messages_2024(ROW)}
    got = tokenize_rows([row], tokenizer, 256)
    assert ROW["Instruction"] in learnt(got, tokenizer)
    assert tokenizer.decode(got.dataset[0]["input_ids"]).count(ROW["Instruction"]) == 2
    ours = tokenize_rows([ROW], tokenizer, 256)
    assert ROW["Instruction"] not in learnt(ours, tokenizer)


def test_an_empty_input_leaves_no_trace():
    for empty in ({"Input": ""}, {"Input": None}, {}):
        row = {key: value for key, value in ROW.items() if key != "Input"} | empty
        assert instruction_messages(row)[0]["content"] == ROW["Instruction"]


def test_all_answers_of_a_chat_are_learnt(tokenizer):
    text = (
        "### Human: What is the capital of France?### Assistant: Paris.### Human: And a colour?\n"
        "### Assistant: Red. # not a mark"
    )
    messages = guanaco_messages(text)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "And a colour?"
    got = tokenize_rows([{"text": text}], tokenizer, 256)
    assert learnt(got, tokenizer) == "Paris.<|end|>Red. # not a mark<|end|>"


def test_labels_are_those_of_trl_with_its_template_for_phi35(tokenizer):
    """TRL's own template for training marks the answers; ours differ in what ends them."""
    from trl.chat_template_utils import phi3_5_training_chat_template

    messages = messages_of({"messages": instruction_messages(ROW) * 2})
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=phi3_5_training_chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = tokenize_rows([{"messages": messages}], tokenizer, 256).dataset[0]
    assert ours["input_ids"] == theirs["input_ids"]
    marked = [i for i, m in enumerate(theirs["assistant_masks"]) if m]
    here = [i for i, label in enumerate(ours["labels"]) if label != -100]
    assert set(here) <= set(marked)
    extra = tokenizer.decode([theirs["input_ids"][i] for i in marked if i not in here])
    assert extra == "\n\n<|endoftext|>"  # the line break after each <|end|>, and the end of all


def test_rows_that_are_too_long_are_counted(tokenizer):
    long = {"instruction": "Name a colour. " * 40, "output": "Red."}
    got = tokenize_rows([ROW, long, {**ROW, "Output": "a + b " * 60}], tokenizer, 100)
    assert (len(got.dataset), got.cut, got.dropped) == (2, 2, 1)
    assert max(len(ids) for ids in got.dataset["input_ids"]) == 100
    with pytest.raises(ValueError, match="No row has an answer within max_length=100"):
        tokenize_rows([long], tokenizer, 100)


def test_the_released_tokenizer_eats_line_breaks_and_the_labels_are_right(golden_tokenizer):
    got = tokenize_rows([ROW], golden_tokenizer, 512)
    labels = [label for label in got.dataset[0]["labels"] if label != -100]
    assert golden_tokenizer.decode(labels) == ROW["Output"] + "<|end|>"


def test_what_cannot_be_learnt_from_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="fields question, reply; it needs messages"):
        messages_of({"question": "?", "reply": "!"})
    with pytest.raises(ValueError, match="No turns of '### Human:'"):
        guanaco_messages("only text")
    with pytest.raises(ValueError, match="No answer was found"):
        tokenize_rows([{"messages": [{"role": "user", "content": "?"}]}], tokenizer, 64)
    with pytest.raises(ValueError, match="no chat template"):
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        tokenize_rows([ROW], bare, 64)


def test_split_is_seeded_and_complete():
    rows = list(range(50))
    train, held_out = split_rows(rows)
    assert len(held_out) == 5 and sorted(train + held_out) == rows
    assert split_rows(rows) == (train, held_out) != split_rows(rows, seed=1)
    assert [len(part) for part in split_rows([1, 2])] == [1, 1]
    for few, share in (([1], 0.1), (rows, 0.0), (rows, 1.0)):
        with pytest.raises(ValueError, match="cannot be split"):
            split_rows(few, share)
