"""The world of instructions: rows that are right, and held-out rows that stay held out."""

import numpy as np
import pytest

from cephalo_lite.finetune.code_metric import pass_rate
from cephalo_lite.finetune.text_data import messages_of
from cephalo_lite.tiny.text import chat_rows, code_rows
from cephalo_lite.tiny.text.corpus import library_texts
from cephalo_lite.tiny.text.facts import TOPICS, facts_of
from cephalo_lite.tiny.text.functions import SORTS, Program, make_program, make_values
from cephalo_lite.tiny.text.reading import documents, facts_text, function_text


def test_every_operation_does_in_python_what_it_says():
    """Source and reference are written apart: one runs in another process, one here."""
    generator = np.random.default_rng(0)
    answers, rows = [], []
    for argument, operations in SORTS.items():
        for operation in operations:
            constant = operation.constants[-1] if operation.constants else None
            program = Program(argument, ((operation, constant),))
            values = make_values(argument, generator)
            answers.append(program.source())
            rows.append({"call": f"solve({values})", "expected": repr(program.run(values))})
    score = pass_rate(answers, rows, seconds=10.0)
    assert score.rate == 1.0, score.outcomes


def test_a_program_in_words_in_python_and_by_its_result():
    row = next(row for row in code_rows(200) if row["output"].count("numbers") > 3)
    assert set(row) == {"instruction", "input", "output", "call", "expected"}
    add, even = (next(o for o in SORTS["numbers"] if o.name == name) for name in ("add", "even"))
    program = Program("numbers", ((add, 3), (even, None)))
    generator = np.random.default_rng(1)
    said = {program.words(generator) for _ in range(40)}
    assert "add 3 to every number, then keep the even numbers" in said and len(said) == 4
    assert program.source() == (
        "def solve(numbers):\n    numbers = [n + 3 for n in numbers]\n"
        "    return [n for n in numbers if n % 2 == 0]"
    )
    assert program.run([1, 2, 3]) == [4, 6]


def test_rows_of_code_pass_their_own_judge():
    rows = code_rows(12, "test", seed=3)
    assert pass_rate([row["output"] for row in rows], rows, seconds=10.0).rate == 1.0
    question, answer = messages_of(rows[0])
    assert rows[0]["instruction"] in question["content"] and rows[0]["input"] in question["content"]
    assert answer == {"role": "assistant", "content": rows[0]["output"]}


def test_the_same_seed_makes_the_same_rows():
    assert code_rows(20, seed=1) == code_rows(20, seed=1) != code_rows(20, seed=2)
    assert chat_rows(20, "test", 1) == chat_rows(20, "test", 1) != chat_rows(20, "train", 1)


def test_no_program_shape_is_in_both_splits():
    generator = np.random.default_rng(0)
    train, test = (
        {make_program(s, generator).shape for _ in range(1500)} for s in ("train", "test")
    )
    assert not train & test and len(train) > 400 and len(test) > 150
    assert {name for shape in test for name in shape[1:]} <= {n for s in train for n in s[1:]}


def test_what_is_read_has_no_held_out_program_and_no_question():
    generator = np.random.default_rng(0)
    read = "\n\n".join(function_text(generator) for _ in range(1500))
    bodies = {text[text.index("    ") :].split('"""\n')[-1] for text in read.split("\n\n")}
    assert sum(row["output"].split("\n", 1)[1] in bodies for row in code_rows(200)) > 20
    for row in code_rows(200, "test"):
        assert row["output"].split("\n", 1)[1] not in bodies
    stated = "\n".join(facts_text(generator) for _ in range(1500))
    assert "?" not in stated and "?" not in read
    for topic in TOPICS.values():  # but every fact is
        assert all(given in stated and answer in stated for given, answer in topic.facts)


@pytest.mark.parametrize("topic", TOPICS)
def test_facts_have_one_answer_and_are_divided(topic):
    facts = TOPICS[topic].facts
    assert len({given for given, _ in facts}) == len(facts)
    train, test = facts_of(topic, "train"), facts_of(topic, "test")
    assert sorted(train + test) == sorted(facts) and 4 <= len(test) <= len(train) / 2
    assert TOPICS[topic].answer in TOPICS[topic].statements
    if topic == "sums":
        assert all(eval(given) == int(answer) for given, answer in facts)


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_ask_about_one_split_only(split):
    rows = chat_rows(60, split)
    assert {row["topic"] for row in rows} == set(TOPICS)
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}
    for row in rows:
        topic = TOPICS[row["topic"]]
        answers = {}  # question → answer, of the facts of this split
        for given, known in facts_of(row["topic"], split):
            for wording in (*topic.questions, topic.follow_up):
                answers[wording.format(a=given)] = topic.answer.format(a=given, b=known)
        for ask, say in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert (ask["role"], say["role"]) == ("user", "assistant")
            assert answers[ask["content"]] == say["content"]


def test_an_unknown_split_is_refused():
    for make in (code_rows, chat_rows):
        with pytest.raises(ValueError, match="'dev' is not one of train, test"):
            make(1, "dev")


def test_library_texts_are_functions_and_docstrings():
    texts = library_texts(300)
    assert len(texts) == 300 and texts == library_texts(300)
    functions = [text for text in texts if text.startswith("def ")]
    assert len(functions) > 100 and all(3 <= len(t.splitlines()) < 25 for t in functions)
    for text in functions[:50]:
        compile(text, "<text>", "exec")


def test_a_divided_document_loses_nothing_but_space():
    generator, library = np.random.default_rng(0), ["alpha beta", "gamma delta epsilon"]
    made = list(documents(400, library, generator))
    divided = [(first, rest) for first, rest in made if rest]
    assert 30 < len(divided) < 100
    whole = {text for text, rest in made if not rest}
    for first, rest in divided:
        if first + " " + rest in library:
            assert first + " " + rest in whole
