"""Dtypes, attention back ends, gradient checkpointing, torch.compile, placement on devices."""

import pytest
import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from packaging.version import Version

from cephalo_lite import Phi3VForCausalLM

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

PROMPT = "<|user|>\n<|image_1|>\nHi<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def inputs(small_processor, synth) -> dict:
    return dict(small_processor(synth(60, 60), PROMPT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(make_small, inputs, dtype):
    """All is computed in the dtype of the weights, whatever that of the pictures."""
    want = make_small()(**inputs).logits
    model = make_small().to(dtype)
    seen = set()
    hooks = [
        module.register_forward_hook(lambda _, given, out: seen.add(out.dtype))
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm))
    ]
    out = model(**inputs, output_hidden_states=True)
    again = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    for hook in hooks:
        hook.remove()
    assert seen == {dtype} == {out.logits.dtype} == {state.dtype for state in out.hidden_states}
    torch.testing.assert_close(again.logits, out.logits, **CLOSE)
    assert not torch.is_autocast_enabled("cpu")
    assert (out.logits.float() - want).abs().mean() < 0.05 * want.abs().mean()
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_attention_back_ends_agree(make_small, inputs):
    model = make_small()
    results = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert model.model.vision_embed_tokens.img_processor.config._attn_implementation == name
        results[name] = model(**inputs).logits
    torch.testing.assert_close(results["eager"], results["sdpa"], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is CUDA, flash attention may be installed"
)
def test_flash_attention_that_is_not_there(load_golden):
    with pytest.raises(ImportError, match="FlashAttention2"):
        load_golden(attn_implementation="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_flash_attention(make_small, small_processor, synth):
    pytest.importorskip("flash_attn")
    texts = [PROMPT, "<|user|>\nHi<|end|>\n<|assistant|>\n"]
    batch = small_processor([[synth(60, 60)], []], texts, padding=True, padding_side="right").to(
        "cuda"
    )
    real = batch["attention_mask"].bool()
    for window in (None, 7):
        model = make_small(sliding_window=window).to("cuda", torch.bfloat16)
        want = model(**batch).logits[real]
        model.set_attn_implementation("flash_attention_2")
        got = model(**batch).logits[real]
        assert (got - want).abs().mean() < 0.05 * want.abs().mean()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_small, inputs, reentrant):
    """Gradients are those without it, in the tower as well."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 359, -100)
    gradients = []
    for checkpointing in (False, True):
        model = make_small().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.vision_embed_tokens.img_processor.encoder.layers[
                0
            ].gradient_checkpointing
            if reentrant:
                model.enable_input_require_grads()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    plain, checkpointed = gradients
    unused = {name for name, gradient in plain.items() if gradient is None}
    assert all(
        "layers.2." in name or "post_layernorm" in name for name in unused
    )  # the tower's unused end
    tower = [name for name in plain if "img_processor.encoder.layers.0" in name]
    assert all(plain[name].abs().sum() > 0 for name in tower if "k_proj.bias" not in name)
    for name, gradient in plain.items():
        if gradient is None or (
            reentrant and "img_processor" in name and checkpointed[name] is None
        ):
            continue
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
    if not reentrant:
        assert {name for name, gradient in checkpointed.items() if gradient is None} == unused


def test_dropout_on_pictures_only(make_small, inputs):
    """embd_pdrop acts where the published code applies it: on prompts with pictures."""
    model = make_small(embd_pdrop=0.5).train()
    text = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(model(text).logits, model(text).logits, **CLOSE)
    torch.manual_seed(0)
    assert not torch.allclose(model(**inputs).logits, model(**inputs).logits, **CLOSE)
    torch.testing.assert_close(
        model.eval()(**inputs).logits, make_small()(**inputs).logits, **CLOSE
    )


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.21"),
    reason="transformers before 5.21 chooses the position factors by a branch",
)
@torch.no_grad()
def test_compile_of_the_text_path(make_small):
    """One graph without breaks, for texts on either side of the change of position factors."""
    model = make_small(original_max_position_embeddings=16, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 20):
        ids = torch.randint(3, 350, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        got = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@torch.no_grad()
def test_device_map(load_golden, golden_case):
    case = golden_case("plain_text_only")
    model = load_golden(device_map="cpu")
    torch.testing.assert_close(model(case["input_ids"]).logits, case["logits"], atol=1e-4, rtol=0)
    assert model.device.type == "cpu"


@torch.no_grad()
def test_parts_on_different_places(make_small, inputs, tmp_path):
    """Dispatched by accelerate, with layers and the picture embedding waiting on the disk."""
    want = make_small()(**inputs).logits
    model = make_small()
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    places |= {
        "model.layers.0": "disk",
        "model.vision_embed_tokens": "disk",
        "model.embed_dropout": "cpu",
    }
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert {weight.device.type for weight in model.model.layers[0].parameters()} == {"meta"}
    torch.testing.assert_close(model(**inputs).logits, want)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_what_may_not_be_split():
    """A decoder layer and the picture embedding stay whole on one device."""
    with torch.device("meta"):
        from cephalo_lite import Phi3VConfig

        model = Phi3VForCausalLM(Phi3VConfig(num_hidden_layers=4)).to(torch.bfloat16)
    places = infer_auto_device_map(
        model, {0: "1GiB", 1: "1GiB", "cpu": "8GiB"}, model._no_split_modules
    )
    split = [
        name
        for name in places
        if name.count(".") > 2 or name.startswith("model.vision_embed_tokens.")
    ]
    assert not split and {0, 1} <= set(places.values())
