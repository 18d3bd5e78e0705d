"""Float32 results of the original 2024 mixture, reproduced: logits, routing, greedy answers."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cephalo_lite.moe import routers

CASES = ["text_only", "image_landscape", "batch2_nopos"]
WAYS = ["cephalo", "eager", "grouped_mm", "batched_mm"]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # the golden pack asks for 1e-4


@pytest.fixture(scope="module")
def read_case(golden, golden_meta, golden_case, golden_processor):
    """A function that gives a case's golden tensors and model inputs, pictures included."""

    def read(k: int, case: str) -> tuple[dict, dict]:
        want = golden_case(f"moe_k{k}_{case}")
        inputs = {key: want[key] for key in ("input_ids", "attention_mask")}
        names = golden_meta["cases"][f"moe_k{k}_{case}"]["images"]
        if names:
            pictures = [Image.open(golden / "images" / f"{name}.png") for name in names]
            cut = golden_processor.image_processor(pictures)
            inputs |= {"pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}
        return want, inputs

    return read


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_routing(golden_mixture, read_case, k, case):
    model, (want, inputs) = golden_mixture(k), read_case(k, case)
    routed = []
    hooks = [r.register_forward_hook(lambda *call: routed.append(call[2])) for r in routers(model)]
    out = model(**inputs, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    real = want["attention_mask"].bool()  # rows of pad tokens carry no meaning
    at = want["positions"]
    torch.testing.assert_close(out.logits[:, at][real[:, at]], want["logits"][real[:, at]], **CLOSE)
    assert len(routed) == len(want["router_probs"])
    for layer, one in enumerate(routed):
        probs, weights, chosen = (t.unflatten(0, real.shape)[real] for t in one[1:])
        torch.testing.assert_close(probs, want["router_probs"][layer][real], **CLOSE)
        torch.testing.assert_close(weights, want["router_weights"][layer][real], **CLOSE)
        assert chosen.equal(want["router_indices"][layer][real].long())
        assert out.router_logits[layer].equal(one.logits)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_to_compute_experts(load_moe, read_case, k, way):
    model, (want, inputs) = load_moe(k, experts_implementation=way), read_case(k, "text_only")
    assert model.get_experts_implementation()[""] == way
    out, at = model(**inputs), want["positions"]
    torch.testing.assert_close(out.logits[:, at], want["logits"], **CLOSE)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_greedy_answers(golden_mixture, read_case, k, case):
    want, inputs = read_case(k, case)
    made = golden_mixture(k).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert made[:, inputs["input_ids"].shape[1] :].tolist() == want["generated"].tolist()


@torch.no_grad()
def test_gates_trained_by_the_original(load_moe, golden):
    """Its trained gates, put into this model, give the logits that they gave there."""
    model, trained = load_moe(1), load_file(golden / "gate" / "gate_fp32.safetensors")
    want = load_file(golden / "gate" / "moe_k1_after_training_text_logits.safetensors")
    before = model(want["input_ids"]).logits
    for layer, router in enumerate(routers(model)):
        state = {part: trained[f"layer{layer}.final.{part}"] for part in ("weight", "bias")}
        router.gate.load_state_dict(state)
    after = model(want["input_ids"]).logits
    torch.testing.assert_close(after, want["logits"], **CLOSE)
    assert (after - before).abs().max() > 0.1
