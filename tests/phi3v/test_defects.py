"""What the 2024 code gets wrong (specification, section 6) is right here."""

import pytest
import torch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

PROMPT = "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n"
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def shapes(synth):
    """Two pictures of equal size and one of another."""
    return {"a": synth(60, 60), "b": synth(60, 60, kind=1), "wide": synth(90, 30, kind=2)}


def negative(inputs, numbers: list[int]) -> dict:
    """The same inputs with the ids of 2024: minus the picture's number in place of its tokens."""
    ids = inputs["input_ids"].clone()
    for row in ids:
        is_image = row == 359
        starts = is_image & ~torch.cat([torch.tensor([False]), is_image[:-1]])
        for start in starts.nonzero().flatten().tolist():
            length = int((~is_image[start:]).float().argmax()) or len(row) - start
            row[start : start + length] = -numbers.pop(0)
    return {**inputs, "input_ids": ids}


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("style", ["placeholder", "negative"])
def test_the_tensors_of_the_caller_stay_as_they_are(small_model, small_processor, shapes, style):
    """And so a second call gives what the first gave."""
    inputs = dict(small_processor(shapes["a"], PROMPT))
    if style == "negative":
        inputs = negative(inputs, [1])
    before = {key: value.clone() for key, value in inputs.items()}
    first = logits(small_model, inputs)
    made = small_model.generate(**inputs, **NEW)
    assert all(inputs[key].equal(before[key]) for key in before)
    torch.testing.assert_close(logits(small_model, inputs), first, **CLOSE)
    assert made[:, : before["input_ids"].shape[1]].equal(before["input_ids"])
    assert small_model.generate(**inputs, use_cache=False, **NEW).equal(made)


@pytest.mark.parametrize("second", ["b", "wide"])
def test_pictures_go_to_the_tag_that_names_them(small_model, small_processor, shapes, second):
    """Tags in reverse order and pictures swapped: the same prompt, hence the same logits."""
    a, b = shapes["a"], shapes[second]
    straight = small_processor([a, b], "x <|image_1|> y <|image_2|> z")
    crossed = small_processor([b, a], "x <|image_2|> y <|image_1|> z")
    other = small_processor([b, a], "x <|image_1|> y <|image_2|> z")
    torch.testing.assert_close(logits(small_model, straight), logits(small_model, crossed), **CLOSE)
    assert not torch.allclose(
        logits(small_model, straight)[0, -1], logits(small_model, other)[0, -1], **CLOSE
    )


def test_a_picture_named_twice_is_shown_twice(small_model, small_processor, shapes):
    repeated = small_processor(shapes["a"], "<|image_1|> x <|image_1|>")
    copies = small_processor([shapes["a"], shapes["a"]], "<|image_1|> x <|image_2|>")
    other = small_processor([shapes["a"], shapes["b"]], "<|image_1|> x <|image_2|>")
    torch.testing.assert_close(logits(small_model, repeated), logits(small_model, copies), **CLOSE)
    assert not torch.allclose(
        logits(small_model, repeated)[0, -1], logits(small_model, other)[0, -1], **CLOSE
    )


@pytest.mark.parametrize("order", [[1, 2], [2, 1], [1, 1, 2], [2, 1, 2]], ids=str)
def test_negative_ids_name_pictures_too(small_model, small_processor, shapes, order):
    """With the ids of 2024 pictures come once each, by number; ours come in the order of use."""
    pictures = [shapes["a"], shapes["wide"]]
    prompt = " x ".join(f"<|image_{n}|>" for n in order)
    ours = small_processor(pictures, prompt)
    old = negative(dict(ours), list(order))
    by_number = small_processor.image_processor(pictures)
    old |= {key: by_number[key] for key in ("pixel_values", "image_sizes")}
    torch.testing.assert_close(logits(small_model, old), logits(small_model, ours), **CLOSE)


def test_negative_ids_of_a_batch(small_model, small_processor, shapes):
    """Numbers count within a row: each begins with picture 1."""
    texts = ["<|image_2|> x <|image_1|>", "Hi", "<|image_1|>"]
    pictures = [[shapes["a"], shapes["wide"]], [], [shapes["b"]]]
    ours = small_processor(pictures, texts, padding=True)
    old = negative(dict(ours), [2, 1, 1])
    by_number = small_processor.image_processor([image for images in pictures for image in images])
    old |= {key: by_number[key] for key in ("pixel_values", "image_sizes")}
    torch.testing.assert_close(logits(small_model, old), logits(small_model, ours), **CLOSE)


def test_adjacent_negative_runs_of_one_picture(small_model, small_processor, shapes):
    """Twice the same picture without a token between."""
    ours = small_processor(shapes["a"], "<|image_1|><|image_1|>x", add_special_tokens=False)
    assert (ours["input_ids"][0, :54] == 359).all()
    old = {**ours, "input_ids": ours["input_ids"].masked_fill(ours["input_ids"] == 359, -1)}
    old |= {key: ours[key][:1] for key in ("pixel_values", "image_sizes")}
    torch.testing.assert_close(logits(small_model, old), logits(small_model, ours), **CLOSE)


def test_batches_with_different_numbers_of_pictures(small_model, small_processor, shapes):
    texts = ["Hi there, you", PROMPT, "<|image_1|> and <|image_2|>?"]
    pictures = [[], [shapes["a"]], [shapes["wide"], shapes["b"]]]
    batch = small_processor(pictures, texts, padding=True, padding_side="right")
    together = logits(small_model, batch)
    for row, (text, images) in enumerate(zip(texts, pictures, strict=True)):
        single = logits(small_model, small_processor(images or None, text))
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], single[0], atol=1e-5, rtol=1e-4)


def test_only_real_crops_and_needed_layers_are_computed(small_model, small_processor, shapes):
    """A 90x30 picture has three crops and the global one; the tower's last layer is never used."""
    tower = small_model.model.vision_embed_tokens.img_processor
    crops, last = [], []
    hooks = [
        tower.embeddings.register_forward_hook(
            lambda module, inputs, output: crops.append(len(output))
        ),
        tower.encoder.layers[-1].register_forward_hook(lambda *_: last.append(1)),
        tower.post_layernorm.register_forward_hook(lambda *_: last.append(1)),
    ]
    inputs = small_processor(shapes["wide"], PROMPT)
    assert inputs["pixel_values"].shape[1] == 5
    logits(small_model, inputs)
    logits(small_model, small_processor([shapes["wide"], shapes["a"]], "<|image_1|> <|image_2|>"))
    for hook in hooks:
        hook.remove()
    assert crops == [4, 4 + 5] and not last


def test_padding_crops_do_not_matter(small_model, small_processor, shapes):
    inputs = small_processor(shapes["wide"], PROMPT)
    want = logits(small_model, inputs)
    inputs["pixel_values"][:, 4:] = float("nan")
    torch.testing.assert_close(logits(small_model, inputs), want, **CLOSE)


def test_picture_first_and_last(small_model, small_processor, shapes, make_small):
    """Both orders of a picture's parts: the released one and "glb_sub"."""
    inputs = small_processor(shapes["wide"], PROMPT)
    swapped = make_small(embd_layer={"hd_transform_order": "glb_sub"})
    with torch.no_grad():
        (ours,) = small_model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        (other,) = swapped.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    detail = 2 * (3 * 2 + 1)  # lines of three crops of 2 tokens and an end
    torch.testing.assert_close(torch.cat([other[7:], other[6:7], other[:6]]), ours)
    assert ours.shape == (detail + 1 + 2 * 3, 32)


def test_embeddings_of_input_and_output(make_small, small_processor, shapes):
    model = make_small()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    inputs = small_processor(shapes["a"], PROMPT)
    want = logits(model, inputs)
    model.resize_token_embeddings(400)
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == 400
    torch.testing.assert_close(logits(model, inputs)[..., :384], want, **CLOSE)
    labels = inputs["input_ids"].clone()
    labels[0, -1] = 399  # one of the new tokens
    assert model(**inputs, labels=labels).loss.isfinite()
    model.enable_input_require_grads()
    assert model(**inputs).logits.requires_grad


def test_a_switch_of_the_configuration_reaches_the_whole_model(make_small):
    model = make_small()
    assert model.config is model.model.config
    model.config.use_cache = False
    assert model(torch.tensor([[1, 5]])).past_key_values is None
