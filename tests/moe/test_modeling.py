"""The mixture as a transformers model: equal experts, generation, training, embeddings, placing."""

import pytest
import torch

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.moe import Router

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def mixture(make_mixture) -> Phi3VMoeForCausalLM:
    """Three experts, one per token; tests leave it as it is."""
    return make_mixture()


@pytest.fixture(scope="module")
def pictured(small_processor, synth) -> dict:
    """Two prompts of different length, one with two pictures, one with one."""
    pictures = [[synth(40, 30, kind=0), synth(30, 30, kind=1)], [synth(30, 60, kind=2)]]
    texts = ["<|image_1|> ab <|image_2|>?", "what is <|image_1|>"]
    return small_processor(images=pictures, text=texts, padding=True)


@pytest.mark.parametrize(("k", "router"), [(1, "cephalo"), (2, "cephalo"), (2, "renormalised")])
@torch.no_grad()
def test_equal_experts_are_the_dense_model(make_mixture, small_model, pictured, k, router):
    """The weights of the chosen experts sum to one, so equal experts change nothing."""
    model = make_mixture(same=True, k=k, router=router)
    torch.testing.assert_close(model(**pictured).logits, small_model(**pictured).logits, **CLOSE)


@torch.no_grad()
def test_every_part_matters(mixture, pictured):
    """Gates, each expert and the pictures: change one and the logits change."""
    want = mixture(**pictured).logits
    layer = mixture.model.layers[0].mlp
    parts = [layer.gating_layer.gate.weight, *layer.experts.gate_up_proj, *layer.experts.down_proj]
    for part in parts:
        before = part.clone()
        part.mul_(-1)
        assert (mixture(**pictured).logits - want).abs().max() > 1e-3
        part.copy_(before)
    pixels = pictured["pixel_values"]
    other = mixture(**pictured | {"pixel_values": pixels.flip(-1)}).logits
    assert (other - want).abs().max() > 1e-3
    torch.testing.assert_close(mixture(**pictured).logits, want, **CLOSE)


def test_generation_with_pictures_batch_and_cache(mixture, pictured):
    asked = {key: tensor.clone() for key, tensor in pictured.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = mixture.generate(**asked, **options)
    assert made.equal(mixture.generate(**asked, use_cache=False, **options))
    assert all(tensor.equal(pictured[key]) for key, tensor in asked.items())  # the caller's own
    assert made[:, : asked["input_ids"].shape[1]].equal(asked["input_ids"])


@pytest.mark.parametrize("k", [1, 2])
def test_beam_search_of_equal_experts_is_that_of_the_dense_model(
    make_mixture, small_model, pictured, k
):
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    model = make_mixture(same=True, k=k)
    assert model.generate(**pictured, **options).equal(small_model.generate(**pictured, **options))


@pytest.mark.parametrize("k", [1, 2])
def test_gradient_checkpointing_gives_equal_gradients(make_mixture, text_ids, k):
    model = make_mixture(k=k).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(text_ids, labels=text_ids, output_router_logits=True)
        (out.loss + out.aux_loss).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    saved = gradients()
    assert plain.keys() == saved.keys()
    assert any("experts" in name for name in plain) and any("gate." in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, **CLOSE, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_hidden_autocast(make_mixture, pictured, dtype):
    """Every product of the decoder is computed in the model's own dtype."""
    model, seen = make_mixture().to(dtype), set()
    want = make_mixture()(**pictured).logits
    watched = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Router))]
    watched += [layer.mlp.experts for layer in model.model.layers]
    for module in watched:
        module.register_forward_hook(
            lambda module, args, out: seen.update(
                {args[0].dtype, (out[0] if isinstance(out, tuple) else out).dtype}
            )
        )
    out = model(**pictured)
    assert seen == {dtype}
    real = pictured["attention_mask"].bool()
    assert (out.logits - want)[real].abs().median() < 0.1


@torch.no_grad()
def test_bfloat16_generates_with_pictures(make_mixture, pictured):
    made = make_mixture().bfloat16().generate(**pictured, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > pictured["input_ids"].shape[1]


def test_embeddings_and_head_are_the_ones_in_use(make_mixture, text_ids, tmp_path):
    """The published class gave its dead head here, or an AttributeError."""
    model = make_mixture()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    before = model(text_ids).logits
    model.resize_token_embeddings(400)
    assert model.config.vocab_size == 400 == model.lm_head.out_features
    after = model(text_ids).logits
    torch.testing.assert_close(after[..., :384], before, **CLOSE)
    assert after.shape[-1] == 400
    model.save_pretrained(tmp_path)
    again = Phi3VMoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(text_ids).logits, after, **CLOSE)


@pytest.mark.parametrize("place", ["auto", "cpu", "split"])
@torch.no_grad()
def test_device_map(mixture, text_ids, tmp_path, place):
    """ "split" keeps a layer with its experts on the disk and brings it in when it is needed."""
    mixture.save_pretrained(tmp_path / "model")
    options = {"device_map": place}
    if place == "split":
        parts = ["vision_embed_tokens", "embed_tokens", "layers.0", "norm", "rotary_emb"]
        on_cpu = dict.fromkeys([f"model.{part}" for part in parts], "cpu") | {"lm_head": "cpu"}
        options = {"device_map": on_cpu | {"model.layers.1": "disk"}}
        options["offload_folder"] = tmp_path / "offloaded"
    model = Phi3VMoeForCausalLM.from_pretrained(tmp_path / "model", **options)
    torch.testing.assert_close(model(text_ids).logits, mixture(text_ids).logits, **CLOSE)


def test_a_layer_is_never_split():
    assert "Phi3DecoderLayer" in Phi3VMoeForCausalLM._no_split_modules


def test_config_of_the_whole_is_the_config_of_the_parts(mixture):
    """In the published class, changing the outer configuration changed nothing."""
    assert mixture.model.config is mixture.config
    assert mixture.model.layers[0].mlp.experts.config is mixture.config
