"""transformers' Auto classes and pipelines on a folder in the released format."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from cephalo_lite import (
    Phi3VConfig,
    Phi3VForCausalLM,
    Phi3VImageProcessor,
    Phi3VModel,
    Phi3VProcessor,
)

TEXTS = [
    "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "\nWhat is shown?<|end|>\n",
    "  two  spaces",
    "a<|end|> b <|image_1|>",
    "é ü 漢字\tx",
    "<s>hello</s>",
    "",
]


@pytest.mark.parametrize(
    ("auto", "own"),
    [
        (AutoConfig, Phi3VConfig),
        (AutoModel, Phi3VModel),
        (AutoModelForCausalLM, Phi3VForCausalLM),
        (AutoModelForImageTextToText, Phi3VForCausalLM),
        (AutoImageProcessor, Phi3VImageProcessor),
        (AutoProcessor, Phi3VProcessor),
    ],
)
def test_auto_classes(released, auto, own):
    assert type(auto.from_pretrained(released())) is own


def test_what_is_read(released):
    folder = released()
    processor = AutoProcessor.from_pretrained(folder)
    for image_processor in (processor.image_processor, AutoImageProcessor.from_pretrained(folder)):
        assert type(image_processor) is Phi3VImageProcessor
        assert (image_processor.num_crops, image_processor.num_img_tokens) == (16, 144)
        assert image_processor.crop_size == 336
    assert AutoProcessor.from_pretrained(folder, num_crops=4).image_processor.num_crops == 4
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    assert not model.training


@pytest.mark.parametrize("model_type", ["phi3_v", "phi3_v_moe"])
def test_the_tokenizer_is_read_as_it_is(released, golden, model_type):
    """tokenizer_config.json says LlamaTokenizer, which in transformers 5 rebuilds the file."""
    moe = {"k": 1, "num_expert_models": 3} if model_type == "phi3_v_moe" else {}
    folder = released(model_type=model_type, **moe)
    want = PreTrainedTokenizerFast(tokenizer_file=str(golden / "tokenizer" / "tokenizer.json"))
    for tokenizer in (
        AutoTokenizer.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder).tokenizer,
    ):
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == want(text)["input_ids"], text
        assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.bos_token) == (
            "left",
            "<unk>",
            "<s>",
        )


def test_round_trip_of_the_processor(released, tmp_path):
    processor = AutoProcessor.from_pretrained(released(), num_crops=3)
    processor.save_pretrained(tmp_path / "written")
    again = AutoProcessor.from_pretrained(tmp_path / "written")
    assert type(again) is Phi3VProcessor
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template
    for text in TEXTS:
        assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.fixture
def small_pipeline(small_model, small_processor):
    return pipeline("image-text-to-text", model=small_model, processor=small_processor)


def test_pipeline(small_pipeline, small_model, small_processor, synth):
    """A chat with a picture, as documented by transformers."""
    picture = synth(60, 60)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is shown?"}]
    chat = [{"role": "user", "content": parts}]
    letters = range(260, 354)
    silent = [token for token in range(384) if token not in letters]
    options = {"do_sample": False, "suppress_tokens": silent}
    (out,) = small_pipeline(
        text=chat, return_full_text=False, max_new_tokens=8, generate_kwargs=dict(options)
    )
    inputs = small_processor(
        picture, "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n"
    )
    made = small_model.generate(**inputs, max_new_tokens=8, **options)
    new = made[:, inputs["input_ids"].shape[1] :]
    answer = small_processor.batch_decode(new, skip_special_tokens=True)[0]
    assert out["generated_text"].strip() == answer.strip() != ""


def test_pipeline_of_several_turns(small_pipeline, synth):
    """The pipeline's own answer goes back in with the next question."""
    parts = [{"type": "image", "image": synth(60, 60)}, {"type": "text", "text": "What is shown?"}]
    (out,) = small_pipeline(text=[{"role": "user", "content": parts}], max_new_tokens=4)
    chat = [*out["generated_text"], {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    (out,) = small_pipeline(text=chat, max_new_tokens=4)
    assert [turn["role"] for turn in out["generated_text"]] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_pipeline_from_a_folder(make_small, small_processor, synth, tmp_path):
    make_small().save_pretrained(tmp_path)
    small_processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    assert type(pipe.model) is Phi3VForCausalLM and type(pipe.processor) is Phi3VProcessor
    out = pipe(images=synth(60, 60), text="<|image_1|>\nHi", max_new_tokens=2)
    assert out[0]["generated_text"].startswith("<|image_1|>\nHi")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_published_wish_for_flash_attention(released, key):
    """Some published files ask for flash attention; the machine and the caller decide."""
    folder = released(**{key: "flash_attention_2"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_dtype_of_a_published_file(released):
    """torch_dtype, as published files call it, is followed where "auto" is asked for."""
    model = AutoModelForCausalLM.from_pretrained(released(torch_dtype="bfloat16"), dtype="auto")
    assert model.dtype == torch.bfloat16
