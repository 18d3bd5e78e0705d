"""Making the language models, and what the shipped ones can do before they are fine-tuned."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM, PhimoeForCausalLM

from cephalo_lite.tiny import text
from cephalo_lite.tiny.text import chat_rows, code_rows, make
from cephalo_lite.tiny.text.family import make_model
from cephalo_lite.tiny.text.judge import (
    answer_chat,
    answer_code,
    complete,
    complete_code,
    expert_shares,
    text_loss,
)
from cephalo_lite.tiny.text.reading import documents, function_text
from cephalo_lite.tiny.text.tokenizer import make_tokenizer
from cephalo_lite.tiny.text.training import pack, pretrain

LIBRARY = ["def one(x):\n    return x + 1\n", "A class that holds things together."]


@pytest.fixture(scope="module")
def tokenizer():
    generator = np.random.default_rng(0)
    return make_tokenizer((a + b for a, b in documents(200, LIBRARY, generator)), vocab_size=512)


@pytest.fixture(scope="module")
def shipped():
    """Name → (model in float32, tokenizer)."""
    return {
        name: (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(path),
        )
        for name, path in text.checkpoints().items()
    }


def test_the_tokenizer_writes_any_text_and_phi35_chats(tokenizer):
    for line in ("def f(x):\n    return x * 12", "čaj 茶 \t\x00", " two  spaces "):
        assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
    assert tokenizer.tokenize("2024") == list("2024")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    start = "<|system|>\nBe short.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    write = tokenizer.apply_chat_template
    assert write(messages[:2], tokenize=False, add_generation_prompt=True) == start
    assert write(messages, tokenize=False) == start + "Hello<|end|>\n<|endoftext|>"
    ids = tokenizer("<|user|><|end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]


def test_packing_keeps_every_token_in_order(tokenizer):
    blocks = pack([("one two", ""), ("three", "four")], tokenizer, block=4)
    whole = "one two<|endoftext|><|user|>\nthree<|end|>\n<|assistant|>\nfour<|end|>\n<|endoftext|>"
    assert whole.startswith(tokenizer.decode(blocks.flatten())) and blocks.shape[1] == 4
    assert blocks.numel() > len(tokenizer(whole)["input_ids"]) - 4


@pytest.mark.parametrize("name", text.MEMBERS)
def test_pretraining_learns_and_repeats(name, tokenizer):
    generator = np.random.default_rng(0)
    blocks = pack(((function_text(generator), "") for _ in range(80)), tokenizer, block=64)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make_model(name, tokenizer)
        losses = pretrain(model, blocks, steps=12, batch_size=4, progress=False)
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-3) and runs[0][-1] < runs[0][0] - 1
    assert text_loss(model, blocks[:8]) < runs[0][0] - 1
    assert not model.training


def test_the_balance_loss_evens_the_experts(tokenizer):
    generator = np.random.default_rng(0)
    blocks = pack(((function_text(generator), "") for _ in range(80)), tokenizer, block=64)
    spread = []
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        model = make_model("phimoe", tokenizer)
        pretrain(model, blocks, steps=40, batch_size=4, balance=balance, progress=False)
        shares = expert_shares(model, blocks[:16])
        assert shares.shape == (4, 8) and torch.allclose(shares.sum(-1), torch.ones(4))
        spread.append(shares.mean(0).std().item())  # the loss pools all layers
    assert spread[1] < 0.8 * spread[0]


def test_an_unknown_member_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'phi4'; there are phi3, phimoe"):
        make_model("phi4", tokenizer)


def test_quick_make_writes_models_that_load(tmp_path, capsys):
    make.main(["--quick", "--silent", "--output", str(tmp_path / "made")])
    assert "| questions answered exactly |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing partial is left
    report = json.loads((tmp_path / "made" / "family.json").read_text())
    assert report["plan"]["steps"] == {"phi3": 2, "phimoe": 2}
    for name, kind in (("phi3", Phi3ForCausalLM), ("phimoe", PhimoeForCausalLM)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "made" / name)
        assert type(model) is kind and model.dtype == torch.bfloat16


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="cephalo_lite.tiny.text.make"):
        text.checkpoints()


def test_shipped_weights_are_small_and_in_the_released_format():
    files = [path for path in text.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    with safe_open(text.checkpoints()["phimoe"] / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    layer = "model.layers.0"
    assert {f"{layer}.block_sparse_moe.experts.7.w{i}.weight" for i in (1, 2, 3)} <= names
    assert {f"{layer}.block_sparse_moe.gate.weight", f"{layer}.self_attn.q_proj.bias"} <= names
    assert "lm_head.bias" in names and "lm_head.weight" in names  # an untied head with a bias


@pytest.mark.parametrize("name", text.MEMBERS)
def test_shipped_models_complete_functions_but_do_not_answer(shipped, name):
    model, tokenizer = shipped[name]
    assert complete_code(model, tokenizer, 30, seed=1).rate >= COMPLETED[name]
    assert answer_code(model, tokenizer, code_rows(20, "test", seed=1)).rate <= 0.1
    assert answer_chat(model, tokenizer, chat_rows(60, "test", seed=1))["all"] <= 0.2


COMPLETED = {"phi3": 0.3, "phimoe": 0.3}  # well below what the model card says


@pytest.mark.parametrize("name", text.MEMBERS)
def test_shipped_models_answer_alike_alone_and_in_a_padded_batch(shipped, name):
    model, tokenizer = shipped[name]
    prompts = ["The capital of France is", "# Square every number.\ndef solve(numbers):\n"]
    together = complete(model, tokenizer, prompts, max_new_tokens=12)
    assert together == [complete(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert together[0].strip().startswith("Paris")


def test_shipped_experts_are_all_used(shipped):
    model, tokenizer = shipped["phimoe"]
    generator = np.random.default_rng(5)
    blocks = pack(((function_text(generator), "") for _ in range(120)), tokenizer, block=128)
    assert expert_shares(model, blocks).min() > 0.005
