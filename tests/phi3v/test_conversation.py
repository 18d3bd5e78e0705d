"""A second turn on the cache of the first equals reading all anew, pictures included."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

NEW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
FIRST = {
    0: "<|user|>\nHi<|end|>\n<|assistant|>\n",
    1: "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n",
}


def second_turn(start: int, images: int) -> str:
    tags = "".join(f"<|image_{start + n + 1}|>\n" for n in range(images))
    return f"<|end|>\n<|user|>\n{tags}And now?<|end|>\n<|assistant|>\n"


def with_answer(inputs, answer: torch.Tensor, turn, pictures: dict) -> dict:
    """The ids of the first turn, the answer, and those of the second turn, with all pictures."""
    ids = torch.cat([inputs["input_ids"], answer, turn], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1, 2])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_second_turn(small_model, small_processor, synth, first, second, kind):
    images = [synth(60, 60), synth(90, 30), synth(30, 90)][: first + second]
    inputs = small_processor(images[:first] or None, FIRST[first])
    cache = DynamicCache(config=small_model.config)
    if kind == "static":
        cache = StaticCache(small_model.config, max_cache_len=400)
    made = small_model.generate(**inputs, past_key_values=cache, **NEW)
    answer = made[:, inputs["input_ids"].shape[1] :]

    whole = small_processor(images or None, FIRST[first] + second_turn(first, second))
    turn = small_processor(images[first:] or None, second_turn(0, second), add_special_tokens=False)
    pictures = {key: whole[key] for key in ("pixel_values", "image_sizes") if key in whole}
    full = with_answer(inputs, answer, turn["input_ids"], pictures)
    want = small_model.generate(**full, use_cache=False, **NEW)
    got = small_model.generate(**full, past_key_values=cache, **NEW)
    assert got.equal(want)


@pytest.mark.parametrize("again", [False, True])
def test_second_turn_with_negative_ids(small_model, small_processor, synth, again):
    """2024 ids: turn two shows picture 2 or, without a copy of its pixels, picture 1 again."""
    tags = "<|image_1|>" if again else "<|image_2|>"
    image_1, image_2 = synth(60, 60), synth(90, 30)
    inputs = small_processor(image_1, "<|user|>\n<|image_1|>\nHi")
    turn = small_processor(
        [image_1 if again else image_2], "<|image_1|>\nAnd now?", add_special_tokens=False
    )
    old = inputs["input_ids"].masked_fill(inputs["input_ids"] == 359, -1)
    cache = DynamicCache(config=small_model.config)
    made = small_model.generate(**{**inputs, "input_ids": old}, past_key_values=cache, **NEW)
    number = int(tags[8])
    turn_ids = turn["input_ids"].masked_fill(turn["input_ids"] == 359, -number)
    both = small_processor.image_processor([image_1, image_2][:number])
    pictures = {key: both[key] for key in ("pixel_values", "image_sizes")}
    full = with_answer({"input_ids": old}, made[:, old.shape[1] :], turn_ids, pictures)
    want = small_model.generate(**full, use_cache=False, **NEW)
    assert small_model.generate(**full, past_key_values=cache, **NEW).equal(want)


def test_second_turn_of_a_batch(small_model, small_processor, synth):
    """Rows that have shown and will show different numbers of pictures."""
    texts = ["<|image_1|>\nHi", "Hi", "<|image_1|>\n<|image_2|>"]
    pictures = [[synth(60, 60)], [], [synth(90, 30), synth(30, 90)]]
    inputs = small_processor(pictures, texts, padding=True)
    cache = DynamicCache(config=small_model.config)
    made = small_model.generate(**inputs, past_key_values=cache, **NEW)
    turns = ["<|image_1|>\nAnd", "<|image_1|>\nAnd", "And"]
    added = [[synth(64, 64, kind=1)], [synth(64, 64, kind=2)], []]
    turn = small_processor(added, turns, padding=True, add_special_tokens=False)
    full = {
        "input_ids": torch.cat([made, turn["input_ids"]], dim=1),
        "attention_mask": torch.cat(
            [
                inputs["attention_mask"],
                torch.ones(3, NEW["max_new_tokens"], dtype=torch.long),
                turn["attention_mask"],
            ],
            dim=1,
        ),
    }
    cut = small_processor.image_processor(
        [image for pair in zip(pictures, added, strict=True) for images in pair for image in images]
    )
    full |= {key: cut[key] for key in ("pixel_values", "image_sizes")}
    want = small_model.generate(**full, use_cache=False, **NEW)
    assert small_model.generate(**full, past_key_values=cache, **NEW).equal(want)


def test_second_turn_without_its_pictures(small_model, small_processor, synth):
    """A picture in turn two needs its pixels."""
    inputs = small_processor(synth(60, 60), "<|image_1|>\nHi")
    cache = DynamicCache(config=small_model.config)
    made = small_model.generate(**inputs, past_key_values=cache, **NEW)
    turn = small_processor(synth(60, 60), "<|image_1|>\nAnd now?", add_special_tokens=False)[
        "input_ids"
    ]
    old = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    for pictures in (old, {}):
        full = with_answer({"input_ids": made[:, :0]}, made, turn, pictures)
        with pytest.raises(ValueError, match="but no pixel_values were given"):
            small_model.generate(**full, past_key_values=cache, **NEW)
