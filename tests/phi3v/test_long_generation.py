"""Answers that outgrow the short position factors: the cache must not mix short and long ones."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

LIMIT = 48  # original_max_position_embeddings of the models here
NEW = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(make_small):
    return make_small(original_max_position_embeddings=LIMIT)


def text_of(length: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 350, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0] = 1
    return ids


def new_ids(model, inputs, **options) -> list:
    made = model.generate(**inputs, **NEW | options)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def recomputed(model, inputs) -> list:
    """Greedy ids of one row, each from a forward pass over the whole text."""
    ids, answer = inputs["input_ids"], []
    for _ in range(NEW["max_new_tokens"]):
        with torch.no_grad():
            step = (
                model(**{**inputs, "input_ids": ids, "attention_mask": None})
                .logits[:, -1]
                .argmax(-1)
            )
        answer.append(int(step))
        ids = torch.cat([ids, step[None]], dim=1)
    return answer


def test_the_factors_matter(model, make_small):
    """Without the change of factors the answer is another one: else nothing is tested."""
    inputs = {"input_ids": text_of(LIMIT - 5)}
    assert recomputed(model, inputs) != recomputed(
        make_small(original_max_position_embeddings=256), inputs
    )


@pytest.mark.parametrize("length", [LIMIT - 15, LIMIT - 1, LIMIT, LIMIT + 1])
def test_text(model, length):
    inputs = {"input_ids": text_of(length)}
    want = recomputed(model, inputs)
    caches = [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache(config=model.config)},
        {"past_key_values": StaticCache(model.config, max_cache_len=length + 20)},
    ]
    for options in caches:
        assert new_ids(model, inputs, **options) == [want], options


@pytest.mark.parametrize("images", [1, 2])
def test_with_pictures(make_small, small_processor, synth, images):
    """The text is read again with its pictures."""
    prompt = "".join(f"<|image_{n}|>\n" for n in range(1, images + 1)) + "Hi"
    inputs = small_processor([synth(60, 60), synth(30, 90)][:images], prompt)
    model = make_small(original_max_position_embeddings=inputs["input_ids"].shape[1] + 6)
    want = recomputed(model, inputs)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert new_ids(model, inputs, **options) == [want]


def test_with_negative_ids(make_small, small_processor, synth):
    """The same with the ids of 2024, of which each picture needs but one copy."""
    inputs = small_processor(synth(60, 60), "<|image_1|>a<|image_1|>")
    old = {
        **inputs,
        "pixel_values": inputs["pixel_values"][:1],
        "image_sizes": inputs["image_sizes"][:1],
    }
    old["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 359, -1)
    model = make_small(original_max_position_embeddings=inputs["input_ids"].shape[1] + 6)
    want = new_ids(model, inputs)
    for options in ({}, {"use_cache": False}):
        assert new_ids(model, old, **options) == want


def test_left_padded_batch(model, small_processor, synth):
    """The longest row decides for all, cached or not; padding does not count."""
    texts = ["<|image_1|>\nHi there, ", "Hello", "<|image_1|>"]
    batch = small_processor([synth(60, 60), synth(90, 90)], texts, padding=True)
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert min(lengths) + 16 < LIMIT < max(lengths) + 16 and max(lengths) < LIMIT
    want = new_ids(model, batch, use_cache=False)
    assert new_ids(model, batch) == want
    wider = {key: batch[key] for key in ("pixel_values", "image_sizes")}
    gap = torch.zeros(3, 20, dtype=torch.long)
    wider["input_ids"] = torch.cat([gap, batch["input_ids"]], dim=1)
    wider["attention_mask"] = torch.cat([gap, batch["attention_mask"]], dim=1)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert new_ids(model, wider, **options) == want


def test_beams(model):
    inputs = {"input_ids": text_of(LIMIT - 5)}
    want = new_ids(model, inputs, num_beams=3, use_cache=False)
    assert new_ids(model, inputs, num_beams=3) == want


def test_back_to_a_short_text(model):
    """The factors of a long text do not stay for a short one."""
    short = {"input_ids": text_of(20)}
    with torch.no_grad():
        want = model(**short).logits
        model(**{"input_ids": text_of(LIMIT + 20)})
        torch.testing.assert_close(model(**short).logits, want, **CLOSE)
