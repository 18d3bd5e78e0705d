"""Labels cover what the assistant says, and nothing else."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cephalo_lite import Phi3VImageProcessor, Phi3VProcessor

CHAT = (
    "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n"
    "<|assistant|>\nA disk.<|end|>\n<|user|>\nOf what colour?<|end|>\n"
    "<|assistant|>\nRed.\n\nA bright red.<|end|>\n"
)
ANSWERS = ["A disk.<|end|>", "Red.\n\nA bright red.<|end|>"]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with Phi-3's special tokens, in which a line break is one token."""
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|user|>",
        "<|image|>",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([CHAT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="</s>",
        padding_side="right",
    )


@pytest.fixture(params=["LLaMA-style", "byte-level"])
def processor(request, golden_tokenizer, byte_level) -> Phi3VProcessor:
    tokenizer = golden_tokenizer if request.param == "LLaMA-style" else byte_level
    return Phi3VProcessor(
        Phi3VImageProcessor(num_crops=4, crop_size=28, num_img_tokens=4), tokenizer
    )


def learnt(processor, row: torch.Tensor) -> list[str]:
    """The text of each run of labels."""
    runs, run = [], []
    for label in [*row.tolist(), -100]:
        if label >= 0:
            run.append(label)
        elif run:
            runs.append(processor.tokenizer.decode(run))
            run = []
    return runs


def same(got: list[str], want: list[str]) -> bool:
    """Equal but for spaces beside special tokens, which decoding may add."""
    return [text.replace(" <", "<").strip(" ") for text in got] == want


def test_several_turns(processor, synth):
    out = processor(synth(60, 40), CHAT, return_labels=True)
    assert out["labels"].shape == out["input_ids"].shape
    covered = out["labels"] != -100
    assert out["labels"][covered].equal(out["input_ids"][covered])
    assert same(learnt(processor, out["labels"][0]), ANSWERS)


def test_no_labels_unless_asked_for(processor, synth):
    assert "labels" not in processor(synth(60, 40), CHAT)


def test_a_chat_without_answers(processor):
    for text in ("<|user|>\nHi<|end|>\n", "<|user|>\nHi<|end|>\n<|assistant|>\n", "Hi"):
        assert (processor(text=text, return_labels=True)["labels"] == -100).all(), text


def test_cut_short(processor, synth):
    """A row cut in the middle of an answer is covered as far as it goes."""
    whole = processor(synth(60, 40), CHAT, return_labels=True)
    for length in range(whole["labels"].shape[1] - 12, whole["labels"].shape[1]):
        cut = processor(synth(60, 40), CHAT, return_labels=True, truncation=True, max_length=length)
        assert cut["labels"].equal(whole["labels"][:, :length])
        assert cut["labels"][0, -1] != -100 or length >= whole["labels"].shape[1] - 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_learnt(processor, synth, side):
    texts = [CHAT, "<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"]
    out = processor(
        [[synth(60, 40)], []], texts, padding=True, padding_side=side, return_labels=True
    )
    padded = out["attention_mask"] == 0
    assert padded[1].any() and (out["labels"][padded] == -100).all()
    assert same(learnt(processor, out["labels"][1]), ["Hello.<|end|>"])
    assert same(learnt(processor, out["labels"][0]), ANSWERS)


def test_the_loss_is_that_of_the_answers(small_model, small_processor, synth):
    """The model's loss: mean cross entropy of the labels, each from the token before."""
    out = small_processor(synth(60, 40), CHAT, return_labels=True)
    with torch.no_grad():
        result = small_model(**out)
    logits, labels = result.logits[0, :-1], out["labels"][0, 1:]
    terms = [
        -row.log_softmax(-1)[label] for row, label in zip(logits, labels, strict=True) if label >= 0
    ]
    torch.testing.assert_close(result.loss, torch.stack(terms).mean())
