"""cephalo-serve in a second process, asked with the openai client: text, pictures, streams."""

import base64
import io
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import torch
from transformers import PhimoeConfig, PhimoeForCausalLM

import cephalo_lite as cl
from cephalo_lite.chat.serve import main
from cephalo_lite.chat.server import Server
from cephalo_lite.exporting import export
from cephalo_lite.quantize import load_4bit
from cephalo_lite.tiny.text.tokenizer import make_tokenizer

QUESTION = "What is shown in this picture?"


@pytest.fixture(scope="module")
def text_tokenizer():
    return make_tokenizer([QUESTION, "A honeycomb of fibres, and nothing else."], vocab_size=320)


@pytest.fixture(scope="module")
def phimoe(text_tokenizer):
    torch.manual_seed(0)
    tokenizer = text_tokenizer
    config = PhimoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, initializer_range=0.3,
        max_position_embeddings=256, attention_bias=True, lm_head_bias=True, bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return PhimoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(dense, mixture, phimoe, processor, text_tokenizer, tmp_path_factory) -> dict[str, str]:
    """Exported models, whose config.json names architectures that transformers does not have."""
    place = tmp_path_factory.mktemp("served")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(dense, processor, place / "dense")
        export(mixture, processor, place / "mixture")
        export(phimoe, text_tokenizer, place / "phimoe")
    packed, tokenizer = load_4bit(place / "phimoe", dtype=torch.float32, progress=False)
    packed.save_pretrained(place / "packed")
    tokenizer.save_pretrained(place / "packed")
    return {name: str(place / name) for name in ("dense", "mixture", "phimoe", "packed")}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in a second process, which is stopped at the end."""
    home = tmp_path_factory.mktemp("home")
    env = {"HF_HOME": str(home / "never-used")}
    with Server("--device", "cpu", log=home / "log", env=env) as server:
        yield server
        status = server.stop()
    assert status in (0, -15), server.log.read_text()


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def data_uri(picture) -> str:
    """The picture as a client sends it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(client, model: str, content, **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=12, **options
    )


def text_of(model, tokenizer) -> str:
    """What the model says to the question in this process."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_a_picture_is_seen_as_ask_sees_it(client, folders, pictures, name):
    model, processor = cl.load(folders[name])
    answers = []
    for picture in pictures[:2]:
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(picture)}},
            {"type": "text", "text": QUESTION},
        ]
        served = chat(client, folders[name], content).choices[0].message.content
        asked = cl.ask(model, processor, QUESTION, images=picture, max_new_tokens=12).text
        assert served.strip() == asked.strip()
        answers.append(served)
    assert answers[0] != answers[1]


def test_text_is_answered_and_streamed(client, folders, phimoe, text_tokenizer):
    whole = chat(client, folders["phimoe"], QUESTION)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    text = text_of(phimoe, text_tokenizer)
    assert whole.choices[0].message.content == text
    parts = [
        c.choices[0].delta.content for c in chat(client, folders["phimoe"], QUESTION, stream=True)
    ]
    assert sum(part is not None for part in parts) > 1
    assert "".join(part or "" for part in parts) == text


def test_experts_in_four_bits_are_served(client, folders):
    """transformers' own server fails on such a folder: its fused experts cannot read it."""
    answer = chat(client, folders["packed"], QUESTION)
    model, tokenizer = load_4bit(folders["packed"], dtype=torch.float32, progress=False)
    text = text_of(model, tokenizer)
    assert answer.choices[0].message.content == text


def test_models_can_be_listed_on_a_fresh_machine(client):
    assert list(client.models.list()) == []


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_it_listens_on_loopback_only(server):
    port = int(server.address.rpartition(":")[2])
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.open()]
    listening = [words[1] for words in lines if words[3] == "0A"]
    assert [at for at in listening if at.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


STARTS = """
import sys
from cephalo_lite.chat.server import Server
server = Server("--device", "cpu")
print(server.address, server.process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_the_process_that_started_it():
    """A notebook whose kernel is killed leaves no server behind."""
    command = [sys.executable, "-c", STARTS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as starter:
        address = starter.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            assert answer.status == 200
        starter.kill()
    end = time.monotonic() + 30
    with pytest.raises(urllib.error.URLError):
        while time.monotonic() < end:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            time.sleep(0.1)


def test_one_that_does_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)did not start.*--help"):
        Server("--no-such-option", log=tmp_path / "log")


def test_missing_packages_are_named(monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=r"cephalo_lite\[serve\]"):
        main(["x"])
