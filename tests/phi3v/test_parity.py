"""Float32 results of the original 2024 code, reproduced: logits, hidden states, greedy answers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cephalo_lite import Phi3VConfig, Phi3VForCausalLM

TEXT, IMAGE, BATCH = "plain_text_only", "plain_image_landscape", "plain_batch2_nopos"
LOGITS = {"atol": 2e-5, "rtol": 1e-5}  # the golden pack asks for 1e-4


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, load_golden):
    return load_golden(attn_implementation=request.param)


def pictures(golden, meta, case):
    return [Image.open(golden / "images" / f"{name}.png") for name in meta["cases"][case]["images"]]


@pytest.fixture
def case(request, golden, golden_meta, golden_case, golden_processor):
    """Golden tensors, and inputs made from the golden ids (2024: negative) and pictures."""
    want = golden_case(request.param)
    inputs = {key: want[key] for key in ("input_ids", "attention_mask")}
    images = pictures(golden, golden_meta, request.param)
    if images:
        cut = golden_processor.image_processor(images)
        inputs |= {"pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}
    return want, inputs


@pytest.mark.parametrize("case", [TEXT, IMAGE, BATCH], indirect=True)
@torch.no_grad()
def test_logits_and_hidden_states(model, case):
    want, inputs = case
    out = model(**inputs, output_hidden_states=True)
    real = want["attention_mask"][
        :, want["positions"]
    ].bool()  # rows of pad tokens carry no meaning
    torch.testing.assert_close(
        out.logits[:, want["positions"]][real], want["logits"][real], **LOGITS
    )
    states = torch.stack([state[:, -1] for state in out.hidden_states])
    torch.testing.assert_close(states, want["hidden_last_token"], atol=1e-5, rtol=1e-5)
    embeds = model.model.embed(
        inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_sizes")
    )
    torch.testing.assert_close(
        embeds[:, want["positions"]][real], want["inputs_embeds"][real], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("case", [TEXT, IMAGE, BATCH], indirect=True)
def test_greedy_answers(model, case):
    want, inputs = case
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert made[:, inputs["input_ids"].shape[1] :].tolist() == want["generated"].tolist()
    assert made[:, : inputs["input_ids"].shape[1]].equal(
        inputs["input_ids"]
    )  # the prompt comes back whole


@pytest.mark.parametrize("name", [TEXT, IMAGE])
@torch.no_grad()
def test_from_prompt_to_logits(
    golden_model, golden_processor, golden, golden_meta, golden_case, name
):
    """The same through our processor: placeholder ids in the place of negative ones."""
    want = golden_case(name)
    images = pictures(golden, golden_meta, name) or None
    inputs = golden_processor(images=images, text=golden_meta["cases"][name]["prompt"])
    ids = want["input_ids"].where(want["input_ids"] >= 0, golden_processor.image_token_id)
    assert inputs["input_ids"].equal(ids)
    assert inputs["attention_mask"].equal(want["attention_mask"])
    if images:
        assert inputs["image_sizes"].equal(want["image_sizes"])
    logits = golden_model(**inputs).logits
    torch.testing.assert_close(logits[:, want["positions"]], want["logits"], **LOGITS)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["su_short", "su_long", "gqa_norope"])
@torch.no_grad()
def test_variants(golden, tiny_tower, variant, implementation):
    """Short factors, long factors (a text beyond original_max_position_embeddings), none."""
    fields = json.loads((golden / "variants" / f"{variant}.config.json").read_text())
    config = Phi3VConfig(**fields, vision_config=tiny_tower)
    config._attn_implementation = implementation
    model = Phi3VForCausalLM(config).eval()
    weights = load_file(golden / "variants" / f"{variant}.weights.safetensors")
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert all("vision_embed_tokens" in key for key in left.missing_keys)
    case = load_file(golden / "variants" / f"{variant}.case.safetensors")
    torch.testing.assert_close(model(case["input_ids"]).logits, case["logits"], **LOGITS)
    if variant == "su_long":
        assert case["input_ids"].shape[1] > config.original_max_position_embeddings
