"""Pictures and text as tokens: as the processor has them, cut whole, bad rows named."""

import itertools
import json

import datasets
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from cephalo_lite.finetune import (
    AnswerCollator,
    BadRowsError,
    conversation_of,
    load_rows,
    split_rows,
    tokenize_rows,
)


def picture(number: int = 0, size: tuple[int, int] = (28, 28)) -> Image.Image:
    return Image.frombytes(
        "RGB", size, bytes((i * (number + 3)) % 256 for i in range(3 * size[0] * size[1]))
    )


def chat(*turns):
    roles = ("user", "assistant") * len(turns)
    return [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


@pytest.fixture
def rows():
    return [
        {"image": picture(0), "query": "What is it?", "answer": "Glass."},
        {
            "images": [picture(1), picture(2, (60, 28))],
            "messages": chat("<|image_2|> and <|image_1|>?", "Red.", "Sure?", "Yes, it is."),
        },
        {"query": "Name a colour.", "answer": "Blue."},
    ]


def learnt(row, processor) -> list[str]:
    """The texts that the labels of a row cover, without blanks."""
    runs = itertools.groupby(row["labels"], key=lambda label: label != -100)
    decode = processor.tokenizer.decode
    return [decode(list(run)).replace(" ", "") for is_learnt, run in runs if is_learnt]


def by_processor(rows, processor):
    """The same rows through the processor itself."""
    read = [conversation_of(row) for row in rows]
    return processor(
        images=[one.pictures for one in read],
        text=[processor.apply_chat_template(one.messages) for one in read],
        padding=True,
        padding_side="right",
        return_labels=True,
    )


def test_a_batch_is_what_the_processor_makes(rows, small_processor):
    data = tokenize_rows(rows, small_processor, 512)
    want = by_processor(rows, small_processor)
    batch = AnswerCollator(small_processor)([data.dataset[i] for i in range(3)])
    assert batch.keys() == want.keys()
    for name, tensor in batch.items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)
    assert (data.cut, data.dropped, data.bad) == (0, 0, [])
    assert data.dataset["length"][:] == want["attention_mask"].sum(dim=1).tolist()
    assert "pixel_values" not in AnswerCollator(small_processor)([data.dataset[2]])


def test_all_turns_of_the_assistant_are_learnt_and_no_other(rows, small_processor):
    data = tokenize_rows(rows, small_processor, 512).dataset
    answers = [learnt(data[i], small_processor) for i in range(3)]
    assert answers == [["Glass.<|end|>"], ["Red.<|end|>", "Yes,itis.<|end|>"], ["Blue.<|end|>"]]


def test_trl_s_own_collator_writes_other_tokens(rows, small_processor):
    """Why ours: no `<s>` after the picture, as generation reads it, and the question is learnt."""
    row = {"images": [picture(0)], "messages": chat("What is it?", "Glass.")}
    ours = by_processor([row], small_processor)
    theirs = DataCollatorForVisionLanguageModeling(small_processor, max_length=512)([dict(row)])
    assert theirs["input_ids"].shape != ours["input_ids"].shape
    assert (theirs["labels"] != -100).all()


def test_a_row_is_cut_before_a_picture_never_through_it(small_processor):
    two = {
        "images": [picture(1), picture(2)],
        "messages": chat("<|image_1|>?", "Red.", "<|image_2|>?", "Blue."),
    }
    whole = tokenize_rows([two], small_processor, 512).dataset[0]
    image = [t == small_processor.image_token_id for t in whole["input_ids"]]
    starts = [i for i, x in enumerate(image) if x and not image[i - 1]]
    tokens = sum(image) // 2
    for length in range(starts[1], starts[1] + tokens + 1):
        got = tokenize_rows([two], small_processor, length)
        row = got.dataset[0]
        here = sum(t == small_processor.image_token_id for t in row["input_ids"])
        assert here == tokens * len(row["images"]) and got.cut == 1
        assert len(row["input_ids"]) == (length if here == 2 * tokens else starts[1])
    assert len(row["images"]) == 2  # at the last length the second picture is whole
    got = tokenize_rows([two, {"query": "?", "answer": "!"}], small_processor, 20)
    assert (got.dropped, len(got.dataset)) == (1, 1)
    with pytest.raises(ValueError, match="No row has an answer within max_length=20"):
        tokenize_rows([two], small_processor, 20)


@pytest.fixture
def damaged(tmp_path):
    """Rows of which three cannot be learnt, as a JSON Lines file beside its pictures."""
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "good.png")
    good = (tmp_path / "pictures" / "good.png").read_bytes()
    (tmp_path / "pictures" / "half.png").write_bytes(good[: len(good) // 2])
    rows = [
        {"image": "pictures/good.png", "query": "What?", "answer": "This."},
        {"image": "pictures/half.png", "query": "What?", "answer": "This."},
        {"image": "pictures/none.png", "query": "What?", "answer": "This."},
        {"images": ["pictures/good.png"] * 2, "query": "<|image_1|>?", "answer": "This."},
        {"query": "What?", "answer": "This."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


def test_bad_rows_are_named_before_the_training_or_skipped(damaged, small_processor, monkeypatch):
    monkeypatch.chdir("/")  # paths are relative to the file
    rows = load_rows(damaged)
    with pytest.raises(BadRowsError) as told:
        tokenize_rows(rows, small_processor, 512)
    assert [row.number for row in told.value.rows] == [1, 2, 3]
    text = str(told.value)
    assert text.startswith("3 of 5 rows cannot be learnt") and "skip_bad=True" in text
    assert "half.png" in text and "none.png" in text and "and 2 are given" in text
    got = tokenize_rows(rows, small_processor, 512, skip_bad=True)
    assert len(got.dataset) == 2 and [row.number for row in got.bad] == [1, 2, 3]
    assert len(got.dataset[0]["images"]) == 1 and got.dataset[1]["images"] == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_damaged_picture_in_a_table(damaged, small_processor, streamed):
    folder = damaged.parent / "pictures"
    pictures = [(folder / name).read_bytes() for name in ("good.png", "half.png", "good.png")]
    table = {"image": [{"bytes": p, "path": None} for p in pictures], "query": ["?"] * 3}
    table = datasets.Dataset.from_dict(table | {"answer": ["!"] * 3})
    table = table.cast_column("image", datasets.Image())
    source = table.to_iterable_dataset() if streamed else table
    got = tokenize_rows(source, small_processor, 512, skip_bad=True)
    assert len(list(got.dataset)) == 2 and [row.number for row in got.bad] == [1]


def test_pictures_for_a_model_that_reads_text_alone(tokenizer):
    with pytest.raises(BadRowsError, match="reads text alone"):
        tokenize_rows([{"image": picture(), "query": "?", "answer": "!"}], tokenizer, 64)


def test_every_source_gives_the_same_tokens(rows, small_processor, tmp_path):
    rows = [rows[0], {**rows[0], "image": picture(5), "query": "And this?"}]
    want = [row["input_ids"] for row in tokenize_rows(rows, small_processor, 512).dataset]
    pixels = AnswerCollator(small_processor)(
        list(tokenize_rows(rows, small_processor, 512).dataset)
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for number, row in enumerate(rows):
            row["image"].save(folder / f"{number}.png")
            row = {"file_name": f"{number}.png", "query": row["query"], "answer": row["answer"]}
            file.write(json.dumps(row) + "\n")
    hub = datasets.Dataset.from_list(rows)
    assert isinstance(hub.features["image"], datasets.Image)
    lists = datasets.Dataset.from_list([{**r, "images": [r["image"]]} for r in rows])
    sources = {
        "folder": load_rows(folder),
        "dataset": hub,
        "lists": lists.remove_columns("image"),
        "streamed": hub.to_iterable_dataset(),
        "generated": datasets.IterableDataset.from_generator(lambda: iter(rows)),
    }
    for name, source in sources.items():
        data = tokenize_rows(source, small_processor, 512).dataset
        got = list(data)
        assert [row["input_ids"] for row in got] == want, name
        batch = AnswerCollator(small_processor)(got)
        torch.testing.assert_close(batch["pixel_values"], pixels["pixel_values"], msg=name)
    parts = split_rows(hub, 0.5)
    assert [type(part) for part in parts] == [datasets.Dataset] * 2


def test_streamed_rows_are_counted_once_and_bad_ones_end_it(small_processor):
    good = {"image": picture(), "query": "What?", "answer": "This."}
    rows = [good, {**good, "answer": ""}, {**good, "answer": "This. " * 50}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    data = tokenize_rows(stream, small_processor, 80)
    with pytest.raises(BadRowsError, match="row 1: An answer is empty"):
        list(data.dataset)
    data = tokenize_rows(stream, small_processor, 80, skip_bad=True)
    for _ in range(2):
        assert len(list(data.dataset)) == 2
    assert ([row.number for row in data.bad], data.cut) == ([1], 1)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.jsonl does not exist"):
        load_rows(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"query": "?", "answer": "!"}\n\n{"query": \n')
    with pytest.raises(ValueError, match="Line 3 of .*rows.jsonl is no JSON"):
        load_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="Line 1 of .* is no row"):
        load_rows(tmp_path / "rows.jsonl")
