"""`load`: from a folder to model and processor that fit each other, or an error that says why."""

import json
import shutil
import socket

import pytest
import torch

import cephalo_lite as cl
from cephalo_lite.chat import ask
from cephalo_lite.loading import load, pick_attention, stop_ids

PUBLISHED = {  # preprocessor_config.json as released: it names no crop size
    "auto_map": {
        "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
        "AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor",
    },
    "num_crops": 4,
    "num_img_tokens": 144,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Phi3VImageProcessor",
    "processor_class": "Phi3VProcessor",
}


@pytest.fixture
def saved(tmp_path, make_small, small_processor):
    """A folder as this package writes it."""
    make_small().save_pretrained(tmp_path / "dense")
    small_processor.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(params=["plain", "moe"])
def released(request, tmp_path, golden, tiny_tower):
    """A golden checkpoint in the released layout; only the tower's shape is added to its config."""
    folder = tmp_path / request.param
    folder.mkdir()
    source = "moe_k1" if request.param == "moe" else "plain"
    for file in (golden / "tokenizer").iterdir():
        shutil.copy(file, folder)
    shutil.copy(golden / source / "generation_config.json", folder)
    shutil.copy(golden / request.param / "model.safetensors", folder)
    fields = json.loads((golden / source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "vision_config": tiny_tower}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return folder


def change(folder, file="config.json", **fields):
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, **fields}))


def test_what_was_saved_is_loaded(saved, make_small):
    model, processor = load(saved)
    assert isinstance(model, cl.Phi3VForCausalLM) and isinstance(processor, cl.Phi3VProcessor)
    assert not model.training and model.dtype == torch.float32
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    own = make_small().state_dict()
    assert all(torch.equal(tensor.cpu(), own[key]) for key, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert (
        processor.tokenizer.chat_template == processor.chat_template
        or processor.tokenizer.chat_template
    )


def test_a_released_folder_answers(released, golden_case):
    model, processor = load(str(released), device="cpu")
    moe = released.name == "moe"
    assert isinstance(model, cl.Phi3VMoeForCausalLM if moe else cl.Phi3VForCausalLM)
    assert model.config.image_token_id == model.model.config.image_token_id == 359
    assert model.generation_config.eos_token_id == [2, 354, 357]  # </s>, <|endoftext|>, <|end|>
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id == 0
    assert processor.image_processor.crop_size == 336 and processor.image_processor.num_crops == 4
    case = golden_case("moe_k1_text_only" if moe else "plain_text_only")
    prompt = "<|user|>\nHello Cephalo, what is silk?<|end|>\n<|assistant|>\n"
    inputs = processor(text=prompt)
    assert torch.equal(inputs["input_ids"], case["input_ids"])
    with torch.no_grad():
        logits = model(**inputs).logits[:, case["positions"].long()]
    assert torch.allclose(logits, case["logits"], atol=1e-4)
    answer = ask(model, processor, "Hello Cephalo, what is silk?", max_new_tokens=12)
    assert (
        answer.text
        == processor.tokenizer.decode(case["generated"][0][-12:], skip_special_tokens=True).strip()
    )
    messages = [{"role": "user", "content": "<|image_1|>\nWhat?"}]
    text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n"


def test_a_mixture_is_loaded_as_one_whatever_it_calls_itself(tmp_path, make_small, small_processor):
    experts = [make_small(seed) for seed in (0, 1)]
    mixture = cl.Phi3VMoeForCausalLM.from_experts(experts[0], experts, expert_names=["a", "b"])
    mixture.save_pretrained(tmp_path / "moe")
    small_processor.save_pretrained(tmp_path / "moe")
    inputs = small_processor(text="<|user|>\nHi<|end|>\n")
    with torch.no_grad():
        known = mixture(**inputs).logits
    for kind in ("phi3_v_moe", "phi3_v"):  # the second is what the 2024 code writes at times
        change(tmp_path / "moe", model_type=kind)
        model, _ = load(tmp_path / "moe", device="cpu")
        assert isinstance(model, cl.Phi3VMoeForCausalLM) and model.config.expert_names == ["a", "b"]
        with torch.no_grad():
            assert torch.allclose(model(**inputs).logits, known, atol=1e-5)
    renamed, _ = load(tmp_path / "moe", device="cpu", expert_names=["c", "d"], k=2)
    assert renamed.config.expert_names == ["c", "d"] and cl.moe.routers(renamed)[0].k == 2


def test_a_folder_never_looks_at_the_network(saved, monkeypatch):
    import huggingface_hub.constants

    calls = []

    def refuse(self, address):
        calls.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    load(saved)
    assert calls == []


def test_dtype_and_attention(saved):
    model, _ = load(saved, dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    model.save_pretrained(saved)
    assert load(saved, device="cpu")[0].dtype == torch.float32  # a CPU is slow in half precision
    assert load(saved, dtype="auto", device="cpu")[0].dtype == torch.bfloat16
    assert load(saved, device_map="cpu")[0].dtype == torch.float32
    assert pick_attention("cpu", torch.bfloat16) == "sdpa"
    assert pick_attention("cuda", torch.float32) == pick_attention("cuda", None) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_used_with_the_checkpoints_dtype(saved):
    load(saved, dtype=torch.bfloat16)[0].save_pretrained(saved)
    model, processor = load(saved)
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    from transformers.utils import is_flash_attn_2_available

    picked = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    assert model.config._attn_implementation == picked
    assert ask(model, processor, "Hello", max_new_tokens=4).tokens


@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("config.json", {"model_type": "llama"}, "is a llama; load reads Phi-3-Vision"),
        ("config.json", {"image_token_id": 7}, r"<\|image\|> is 359 in the tokenizer, and .* 7 "),
        ("config.json", {"vocab_size": 350}, r"ids up to 359, the model reads ids below 350"),
        (
            "processor_config.json",
            {"crop_size": 56},
            "crops of 56 pixels, the vision tower reads 28",
        ),
        (
            "processor_config.json",
            {"num_img_tokens": 144},
            "counts 144 tokens a crop, the model makes 4",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(file, fields, message, saved):
    if file == "processor_config.json":
        inner = json.loads((saved / file).read_text())["image_processor"]
        fields = {"image_processor": {**inner, **fields}}
    change(saved, file, **fields)
    (saved / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_the_placeholder_comes_from_the_tokenizer(saved):
    fields = json.loads((saved / "config.json").read_text())
    fields["image_token_id"] = None
    (saved / "config.json").write_text(json.dumps(fields))
    assert load(saved)[0].config.image_token_id == 359


def test_a_folder_that_is_not_there(tmp_path, saved):
    for wrong in (
        tmp_path / "none",
        str(tmp_path / "none"),
        "./none",
        "none",
        "a/b/c",
        saved / "config.json",
    ):
        with pytest.raises(FileNotFoundError, match="no folder on this machine"):
            load(wrong)
    with pytest.raises(ValueError, match="device='cpu' or device_map"):
        load(saved, device="cpu", device_map="auto")


def test_stops_without_a_generation_config(saved):
    (saved / "generation_config.json").unlink()
    change(saved, eos_token_id=None)
    model, processor = load(saved)
    assert stop_ids(model, processor) == model.generation_config.eos_token_id == [354, 357]
