"""Errors say what is wrong and what to do."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cephalo_lite import Phi3VForCausalLM, Phi3VProcessor

PROMPT = "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def picture(synth) -> Image.Image:
    return synth(60, 60)


@pytest.fixture
def inputs(small_processor, picture) -> dict:
    return dict(small_processor(picture, PROMPT))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (PROMPT, 2, r"names the pictures \[1\], and 2 were given"),
        ("<|image_1|> <|image_2|>", 1, r"names the pictures \[1, 2\], and 1 were given"),
        ("no tag", 1, r"names the pictures \[\], and 1 were given"),
        ("<|image_2|>", 1, r"names the pictures \[2\]"),
        ("<|image_0|>", 1, r"names the pictures \[0\]"),
        ("<|image_1|> <|image_3|>", 2, r"names the pictures \[1, 3\], and 2 were given"),
        ("<|image_1|>", [], r"names the pictures \[1\], and 0 were given"),
        ([PROMPT, PROMPT], 3, "name 2 pictures, but 3 were given"),
        ([PROMPT, PROMPT], [["p"]], "2 prompts, but lists of pictures for 1"),
        (
            [PROMPT, "no tag"],
            [[], ["p"]],
            r"Prompt 0: it names the pictures \[1\], and 0 were given",
        ),
        (None, 1, "No text was given"),
        ([], 1, "No text was given"),
        (3, None, "No text was given"),
    ],
)
def test_pictures_and_tags_do_not_match(small_processor, picture, text, images, message):
    given = [picture] * images if isinstance(images, int) else images
    with pytest.raises(ValueError, match=message):
        small_processor(images=given, text=text, padding=True)


def broken_files(picture) -> dict[str, bytes]:
    files = {"empty": b"", "no picture": b"<html>not found</html>"}
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        files[f"truncated {kind}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    return files


def test_unreadable_files(small_processor, picture, tmp_path):
    """As a path (named in the message), as bytes, and as an opened PIL image."""
    for name, data in broken_files(picture).items():
        path = tmp_path / name
        path.write_bytes(data)
        for source in (path, str(path), data):
            with pytest.raises(ValueError, match="Could not read.*complete image file"):
                small_processor(images=[source], text=PROMPT)
    with pytest.raises(ValueError, match="truncated PNG"):
        small_processor(images=[tmp_path / "truncated PNG"], text=PROMPT)
    with pytest.raises(ValueError, match="Could not read"):
        small_processor(images=[Image.open(tmp_path / "truncated JPEG")], text=PROMPT)
    with pytest.raises(ValueError, match=r"missing\.png.*No such file"):
        small_processor(images=[tmp_path / "missing.png"], text=PROMPT)
    with pytest.raises(ValueError, match="Could not read 'data:image/png"):
        small_processor(images=["data:image/png;base64,%%%"], text=PROMPT)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "is not a picture"),
        (np.zeros((5, 5, 5, 3), np.uint8), "is not a picture"),
        (np.zeros((5, 5, 7), np.uint8), "no 1, 3 or 4 channels"),
        (np.full((5, 5, 3), -0.5), "want 0..1 or 0..255"),
        (np.full((5, 5, 3), 300.0), "want 0..1 or 0..255"),
        (np.full((5, 5, 3), np.nan), "not finite"),
        (torch.zeros(3, 0, 5), "is not a picture"),
        (3.5, "float is not a picture"),
        (Image.new("RGB", (0, 5)), "its size is 0x5"),
    ],
)
def test_arrays_that_are_no_pictures(small_processor, array, message):
    with pytest.raises(ValueError, match=message):
        small_processor(images=[array], text=PROMPT)


def test_absurd_aspect_ratio(golden_processor):
    for size in ((5000, 1), (1, 5000)):
        with pytest.raises(
            ValueError, match=r"too thin: its aspect ratio may be at most 1344 with num_crops=4"
        ):
            golden_processor(images=[Image.new("RGB", size)], text=PROMPT)
    golden_processor(images=[Image.new("RGB", (1344, 1))], text=PROMPT)


def test_prompts_of_different_length(small_processor):
    with pytest.raises(ValueError, match="pass padding=True"):
        small_processor(text=["a", "bcd"])
    with pytest.raises(ValueError, match="needs max_length >= "):
        small_processor(text=["a", "bcd"], padding="max_length", max_length=2)


def test_truncation_through_a_picture(small_processor, picture):
    with pytest.raises(
        ValueError, match="would cut a picture: raise max_length or lower num_crops"
    ):
        small_processor(picture, PROMPT, truncation=True, max_length=20)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_image_ids_and_pixels_that_do_not_match(small_model, inputs, call):
    """Placeholder ids and the negative ids of 2024 alike."""
    run = small_model if call == "forward" else partial(small_model.generate, max_new_tokens=2)
    old = inputs["input_ids"].masked_fill(inputs["input_ids"] == 359, -1)
    for ids in (inputs["input_ids"], old):
        with pytest.raises(ValueError, match="27 image tokens, but no pixel_values were given"):
            run(input_ids=ids)
        with pytest.raises(ValueError, match="pixel_values came without image_sizes"):
            run(input_ids=ids, pixel_values=inputs["pixel_values"])
    two = {key: torch.cat([inputs[key]] * 2) for key in ("pixel_values", "image_sizes")}
    with pytest.raises(ValueError, match="room for 27 image tokens, the 2 pictures fill 54"):
        run(input_ids=inputs["input_ids"], **two)
    with pytest.raises(ValueError, match="do not hold the crops"):
        run(**{**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(ValueError, match="fewer than its 27 image tokens"):
        run(**{**inputs, "input_ids": old[:, :20]})
    with pytest.raises(ValueError, match=r"names the pictures \[2\]"):
        run(**{**inputs, "input_ids": old.where(old >= 0, -2)})


def test_pixels_without_sizes_and_beams(small_model, inputs):
    inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="pixel_values came without image_sizes"):
        small_model.generate(**inputs, num_beams=2)


def test_a_prompt_that_is_too_long(make_small):
    model = make_small(max_position_embeddings=20, original_max_position_embeddings=10)
    ids = torch.full((1, 21), 5)
    with pytest.raises(ValueError, match="21 tokens; the model reads at most 20"):
        model(ids)
    with pytest.raises(ValueError, match="at most 20"):
        model.generate(ids, max_new_tokens=1)
    for options in ({}, {"use_cache": False}):
        made = model.generate(
            ids[:, :15], max_new_tokens=6, eos_token_id=None, do_sample=False, **options
        )
        assert made.shape[1] == 21  # the last id is written, not read
        with pytest.raises(ValueError, match="grown to 21 tokens"):
            model.generate(
                ids[:, :15], max_new_tokens=7, eos_token_id=None, do_sample=False, **options
            )


def test_a_text_only_checkpoint(released):
    folder = released()
    weights = load_file(folder / "model.safetensors")
    text = {key: value for key, value in weights.items() if "vision" not in key}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is it a text-only Phi-3"):
        Phi3VForCausalLM.from_pretrained(folder)


def test_a_missing_shard(released):
    folder = released(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="model-00002-of-00003"):
        Phi3VForCausalLM.from_pretrained(folder)


def test_a_damaged_shard(released):
    folder = released(shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="damaged or incomplete.*Download it again"):
        Phi3VForCausalLM.from_pretrained(folder)


def test_weights_that_are_missing_or_left_over(released):
    folder = released()
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(
        weights | {"model.layers.7.x": gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=r"1 weights are missing.*down_proj.*1 weights have no place.*layers\.7\.x"
    ):
        Phi3VForCausalLM.from_pretrained(folder)
    Phi3VForCausalLM.from_pretrained(folder, strict=False)


def test_another_tower(released, tiny_tower):
    with pytest.raises(ValueError, match=r"have another shape.*\(32,\), not \(16,\)"):
        Phi3VForCausalLM.from_pretrained(released(vision_config={**tiny_tower, "hidden_size": 16}))


def test_a_wrong_vocabulary(released, small_model, golden_tokenizer, tmp_path):
    """In a checkpoint, in ids, and in a tokenizer without Phi-3's tokens."""
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is \(384, 64\), not \(400, 64\).*vocabulary"
    ):
        Phi3VForCausalLM.from_pretrained(released(vocab_size=400))
    with pytest.raises(ValueError, match="the id 384, the model's vocabulary ends at 383"):
        small_model(torch.tensor([[1, 384]]))
    tokenizer = json.loads(golden_tokenizer.backend_tokenizer.to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    tokenizer["model"]["vocab"] = {
        k: v for k, v in tokenizer["model"]["vocab"].items() if not k.startswith("<|")
    }
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    other = type(golden_tokenizer)(tokenizer_file=str(tmp_path / "other.json"))
    with pytest.raises(
        ValueError, match=r"lacks <\|assistant\|>, <\|end\|>, <\|image\|>, <\|user\|>"
    ):
        Phi3VProcessor(None, other)
