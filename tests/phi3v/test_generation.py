"""Every way to generate gives what the plainest one gives: one row, greedy, without a cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

NEW = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
PROMPTS = [
    "<|user|>\nHi, how are you?<|end|>\n<|assistant|>\n",
    "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n",
    "<|user|>\n<|image_1|>\n<|image_2|>\nCompare.<|end|>\n<|assistant|>\n",
]


@pytest.fixture(scope="module")
def pictures(synth):
    return [[], [synth(60, 60)], [synth(90, 30), synth(30, 90, kind=1)]]


@pytest.fixture(scope="module")
def rows(small_processor, pictures) -> list:
    """Inputs of the single rows."""
    pairs = zip(pictures, PROMPTS, strict=True)
    return [small_processor(images=images or None, text=prompt) for images, prompt in pairs]


@pytest.fixture(scope="module")
def plain(small_model, rows) -> list[list[int]]:
    """New ids of each row: every step reads the whole text again."""
    return [generated(small_model, row, use_cache=False) for row in rows]


def generated(model, inputs, **options) -> list[int]:
    made = model.generate(**inputs, **NEW | options)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_pictures_matter(small_model, rows, plain):
    """Else the tests below would prove little."""
    assert len({tuple(ids) for ids in plain}) == 3
    for row in rows[1:]:
        changed = {**row, "pixel_values": row["pixel_values"].flip(-1, -2, 0)}
        logits, others = (small_model(**inputs).logits[0, -1] for inputs in (row, changed))
        assert (logits - others).abs().max() > 0.01


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"attn_implementation": "eager"}], ids=str
)
def test_caches(make_small, rows, plain, options):
    model = make_small()
    model.set_attn_implementation(options.get("attn_implementation", "sdpa"))
    options = {key: value for key, value in options.items() if key != "attn_implementation"}
    assert [generated(model, row, **options) for row in rows] == plain


def test_caches_of_the_caller(small_model, rows, plain):
    for row, want in zip(rows, plain, strict=True):
        length = row["input_ids"].shape[1] + 12
        for cache in (
            DynamicCache(config=small_model.config),
            StaticCache(small_model.config, max_cache_len=length),
        ):
            assert generated(small_model, row, past_key_values=cache) == want


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(small_model, small_processor, pictures, plain, side):
    """Rows with 0, 1 and 2 pictures. Padding on the right is moved to the left."""
    batch = small_processor(images=pictures, text=PROMPTS, padding=True, padding_side=side)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        made = small_model.generate(**batch, **NEW | options)
        assert made[:, batch["input_ids"].shape[1] :].tolist() == plain


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_leaves_the_logits_alone(
    make_small, small_processor, pictures, rows, implementation
):
    """Right padding needs no positions; left padding needs those that generate passes."""
    model = make_small()
    model.set_attn_implementation(implementation)
    for side in ("left", "right"):
        batch = small_processor(images=pictures, text=PROMPTS, padding=True, padding_side=side)
        mask = batch["attention_mask"]
        if side == "left":
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch).logits
        for row, inputs in enumerate(rows):
            want = model(**inputs).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], want, atol=2e-5, rtol=1e-4)


def test_beams(small_model, small_processor, pictures, rows):
    """Each beam sees the pictures of its row."""
    options = {"num_beams": 3, "length_penalty": 1.0}
    want = [generated(small_model, row, use_cache=False, **options) for row in rows]
    batch = small_processor(images=pictures, text=PROMPTS, padding=True)
    for more in ({}, {"use_cache": False}):
        made = small_model.generate(**batch, **NEW | options | more)
        assert made[:, batch["input_ids"].shape[1] :].tolist() == want


def test_several_answers_to_one_prompt(small_model, small_processor, pictures, plain):
    batch = small_processor(images=pictures, text=PROMPTS, padding=True)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    made = small_model.generate(**batch, **NEW | options)
    assert made[:, batch["input_ids"].shape[1] :].tolist() == [
        ids for ids in plain for _ in range(2)
    ]


def test_sampling_with_a_seed(small_model, rows):
    def sample(seed):
        torch.manual_seed(seed)
        return generated(small_model, rows[2], do_sample=True, temperature=1.0, top_k=0)

    assert sample(3) == sample(3) != sample(4)


def test_assisted_by_another_model(small_model, make_small, rows, plain):
    """By the same model, which is always right, and by a different one, which is mostly wrong."""
    for assistant in (make_small(seed=0), make_small(seed=7)):
        assert [generated(small_model, row, assistant_model=assistant) for row in rows] == plain


def test_assisted_by_the_prompt(small_model, small_processor, synth, rows, plain):
    """Guesses are copied from the prompt; image tokens in them are no pictures."""
    assert [generated(small_model, row, prompt_lookup_num_tokens=4) for row in rows] == plain
    prompt = "a<|image_1|>\na"  # the last token stands before the picture as well
    inputs = small_processor(synth(60, 60), prompt)
    want = generated(small_model, inputs, use_cache=False)
    assert (
        generated(small_model, inputs, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
        == want
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_image_tokens_that_the_model_writes_are_text(small_model, rows, options):
    """Whatever the cache: the placeholder in an answer is a token like any other, not a picture."""
    token = small_model.config.image_token_id

    def force(input_ids, scores):
        """The placeholder at two steps of three, the model's choice at the third."""
        if input_ids.shape[1] % 3:
            scores[:] = 0
            scores[:, token] = 1
        return scores

    for row in rows:
        made = generated(small_model, row, logits_processor=[force], **options)
        assert made.count(token) > 5
        assert made == generated(small_model, row, logits_processor=[force], use_cache=False)


def test_crops_are_computed_once(small_model, rows):
    """With a cache, the tower runs at the first step only."""
    calls = []
    hook = small_model.model.vision_embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    generated(small_model, rows[2])
    hook.remove()
    assert len(calls) == 1


def test_stops_of_the_released_vocabulary(make_small):
    """Published files say 2; the chat ends with 32007 or 32000. Who names a stop is obeyed."""
    model = make_small(
        vocab_size=32064,
        image_token_id=None,
        pad_token_id=32000,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_scaling=None,
    )
    assert model.config.image_token_id == 32044
    assert model.generation_config.eos_token_id == 2
    prompt = torch.tensor([[1, 5, 6]])

    def answer(word: int, **options) -> int:
        def force(input_ids, scores):
            scores[:] = 0
            scores[:, word if input_ids.shape[1] == 5 else 100] = 1
            return scores

        made = model.generate(
            prompt, logits_processor=[force], do_sample=False, max_new_tokens=6, **options
        )
        return made.shape[1] - 3

    assert [answer(word) for word in (2, 32000, 32007, 32001, 99)] == [3, 3, 3, 6, 6]
    assert [answer(word, eos_token_id=99) for word in (2, 32000, 32007, 99)] == [6, 6, 6, 3]
    assert [answer(word, eos_token_id=2) for word in (2, 32007)] == [3, 6]


def test_stops_of_other_vocabularies(small_model):
    config, _ = small_model._prepare_generation_config(None)
    assert config.eos_token_id == 2
