"""Prompts and pictures to ids, as the original where it was right; batches, padding, truncation."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cephalo_lite import Phi3VImageProcessor, Phi3VProcessor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = [
    c
    for c in json.loads((GOLDEN / "processor/processor.json").read_text())["cases"]
    if "error" not in c
]
PROMPT = "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n"


def expand(run_lengths: list[list[int]], image_token: int) -> list[int]:
    """Run-length encoded golden ids, with our placeholder in the place of negative ids."""
    return [
        image_token if value < 0 else value for value, count in run_lengths for _ in range(count)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.filterwarnings("ignore:A prompt names pictures")
def test_ids_are_those_of_the_original(case, synth, golden_processor):
    images = [synth(*size) for size in case["images"]] or None
    out = golden_processor(images=images, text=case["text"])
    assert out["input_ids"].tolist() == [
        expand(case["input_ids_rle"], golden_processor.image_token_id)
    ]
    assert out["attention_mask"].tolist() == [[1] * case["length"]]
    assert ("pixel_values" in out) == bool(images) == ("image_sizes" in out)


def test_tags_without_pictures_are_text_and_warned_of(golden_processor):
    with pytest.warns(UserWarning, match="names pictures, but none were given"):
        golden_processor(text=PROMPT)


def test_the_order_of_arguments_of_2024(synth, small_processor):
    want = small_processor(images=[synth(64, 64)], text=PROMPT)
    for got in (
        small_processor(PROMPT, [synth(64, 64)]),
        small_processor(PROMPT, synth(64, 64), return_tensors="pt"),
        small_processor(synth(64, 64), PROMPT),
        small_processor([PROMPT], [synth(64, 64)]),
    ):
        assert got["input_ids"].equal(want["input_ids"])
        assert got["pixel_values"].equal(want["pixel_values"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small_processor("<|user|>\nHi").keys() == {"input_ids", "attention_mask"}


def test_a_path_in_either_place(synth, small_processor, tmp_path):
    path = tmp_path / "picture.png"
    synth(64, 64).save(path)
    want = small_processor(synth(64, 64), PROMPT)["pixel_values"]
    for arguments in ((str(path), PROMPT), (PROMPT, str(path)), (PROMPT, path), ([path], [PROMPT])):
        assert small_processor(*arguments)["pixel_values"].equal(want)


def test_pictures_go_to_the_tag_that_names_them(synth, small_processor):
    """Pictures come out in the order in which the text uses them, as often as it does."""
    wide, tall = synth(90, 30), synth(30, 90, kind=1)
    crops = small_processor.image_processor([wide, tall])
    out = small_processor([wide, tall], "a <|image_2|> b <|image_1|> c <|image_2|>")
    assert out["image_sizes"].equal(crops["image_sizes"][[1, 0, 1]])
    assert out["pixel_values"].equal(crops["pixel_values"][[1, 0, 1]])
    first, second = crops["num_img_tokens"]
    assert first != second
    is_image = (out["input_ids"][0] == small_processor.image_token_id).tolist()
    runs = "".join("#" if flag else " " for flag in is_image).split()
    assert [len(run) for run in runs] == [second, first, second]


def test_batches_with_different_numbers_of_pictures(synth, small_processor):
    """Rows of a batch equal the single rows, padded; lists may be nested or flat."""
    one, two, three = synth(60, 60), synth(90, 30), synth(30, 90)
    prompts = ["<|user|>\nHi", "<|image_1|> a", "<|image_2|> b <|image_1|>"]
    nested = [[], [one], [two, three]]
    batch = small_processor(images=nested, text=prompts, padding=True)
    for flat in ([one, two, three], [None, one, (two, three)]):
        again = small_processor(images=flat, text=prompts, padding=True)
        assert all(again[key].equal(batch[key]) for key in batch)
    pixels = []
    for row, (prompt, images) in enumerate(zip(prompts, nested, strict=True)):
        single = small_processor(images=images or None, text=prompt)
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].equal(single["input_ids"][0])
        assert batch["input_ids"][row][~real].eq(small_processor.tokenizer.pad_token_id).all()
        assert real.tolist() == sorted(real.tolist())  # the golden tokenizer pads on the left
        pixels += [*single["pixel_values"]] if images else []
    assert batch["pixel_values"].equal(torch.stack(pixels))


def test_no_pictures_in_a_list(small_processor):
    """images=[] and [[]] mean: none (the original raised IndexError)."""
    want = small_processor(text="<|user|>\nHi")
    for images in ([], [[]]):
        got = small_processor(images=images, text="<|user|>\nHi")
        assert got.keys() == want.keys() and got["input_ids"].equal(want["input_ids"])


def test_padding(small_processor):
    texts = ["<|user|>\nHi", "<|user|>\nHi there"]
    left = small_processor(text=texts, padding=True)
    right = small_processor(text=texts, padding="longest", padding_side="right")
    assert left["attention_mask"][0].tolist() == right["attention_mask"][0].tolist()[::-1]
    assert left["input_ids"][1].equal(right["input_ids"][1])
    long = small_processor(text=texts, padding="max_length", max_length=40)
    assert long["input_ids"].shape == (2, 40)
    assert long["input_ids"][:, -left["input_ids"].shape[1] :].equal(left["input_ids"])


def test_truncation(synth, small_processor):
    """Text is cut at the right; a picture is never cut, not even its last token."""
    whole = small_processor(synth(60, 60), "<|image_1|> some text")["input_ids"]
    end = int((whole[0] == small_processor.image_token_id).nonzero().max()) + 1
    for length in (end, end + 1, whole.shape[1], 1000):
        cut = small_processor(
            synth(60, 60), "<|image_1|> some text", truncation=True, max_length=length
        )
        assert cut["input_ids"].equal(whole[:, :length])
    with pytest.raises(ValueError, match="would cut a picture"):
        small_processor(synth(60, 60), "<|image_1|> some text", truncation=True, max_length=end - 1)


def test_forms_of_output(synth, small_processor):
    tensors = small_processor(synth(60, 60), PROMPT)
    arrays = small_processor(synth(60, 60), PROMPT, return_tensors="np")
    lists = small_processor(synth(60, 60), PROMPT, return_tensors=None)
    for key, value in tensors.items():
        assert isinstance(value, torch.Tensor) and isinstance(arrays[key], np.ndarray)
        assert np.array_equal(arrays[key], value.numpy())
    assert lists["input_ids"] == tensors["input_ids"].tolist()
    ragged = small_processor(text=["a", "bcd"], return_tensors=None)["input_ids"]
    assert len(ragged[0]) < len(ragged[1])


def test_without_special_tokens(small_processor):
    bos = small_processor.tokenizer.bos_token_id
    assert small_processor(text="<|user|>\nHi")["input_ids"][0, 0] == bos
    assert bos not in small_processor(text="<|user|>\nHi", add_special_tokens=False)["input_ids"]


def test_number_of_crops_of_a_call(small_processor):
    picture = Image.new("RGB", (50, 50))
    assert small_processor(picture, PROMPT)["pixel_values"].shape[1] == 5
    few = small_processor(picture, PROMPT, num_crops=1)
    assert few["pixel_values"].shape[1] == 2
    assert (few["input_ids"] == small_processor.image_token_id).sum() == 4 + 4 + 1 + 2 * 2


def test_round_trip(tmp_path, golden_tokenizer):
    processor = Phi3VProcessor(
        Phi3VImageProcessor(num_crops=7, crop_size=112, num_img_tokens=16),
        golden_tokenizer,
        chat_template="{{- messages[0]['content'] -}}",
    )
    processor.save_pretrained(tmp_path)
    again = Phi3VProcessor.from_pretrained(tmp_path)
    cropping = again.image_processor
    assert (cropping.num_crops, cropping.crop_size, cropping.num_img_tokens) == (7, 112, 16)
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.padding_side == "left"
    text = "<|user|>\nHello, world<|end|>\n"
    assert again(text=text)["input_ids"].equal(processor(text=text)["input_ids"])


def test_decoding(small_processor):
    ids = small_processor(text="<|user|>\nHi there<|end|>\n")["input_ids"]
    (text,) = small_processor.batch_decode(ids, skip_special_tokens=True)
    assert text.split() == ["Hi", "there"]
    assert "<|user|>" in small_processor.decode(ids[0])
